//! The server's APIs: one file per service, each handler a function of a permit and a request.
//!
//! A service's gRPC trait only passes requests through the [`Gate`]; the work is done in functions that take the method's
//! [`Permit`](crate::authz::Permit). Messages and codes are SPIRE's.

mod agent;
mod agent_sync;
mod attest;
mod bundle;
mod debug;
mod dns;
mod downstream;
mod endpoint_url;
mod entry;
mod health;
mod localauthority;
mod logger;
mod rotation;
mod stream;
mod svid;
mod svid_wit;
mod sync;
mod trustdomain;

pub(crate) use attest::PAYLOAD_BYTES_MAX;
pub use stream::Driven;

use crate::authority::AuthorityControl;
use crate::authz::{Call, Gate};
use crate::entries::{Entries, Turn};
use crate::federation::Federation;
use crate::follow::Follower;
use crate::issue::{Issuer, SigningQueue};
use crate::nodes::Nodes;
use crate::publish::BundleFeed;
use crate::rotation::Domain;
use crate::svid::ServerSvid;
use crate::watch::Watchers;
use bytes::Bytes;
use finial_core::{Clock, ErrorKind, Selector, SelectorError, SpiffeId, SpiffeIdError, TrustDomain};
use finial_plugin::ServerPlugins;
use finial_proto::types;
use finial_runtime::log::LogHandle;
use finial_runtime::{Shutdown, Spawner};
use finial_store::{Page, Store, StoreError};
use std::sync::Arc;
use tonic::Status;

/// Largest page that is fetched at once; a client that asks for more gets this many and a token.
const PAGE_MAX: u32 = 50_000;

/// All services over what they share.
pub struct Api {
    /// The own trust domain.
    pub trust_domain: TrustDomain,
    /// Checks every call.
    pub gate: Arc<Gate>,
    /// The datastore, for reads.
    pub store: Store,
    /// Where changes of bundles queue up with those of entries and agents.
    pub turn: Turn,
    /// Registration entries.
    pub entries: Arc<Entries>,
    /// Attested agents.
    pub nodes: Arc<Nodes>,
    /// Follows what others write into the same database, if others can.
    pub follower: Option<Arc<Follower>>,
    /// Signs.
    pub issuer: Arc<Issuer>,
    /// Takes orders about authorities.
    pub authority: AuthorityControl,
    /// Orders to the whole trust domain, and what agents have told.
    pub domain: Arc<Domain>,
    /// Runs what must not wait for a caller.
    pub spawner: Spawner,
    /// Who is to get signatures first.
    pub signing: Arc<SigningQueue>,
    /// Agents' open streams.
    pub watchers: Arc<Watchers>,
    /// The server's own SVID.
    pub svid: Arc<ServerSvid>,
    /// Bundles, own and federated.
    pub bundles: Arc<BundleFeed>,
    /// Keeps federated bundles fresh.
    pub federation: Arc<Federation>,
    /// Node attestors.
    pub plugins: ServerPlugins,
    /// Time of day.
    pub clock: Arc<dyn Clock>,
    /// The log whose level can be changed; none in programs that have no log of their own.
    pub log: Option<LogHandle>,
    /// `disable_jwt_svids`.
    pub disable_jwt_svids: bool,
    /// Whether the feature flag `wit-svid` is set.
    pub wit_svids_enabled: bool,
    /// `experimental { agent_spiffe_id_as_selector }`.
    pub agent_spiffe_id_as_selector: bool,
    /// Ends streams that would go on for ever.
    pub shutdown: Shutdown,
    /// What `GetInfo` said last, and when the server began.
    pub info: debug::InfoCache,
    /// Which entries have DNS names that no SVID can carry.
    pub unfit_names: UnfitNames,
}

pub use debug::InfoCache;
pub use dns::UnfitNames;

/// What tonic serves: all services of one [`Api`].
#[derive(Clone)]
pub struct Service(pub Arc<Api>);

impl std::ops::Deref for Service {
    type Target = Api;
    fn deref(&self) -> &Api {
        &self.0
    }
}

