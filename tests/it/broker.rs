//! The SPIFFE Broker API of the real SPIRE agent and of ours: the same questions, the same answers.

use crate::answers::{Answers, both, show, with_header};
use finial_core::{SystemClock, TrustDomain};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, TlsIdentity, client_config};
use finial_crypto::{Certificate, PrivateKey, TrustRoots};
use finial_net::client::{tls_channel, uds_channel, uds_tls_channel};
use finial_proto::broker::api_client::ApiClient;
use finial_proto::broker::*;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{X509svid as WorkloadSvid, X509svidRequest};
use std::sync::Arc;
use std::time::Duration;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually, free_port};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

const DEADLINE: Duration = Duration::from_secs(30);
const PID: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
const KUBERNETES: &str = "type.googleapis.com/spiffe.broker.KubernetesObjectReference";

fn any(type_url: &str, value: &[u8]) -> Option<WorkloadReference> {
    let reference = Some(prost_types::Any { type_url: type_url.into(), value: value.to_vec() });
    Some(WorkloadReference { reference })
}

fn pid(pid: i32) -> Option<WorkloadReference> {
    // Field 1 as a varint.
    let mut value = vec![8];
    let mut rest = pid as u32;
    while rest >= 0x80 {
        value.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    value.push(rest as u8);
    any(PID, &value)
}

async fn next<T>(stream: Result<Response<Streaming<T>>, Status>) -> Result<T, Status> {
    let message = tokio::time::timeout(DEADLINE, async { stream?.into_inner().message().await });
    message.await.expect("an answer in time").map(|m| m.expect("no end without a status"))
}

/// What can be compared of X.509-SVIDs.
fn svids(answer: Result<SubscribeToX509svidResponse, Status>) -> String {
    show(answer.map(|answer| {
        let svid = |svid: &X509svid| {
            let chain = Certificate::parse_chain(&svid.x509_svid).expect("a chain");
            let key = PrivateKey::from_pkcs8(&svid.x509_svid_key).expect("a key");
            let fits = key.public_key().spki_der().as_ref() == chain[0].spki_der();
            let roots = Certificate::parse_chain(&svid.bundle).expect("a bundle").len();
            format!("{} {:?} {} {fits} {roots}", svid.spiffe_id, svid.hint, chain.len())
        };
        let all: Vec<String> = answer.svids.iter().map(svid).collect();
        Response::new((all, answer.federated_bundles.into_keys().collect::<Vec<_>>()))
    }))
}

struct Roots(Arc<TrustRoots>);

impl BundleSource for Roots {
    fn x509_roots(&self, _: &str) -> Option<Arc<TrustRoots>> {
        Some(self.0.clone())
    }
}

struct Rig {
    server: Server,
    agent: Agent,
    sockets: Workdir,
    port: u16,
}

impl Rig {
    fn start(flavor: Flavor) -> Self {
        let server = match flavor {
            Flavor::Spire => "experimental { cache_reload_interval = \"1s\" }",
            Flavor::Finial => "",
        };
        let server = Server::start(flavor, &ServerOptions { server: server.into(), ..Default::default() });
        let (sockets, port) = (Workdir::new(), free_port());
        std::fs::create_dir(sockets.path().join("broker")).expect("a folder");
        for (id, more) in [
            ("any", &[][..]),
            ("broker", &[]),
            ("downstream", &["-downstream"]),
            ("hinted-1", &["-hint", "same"]),
            ("hinted-2", &["-hint", "same"]),
            ("stranger", &[]),
        ] {
            server.entry(&format!("/{id}"), &[&["-entryID", id], more].concat());
        }
        let experimental = format!(
            r#"broker {{
            socket_path = "{}"
            bind_address = "127.0.0.1:{port}"
            brokers = [
                {{
                    id = "spiffe://example.org/broker"
                    allowed_reference_types = [
                        {{ type_url = "{PID}" allow_over_tcp = true }},
                        {{ type_url = "{KUBERNETES}" }}
                    ]
                }},
                {{ id = "spiffe://example.org/any" allowed_reference_types = [ {{ type_url = "*" }} ] }},
                {{ id = "spiffe://other.org/any" allowed_reference_types = [ {{ type_url = "*" }} ] }}
            ]
        }}"#,
            sockets.path().join("broker/api.sock").display()
        );
        let mut agent = Agent::serving(flavor, &server, &AgentOptions { experimental, ..Default::default() });
        eventually("the broker socket is there", || match agent.process.ended() {
            Some(code) => panic!("the agent ended with {code}:\n{}", agent.process.log()),
            None if sockets.path().join("broker/api.sock").exists() => Ok(()),
            None => Err("no socket".to_owned()),
        });
        Self { server, agent, sockets, port }
    }

    /// All SVIDs that this process may have.
    async fn identities(&self) -> Vec<WorkloadSvid> {
        let mut client = SpiffeWorkloadApiClient::new(uds_channel(self.agent.socket()));
        loop {
            let mut request = Request::new(X509svidRequest {});
            request.metadata_mut().insert("workload.spiffe.io", "true".parse().expect("a value"));
            match next(client.fetch_x509svid(request).await).await {
                Ok(answer) if answer.svids.len() >= 4 => return answer.svids,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// A client as `path`, on the socket or by TCP.
    fn client(&self, identities: &[WorkloadSvid], path: &str, by_tcp: bool) -> ApiClient<Channel> {
        let svid = identities.iter().find(|svid| svid.spiffe_id.ends_with(path)).expect("an SVID");
        let chain = Certificate::parse_chain(&svid.x509_svid).expect("a chain");
        let chain: Vec<_> = chain.iter().map(|one| one.der().clone()).collect();
        let key = PrivateKey::from_pkcs8(&svid.x509_svid_key).expect("a key");
        let roots = Certificate::parse_chain(&svid.bundle).expect("a bundle");
        let roots = TrustRoots::new(roots.iter().map(|root| root.der())).expect("roots");
        let identity = Arc::new(TlsIdentity::new(&chain, &key).expect("an identity"));
        let policy = PeerPolicy::MemberOf(TrustDomain::parse("example.org").expect("a name"));
        let server = ServerAuth::Spiffe { bundles: Arc::new(Roots(Arc::new(roots))), policy };
        let config = Arc::new(client_config(Some(identity), server, Arc::new(SystemClock)).expect("TLS"));
        ApiClient::new(match by_tcp {
            true => tls_channel(&format!("127.0.0.1:{}", self.port), config),
            false => uds_tls_channel(self.sockets.path().join("broker/api.sock"), config),
        })
    }
}

/// All calls about one workload.
async fn all(client: &mut ApiClient<Channel>, answers: &mut Answers, when: &str, reference: Option<WorkloadReference>) {
    let mut note = |what: &str, answer: String| answers.push((format!("{what} {when} {reference:?}"), answer));
    let ask = SubscribeToX509svidRequest { reference: reference.clone() };
    note("X.509", svids(next(client.subscribe_to_x509svid(with_header("broker", ask)).await).await));
    let ask = SubscribeToX509BundlesRequest { reference: reference.clone() };
    let bundles = next(client.subscribe_to_x509_bundles(with_header("broker", ask)).await).await;
    note("X.509 bundles", show(bundles.map(|b| Response::new(b.bundles.into_keys().collect::<Vec<_>>()))));
    let ask = SubscribeToJwtBundlesRequest { reference: reference.clone() };
    let bundles = next(client.subscribe_to_jwt_bundles(with_header("broker", ask)).await).await;
    note("JWT bundles", show(bundles.map(|b| Response::new(b.bundles.into_keys().collect::<Vec<_>>()))));
    for audience in [&[][..], &["a"]] {
        let audience = audience.iter().map(|a| (*a).to_owned()).collect();
        let ask = FetchJwtsvidRequest { reference: reference.clone(), audience, spiffe_id: String::new() };
        let answer = client.fetch_jwtsvid(with_header("broker", ask)).await;
        // SPIRE gives tokens of downstream identities, too.
        let ids = |a: FetchJwtsvidResponse| {
            let all = a.svids.into_iter().map(|s| (s.spiffe_id, s.hint));
            all.filter(|(id, _)| !id.ends_with("/downstream")).collect::<Vec<_>>()
        };
        note("JWT", show(answer.map(|a| Response::new(ids(a.into_inner())))));
    }
}

#[test]
fn broker_api() {
    both(async |flavor| {
        let rig = Rig::start(flavor);
        let identities = rig.identities().await;
        let own = pid(i32::try_from(std::process::id()).expect("a pid"));
        let mut answers = Answers::new();
        let kubernetes = any(KUBERNETES, &[]);
        let odd =
            [None, Some(WorkloadReference::default()), any("", b""), any("x", b""), any("type.googleapis.com/x", b"y")];
        for (path, by_tcp) in [("/broker", false), ("/any", false), ("/broker", true), ("/any", true)] {
            let mut client = rig.client(&identities, path, by_tcp);
            let when = format!("as {path}, by TCP: {by_tcp},");
            let mut references = odd.to_vec();
            references.extend([kubernetes.clone(), own.clone()]);
            for reference in references {
                // The number of this process differs between runs.
                let mut these = Answers::new();
                all(&mut client, &mut these, &when, reference).await;
                answers.extend(these);
            }
            let bare = client.subscribe_to_x509svid(SubscribeToX509svidRequest { reference: own.clone() }).await;
            answers.push((format!("{when} without the header"), svids(next(bare).await)));
            let bare = client.fetch_jwtsvid(FetchJwtsvidRequest::default()).await;
            answers.push((format!("{when} without the header"), show(bare)));
        }
        let given =
            |(what, answer): &(String, String)| what.starts_with("X.509 as /any") && answer.contains("hinted-1");
        assert!(answers.iter().any(given), "nothing was given to a broker: {answers:#?}");
        for by_tcp in [false, true] {
            let mut stranger = rig.client(&identities, "/stranger", by_tcp);
            let ask = SubscribeToX509svidRequest { reference: own.clone() };
            let refused = next(stranger.subscribe_to_x509svid(with_header("broker", ask)).await).await;
            answers.push(("a stranger".into(), refused.is_err().to_string()));
        }
        drop(rig.server);
        answers
    });
}
