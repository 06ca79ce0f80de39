//! Envoy's secret discovery, asked of the real SPIRE agent and of ours: the same secrets by the same names, the same versions,
//! the same refusals. What our agent answers besides (several names of its own trust domain at once, DeltaSecrets) is not asked.

use crate::answers::{Answers, both};
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
use finial_proto::rpc;
use prost_types::value::Kind;
use std::time::Duration;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

type Client = SecretDiscoveryServiceClient<Channel>;

/// A chain with its key, without what differs from one to the next.
fn certificate(one: &TlsCertificate) -> String {
    let (chain, key) = (one.certificate_chain.clone().expect("a chain"), one.private_key.clone().expect("a key"));
    let ders = pem::certificates(chain.bytes()).expect("PEM");
    let leaf = Certificate::parse(ders.first().expect("a leaf").clone()).expect("a certificate");
    let private = pem::private_key(key.bytes()).expect("a key");
    assert_eq!(leaf.spki_der(), private.public_key().spki_der().as_ref());
    let lines = |text: &[u8]| String::from_utf8_lossy(text).lines().map(str::len).max();
    let label = String::from_utf8_lossy(key.bytes()).lines().next().unwrap_or_default().to_owned();
    let ends = chain.bytes().ends_with(b"-----\n") && key.bytes().ends_with(b"-----\n");
    format!(
        "{} of {} {label} {:?} {:?} {ends}",
        leaf.spiffe_id().expect("an ID"),
        ders.len(),
        lines(chain.bytes()),
        lines(key.bytes())
    )
}

fn roots(bytes: &[u8]) -> String {
    let ders = pem::certificates(bytes).expect("PEM");
    format!("{} roots, end {:?}", ders.len(), bytes.last())
}

fn context(one: &CertificateValidationContext) -> String {
    let plain = one.trusted_ca.as_ref().map(|source| roots(source.bytes()));
    let validator = one.custom_validator_config.as_ref().map(|validator| {
        let config = validator.typed_config.as_ref().expect("a configuration");
        let config: SpiffeCertValidatorConfig = config.open().expect("that of the validator");
        let domain = |bundle: &[u8], name: &str| format!("{name}: {}", roots(bundle));
        let domains = config.trust_domains.iter();
        let domains = domains.map(|d| domain(d.trust_bundle.as_ref().expect("a bundle").bytes(), &d.name));
        format!("{} {:?}", validator.name, domains.collect::<Vec<_>>())
    });
    format!("{plain:?} {validator:?}")
}

fn secret(any: &Any) -> String {
    assert_eq!(any.type_url, TYPE_URL);
    let secret: Secret = any.open().expect("a secret");
    let content = match secret.r#type.as_ref().expect("content") {
        Type::TlsCertificate(one) => certificate(one),
        Type::ValidationContext(one) => context(one),
    };
    format!("{} = {content}", secret.name)
}

fn show(answer: Result<DiscoveryResponse, Status>) -> String {
    match answer {
        Ok(DiscoveryResponse { version_info, resources, type_url, nonce }) => {
            let secrets: Vec<String> = resources.iter().map(secret).collect();
            format!("version {version_info:?} nonce of {} {type_url:?} {secrets:#?}", nonce.len())
        }
        Err(status) => format!("{:?}: {}", status.code(), status.message()),
    }
}

fn request(names: &[&str], node: Option<Node>) -> DiscoveryRequest {
    let resource_names = names.iter().map(|n| (*n).to_owned()).collect();
    DiscoveryRequest { resource_names, node, type_url: TYPE_URL.to_owned(), ..Default::default() }
}

fn node(version: Option<(u32, u32)>, said: Option<Kind>) -> Option<Node> {
    let fields =
        said.map(|kind| ("disable_spiffe_cert_validation".to_owned(), prost_types::Value { kind: Some(kind) }));
    let version = version.map(|(major_number, minor_number)| {
        let version = Some(SemanticVersion { major_number, minor_number, patch: 0 });
        UserAgentVersionType::UserAgentBuildVersion(BuildVersion { version, metadata: None })
    });
    let metadata = fields.map(|field| prost_types::Struct { fields: [field].into() });
    Some(Node { id: "proxy".into(), metadata, user_agent_version_type: version, ..Default::default() })
}

