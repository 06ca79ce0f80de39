//! Handshakes in memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

use finial_core::{Clock, KeyType, ManualClock, SpiffeId, TrustDomain};
use finial_crypto::tls::*;
use finial_crypto::*;
use rustls::{ClientConnection, ServerConnection};
use std::sync::Arc;

const NOW: i64 = 1_800_000_000;

struct Party {
    ca: X509Ca,
    name: &'static str,
}

impl Party {
    fn new(name: &'static str) -> Self {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let subject = DistinguishedName::ca_default();
        let template = CaTemplate {
            subject: &subject,
            trust_domain: &TrustDomain::parse(name).unwrap(),
            not_before: NOW - 10,
            not_after: NOW + 86_400,
            serial: SerialNumber::random(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { ca: runtime.block_on(X509Ca::self_sign(Arc::new(key), &template)).unwrap(), name }
    }

    fn identity(&self, path: &str) -> Arc<TlsIdentity> {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let subject = DistinguishedName::svid_default();
        let template = SvidTemplate {
            id: &SpiffeId::parse(&format!("spiffe://{}{path}", self.name)).unwrap(),
            public_key: key.public_key(),
            subject: &subject,
            dns_names: &[],
            not_before: NOW - 10,
            not_after: NOW + 3600,
            serial: SerialNumber::random(),
        };
        let leaf = self.ca.issue_svid_now(&template).unwrap().unwrap();
        Arc::new(TlsIdentity::new(&[leaf], &key).unwrap())
    }
}

impl BundleSource for Party {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == self.name).then(|| Arc::new(TrustRoots::new([self.ca.certificate()]).unwrap()))
    }
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(ManualClock::at(NOW))
}

fn policy(text: &str) -> PeerPolicy {
    PeerPolicy::Exact(SpiffeId::parse(text).unwrap())
}

