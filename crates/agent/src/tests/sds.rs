//! Envoy's secret discovery: what proxies ask for and get, in the words of SPIRE.

use super::fake::{wire_bundle, wire_entry};
use super::harness::{Running, World, next, until, within};
use crate::testing::TestCa;
use finial_crypto::{Certificate, pem};
use finial_net::client::uds_channel;
use finial_proto::envoy::Any;
use finial_proto::envoy::core::node::UserAgentVersionType;
use finial_proto::envoy::core::{BuildVersion, Node};
use finial_proto::envoy::discovery::{DiscoveryRequest, DiscoveryResponse};
use finial_proto::envoy::secret::secret_discovery_service_client::SecretDiscoveryServiceClient;
use finial_proto::envoy::tls::secret::Type;
use finial_proto::envoy::tls::{CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate};
use finial_proto::envoy::types::SemanticVersion;
use finial_proto::{rpc, types};
use prost_types::value::Kind;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

impl Running {
    pub(super) fn sds(&self) -> SecretDiscoveryServiceClient<Channel> {
        SecretDiscoveryServiceClient::new(uds_channel(&self.socket))
    }
}

/// A proxy's stream.
struct Proxy {
    requests: mpsc::Sender<DiscoveryRequest>,
    answers: Streaming<DiscoveryResponse>,
}

pub(super) fn asked(names: &[&str]) -> DiscoveryRequest {
    DiscoveryRequest {
        resource_names: names.iter().map(|n| (*n).to_owned()).collect(),
        type_url: TYPE_URL.to_owned(),
        ..Default::default()
    }
}

fn acked(answer: &DiscoveryResponse, names: &[&str]) -> DiscoveryRequest {
    let (version_info, response_nonce) = (answer.version_info.clone(), answer.nonce.clone());
    DiscoveryRequest { version_info, response_nonce, ..asked(names) }
}

impl Proxy {
    async fn open(agent: &Running) -> Result<Self, Status> {
        let (requests, sent) = mpsc::channel(4);
        let answers = within(agent.sds().stream_secrets(ReceiverStream::new(sent))).await?.into_inner();
        Ok(Self { requests, answers })
    }

    async fn asking(agent: &Running, names: &[&str]) -> Self {
        let proxy = Self::open(agent).await.unwrap();
        proxy.send(asked(names)).await;
        proxy
    }

    async fn send(&self, request: DiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Result<DiscoveryResponse, Status> {
        next(&mut self.answers).await
    }
}

/// The certificate's name and ID, after a look whether the key is its.
fn certificate(one: &TlsCertificate) -> String {
    let chain = pem::certificates(one.certificate_chain.as_ref().unwrap().bytes()).unwrap();
    let leaf = Certificate::parse(chain[0].clone()).unwrap();
    let key = pem::private_key(one.private_key.as_ref().unwrap().bytes()).unwrap();
    assert_eq!(leaf.spki_der(), key.public_key().spki_der().as_ref(), "the key is another's");
    leaf.spiffe_id().unwrap().as_str().to_owned()
}

fn count(roots: &[u8]) -> usize {
    pem::certificates(roots).unwrap().len()
}

fn context(one: &CertificateValidationContext) -> String {
    match (&one.trusted_ca, &one.custom_validator_config) {
        (Some(roots), None) => format!("plain {}", count(roots.bytes())),
        (None, Some(validator)) => {
            assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
            let config: SpiffeCertValidatorConfig = validator.typed_config.as_ref().unwrap().open().unwrap();
            let roots = |bytes: &[u8]| count(bytes);
            let domains = config.trust_domains.iter();
            let domains = domains.map(|d| format!("{} {}", d.name, roots(d.trust_bundle.as_ref().unwrap().bytes())));
            domains.collect::<Vec<_>>().join(", ")
        }
        other => panic!("{other:?}"),
    }
}

/// A secret in a few words.
pub(super) fn words(any: &Any) -> String {
    assert_eq!(any.type_url, TYPE_URL);
    let secret: Secret = any.open().unwrap();
    let content = match secret.r#type.as_ref().unwrap() {
        Type::TlsCertificate(one) => certificate(one),
        Type::ValidationContext(one) => context(one),
    };
    format!("{} = {content}", secret.name)
}

