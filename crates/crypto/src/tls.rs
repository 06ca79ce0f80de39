//! SPIFFE verification for rustls: configurations for servers and clients, and identities that change in place.

mod remote;

pub use remote::patiently;

use crate::signer::{PrivateKey, SignError, Signer};
use crate::x509::verify::{Rules, leaf_of, verify_path};
use crate::x509::{Certificate, TrustRoots, VerifyError};
use arc_swap::ArcSwapOption;
use finial_core::{Clock, SpiffeId, TrustDomain, UnixSeconds};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs::kx_group;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

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
    /// Anyone of that trust domain, or one of these (a server's `admin_ids` of other trust domains).
    MemberOrOneOf(TrustDomain, Vec<SpiffeId>),
}

impl PeerPolicy {
    /// Whether the policy lets that peer in.
    pub fn allows(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Any => true,
            Self::MemberOf(td) => id.is_member_of(td),
            Self::Exact(want) => id == want,
            Self::AnyOf(list) => list.contains(id),
            Self::MemberOrOneOf(td, list) => id.is_member_of(td) || list.contains(id),
        }
    }

    /// The same as an error that tells what was unexpected.
    pub fn check(&self, id: &SpiffeId) -> Result<(), VerifyError> {
        let unexpected =
            |expected: &[&str]| Err(VerifyError::UnexpectedId { got: id.to_string(), expected: expected.join(", ") });
        match self {
            _ if self.allows(id) => Ok(()),
            Self::Exact(want) => unexpected(&[want.as_str()]),
            Self::AnyOf(list) => unexpected(&list.iter().map(SpiffeId::as_str).collect::<Vec<_>>()),
            _ => Err(VerifyError::UnexpectedTrustDomain(id.trust_domain_name().to_owned())),
        }
    }
}

/// Verifies a peer's chain with the roots of the trust domain that its leaf claims, then asks the policy.
pub fn verify_peer<C: AsRef<[u8]>>(
    chain: &[C],
    bundles: &dyn BundleSource,
    policy: &PeerPolicy,
    now: UnixSeconds,
) -> Result<SpiffeId, VerifyError> {
    let id = leaf_of(chain)?.check_leaf()?;
    // Before the costly part: whoever may not come in need not be verified.
    policy.check(&id)?;
    let roots = bundles.x509_roots(id.trust_domain_name());
    let roots = roots.ok_or_else(|| VerifyError::UnknownTrustDomain(id.trust_domain_name().to_owned()))?;
    verify_path(chain, &roots, now, Rules::Spiffe)?;
    Ok(id)
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
    signs_elsewhere: AtomicBool,
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
        self.put(chain, key, key.rustls_signing_key()?)
    }

    /// The same with a key that may live elsewhere. Then handshakes need threads that may wait, see [`patiently`].
    pub fn set_signer(&self, chain: &[Arc<[u8]>], signer: &Arc<dyn Signer>) -> Result<(), SignError> {
        match signer.local() {
            Some(key) => self.set(chain, key),
            None => self.put(chain, signer.as_ref(), Arc::new(remote::RemoteKey(signer.clone()))),
        }
    }

    /// Whether handshakes need threads that may wait.
    pub fn signs_elsewhere(&self) -> bool {
        self.signs_elsewhere.load(Ordering::Relaxed)
    }

    fn put(&self, chain: &[Arc<[u8]>], signer: &dyn Signer, key: Arc<dyn SigningKey>) -> Result<(), SignError> {
        let leaf = chain.first().ok_or_else(|| SignError::BadKey("no certificate".into()))?;
        let leaf = Certificate::parse(leaf.clone()).map_err(|e| SignError::BadKey(e.to_string()))?;
        if leaf.spki_der() != &**signer.public_key().spki_der() {
            return Err(SignError::KeyMismatch);
        }
        let chain = chain.iter().map(|c| CertificateDer::from(c.to_vec())).collect();
        self.signs_elsewhere.store(signer.local().is_none(), Ordering::Relaxed);
        self.current.store(Some(Arc::new(CertifiedKey::new(chain, key))));
        Ok(())
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

/// The one provider: AWS-LC, X25519MLKEM768 first.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

/// Which key exchanges a connection may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// The usual ones, post-quantum first.
    #[default]
    Any,
    /// Only those that withstand a quantum computer, in TLS 1.3: X25519MLKEM768 and SecP256r1MLKEM768 (`require_pq_kem`).
    PostQuantum,
}

impl KeyExchange {
    /// As the setting `require_pq_kem` has it.
    pub fn post_quantum(required: bool) -> Self {
        if required { Self::PostQuantum } else { Self::Any }
    }

    pub(crate) fn provider(self) -> Arc<CryptoProvider> {
        static POST_QUANTUM: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
        let post_quantum = || {
            let kx_groups = vec![kx_group::X25519MLKEM768, kx_group::SECP256R1MLKEM768];
            Arc::new(CryptoProvider { kx_groups, ..rustls::crypto::aws_lc_rs::default_provider() })
        };
        match self {
            Self::Any => provider(),
            Self::PostQuantum => POST_QUANTUM.get_or_init(post_quantum).clone(),
        }
    }

