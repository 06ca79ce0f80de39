//! A server killed in the middle of each kind of write, at every table that the write touches: what is stored afterwards is
//! all of it or nothing, and the next server goes on.
//!
//! The test holds a lock that lets everybody read a table and nobody write it. A write then stops just before that table,
//! with all its earlier statements done, and there the server is killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use testkit::{Agent, AgentOptions, Database, Flavor, Output, Server, ServerOptions, eventually};

/// What must hold whatever was interrupted: queries that find nothing.
const BROKEN: [(&str, &str); 6] = [
    (
        "an entry without selectors",
        "select entry_id from registered_entries e where not exists (select 1 from selectors s where s.registered_entry_id = e.id)",
    ),
    (
        "selectors of no entry",
        "select value from selectors s where not exists (select 1 from registered_entries e where s.registered_entry_id = e.id)",
    ),
    (
        "DNS names of no entry",
        "select value from dns_names d where not exists (select 1 from registered_entries e where d.registered_entry_id = e.id)",
    ),
    (
        "a federation of no entry or with no bundle",
        "select bundle_id from federated_registration_entries f where not exists (select 1 from registered_entries e where f.registered_entry_id = e.id) or not exists (select 1 from bundles b where b.id = f.bundle_id)",
    ),
    (
        "selectors of no agent",
        "select value from node_resolver_map_entries n where not exists (select 1 from attested_node_entries a where a.spiffe_id = n.spiffe_id)",
    ),
    (
        "a token that is both used and unused",
        "select token from join_tokens t where exists (select 1 from attested_node_entries a where a.spiffe_id = 'spiffe://example.org/spire/agent/join_token/' || t.token)",
    ),
];

/// A kind of write: what it needs beforehand, the command, the tables, and the query whose answer may only be the one
/// before the write or the one after it.
struct Write {
    name: &'static str,
    before: &'static [&'static str],
    command: &'static str,
    tables: &'static [&'static str],
    seen_in: &'static str,
}

const ENTRY: &str = "entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/a -selector a:1 -selector a:2 \
    -dns a.example.org -federatesWith other.example -entryID kill-me";
const ENTRY_SEEN: &str = "select e.spiffe_id, e.hint, e.revision_number, (select count(*) from selectors s where s.registered_entry_id = e.id), \
    (select count(*) from dns_names d where d.registered_entry_id = e.id), (select count(*) from federated_registration_entries f where f.registered_entry_id = e.id), \
    (select count(*) from registered_entries_events v where v.entry_id = e.entry_id) from registered_entries e where entry_id = 'kill-me'";

const BUNDLE_SEEN: &str = "select (select count(*) from bundles where trust_domain like '%other%'), (select count(*) from federated_registration_entries), \
    (select count(*) from registered_entries where entry_id = 'kill-me')";
const RELATION: &str = "federation create -trustDomain third.example -bundleEndpointURL https://127.0.0.1:1/a \
    -bundleEndpointProfile https_web -trustDomainBundlePath FOREIGN -trustDomainBundleFormat spiffe";
const RELATION_SEEN: &str = "select (select string_agg(bundle_endpoint_url, ' ') from federated_trust_domains), \
    (select string_agg(md5(data), ' ') from bundles where trust_domain like '%third%')";