fn all(answer: &DiscoveryResponse) -> Vec<String> {
    answer.resources.iter().map(words).collect()
}

/// One workload with two identities, the first of which federates with `other`.
pub(super) async fn world() -> World {
    let world = World::new().await;
    let other = TestCa::new("other");
    world.server.state().federated.insert("other".into(), wire_bundle("other", &other.root, None));
    let federates_with = vec!["other".into()];
    let first = types::Entry { federates_with, ..wire_entry("e1", "/one", &["test:any"]) };
    world.server.state().entries.insert("e1".into(), first);
    world.entry("e2", "/two", &["test:any"]);
    world
}

fn node(version: Option<(u32, u32)>, metadata: Option<Kind>) -> Option<Node> {
    let value = prost_types::Value { kind: metadata };
    let fields = [("disable_spiffe_cert_validation".to_owned(), value)].into();
    let version = version.map(|(major_number, minor_number)| {
        let version = Some(SemanticVersion { major_number, minor_number, patch: 0 });
        UserAgentVersionType::UserAgentBuildVersion(BuildVersion { version, metadata: None })
    });
    let metadata = Some(prost_types::Struct { fields });
    Some(Node { id: "proxy".into(), metadata, user_agent_version_type: version, ..Default::default() })
}

async fn fetch(agent: &Running, names: &[&str], node: Option<Node>) -> String {
    match within(agent.sds().fetch_secrets(DiscoveryRequest { node, ..asked(names) })).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            assert_eq!((&*answer.type_url, &*answer.version_info, &*answer.nonce), (TYPE_URL, "", ""));
            all(&answer).join("; ")
        }
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

const EVERYTHING: &str = "spiffe://td = td 1; spiffe://other = other 1; spiffe://td/one = spiffe://td/one; spiffe://td/two = spiffe://td/two";

#[tokio::test]
async fn a_stream_outlives_that_an_entry_is_given_another_id() {
    let world = World::new().await;
    world.entry("e1", "/old", &["test:any"]);
    let agent = world.started().await;
    let mut proxy = Proxy::asking(&agent, &["default"]).await;
    assert_eq!(words(&proxy.next().await.unwrap().resources[0]), "default = spiffe://td/old");
    world.entry("e1", "/new", &["test:any"]);
    world.server.state().entries.get_mut("e1").unwrap().revision_number += 1;
    assert_eq!(words(&proxy.next().await.unwrap().resources[0]), "default = spiffe://td/new");
    agent.stop().await;
}

#[tokio::test]
async fn names_stand_for_identities_and_bundles() {
    let world = world().await;
    let agent = world.started().await;
    for (names, expected) in [
        (&[][..], EVERYTHING),
        (&[""], EVERYTHING),
        (&["spiffe://td/two"], "spiffe://td/two = spiffe://td/two"),
        (&["default"], "default = spiffe://td/one"),
        (&["default", "default", ""], "default = spiffe://td/one"),
        (&["spiffe://td"], "spiffe://td = td 1"),
        (&["spiffe://other"], "spiffe://other = other 1"),
        (&["ROOTCA"], "ROOTCA = td 1"),
        (&["ALL"], "ALL = other 1, td 1"),
        (
            &["spiffe://td/two", "spiffe://other", "ROOTCA", "default"],
            "ROOTCA = td 1; spiffe://other = other 1; default = spiffe://td/one; spiffe://td/two = spiffe://td/two",
        ),
        // SPIRE answers only one of these at a time.
        (&["ALL", "ROOTCA", "spiffe://td"], "spiffe://td = td 1; ROOTCA = td 1; ALL = other 1, td 1"),
        (&["default", "spiffe://td/one"], "spiffe://td/one = spiffe://td/one; default = spiffe://td/one"),
        (
            &["x", "spiffe://td/one", "spiffe://none", "*"],
            "InvalidArgument: workload is not authorized for the requested identities [\"*\" \"spiffe://none\" \"x\"]",
        ),
    ] {
        assert_eq!(fetch(&agent, names, None).await, expected, "{names:?}");
    }
    // An Envoy that does not know the validator gets the roots alone, and so does one that asks for that.
    for node in [node(Some((1, 17)), None), node(None, Some(Kind::BoolValue(true)))] {
        assert_eq!(fetch(&agent, &["ROOTCA"], node.clone()).await, "ROOTCA = plain 1");
        assert_eq!(fetch(&agent, &["spiffe://other"], node.clone()).await, "spiffe://other = plain 1");
        let refused = "Internal: unable to use \"SPIFFE validator\" on Envoy below 1.17";
        assert_eq!(fetch(&agent, &["ALL"], node).await, refused);
    }
    agent.stop().await;
}

