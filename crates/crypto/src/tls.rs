//! SPIFFE verification for rustls: configurations for servers and clients, and identities that change in place.

use crate::signer::{PrivateKey, SignError};
use crate::x509::TrustRoots;
use arc_swap::ArcSwapOption;
use finial_core::{Clock, SpiffeId, TrustDomain};
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use std::sync::Arc;

/// Gives the roots to verify peers of a trust domain with.
pub trait BundleSource: Send + Sync {
    /// The roots of that trust domain (its bare name), if it is trusted at all.
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>>;
}

/// Who a verified peer may be.
#[derive(Clone, Debug)]
pub enum PeerPolicy {
    /// Anyone whose trust domain the [`BundleSource`] knows.
    Any,
    /// Anyone of that trust domain.
    MemberOf(TrustDomain),
    /// Only that one.
    Exact(SpiffeId),
    /// One of these.
    AnyOf(Vec<SpiffeId>),
}

impl PeerPolicy {
    /// Whether the policy lets that peer in.
    pub fn allows(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Any => true,
            Self::MemberOf(td) => id.is_member_of(td),
            Self::Exact(want) => id == want,
            Self::AnyOf(list) => list.contains(id),
        }
    }
}

/// How a server deals with the certificates of its clients.
#[derive(Clone)]
pub struct ClientAuth {
    /// The roots.
    pub bundles: Arc<dyn BundleSource>,
    /// Who may come in.
    pub policy: PeerPolicy,
    /// Whether a client must present a certificate; one that is presented must be valid in any case.
    pub required: bool,
}

/// How a client deals with the certificate of its server.
#[derive(Clone)]
pub enum ServerAuth {
    /// A verified X509-SVID.
    Spiffe {
        /// The roots.
        bundles: Arc<dyn BundleSource>,
        /// Who the server may be.
        policy: PeerPolicy,
    },
    /// `insecure_bootstrap`: nothing is verified but that the URI SAN reads like this ID, and the handshake signature.
    InsecureBootstrap {
        /// The ID that the server must claim.
        expected: SpiffeId,
    },
}

/// An identity for TLS that can be replaced while connections come and go. Resolves both sides.
#[derive(Default)]
pub struct TlsIdentity {
    current: ArcSwapOption<CertifiedKey>,
}

impl TlsIdentity {
    /// An identity that is not there yet: servers refuse handshakes, clients present nothing.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Starts with that chain (leaf first) and key.
    pub fn new(chain: &[Arc<[u8]>], key: &PrivateKey) -> Result<Self, SignError> {
        let identity = Self::default();
        identity.set(chain, key)?;
        Ok(identity)
    }

    /// Replaces chain and key for handshakes from now on.
    pub fn set(&self, chain: &[Arc<[u8]>], key: &PrivateKey) -> Result<(), SignError> {
        let _ = (chain, key);
        todo!()
    }

    /// Takes the identity away.
    pub fn clear(&self) {
        self.current.store(None);
    }
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity")
    }
}

impl ResolvesServerCert for TlsIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

impl ResolvesClientCert for TlsIdentity {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }

    fn has_certs(&self) -> bool {
        self.current.load().is_some()
    }
}

/// A server's configuration: TLS 1.2 and 1.3, ALPN `h2`, no session tickets.
pub fn server_config(
    identity: Arc<dyn ResolvesServerCert>,
    clients: Option<ClientAuth>,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, rustls::Error> {
    let _ = (identity, clients, clock);
    todo!()
}

/// A client's configuration: TLS 1.2 and 1.3, ALPN `h2`, no resumption. The server name given to rustls is not verified.
pub fn client_config(
    identity: Option<Arc<dyn ResolvesClientCert>>,
    server: ServerAuth,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, rustls::Error> {
    let _ = (identity, server, clock);
    todo!()
}