const WRITES: [Write; 13] = [
    Write {
        name: "entry create",
        before: &[],
        command: ENTRY,
        tables: &[
            "registered_entries",
            "selectors",
            "dns_names",
            "federated_registration_entries",
            "registered_entries_events",
        ],
        seen_in: ENTRY_SEEN,
    },
    Write {
        name: "entry update",
        before: &[ENTRY],
        command: "entry update -entryID kill-me -parentID spiffe://example.org/node -spiffeID spiffe://example.org/a -selector b:1 -dns b.example.org -hint new",
        tables: &[
            "registered_entries",
            "selectors",
            "dns_names",
            "federated_registration_entries",
            "registered_entries_events",
        ],
        seen_in: ENTRY_SEEN,
    },
    Write {
        name: "entry delete",
        before: &[ENTRY],
        command: "entry delete -entryID kill-me",
        tables: &[
            "registered_entries",
            "selectors",
            "dns_names",
            "federated_registration_entries",
            "registered_entries_events",
        ],
        seen_in: ENTRY_SEEN,
    },
    Write {
        name: "entry create of several",
        before: &[],
        command: "entry create -data SEVERAL",
        tables: &[
            "registered_entries",
            "selectors",
            "dns_names",
            "federated_registration_entries",
            "registered_entries_events",
        ],
        seen_in: "select count(*), (select count(*) from selectors where type = 'several'), (select count(*) from dns_names where value like '%.several.example'), \
            (select count(*) from federated_registration_entries) from registered_entries where entry_id like 'several-%'",
    },
    Write {
        name: "token generate",
        before: &[],
        command: "token generate -spiffeID spiffe://example.org/named",
        tables: &["join_tokens", "registered_entries", "selectors", "registered_entries_events"],
        seen_in: "select (select count(*) from join_tokens), (select count(*) from registered_entries where spiffe_id = 'spiffe://example.org/named')",
    },
    Write {
        name: "agent ban",
        before: &[],
        command: "agent ban -spiffeID AGENT",
        tables: &["attested_node_entries", "attested_node_entries_events"],
        seen_in: "select serial_number = '' from attested_node_entries",
    },
    Write {
        name: "agent evict",
        before: &[],
        command: "agent evict -spiffeID AGENT",
        tables: &["attested_node_entries", "node_resolver_map_entries", "attested_node_entries_events"],
        seen_in: "select (select count(*) from attested_node_entries), (select count(*) from node_resolver_map_entries)",
    },
    Write {
        name: "bundle delete -mode dissociate",
        before: &[ENTRY],
        command: "bundle delete -id other.example -mode dissociate",
        tables: &["bundles", "federated_registration_entries", "registered_entries_events"],
        seen_in: BUNDLE_SEEN,
    },
    Write {
        name: "bundle delete -mode delete",
        before: &[ENTRY],
        command: "bundle delete -id other.example -mode delete",
        tables: &[
            "bundles",
            "federated_registration_entries",
            "registered_entries",
            "selectors",
            "dns_names",
            "registered_entries_events",
        ],
        seen_in: BUNDLE_SEEN,
    },
    Write {
        name: "bundle set",
        before: &[],
        command: "bundle set -id third.example -format spiffe -path FOREIGN",
        tables: &["bundles"],
        seen_in: RELATION_SEEN,
    },
    Write {
        name: "federation create",
        before: &[],
        command: RELATION,
        tables: &["federated_trust_domains", "bundles"],
        seen_in: RELATION_SEEN,
    },
    Write {
        name: "federation update",
        before: &[RELATION],
        command: "federation update -trustDomain third.example -bundleEndpointURL https://127.0.0.1:1/b \
            -bundleEndpointProfile https_web -trustDomainBundlePath NEWER -trustDomainBundleFormat spiffe",
        tables: &["federated_trust_domains", "bundles"],
        seen_in: RELATION_SEEN,
    },
    Write {
        name: "federation delete",
        before: &[RELATION],
        command: "federation delete -id third.example",
        tables: &["federated_trust_domains"],
        seen_in: RELATION_SEEN,
    },
];

/// Whether the work has ended; holds what does it.
type Ended = Box<dyn FnMut() -> bool>;

fn ended(mut command: Child) -> Ended {
    Box::new(move || command.try_wait().expect("wait").is_some())
}

struct Rig {
    database: Database,
    server: Server,
}

impl Rig {
    fn start() -> Option<Self> {
        let database = testkit::postgres()?;
        let datastore = Some(testkit::datastore(&database, database.port()));
        let server = Server::start(Flavor::Finial, &ServerOptions { datastore, ..Default::default() });
        Some(Self { database, server })
    }

    /// Starts a command in the background.
    fn command(&self, command: &str) -> Child {
        Command::new(self.server.dir.path().join("bin/spire-server"))
            .args(command.split_whitespace())
            .arg("-socketPath")
            .arg(self.server.socket())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a command")
    }

    fn run(&self, command: &str) -> Output {
        self.server.command(&command.split_whitespace().collect::<Vec<_>>())
    }

    fn assert_whole(&self, when: &str) {
        for (what, query) in BROKEN {
            assert_eq!(self.database.sql(query), "", "{when}: {what}");
        }
    }

    /// Runs `work` against the held table and kills the server when it waits there; gives whether it came to that.
    fn kill_at(&mut self, table: &str, work: impl FnOnce(&mut Self) -> Ended) -> bool {
        let held = self.database.hold(&format!("LOCK TABLE {table} IN SHARE MODE"));
        let mut ended = work(self);
        let database = &self.database;
        // Who waits is not the work, if that has ended.
        let stopped = eventually("the write stops at the table or ends", || match (ended(), database.waiting()) {
            (true, _) => Ok(false),
            (false, 1..) => Ok(true),
            (false, 0) => Err(String::new()),
        });
        self.server.process.kill();
        drop(held);
        eventually("the database is done with the dead server", || match self.sessions().as_str() {
            "0" => Ok(()),
            n => Err(format!("{n} sessions")),
        });
        stopped
    }

    /// What tells the authorities of the own bundle apart: the certificates, and the IDs of the keys.
    fn authorities(&self) -> Vec<String> {
        let shown = self.run("bundle show -format spiffe").ok().stdout;
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        let named = |key: &serde_json::Value| key["kid"].as_str().map_or(key["x5c"].to_string(), str::to_owned);
        shown["keys"].as_array().expect("keys").iter().map(named).collect()
    }

