//! SIGHUP: what can change while a server runs, and what a bad file changes: nothing.

use finial_core::{KeyType, SpiffeId, SystemClock};
use finial_crypto::tls::{ServerAuth, TlsIdentity, client_config};
use finial_crypto::{PrivateKey, create_csr};
use finial_net::client::{tls_channel, uds_channel};
use finial_proto::server::agent::agent_client::AgentClient;
use finial_proto::server::agent::{
    AgentX509svidParams, AttestAgentRequest, attest_agent_request, attest_agent_response,
};
use finial_proto::server::entry::CountEntriesRequest;
use finial_proto::server::entry::entry_client::EntryClient;
use finial_proto::server::svid::svid_client::SvidClient;
use finial_proto::server::svid::{BatchNewX509svidRequest, MintX509svidRequest, NewX509svidParams};
use finial_proto::types;
use rustix::process::Signal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use testkit::{Flavor, Server, ServerOptions, eventually, free_port};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

struct Reloading {
    server: Server,
    file: PathBuf,
    text: String,
    reloads: usize,
}

impl Reloading {
    fn start() -> Self {
        let server = Server::start(Flavor::Finial, &ServerOptions::default());
        let file = server.dir.path().join("server.conf");
        let text = std::fs::read_to_string(&file).unwrap();
        Self { server, file, text, reloads: 0 }
    }

    /// Has the server read `text` and gives what the log says of it.
    fn with(&mut self, text: &str) -> String {
        std::fs::write(&self.file, text).unwrap();
        let before = self.server.process.log().len();
        self.server.process.signal(Signal::HUP);
        self.reloads += 1;
        eventually("the server has read its file", || {
            let log = self.server.process.log();
            let done =
                |line: &&str| line.contains("msg=\"Configuration reloaded\"") || line.contains("was not reloaded");
            match log.lines().filter(done).count() {
                count if count == self.reloads => Ok(log[before..].to_owned()),
                count => Err(format!("{count} reloads")),
            }
        })
    }
}

#[test]
fn a_server_takes_new_settings_without_a_restart() {
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    let changed = good.replace("\"DEBUG\"", "\"WARN\"").replace(
        "ratelimit { attestation = false }",
        "ratelimit { attestation = true }\n admin_ids = [\"spiffe://example.org/admin\"]\n ca_ttl = \"48h\"\n\
         federation { federates_with \"other.test\" { bundle_endpoint_url = \"https://localhost:1\" \
         bundle_endpoint_profile \"https_web\" {} } }",
    );
    // A level below that of the line itself would leave the test without a line.
    let changed = changed.replace("\"WARN\"", "\"INFO\"");
    let said = reloading.with(&changed);
    assert!(said.contains("changed=\"[log_level admin_ids ratelimit federates_with]\""), "{said}");
    assert!(said.contains("ca_ttl has changed in the configuration file: it needs a restart to take effect"), "{said}");
    let level = reloading.server.command(&["logger", "get"]).ok().stdout;
    assert!(level.contains("Logger Level : info") && level.contains("Launch Level : info"), "{level}");
    let said = reloading.with(&changed);
    assert!(said.contains("changed=\"[]\"") && said.contains("ca_ttl has changed"), "{said}");
    let said = reloading.with(&good);
    assert!(said.contains("changed=\"[log_level admin_ids ratelimit federates_with]\""), "{said}");
    assert!(!said.contains("restart"), "{said}");
    reloading.server.command(&["healthcheck"]).ok();
}

/// A connection over TCP with this SVID, or with none.
fn connect(server: &Server, svid: Option<(&types::X509svid, &PrivateKey)>) -> Channel {
    let identity = svid.map(|(svid, key)| {
        let chain: Vec<Arc<[u8]>> = svid.cert_chain.iter().map(|der| Arc::from(&**der)).collect();
        Arc::new(TlsIdentity::new(&chain, key).unwrap()) as Arc<_>
    });
    let auth =
        ServerAuth::InsecureBootstrap { expected: SpiffeId::parse("spiffe://example.org/spire/server").unwrap() };
    let config = client_config(identity, auth, Arc::new(SystemClock)).unwrap();
    tls_channel(&format!("127.0.0.1:{}", server.port), Arc::new(config))
}

/// A connection of a workload with this path.
async fn workload(server: &Server, path: &str) -> Channel {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let id = SpiffeId::parse(&format!("spiffe://example.org{path}")).unwrap();
    let csr = create_csr(&key, None, Some(&id), &[]).await.unwrap().into();
    let mut client = SvidClient::new(uds_channel(server.socket()));
    let minted = client.mint_x509svid(MintX509svidRequest { csr, ttl: 600 }).await.unwrap().into_inner();
    connect(server, Some((&minted.svid.unwrap(), &key)))
}

/// Attests by join token, and gives up rather than wait for its turn.
async fn attest(server: &Server, token: &str) -> Result<(types::X509svid, PrivateKey), Status> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let csr = create_csr(&key, None, None, &[]).await.unwrap().into();
    let data = types::AttestationData { r#type: "join_token".into(), payload: token.to_owned().into() };
    let params = attest_agent_request::Params { data: Some(data), params: Some(AgentX509svidParams { csr }) };
    let step = AttestAgentRequest { step: Some(attest_agent_request::Step::Params(params)) };
    let mut request = Request::new(tokio_stream::once(step));
    request.set_timeout(Duration::from_millis(500));
    let mut answers = AgentClient::new(connect(server, None)).attest_agent(request).await?.into_inner();
    match answers.message().await?.and_then(|answer| answer.step) {
        Some(attest_agent_response::Step::Result(result)) => Ok((result.svid.unwrap(), key)),
        other => panic!("{other:?}"),
    }
}