/// Runs a handshake to its end; the peer's certificates as the server saw them, or the first error.
fn handshake(server: rustls::ServerConfig, client: rustls::ClientConfig) -> Result<ServerConnection, rustls::Error> {
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), "spire-server".try_into().unwrap()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut input = &wire[..];
        while !input.is_empty() {
            server.read_tls(&mut input).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut input = &wire[..];
        while !input.is_empty() {
            client.read_tls(&mut input).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(server)
}

#[test]
fn mutual_tls_lets_the_right_ones_in() {
    let ours = Arc::new(Party::new("example.org"));
    let theirs = Arc::new(Party::new("other.org"));
    let server = |required, policy| {
        let clients = ClientAuth { bundles: ours.clone(), policy, required };
        server_config(ours.identity("/spire/server"), Some(clients), clock()).unwrap()
    };
    let client = |identity: Option<Arc<TlsIdentity>>, expected: &str| {
        let auth = ServerAuth::Spiffe { bundles: ours.clone(), policy: policy(expected) };
        client_config(identity.map(|i| i as _), auth, clock()).unwrap()
    };
    let server_id = "spiffe://example.org/spire/server";
    let done = handshake(server(true, PeerPolicy::Any), client(Some(ours.identity("/agent")), server_id)).unwrap();
    assert_eq!(done.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(done.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let group = done.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    let leaf = Certificate::parse(done.peer_certificates().unwrap()[0].to_vec()).unwrap();
    assert_eq!(leaf.spiffe_id().unwrap().path(), "/agent");

    // No certificate: fine only where none is required.
    assert!(handshake(server(false, PeerPolicy::Any), client(None, server_id)).unwrap().peer_certificates().is_none());
    assert!(handshake(server(true, PeerPolicy::Any), client(None, server_id)).is_err());
    // A certificate of a trust domain without a bundle, and one that the policy does not name.
    assert!(handshake(server(false, PeerPolicy::Any), client(Some(theirs.identity("/agent")), server_id)).is_err());
    let picky = policy("spiffe://example.org/someone");
    assert!(handshake(server(true, picky), client(Some(ours.identity("/agent")), server_id)).is_err());
    // The server is not whom the client expects.
    let wrong = handshake(server(false, PeerPolicy::Any), client(None, "spiffe://example.org/else"));
    let want = r#"unexpected ID "spiffe://example.org/spire/server", expected "spiffe://example.org/else""#;
    assert_eq!(explain(&wrong.err().unwrap()), want);
}

#[test]
fn insecure_bootstrap_checks_the_name_and_nothing_else() {
    let theirs = Arc::new(Party::new("example.org"));
    let server = || server_config(theirs.identity("/spire/server"), None, clock()).unwrap();
    let client = |text: &str| {
        let expected = SpiffeId::parse(text).unwrap();
        client_config(None, ServerAuth::InsecureBootstrap { expected }, clock()).unwrap()
    };
    assert!(handshake(server(), client("spiffe://example.org/spire/server")).is_ok());
    assert!(handshake(server(), client("spiffe://other.org/spire/server")).is_err());
}

#[test]
fn expired_peers_are_refused_by_the_injected_clock() {
    let ours = Arc::new(Party::new("example.org"));
    let late: Arc<dyn Clock> = Arc::new(ManualClock::at(NOW + 3601));
    let auth = ServerAuth::Spiffe { bundles: ours.clone(), policy: PeerPolicy::Any };
    let client = client_config(None, auth, late).unwrap();
    let server = server_config(ours.identity("/spire/server"), None, clock()).unwrap();
    let error = handshake(server, client).unwrap_err();
    assert_eq!(error, rustls::Error::InvalidCertificate(rustls::CertificateError::Expired));
}

#[test]
fn identities_change_in_place_and_must_match_their_key() {
    let ours = Party::new("example.org");
    let identity = TlsIdentity::empty();
    let server = server_config(Arc::new(identity), None, clock()).unwrap();
    let expected = SpiffeId::parse("spiffe://example.org/spire/server").unwrap();
    let client = client_config(None, ServerAuth::InsecureBootstrap { expected }, clock()).unwrap();
    assert!(handshake(server, client).is_err(), "no identity, no handshake");
    let stranger = PrivateKey::generate(KeyType::EcP256).unwrap();
    let mismatch = TlsIdentity::new(&[ours.ca.certificate().clone()], &stranger);
    assert!(matches!(mismatch, Err(SignError::KeyMismatch)));
    assert!(TlsIdentity::new(&[], &stranger).is_err());
}

#[test]
fn policies_and_sources_decide_by_the_leaf() {
    let ours = Party::new("example.org");
    let id = SpiffeId::parse("spiffe://example.org/a").unwrap();
    assert!(PeerPolicy::MemberOf(id.trust_domain()).allows(&id));
    assert!(PeerPolicy::AnyOf(vec![id.clone()]).allows(&id));
    assert!(!PeerPolicy::AnyOf(vec![]).allows(&id));
    let elsewhere = TrustDomain::parse("x.org").unwrap();
    assert!(PeerPolicy::MemberOrOneOf(elsewhere.clone(), vec![id.clone()]).allows(&id));
    assert!(!PeerPolicy::MemberOrOneOf(elsewhere, vec![]).allows(&id));
    let other = Party::new("other.org");
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let subject = DistinguishedName::svid_default();
    let template = SvidTemplate {
        id: &id,
        public_key: key.public_key(),
        subject: &subject,
        dns_names: &[],
        not_before: NOW,
        not_after: NOW + 60,
        serial: SerialNumber::random(),
    };
    // other.org's authority signs an ID of example.org: its own bundle must not be asked.
    let forged = other.ca.issue_svid_now(&template).unwrap().unwrap();
    assert_eq!(verify_peer(&[&forged], &ours, &PeerPolicy::Any, NOW), Err(VerifyError::UnknownAuthority));
    assert_eq!(
        verify_peer(&[&forged], &other, &PeerPolicy::Any, NOW),
        Err(VerifyError::UnknownTrustDomain("example.org".into()))
    );
    let member = PeerPolicy::MemberOf(TrustDomain::parse("x.org").unwrap());
    assert_eq!(
        verify_peer(&[&forged], &ours, &member, NOW),
        Err(VerifyError::UnexpectedTrustDomain("example.org".into()))
    );
}

#[test]
fn a_certificate_of_an_authority_in_a_servers_place_is_told_in_words() {
    let cause = rustls::OtherError(Arc::new(webpki::Error::CaUsedAsEndEntity));
    let error = rustls::Error::InvalidCertificate(rustls::CertificateError::Other(cause));
    assert_eq!(
        finial_crypto::tls::explain(&error),
        "certificate is an authority's (CA:TRUE), and none that is trusted here"
    );
}
