//! Calls that no command makes: those of agents and of servers below, and some of admins.

use finial_core::{Bundle, Clock, KeyType, SpiffeId, SystemClock, TrustDomain};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, TlsIdentity, client_config};
use finial_crypto::{
    Certificate, JwtKeySource, JwtKeys, PrivateKey, TrustRoots, create_csr, hex, verify_jwt_svid, verify_wit_svid,
    verify_x509_chain,
};
use finial_net::client::{tls_channel, uds_channel};
use finial_plugin::AgentNodeAttestor as _;
use finial_plugins_base::node_attestor::x509pop::X509PopAgent;
use finial_proto::convert::bundle_from_proto;
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::attest_agent_request::{Params, Step};
use finial_proto::server::agent::attest_agent_response::Step as Told;
use finial_proto::server::agent::{AgentX509svidParams, AttestAgentRequest, CreateJoinTokenRequest, RenewAgentRequest};
use finial_proto::server::bundle::bundle_client::BundleClient;
use finial_proto::server::bundle::{self as bundles};
use finial_proto::server::entry::GetAuthorizedEntriesRequest;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::localauthority::local_authority_client::LocalAuthorityClient;
use finial_proto::server::localauthority::{self as authorities};
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{self as svids};
use finial_proto::types;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use testkit::Server;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

/// No answer takes longer, though a datastore be away.
const DEADLINE: Duration = Duration::from_secs(30);

/// An SVID with its key.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) id: SpiffeId,
    /// As the datastore has it: in decimal.
    pub(super) serial: String,
    chain: Vec<Arc<[u8]>>,
    key: PrivateKey,
}

impl Identity {
    fn of(svid: types::X509svid, key: PrivateKey) -> Self {
        let id = svid.id.expect("an ID");
        let chain: Vec<Arc<[u8]>> = svid.cert_chain.iter().map(|der| Arc::from(&**der)).collect();
        let leaf = Certificate::parse(chain[0].clone()).expect("a certificate");
        Self {
            id: SpiffeId::parse(&format!("spiffe://{}{}", id.trust_domain, id.path)).expect("an ID"),
            serial: leaf.serial_decimal(),
            chain,
            key,
        }
    }
}

struct Roots(Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        (trust_domain == "example.org").then(|| self.0.clone())
    }
}

struct Keys(Arc<JwtKeys>);

impl JwtKeySource for Keys {
    fn jwt_keys(&self, trust_domain: &str) -> Option<Arc<JwtKeys>> {
        (trust_domain == "example.org").then(|| self.0.clone())
    }
}

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").expect("a name")
}

fn id(path: &str) -> Option<types::Spiffeid> {
    Some(types::Spiffeid { trust_domain: "example.org".into(), path: path.into() })
}

fn new_key() -> PrivateKey {
    PrivateKey::generate(KeyType::EcP256).expect("a key")
}

/// Where a server answers.
#[derive(Clone)]
pub(super) struct Calls {
    socket: PathBuf,
    port: u16,
}

/// The kinds of authorities, in the words of commands.
pub(super) const KINDS: [&str; 3] = ["x509", "jwt", "wit"];

impl Calls {
    pub(super) fn to(server: &Server) -> Self {
        Self { socket: server.socket(), port: server.port }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    fn block<T>(&self, call: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async { tokio::time::timeout(DEADLINE, call).await.expect("an answer in time") })
    }

    fn admin(&self) -> Channel {
        uds_channel(&self.socket)
    }

    async fn own_bundle(&self) -> Bundle {
        let mut client = BundleClient::new(self.admin());
        let bundle = client.get_bundle(bundles::GetBundleRequest::default()).await.expect("a bundle").into_inner();
        bundle_from_proto(&bundle).expect("a bundle")
    }

    pub(super) fn bundle(&self) -> Bundle {
        self.block(self.own_bundle())
    }

