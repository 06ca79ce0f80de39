//! TLS with keys that sign elsewhere: on the same thread as everything else, as an agent has only one.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Recorder, service, soon};
use finial_core::{Clock, KeyType, ManualClock, SpiffeId, TrustDomain};
use finial_crypto::tls::{BundleSource, ClientAuth, PeerPolicy, ServerAuth, TlsIdentity, client_config, server_config};
use finial_crypto::{
    CaTemplate, DistinguishedName, PrivateKey, PublicKey, SerialNumber, SignError, SignatureAlgorithm, Signer,
    SvidTemplate, TrustRoots, X509Ca,
};
use finial_net::tls::{self, TlsIncoming};
use finial_net::{Handshakes, Limits, client};
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_client::HealthClient;
use finial_runtime::Supervisor;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{mpsc, oneshot};
use tonic::transport::{Channel, Server};

const NOW: i64 = 1_800_000_000;

type Question = (SignatureAlgorithm, Vec<u8>, oneshot::Sender<Vec<u8>>);

/// Asks a task of the test's runtime, as a plugin's answers come through the agent's.
struct Far {
    public: PublicKey,
    ask: mpsc::Sender<Question>,
}

#[async_trait::async_trait]
impl Signer for Far {
    fn public_key(&self) -> &PublicKey {
        &self.public
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        let (answer, answered) = oneshot::channel();
        self.ask.send((algorithm, message.to_vec(), answer)).await.map_err(|_| SignError::Failed)?;
        answered.await.map_err(|_| SignError::Failed)
    }
}

struct World {
    ca: X509Ca,
    supervisor: Supervisor,
    signed: Arc<AtomicUsize>,
}

struct Roots(Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, _: &str) -> Option<Arc<TrustRoots>> {
        Some(self.0.clone())
    }
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org{path}")).unwrap()
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(ManualClock::at(NOW))
}

impl World {
    async fn new() -> Self {
        let template = CaTemplate {
            subject: &DistinguishedName::ca_default(),
            trust_domain: &TrustDomain::parse("example.org").unwrap(),
            not_before: NOW - 10,
            not_after: NOW + 86_400,
            serial: SerialNumber::random(),
        };
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap());
        let ca = X509Ca::self_sign(key, &template).await.unwrap();
        Self { ca, supervisor: Supervisor::default(), signed: Arc::default() }
    }

    /// An identity whose key answers when `open` says so.
    async fn identity(&self, path: &str, key_type: KeyType, open: oneshot::Receiver<()>) -> Arc<TlsIdentity> {
        let key = PrivateKey::generate(key_type).unwrap();
        let template = SvidTemplate {
            id: &id(path),
            public_key: key.public_key(),
            subject: &DistinguishedName::svid_default(),
            dns_names: &[],
            not_before: NOW - 10,
            not_after: NOW + 3600,
            serial: SerialNumber::random(),
        };
        let leaf = self.ca.issue_svid(&template).await.unwrap();
        let (ask, mut asked) = mpsc::channel::<Question>(1);
        let (public, signed) = (key.public_key().clone(), self.signed.clone());
        self.supervisor.spawner().spawn("the key", async move {
            let _ = open.await;
            while let Some((algorithm, message, answer)) = asked.recv().await {
                signed.fetch_add(1, Ordering::Relaxed);
                let _ = answer.send(key.sign_now(algorithm, &message).unwrap());
            }
        });
        let identity = TlsIdentity::empty();
        identity.set_signer(&[leaf], &(Arc::new(Far { public, ask }) as _)).unwrap();
        assert!(identity.signs_elsewhere());
        Arc::new(identity)
    }

    fn roots(&self) -> Arc<Roots> {
        Arc::new(Roots(Arc::new(TrustRoots::new([self.ca.certificate()]).unwrap())))
    }

    fn serve(&self, identity: Arc<TlsIdentity>) -> (SocketAddr, Recorder) {
        let clients = ClientAuth { bundles: self.roots(), policy: PeerPolicy::Exact(id("/client")), required: true };
        let config = server_config(identity, Some(clients), clock()).unwrap();
        let listener = tls::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let spawner = self.supervisor.spawner();
        let handshakes = Handshakes::new(Arc::new(config), true, &spawner);
        let incoming = TlsIncoming::new(listener, handshakes, Limits::default(), spawner.clone()).unwrap();
        let (address, recorder) = (incoming.local_addr(), Recorder::default());
        spawner.spawn("server", Server::builder().serve_with_incoming(service(&recorder), incoming));
        (address, recorder)
    }

    fn channel(&self, server: SocketAddr, identity: Arc<TlsIdentity>, elsewhere: bool) -> Channel {
        let auth = ServerAuth::Spiffe { bundles: self.roots(), policy: PeerPolicy::Exact(id("/server")) };
        let config = Arc::new(client_config(Some(identity), auth, clock()).unwrap());
        let handshakes = Handshakes::new(config, elsewhere, &self.supervisor.spawner());
        client::tls_channel(&server.to_string(), handshakes)
    }
}

/// A gate that stands open.
fn open() -> oneshot::Receiver<()> {
    oneshot::channel().1
}

async fn call(channel: Channel) -> Result<(), tonic::Status> {
    soon(HealthClient::new(channel).check(HealthCheckRequest::default())).await.map(drop)
}

#[tokio::test]
async fn both_sides_prove_keys_that_they_do_not_hold() {
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let world = World::new().await;
        let (address, recorder) = world.serve(world.identity("/server", key_type, open()).await);
        let client = world.identity("/client", key_type, open()).await;
        call(world.channel(address, client, true)).await.unwrap();
        assert_eq!(world.signed.load(Ordering::Relaxed), 2, "one signature each");
        assert_eq!(recorder.0.lock().unwrap().tls.len(), 1);
    }
}

#[tokio::test]
async fn a_key_that_hangs_keeps_only_its_own_connection_waiting() {
    let world = World::new().await;
    let (address, recorder) = world.serve(world.identity("/server", KeyType::EcP256, open()).await);
    let (let_go, held) = oneshot::channel();
    let slow = world.identity("/client", KeyType::EcP256, held).await;
    let quick = world.identity("/client", KeyType::EcP256, open()).await;
    let waiting = tokio::task::LocalSet::new();
    let waiting = waiting.run_until(async {
        let slow = tokio::task::spawn_local(call(world.channel(address, slow, true)));
        call(world.channel(address, quick, true)).await.unwrap();
        assert!(!slow.is_finished());
        assert_eq!(recorder.0.lock().unwrap().tls.len(), 1);
        let_go.send(()).unwrap();
        soon(slow).await.unwrap().unwrap();
    });
    waiting.await;
}

#[tokio::test]
async fn where_nobody_may_wait_the_handshake_fails_instead_of_hanging() {
    let world = World::new().await;
    let (address, _) = world.serve(world.identity("/server", KeyType::EcP256, open()).await);
    let client = world.identity("/client", KeyType::EcP256, open()).await;
    let error = call(world.channel(address, client, false)).await.unwrap_err();
    let text = format!("{error:?}");
    assert!(text.contains("signs elsewhere"), "{text}");
}
