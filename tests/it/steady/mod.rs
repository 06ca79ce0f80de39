//! Authorities are replaced while workloads live on them: at every agent one, each of which calls each other one. Counted, and to
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
use crate::traffic::Traffic;
use std::time::Duration;
use testkit::Flavor::Finial;
use testkit::{Agent, AgentOptions, Database, Proxy, Server, ServerOptions, Workdir, eventually_within, free_port};

/// For what is ordered to reach every workload; only ends broken runs.
const FLOW: Duration = Duration::from_secs(60);
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

impl Traffic {
    /// One workload at each agent of these domains, all of which may call each other.
    fn among(domains: &[&Domain]) -> Self {
        let agents = domains.iter().flat_map(|domain| domain.agents.iter().map(|agent| (domain.name, agent)));
        Self::between(&agents.collect::<Vec<_>>(), FLOW)
    }

    /// Ends the calls and counts. `away`: there was no server at times, so that what only a server has may have been asked for
    /// again.
    fn finish(self, domains: &[&Domain], what: &str, away: bool) {
        self.end(what, away);
        domains.iter().flat_map(|domain| &domain.agents).for_each(Agent::assert_attested_once);
    }
}

/// All authorities of that kind are replaced as SPIRE's guide has it: each step when everyone has seen the one before.
/// `take` orders a step, of which it is given the number.
fn replace(
    domain: &mut Domain,
    traffic: &Traffic,
    kind: &str,
    mut take: impl FnMut(&mut Domain, usize, (&'static str, Standing)),
) {
    let (old, agents) = (domain.authorities(kind, Standing::Active), serials(&domain.servers[0]));
    let mut new = Vec::new();
    for (turn, step) in STEPS.into_iter().enumerate() {
        take(domain, turn, step);
        match step.0 {
            "prepare" => {
                new = domain.authorities(kind, Standing::Prepared);
                traffic.all_say("trusted", &new);
            }
            "activate" => assert_eq!(domain.authorities(kind, Standing::Active), new),
            "taint" => {
                traffic.all_hang(domain.name, kind, &new, &old);
                if kind == "x509" {
                    domain.agents_moved(&agents);
                }
            }
            _ => traffic.all_say("left", &old),
        }
        traffic.goes_on();
    }
}