/// A server with two identities for this process; the first federates with another domain.
fn server(flavor: Flavor) -> Server {
    let server = Server::start(flavor, &ServerOptions::default());
    let roots = server.command(&["bundle", "show"]).ok().stdout;
    let file = server.dir.write("foreign.pem", &roots).display().to_string();
    server.command(&["bundle", "set", "-id", "spiffe://other.org", "-path", &file]).ok();
    server.entry("/one", &["-entryID", "a1", "-federatesWith", "spiffe://other.org"]);
    server.entry("/two", &["-entryID", "a2"]);
    server
}

/// An agent that has all of it.
fn agent(flavor: Flavor, server: &Server, more: &str) -> Agent {
    let agent = Agent::serving(flavor, server, &AgentOptions { agent: more.into(), ..Default::default() });
    testkit::eventually("both identities are there", || {
        let out = agent.command(&["api", "fetch", "x509"]).ok().stdout;
        if out.contains("/one") && out.contains("/two") { Ok(()) } else { Err(out) }
    });
    agent
}

async fn fetch(client: &mut Client, answers: &mut Answers, names: &[&str], node: Option<Node>) {
    let request = request(names, node);
    let what = format!("fetch {request:?}");
    answers.push((what, show(within(client.fetch_secrets(request)).await.map(tonic::Response::into_inner))));
}

/// Names of all kinds, right and wrong.
const NAMES: [&[&str]; 21] = [
    &[],
    &[""],
    &["", "default"],
    &["default"],
    &["spiffe://example.org/one"],
    &["spiffe://example.org/two"],
    &["spiffe://example.org/two", "spiffe://example.org/one", "spiffe://example.org/two"],
    &["default", "spiffe://example.org/two"],
    &["ROOTCA"],
    &["ALL"],
    &["spiffe://example.org"],
    &["spiffe://other.org"],
    &["default", "ROOTCA"],
    &["default", "spiffe://other.org", "ALL"],
    &["spiffe://nobody.org"],
    &["spiffe://example.org/three"],
    &["SPIFFE://example.org"],
    &["default", "b \"quoted\"", "a\ttab", "*"],
    &["mine"],
    &["ours"],
    &["theirs"],
];

#[test]
fn fetched_secrets_are_spires() {
    both(async |flavor| {
        let server = server(flavor);
        let mut answers = Answers::new();
        let own_names = "sds { default_svid_name = \"mine\" default_bundle_name = \"ours\" default_all_bundles_name = \"theirs\" disable_spiffe_cert_validation = true }";
        for more in ["", own_names] {
            let agent = agent(flavor, &server, more);
            let mut client = Client::new(uds_channel(agent.socket()));
            for names in NAMES {
                fetch(&mut client, &mut answers, names, None).await;
            }
            let text = |text: &str| Some(Kind::StringValue(text.to_owned()));
            for node in [
                node(None, None),
                node(Some((1, 17)), None),
                node(Some((1, 18)), None),
                node(Some((2, 0)), None),
                node(Some((0, 30)), None),
                node(None, Some(Kind::BoolValue(true))),
                node(None, Some(Kind::BoolValue(false))),
                node(Some((1, 17)), Some(Kind::BoolValue(false))),
                node(None, text("true")),
                node(None, text("TRUE")),
                node(None, text("tRUE")),
                node(None, text("0")),
                node(None, text("yes")),
                node(None, Some(Kind::NumberValue(1.0))),
            ] {
                for name in ["spiffe://example.org", "spiffe://other.org", "ALL", "theirs"] {
                    fetch(&mut client, &mut answers, &[name], node.clone()).await;
                }
            }
        }
        // Equal names: the first of them counts.
        let agent = agent(flavor, &server, "sds { default_bundle_name = \"ALL\" }");
        let mut client = Client::new(uds_channel(agent.socket()));
        fetch(&mut client, &mut answers, &["ALL"], None).await;
        answers
    });
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it took too long")
}

/// A stream, and what is said on it.
struct Talk {
    requests: mpsc::Sender<DiscoveryRequest>,
    answers: Option<Streaming<DiscoveryResponse>>,
    last: DiscoveryResponse,
    said: Answers,
}

impl Talk {
    /// Asks for something, and hears the first answer: only with it does SPIRE's server begin its half of the stream.
    async fn begin(agent: &Agent, what: &str, names: &[&str], node: Option<Node>) -> Self {
        let (requests, sent) = mpsc::channel(8);
        requests.send(request(names, node)).await.expect("it is taken");
        let mut client = Client::new(uds_channel(agent.socket()));
        let answers = within(client.stream_secrets(ReceiverStream::new(sent))).await;
        let (last, said) = (DiscoveryResponse::default(), Answers::new());
        match answers {
            Ok(answers) => {
                let mut talk = Self { requests, answers: Some(answers.into_inner()), last, said };
                talk.hear(what).await;
                talk
            }
            // Where it ends at once there is no beginning.
            Err(status) => Self { requests, answers: None, last, said: vec![(what.to_owned(), show(Err(status)))] },
        }
    }