    /// The ID of the authority of that standing (`active`, `prepared`, `old`); nothing if there is none.
    fn authority(&self, kind: &str, standing: &str) -> String {
        let shown = self.run(&format!("localauthority {kind} show -output json")).ok().stdout;
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        shown[standing]["authority_id"].as_str().unwrap_or_default().to_owned()
    }

    /// The next start signs, and has every authority that was there before.
    fn signs_again(&mut self, before: &[String], when: &str) {
        self.server.process.kill();
        self.server.restart();
        let after = self.authorities();
        assert!(before.iter().all(|a| after.contains(a)), "{when}: {before:?} became {after:?}");
        self.run("x509 mint -spiffeID spiffe://example.org/minted").ok();
        self.run("jwt mint -spiffeID spiffe://example.org/minted -audience a").ok();
    }

    fn sessions(&self) -> String {
        let text = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'";
        self.database.sql(text).trim().to_owned()
    }
}

#[test]
fn a_write_that_is_killed_at_any_table_is_there_wholly_or_not_at_all() {
    let Some(mut rig) = Rig::start() else { return };
    let names = files(rig.server.dir.path());
    let mut agent = Agent::start(Flavor::Finial, &rig.server, &AgentOptions::default());
    let agent_id = eventually("the agent is known", || {
        let id = rig.database.sql("select spiffe_id from attested_node_entries");
        if id.is_empty() { Err(agent.process.log()) } else { Ok(id.trim().to_owned()) }
    });
    agent.process.kill();
    let nodes = "attested_node_entries, node_resolver_map_entries";
    rig.database.sql(&format!("create schema kept; {}", keep(nodes)));
    let filled_in = |command: &str| {
        let fill = |text: String, (name, path): &(&str, String)| text.replace(name, path);
        names.iter().fold(command.replace("AGENT", &agent_id), fill)
    };
    let mut passed_by = Vec::new();
    for write in &WRITES {
        let command = filled_in(write.command);
        let prepare = |rig: &mut Rig| {
            rig.server.process.kill();
            rig.database.sql(&restore());
            rig.server.restart();
            rig.run(&filled_in("bundle set -id other.example -format spiffe -path FOREIGN")).ok();
            for command in write.before {
                rig.run(&filled_in(command)).ok();
            }
            rig.database.sql(write.seen_in)
        };
        let before = prepare(&mut rig);
        rig.run(&command).ok();
        let done = rig.database.sql(write.seen_in);
        assert_ne!(done, before, "{}: it changes something", write.name);
        for table in write.tables {
            let when = format!("{} killed at {table}", write.name);
            assert_eq!(prepare(&mut rig), before, "{when}: begins where the others did");
            if !rig.kill_at(table, |rig| ended(rig.command(&command))) {
                passed_by.push(when);
                continue;
            }
            rig.assert_whole(&when);
            let after = rig.database.sql(write.seen_in);
            assert!([&before, &done].contains(&&after), "{when}: {after:?} is neither {before:?} nor {done:?}");
            // The next server finishes what was asked for, and goes on with the same authorities.
            rig.server.restart();
            let again = rig.run(&command);
            assert!(after == done || again.code == 0, "{when}: asked again: {again:?}");
            assert_eq!(rig.database.sql(write.seen_in), done, "{when}: done when asked again: {again:?}");
            rig.assert_whole(&when);
        }
    }
    assert!(passed_by.is_empty(), "they did not stop there: {passed_by:#?}");
}

/// Copies that [`restore`] puts back.
fn keep(tables: &str) -> String {
    tables.split(", ").map(|t| format!("create table kept.{t} as table public.{t};")).collect()
}

/// Everything that the writes change, as it was.
fn restore() -> String {
    "delete from federated_trust_domains; delete from bundles where trust_domain like '%third%'; \
     delete from registered_entries_events; delete from attested_node_entries_events; \
     delete from federated_registration_entries; delete from selectors; delete from dns_names; delete from registered_entries; delete from join_tokens; \
     delete from node_resolver_map_entries; delete from attested_node_entries; insert into attested_node_entries select * from kept.attested_node_entries; \
     insert into node_resolver_map_entries select * from kept.node_resolver_map_entries;"
        .into()
}

