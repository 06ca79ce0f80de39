//! Two real Envoys with mutual TLS between them by what our agent gives them, while identities and authorities change.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use testkit::envoy::{Envoy, Secrets, envoys};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually};

/// Only ends broken runs.
const DEADLINE: Duration = Duration::from_secs(120);
/// How many identities of each side are seen come and go.
const ROTATIONS: usize = 2;

fn server(trust_domain: &str) -> Server {
    Server::start(Flavor::Finial, &ServerOptions { trust_domain: trust_domain.into(), ..Default::default() })
}

/// An entry for whatever runs this program.
fn entry(server: &Server, path: &str, program: &Path, more: &[&str]) -> String {
    let selector = format!("unix:path:{}", program.display());
    server.entry(path, &[&["-selector", &selector], more].concat())
}

fn agent(server: &Server) -> Agent {
    let options = AgentOptions { unix: "discover_workload_path = true".into(), ..Default::default() };
    let agent = Agent::start(Flavor::Finial, server, &options);
    eventually("the agent listens", || if agent.socket().exists() { Ok(()) } else { Err(agent.process.log()) });
    agent
}

fn secrets<'a>(agent: &'a Path, api_type: &'a str, roots: &'a str, peer: &'a str) -> Secrets<'a> {
    Secrets { socket: agent, api_type, certificate: "default", roots, peer, metadata: json!({}) }
}

