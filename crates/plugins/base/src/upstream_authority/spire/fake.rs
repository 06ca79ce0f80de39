//! An upstream server and its agent for tests: real TLS and the real contracts, with answers that the test decides.

use bytes::Bytes;
use finial_core::{Bundle, Clock, KeyType, SpiffeId, SystemClock, TrustDomain, UnixSeconds, X509Authority};
use finial_crypto::tls::{ClientAuth, PeerPolicy, TlsIdentity, server_config};
use finial_crypto::{CaTemplate, Csr, DistinguishedName, PrivateKey, SerialNumber, SvidTemplate, TrustRoots, X509Ca};
use finial_net::Limits;
use finial_net::tls::{TlsIncoming, bind};
use finial_proto::convert::bundle_to_proto;
use finial_proto::server::bundle::{GetBundleRequest, PublishJwtAuthorityRequest, PublishJwtAuthorityResponse};
use finial_proto::server::svid::{NewDownstreamX509caRequest, NewDownstreamX509caResponse};
use finial_proto::{types, workload};
use finial_runtime::{Shutdown, Supervisor};
use futures::future::BoxFuture;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use tokio::net::UnixListener;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

pub(super) const TRUST_DOMAIN: &str = "above.test";

struct State {
    /// When it began; it signs as of then.
    now: UnixSeconds,
    ca: X509Ca,
    bundle: types::Bundle,
    /// What it signs with, whatever it is asked; none = what is right.
    chain: Option<Vec<Vec<u8>>>,
    refusal: Option<Status>,
    hangs: bool,
    agent_refusal: Option<Status>,
    /// How many more it gives than one.
    other_svids: usize,
    /// How often the agent was asked.
    asked: usize,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    async fn enter(&self) -> Result<(), Status> {
        let hangs = self.state().hangs;
        let refusal = self.state().refusal.clone();
        if hangs {
            std::future::pending::<()>().await;
        }
        refusal.map_or(Ok(()), Err)
    }
}

/// What ends it, and its task.
type Running = (Shutdown, tokio::task::JoinHandle<()>);

async fn end(running: Option<Running>) {
    let (shutdown, task) = running.expect("it runs");
    shutdown.trigger();
    task.await.unwrap();
}

pub(super) struct Above {
    shared: Shared,
    identity: Arc<TlsIdentity>,
    address: SocketAddr,
    folder: tempfile::TempDir,
    supervisor: Supervisor,
    server: Option<Running>,
    agent: Option<Running>,
}

async fn root() -> X509Ca {
    let now = SystemClock.now();
    let template = CaTemplate {
        subject: &DistinguishedName::of(&["US"], &["ABOVE"], ""),
        trust_domain: &TrustDomain::parse(TRUST_DOMAIN).unwrap(),
        not_before: now - 10,
        not_after: now + 24 * 3600,
        serial: SerialNumber::random(),
    };
    X509Ca::self_sign(Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap()), &template).await.unwrap()
}

fn svid(ca: &X509Ca, id: &str) -> (Arc<[u8]>, PrivateKey) {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let now = SystemClock.now();
    let template = SvidTemplate {
        id: &SpiffeId::parse(id).unwrap(),
        public_key: key.public_key(),
        subject: &DistinguishedName::svid_default(),
        dns_names: &[],
        not_before: now - 10,
        not_after: now + 3600,
        serial: SerialNumber::random(),
    };
    (ca.issue_svid_now(&template).unwrap().unwrap(), key)
}

fn bundle(ca: &X509Ca) -> Bundle {
    let trust_domain = TrustDomain::parse(TRUST_DOMAIN).unwrap();
    let x509_authorities = vec![X509Authority { der: ca.certificate().clone(), tainted: false }];
    Bundle { x509_authorities, sequence_number: 1, ..Bundle::empty(trust_domain) }
}

