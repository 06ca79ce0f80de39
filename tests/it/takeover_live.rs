//! Takeover and return while everything runs: servers and agents of a living deployment are replaced one by one, on the same
//! data, while workloads hold their streams, ask for JWT-SVIDs and verify all they get, through several rotations. Counted,
//! and to be zero: requests that failed, moments without a valid SVID, identities that changed, agents that attested again.

use finial_core::{Clock, SystemClock};
use serde_json::Value;
use std::ops::RangeInclusive;
use std::process::Command;
use std::time::Duration;
use testkit::Flavor::{Finial, Spire};
use testkit::{
    Agent, AgentOptions, Client, Database, Flavor, Output, Process, Proxy, Server, ServerOptions, Workdir, eventually,
    eventually_within,
};

/// `ca_ttl` below.
const AUTHORITY_LIFE: Duration = Duration::from_secs(75);

/// Short lives, so that a minute and a half holds many renewals and two generations of authorities. An authority must live
/// long enough for SPIRE, which looks every 10 s whether the last sixth of its life has begun.
const TIMES: &str = r#"ca_ttl = "75s"
    default_x509_svid_ttl = "16s"
    default_jwt_svid_ttl = "20s"
    agent_ttl = "24s"
    audit_log_enabled = true"#;

/// SPIRE reads entries from SQL on a timer; Finial has no such key, and says so without refusing it.
const RELOAD: &str = r#"experimental { cache_reload_interval = "1s" }"#;

/// How the agents prove themselves.
const ATTESTORS: [&str; 3] = ["join_token", "x509pop", "join_token"];

/// A deployment: servers on one database behind a balancer, agents, and a workload at each agent.
struct Fleet {
    workloads: Vec<Process>,
    agents: Vec<Agent>,
    /// When which agent was being replaced, or the only server that it has: its place, and milliseconds since the epoch. A
    /// workload that asks then asks again; at any other time nobody is refused.
    absences: Vec<(usize, RangeInclusive<i64>)>,
    servers: Vec<Server>,
    expected: Vec<String>,
    /// What must be the same at every server at any time: entries, federated bundles, the agents' IDs.
    kept: [String; 3],
    _balancer: Proxy,
    _database: Option<Database>,
    _dir: Workdir,
}

impl Fleet {
    /// `count` servers on `database` (one, on SQLite, without), three agents of two kinds, workloads.
    fn start(flavor: Flavor, database: Option<Database>, count: usize) -> Self {
        let dir = Workdir::new();
        node_certificate(&dir);
        let path = |name: &str| dir.path().join(name).display().to_string();
        let options = ServerOptions {
            datastore: database.as_ref().map(|d| testkit::datastore(d, d.port())),
            server: format!("{TIMES}\n{RELOAD}"),
            plugins: format!(
                "NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{}\" }} }}",
                path("ca.pem")
            ),
            ..Default::default()
        };
        let servers: Vec<Server> = (0..count).map(|_| Server::start(flavor, &options)).collect();
        servers.iter().for_each(|server| knows_authorities(server, count));
        let balancer = Proxy::balancing(&servers.iter().map(|s| s.port).collect::<Vec<_>>());
        let expected = register(&servers[0], &dir);

        let by_token = AgentOptions { server_port: Some(balancer.port()), ..Default::default() };
        let by_certificate = AgentOptions {
            node_attestor: format!(
                "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{}\" certificate_path = \"{}\" }} }}",
                path("node.key"),
                path("node.pem")
            ),
            join: false,
            ..by_token.clone()
        };
        let mut agents: Vec<Agent> = ATTESTORS
            .into_iter()
            .map(|by| if by == "x509pop" { &by_certificate } else { &by_token })
            .enumerate()
            .map(|(i, options)| Agent::start(flavor, &servers[i % count], options))
            .collect();
        agents.iter_mut().for_each(|agent| wait_for_all(agent, &expected));
        let workload = |(i, agent): (usize, &Agent)| {
            Client("go").live(&agent.socket(), "audience", &expected, dir.path().join(format!("workload-{i}.log")))
        };
        let workloads = agents.iter().enumerate().map(workload).collect();
        let kept = state(&servers[0]);
        Self {
            workloads,
            agents,
            absences: Vec::new(),
            servers,
            expected,
            kept,
            _balancer: balancer,
            _database: database,
            _dir: dir,
        }
    }

