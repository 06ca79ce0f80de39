//! A server for tests: real TLS and the real contracts, with answers that the test decides.

use crate::testing::TestCa;
use finial_core::{Clock, KeyType, SpiffeId, SystemClock};
use finial_crypto::tls::{BundleSource, ClientAuth, PeerPolicy, TlsIdentity, server_config};
use finial_crypto::{
    Certificate, Csr, JwtAuthoritySigner, JwtSvidClaims, PrivateKey, TrustRoots, WitAuthoritySigner, WitSvidClaims,
};
use finial_net::Limits;
use finial_net::tls::{TlsIncoming, TlsPeer, bind};
use finial_proto::convert::{id_to_proto, permission_denied};
use finial_proto::encoded::{self, Encoded};
use finial_proto::server::agent::agent_server::{Agent, AgentServer};
use finial_proto::server::agent::*;
use finial_proto::server::bundle::bundle_server::{Bundle, BundleServer};
use finial_proto::server::bundle::*;
use finial_proto::server::entry::entry_server::{Entry, EntryServer};
use finial_proto::server::entry::*;
use finial_proto::server::svid::svid_server::{Svid, SvidServer};
use finial_proto::server::svid::*;
use finial_proto::sync::server::{AgentSync, AgentSyncServer};
use finial_proto::sync::{BundleSeenRequest, BundleSeenResponse, WatchRequest, WatchResponse};
use finial_proto::types::{self, permission_denied_details::Reason};
use finial_runtime::{Shutdown, Spawner};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub(super) const TOKEN: &str = "let-me-in";

/// What the server would do next.
pub(super) struct State {
    pub(super) entries: BTreeMap<String, types::Entry>,
    pub(super) bundle: types::Bundle,
    pub(super) federated: HashMap<String, types::Bundle>,
    /// Serial numbers of agents' SVIDs that have expired, as this server sees it.
    pub(super) expired: Vec<String>,
    pub(super) reattestable: bool,
    /// Lifetime of workloads' and agents' SVIDs, seconds.
    pub(super) svid_ttl: i64,
    pub(super) agent_ttl: i64,
    pub(super) renewed_ttl: i64,
    pub(super) jwt_ttl: i64,
    pub(super) wit_ttl: i64,
    /// Signs WIT-SVIDs; none = it has none.
    pub(super) wit: Option<WitAuthoritySigner>,
    /// Every call of an agent is refused with this.
    pub(super) refuse: Option<Reason>,
    /// Every call fails.
    pub(super) away: bool,
    /// Syncs are never answered.
    pub(super) hangs: bool,
    /// X.509-SVIDs are issued under this path, whatever the entry says.
    pub(super) issue_as: Option<String>,
    /// X.509-SVIDs are made unusable like this.
    pub(super) spoil: Option<fn(&mut types::X509svid)>,
    /// At most so many SVIDs in one batch.
    pub(super) batch_limit: usize,
    pub(super) calls: HashMap<&'static str, usize>,
    /// Sizes of the batches that were asked for.
    pub(super) batches: Vec<usize>,
    /// Serial numbers that agents presented, in order.
    pub(super) serials: Vec<String>,
    pub(super) page_size: usize,
    /// It tells of changes by itself, as SPIRE's does not.
    pub(super) pushes: bool,
    /// What agents said that they have, in order.
    pub(super) watches: Vec<WatchRequest>,
    /// Numbers of bundles that agents said they use, in order.
    pub(super) confirmed: Vec<u64>,
    pub(super) no_confirming: Option<Status>,
    /// The streams that are open, in order.
    pub(super) streams: Vec<tokio::sync::mpsc::Sender<Result<encoded::WatchResponse, Status>>>,
}

#[derive(Clone)]
pub(super) struct FakeServer(Arc<Inner>);

struct Inner {
    pub(super) ca: TestCa,
    jwt: JwtAuthoritySigner,
    state: Mutex<State>,
    address: SocketAddr,
    handshakes: Arc<AtomicUsize>,
}

/// Counts handshakes: each asks for the certificate once.
#[derive(Debug)]
struct Counted(TlsIdentity, Arc<AtomicUsize>);

impl ResolvesServerCert for Counted {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.resolve(hello)
    }
}