fn wait_for_status(proxy: &Envoy, expected: u16) {
    eventually("the proxies understand each other as they should", || match proxy.get() {
        Ok(answer) if answer.status == expected => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// What was seen of two proxies that talk to each other without a pause.
#[derive(Debug, Default)]
struct Seen {
    requests: usize,
    failed: Vec<String>,
    /// Serial numbers of certificates, of this talk.
    callers: BTreeSet<String>,
    callees: BTreeSet<String>,
}

impl Seen {
    /// Lets them talk until `enough` of what was seen, and of how many roots caller and callee trust.
    fn talk(&mut self, caller: &Envoy, callee: &Envoy, id: &str, enough: impl Fn(&Self, (usize, usize)) -> bool) {
        (self.callers, self.callees) = Default::default();
        let end = Instant::now() + DEADLINE;
        loop {
            for _ in 0..20 {
                self.requests += 1;
                match caller.get() {
                    Ok(answer) if answer.status == 200 && answer.header("peer") == id => {
                        self.callers.insert(answer.header("serial").to_owned());
                    }
                    other => self.failed.push(format!("{other:?}")),
                }
            }
            let ((serials, callees), (_, callers)) = (callee.certificates(), caller.certificates());
            self.callees.extend(serials);
            if enough(self, (callers, callees)) {
                return;
            }
            assert!(Instant::now() < end, "it takes too long: {callers} and {callees} roots, {self:?}");
        }
    }
}

#[test]
fn proxies_talk_on_while_identities_and_authorities_change() {
    let Some([caller_program, callee_program]) = envoys() else { return };
    let server = server("example.org");
    let caller_id = entry(&server, "/caller", &caller_program, &["-x509SVIDTTL", "20"]);
    let callee_id = entry(&server, "/callee", &callee_program, &["-x509SVIDTTL", "20"]);
    let mut agent = agent(&server);
    let socket = agent.socket();
    let callee = Envoy::callee(&callee_program, &secrets(&socket, "GRPC", "ROOTCA", &caller_id));
    let caller = Envoy::caller(&caller_program, &secrets(&socket, "DELTA_GRPC", "ROOTCA", &callee_id), callee.port);
    wait_for_status(&caller, 200);

    let mut seen = Seen::default();
    server.order("x509", "prepare");
    seen.talk(&caller, &callee, &caller_id, |_, roots| roots == (2, 2));
    // Both trust the next authority: from now on it signs.
    server.order("x509", "activate");
    seen.talk(&caller, &callee, &caller_id, |seen, _| seen.callers.len() > ROTATIONS && seen.callees.len() > ROTATIONS);
    // Their streams break and begin again.
    agent.process.terminate();
    agent.restart();
    seen.talk(&caller, &callee, &caller_id, |seen, _| seen.callers.len() > 1 && seen.callees.len() > 1);
    assert!(seen.failed.is_empty(), "{} of {} requests failed: {:?}", seen.failed.len(), seen.requests, seen.failed[0]);
    for proxy in [&caller, &callee] {
        assert_eq!(proxy.counted(".update_rejected"), 0, "a secret that Envoy could not use");
    }
    // The same handshake with roots as Envoy takes them from anyone.
    let plain = Secrets {
        metadata: json!({"disable_spiffe_cert_validation": true}),
        ..secrets(&socket, "GRPC", "spiffe://example.org", &callee_id)
    };
    wait_for_status(&Envoy::caller(&caller_program, &plain, callee.port), 200);
    // And one that expects somebody else.
    let wrong = secrets(&socket, "GRPC", "ROOTCA", "spiffe://example.org/other");
    wait_for_status(&Envoy::caller(&caller_program, &wrong, callee.port), 503);
}

/// Tells each server the other's bundle.
fn exchange_bundles(one: &Server, other: &Server) {
    for (from, to) in [(one, other), (other, one)] {
        let bundle = from.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
        let file = to.dir.write("foreign.json", &bundle);
        let id = format!("spiffe://{}", from.trust_domain);
        let file = file.display().to_string();
        to.command(&["bundle", "set", "-format", "spiffe", "-id", &id, "-path", &file]).ok();
    }
}

/// The ID of an entry.
fn entry_id(server: &Server, id: &str) -> String {
    let shown = server.command(&["entry", "show", "-spiffeID", id, "-output", "json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown["entries"][0]["id"].as_str().expect("an entry").to_owned()
}

fn federate(server: &Server, id: &str, program: &Path, with: &str) {
    let (parent, selector) =
        (format!("spiffe://{}/node", server.trust_domain), format!("unix:path:{}", program.display()));
    let entry = entry_id(server, id);
    let update = ["entry", "update", "-entryID", &entry, "-spiffeID", id, "-parentID", &parent, "-selector", &selector];
    server.command(&[&update[..], &["-federatesWith", with]].concat()).ok();
}

#[test]
fn proxies_of_two_trust_domains_talk_from_the_moment_they_federate() {
    let Some([caller_program, callee_program]) = envoys() else { return };
    let (here, there) = (server("example.org"), server("other.org"));
    exchange_bundles(&here, &there);
    let caller_id = entry(&here, "/caller", &caller_program, &[]);
    let callee_id = entry(&there, "/callee", &callee_program, &["-federatesWith", "spiffe://example.org"]);
    let (near_agent, far_agent) = (agent(&here), agent(&there));
    let (near, far) = (near_agent.socket(), far_agent.socket());
    let callee = Envoy::callee(&callee_program, &secrets(&far, "DELTA_GRPC", "spiffe://example.org", &caller_id));
    let all = Envoy::caller(&caller_program, &secrets(&near, "GRPC", "ALL", &callee_id), callee.port);
    let delta =
        Envoy::caller(&caller_program, &secrets(&near, "DELTA_GRPC", "spiffe://other.org", &callee_id), callee.port);
    let own = Envoy::caller(&caller_program, &secrets(&near, "GRPC", "ROOTCA", &callee_id), callee.port);
    // Nobody told the caller of the other domain yet.
    wait_for_status(&all, 503);
    wait_for_status(&delta, 503);
    federate(&here, &caller_id, &caller_program, "spiffe://other.org");
    for proxy in [&all, &delta] {
        wait_for_status(proxy, 200);
        let answer = proxy.get().expect("an answer");
        assert_eq!((answer.status, answer.header("peer")), (200, &*caller_id));
        assert_eq!(proxy.counted(".update_rejected"), 0, "a secret that Envoy could not use");
    }
    wait_for_status(&own, 503);
    assert_eq!(own.get().expect("an answer").status, 503, "its own roots do not vouch for the other domain");
}

/// Lines moved to the right.
fn indented(text: &str, by: usize) -> String {
    text.lines().map(|line| format!("{:by$}{line}\n", "")).collect()
}

#[test]
fn envoy_takes_the_guides_configuration() {
    let Some([program, _]) = envoys() else { return };
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guides/envoy.md");
    let guide = std::fs::read_to_string(guide).expect("the guide");
    let yaml = guide.split("```").find_map(|part| part.strip_prefix("yaml\n")).expect("a configuration");
    let (clusters, context) = yaml.split_once("# in a transport socket").expect("two parts");
    let (_, clusters) = clusters.split_once("clusters:\n").expect("a cluster");
    let (_, context) = context.split_once('\n').expect("a context");
    let config = format!(
        "node: {{id: a, cluster: b}}\nstatic_resources:\n  clusters:\n{}  - name: x\n    load_assignment: {{cluster_name: x}}\n    \
         transport_socket:\n      name: envoy.transport_sockets.tls\n      typed_config:\n        \"@type\": \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext\n{}",
        indented(clusters, 2),
        indented(context, 8)
    );
    let dir = Workdir::new();
    let file = dir.write("envoy.yaml", &config);
    Output::of(Command::new(program).args(["--mode", "validate", "-c"]).arg(file)).ok();
}
