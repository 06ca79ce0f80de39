//! Authorities are replaced while workloads live on them. At every agent there is a workload (go-spiffe); each calls each other
//! one twenty times a second, with a new handshake by whatever it then has, and shows it five tokens a second, which the other
//! one verifies by its bundles and has verified by its agent. Half of the tokens are signed for just that call. Counted, and to
//! be zero: handshakes that failed, tokens that were denied, and answers that had to be asked for again.

mod forced;
mod interrupted;
mod natural;
mod ordered;
mod partner;
mod upstream;
mod wits;

use crate::forced_rotation::serials;
use crate::kill_points::{Orders, killing_environment, killing_library};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use testkit::Flavor::Finial;
use testkit::{
    Agent, AgentOptions, Client, Database, Process, Proxy, Server, ServerOptions, Workdir, eventually_within, free_port,
};

/// For what is ordered to reach every workload; only ends broken runs.
const FLOW: Duration = Duration::from_secs(60);
/// So often is every workload called by every other one after a step, before the next one.
const CALLS: u64 = 20;
/// An order's steps, and of which authority they are.
const STEPS: [(&str, Standing); 4] = [
    ("prepare", Standing::Active),
    ("activate", Standing::Prepared),
    ("taint", Standing::Old),
    ("revoke", Standing::Old),
];

/// Places in what [`Orders::authorities`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Active,
    Prepared,
    Old,
}

/// How many servers there are, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    /// One, with a SQLite file, and two agents.
    One,
    /// Three, on PostgreSQL, and three agents behind a balancer.
    Three,
}

/// How a trust domain differs from the usual one.
#[derive(Clone, Default)]
pub(crate) struct How {
    pub(crate) name: &'static str,
    pub(crate) server: String,
    pub(crate) plugins: String,
    pub(crate) agent: AgentOptions,
    /// How many agents there are, where not the usual number.
    pub(crate) agents: Option<usize>,
    /// Each server has a bundle endpoint.
    pub(crate) endpoint: bool,
    /// The servers can be killed while they write.
    pub(crate) killed: bool,
}

/// Servers and agents of a trust domain.
pub(crate) struct Domain {
    name: &'static str,
    pub(crate) agents: Vec<Agent>,
    pub(crate) servers: Vec<Server>,
    /// Of the bundle endpoints, if there are any.
    endpoints: Vec<u16>,
    _balancer: Option<Proxy>,
    /// What can kill them while they write: one server itself, several on their way to the database.
    killer: Option<Workdir>,
    roads: Vec<Proxy>,
    _database: Option<Database>,
    options: AgentOptions,
    count: usize,
}

impl Domain {
    /// The servers, healthy, and nothing that asks them; `None` where there is no database.
    pub(crate) fn found(on: On, how: &How) -> Option<Self> {
        let database = if on == On::Three { Some(testkit::postgres()?) } else { None };
        let count = if on == On::Three { 3 } else { 1 };
        let killer = (on == On::One && how.killed).then(killing_library);
        let road = |database: &Database| (0..count).map(|_| Proxy::to(database.port())).collect();
        let roads: Vec<Proxy> = database.as_ref().filter(|_| how.killed).map(road).unwrap_or_default();
        let endpoints: Vec<u16> = (0..if how.endpoint { count } else { 0 }).map(|_| free_port()).collect();
        let name = if how.name.is_empty() { "example.org" } else { how.name };
        let start = |at: usize| {
            // Bundles are asked for four times in the time that this says, of which a minute is the shortest.
            let endpoint = endpoints.get(at).map(|port| {
                format!(
                    "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} refresh_hint = \"1m\" profile \"https_spiffe\" {{}} }} }}"
                )
            });
            let server = [how.server.clone(), endpoint.unwrap_or_default()].join("\n");
            let datastore = database.as_ref().map(|database| {
                testkit::datastore(database, roads.get(at).map_or_else(|| database.port(), Proxy::port))
            });
            let environment = killer.as_ref().map(killing_environment).unwrap_or_default();
            let (trust_domain, plugins) = (name.into(), how.plugins.clone());
            let options =
                ServerOptions { trust_domain, datastore, server, plugins, environment, ..ServerOptions::default() };
            Server::start(Finial, &options)
        };
        let servers: Vec<Server> = (0..count).map(start).collect();
        let ports: Vec<u16> = servers.iter().map(|server| server.port).collect();
        let balancer = (on == On::Three).then(|| Proxy::balancing(&ports));
        let options = AgentOptions { server_port: balancer.as_ref().map(Proxy::port), ..how.agent.clone() };
        let count = how.agents.unwrap_or(if on == On::Three { 3 } else { 2 });
        let agents = Vec::new();
        Some(Self {
            name,
            agents,
            servers,
            endpoints,
            _balancer: balancer,
            killer,
            roads,
            _database: database,
            options,
            count,
        })
    }