#[tokio::test]
async fn configured_names_take_the_place_of_the_usual_ones() {
    let mut world = world().await;
    world.settings.sds.default_svid_name = "mine".into();
    world.settings.sds.default_bundle_name = "ours".into();
    world.settings.sds.default_all_bundles_name = "theirs".into();
    world.settings.sds.disable_spiffe_cert_validation = true;
    let agent = world.started().await;
    assert_eq!(fetch(&agent, &["mine", "ours"], None).await, "ours = plain 1; mine = spiffe://td/one");
    let opted_in = node(Some((1, 30)), Some(Kind::StringValue("false".into())));
    assert_eq!(fetch(&agent, &["theirs"], opted_in).await, "theirs = other 1, td 1");
    let refused =
        "InvalidArgument: workload is not authorized for the requested identities [\"ALL\" \"ROOTCA\" \"default\"]";
    assert_eq!(fetch(&agent, &["default", "ROOTCA", "ALL"], None).await, refused);
    agent.stop().await;
}

#[tokio::test]
async fn who_has_no_identity_gets_the_roots_of_its_own_domain() {
    let world = world().await;
    world.server.state().entries.clear();
    let agent = world.started().await;
    assert_eq!(fetch(&agent, &[], None).await, "spiffe://td = td 1");
    assert_eq!(fetch(&agent, &["ALL"], None).await, "ALL = td 1");
    for name in ["default", "spiffe://other", "spiffe://td/one"] {
        let refused = format!("InvalidArgument: workload is not authorized for the requested identities [{name:?}]");
        assert_eq!(fetch(&agent, &[name], None).await, refused);
    }
    *world.attestor.fail.lock().unwrap() = true;
    // This connection is new, so it is attested again.
    assert_eq!(fetch(&agent, &["ROOTCA"], None).await, "Unavailable: workload attestation failed");
    let refused = Proxy::open(&agent).await.err().unwrap();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "workload attestation failed"));
    agent.stop().await;
}

#[tokio::test]
async fn a_stream_tells_versions_and_understands_acks() {
    let world = world().await;
    let agent = world.started().await;
    let mut proxy = Proxy::open(&agent).await.unwrap();
    proxy.send(DiscoveryRequest { node: node(Some((1, 17)), None), ..asked(&["ROOTCA"]) }).await;
    let first = proxy.next().await.unwrap();
    assert_eq!((all(&first), &*first.version_info, &*first.type_url), (vec!["ROOTCA = plain 1".into()], "1", TYPE_URL));
    assert_eq!(first.nonce.len(), 8);
    // Nothing new: an ACK, a stale one that wants something else, and a NACK.
    proxy.send(acked(&first, &["ROOTCA"])).await;
    proxy.send(DiscoveryRequest { response_nonce: "stale".into(), ..asked(&["default"]) }).await;
    let error_detail = Some(rpc::Status { code: 13, message: "cannot".into(), ..Default::default() });
    proxy
        .send(DiscoveryRequest {
            error_detail: error_detail.clone(),
            version_info: String::new(),
            ..acked(&first, &["ROOTCA"])
        })
        .await;
    // Other names are answered, even with a NACK; who asks was said at first.
    let other =
        DiscoveryRequest { error_detail, version_info: "0".into(), ..acked(&first, &["spiffe://td", "default"]) };
    proxy.send(other).await;
    let second = proxy.next().await.unwrap();
    assert_eq!(all(&second), ["spiffe://td = plain 1", "default = spiffe://td/one"]);
    assert_eq!(second.version_info, "1", "the same state");
    assert_ne!(second.nonce, first.nonce);
    // The old nonce is stale by now.
    proxy.send(acked(&first, &["ROOTCA"])).await;
    proxy.send(acked(&second, &["spiffe://td/two"])).await;
    assert_eq!(all(&proxy.next().await.unwrap()), ["spiffe://td/two = spiffe://td/two"]);
    let last = proxy.next();
    world.server.state().entries.remove("e2");
    let ended = last.await.unwrap_err();
    let refused = "workload is not authorized for the requested identities [\"spiffe://td/two\"]";
    assert_eq!((ended.code(), ended.message()), (Code::InvalidArgument, refused));
    agent.stop().await;
}

