//! The table of what admins and servers below write.

use super::calls::Calls;
use super::{Ended, On, Place, Point, Rig, TABLES, ended};
use finial_core::KeyType;
use finial_crypto::PrivateKey;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{LazyLock, OnceLock};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually};

/// A kind of write: what it needs beforehand, how it is done, and the tables in the order in which it writes them.
struct Write {
    name: &'static str,
    before: &'static [&'static str],
    how: How,
    tables: &'static [&'static str],
}

enum How {
    Command(&'static str),
    Call(fn(&Calls) -> Result<(), String>),
}
use How::{Call, Command as Cli};

const ENTRY: &str = "entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/a -selector a:1 -selector a:2 \
    -dns a.example.org -federatesWith other.example -entryID kill-me";
const RELATION: &str = "federation create -trustDomain third.example -bundleEndpointURL https://127.0.0.1:1/a \
    -bundleEndpointProfile https_web -trustDomainBundlePath FOREIGN -trustDomainBundleFormat spiffe";
const THIRD: &str = "bundle set -id third.example -format spiffe -path FOREIGN";

const INSERTED: &[&str] =
    &["registered_entries", "selectors", "dns_names", "federated_registration_entries", "registered_entries_events"];
/// An update writes the row first, a deletion last.
const DELETED: &[&str] =
    &["federated_registration_entries", "selectors", "dns_names", "registered_entries", "registered_entries_events"];

/// A key that somebody publishes; the same each time.
static KEY: LazyLock<Vec<u8>> =
    LazyLock::new(|| PrivateKey::generate(KeyType::EcP256).expect("a key").public_key().spki_der().to_vec());

const WRITES: [Write; 25] = [
    Write { name: "entry create", before: &[], how: Cli(ENTRY), tables: INSERTED },
    Write {
        name: "entry update",
        before: &[ENTRY],
        how: Cli(
            "entry update -entryID kill-me -parentID spiffe://example.org/node -spiffeID spiffe://example.org/a -selector b:1 \
             -dns b.example.org -hint new",
        ),
        tables: INSERTED,
    },
    Write { name: "entry delete", before: &[ENTRY], how: Cli("entry delete -entryID kill-me"), tables: DELETED },
    Write { name: "entry create of several", before: &[], how: Cli("entry create -data SEVERAL"), tables: INSERTED },
    Write {
        name: "entry update of several",
        before: &["entry create -data SEVERAL"],
        how: Cli("entry update -data CHANGED"),
        tables: INSERTED,
    },
    Write {
        name: "entry delete of several",
        before: &["entry create -data SEVERAL"],
        how: Cli("entry delete -file THEIR_IDS"),
        tables: DELETED,
    },
    Write {
        name: "token generate",
        before: &[],
        how: Call(|calls| calls.token("a-token", "/named")),
        tables: &["join_tokens", "registered_entries", "selectors", "registered_entries_events"],
    },
    Write {
        name: "agent ban",
        before: &[],
        how: Cli("agent ban -spiffeID POPPED"),
        tables: &["attested_node_entries", "attested_node_entries_events"],
    },
    Write {
        name: "agent evict",
        before: &[],
        how: Cli("agent evict -spiffeID POPPED"),
        tables: &["node_resolver_map_entries", "attested_node_entries", "attested_node_entries_events"],
    },
    Write {
        name: "agent evict, with its alias",
        before: &[],
        how: Cli("agent evict -spiffeID JOINED"),
        tables: &[
            "selectors",
            "registered_entries",
            "registered_entries_events",
            "attested_node_entries",
            "attested_node_entries_events",
        ],
    },
    Write {
        name: "agent purge",
        before: &[],
        how: Cli("agent purge -expiredFor 1h"),
        tables: &["node_resolver_map_entries", "attested_node_entries", "attested_node_entries_events"],
    },
    Write {
        name: "bundle delete",
        before: &[THIRD],
        how: Cli("bundle delete -id third.example"),
        tables: &["bundles"],
    },
    Write {
        name: "bundle delete -mode dissociate",
        before: &[ENTRY],
        how: Cli("bundle delete -id other.example -mode dissociate"),
        tables: &["federated_registration_entries", "bundles", "registered_entries_events"],
    },
    Write {
        name: "bundle delete -mode delete",
        before: &[ENTRY],
        how: Cli("bundle delete -id other.example -mode delete"),
        tables: &[
            "federated_registration_entries",
            "selectors",
            "dns_names",
            "registered_entries",
            "bundles",
            "registered_entries_events",
        ],
    },
    Write { name: "bundle set", before: &[], how: Cli(THIRD), tables: &["bundles"] },
    Write {
        name: "bundle set, another",
        before: &[THIRD],
        how: Cli("bundle set -id third.example -format spiffe -path NEWER"),
        tables: &["bundles"],
    },
    Write {
        name: "bundle created by a call",
        before: &[],
        how: Call(|calls| calls.create_bundle("third.example", "created", &KEY)),
        tables: &["bundles"],
    },
    Write {
        name: "bundle updated by a call",
        before: &[THIRD],
        how: Call(|calls| calls.update_bundle("third.example", "updated", &KEY)),
        tables: &["bundles"],
    },
    Write {
        name: "bundle append",
        before: &[],
        how: Call(|calls| calls.append("appended", &KEY)),
        tables: &["bundles"],
    },
    Write {
        name: "a JWT key of a server below",
        before: &[],
        how: Call(|calls| calls.publish("jwt", "published", &KEY)),
        tables: &["bundles"],
    },
    Write {
        name: "a WIT key of a server below",
        before: &[],
        how: Call(|calls| calls.publish("wit", "published", &KEY)),
        tables: &["bundles"],
    },
    Write {
        name: "federation create",
        before: &[],
        how: Cli(RELATION),
        tables: &["bundles", "federated_trust_domains"],
    },
    Write {
        name: "federation create with a bundle that is there",
        before: &[],
        how: Cli("federation create -trustDomain other.example -bundleEndpointURL https://127.0.0.1:1/a \
             -bundleEndpointProfile https_spiffe -endpointSpiffeID spiffe://other.example/spire/server"),
        tables: &["federated_trust_domains"],
    },
    Write {
        name: "federation update",
        before: &[RELATION],
        how: Cli("federation update -trustDomain third.example -bundleEndpointURL https://127.0.0.1:1/b \
             -bundleEndpointProfile https_web -trustDomainBundlePath NEWER -trustDomainBundleFormat spiffe"),
        tables: &["federated_trust_domains", "bundles"],
    },
    Write {
        name: "federation delete",
        before: &[RELATION],
        how: Cli("federation delete -id third.example"),
        tables: &["federated_trust_domains"],
    },
];

/// A server with all that the writes are about, and the names that stand in commands.
struct Table {
    rig: Rig,
    names: Vec<(&'static str, String)>,
    /// Whom the server lets attest.
    _files: Workdir,
}

impl Table {
    fn start(on: On) -> Option<Self> {
        let files = Workdir::new();
        crate::takeover_live::node_certificate(&files);
        let path = |name: &str| files.path().join(name).display().to_string();
        let plugins =
            format!("NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{}\" }} }}", path("ca.pem"));
        let server = super::authorities::WIT.into();
        let options = ServerOptions { plugins, server, ..Default::default() };
        let rig = Rig::start(on, options)?;
        let by_certificate = format!(
            "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{}\" certificate_path = \"{}\" }} }}",
            path("node.key"),
            path("node.pem")
        );
        let popped = AgentOptions { node_attestor: by_certificate, join: false, ..Default::default() };
        let mut ids = Vec::new();
        for (name, kind, options) in [("JOINED", "join_token", AgentOptions::default()), ("POPPED", "x509pop", popped)]
        {
            let mut agent = Agent::start(Flavor::Finial, &rig.server, &options);
            let id = eventually("the agent is known", || {
                let listed = rig.run("agent list -output json").ok().stdout;
                let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
                let agents = listed["agents"].as_array().cloned().unwrap_or_default();
                let found = agents.iter().find(|agent| agent["attestation_type"] == kind);
                let path = found.and_then(|agent| agent["id"]["path"].as_str());
                path.map(|path| format!("spiffe://example.org{path}")).ok_or_else(|| agent.process.log())
            });
            agent.process.kill();
            ids.push((name, id));
        }
        let names = ids.into_iter().chain(named_files(rig.server.dir.path())).collect();
        let mut table = Self { rig, names, _files: files };
        table.run("bundle set -id other.example -format spiffe -path FOREIGN").ok();
        table.run("entry create -parentID spiffe://example.org/above -spiffeID spiffe://example.org/downstream -selector a:1 -downstream").ok();
        table.rig.keep_expired();
        Some(table)
    }

