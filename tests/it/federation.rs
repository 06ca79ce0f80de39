//! Trust domains that federate, ours and SPIRE's, in all ways: endpoints verified by SPIFFE or as the web, relationships of the
//! configuration and by command. Workloads of all of them call each other with a new handshake and a JWT-SVID each time.

use crate::answers_trust::web_certificate;
use crate::traffic::Traffic;
use serde_json::Value;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Process, Server, ServerOptions, Workdir, eventually_within, free_port};

/// SPIRE looks for new relationships every ten seconds, and agents for new entries as often as they are told to.
const FLOW: Duration = Duration::from_secs(90);
/// How a domain's endpoint proves who it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Proof {
    Spiffe,
    Web,
}

/// How a domain comes to know the others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Relation {
    Configured,
    Commanded,
}

/// What a domain is like.
#[derive(Clone, Copy)]
struct Plan {
    name: &'static str,
    flavor: Flavor,
    proof: Proof,
    relation: Relation,
}

struct Domain {
    plan: Plan,
    server: Server,
    agent: Agent,
    port: u16,
}

/// Domains that all federate with each other.
struct Union {
    domains: Vec<Domain>,
    /// The certificate of those that prove themselves to the web, and who signed it.
    web: Workdir,
}

fn id(name: &str) -> String {
    format!("spiffe://{name}")
}

impl Plan {
    fn url(self, port: u16) -> String {
        format!("https://localhost:{port}/")
    }

    fn profile(self) -> &'static str {
        match self.proof {
            Proof::Spiffe => "https_spiffe",
            Proof::Web => "https_web",
        }
    }

    /// Its own block of the configuration.
    fn federation(self, own: u16, web: &Workdir, others: &[(Self, u16)]) -> String {
        let path = |name: &str| web.path().join(name).display().to_string();
        let profile = match self.proof {
            Proof::Spiffe => "profile \"https_spiffe\" {}".to_owned(),
            Proof::Web => format!(
                "profile \"https_web\" {{ serving_cert_file {{ cert_file_path = \"{}\" key_file_path = \"{}\" \
                 file_sync_interval = \"1s\" }} }}",
                path("web.pem"),
                path("web.key")
            ),
        };
        let with = others.iter().filter(|_| self.relation == Relation::Configured).map(|(other, port)| {
            let endpoint_id = match other.proof {
                Proof::Spiffe => format!("endpoint_spiffe_id = \"spiffe://{}/spire/server\"", other.name),
                Proof::Web => String::new(),
            };
            format!(
                "federates_with \"{}\" {{ bundle_endpoint_url = \"{}\" bundle_endpoint_profile \"{}\" {{ {endpoint_id} }} }}",
                other.name,
                other.url(*port),
                other.profile()
            )
        });
        format!(
            "experimental {{ cache_reload_interval = \"1s\" }}\nfederation {{ bundle_endpoint {{ address = \"127.0.0.1\" \
             port = {own} refresh_hint = \"1m\" {profile} }} {} }}",
            with.collect::<String>()
        )
    }
}

impl Union {
    fn of(plans: &[Plan]) -> Self {
        let web = Workdir::new();
        let (_, _, root) = web_certificate(web.path());
        let all: Vec<(Plan, u16)> = plans.iter().map(|plan| (*plan, free_port())).collect();
        let mut domains = Vec::new();
        for (plan, port) in &all {
            let others: Vec<_> = all.iter().filter(|(other, _)| other.name != plan.name).copied().collect();
            let options = ServerOptions {
                trust_domain: plan.name.into(),
                server: plan.federation(*port, &web, &others),
                web_roots: Some(root.clone()),
                ..ServerOptions::default()
            };
            let server = Server::start(plan.flavor, &options);
            let agent = Agent::start(plan.flavor, &server, &AgentOptions::default());
            domains.push(Domain { plan: *plan, server, agent, port: *port });
        }
        let union = Self { domains, web };
        union.introduce();
        union
    }

    /// Each pair of domains, both ways.
    fn pairs(&self) -> impl Iterator<Item = (&Domain, &Domain)> {
        let others = |domain: &Domain| {
            let name = domain.plan.name;
            self.domains.iter().filter(move |other| other.plan.name != name)
        };
        self.domains.iter().flat_map(move |domain| others(domain).map(move |other| (domain, other)))
    }

