//! Servers below servers: three levels of one trust domain, ours and SPIRE's in turn. Workloads of every level call each other
//! all the time, with a new handshake and a JWT-SVID each time, while the root's authorities are replaced. Counted, and to be
//! zero: handshakes that failed, and tokens that were denied.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;
use testkit::Flavor::{Finial, Spire};
use testkit::{
    Agent, AgentOptions, Client, Flavor, Process, Proxy, Server, ServerOptions, Weather, Workdir, eventually,
    eventually_within, free_port,
};

/// Top down.
const LEVELS: [&str; 3] = ["root", "region", "leaf"];
/// SPIRE asks above every 5 s, and its agents as often as they are told to.
const FLOW: Duration = Duration::from_secs(90);

/// A server with an agent for the server below it, an agent for workloads, and a workload.
struct Level {
    name: &'static str,
    server: Server,
    agent: Agent,
    /// Gives the server below its identity.
    host: Option<Agent>,
    workload: Process,
}

struct Nest {
    levels: Vec<Level>,
    stop: PathBuf,
    _dir: Workdir,
}

/// The block by which a server hangs below another.
fn below(port: &str, agent: &Agent) -> String {
    format!(
        r#"UpstreamAuthority "spire" {{ plugin_data {{
        server_address = "127.0.0.1" server_port = "{port}" workload_api_socket = "{}"
    }} }}"#,
        agent.socket().display()
    )
}

fn upstream_id(server: &Server, standing: &str) -> String {
    state(server, "x509")[standing]["upstream_authority_subject_key_id"].as_str().unwrap_or_default().to_owned()
}

fn state(server: &Server, kind: &str) -> Value {
    let shown = server.command(&["localauthority", kind, "show", "-output", "json"]).ok().stdout;
    serde_json::from_str(&shown).expect("JSON")
}

fn authority(server: &Server, kind: &str, standing: &str) -> String {
    state(server, kind)[standing]["authority_id"].as_str().unwrap_or_default().to_owned()
}

fn order(server: &Server, kind: &str, step: &str, id: &str) {
    server.command(&["localauthority", kind, step, "-authorityID", id]).ok();
}