fn code<T>(result: Result<T, Status>) -> Code {
    result.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// What the log says has changed must be so for callers, on connections that were there before, and be undone again.
#[test]
fn admins_and_limits_are_others_after_a_signal() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    let token = reloading.server.join_token();
    let (admin, nobody, agent) = runtime.block_on(async {
        let server = &reloading.server;
        let (svid, key) = attest(server, &token).await.unwrap();
        (workload(server, "/admin").await, workload(server, "/nobody").await, connect(server, Some((&svid, &key))))
    });
    let counts = |who: &Channel| {
        let mut client = EntryClient::new(who.clone());
        code(runtime.block_on(client.count_entries(CountEntriesRequest::default())))
    };
    // One more than any agent may have at once.
    let signs = || {
        let params = vec![NewX509svidParams { entry_id: "none".into(), csr: Default::default() }; 501];
        let mut client = SvidClient::new(agent.clone());
        code(runtime.block_on(client.batch_new_x509svid(BatchNewX509svidRequest { params })))
    };
    let attests = |server: &Server| code(runtime.block_on(attest(server, "no such token")));
    let as_before = |server: &Server| {
        assert_eq!((counts(&admin), counts(&nobody)), (Code::PermissionDenied, Code::PermissionDenied));
        assert_eq!(signs(), Code::ResourceExhausted);
        for _ in 0..5 {
            assert_eq!(attests(server), Code::InvalidArgument, "as often as anybody likes");
        }
    };
    as_before(&reloading.server);

    let changed = good.replace(
        "ratelimit { attestation = false }",
        "ratelimit { attestation = true signing = false }\n admin_ids = [\"spiffe://example.org/admin\"]",
    );
    let said = reloading.with(&changed);
    assert!(said.contains("changed=\"[admin_ids ratelimit]\""), "{said}");
    assert_eq!((counts(&admin), counts(&nobody)), (Code::Ok, Code::PermissionDenied));
    assert_eq!(signs(), Code::Ok);
    // One a second: of any two soon after each other one is refused.
    eventually("attestations are limited", || match attests(&reloading.server) {
        Code::ResourceExhausted => Ok(()),
        other => Err(format!("{other:?}")),
    });

    reloading.with(&good);
    as_before(&reloading.server);
}

/// A relationship of the file is fetched from as soon as it stands there, and no longer when it is gone.
#[test]
fn bundles_are_fetched_after_a_signal() {
    let port = free_port();
    let endpoint = format!("federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} }} }}");
    let options = ServerOptions { trust_domain: "other.test".into(), server: endpoint, ..ServerOptions::default() };
    let other = Server::start(Flavor::Finial, &options);
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    // The first bundle, without keys for JWTs, comes from the operator.
    let file = other.bundle_file();
    let first = ["bundle", "set", "-id", "spiffe://other.test", "-path", file.to_str().unwrap()];
    reloading.server.command(&first).ok();
    let has_keys = |server: &Server| {
        let list = ["bundle", "list", "-id", "spiffe://other.test", "-format", "spiffe"];
        server.command(&list).ok().stdout.contains("jwt-svid")
    };
    let refresh = |server: &Server| server.command(&["federation", "refresh", "-id", "spiffe://other.test"]);
    let unknown = refresh(&reloading.server);
    assert!(unknown.code != 0 && !has_keys(&reloading.server), "{unknown:?}");

    let with = format!(
        "federation {{ federates_with \"other.test\" {{ bundle_endpoint_url = \"https://127.0.0.1:{port}\" \
         bundle_endpoint_profile \"https_spiffe\" {{ endpoint_spiffe_id = \"spiffe://other.test/spire/server\" }} }} }}\n \
         ratelimit {{"
    );
    let said = reloading.with(&good.replace("ratelimit {", &with));
    assert!(said.contains("changed=\"[federates_with]\""), "{said}");
    eventually("the bundle is fetched", || match has_keys(&reloading.server) {
        true => Ok(()),
        false => Err("no keys yet".into()),
    });
    refresh(&reloading.server).ok();

    reloading.with(&good);
    let gone = eventually("nothing is fetched any more", || match refresh(&reloading.server) {
        gone if gone.code != 0 => Ok(gone),
        done => Err(format!("{done:?}")),
    });
    assert_eq!(gone.stderr, unknown.stderr);
}

#[test]
fn a_bad_file_changes_nothing_and_all_of_it_is_told() {
    let mut reloading = Reloading::start();
    let good = reloading.text.clone();
    let bad = good
        .replace("\"DEBUG\"", "\"INFO\"")
        .replace("ratelimit {", "ca_ttl = \"soon\"\n admin_ids = [\"nobody\"]\n ratelimit {");
    let said = reloading.with(&bad);
    assert!(said.contains("could not parse default CA ttl") && said.contains("could not parse admin ID"), "{said}");
    assert!(said.contains("server.conf:"), "{said}");
    assert!(said.contains("the settings before stay in force"), "{said}");
    let level = reloading.server.command(&["logger", "get"]).ok().stdout;
    assert!(level.contains("Logger Level : debug"), "{level}");
    std::fs::remove_file(&reloading.file).unwrap();
    let said = reloading.with(&good);
    assert!(said.contains("changed=\"[]\""), "{said}");
}
