//! Servers below servers: three levels of one trust domain, ours and SPIRE's in turn. Workloads of every level call each other
//! all the time, with a new handshake and a JWT-SVID each time, while the root's authorities are replaced. Counted, and to be
//! zero: handshakes that failed, and tokens that were denied.

use crate::traffic::Traffic;
use std::collections::BTreeSet;
use std::time::Duration;
use testkit::Flavor::{Finial, Spire};
use testkit::{
    Agent, AgentOptions, Client, Flavor, Proxy, Server, ServerOptions, Weather, eventually, eventually_within,
};

const DOMAIN: &str = "example.org";
const LEVELS: [&str; 3] = ["root", "region", "leaf"];
/// SPIRE asks above every 5 s, and its agents as often as they are told to.
const FLOW: Duration = Duration::from_secs(90);

/// A server with an agent for the server below it, and an agent for a workload.
struct Level {
    server: Server,
    agent: Agent,
    /// Gives the server below its identity.
    host: Option<Agent>,
}

/// Top down.
struct Nest(Vec<Level>);

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
    server.of_authority("x509", standing, "upstream_authority_subject_key_id")
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
            eventually("the agent listens", || match agent.socket().exists() {
                true => Ok(()),
                false => Err(agent.process.log()),
            });
            levels.push(Level { server, agent, host });
        }
        Self(levels)
    }

    fn traffic(&self) -> Traffic {
        let agents: Vec<_> = self.0.iter().map(|level| (DOMAIN, &level.agent)).collect();
        Traffic::between(&agents, FLOW)
    }

    fn root(&self) -> &Server {
        &self.0[0].server
    }

    /// The root's X.509 authority is replaced by order, because its key is no longer good.
    fn replace_root(&self, traffic: &Traffic) {
        let old = [self.root().authority("x509", "active")];
        traffic.all_hang(DOMAIN, "x509", &old, &[]);
        self.root().order("x509", "prepare");
        let new = [self.root().authority("x509", "prepared")];
        traffic.all_say("trusted", &new);
        self.root().order("x509", "activate");
        self.root().order("x509", "taint");
        traffic.all_hang(DOMAIN, "x509", &new, &old);
        for level in &self.0[1..] {
            eventually_within(FLOW, "the servers below hang from the new one", || {
                let id = upstream_id(&level.server, "active");
                if id == old[0] { Err(level.server.process.log()) } else { Ok(()) }
            });
        }
        self.root().order("x509", "revoke");
        traffic.all_say("left", &old);
    }

    /// The root's JWT key is replaced by order. SPIRE never takes away a JWT key that came from above, nor do those below it.
    fn replace_jwt_key(&self, traffic: &Traffic, flavors: [Flavor; 3]) {
        let old = self.root().authority("jwt", "active");
        self.root().order("jwt", "prepare");
        let new = self.root().authority("jwt", "prepared");
        traffic.all_say("trusted", std::slice::from_ref(&new));
        self.root().order("jwt", "activate");
        self.root().order("jwt", "taint");
        traffic.workloads[0].says(FLOW, "the root's workload has tokens of the new key", |events| {
            // Those that are signed anew, and those that its agent had.
            let newest = ["jwt", "kept"].map(|event| events.iter().rfind(|e| e["event"] == event));
            newest.iter().all(|newest| newest.is_some_and(|e| e["issuer"] == new.as_str()))
        });
        self.root().order("jwt", "revoke");
        let leave = flavors[1..].iter().take_while(|flavor| **flavor == Finial).count();
        for at in 0..=leave {
            traffic.workloads[at].says(FLOW, "the old key is gone", |events| {
                events.iter().rfind(|e| e["authority"] == old.as_str()).is_some_and(|e| e["event"] == "left")
            });
        }
    }

    /// Ends the calls and counts.
    fn finish(&self, traffic: Traffic, what: &str) {
        traffic.end(what, true);
        for level in &self.0 {
            level.host.iter().chain([&level.agent]).for_each(Agent::assert_attested_once);
        }
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
    root.order("x509", "prepare");
    let new = root.authority("x509", "prepared");
    root.order("x509", "activate");
    root.order("x509", "taint");
    eventually("the root's agent moves off", || match host.process.log() {
        log if log.contains("Successfully rotated agent SVID") => Ok(()),
        log => Err(log),
    });
    root.order("x509", "revoke");
    road.weather(Weather::Fair);
    eventually("the region hangs from the new root", || match upstream_id(&region, "active") {
        id if id == new => Ok(()),
        id => Err(format!("{id}\n{}", region.process.log())),
    });
    assert_eq!(agent.command(&["api", "fetch", "x509"]).ok().code, 0);
}

fn by_order(flavors: [Flavor; 3]) {
    let nest = Nest::start(flavors, "");
    let traffic = nest.traffic();
    nest.replace_root(&traffic);
    nest.replace_jwt_key(&traffic, flavors);
    nest.finish(traffic, &format!("three levels by order, {flavors:?}"));
}

/// Each level's authorities end with those above at the latest. Called where all wait that wait for time.
pub(crate) fn three_levels_live_through_the_end_of_roots() {
    let times = r#"ca_ttl = "90s"
    default_x509_svid_ttl = "12s"
    default_jwt_svid_ttl = "12s""#;
    let nest = Nest::start([Finial; 3], times);
    let traffic = nest.traffic();
    // Nobody orders anything: authorities come to their end, level by level.
    for workload in &traffic.workloads {
        eventually_within(FLOW * 2, "it has hung from several roots", || {
            let events = workload.events();
            let roots = events.iter().filter_map(|e| e["issuers"].as_str()?.split(' ').next_back());
            let roots: BTreeSet<&str> = roots.collect();
            if roots.len() > 1 { Ok(()) } else { Err(format!("{roots:?}\n{}", workload.story())) }
        });
    }
    nest.finish(traffic, "three levels by time");
}

/// Ours and SPIRE's in turn, all at the same time: what is gone above is gone below a minute later.
#[test]
fn three_levels_live_through_a_replaced_root() {
    std::thread::scope(|scope| {
        for flavors in [[Finial; 3], [Spire, Finial, Spire], [Finial, Spire, Finial]] {
            scope.spawn(move || by_order(flavors));
        }
    });
}