fn events(workload: &Process) -> Vec<Value> {
    workload.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What an agent tells a process by its program's path.
fn by_path() -> AgentOptions {
    AgentOptions { unix: "discover_workload_path = true".into(), ..Default::default() }
}

/// An agent that gives whatever runs as this user, the server below it that is, the right to be a downstream server.
fn host_agent(flavor: Flavor, server: &Server, id: &str) -> Agent {
    server.entry(id, &["-downstream"]);
    Agent::serving(flavor, server, &AgentOptions::default())
}

impl Nest {
    fn start(flavors: [Flavor; 3], times: &str) -> Self {
        let dir = Workdir::new();
        let stop = dir.path().join("stop");
        let addresses = LEVELS.map(|_| format!("127.0.0.1:{}", free_port()));
        let mut levels: Vec<Level> = Vec::new();
        for (at, (name, flavor)) in LEVELS.into_iter().zip(flavors).enumerate() {
            let plugins = match levels.last() {
                None => String::new(),
                Some(above) => {
                    let host = above.host.as_ref().expect("an agent for the server below");
                    below(&above.server.port.to_string(), host)
                }
            };
            let server = Server::start(flavor, &ServerOptions { server: times.into(), plugins, ..Default::default() });
            let program = std::fs::canonicalize(Client("go").program()).expect("the Go client");
            // The agent for the server below has no workload of this path; the one for workloads has no server.
            server.entry(&format!("/{name}/workload"), &["-selector", &format!("unix:path:{}", program.display())]);
            let below = LEVELS.get(at + 1).map(|below| format!("/{below}/server"));
            let host = below.map(|id| host_agent(flavor, &server, &id));
            let agent = Agent::start(flavor, &server, &by_path());
            let peers: Vec<&str> =
                addresses.iter().enumerate().filter(|(peer, _)| *peer != at).map(|(_, a)| a.as_str()).collect();
            let log = dir.path().join(format!("{name}.log"));
            eventually("the agent listens", || match agent.socket().exists() {
                true => Ok(()),
                false => Err(agent.process.log()),
            });
            let workload = Client("go").mesh(&agent.socket(), &addresses[at], &stop, &peers, log);
            levels.push(Level { name, server, agent, host, workload });
        }
        let nest = Self { levels, stop, _dir: dir };
        nest.everywhere(FLOW, "every workload has been called", |level| {
            let count = level.workload.log().matches("\"trusted\"").count();
            (count >= 2).then_some(()).ok_or_else(|| level.workload.log())
        });
        nest
    }

    fn root(&self) -> &Server {
        &self.levels[0].server
    }

    fn everywhere(&self, deadline: Duration, what: &str, probe: impl Fn(&Level) -> Result<(), String>) {
        for level in &self.levels {
            eventually_within(deadline, &format!("{}: {what}", level.name), || probe(level));
        }
    }

    /// Every workload has said so of an authority, last.
    fn all_say(&self, event: &str, authority: &str) {
        self.everywhere(FLOW, &format!("{event} {authority}"), |level| {
            let events = events(&level.workload);
            let last = events.iter().rfind(|e| e["authority"] == authority).map(|e| e["event"] == event);
            if last == Some(true) { Ok(()) } else { Err(level.story()) }
        });
    }

    /// The newest of what every workload has of its own hangs from this, and not from that.
    fn all_hang(&self, kind: &str, from: &str, not_from: &str) {
        self.everywhere(FLOW, &format!("its {kind} hangs from {from}"), |level| {
            let events = events(&level.workload);
            let newest = events.iter().rfind(|e| e["event"] == kind);
            let issuers = newest.and_then(|e| e["issuers"].as_str().or(e["issuer"].as_str())).unwrap_or_default();
            let good = issuers.contains(from) && !issuers.contains(not_from);
            if good { Ok(()) } else { Err(format!("{issuers}\n{}", level.story())) }
        });
    }

    /// The root's X.509 authority is replaced by order, because its key is no longer good.
    fn replace_root(&self) {
        let old = authority(self.root(), "x509", "active");
        self.all_hang("x509", &old, "-");
        self.root().command(&["localauthority", "x509", "prepare"]).ok();
        let new = authority(self.root(), "x509", "prepared");
        self.all_say("trusted", &new);
        order(self.root(), "x509", "activate", &new);
        order(self.root(), "x509", "taint", &old);
        self.all_hang("x509", &new, &old);
        for level in &self.levels[1..] {
            eventually_within(FLOW, "the servers below hang from the new one", || {
                let id = upstream_id(&level.server, "active");
                if id == old { Err(level.story()) } else { Ok(()) }
            });
        }
        order(self.root(), "x509", "revoke", &old);
        self.all_say("left", &old);
    }

    /// The root's JWT key is replaced by order. SPIRE never takes away a JWT key that came from above, nor do those below it.
    fn replace_jwt_key(&self, flavors: [Flavor; 3]) {
        let old = authority(self.root(), "jwt", "active");
        self.root().command(&["localauthority", "jwt", "prepare"]).ok();
        let new = authority(self.root(), "jwt", "prepared");
        self.all_say("trusted", &new);
        order(self.root(), "jwt", "activate", &new);
        order(self.root(), "jwt", "taint", &old);
        self.says(0, "the root's workload has tokens of the new key", |events| {
            // Those that are signed anew, and those that its agent had.
            let newest = ["jwt", "kept"].map(|event| events.iter().rfind(|e| e["event"] == event));
            newest.iter().all(|newest| newest.is_some_and(|e| e["issuer"] == new.as_str()))
        });
        order(self.root(), "jwt", "revoke", &old);
        let leave = flavors[1..].iter().take_while(|flavor| **flavor == Finial).count();
        for at in 0..=leave {
            self.says(at, "the old key is gone", |events| {
                events.iter().rfind(|e| e["authority"] == old.as_str()).is_some_and(|e| e["event"] == "left")
            });
        }
    }

    fn says(&self, at: usize, what: &str, enough: impl Fn(&[Value]) -> bool) {
        let level = &self.levels[at];
        eventually_within(FLOW, &format!("{}: {what}", level.name), || {
            if enough(&events(&level.workload)) { Ok(()) } else { Err(level.story()) }
        });
    }

    /// Nobody orders anything: authorities come to their end, level by level.
    fn outlive_roots(&self, count: usize) {
        self.everywhere(FLOW * 2, "it has hung from several roots", |level| {
            let events = events(&level.workload);
            let roots = events.iter().filter_map(|e| e["issuers"].as_str()?.split(' ').next_back());
            let roots: BTreeSet<&str> = roots.collect();
            if roots.len() > count { Ok(()) } else { Err(format!("{roots:?}\n{}", level.story())) }
        });
    }

    /// Ends the calls and counts.
    fn finish(mut self) {
        std::fs::write(&self.stop, "").expect("a file");
        self.everywhere(FLOW, "it stops calling", |level| {
            let stopped = events(&level.workload).iter().any(|e| e["event"] == "summary");
            if stopped { Ok(()) } else { Err(level.story()) }
        });
        for level in &mut self.levels {
            assert_eq!(level.workload.terminate(), 0, "{}", level.story());
            let events = events(&level.workload);
            let summary = events.iter().find(|e| e["event"] == "summary").expect("a summary");
            println!("{}: {summary}", level.name);
            let bad: Vec<&Value> = events.iter().filter(|e| e["event"] == "failed" || e["event"] == "denied").collect();
            assert!(bad.is_empty(), "{}: {bad:#?}\n{}", level.name, level.story());
            let number = |field: &str| summary[field].as_str().and_then(|n| n.parse().ok()).unwrap_or(0);
            assert!(number("calls") > 10 && number("served") > 10, "{summary}");
        }
        for level in &self.levels {
            for agent in level.host.iter().chain([&level.agent]) {
                let attested = agent.process.log().matches("Node attestation was successful").count();
                assert_eq!(attested, 1, "it attested again:\n{}", agent.process.log());
            }
        }
    }
}

impl Level {
    /// What is to be read when something goes wrong.
    fn story(&self) -> String {
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        };
        format!(
            "{}:\n--- workload\n{}\n--- server\n{}\n--- agent\n{}",
            self.name,
            tail(self.workload.log()),
            tail(self.server.process.log()),
            tail(self.agent.process.log())
        )
    }
}

