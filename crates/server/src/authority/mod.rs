//! The authorities of the trust domain: one rotator task makes them, has them in the bundle before they sign, lets them
//! sign, and retires them. Everyone else reads [`Authorities`].
//!
//! [`plan`] says what is due, the manager does it, the journal remembers it. The order within a preparation is: key, journal,
//! bundle; a crash between any two leaves nothing that signs without being in the bundle.

mod domain;
mod journal;
mod make;
mod manager;
#[cfg(test)]
mod manager_tests;
#[cfg(test)]
mod minted_tests;
mod orders;
pub mod plan;
mod slots;
mod standing;
mod store;
mod tokens;
mod upstream;

pub(crate) use domain::{after, goal_of};
pub use manager::{AuthorityManager, AuthorityParts, AuthoritySettings, RotationHealth};
pub use orders::{AuthorityControl, Order, OrderError};
pub(crate) use standing::{KeyIds, Standing};
pub use store::{AuthorityStore, TaintStep};
pub(crate) use upstream::{published_upstream, with_new};

use arc_swap::{ArcSwap, ArcSwapOption};
use finial_core::{ErrorKind, UnixSeconds};
use finial_crypto::{IssueError, JwtAuthoritySigner, VerifyError, WitAuthoritySigner, X509Ca};
use finial_plugin::PluginError;
use finial_store::StoreError;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tokio::sync::watch;

/// Who speaks in the log.
const SUBSYSTEM: &str = "ca_manager";