#[tokio::test]
async fn what_changes_is_pushed_to_those_whom_it_concerns() {
    let world = world().await;
    let agent = world.started().await;
    let (mut svid, mut roots) = (Proxy::asking(&agent, &["default"]).await, Proxy::asking(&agent, &["ROOTCA"]).await);
    let mut everything = Proxy::asking(&agent, &[]).await;
    let (first, mut trusted) = (svid.next().await.unwrap(), roots.next().await.unwrap());
    assert_eq!(all(&everything.next().await.unwrap()).len(), 4);
    for version in ["2", "3"] {
        world.server.state().entries.get_mut("e1").unwrap().revision_number += 1;
        let renewed = svid.next().await.unwrap();
        assert_eq!((all(&renewed), &*renewed.version_info), (vec!["default = spiffe://td/one".into()], version));
        assert_ne!(renewed.resources, first.resources);
        while everything.next().await.unwrap().resources[2] == first.resources[0] {}
    }
    let mut two = world.server.state().bundle.clone();
    two.x509_authorities.extend(world.server.state().federated["other"].x509_authorities.clone());
    world.server.state().bundle = two;
    roots.send(acked(&trusted, &["ROOTCA"])).await;
    trusted = roots.next().await.unwrap();
    assert_eq!(
        (all(&trusted), &*trusted.version_info),
        (vec!["ROOTCA = td 2".into()], "2"),
        "the SVIDs were not its business"
    );
    agent.stop().await;
}