impl Above {
    pub(super) async fn start() -> Self {
        let ca = root().await;
        let bundle = bundle_to_proto(&bundle(&ca));
        let state = State {
            now: SystemClock.now(),
            ca,
            bundle,
            chain: None,
            refusal: None,
            hangs: false,
            agent_refusal: None,
            other_svids: 0,
            asked: 0,
        };
        let shared = Shared(Arc::new(Mutex::new(state)));
        let identity = Arc::new(TlsIdentity::empty());
        let folder = tempfile::tempdir().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let supervisor = Supervisor::default();
        let mut above = Self { shared, identity, address, folder, supervisor, server: None, agent: None };
        above.be(&format!("spiffe://{TRUST_DOMAIN}/spire/server"));
        above.listen().await;
        let listener = UnixListener::bind(above.socket()).unwrap();
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
        let router = tonic::transport::Server::builder().add_service(Agent(above.shared.clone()));
        let shutdown = Shutdown::new();
        let ended = shutdown.clone();
        let serving = async move { router.serve_with_incoming_shutdown(incoming, ended.cancelled()).await.unwrap() };
        above.agent = Some((shutdown, above.supervisor.spawner().spawn("fake-agent", serving)));
        above
    }

    async fn listen(&mut self) {
        let listener = bind(self.address).unwrap();
        self.address = listener.local_addr().unwrap();
        let roots = Arc::new(TrustRoots::new([self.shared.state().ca.certificate()]).unwrap());
        let trust_domain = TrustDomain::parse(TRUST_DOMAIN).unwrap();
        let bundles = Arc::new(super::super::identity::Roots(trust_domain.clone(), roots));
        let clients = ClientAuth { bundles, policy: PeerPolicy::MemberOf(trust_domain), required: true };
        let tls = Arc::new(server_config(self.identity.clone(), Some(clients), Arc::new(SystemClock)).unwrap());
        let incoming = TlsIncoming::new(listener, tls, Limits::default(), self.supervisor.spawner()).unwrap();
        let router = tonic::transport::Server::builder()
            .add_service(Svids(self.shared.clone()))
            .add_service(Bundles(self.shared.clone()));
        let shutdown = Shutdown::new();
        let ended = shutdown.clone();
        let serving = async move { router.serve_with_incoming_shutdown(incoming, ended.cancelled()).await.unwrap() };
        self.server = Some((shutdown, self.supervisor.spawner().spawn("fake-server", serving)));
    }

    pub(super) fn now(&self) -> UnixSeconds {
        self.shared.state().now
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    pub(super) fn bundle(&self) -> Bundle {
        bundle(&self.shared.state().ca)
    }

    pub(super) fn answer_with(&self, bundle: types::Bundle) {
        self.shared.state().bundle = bundle;
    }

    pub(super) fn sign_with(&self, chain: Option<Vec<Vec<u8>>>) {
        self.shared.state().chain = chain;
    }

    pub(super) fn refuse(&self, status: Option<Status>) {
        self.shared.state().refusal = status;
    }

    pub(super) fn hang(&self) {
        self.shared.state().hangs = true;
    }

    pub(super) fn agent_refuses(&self, status: Option<Status>) {
        self.shared.state().agent_refusal = status;
    }

    pub(super) fn give_others(&self, svids: usize) {
        self.shared.state().other_svids = svids;
    }

    pub(super) fn asked(&self) -> usize {
        self.shared.state().asked
    }

    /// The server shows another ID.
    pub(super) fn be(&self, id: &str) {
        let (leaf, key) = svid(&self.shared.state().ca, id);
        self.identity.set(&[leaf], &key).unwrap();
    }

    /// Another server with another root takes its place; the agent knows.
    pub(super) async fn replace(&mut self) {
        end(self.server.take()).await;
        let ca = root().await;
        {
            let mut state = self.shared.state();
            state.bundle = bundle_to_proto(&bundle(&ca));
            state.ca = ca;
        }
        self.be(&format!("spiffe://{TRUST_DOMAIN}/spire/server"));
        self.listen().await;
    }

    pub(super) async fn agent_ends(&mut self) {
        end(self.agent.take()).await;
    }
}

async fn sign(shared: Shared, request: NewDownstreamX509caRequest) -> Result<Vec<Bytes>, Status> {
    shared.enter().await?;
    let ca = shared.state().ca.clone();
    let chain = shared.state().chain.clone();
    if let Some(chain) = chain {
        return Ok(chain.into_iter().map(Bytes::from).collect());
    }
    let invalid = |e: &dyn std::fmt::Display| Status::invalid_argument(e.to_string());
    let csr = Csr::parse(&request.csr).map_err(|e| invalid(&e))?;
    csr.verify_proof_of_possession().map_err(|e| invalid(&e))?;
    let trust_domain = TrustDomain::parse(TRUST_DOMAIN).unwrap();
    if !csr.uri_sans().iter().all(|uri| **uri == *trust_domain.id_string()) {
        return Err(invalid(&"another trust domain"));
    }
    let now = shared.state().now;
    let template = CaTemplate {
        subject: &csr.subject().map_err(|e| invalid(&e))?,
        trust_domain: &trust_domain,
        not_before: now - 10,
        not_after: now + i64::from(request.preferred_ttl),
        serial: SerialNumber::random(),
    };
    let certificate = ca.issue_ca(csr.public_key(), &template).await.map_err(|e| invalid(&e))?;
    Ok(vec![Bytes::copy_from_slice(&certificate)])
}

/// A service of which some methods are there.
macro_rules! service {
    ($name:ident, $service:literal, |$shared:ident, $path:ident, $request:ident| $answer:expr) => {
        #[derive(Clone)]
        struct $name(Shared);

        impl NamedService for $name {
            const NAME: &'static str = $service;
        }

        impl tower::Service<http::Request<Body>> for $name {
            type Response = http::Response<Body>;
            type Error = Infallible;
            type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, $request: http::Request<Body>) -> Self::Future {
                let $shared = self.0.clone();
                Box::pin(async move {
                    let $path = $request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
                    Ok($answer)
                })
            }
        }
    };
}