/// Why authorities could not be loaded or rotated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The key manager does not list its keys.
    #[error("failed to get keys from key manager: {0}")]
    ListKeys(#[source] PluginError),
    /// The key manager does not make a key.
    #[error("unable to generate key: {0}")]
    GenerateKey(#[source] PluginError),
    /// The journal cannot be read.
    #[error("failed to load journal from datastore: failed to fetch CA journal from datastore: {0}")]
    FetchJournal(#[source] StoreError),
    /// The journal makes no sense.
    #[error("failed to load journal from datastore: unable to unmarshal entries from CA journal record: {0}")]
    BadJournal(#[source] prost::DecodeError),
    /// The journal cannot be written.
    #[error("could not save CA journal in the datastore: {0}")]
    SaveJournal(#[source] StoreError),
    /// The bundle cannot be read or written.
    #[error("unable to update bundle: {0}")]
    Bundle(#[source] StoreError),
    /// Orders to the whole trust domain cannot be read, or what became of them not told.
    #[error("unable to follow orders to rotate authorities: {0}")]
    Order(#[source] StoreError),
    /// The certificate was not made.
    #[error("unable to sign X509 CA: {0}")]
    Sign(#[from] IssueError),
    /// The upstream authority does not sign it.
    #[error("unable to mint X509 CA: {0}")]
    Mint(#[source] PluginError),
    /// The upstream authority does not take the key.
    #[error("unable to publish {0} key: {1}")]
    Publish(AuthorityKind, #[source] PluginError),
    /// A credential composer is against it.
    #[error("{0}")]
    Compose(#[source] PluginError),
    /// What composers made of it is not a CA for this trust domain.
    #[error("invalid X509 CA: {0}")]
    BadCa(&'static str),
    /// What the upstream authority of this name signed is not a CA for this trust domain.
    #[error("upstreamauthority({0}): X509 CA minted by upstream authority is invalid: {1}")]
    BadUpstream(String, String),
    /// The certificate was made, but what it signs does not verify: another key signed, or the roots are wrong.
    #[error("X509 CA produced an invalid X509-SVID chain: {0}")]
    Invalid(#[from] VerifyError),
    /// It took too long.
    #[error("{0} took longer than {1} s")]
    Timeout(&'static str, u64),
    /// There are none of this kind here.
    #[error("{0} functionality is disabled")]
    Off(AuthorityKind),
    /// The plan did not come to an end: a bug.
    #[error("rotation does not come to rest")]
    Restless,
}

impl AuthorityError {
    /// The cause alone where the caller says itself what failed.
    pub(crate) fn bare(&self) -> String {
        match self {
            Self::Bundle(error) => error.to_string(),
            Self::Publish(_, error) => error.to_string(),
            _ => self.to_string(),
        }
    }

    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ListKeys(e) | Self::GenerateKey(e) | Self::Mint(e) | Self::Publish(_, e) => e.kind,
            Self::FetchJournal(e) | Self::SaveJournal(e) | Self::Bundle(e) | Self::Order(e) => e.kind(),
            Self::Sign(e) => e.kind(),
            Self::Timeout(..) => ErrorKind::Timeout,
            Self::Off(_) => ErrorKind::Unimplemented,
            Self::Compose(e) => e.kind,
            Self::BadCa(_) => ErrorKind::Internal,
            Self::BadJournal(_) | Self::BadUpstream(..) | Self::Invalid(_) | Self::Restless => ErrorKind::Internal,
        }
    }
}

/// What an authority signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthorityKind {
    /// X.509-SVIDs.
    X509,
    /// JWT-SVIDs.
    Jwt,
    /// WIT-SVIDs.
    Wit,
}

impl AuthorityKind {
    /// Those that are bare keys.
    fn tokens(self) -> Option<tokens::TokenKind> {
        match self {
            Self::X509 => None,
            Self::Jwt => Some(tokens::TokenKind::Jwt),
            Self::Wit => Some(tokens::TokenKind::Wit),
        }
    }
}

impl std::fmt::Display for AuthorityKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::X509 => "X.509",
            Self::Jwt => "JWT",
            Self::Wit => "WIT",
        })
    }
}

/// An X.509 authority that may sign.
pub struct ActiveX509 {
    /// Its subject key ID, lowercase hex: what SPIRE calls the local authority ID.
    pub authority_id: String,
    /// The subject key ID of what signed it, lowercase hex; empty if it is self-signed and does not say.
    pub upstream_authority_id: String,
    /// Certificate and signer.
    pub ca: X509Ca,
}

impl ActiveX509 {
    /// The keys from which it hangs, its own included.
    fn key_ids(&self) -> KeyIds {
        KeyIds::of(std::iter::once(self.ca.certificate()).chain(self.ca.upstream_chain()))
    }
}

/// A JWT authority that may sign.
pub struct ActiveJwt {
    /// Key ID and signer.
    pub signer: JwtAuthoritySigner,
    /// Tokens must not outlive this.
    pub not_after: UnixSeconds,
}

/// A WIT authority that may sign.
pub struct ActiveWit {
    /// Key ID and signer.
    pub signer: WitAuthoritySigner,
    /// Tokens must not outlive this.
    pub not_after: UnixSeconds,
}

/// An authority in a slot, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorityState {
    /// The subject key ID in lowercase hex, or the ID of the key.
    pub authority_id: String,
    /// What it is for.
    pub status: plan::Status,
    /// When it ends.
    pub expires_at: UnixSeconds,
    /// The subject key ID of what signed it, lowercase hex; empty for keys.
    pub upstream_authority_id: String,
}

/// The two slots of one kind of authority, as operators see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotStates {
    /// The one that signs, once one does.
    pub current: Option<AuthorityState>,
    /// Its successor or its predecessor.
    pub next: Option<AuthorityState>,
}

/// The slots of all kinds of authorities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct States {
    /// X.509 authorities.
    pub x509: SlotStates,
    /// JWT authorities.
    pub jwt: SlotStates,
    /// WIT authorities.
    pub wit: SlotStates,
}

#[derive(Default)]
struct Active {
    x509: ArcSwapOption<ActiveX509>,
    jwt: ArcSwapOption<ActiveJwt>,
    wit: ArcSwapOption<ActiveWit>,
    states: ArcSwap<States>,
    changes: watch::Sender<u64>,
    /// When the last token ends that was signed: JWT-SVIDs, WIT-SVIDs.
    tokens_end: (AtomicI64, AtomicI64),
}

/// The authorities that sign now. Reading takes no lock. Clones share one state.
#[derive(Clone, Default)]
pub struct Authorities(Arc<Active>);

impl Authorities {
    /// Without any; the manager puts them in.
    pub fn new() -> Self {
        Self::default()
    }

    /// The X.509 authority, once there is one.
    pub fn x509(&self) -> Option<Arc<ActiveX509>> {
        self.0.x509.load_full()
    }

    /// The JWT authority, once there is one; never with `disable_jwt_svids`.
    pub fn jwt(&self) -> Option<Arc<ActiveJwt>> {
        self.0.jwt.load_full()
    }

    /// The WIT authority, once there is one; never without the feature flag `wit-svid`.
    pub fn wit(&self) -> Option<Arc<ActiveWit>> {
        self.0.wit.load_full()
    }

    /// What is in the slots.
    pub fn states(&self) -> Arc<States> {
        self.0.states.load_full()
    }

    /// Tells of each change; the number only grows.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    fn tokens(&self, kind: tokens::TokenKind) -> &AtomicI64 {
        match kind {
            tokens::TokenKind::Jwt => &self.0.tokens_end.0,
            tokens::TokenKind::Wit => &self.0.tokens_end.1,
        }
    }

    /// A JWT-SVID is signed that ends then.
    pub(crate) fn signs_jwt(&self, expires_at: UnixSeconds) {
        self.may_have_signed(tokens::TokenKind::Jwt, expires_at);
    }

    /// A WIT-SVID is signed that ends then.
    pub(crate) fn signs_wit(&self, expires_at: UnixSeconds) {
        self.may_have_signed(tokens::TokenKind::Wit, expires_at);
    }

    fn may_have_signed(&self, kind: tokens::TokenKind, expires_at: UnixSeconds) {
        self.tokens(kind).fetch_max(expires_at, Ordering::Relaxed);
    }

    /// When the last of the tokens of a kind ends that may have been signed here so far; 0 = there is none.
    fn tokens_end(&self, kind: tokens::TokenKind) -> UnixSeconds {
        self.tokens(kind).load(Ordering::Relaxed)
    }

    pub(crate) fn set_x509(&self, authority: Arc<ActiveX509>) {
        self.0.x509.store(Some(authority));
        self.0.changes.send_modify(|n| *n += 1);
    }

    pub(crate) fn set_jwt(&self, authority: Arc<ActiveJwt>) {
        self.0.jwt.store(Some(authority));
        self.0.changes.send_modify(|n| *n += 1);
    }

    pub(crate) fn set_wit(&self, authority: Arc<ActiveWit>) {
        self.0.wit.store(Some(authority));
        self.0.changes.send_modify(|n| *n += 1);
    }

    fn set_states(&self, states: States) {
        self.0.states.store(Arc::new(states));
    }
}