    /// Everyone gets to know everyone: by command, or by the first bundle where an endpoint is verified with it.
    fn introduce(&self) {
        for (domain, other) in self.pairs() {
            let bundle = other.server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
            let file = domain.server.dir.write("first.json", &bundle).display().to_string();
            let first = ["-trustDomainBundleFormat", "spiffe", "-trustDomainBundlePath", &file];
            let (url, endpoint_id) = (other.plan.url(other.port), format!("{}/spire/server", id(other.plan.name)));
            let create = ["federation", "create", "-trustDomain", other.plan.name, "-bundleEndpointURL", &url];
            let profile = ["-bundleEndpointProfile", other.plan.profile()];
            match (domain.plan.relation, other.plan.proof) {
                (Relation::Commanded, Proof::Web) => {
                    drop(domain.server.command(&[&create[..], &profile].concat()).ok())
                }
                (Relation::Commanded, Proof::Spiffe) => {
                    let by = ["-endpointSpiffeID", &endpoint_id];
                    domain.server.command(&[&create[..], &profile, &by, &first].concat()).ok();
                }
                (Relation::Configured, Proof::Web) => {}
                (Relation::Configured, Proof::Spiffe) => {
                    let set = ["bundle", "set", "-id", &id(other.plan.name), "-format", "spiffe", "-path", &file];
                    domain.server.command(&set).ok();
                }
            }
        }
        for (domain, other) in self.pairs() {
            // Whoever had no bundle to verify with when it began would look again a minute later.
            domain.refresh(other);
            domain.fetched(other, |document| document["spiffe_refresh_hint"] == 60);
        }
        for domain in &self.domains {
            let others: Vec<String> = self.others(domain).map(|other| id(other.plan.name)).collect();
            let with: Vec<&str> = others.iter().flat_map(|other| ["-federatesWith", other]).collect();
            domain.server.entry("/workload", &with);
        }
    }

    fn others<'a>(&'a self, domain: &'a Domain) -> impl Iterator<Item = &'a Domain> {
        self.domains.iter().filter(|other| other.plan.name != domain.plan.name)
    }

    fn called(&self, name: &str) -> &Domain {
        self.domains.iter().find(|domain| domain.plan.name == name).expect("a domain of this name")
    }

    /// Has all workloads call each other while `meanwhile` happens, and some more; nothing may fail.
    fn traffic(&self, what: &str, meanwhile: impl FnOnce(&Traffic)) {
        for domain in &self.domains {
            eventually_within(FLOW, "the agent has an identity with all bundles", || {
                let out = domain.agent.command(&["api", "fetch", "x509"]);
                let has = |other: &Domain| out.stdout.contains(&format!("[{}]", id(other.plan.name)));
                if self.others(domain).all(has) { Ok(()) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
            });
        }
        let agents: Vec<_> = self.domains.iter().map(|domain| (domain.plan.name, &domain.agent)).collect();
        let traffic = Traffic::between(&agents, FLOW);
        meanwhile(&traffic);
        traffic.end(what, true);
    }
}

impl Domain {
    /// Waits until its server has another one's bundle, and it is as wanted.
    fn fetched(&self, other: &Domain, wanted: impl Fn(&Value) -> bool) {
        let what = format!("{} has {}'s bundle", self.plan.name, other.plan.name);
        eventually_within(FLOW, &what, || {
            let document = self.bundle_of(other.plan.name)?;
            if wanted(&document) { Ok(()) } else { Err(format!("{document}\n{}", tail(&self.server.process))) }
        });
    }

    fn bundle_of(&self, name: &str) -> Result<Value, String> {
        let out = self.server.command(&["bundle", "list", "-id", &id(name), "-format", "spiffe"]);
        if out.code != 0 {
            return Err(format!("{}{}\n{}", out.stdout, out.stderr, tail(&self.server.process)));
        }
        serde_json::from_str(&out.stdout).map_err(|e| format!("{e}: {}", out.stdout))
    }