    fn filled_in(&self, command: &str) -> String {
        self.names.iter().fold(command.to_owned(), |text, (name, value)| text.replace(name, value))
    }

    fn run(&self, command: &str) -> Output {
        self.rig.run(&self.filled_in(command))
    }

    /// Does the write and waits for its end.
    fn make(&self, write: &Write) -> Result<(), String> {
        match &write.how {
            Cli(command) => match self.run(command) {
                out if out.code == 0 => Ok(()),
                out => Err(format!("{out:?}")),
            },
            Call(call) => call(&self.rig.calls()),
        }
    }

    fn kill_at(&mut self, write: &Write, point: Point) -> bool {
        let command = match &write.how {
            Cli(command) => self.filled_in(command),
            Call(_) => String::new(),
        };
        let work = |rig: &mut Rig| -> Ended {
            match &write.how {
                Cli(_) => ended(rig.command(&command)),
                Call(call) => {
                    let (calls, call) = (rig.calls(), *call);
                    let calling = std::thread::spawn(move || call(&calls));
                    Box::new(move || calling.is_finished())
                }
            }
        };
        self.rig.kill_after(point, point.after(write.tables), work)
    }

    /// Begins as all do that are about this write; gives what is stored.
    fn begin(&mut self, write: &Write) -> String {
        self.rig.restore();
        for command in write.before {
            self.run(command).ok();
        }
        self.rig.stored()
    }