    async fn remote(&self, identity: Option<&Identity>) -> Channel {
        let roots = Arc::new(TrustRoots::from_bundle(&self.own_bundle().await).expect("roots"));
        let policy = PeerPolicy::Exact(trust_domain().server_id());
        let auth = ServerAuth::Spiffe { bundles: Arc::new(Roots(roots)), policy };
        let identity =
            identity.map(|identity| Arc::new(TlsIdentity::new(&identity.chain, &identity.key).expect("its key")) as _);
        let config = client_config(identity, auth, Arc::new(SystemClock)).expect("a configuration");
        tls_channel(&format!("127.0.0.1:{}", self.port), Arc::new(config))
    }

    async fn minted(&self, path: &str) -> Identity {
        let key = new_key();
        let wanted = SpiffeId::new(&trust_domain(), path).expect("an ID");
        let csr = create_csr(&key, None, Some(&wanted), &[]).await.expect("a CSR").into();
        let mut client = SvidClient::new(self.admin());
        let minted = client.mint_x509svid(svids::MintX509svidRequest { csr, ttl: 0 }).await.expect("signed");
        Identity::of(minted.into_inner().svid.expect("an SVID"), key)
    }

    /// Every authority signs, and what it signs verifies by the bundle.
    pub(super) fn sign(&self) {
        self.block(async {
            let (bundle, now) = (self.own_bundle().await, SystemClock.now());
            let minted = self.minted("/minted").await;
            let roots = TrustRoots::from_bundle(&bundle).expect("roots");
            verify_x509_chain(&minted.chain, &roots, now).expect("the bundle has its authority");
            let mut client = SvidClient::new(self.admin());
            let request = svids::MintJwtsvidRequest { id: id("/minted"), audience: vec!["a".into()], ttl: 60 };
            let jwt = client.mint_jwtsvid(request).await.expect("signed").into_inner().svid.expect("a token");
            let keys = Keys(Arc::new(JwtKeys::from_bundle(&bundle).expect("keys")));
            verify_jwt_svid(&jwt.token, &keys, &["a".to_owned()], now).expect("the bundle has its key");
            let request = svids::MintWitsvidRequest {
                id: id("/minted"),
                public_key: new_key().public_key().spki_der().to_vec().into(),
                ttl: 60,
                signing_algorithm: "ES256".into(),
            };
            let wit = client.mint_witsvid(request).await.expect("signed").into_inner().svid.expect("a token");
            let keys = Arc::new(JwtKeys::wit_from_bundle(&bundle).expect("keys"));
            verify_wit_svid(&wit.token, |_| Some(keys), now).expect("the bundle has its key");
        });
    }

    /// The IDs of this server's authorities of that kind: what signs, its successor, its predecessor; empty where none is.
    pub(super) fn authorities(&self, kind: &str) -> [String; 3] {
        let id = |state: Option<authorities::AuthorityState>| state.map(|s| s.authority_id).unwrap_or_default();
        self.block(async {
            let mut client = LocalAuthorityClient::new(self.admin());
            macro_rules! state {
                ($call:ident, $request:ident) => {{
                    let state = client.$call(authorities::$request {}).await.expect("an answer").into_inner();
                    [state.active, state.prepared, state.old]
                }};
            }
            match kind {
                "x509" => state!(get_x509_authority_state, GetX509AuthorityStateRequest),
                "jwt" => state!(get_jwt_authority_state, GetJwtAuthorityStateRequest),
                _ => state!(get_wit_authority_state, GetWitAuthorityStateRequest),
            }
            .map(id)
        })
    }

    /// An order about WIT authorities, for which there is no command.
    pub(super) fn order_wit(&self, step: &str, authority_id: String) -> Result<(), String> {
        let order = async {
            let mut client = LocalAuthorityClient::new(self.admin());
            match step {
                "prepare" => client.prepare_wit_authority(authorities::PrepareWitAuthorityRequest {}).await.map(drop),
                "activate" => {
                    let request = authorities::ActivateWitAuthorityRequest { authority_id };
                    client.activate_wit_authority(request).await.map(drop)
                }
                "taint" => {
                    let request = authorities::TaintWitAuthorityRequest { authority_id };
                    client.taint_wit_authority(request).await.map(drop)
                }
                _ => {
                    let request = authorities::RevokeWitAuthorityRequest { authority_id };
                    client.revoke_wit_authority(request).await.map(drop)
                }
            }
        };
        self.block(order).map_err(said)
    }