    /// Replaces one server, then shows that what is written there arrives at the others and at every workload.
    fn replace_server(&mut self, at: usize, flavor: Flavor) {
        let from = SystemClock.now_ms();
        let server = &mut self.servers[at];
        assert_eq!(server.process.terminate(), 0, "{}", server.process.log());
        server.restart_as(flavor);
        self.check_state();
        let id = self.servers[at].entry(&format!("/new/{at}/{flavor:?}"), &[]);
        self.wait_events("an entry written at the replaced server arrives", |events| {
            events.iter().any(|e| e["id"] == id.as_str())
        });
        if self.servers.len() == 1 {
            let away = from..=SystemClock.now_ms();
            self.absences.extend((0..self.agents.len()).map(|place| (place, away.clone())));
        }
        let everywhere: Vec<String> =
            self.servers.iter().map(|server| eventually("every server has it", || entry_id(server, &id))).collect();
        let entry = everywhere.first().expect("a server");
        self.servers[(at + 1) % self.servers.len()].command(&["entry", "delete", "-entryID", entry]).ok();
    }

    fn replace_agents(&mut self, flavor: Flavor) {
        for (place, agent) in self.agents.iter_mut().enumerate() {
            let from = SystemClock.now_ms();
            assert_eq!(agent.process.terminate(), 0, "{}", agent.process.log());
            agent.restart_as(flavor);
            wait_for_all(agent, &self.expected);
            self.absences.push((place, from..=SystemClock.now_ms()));
        }
    }

    /// Waits until every workload has been given a new SVID for each of its identities.
    fn rotations(&self) {
        let count = |events: &[Value], id: &String| events.iter().filter(|e| e["id"] == id.as_str()).count();
        let before: Vec<Vec<usize>> =
            self.workloads.iter().map(|w| self.identities().map(|id| count(&w.events(), id)).collect()).collect();
        eventually("every SVID is renewed", || {
            for (workload, before) in self.workloads.iter().zip(&before) {
                let events = workload.events();
                for (id, before) in self.identities().zip(before) {
                    let now = count(&events, id);
                    if now <= *before {
                        return Err(format!("{id}: {now} after {before}"));
                    }
                }
            }
            Ok(())
        });
    }

    /// New authorities by order at every server: prepared, known to every workload, activated, used.
    fn rotate_by_order(&self) {
        let order = |server: &Server, words: &[&str]| {
            let words = [&["localauthority"], words, &["-output", "json"]].concat();
            let out = server.command_by(Spire, &words);
            let said: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
            if out.code == 0 { Ok(said) } else { Err(out) }
        };
        let id = |said: &Value, which: &str| said[which]["authority_id"].as_str().map(str::to_owned);
        let prepared = ["x509", "jwt"].map(|kind| {
            let prepare = |server: &Server| {
                let said = order(server, &[kind, "prepare"]).unwrap_or_else(|out| panic!("{out:?}"));
                id(&said, "prepared_authority").unwrap_or_else(|| panic!("{said}"))
            };
            (kind, self.servers.iter().map(prepare).collect::<Vec<String>>())
        });
        self.wait_events("the prepared authorities are known to the workloads", |events| {
            let known = |id: &String| events.iter().any(|e| e["authority"] == id.as_str());
            prepared.iter().all(|(_, ids)| ids.iter().all(known))
        });
        for (kind, ids) in &prepared {
            for (server, prepared) in self.servers.iter().zip(ids) {
                if let Err(out) = order(server, &[kind, "activate", "-authorityID", prepared]) {
                    // unless its time came just then
                    let shown = order(server, &[kind, "show"]).unwrap_or_default();
                    assert_eq!(id(&shown, "active").as_ref(), Some(prepared), "{out:?}");
                }
            }
        }
        eventually_within(AUTHORITY_LIFE, "every workload is served under the activated authorities", || {
            let used = |w: &Process, (kind, ids): &(&str, Vec<String>)| {
                issuers(&w.events(), kind).iter().any(|i| ids.contains(i))
            };
            let unserved = self.workloads.iter().find(|w| !prepared.iter().all(|kind| used(w, kind)));
            unserved.map_or(Ok(()), |w| Err(format!("{prepared:?}\n{}", w.log())))
        });
    }

    /// Waits until every workload is served under X.509 and JWT authorities that did not sign for it before: those before
    /// come to their end, and their successors take over.
    fn rotate_by_time(&self) {
        let used = || self.workloads.iter().map(|w| ["x509", "jwt"].map(|kind| issuers(&w.events(), kind)));
        let before: Vec<_> = used().collect();
        eventually_within(AUTHORITY_LIFE * 2, "authorities are rotated", || {
            let all_new = used().zip(&before).all(|(now, before)| {
                now.iter().zip(before).all(|(now, before)| now.iter().any(|issuer| !before.contains(issuer)))
            });
            if all_new { Ok(()) } else { Err(format!("{:?} after {before:?}", used().collect::<Vec<_>>())) }
        });
    }

    fn identities(&self) -> impl Iterator<Item = &String> {
        self.expected.iter().filter(|id| id.matches('/').count() > 2)
    }

