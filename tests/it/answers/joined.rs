//! Identities of the test's own, and connections that show them.

use finial_core::{KeyType, SpiffeId, SystemClock};
use finial_crypto::tls::{ServerAuth, TlsIdentity, client_config};
use finial_crypto::{PrivateKey, create_csr};
use finial_net::client::{tls_channel, uds_channel};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{self as agents, attest_agent_request as attest};
use finial_proto::server::svid::{self as svids, svid_client::SvidClient};
use finial_proto::types;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use testkit::Server;
use tonic::transport::Channel;

/// One key for all: what hangs from the key is then the same at both servers.
pub(crate) static KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).expect("a key"));

/// A CSR of that key.
pub(crate) async fn csr(id: Option<&str>) -> Vec<u8> {
    let id = id.map(|id| SpiffeId::parse(id).expect("an ID"));
    create_csr(&*KEY, None, id.as_ref(), &[]).await.expect("a CSR")
}

/// Somebody without a certificate, on the TCP port.
pub(crate) fn stranger(server: &Server) -> Channel {
    connect(server, None)
}

/// Who shows this SVID of [`KEY`].
pub(crate) fn tls(server: &Server, svid: &types::X509svid) -> Channel {
    let chain: Vec<Arc<[u8]>> = svid.cert_chain.iter().map(|der| Arc::from(&**der)).collect();
    connect(server, Some(Arc::new(TlsIdentity::new(&chain, &KEY).expect("an identity"))))
}

fn connect(server: &Server, identity: Option<Arc<TlsIdentity>>) -> Channel {
    let expected = SpiffeId::parse(&format!("spiffe://{}/spire/server", server.trust_domain)).expect("an ID");
    let identity = identity.map(|identity| identity as _);
    let config = client_config(identity, ServerAuth::InsecureBootstrap { expected }, Arc::new(SystemClock));
    tls_channel(&format!("127.0.0.1:{}", server.port), Arc::new(config.expect("TLS")))
}

/// A workload with that path.
pub(crate) async fn workload(server: &Server, path: &str) -> Channel {
    let csr = csr(Some(&format!("spiffe://{}{path}", server.trust_domain))).await;
    let mut client = SvidClient::new(uds_channel(server.socket()));
    let minted = client.mint_x509svid(svids::MintX509svidRequest { csr: csr.into(), ttl: 600 }).await;
    tls(server, &minted.expect("an SVID").into_inner().svid.expect("an SVID"))
}

/// An agent that joined by token, and its connection.
pub(crate) struct Joined {
    pub(crate) id: types::Spiffeid,
    pub(crate) svid: types::X509svid,
    pub(crate) result: agents::attest_agent_response::Result,
    pub(crate) channel: Channel,
}

impl Joined {
    /// With that token, which is made for it.
    pub(crate) async fn new(server: &Server, token: &str) -> Self {
        let request = agents::CreateJoinTokenRequest { ttl: 600, token: token.into(), agent_id: None };
        AgentClient::new(uds_channel(server.socket())).create_join_token(request).await.expect("a token");
        let data = types::AttestationData { r#type: "join_token".into(), payload: token.as_bytes().to_vec().into() };
        let params = Some(agents::AgentX509svidParams { csr: csr(None).await.into() });
        let params = attest::Params { data: Some(data), params };
        let step = agents::AttestAgentRequest { step: Some(attest::Step::Params(params)) };
        let answers = AgentClient::new(stranger(server)).attest_agent(tokio_stream::once(step)).await;
        let answer = answers.expect("answers").into_inner().message().await.expect("an answer").expect("an answer");
        let Some(agents::attest_agent_response::Step::Result(result)) = answer.step else {
            panic!("{answer:?}");
        };
        let svid = result.svid.clone().expect("an SVID");
        let id = svid.id.clone().expect("an ID");
        let channel = tls(server, &svid);
        Self { id, svid, result, channel }
    }
}

/// Asks again until there is an answer to go on with: what SPIRE has in memory comes seconds after the datastore.
pub(crate) async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match probe().await {
            Ok(answer) => return answer,
            Err(why) if Instant::now() > end => panic!("{what}: {why}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