/// What the server above does to the one below it when it does not answer, at a start and later.
#[test]
fn a_region_goes_on_without_its_root_and_hears_afterwards_what_it_missed() {
    let root = Server::start(Finial, &ServerOptions::default());
    let host = host_agent(Finial, &root, "/region/server");
    let road = Proxy::to(root.port);
    let plugins = below(&road.port().to_string(), &host);
    let mut region = Server::start(Finial, &ServerOptions { plugins, ..Default::default() });
    let old = upstream_id(&region, "active");
    road.weather(Weather::Hung);
    region.process.kill();
    region.restart(); // with what it has
    region.entry("/workload", &[]);
    let agent = Agent::serving(Finial, &region, &AgentOptions::default());
    let said = "upstreamauthority(spire): failed to fetch bundle from upstream server: upstream server 127.0.0.1:";
    let blames = |server: &Server| {
        eventually("the log says who is at fault", || {
            let log = server.process.log();
            let named = log.lines().any(|line| line.contains(said) && line.contains("no answer within 8 s"));
            if named { Ok(()) } else { Err(log) }
        });
    };
    blames(&region);
    assert_eq!(upstream_id(&region, "active"), old);
    // One that has nothing yet cannot begin, and says so.
    let mut none =
        Server::start(Finial, &ServerOptions { plugins: below(&root.port.to_string(), &host), ..Default::default() });
    none.process.kill();
    let data = none.dir.sub("data");
    for file in ["datastore.sqlite3", "datastore.sqlite3-wal", "datastore.sqlite3-shm", "keys.json"] {
        let _ = std::fs::remove_file(data.join(file));
    }
    let config = none.dir.path().join("server.conf");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    let text = text.replace(&format!("server_port = \"{}\"", root.port), &format!("server_port = \"{}\"", road.port()));
    std::fs::write(&config, text).expect("written");
    none.begin();
    assert_ne!(none.process.wait(), 0, "{}", none.process.log());
    let log = none.process.log();
    let why = format!("unable to request a new Downstream X509CA: upstream server 127.0.0.1:{}", road.port());
    assert!(log.contains(&why) && log.contains("no answer within 8 s"), "{log}");
    // Meanwhile the root is replaced for good, and the region hears of it when the road is open again.
    root.command(&["localauthority", "x509", "prepare"]).ok();
    let new = authority(&root, "x509", "prepared");
    order(&root, "x509", "activate", &new);
    order(&root, "x509", "taint", &old);
    eventually("the root's agent moves off", || match host.process.log() {
        log if log.contains("Successfully rotated agent SVID") => Ok(()),
        log => Err(log),
    });
    order(&root, "x509", "revoke", &old);
    road.weather(Weather::Fair);
    eventually("the region hangs from the new root", || match upstream_id(&region, "active") {
        id if id == new => Ok(()),
        id => Err(format!("{id}\n{}", region.process.log())),
    });
    assert_eq!(agent.command(&["api", "fetch", "x509"]).ok().code, 0);
}

fn by_order(flavors: [Flavor; 3]) {
    let nest = Nest::start(flavors, "");
    nest.replace_root();
    nest.replace_jwt_key(flavors);
    nest.finish();
}

/// Each level's authorities end with those above at the latest. Called where all wait that wait for time.
pub(crate) fn three_levels_live_through_the_end_of_roots() {
    let times = r#"ca_ttl = "90s"
    default_x509_svid_ttl = "12s"
    default_jwt_svid_ttl = "12s""#;
    let nest = Nest::start([Finial; 3], times);
    nest.outlive_roots(1);
    nest.finish();
}

#[test]
fn three_levels_live_through_a_replaced_root() {
    by_order([Finial; 3]);
}

#[test]
fn below_spire_and_above_it_too() {
    by_order([Spire, Finial, Spire]);
}

#[test]
fn above_spire_and_below_it_too() {
    by_order([Finial, Spire, Finial]);
}