struct Roots(Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, _: &str) -> Option<Arc<TrustRoots>> {
        Some(self.0.clone())
    }
}

pub(super) fn wire_entry(id: &str, path: &str, selectors: &[&str]) -> types::Entry {
    types::Entry {
        id: id.into(),
        spiffe_id: Some(types::Spiffeid { trust_domain: "td".into(), path: path.into() }),
        selectors: selectors
            .iter()
            .map(|s| s.split_once(':').unwrap())
            .map(|(t, v)| types::Selector { r#type: t.into(), value: v.into() })
            .collect(),
        created_at: 1,
        ..Default::default()
    }
}

pub(super) fn wire_bundle(trust_domain: &str, root: &[u8], jwt: Option<&JwtAuthoritySigner>) -> types::Bundle {
    types::Bundle {
        trust_domain: trust_domain.into(),
        x509_authorities: vec![types::X509Certificate { asn1: root.to_vec().into(), tainted: false }],
        jwt_authorities: jwt
            .map(|j| types::JwtKey {
                public_key: j.signer().public_key().spki_der().to_vec().into(),
                key_id: j.key_id().into(),
                expires_at: 0,
                tainted: false,
            })
            .into_iter()
            .collect(),
        ..Default::default()
    }
}

impl FakeServer {
    pub(super) async fn start(spawner: &Spawner, shutdown: Shutdown) -> Self {
        let ca = TestCa::new("td");
        Self::start_with(ca, bind("127.0.0.1:0".parse().unwrap()).unwrap(), spawner, shutdown)
    }

    /// With another authority at the same address.
    pub(super) fn start_with(
        ca: TestCa,
        listener: tokio::net::TcpListener,
        spawner: &Spawner,
        shutdown: Shutdown,
    ) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let leaf = ca.issue(&ca.trust_domain.server_id(), key.public_key(), 3600);
        let handshakes = Arc::new(AtomicUsize::new(0));
        let identity = Arc::new(Counted(TlsIdentity::new(&[leaf], &key).unwrap(), handshakes.clone()));
        let bundles = Arc::new(Roots(Arc::new(TrustRoots::new([&ca.root]).unwrap())));
        let clients = ClientAuth { bundles, policy: PeerPolicy::MemberOf(ca.trust_domain.clone()), required: false };
        let tls = Arc::new(server_config(identity, Some(clients), clock).unwrap());
        let incoming = TlsIncoming::new(listener, tls, Limits::default(), spawner.clone()).unwrap();
        let jwt = JwtAuthoritySigner::new(Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap()), "jwt-1");
        let state = State {
            entries: BTreeMap::new(),
            bundle: wire_bundle("td", &ca.root, Some(&jwt)),
            federated: HashMap::new(),
            expired: Vec::new(),
            reattestable: false,
            svid_ttl: 3600,
            agent_ttl: 3600,
            renewed_ttl: 3600,
            jwt_ttl: 300,
            wit_ttl: 300,
            wit: None,
            refuse: None,
            away: false,
            hangs: false,
            issue_as: None,
            spoil: None,
            batch_limit: 500,
            calls: HashMap::new(),
            batches: Vec::new(),
            serials: Vec::new(),
            page_size: 500,
            pushes: false,
            watches: Vec::new(),
            confirmed: Vec::new(),
            no_confirming: None,
            streams: Vec::new(),
        };
        let server =
            Self(Arc::new(Inner { ca, jwt, state: Mutex::new(state), address: incoming.local_addr(), handshakes }));
        let router = tonic::transport::Server::builder()
            .add_service(AgentServer::new(server.clone()))
            .add_service(EntryServer::new(server.clone()))
            .add_service(SvidServer::new(server.clone()))
            .add_service(BundleServer::new(server.clone()))
            .add_service(AgentSyncServer::new(server.clone()));
        spawner.spawn("fake-server", async move {
            tokio::select! {
                _ = router.serve_with_incoming(incoming) => {}
                () = shutdown.cancelled() => {}
            }
        });
        server
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// From now on it signs WIT-SVIDs with a key of this ID, which is in its bundle.
    pub(super) fn sign_wits(&self, key_id: &str) {
        let signer = WitAuthoritySigner::new(Arc::new(PrivateKey::generate(KeyType::EcP256).unwrap()), key_id);
        let public_key = signer.signer().public_key().spki_der().to_vec().into();
        let mut state = self.state();
        state.bundle.wit_authorities.push(types::WitKey { public_key, key_id: key_id.into(), ..Default::default() });
        state.wit = Some(signer);
    }

    /// Tells it to all open streams.
    pub(super) async fn push(&self, answer: WatchResponse) {
        let streams = self.state().streams.clone();
        for stream in streams {
            let _ = stream.send(Ok(Encoded::new(&answer))).await;
        }
    }

    /// Ends all open streams.
    pub(super) async fn end_streams(&self, status: Option<Status>) {
        let streams = std::mem::take(&mut self.state().streams);
        for stream in streams {
            if let Some(status) = &status {
                let _ = stream.send(Err(status.clone())).await;
            }
        }
    }

    /// How many streams somebody listens to.
    pub(super) fn listeners(&self) -> usize {
        self.state().streams.iter().filter(|stream| !stream.is_closed()).count()
    }

    pub(super) fn handshakes(&self) -> usize {
        self.0.handshakes.load(Ordering::SeqCst)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.0.address
    }

    pub(super) fn ca(&self) -> &TestCa {
        &self.0.ca
    }

    pub(super) fn calls(&self, name: &str) -> usize {
        self.state().calls.get(name).copied().unwrap_or(0)
    }

    /// Counts the call, and refuses it if that is the order of the day.
    fn enter<T>(&self, name: &'static str, request: &Request<T>) -> Result<(), Status> {
        let mut state = self.state();
        *state.calls.entry(name).or_default() += 1;
        if state.away {
            return Err(Status::unavailable("away"));
        }
        let peer = request.extensions().get::<TlsPeer>().unwrap();
        let Some(leaf) = peer.certificates.first() else {
            return match name {
                // As SPIRE's server says it: without a reason.
                "AttestAgent" if state.refuse == Some(Reason::AgentBanned) => {
                    Err(Status::permission_denied("failed to attest: agent is banned"))
                }
                "AttestAgent" | "GetBundle" => Ok(()),
                _ => Err(Status::permission_denied("an agent only")),
            };
        };
        let serial = Certificate::parse(leaf.as_ref()).unwrap().serial_decimal();
        if state.serials.last() != Some(&serial) {
            state.serials.push(serial);
        }
        let expired = state.expired.contains(state.serials.last().unwrap()).then_some(Reason::AgentExpired);
        match state.refuse.or(expired) {
            Some(reason) => Err(permission_denied("agent is refused", reason)),
            None => Ok(()),
        }
    }

    fn certify(&self, id: &SpiffeId, csr: &[u8], ttl: i64) -> types::X509svid {
        let csr = Csr::parse(csr).unwrap();
        csr.verify_proof_of_possession().unwrap();
        let leaf = self.0.ca.issue(id, csr.public_key(), ttl);
        types::X509svid { cert_chain: vec![leaf.to_vec().into()], id: Some(id_to_proto(id)), ..Default::default() }
    }

    fn agent_svid(&self, csr: &[u8], ttl: i64) -> types::X509svid {
        self.certify(&self.0.ca.trust_domain.agent_id("join_token/1").unwrap(), csr, ttl)
    }
}

/// Methods that no agent calls.
macro_rules! unused {
    ($($name:ident($request:ty) -> $answer:ty;)*) => {$(
        fn $name<'life0, 'async_trait>(&'life0 self, _: Request<$request>)
            -> Pin<Box<dyn Future<Output = Result<Response<$answer>, Status>> + Send + 'async_trait>>
        where 'life0: 'async_trait, Self: 'async_trait {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        }
    )*};
}

#[tonic::async_trait]
impl Agent for FakeServer {
    unused! {
        count_agents(CountAgentsRequest) -> CountAgentsResponse;
        list_agents(ListAgentsRequest) -> ListAgentsResponse;
        get_agent(GetAgentRequest) -> types::Agent;
        delete_agent(DeleteAgentRequest) -> ();
        ban_agent(BanAgentRequest) -> ();
        create_join_token(CreateJoinTokenRequest) -> types::JoinToken;
    }

    type AttestAgentStream = ReceiverStream<Result<AttestAgentResponse, Status>>;

    async fn attest_agent(
        &self,
        request: Request<Streaming<AttestAgentRequest>>,
    ) -> Result<Response<Self::AttestAgentStream>, Status> {
        self.enter("AttestAgent", &request)?;
        let mut requests = request.into_inner();
        let Some(attest_agent_request::Step::Params(params)) = requests.message().await?.and_then(|m| m.step) else {
            return Err(Status::invalid_argument("malformed param: missing params"));
        };
        let data = params.data.unwrap();
        if data.r#type == "join_token" && data.payload.as_ref() != TOKEN.as_bytes() {
            return Err(Status::invalid_argument(
                "failed to attest: join token does not exist or has already been used",
            ));
        }
        let (send, answers) = tokio::sync::mpsc::channel(4);
        if data.r#type == "puzzle" {
            let step = attest_agent_response::Step::Challenge("1+1".into());
            send.send(Ok(AttestAgentResponse { step: Some(step) })).await.unwrap();
        }
        let this = self.clone();
        let answer = move || {
            let svid = {
                let ttl = this.state().agent_ttl;
                this.agent_svid(&params.params.as_ref().unwrap().csr, ttl)
            };
            let result = attest_agent_response::Result { svid: Some(svid), reattestable: this.state().reattestable };
            AttestAgentResponse { step: Some(attest_agent_response::Step::Result(result)) }
        };
        if data.r#type != "puzzle" {
            send.send(Ok(answer())).await.unwrap();
            return Ok(Response::new(ReceiverStream::new(answers)));
        }
        #[allow(clippy::disallowed_methods)] // a test
        tokio::spawn(async move {
            let step = requests.message().await.unwrap().unwrap().step.unwrap();
            let right = matches!(&step, attest_agent_request::Step::ChallengeResponse(r) if r.as_ref() == b"2");
            let _ = send.send(if right { Ok(answer()) } else { Err(Status::permission_denied("wrong")) }).await;
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn renew_agent(&self, request: Request<RenewAgentRequest>) -> Result<Response<RenewAgentResponse>, Status> {
        self.enter("RenewAgent", &request)?;
        let csr = request.into_inner().params.unwrap().csr;
        let ttl = self.state().renewed_ttl;
        Ok(Response::new(RenewAgentResponse { svid: Some(self.agent_svid(&csr, ttl)) }))
    }

    async fn post_status(&self, request: Request<PostStatusRequest>) -> Result<Response<PostStatusResponse>, Status> {
        self.enter("PostStatus", &request)?;
        Ok(Response::new(PostStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Entry for FakeServer {
    unused! {
        count_entries(CountEntriesRequest) -> CountEntriesResponse;
        list_entries(ListEntriesRequest) -> ListEntriesResponse;
        get_entry(GetEntryRequest) -> types::Entry;
        batch_create_entry(BatchCreateEntryRequest) -> BatchCreateEntryResponse;
        batch_update_entry(BatchUpdateEntryRequest) -> BatchUpdateEntryResponse;
        batch_delete_entry(BatchDeleteEntryRequest) -> BatchDeleteEntryResponse;
    }

    async fn get_authorized_entries(
        &self,
        request: Request<GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        self.enter("GetAuthorizedEntries", &request)?;
        Ok(Response::new(GetAuthorizedEntriesResponse { entries: self.state().entries.values().cloned().collect() }))
    }

    type SyncAuthorizedEntriesStream = ReceiverStream<Result<SyncAuthorizedEntriesResponse, Status>>;

    async fn sync_authorized_entries(
        &self,
        request: Request<Streaming<SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        self.enter("SyncAuthorizedEntries", &request)?;
        if self.state().hangs {
            std::future::pending::<()>().await;
        }
        let mut requests = request.into_inner();
        let (send, answers) = tokio::sync::mpsc::channel(4);
        let (entries, page): (Vec<_>, _) = {
            let state = self.state();
            (state.entries.values().cloned().collect(), state.page_size)
        };
        #[allow(clippy::disallowed_methods)] // a test
        tokio::spawn(async move {
            requests.message().await.unwrap();
            if entries.len() <= page {
                let _ = send.send(Ok(SyncAuthorizedEntriesResponse { entries, ..Default::default() })).await;
                return;
            }
            let pages: Vec<_> = entries.chunks(page).collect();
            for (at, chunk) in pages.iter().enumerate() {
                let revision = |e: &types::Entry| EntryRevision {
                    id: e.id.clone(),
                    revision_number: e.revision_number,
                    created_at: e.created_at,
                };
                let entry_revisions = chunk.iter().map(revision).collect();
                let more = at + 1 < pages.len();
                let _ = send.send(Ok(SyncAuthorizedEntriesResponse { entry_revisions, more, entries: vec![] })).await;
            }
            while let Ok(Some(request)) = requests.message().await {
                let entries = entries.iter().filter(|e| request.ids.contains(&e.id)).cloned().collect();
                let _ = send.send(Ok(SyncAuthorizedEntriesResponse { entries, ..Default::default() })).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

#[tonic::async_trait]
impl Svid for FakeServer {
    unused! {
        mint_x509svid(MintX509svidRequest) -> MintX509svidResponse;
        mint_jwtsvid(MintJwtsvidRequest) -> MintJwtsvidResponse;
        mint_witsvid(MintWitsvidRequest) -> MintWitsvidResponse;
        new_downstream_x509ca(NewDownstreamX509caRequest) -> NewDownstreamX509caResponse;
    }

    async fn batch_new_x509svid(
        &self,
        request: Request<BatchNewX509svidRequest>,
    ) -> Result<Response<BatchNewX509svidResponse>, Status> {
        self.enter("BatchNewX509SVID", &request)?;
        let params = request.into_inner().params;
        let (entries, limit, ttl) = {
            let mut state = self.state();
            state.batches.push(params.len());
            (state.entries.clone(), state.batch_limit, state.svid_ttl)
        };
        if params.len() > limit {
            return Err(Status::resource_exhausted("rate exceeds burst size"));
        }
        let (issue_as, spoil) = {
            let state = self.state();
            (state.issue_as.clone(), state.spoil)
        };
        let result = |param: NewX509svidParams| match entries.get(&param.entry_id) {
            Some(entry) => {
                let mut id = entry.spiffe_id.clone().unwrap();
                id.path = issue_as.clone().unwrap_or(id.path);
                let mut svid = self.certify(&crate::entry::spiffe_id(&id).unwrap(), &param.csr, ttl);
                if let Some(spoil) = spoil {
                    spoil(&mut svid);
                }
                batch_new_x509svid_response::Result { status: Some(types::Status::default()), svid: Some(svid) }
            }
            None => {
                let status = types::Status { code: 5, message: "entry not found or not authorized".into() };
                batch_new_x509svid_response::Result { status: Some(status), svid: None }
            }
        };
        Ok(Response::new(BatchNewX509svidResponse { results: params.into_iter().map(result).collect() }))
    }

    async fn batch_new_witsvid(
        &self,
        request: Request<BatchNewWitsvidRequest>,
    ) -> Result<Response<BatchNewWitsvidResponse>, Status> {
        self.enter("BatchNewWITSVID", &request)?;
        let (signer, ttl) = {
            let state = self.state();
            (state.wit.clone().ok_or_else(|| Status::unimplemented("WIT functionality is disabled"))?, state.wit_ttl)
        };
        let now = SystemClock.now();
        let mut results = Vec::new();
        for params in request.into_inner().params {
            let entry = self.state().entries.get(&params.entry_id).cloned();
            let Some(entry) = entry else {
                // Deleted since the agent heard of it.
                let status = types::Status { code: 5, message: "entry not found or not authorized".into() };
                results.push(batch_new_witsvid_response::Result { status: Some(status), svid: None });
                continue;
            };
            let sub = &crate::entry::spiffe_id(entry.spiffe_id.as_ref().unwrap()).unwrap();
            let key = &finial_crypto::PublicKey::from_spki(&params.public_key).unwrap();
            let key_algorithm = finial_crypto::wit_key_algorithm(key, &params.signing_algorithm).unwrap();
            let claims = WitSvidClaims { key, key_algorithm, exp: now + ttl, iat: now, iss: None, sub };
            let token = signer.sign(&claims).await.unwrap();
            let (id, expires_at) = (entry.spiffe_id, now + ttl);
            let svid = types::Witsvid { token, id, expires_at, issued_at: now, ..Default::default() };
            let status = Some(types::Status::default());
            results.push(batch_new_witsvid_response::Result { status, svid: Some(svid) });
        }
        Ok(Response::new(BatchNewWitsvidResponse { results }))
    }

    async fn new_jwtsvid(&self, request: Request<NewJwtsvidRequest>) -> Result<Response<NewJwtsvidResponse>, Status> {
        self.enter("NewJWTSVID", &request)?;
        let request = request.into_inner();
        let (entry, ttl) = {
            let state = self.state();
            (state.entries.get(&request.entry_id).cloned(), state.jwt_ttl)
        };
        let entry = entry.ok_or_else(|| Status::not_found("entry not found or not authorized"))?;
        let id = crate::entry::spiffe_id(entry.spiffe_id.as_ref().unwrap()).unwrap();
        let now = SystemClock.now();
        let claims = JwtSvidClaims { sub: &id, aud: &request.audience, exp: now + ttl, iat: now, iss: None, jti: None };
        let token = self.0.jwt.sign(&claims).await.unwrap();
        let svid =
            types::Jwtsvid { token, id: entry.spiffe_id, expires_at: now + ttl, issued_at: now, ..Default::default() };
        Ok(Response::new(NewJwtsvidResponse { svid: Some(svid) }))
    }
}

#[tonic::async_trait]
impl Bundle for FakeServer {
    unused! {
        count_bundles(CountBundlesRequest) -> CountBundlesResponse;
        append_bundle(AppendBundleRequest) -> types::Bundle;
        publish_jwt_authority(PublishJwtAuthorityRequest) -> PublishJwtAuthorityResponse;
        publish_wit_authority(PublishWitAuthorityRequest) -> PublishWitAuthorityResponse;
        list_federated_bundles(ListFederatedBundlesRequest) -> ListFederatedBundlesResponse;
        batch_create_federated_bundle(BatchCreateFederatedBundleRequest) -> BatchCreateFederatedBundleResponse;
        batch_update_federated_bundle(BatchUpdateFederatedBundleRequest) -> BatchUpdateFederatedBundleResponse;
        batch_set_federated_bundle(BatchSetFederatedBundleRequest) -> BatchSetFederatedBundleResponse;
        batch_delete_federated_bundle(BatchDeleteFederatedBundleRequest) -> BatchDeleteFederatedBundleResponse;
    }

    async fn get_bundle(&self, request: Request<GetBundleRequest>) -> Result<Response<types::Bundle>, Status> {
        self.enter("GetBundle", &request)?;
        Ok(Response::new(self.state().bundle.clone()))
    }

    async fn get_federated_bundle(
        &self,
        request: Request<GetFederatedBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        self.enter("GetFederatedBundle", &request)?;
        let name = request.into_inner().trust_domain;
        let bundle = self.state().federated.get(&name).cloned();
        bundle.map(Response::new).ok_or_else(|| Status::not_found("bundle not found"))
    }
}

#[tonic::async_trait]
impl AgentSync for FakeServer {
    type WatchAuthorizedStream = ReceiverStream<Result<encoded::WatchResponse, Status>>;

    async fn watch_authorized(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchAuthorizedStream>, Status> {
        self.enter("WatchAuthorized", &request)?;
        let mut state = self.state();
        if !state.pushes && !state.watches.is_empty() {
            return Err(Status::unavailable("not now")); // one that had the stream has not become SPIRE's
        }
        if !state.pushes {
            return Err(Status::unimplemented("unknown service finial.server.sync.v1.AgentSync"));
        }
        state.watches.push(request.into_inner());
        let (send, answers) = tokio::sync::mpsc::channel(4);
        state.streams.push(send);
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn bundle_seen(&self, request: Request<BundleSeenRequest>) -> Result<Response<BundleSeenResponse>, Status> {
        self.enter("BundleSeen", &request)?;
        self.state().confirmed.push(request.into_inner().sequence_number);
        if self.state().hangs {
            std::future::pending::<()>().await;
        }
        self.state().no_confirming.clone().map_or(Ok(Response::new(BundleSeenResponse {})), Err)
    }
}
