//! A server killed in the middle of each kind of write, at each table that the write touches: what is stored afterwards is
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

const WRITES: [Write; 7] = [
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
        tables: &["selectors", "dns_names", "federated_registration_entries", "registered_entries_events"],
        seen_in: ENTRY_SEEN,
    },
    Write {
        name: "entry delete",
        before: &[ENTRY],
        command: "entry delete -entryID kill-me",
        tables: &["registered_entries", "selectors", "dns_names", "registered_entries_events"],
        seen_in: ENTRY_SEEN,
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
        tables: &[
            "attested_node_entries",
            "node_resolver_map_entries",
            "registered_entries",
            "attested_node_entries_events",
        ],
        seen_in: "select (select count(*) from attested_node_entries), (select count(*) from node_resolver_map_entries), (select count(*) from registered_entries where spiffe_id = 'spiffe://example.org/node')",
    },
    Write {
        name: "bundle delete -mode dissociate",
        before: &[ENTRY],
        command: "bundle delete -id other.example -mode dissociate",
        tables: &["bundles", "federated_registration_entries", "registered_entries_events"],
        seen_in: "select (select count(*) from bundles where trust_domain like '%other%'), (select count(*) from federated_registration_entries)",
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
        let stopped = eventually("the write stops at the table or ends", || match (database.waiting(), ended()) {
            (1.., _) => Ok(true),
            (0, true) => Ok(false),
            (0, false) => Err(String::new()),
        });
        self.server.process.kill();
        drop(held);
        eventually("the database is done with the dead server", || match self.sessions().as_str() {
            "0" => Ok(()),
            n => Err(format!("{n} sessions")),
        });
        stopped
    }

    /// The X.509 authorities of the own bundle, PEM.
    fn authorities(&self) -> Vec<String> {
        let shown = self.run("bundle show").ok().stdout;
        shown.split_inclusive("-----END CERTIFICATE-----").map(|pem| pem.trim().to_owned()).collect()
    }

    fn sessions(&self) -> String {
        let text = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'";
        self.database.sql(text).trim().to_owned()
    }
}

#[test]
fn a_write_that_is_killed_at_any_table_is_there_wholly_or_not_at_all() {
    let Some(mut rig) = Rig::start() else { return };
    let foreign = foreign_bundle(rig.server.dir.path());
    let mut agent = Agent::start(Flavor::Finial, &rig.server, &AgentOptions::default());
    let agent_id = eventually("the agent is known", || {
        let id = rig.database.sql("select spiffe_id from attested_node_entries");
        if id.is_empty() { Err(agent.process.log()) } else { Ok(id.trim().to_owned()) }
    });
    agent.process.kill();
    let nodes = "attested_node_entries, node_resolver_map_entries";
    rig.database.sql(&format!("create schema kept; {}", keep(nodes)));
    for write in &WRITES {
        let command = write.command.replace("AGENT", &agent_id);
        let mut stopped_somewhere = false;
        for table in write.tables {
            let when = format!("{} killed at {table}", write.name);
            rig.database.sql(&restore());
            rig.server.restart();
            let set = format!("bundle set -id other.example -format spiffe -path {}", foreign.display());
            rig.run(&set).ok();
            for command in write.before {
                rig.run(command).ok();
            }
            let before = rig.database.sql(write.seen_in);
            stopped_somewhere |= rig.kill_at(table, |rig| ended(rig.command(&command)));
            rig.assert_whole(&when);
            let after = rig.database.sql(write.seen_in);
            // The next server finishes what was asked for, and goes on with the same authorities.
            rig.server.restart();
            if after == before {
                rig.run(&command).ok();
                assert_ne!(rig.database.sql(write.seen_in), before, "{when}: done when asked again");
            } else {
                let again = rig.run(&command);
                assert_eq!(rig.database.sql(write.seen_in).lines().count(), after.lines().count(), "{when}: {again:?}");
            }
            rig.assert_whole(&when);
            rig.server.process.kill();
        }
        assert!(stopped_somewhere, "{}: it touches none of the tables that it is said to touch", write.name);
    }
}

/// Copies that [`restore`] puts back.
fn keep(tables: &str) -> String {
    tables.split(", ").map(|t| format!("create table kept.{t} as table public.{t};")).collect()
}

/// Everything that the writes change, as it was.
fn restore() -> String {
    "delete from federated_registration_entries; delete from selectors; delete from dns_names; delete from registered_entries; delete from join_tokens; \
     delete from node_resolver_map_entries; delete from attested_node_entries; insert into attested_node_entries select * from kept.attested_node_entries; \
     insert into node_resolver_map_entries select * from kept.node_resolver_map_entries;"
        .into()
}

fn foreign_bundle(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("other.json");
    let other = ServerOptions { trust_domain: "other.example".into(), key_manager: "memory", ..Default::default() };
    let shown = Server::start(Flavor::Finial, &other).command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    std::fs::write(&path, shown).expect("a file");
    path
}

/// A token that let an agent in is used up, and one whose agent was not stored is not.
#[test]
fn a_server_killed_while_an_agent_joins_spends_the_token_with_the_agent_or_not_at_all() {
    let Some(mut rig) = Rig::start() else { return };
    let mut stopped = 0;
    for table in ["join_tokens", "attested_node_entries", "node_resolver_map_entries", "attested_node_entries_events"] {
        let when = format!("joining, killed at {table}");
        let token = rig.server.join_token();
        let agent = format!("spiffe://example.org/spire/agent/join_token/{token}");
        let options = AgentOptions { join: false, agent: format!("join_token = \"{token}\""), ..Default::default() };
        stopped += u32::from(rig.kill_at(table, |rig| {
            let mut agent = Agent::start(Flavor::Finial, &rig.server, &options);
            Box::new(move || {
                // The whole of it: a closure that took the process only would let its folder go.
                let agent: &mut Agent = &mut agent;
                agent.process.ended().is_some()
            })
        }));
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
    assert!(stopped >= 2, "it stopped at {stopped} tables");
}

/// Killed while it stores its first authority, and while it prepares the next: whatever the bundle said it still says, and
/// the next start signs.
#[test]
fn a_server_killed_while_it_stores_an_authority_loses_none() {
    let Some(mut rig) = Rig::start() else { return };
    let keys = rig.server.dir.path().join("data/keys.json");
    for (table, first) in [("ca_journals", true), ("bundles", true), ("ca_journals", false), ("bundles", false)] {
        let when = format!("killed at {table}, first authority: {first}");
        let before = if first { Vec::new() } else { rig.authorities() };
        if first {
            rig.server.process.kill();
            rig.database.sql("delete from ca_journals; delete from bundles");
            let _ = std::fs::remove_file(&keys);
        }
        let stopped = rig.kill_at(table, |rig| {
            if first {
                rig.server.begin();
                return Box::new(|| false);
            }
            ended(rig.command("localauthority x509 prepare"))
        });
        assert!(stopped, "{when}: it did not stop there");
        rig.server.restart();
        let after = rig.authorities();
        assert!(before.iter().all(|a| after.contains(a)), "{when}: {before:?} became {after:?}");
        rig.run("x509 mint -spiffeID spiffe://example.org/minted").ok();
        rig.run("jwt mint -spiffeID spiffe://example.org/minted -audience a").ok();
    }
}