    /// Kills the server at points of one write.
    fn of(&mut self, write: &Write) {
        self.at(write, &self.rig.points(write.tables));
    }

    fn at(&mut self, write: &Write, points: &[Point]) {
        let name = write.name;
        let before = self.begin(write);
        self.make(write).unwrap_or_else(|why| panic!("{name}: {why}"));
        // What was acknowledged is there, whatever becomes of the server.
        self.rig.server.process.kill();
        let done = self.rig.stored();
        assert_eq!(
            changed(&before, &done),
            write.tables.iter().copied().collect(),
            "{name}: the tables that it writes"
        );
        assert_eq!(self.begin(write), before, "{name}: begins where the others did");
        let mut seen = Vec::new();
        for point in points.iter().copied() {
            let when = format!("{name}, killed at {point:?}");
            let stopped = self.kill_at(write, point);
            // Whoever else looks at the database sees this; what a file holds is seen by the next server.
            if let Place::File(..) = self.rig.place {
                self.rig.server.restart();
            }
            let after = self.rig.stored();
            self.rig.assert_whole(&when);
            let expected = match (stopped, point) {
                (false, Point::Step(_)) => &done,
                (false, _) => panic!("{when}: it did not stop there"),
                (true, Point::Table(_)) => &before,
                (true, Point::Commit(_)) => &done,
                // Whether the last page is there decides.
                (true, Point::Step(_)) if after == done => &done,
                (true, Point::Step(_)) => &before,
            };
            assert_eq!(&after, expected, "{when}: what is stored");
            seen.push(after == done);
            if let Place::Shared(..) = self.rig.place {
                self.rig.server.restart();
            }
            if !stopped {
                break;
            }
            if after == before && seen.len() == 1 {
                self.make(write).unwrap_or_else(|why| panic!("{when}: asked again: {why}"));
                assert_eq!(self.rig.stored(), done, "{when}: done when asked again");
            }
            if after == done && Some(&point) != points.last() || seen.len() == 1 {
                assert_eq!(self.begin(write), before, "{name}: begins where the others did");
            }
        }
        assert!(seen.contains(&false) && seen.contains(&true), "{name}: before and after: {seen:?}");
    }
}

impl Rig {
    /// Keeps what is stored, after the SVID of one agent has expired.
    fn keep_expired(&mut self) {
        self.server.process.terminate();
        let expired = "update attested_node_entries set expires_at = '2020-01-01 00:00:00' where data_type = 'x509pop'";
        match &self.place {
            Place::Shared(..) => self.change(expired),
            Place::File(..) => self.change(&expired.replace(":00'", ":00+00:00'")),
        }
        self.keep();
    }
}

/// The tables of which something else is stored.
fn changed<'a>(before: &'a str, after: &'a str) -> BTreeSet<&'a str> {
    let differs = |table: &&str| {
        let rows = |stored: &'a str| stored.lines().filter(|l| l.split('|').next() == Some(*table)).collect::<Vec<_>>();
        rows(before) != rows(after)
    };
    TABLES.iter().map(|(table, ..)| *table).filter(differs).collect()
}

/// Two bundles of another trust domain.
pub(super) fn bundles() -> &'static [String; 2] {
    static BUNDLES: OnceLock<[String; 2]> = OnceLock::new();
    BUNDLES.get_or_init(|| {
        let other = ServerOptions { trust_domain: "other.example".into(), key_manager: "memory", ..Default::default() };
        let show =
            || Server::start(Flavor::Finial, &other).command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
        [show(), show()]
    })
}

/// Files that the commands name: two bundles of another trust domain, and several entries.
fn named_files(dir: &Path) -> [(&'static str, String); 5] {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let entry = |n: u32, kind: &str, federates_with: &[&str]| {
        serde_json::json!({
            "entry_id": format!("several-{n}"),
            "parent_id": "spiffe://example.org/node",
            "spiffe_id": format!("spiffe://example.org/several/{n}"),
            "selectors": [{"type": kind, "value": n.to_string()}, {"type": kind, "value": "any"}],
            "dns_names": [format!("{n}.{kind}.example")],
            "federates_with": federates_with,
        })
    };
    let entries = |kind: &str, federates_with: &[&str]| {
        let entries: Vec<_> = (0..5).map(|n| entry(n, kind, federates_with)).collect();
        serde_json::json!({"entries": entries}).to_string()
    };
    let ids: Vec<_> = (0..5).map(|n| format!("several-{n}")).collect();
    let [foreign, newer] = bundles();
    [
        ("FOREIGN", write("other.json", foreign)),
        ("NEWER", write("newer.json", newer)),
        ("SEVERAL", write("several.json", &entries("several", &["other.example"]))),
        ("CHANGED", write("changed.json", &entries("changed", &[]))),
        ("THEIR_IDS", write("ids.json", &serde_json::json!({"ids": ids}).to_string())),
    ]
}

/// Between the steps that the others are killed at is nothing special.
#[test]
fn on_sqlite_an_entry_is_there_wholly_or_not_at_all_at_every_step() {
    let mut table = Table::start(On::Sqlite).expect("a file");
    let every: Vec<_> = (1..200).map(Point::Step).collect();
    WRITES.iter().filter(|write| write.name == "entry create").for_each(|write| table.at(write, &every));
}

fn each_write(on: On) {
    let Some(mut table) = Table::start(on) else { return };
    WRITES.iter().for_each(|write| table.of(write));
}

#[test]
fn on_postgresql_each_write_is_there_wholly_or_not_at_all() {
    each_write(On::Postgres);
}

#[test]
fn on_mariadb_each_write_is_there_wholly_or_not_at_all() {
    each_write(On::MariaDb);
}

#[test]
fn on_sqlite_each_write_is_there_wholly_or_not_at_all() {
    each_write(On::Sqlite);
}