    /// Says something to the last answer, such as that it was good.
    async fn say(&mut self, names: &[&str], change: impl FnOnce(&mut DiscoveryRequest)) {
        let mut request = request(names, None);
        request.version_info.clone_from(&self.last.version_info);
        request.response_nonce.clone_from(&self.last.nonce);
        change(&mut request);
        self.requests.send(request).await.expect("the stream goes on");
    }

    async fn hear(&mut self, what: &str) {
        let answers = self.answers.as_mut().expect("a stream that was begun");
        let answer = within(answers.message()).await;
        let answer = answer.transpose().unwrap_or_else(|| Err(Status::new(Code::Ok, "the end")));
        if let Ok(answer) = &answer {
            self.last.clone_from(answer);
        }
        self.said.push((what.to_owned(), show(answer)));
    }
}

#[test]
fn streamed_secrets_are_spires() {
    both(async |flavor| {
        let server = server(flavor);
        let agent = agent(flavor, &server, "");
        let mut talk = Talk::begin(&agent, "the first", &["ROOTCA"], node(Some((1, 17)), None)).await;
        talk.say(&["ROOTCA"], |_| ()).await; // an ACK
        talk.say(&["default"], |r| r.response_nonce = "stale".into()).await;
        talk.say(&["default"], |r| r.response_nonce.clear()).await;
        let cannot = || Some(rpc::Status { code: 13, message: "cannot".into(), ..Default::default() });
        talk.say(&["ROOTCA"], |r| (r.error_detail, r.version_info) = (cannot(), String::new())).await;
        talk.say(&["spiffe://other.org", "default"], |r| (r.error_detail, r.version_info) = (cannot(), "0".into()))
            .await;
        talk.hear("other names in a NACK, and the node of the first request").await;
        talk.say(&["default", "spiffe://other.org"], |_| ()).await; // the same set
        talk.say(&["spiffe://example.org/two"], |r| r.type_url = "anything".into()).await;
        talk.hear("another type URL").await;
        talk.say(&["spiffe://example.org/two", "ALL"], |r| r.node = node(Some((1, 30)), None)).await;
        talk.hear("another node").await;
        talk.say(&[], |_| ()).await;
        talk.hear("everything").await;
        talk.say(&["default"], |_| ()).await;
        talk.hear("one again").await;
        // Pushed: the entry gets another identity, and then none.
        let update = ["entry", "update", "-entryID", "a1", "-spiffeID", "spiffe://example.org/one"];
        let uid = format!("unix:uid:{}", testkit::uid());
        let more = ["-parentID", "spiffe://example.org/node", "-selector", &uid, "-dns", "one.test"];
        server.command(&[&update[..], &more].concat()).ok();
        let before = talk.last.resources.clone();
        while talk.last.resources == before {
            talk.hear("renewed").await;
            // How often it is told, and so the version, is a matter of timing.
            let (_, said) = talk.said.pop().expect("it was said");
            let said = said.split_once("nonce").map_or(said.clone(), |(_, rest)| rest.to_owned());
            if talk.last.resources != before {
                talk.said.push(("renewed".into(), said));
            }
        }
        talk.say(&["spiffe://example.org/two"], |_| ()).await;
        talk.hear("the other").await;
        let (what, said) = talk.said.pop().expect("it was said");
        talk.said.push((what, said.split_once("nonce").map_or(said.clone(), |(_, rest)| rest.to_owned())));
        server.command(&["entry", "delete", "-entryID", "a2"]).ok();
        talk.hear("taken away").await;
        let mut said = talk.said;

        for (what, names) in [("unknown", &["nobody"][..]), ("no longer there", &["spiffe://example.org/two"])] {
            said.extend(Talk::begin(&agent, what, names, None).await.said);
        }
        said.extend(Talk::begin(&agent, "too much for an old Envoy", &["ALL"], node(Some((1, 17)), None)).await.said);
        let mut ended = Talk::begin(&agent, "one", &["default"], None).await;
        ended.requests = mpsc::channel(1).0;
        ended.hear("the proxy says no more").await;
        said.extend(ended.said);
        said
    });
}