    fn wait_events(&self, what: &str, enough: impl Fn(&[Value]) -> bool) {
        for workload in &self.workloads {
            eventually(what, || if enough(&workload.events()) { Ok(()) } else { Err(workload.log()) });
        }
    }

    /// Every server tells the same as at the beginning.
    fn check_state(&self) {
        for server in &self.servers {
            assert_eq!(state(server), self.kept, "at the server on port {}", server.port);
        }
    }

    /// Ends the workloads and counts.
    fn finish(mut self) {
        self.check_state();
        self.workloads.iter_mut().for_each(all_was_well);
        for (place, workload) in self.workloads.iter().enumerate() {
            for event in workload.events().iter().filter(|e| e["event"] == "interrupted") {
                let ms: i64 = event["ms"].as_str().and_then(|ms| ms.parse().ok()).expect("a moment");
                let replaced = self.absences.iter().any(|(of, away)| *of == place && away.contains(&ms));
                assert!(replaced, "refused though agent and a server were there: {event}\n{:?}", self.absences);
            }
        }
        for (agent, renews_by_attesting) in self.agents.iter().zip(ATTESTORS.map(|by| by == "x509pop")) {
            let log = agent.process.log();
            assert_eq!(log.matches("Node attestation was successful").count(), 1, "attested in the beginning only");
            // An agent whose attestor can do so renews its SVID by attesting, wherever its server is SPIRE's.
            assert!(renews_by_attesting || !log.contains("Successfully reattested node"), "{log}");
        }
    }
}

/// Waits until the server shows the authorities of all servers: SPIRE answers from a bundle that may be a second old, and an
/// agent that begins with such a one may not get to know the newest server.
fn knows_authorities(server: &Server, count: usize) {
    eventually("the server knows every server's authority", || {
        let pem = server.command(&["bundle", "show"]).ok().stdout;
        let known = pem.matches("BEGIN CERTIFICATE").count();
        if known >= count { Ok(()) } else { Err(format!("{known} of {count}")) }
    });
}

/// Entries, node aliases, and another trust domain's bundle; what a workload must always have.
fn register(server: &Server, dir: &Workdir) -> Vec<String> {
    let bundle = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let other = dir.write("other.json", &bundle).display().to_string();
    server.command(&["bundle", "set", "-id", "spiffe://other.test", "-format", "spiffe", "-path", &other]).ok();
    let node = format!("spiffe://{}/node", server.trust_domain);
    server.command(&["entry", "create", "-node", "-spiffeID", &node, "-selector", "x509pop:subject:cn:node"]).ok();
    server.entry("/nobody", &["-selector", "unix:uid:54321", "-admin", "-downstream", "-storeSVID"]);
    vec![
        server.entry("/api", &["-federatesWith", "spiffe://other.test", "-hint", "api", "-entryID", "chosen-by-hand"]),
        server.entry("/web", &["-dns", "web.example.org", "-jwtSVIDTTL", "14"]),
        format!("spiffe://{}", server.trust_domain),
        "spiffe://other.test".into(),
    ]
}