    fn refresh(&self, other: &Domain) {
        let out = self.server.command(&["federation", "refresh", "-id", &id(other.plan.name)]).ok();
        assert_eq!(out.stdout, "Bundle refreshed\n");
    }
}

fn tail(process: &Process) -> String {
    let log = process.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

const A: Plan = Plan { name: "a.test", flavor: Finial, proof: Proof::Spiffe, relation: Relation::Configured };
const B: Plan = Plan { name: "b.test", flavor: Spire, proof: Proof::Spiffe, relation: Relation::Commanded };

#[test]
fn with_spire_by_spiffe_configured_here_and_commanded_there() {
    let union = Union::of(&[A, B]);
    let (ours, theirs) = (union.called("a.test"), union.called("b.test"));
    union.traffic("federated by SPIFFE", |traffic| {
        // Each replaces its authorities; the other has fetched the new ones before they are used.
        for (domain, other) in [(ours, theirs), (theirs, ours)] {
            for kind in ["x509", "jwt"] {
                domain.server.order(kind, "prepare");
                other.refresh(domain);
                let keys = other.bundle_of(domain.plan.name).expect("a bundle")["keys"].as_array().map(Vec::len);
                assert_eq!(keys, Some(if kind == "x509" { 3 } else { 4 }));
                traffic.all_say("trusted", &[domain.server.authority(kind, "prepared")]);
                domain.server.order(kind, "activate");
            }
        }
    });
}

#[test]
fn with_spire_by_the_web_commanded_here_and_configured_there() {
    let web = |plan: Plan, relation| Plan { proof: Proof::Web, relation, ..plan };
    let union = Union::of(&[web(A, Relation::Commanded), web(B, Relation::Configured)]);
    let (ours, theirs) = (union.called("a.test"), union.called("b.test"));
    union.traffic("federated by the web", |_| {
        // The certificate of both endpoints is replaced, by the same authority of the web: nobody has to do anything.
        let presented = || [ours, theirs].map(|domain| serial(domain.port));
        let before = presented();
        renew(&union.web);
        eventually_within(FLOW, "both present the new certificate", || {
            let now = presented();
            if now[0] != before[0] && now[1] != before[1] { Ok(()) } else { Err(format!("{before:?} {now:?}")) }
        });
        ours.refresh(theirs);
        theirs.refresh(ours);
    });
}

#[test]
fn three_domains_of_every_kind() {
    let third = Plan { name: "c.test", flavor: Finial, proof: Proof::Web, relation: Relation::Commanded };
    let union = Union::of(&[A, B, third]);
    union.traffic("three federated domains", |_| ());
}

/// What an operator does to end it, and what remains after each step, is the same with both.
#[test]
fn leaving_a_federation() {
    let [ours, theirs] = [Finial, Spire].map(|flavor| {
        let leaving = Plan { flavor, relation: Relation::Commanded, ..A };
        let partner = Plan { flavor: Finial, relation: Relation::Commanded, ..B };
        let union = Union::of(&[leaving, partner]);
        let (domain, workload) = (union.called("a.test"), id("b.test"));
        let mut said = Vec::new();
        let mut run = |args: &[&str]| {
            let out = domain.server.command(args);
            said.push(format!("{args:?}: {} {}{}", out.code, out.stdout, out.stderr));
        };
        let sees = || domain.agent.command(&["api", "fetch", "x509"]).stdout.contains(&format!("[{workload}]"));
        eventually_within(FLOW, "the workload has the partner's bundle", || {
            if sees() { Ok(()) } else { Err(String::new()) }
        });
        run(&["federation", "delete", "-id", "b.test"]);
        run(&["federation", "refresh", "-id", "b.test"]);
        run(&["bundle", "count"]);
        run(&["bundle", "delete", "-id", "b.test"]);
        assert!(sees(), "the bundle is there until it is deleted, as entries name it");
        run(&["bundle", "delete", "-id", "b.test", "-mode", "dissociate"]);
        run(&["bundle", "count"]);
        run(&["entry", "count", "-federatesWith", "b.test"]);
        run(&["entry", "count"]);
        eventually_within(FLOW, "the workload has the partner's bundle no more", || match sees() {
            true => Err(tail(&domain.agent.process)),
            false => Ok(()),
        });
        // Its identity stays.
        domain.agent.command(&["api", "fetch", "x509"]).ok();
        said
    });
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let hintless = |text: &str| text.lines().filter(|l| !l.starts_with("hint: ")).collect::<Vec<_>>().join("\n");
        assert_eq!(hintless(ours), hintless(theirs));
    }
}

/// The serial number of the certificate that is presented there.
fn serial(port: u16) -> String {
    let ask =
        format!("openssl s_client -connect 127.0.0.1:{port} </dev/null 2>/dev/null | openssl x509 -noout -serial");
    let out = testkit::Output::of(std::process::Command::new("bash").args(["-c", &ask]));
    out.ok().stdout
}

/// Another certificate for the same names, by the same authority.
fn renew(web: &Workdir) {
    let fresh = web.sub("fresh");
    for name in ["root.pem", "root.key"] {
        std::fs::copy(web.path().join(name), fresh.join(name)).expect("a copy");
    }
    let leaf = "openssl req -x509 -CA root.pem -CAkey root.key -subj /CN=localhost -days 2 -nodes -newkey ec -pkeyopt \
                ec_paramgen_curve:P-256 -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext \
                basicConstraints=critical,CA:FALSE -keyout web.key -out web.pem && mv web.key web.pem ..";
    testkit::Output::of(std::process::Command::new("bash").args(["-c", leaf]).current_dir(fresh)).ok();
}

/// What the endpoint answers: status, content type and body.
fn asked(port: u16, how: &[&str], path: &str) -> (String, String, String) {
    let url = format!("https://127.0.0.1:{port}{path}");
    let mut curl = std::process::Command::new("curl");
    curl.args(["--silent", "--insecure", "--include", "--http1.1", "--max-time", "20"]).args(how).arg(url);
    let out = testkit::Output::of(&mut curl).ok().stdout.replace("\r\n", "\n");
    let (head, body) = out.split_once("\n\n").unwrap_or((out.as_str(), ""));
    let header = |name: &str| {
        let of = |line: &str| line.to_ascii_lowercase().strip_prefix(name).map(|value| value.trim().to_owned());
        head.lines().find_map(of).unwrap_or_default()
    };
    let status = head.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    (status.to_owned(), header("content-type:"), body.to_owned())
}

/// The real SPIRE's endpoint, and then ours on the same data.
#[test]
fn the_endpoint_serves_what_spires_serves_of_the_same_data() {
    let port = free_port();
    let options = ServerOptions {
        server: format!(
            "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} refresh_hint = \"7m\" \
             profile \"https_spiffe\" {{}} }} }}"
        ),
        ..ServerOptions::default()
    };
    let mut server = Server::start(Spire, &options);
    // Another of each kind, so that there is an order.
    for kind in ["x509", "jwt"] {
        server.order(kind, "prepare");
    }
    let requests: [(&[&str], &str); 9] = [
        (&[], "/"),
        (&[], "/?a=b"),
        (&[], "/else"),
        (&[], "//"),
        (&["--head"], "/"),
        (&["--head"], "/else"),
        (&["--data", "x"], "/"),
        (&["--request", "DELETE"], "/else"),
        (&["--request", "OPTIONS"], "/"),
    ];
    let answers = |port| requests.map(|(how, path)| (how, path, asked(port, how, path)));
    let theirs = answers(port);
    assert_eq!(theirs[0].2.0, "200");
    server.process.terminate();
    server.restart_as(Finial);
    let ours = answers(port);
    let document = |body: &str| serde_json::from_str::<Value>(body).expect("JSON");
    let (their_bundle, our_bundle) = (document(&theirs[0].2.2), document(&ours[0].2.2));
    assert_eq!(our_bundle["keys"].as_array().map(Vec::len), Some(4));
    let sorted = |bundle: &Value| {
        let mut bundle = bundle.clone();
        bundle["keys"].as_array_mut().expect("keys").sort_by_key(ToString::to_string);
        bundle
    };
    assert_eq!(sorted(&our_bundle), sorted(&their_bundle));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let ((_, _, (our_status, our_type, our_body)), (how, path, (status, kind, body))) = (ours, theirs);
        assert_eq!((our_status, our_type), (status, kind), "{how:?} {path}");
        if status != "200" {
            assert_eq!(our_body, body, "{how:?} {path}");
        }
    }
}

#[test]
fn the_endpoint_answers_while_others_say_nothing_or_half_of_it() {
    let plan = Plan { relation: Relation::Commanded, ..A };
    let union = Union::of(&[plan]);
    let port = union.domains[0].port;
    let bytes: [&[u8]; 3] = [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n"];
    let crowd: Vec<TcpStream> = (0..300)
        .map(|n| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
            let _ = stream.write_all(bytes[n % bytes.len()]);
            stream
        })
        .collect();
    assert_eq!(asked(port, &[], "/").0, "200");
    assert_eq!(crowd.len(), 300);
}