    /// Publishes a key as a server below does.
    pub(super) fn publish(&self, kind: &str, key_id: &str, spki: &[u8]) -> Result<(), String> {
        let (key_id, public_key) = (key_id.to_owned(), spki.to_vec().into());
        let publish = async {
            let downstream = self.minted("/downstream").await;
            let mut client = BundleClient::new(self.remote(Some(&downstream)).await);
            if kind == "wit" {
                let wit_authority =
                    Some(types::WitKey { public_key, key_id, expires_at: 4_000_000_000, tainted: false });
                let request = bundles::PublishWitAuthorityRequest { wit_authority };
                return client.publish_wit_authority(request).await.map(drop);
            }
            let jwt_authority = Some(types::JwtKey { public_key, key_id, expires_at: 4_000_000_000, tainted: false });
            client.publish_jwt_authority(bundles::PublishJwtAuthorityRequest { jwt_authority }).await.map(drop)
        };
        self.block(publish).map_err(said)
    }

    /// Adds keys to the own bundle as an admin.
    pub(super) fn append(&self, key_id: &str, spki: &[u8]) -> Result<(), String> {
        let key = types::JwtKey {
            public_key: spki.to_vec().into(),
            key_id: key_id.into(),
            expires_at: 4_000_000_000,
            tainted: false,
        };
        let request = bundles::AppendBundleRequest { jwt_authorities: vec![key], ..Default::default() };
        self.block(async { BundleClient::new(self.admin()).append_bundle(request).await }).map(drop).map_err(said)
    }

    /// Stores a bundle of another trust domain with that key alone.
    pub(super) fn create_bundle(&self, trust_domain: &str, key_id: &str, spki: &[u8]) -> Result<(), String> {
        let bundle = vec![bundle_with(trust_domain, key_id, spki)];
        let request = bundles::BatchCreateFederatedBundleRequest { bundle, output_mask: None };
        let created = async { BundleClient::new(self.admin()).batch_create_federated_bundle(request).await };
        let results = self.block(created).map_err(said)?.into_inner().results;
        all_done(results.into_iter().map(|result| result.status))
    }

    /// Replaces the keys for tokens in a bundle of another trust domain, and nothing else of it.
    pub(super) fn update_bundle(&self, trust_domain: &str, key_id: &str, spki: &[u8]) -> Result<(), String> {
        let bundle = vec![bundle_with(trust_domain, key_id, spki)];
        let input_mask = Some(types::BundleMask { jwt_authorities: true, ..Default::default() });
        let request = bundles::BatchUpdateFederatedBundleRequest { bundle, input_mask, output_mask: None };
        let updated = async { BundleClient::new(self.admin()).batch_update_federated_bundle(request).await };
        let results = self.block(updated).map_err(said)?.into_inner().results;
        all_done(results.into_iter().map(|result| result.status))
    }

    /// Makes a token with an alias for its agent.
    pub(super) fn token(&self, token: &str, alias: &str) -> Result<(), String> {
        let request = CreateJoinTokenRequest { ttl: 600, token: token.into(), agent_id: id(alias) };
        self.block(async { AgentClient::new(self.admin()).create_join_token(request).await }).map(drop).map_err(said)
    }