/// The IDs that requests name, each with its rule and SPIRE's words for a broken one.
#[derive(Clone, Copy)]
pub(crate) enum IdRule {
    /// Any ID with a path.
    Member,
    /// Below `/spire/agent/`.
    Agent,
    /// Not reserved.
    Workload,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum IdError {
    #[error("request must specify SPIFFE ID")]
    Missing,
    #[error(transparent)]
    Malformed(#[from] SpiffeIdError),
    #[error("\"{0}\" is not a member of trust domain \"{1}\"")]
    Foreign(SpiffeId, TrustDomain),
    #[error("\"{0}\" is not {2} trust domain \"{1}\"; {3}")]
    Breaks(SpiffeId, TrustDomain, &'static str, &'static str),
}

/// Reads an ID off the wire and checks it against the rule.
pub(crate) fn id_from_proto(
    trust_domain: &TrustDomain,
    id: Option<&types::Spiffeid>,
    rule: IdRule,
) -> Result<SpiffeId, IdError> {
    let wire = id.ok_or(IdError::Missing)?;
    let id = SpiffeId::new(&TrustDomain::parse(&wire.trust_domain)?, &wire.path)?;
    check_id(trust_domain, &id, rule)?;
    Ok(id)
}

/// Checks an ID against the rule.
pub(crate) fn check_id(trust_domain: &TrustDomain, id: &SpiffeId, rule: IdRule) -> Result<(), IdError> {
    if !id.is_member_of(trust_domain) {
        return Err(IdError::Foreign(id.clone(), trust_domain.clone()));
    }
    let what = match rule {
        IdRule::Member => "a member of",
        IdRule::Agent => "an agent in",
        IdRule::Workload => "a workload in",
    };
    let why = match rule {
        _ if id.path().is_empty() => "path is empty",
        IdRule::Agent if !id.is_agent() => "path is not in the agent namespace",
        IdRule::Workload if id.is_reserved() => "path is in the reserved namespace",
        _ => return Ok(()),
    };
    Err(IdError::Breaks(id.clone(), trust_domain.clone(), what, why))
}

pub(crate) fn selectors_from_proto(wire: &[types::Selector]) -> Result<Vec<Selector>, SelectorError> {
    wire.iter().map(|s| Selector::new(s.r#type.as_str(), s.value.as_str())).collect()
}

/// A page, if the request asks for one.
pub(crate) fn page(size: i32, token: &str) -> Option<Page> {
    let size = u32::try_from(size).ok().filter(|size| *size > 0)?;
    Some(Page { token: token.to_owned(), size: size.min(PAGE_MAX) })
}

impl Api {
    /// Makes sure that memory knows whatever was written before this call, by any server, as far as the datastore can be
    /// asked. One that nobody else writes into is in memory as it is.
    pub(crate) async fn be_current(&self) {
        match &self.follower {
            Some(follower) => {
                follower.catch_up().await;
            }
            None => self.nodes.repair().await,
        }
    }

    /// Whether the datastore is away, so that memory answers as of the last time.
    pub(crate) fn datastore_is_away(&self) -> bool {
        self.turn.link().is_away()
    }
}

/// A failed read or write of the datastore. What the request itself got wrong, such as a page token, keeps its kind;
/// SPIRE answers `Internal` to all of it.
pub(crate) fn store_failed(call: &Call, message: &str, error: &StoreError) -> Status {
    let kind = match error.kind() {
        ErrorKind::NotFound => ErrorKind::Internal,
        kind => kind,
    };
    call.fail_with(kind, message, error)
}

pub(crate) fn ok() -> Option<types::Status> {
    Some(finial_proto::convert::item_ok())
}

pub(crate) fn der_chain(chain: &[Arc<[u8]>]) -> Vec<Bytes> {
    chain.iter().map(|der| Bytes::copy_from_slice(der)).collect()
}

/// As counts travel.
pub(crate) fn count32(count: impl TryInto<i32>) -> i32 {
    count.try_into().unwrap_or(i32::MAX)
}

/// `type:value,type:value`, for the audit log.
pub(crate) fn selectors_field(selectors: &[types::Selector]) -> String {
    selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>().join(",")
}