#[tokio::test]
async fn an_svid_that_is_being_issued_is_waited_for() {
    let world = world().await;
    let agent = world.started().await;
    let mut proxy = Proxy::asking(&agent, &["default"]).await;
    let first = proxy.next().await.unwrap();
    world.server.state().batch_limit = 0;
    world.entry("e3", "/three", &["test:any"]);
    let asked = world.server.calls("BatchNewX509SVID");
    until("the new one is asked for", || world.server.calls("BatchNewX509SVID") > asked).await;
    // On a stream that is there, and on a new one.
    proxy.send(acked(&first, &["spiffe://td/three"])).await;
    let mut new = Proxy::asking(&agent, &["default"]).await;
    let (mut client, request) = (agent.sds(), super::sds::asked(&["spiffe://td/three"]));
    let issue = async { world.server.state().batch_limit = 500 };
    let (fetched, ()) = tokio::join!(within(client.fetch_secrets(request)), issue);
    assert_eq!(all(&fetched.unwrap().into_inner()), ["spiffe://td/three = spiffe://td/three"]);
    assert_eq!(all(&proxy.next().await.unwrap()), ["spiffe://td/three = spiffe://td/three"]);
    assert_eq!(all(&new.next().await.unwrap()), ["default = spiffe://td/one"]);
    agent.stop().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_proxy_or_the_agent() {
    let world = world().await;
    let agent = world.started().await;
    let mut proxy = Proxy::asking(&agent, &["default"]).await;
    drop(std::mem::replace(&mut proxy.requests, mpsc::channel(1).0));
    proxy.next().await.unwrap();
    assert!(within(proxy.answers.message()).await.unwrap().is_none(), "its end is no failure");
    let mut silent = Proxy::open(&agent).await.unwrap();
    let mut proxy = Proxy::asking(&agent, &["default"]).await;
    proxy.next().await.unwrap();
    // Time jumps to the next timer when there is nothing to do: that of the stream on which nothing is asked.
    tokio::time::pause();
    let ended = silent.answers.message().await.unwrap_err();
    tokio::time::resume();
    assert_eq!(ended.code(), Code::DeadlineExceeded);
    agent.stop().await;
    assert_eq!(proxy.next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn one_who_talks_without_listening_is_hung_up_on() {
    let world = world().await;
    let agent = world.started().await;
    let mut deaf = Proxy::asking(&agent, &["default"]).await;
    deaf.next().await.unwrap();
    // It knows no nonce, so nothing that it says is answered.
    let flood = async { while deaf.requests.send(asked(&["ROOTCA"])).await.is_ok() {} };
    within(flood).await;
    let ended = deaf.next().await.unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::ResourceExhausted, "too many requests that need no answer"));
    agent.stop().await;
}

#[tokio::test]
async fn more_names_than_anyone_needs_are_refused() {
    let world = world().await;
    let agent = world.started().await;
    let many: Vec<String> = (0..1001).map(|n| n.to_string()).collect();
    let long = "x".repeat(32_769);
    for names in [many.iter().map(String::as_str).collect::<Vec<_>>(), vec![&long]] {
        let refused = "too many resource names: at most 1000, of 32768 bytes together";
        assert_eq!(fetch(&agent, &names, None).await, format!("InvalidArgument: {refused}"));
        let mut proxy = Proxy::asking(&agent, &names).await;
        assert_eq!(proxy.next().await.unwrap_err().message(), refused);
    }
    agent.stop().await;
}

#[tokio::test]
async fn limits_count_each_method_for_itself() {
    let mut world = world().await;
    world.settings.rate_limits.fetch_secrets = 1;
    world.settings.rate_limits.stream_secrets = 1;
    let agent = world.started().await;
    // The agent itself is not limited: another process calls.
    let this = std::env::current_exe().unwrap();
    let mut command = tokio::process::Command::new(this);
    command
        .args(["--exact", "tests::sds::too_often", "--nocapture"])
        .env(CALL_TOO_OFTEN, &agent.socket)
        .kill_on_drop(true);
    let output = within(command.output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    for _ in 0..5 {
        assert_eq!(fetch(&agent, &[], None).await, EVERYTHING);
    }
    agent.stop().await;
}

/// Names the socket to the process that the test above starts.
const CALL_TOO_OFTEN: &str = "FINIAL_TEST_CALL_TOO_OFTEN";

#[tokio::test]
async fn too_often() {
    let Some(socket) = std::env::var_os(CALL_TOO_OFTEN) else { return };
    let mut client = SecretDiscoveryServiceClient::new(uds_channel(std::path::Path::new(&socket)));
    let method = |name| format!("rate limit exceeded for /envoy.service.secret.v3.SecretDiscoveryService/{name}");
    let refused = loop {
        if let Err(status) = within(client.fetch_secrets(asked(&[]))).await {
            break status;
        }
    };
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, &*method("FetchSecrets")));
    let refused = loop {
        if let Err(status) = within(client.stream_secrets(tokio_stream::iter([asked(&[])]))).await {
            break status;
        }
    };
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, &*method("StreamSecrets")));
}

#[tokio::test]
async fn each_of_the_two_apis_can_be_off() {
    let mut world = world().await;
    world.settings.disable_sds_api = true;
    let agent = world.started().await;
    assert_eq!(agent.sds().fetch_secrets(asked(&[])).await.unwrap_err().code(), Code::Unimplemented);
    assert!(agent.x509_once().await.is_ok());
    agent.stop().await;
    let mut world = self::world().await;
    world.settings.disable_workload_api = true;
    let agent = world.started().await;
    assert_eq!(fetch(&agent, &[], None).await, EVERYTHING);
    assert_eq!(agent.x509_once().await.unwrap_err().code(), Code::Unimplemented);
    agent.stop().await;
}