/// Files that the commands name: two bundles of another trust domain, and several entries.
fn files(dir: &Path) -> [(&'static str, String); 3] {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let other = ServerOptions { trust_domain: "other.example".into(), key_manager: "memory", ..Default::default() };
    let bundle = || Server::start(Flavor::Finial, &other).command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let entry = |n: u32| {
        serde_json::json!({
            "entry_id": format!("several-{n}"),
            "parent_id": "spiffe://example.org/node",
            "spiffe_id": format!("spiffe://example.org/several/{n}"),
            "selectors": [{"type": "several", "value": n.to_string()}, {"type": "several", "value": "any"}],
            "dns_names": [format!("{n}.several.example")],
            "federates_with": ["other.example"],
        })
    };
    let several = serde_json::json!({"entries": (0..5).map(entry).collect::<Vec<_>>()}).to_string();
    [
        ("FOREIGN", write("other.json", &bundle())),
        ("NEWER", write("newer.json", &bundle())),
        ("SEVERAL", write("several.json", &several)),
    ]
}

/// A token that let an agent in is used up, and one whose agent was not stored is not.
#[test]
fn a_server_killed_while_an_agent_joins_spends_the_token_with_the_agent_or_not_at_all() {
    let Some(mut rig) = Rig::start() else { return };
    for table in ["join_tokens", "attested_node_entries", "node_resolver_map_entries", "attested_node_entries_events"] {
        let when = format!("joining, killed at {table}");
        let token = rig.server.join_token();
        let agent = format!("spiffe://example.org/spire/agent/join_token/{token}");
        let options = AgentOptions { join: false, agent: format!("join_token = \"{token}\""), ..Default::default() };
        let stopped = rig.kill_at(table, |rig| {
            let mut agent = Agent::start(Flavor::Finial, &rig.server, &options);
            Box::new(move || {
                // The whole of it: a closure that took the process only would let its folder go.
                let agent: &mut Agent = &mut agent;
                agent.process.ended().is_some()
            })
        });
        assert!(stopped, "{when}: it did not stop there");
        rig.assert_whole(&when);
        let count = |table: &str, column: &str, value: &str| {
            rig.database.sql(&format!("select count(*) from {table} where {column} = '{value}'")).trim().to_owned()
        };
        let (tokens, agents) =
            (count("join_tokens", "token", &token), count("attested_node_entries", "spiffe_id", &agent));
        assert_ne!(tokens, agents, "{when}: {tokens} tokens are left and {agents} agents are there");
        rig.server.restart();
        if tokens == "1" {
            let joined = format!("select 1 from attested_node_entries where spiffe_id = '{agent}'");
            let again = Agent::start(Flavor::Finial, &rig.server, &options);
            eventually("the token still lets the agent in", || match rig.database.sql(&joined).trim() {
                "1" => Ok(()),
                _ => Err(again.process.log()),
            });
        }
    }
}

/// Killed while it stores its first authority, and at each step of replacing one by hand: whatever the bundle said it still
/// says, the next start signs, and the step can be done.
#[test]
fn a_server_killed_while_it_stores_an_authority_loses_none() {
    let Some(mut rig) = Rig::start() else { return };
    let keys = rig.server.dir.path().join("data/keys.json");
    for table in ["ca_journals", "bundles"] {
        let when = format!("first authority, killed at {table}");
        rig.server.process.kill();
        rig.database.sql("delete from ca_journals; delete from bundles");
        let _ = std::fs::remove_file(&keys);
        let stopped = rig.kill_at(table, |rig| {
            rig.server.begin();
            Box::new(|| false)
        });
        assert!(stopped, "{when}: it did not stop there");
        rig.signs_again(&[], &when);
    }
    let steps: [(&str, &str, &str, &[&str]); 6] = [
        ("x509", "prepare", "", &["ca_journals", "bundles"]),
        ("x509", "activate", "prepared", &["ca_journals"]),
        ("x509", "taint", "old", &["bundles"]),
        ("jwt", "prepare", "", &["ca_journals", "bundles"]),
        ("jwt", "activate", "prepared", &["ca_journals"]),
        ("jwt", "taint", "old", &["bundles"]),
    ];
    for (kind, step, standing, tables) in steps {
        for table in tables {
            let when = format!("{kind} {step}, killed at {table}");
            let before = rig.authorities();
            let id = rig.authority(kind, standing);
            let command = match standing {
                "" => format!("localauthority {kind} {step}"),
                _ => format!("localauthority {kind} {step} -authorityID {id}"),
            };
            let stopped = rig.kill_at(table, |rig| ended(rig.command(&command)));
            assert!(stopped, "{when}: it did not stop there");
            rig.signs_again(&before, &when);
            // What was not done is done now; what was done is refused, and nothing is tainted or active twice.
            let again = rig.run(&command);
            match step {
                "prepare" => assert!(!rig.authority(kind, "prepared").is_empty(), "{when}: {again:?}"),
                "activate" => assert_eq!(rig.authority(kind, "active"), id, "{when}: {again:?}"),
                _ => assert!(again.code == 0 || again.stderr.contains("already tainted"), "{when}: {again:?}"),
            }
            rig.signs_again(&before, &when);
        }
    }
}