service!(Svids, "spire.api.server.svid.v1.SVID", |shared, _path, request| {
    let sign = tower::service_fn(move |request: Request<NewDownstreamX509caRequest>| {
        let shared = shared.clone();
        async move {
            let ca_cert_chain = sign(shared, request.into_inner()).await?;
            Ok(Response::new(NewDownstreamX509caResponse { ca_cert_chain, x509_authorities: Vec::new() }))
        }
    });
    Grpc::new(ProstCodec::default()).unary(sign, request).await
});

service!(Bundles, "spire.api.server.bundle.v1.Bundle", |shared, path, request| {
    match path.as_str() {
        "GetBundle" => {
            let get = tower::service_fn(move |_: Request<GetBundleRequest>| {
                let shared = shared.clone();
                async move {
                    shared.enter().await?;
                    Ok::<_, Status>(Response::new(shared.state().bundle.clone()))
                }
            });
            Grpc::new(ProstCodec::default()).unary(get, request).await
        }
        "PublishJWTAuthority" => {
            let publish = tower::service_fn(move |request: Request<PublishJwtAuthorityRequest>| {
                let shared = shared.clone();
                async move {
                    let mut state = shared.state();
                    state.bundle.jwt_authorities.extend(request.into_inner().jwt_authority);
                    state.bundle.sequence_number += 10;
                    let jwt_authorities = state.bundle.jwt_authorities.clone();
                    Ok::<_, Status>(Response::new(PublishJwtAuthorityResponse { jwt_authorities }))
                }
            });
            Grpc::new(ProstCodec::default()).unary(publish, request).await
        }
        _ => Status::unimplemented("not yet implemented").into_http(),
    }
});

service!(Agent, "SpiffeWorkloadAPI", |shared, _path, request| {
    let fetch = tower::service_fn(move |_: Request<workload::X509svidRequest>| {
        let shared = shared.clone();
        async move {
            let (ca, svids) = {
                let mut state = shared.state();
                state.asked += 1;
                match &state.agent_refusal {
                    Some(status) => return Err(status.clone()),
                    None => (state.ca.clone(), 1 + state.other_svids),
                }
            };
            let id = format!("spiffe://{TRUST_DOMAIN}/below");
            let (leaf, key) = svid(&ca, &id);
            let svid = workload::X509svid {
                spiffe_id: id,
                x509_svid: Bytes::copy_from_slice(&leaf),
                x509_svid_key: Bytes::copy_from_slice(key.pkcs8_der().expose()),
                bundle: Bytes::copy_from_slice(ca.certificate()),
                hint: String::new(),
            };
            let answer = workload::X509svidResponse { svids: vec![svid; svids], ..Default::default() };
            Ok::<_, Status>(Response::new(tokio_stream::iter([Ok::<_, Status>(answer)])))
        }
    });
    Grpc::new(ProstCodec::default()).server_streaming(fetch, request).await
});