    /// Its workloads' entry, with these flags, and its agents.
    pub(crate) fn settle(&mut self, entry: &[&str]) {
        self.servers[0].entry("/workload", entry);
        let agent = |at: usize| Agent::start(Finial, &self.servers[at % self.servers.len()], &self.options);
        self.agents = (0..self.count).map(agent).collect();
        self.agents.iter_mut().for_each(Agent::wait_serving);
    }

    pub(crate) fn start(on: On, how: &How) -> Option<Self> {
        let mut domain = Self::found(on, how)?;
        domain.settle(&[]);
        Some(domain)
    }

    fn id(&self) -> String {
        format!("spiffe://{}", self.name)
    }

    /// What each of the servers has of that kind and standing.
    fn authorities(&self, kind: &str, standing: Standing) -> Vec<String> {
        self.servers.iter().map(|server| Orders::to(server).authorities(kind)[standing as usize].clone()).collect()
    }

    /// The same step at every server.
    fn order(&self, kind: &str, (step, standing): (&str, Standing)) {
        for server in &self.servers {
            let orders = Orders::to(server);
            let id = orders.authorities(kind)[standing as usize].clone();
            orders.order(kind, step, &id).unwrap_or_else(|why| panic!("{kind} {step} {id}: {why}"));
        }
    }

    /// Waits until every agent has another SVID of its own than it had.
    pub(crate) fn agents_moved(&self, before: &[String]) {
        eventually_within(FLOW, "the agents' own SVIDs are new", || {
            let now = serials(&self.servers[0]);
            let all = now.len() == before.len() && now.iter().all(|serial| !before.contains(serial));
            if all { Ok(()) } else { Err(format!("{now:?} after {before:?}")) }
        });
    }
}

/// A workload that calls the others.
struct Workload {
    name: String,
    domain: &'static str,
    process: Process,
}