/// The ID of the entry for a SPIFFE ID.
fn entry_id(server: &Server, spiffe_id: &str) -> Result<String, String> {
    let out = server.command(&["entry", "show", "-spiffeID", spiffe_id, "-output", "json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&out).map_err(|e| format!("{e}: {out}"))?;
    shown["entries"][0]["id"].as_str().map(str::to_owned).ok_or(out)
}

fn wait_for_all(agent: &mut Agent, expected: &[String]) {
    agent.wait_serving();
    eventually("the agent serves everything", || {
        let said = agent.command(&["api", "fetch", "x509"]);
        let missing = expected.iter().find(|id| id.matches('/').count() > 2 && !said.stdout.contains(*id));
        missing.map_or(Ok(()), |id| Err(format!("no {id}:\n{}", said.stdout)))
    });
}

/// What the server tells of entries, federated bundles and agents, without what changes by itself; asked by SPIRE's command.
fn state(server: &Server) -> [String; 3] {
    let shown = |what: &[&str]| server.command_by(Spire, what).ok().stdout;
    let agents: Value = serde_json::from_str(&shown(&["agent", "list", "-output", "json"])).expect("JSON");
    let mut ids: Vec<String> =
        agents["agents"].as_array().expect("agents").iter().map(|a| a["id"].to_string()).collect();
    ids.sort();
    let entries: Value = serde_json::from_str(&shown(&["entry", "show", "-output", "json"])).expect("JSON");
    let mut entries: Vec<String> = entries["entries"]
        .as_array()
        .expect("entries")
        .iter()
        .filter(|e| !e["spiffe_id"]["path"].as_str().unwrap_or_default().starts_with("/new/"))
        .map(Value::to_string)
        .collect();
    entries.sort();
    // The order of a bundle's JWT keys is the server's choice, and SPIRE's differs from one answer to the next.
    let bundles = shown(&["bundle", "list", "-format", "spiffe"]);
    let mut bundles: Vec<&str> = bundles.lines().map(|line| line.trim().trim_end_matches(',')).collect();
    bundles.sort_unstable();
    [entries.join("\n"), bundles.join("\n"), ids.join("\n")]
}

/// Ends a workload and counts: no request failed, no moment was without a valid SVID.
pub fn all_was_well(workload: &mut Process) {
    assert_eq!(workload.terminate(), 0, "{}", workload.log());
    let events = workload.events();
    let summary = events.last().expect("a summary");
    assert_eq!(summary["event"], "summary", "{}", workload.log());
    println!("{summary}");
    let bad: Vec<&Value> = events.iter().filter(|e| e["event"] == "failed" || e["event"] == "lapsed").collect();
    assert!(bad.is_empty() && summary["failed"] == "0" && summary["lapsed"] == "0", "{bad:#?}");
}

/// Which authorities have signed for the workload: its X.509-SVIDs (`x509`) or JWT-SVIDs (`jwt`).
fn issuers(events: &[Value], kind: &str) -> Vec<String> {
    events.iter().filter(|e| e["event"] == kind).map(|e| e["issuer"].as_str().unwrap_or_default().to_owned()).collect()
}

/// A certificate authority and a node's certificate for x509pop.
pub(crate) fn node_certificate(dir: &Workdir) {
    openssl(
        dir,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 1 -subj /CN=ca",
    );
    one_more_node_certificate(dir, "node");
}

/// Another one of the same node, by the same authority, in files of that name.
pub(crate) fn one_more_node_certificate(dir: &Workdir, name: &str) {
    dir.write("ext", "keyUsage=critical,digitalSignature\n");
    openssl(
        dir,
        &format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj /CN=node"
        ),
    );
    openssl(
        dir,
        &format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile ext -out {name}.pem"
        ),
    );
}

fn openssl(dir: &Workdir, args: &str) {
    Output::of(Command::new("openssl").args(args.split(' ')).current_dir(dir.path())).ok();
}

/// Who goes back first; the others work with them meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Return {
    ServersFirst,
    AgentsFirst,
}

/// The whole way there and back; `rotate` sees to new authorities: between two kinds of server on one database, when
/// all is changed, and when all is back.
fn there_and_back(mut fleet: Fleet, [first, second]: [Flavor; 2], back: Return, rotate: impl Fn(&Fleet)) {
    let count = fleet.servers.len();
    fleet.replace_server(0, second);
    if count > 1 {
        rotate(&fleet); // two kinds of server on one database
    }
    (1..count).for_each(|at| fleet.replace_server(at, second));
    fleet.replace_agents(second);
    rotate(&fleet);
    if back == Return::AgentsFirst {
        fleet.replace_agents(first);
        fleet.rotations();
    }
    (0..count).for_each(|at| fleet.replace_server(at, first));
    if back == Return::ServersFirst {
        fleet.rotations();
        fleet.replace_agents(first);
    }
    rotate(&fleet);
    fleet.finish();
}

#[test]
fn a_live_deployment_on_sqlite_changes_hands_and_back() {
    there_and_back(Fleet::start(Spire, None, 1), [Spire, Finial], Return::ServersFirst, Fleet::rotate_by_time);
}

#[test]
fn a_live_deployment_on_postgresql_changes_hands_and_back() {
    let Some(database) = testkit::postgres() else { return };
    there_and_back(
        Fleet::start(Spire, Some(database), 3),
        [Spire, Finial],
        Return::ServersFirst,
        Fleet::rotate_by_order,
    );
}

/// Two of them, and so one less of each step: what differs by database is the store and the feed of changes.
#[test]
fn a_live_deployment_on_mariadb_changes_hands_and_back() {
    let Some(database) = testkit::mariadb() else { return };
    there_and_back(
        Fleet::start(Spire, Some(database), 2),
        [Spire, Finial],
        Return::AgentsFirst,
        Fleet::rotate_by_order,
    );
}

/// The control: the harness and its zeros hold for a rolling restart of SPIRE alone.
#[test]
#[ignore = "two minutes that only tell about SPIRE"]
fn spire_alone_restarts_without_a_failure() {
    for database in [testkit::postgres(), testkit::mariadb()].into_iter().flatten() {
        there_and_back(
            Fleet::start(Spire, Some(database), 2),
            [Spire, Spire],
            Return::AgentsFirst,
            Fleet::rotate_by_order,
        );
    }
}