    pub(crate) fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        static ALL: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
        match self {
            Self::Any => &ALL,
            Self::PostQuantum => ALL.split_at(1).0,
        }
    }
}

/// rustls asks for the time through this.
pub(crate) struct Time(pub(crate) Arc<dyn Clock>);

impl std::fmt::Debug for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Time")
    }
}

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.now()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

fn seconds(now: UnixTime) -> UnixSeconds {
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

const ALPN_H2: &[u8] = b"h2";

/// A server's configuration: TLS 1.2 and 1.3, ALPN `h2`, no session tickets.
pub fn server_config(
    identity: Arc<dyn ResolvesServerCert>,
    clients: Option<ClientAuth>,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, Error> {
    server_config_with(KeyExchange::Any, identity, clients, clock)
}

/// As [`server_config`], with a choice of key exchanges.
pub fn server_config_with(
    exchange: KeyExchange,
    identity: Arc<dyn ResolvesServerCert>,
    clients: Option<ClientAuth>,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, Error> {
    let clients = clients.map(|auth| Arc::new(ClientVerifier(auth)) as Arc<dyn ClientCertVerifier>);
    server_config_by(exchange, identity, clients, clock)
}

fn server_config_by(
    exchange: KeyExchange,
    identity: Arc<dyn ResolvesServerCert>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, Error> {
    let builder = ServerConfig::builder_with_details(exchange.provider(), Arc::new(Time(clock)))
        .with_protocol_versions(exchange.versions())?;
    let builder = match clients {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(identity);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // A resumed session would outlive the SVIDs that it was opened with.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// As [`server_config_with`], for clients whose certificates hang below `roots` by the rules of the web, and which must have one.
pub fn server_config_for_web_clients(
    exchange: KeyExchange,
    identity: Arc<dyn ResolvesServerCert>,
    roots: rustls::RootCertStore,
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, Error> {
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), exchange.provider());
    let clients = clients.build().map_err(|error| Error::General(error.to_string()))?;
    server_config_by(exchange, identity, Some(clients), clock)
}

/// A client's configuration: TLS 1.2 and 1.3, ALPN `h2`, no resumption. The server name given to rustls is not verified.
pub fn client_config(
    identity: Option<Arc<dyn ResolvesClientCert>>,
    server: ServerAuth,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, Error> {
    client_config_with(KeyExchange::Any, identity, server, clock)
}

/// As [`client_config`], with a choice of key exchanges.
pub fn client_config_with(
    exchange: KeyExchange,
    identity: Option<Arc<dyn ResolvesClientCert>>,
    server: ServerAuth,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_details(exchange.provider(), Arc::new(Time(clock)))
        .with_protocol_versions(exchange.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier(server)));
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(identity),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    // The name that callers pass is not a name that servers choose certificates by.
    config.enable_sni = false;
    Ok(config)
}

/// The chain as it came from the peer, leaf first.
fn chain_of<'a>(leaf: &'a CertificateDer<'a>, rest: &'a [CertificateDer<'a>]) -> Vec<&'a [u8]> {
    std::iter::once(leaf).chain(rest).map(|c| c.as_ref()).collect()
}

/// The alert follows the reason; the text stays in the log.
fn refuse(error: VerifyError) -> Error {
    Error::InvalidCertificate(match error {
        VerifyError::Expired => CertificateError::Expired,
        VerifyError::NotYetValid => CertificateError::NotValidYet,
        VerifyError::Parse(_) => CertificateError::BadEncoding,
        VerifyError::UnknownAuthority => CertificateError::UnknownIssuer,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

/// A handshake error in words: rustls prints errors of verifiers in their debug form only.
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(cause)))
            if matches!(cause.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity)) =>
        {
            "certificate is an authority's (CA:TRUE), and none that is trusted here".to_owned()
        }
        Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => cause.to_string(),
        other => other.to_string(),
    }
}

struct ClientVerifier(ClientAuth);

impl std::fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientVerifier")
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.0.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify_peer(&chain_of(leaf, rest), &*self.0.bundles, &self.0.policy, seconds(now)).map_err(refuse)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

struct ServerVerifier(ServerAuth);

impl std::fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerVerifier")
    }
}

impl ServerVerifier {
    fn verify(&self, chain: &[&[u8]], now: UnixSeconds) -> Result<(), VerifyError> {
        match &self.0 {
            ServerAuth::Spiffe { bundles, policy } => verify_peer(chain, &**bundles, policy, now).map(|_| ()),
            ServerAuth::InsecureBootstrap { expected } => {
                PeerPolicy::Exact(expected.clone()).check(&leaf_of(chain)?.spiffe_id()?)
            }
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(&chain_of(leaf, rest), seconds(now)).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