impl Workload {
    fn events(&self) -> Vec<Value> {
        self.process.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The newest of its counts.
    fn count(&self, which: &str) -> u64 {
        let log = self.process.log();
        let last = log.lines().rfind(|line| line.contains("\"event\":\"counts\""));
        let counts: Value = last.and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        number(&counts, which)
    }

    /// What went wrong, without what goes on all the time.
    fn story(&self) -> String {
        let log = self.process.log();
        let told: Vec<&str> = log.lines().filter(|line| !line.contains("\"event\":\"counts\"")).collect();
        format!("{}:\n{}", self.name, told[told.len().saturating_sub(60)..].join("\n"))
    }
}

fn number(event: &Value, which: &str) -> u64 {
    event[which].as_str().and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// The workloads of one or several domains.
pub(crate) struct Traffic {
    workloads: Vec<Workload>,
    began: Instant,
    stop: PathBuf,
    _dir: Workdir,
}

impl Traffic {
    /// One at each agent of these domains, all of whose workloads may call each other.
    pub(crate) fn among(domains: &[&Domain]) -> Self {
        let dir = Workdir::new();
        let stop = dir.path().join("stop");
        let agents: Vec<(&Domain, &Agent)> =
            domains.iter().flat_map(|d| d.agents.iter().map(move |a| (*d, a))).collect();
        let addresses: Vec<String> = agents.iter().map(|_| format!("127.0.0.1:{}", free_port())).collect();
        let workload = |(at, (domain, agent)): (usize, &(&Domain, &Agent))| {
            let others = domains.iter().filter(|other| other.name != domain.name).map(|other| other.id());
            let peers = addresses.iter().filter(|address| **address != addresses[at]).cloned().chain(others);
            let peers: Vec<String> = peers.collect();
            let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
            let name = format!("{}-{at}", domain.name);
            let log = dir.path().join(&name);
            let process = Client("go").mesh(&agent.socket(), &addresses[at], &stop, &peers, log);
            Workload { name, domain: domain.name, process }
        };
        let workloads = agents.iter().enumerate().map(workload).collect();
        let traffic = Self { workloads, began: Instant::now(), stop, _dir: dir };
        traffic.goes_on();
        traffic
    }

    fn everywhere(&self, what: &str, probe: impl Fn(&Workload) -> Result<(), String>) {
        for workload in &self.workloads {
            eventually_within(FLOW, &format!("{}: {what}", workload.name), || probe(workload));
        }
    }

    /// Every workload has called every other one some times more, and nothing went wrong yet.
    pub(crate) fn goes_on(&self) {
        let before: Vec<u64> = self.workloads.iter().map(|workload| workload.count("least")).collect();
        for (workload, before) in self.workloads.iter().zip(before) {
            eventually_within(FLOW, &format!("{} calls all others", workload.name), || {
                let least = workload.count("least");
                if least >= before + CALLS {
                    Ok(())
                } else {
                    Err(format!("{least} after {before}\n{}", workload.story()))
                }
            });
            let bad = workload.count("failed") + workload.count("denied");
            assert_eq!(bad, 0, "{}", workload.story());
        }
    }

    /// Every workload, of any domain, has said so of all these authorities, last.
    pub(crate) fn all_say(&self, event: &str, authorities: &[String]) {
        self.everywhere(&format!("{event} {authorities:?}"), |workload| {
            let events = workload.events();
            let last =
                |id: &String| events.iter().rfind(|e| e["authority"] == id.as_str()).map(|e| e["event"] == event);
            if authorities.iter().all(|id| last(id) == Some(true)) { Ok(()) } else { Err(workload.story()) }
        });
    }

    /// The newest of what every workload of the domain has of its own hangs from one of these, and from none of those.
    pub(crate) fn all_hang(&self, domain: &Domain, kind: &str, from: &[String], not_from: &[String]) {
        self.everywhere(&format!("its {kind} hangs from {from:?}"), |workload| {
            if workload.domain != domain.name {
                return Ok(());
            }
            let events = workload.events();
            // Tokens that are signed anew, and those that the agent had.
            for event in [kind, if kind == "jwt" { "kept" } else { kind }] {
                let newest = events.iter().rfind(|e| e["event"] == event);
                let issuers = newest.and_then(|e| e["issuers"].as_str().or(e["issuer"].as_str())).unwrap_or_default();
                let hangs = |ids: &[String]| issuers.split(' ').any(|issuer| ids.iter().any(|id| id == issuer));
                if !hangs(from) || hangs(not_from) {
                    return Err(format!("{event}: {issuers}\n{}", workload.story()));
                }
            }
            Ok(())
        });
    }

    /// Ends the calls and counts. `away`: there was no server at times, so that what only a server has may have been asked for
    /// again.
    pub(crate) fn finish(mut self, domains: &[&Domain], what: &str, away: bool) {
        self.goes_on();
        std::fs::write(&self.stop, "").expect("a file");
        let lasted = self.began.elapsed();
        let summary = |workload: &Workload| workload.events().into_iter().rfind(|e| e["event"] == "summary");
        self.everywhere("it stops calling", |workload| summary(workload).map(drop).ok_or_else(|| workload.story()));
        let mut counts = String::new();
        let summaries: Vec<Value> = self.workloads.iter().filter_map(summary).collect();
        for which in ["calls", "tokens", "failed", "denied", "interrupted", "svids"] {
            let sum: u64 = summaries.iter().map(|summary| number(summary, which)).sum();
            counts.push_str(&format!(" {which} {sum},"));
        }
        let seen: BTreeSet<String> = self
            .workloads
            .iter()
            .flat_map(|workload| workload.events())
            .filter(|event| event["event"] == "trusted")
            .filter_map(|event| event["authority"].as_str().map(str::to_owned))
            .collect();
        // Not eprintln: what tests print is only shown when they fail.
        let _ = writeln!(std::io::stderr(), "\n{what}:{counts} authorities {}, in {} s", seen.len(), lasted.as_secs());
        for workload in &mut self.workloads {
            assert_eq!(workload.process.terminate(), 0, "{}", workload.story());
            let events = workload.events();
            let bad = ["failed", "denied", if away { "" } else { "interrupted" }];
            let bad: Vec<&Value> = events.iter().filter(|e| bad.iter().any(|b| e["event"] == *b)).collect();
            assert!(bad.is_empty(), "{what}: {bad:#?}\n{}", workload.story());
        }
        for agent in domains.iter().flat_map(|domain| &domain.agents) {
            let log = agent.process.log();
            assert_eq!(log.matches("Node attestation was successful").count(), 1, "it attested again:\n{log}");
        }
    }
}

/// All authorities of that kind are replaced as SPIRE's guide has it: each step when everyone has seen the one before.
fn replace(domain: &Domain, traffic: &Traffic, kind: &str, after: impl Fn(&str)) {
    let (old, agents) = (domain.authorities(kind, Standing::Active), serials(&domain.servers[0]));
    let mut new = Vec::new();
    for step in STEPS {
        domain.order(kind, step);
        after(step.0);
        match step.0 {
            "prepare" => {
                new = domain.authorities(kind, Standing::Prepared);
                traffic.all_say("trusted", &new);
            }
            "activate" => assert_eq!(domain.authorities(kind, Standing::Active), new),
            "taint" => {
                traffic.all_hang(domain, kind, &new, &old);
                if kind == "x509" {
                    domain.agents_moved(&agents);
                }
            }
            _ => traffic.all_say("left", &old),
        }
        traffic.goes_on();
    }
}