    /// Attests with a join token.
    pub(super) fn attest(&self, token: &str) -> Result<Identity, String> {
        let key = new_key();
        let attest = async {
            let csr = create_csr(&key, None, None, &[]).await.expect("a CSR").into();
            let data =
                types::AttestationData { r#type: "join_token".into(), payload: token.as_bytes().to_vec().into() };
            let params = Params { data: Some(data), params: Some(AgentX509svidParams { csr }) };
            let request = AttestAgentRequest { step: Some(Step::Params(params)) };
            let mut client = AgentClient::new(self.remote(None).await);
            let mut told = client.attest_agent(tokio_stream::iter([request])).await?.into_inner();
            match told.message().await?.and_then(|message| message.step) {
                Some(Told::Result(result)) => Ok(Identity::of(result.svid.expect("an SVID"), key.clone())),
                other => panic!("{other:?}"),
            }
        };
        self.block(attest).map_err(said)
    }

    /// Attests with a certificate and its key, whose files these are.
    pub(super) fn attest_by(&self, certificate: &Path, key_file: &Path) -> Result<Identity, String> {
        let key = new_key();
        let data =
            format!("certificate_path = \"{}\" private_key_path = \"{}\"", certificate.display(), key_file.display());
        let agent = X509PopAgent::new(&finial_hcl::parse(&data).expect("HCL")).expect("a certificate and its key");
        let attest = async {
            let mut session = agent.begin().await.expect("it begins");
            let csr = create_csr(&key, None, None, &[]).await.expect("a CSR").into();
            let payload = session.payload().to_vec().into();
            let data = Some(types::AttestationData { r#type: "x509pop".into(), payload });
            let params = Params { data, params: Some(AgentX509svidParams { csr }) };
            let (steps, asked) = tokio::sync::mpsc::channel(2);
            let step = |step| AttestAgentRequest { step: Some(step) };
            steps.send(step(Step::Params(params))).await.expect("room");
            let mut client = AgentClient::new(self.remote(None).await);
            let mut told = client.attest_agent(ReceiverStream::new(asked)).await?.into_inner();
            loop {
                match told.message().await?.and_then(|message| message.step) {
                    Some(Told::Challenge(challenge)) => {
                        let answer = session.respond(&challenge).await.expect("an answer").into();
                        // Who has gone is noticed by the next message.
                        let _ = steps.send(step(Step::ChallengeResponse(answer))).await;
                    }
                    Some(Told::Result(result)) => {
                        return Ok(Identity::of(result.svid.expect("an SVID"), key.clone()));
                    }
                    None => return Err(Status::unavailable("no result")),
                }
            }
        };
        self.block(attest).map_err(said)
    }

    /// Renews an agent's SVID.
    pub(super) fn renew(&self, agent: &Identity) -> Result<Identity, String> {
        let key = new_key();
        let renew = async {
            let csr = create_csr(&key, None, None, &[]).await.expect("a CSR").into();
            let request = RenewAgentRequest { params: Some(AgentX509svidParams { csr }) };
            let mut client = AgentClient::new(self.remote(Some(agent)).await);
            let renewed = client.renew_agent(request).await?.into_inner();
            Ok(Identity::of(renewed.svid.expect("an SVID"), key.clone()))
        };
        self.block(renew).map_err(said)
    }

    /// Whether the server lets the agent in.
    pub(super) fn let_in(&self, agent: &Identity) -> Result<(), String> {
        let ask = async {
            let mut client = EntryClient::new(self.remote(Some(agent)).await);
            client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await
        };
        self.block(ask).map(drop).map_err(said)
    }
}

fn bundle_with(trust_domain: &str, key_id: &str, spki: &[u8]) -> types::Bundle {
    let key = types::JwtKey {
        public_key: spki.to_vec().into(),
        key_id: key_id.into(),
        expires_at: 4_000_000_000,
        tainted: false,
    };
    types::Bundle { trust_domain: trust_domain.into(), jwt_authorities: vec![key], ..Default::default() }
}

fn all_done(of_each: impl Iterator<Item = Option<types::Status>>) -> Result<(), String> {
    let refused = of_each.flatten().find(|status| status.code != 0);
    refused.map_or(Ok(()), |status| Err(format!("{status:?}")))
}

fn said(status: Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// What tells the authorities of a bundle apart, by kind: key IDs of the certificates, and IDs of the keys.
pub(super) fn names(bundle: &Bundle) -> Vec<String> {
    let root = |root: &finial_core::X509Authority| {
        let certificate = Certificate::parse(root.der.clone()).expect("a certificate");
        certificate.subject_key_id().map(hex).unwrap_or_default()
    };
    let keys = bundle.jwt_authorities.iter().chain(&bundle.wit_authorities).map(|key| key.key_id.clone());
    bundle.x509_authorities.iter().map(root).chain(keys).collect()
}
