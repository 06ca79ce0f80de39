//! SPIRE's own server and this store on the same file, in both directions. Runs where SPIRE 1.15.3 is at hand: the folder
//! that `FINIAL_REAL_SPIRE` names, or `~/.cache/finial/spire-1.15.3`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
#[path = "real_spire/older.rs"]
mod older;
use common::*;
use finial_core::{AgentRecord, Entry, JoinToken, SystemClock};
use finial_store::{AgentFilter, EntryUpdate, Store, StoreSettings};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const WAIT_MAX: Duration = Duration::from_secs(60);

/// `None` where nobody promised one; a promise (`FINIAL_REAL_SPIRE`, which `./test` sets) that is not kept fails.
fn spire() -> Option<PathBuf> {
    let promised = std::env::var_os("FINIAL_REAL_SPIRE").map(PathBuf::from);
    let folder = match &promised {
        Some(folder) => folder.clone(),
        None => Path::new(&std::env::var_os("HOME")?).join(".cache/finial/spire-1.15.3"),
    };
    let there = folder.join("spire-server").exists() && folder.join("spire-agent").exists();
    assert!(there || promised.is_none(), "no SPIRE at {}: run tests/real-spire/build.sh", folder.display());
    if !there {
        // not eprintln: what tests print is only shown when they fail
        let _ = writeln!(std::io::stderr(), "\nSKIPPED: no SPIRE at {}", folder.display());
    }
    there.then_some(folder)
}

/// A process that ends with its value.
struct Process(Child);

impl Process {
    fn stop(mut self) {
        Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // after `stop` there is nothing left to kill
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Spire {
    bin: PathBuf,
    folder: PathBuf,
    port: u16,
    /// `None` on SQLite.
    database: Option<testkit::Database>,
}

impl Spire {
    /// `None` where the database is not installed.
    fn new(lab: Lab, bin: PathBuf, folder: &Path) -> Option<Self> {
        let database = match lab {
            Lab::Sqlite => None,
            Lab::Postgres => Some(testkit::postgres()?),
            Lab::MySql => Some(testkit::mariadb()?),
        };
        let port = testkit::free_port();
        let folder = folder.to_path_buf();
        let at = folder.display();
        let (kind, connection) = match &database {
            None => ("sqlite3", format!("{at}/db")),
            Some(database) => (database.kind().spire_type(), database.dsn()),
        };
        let server = format!(
            r#"server {{ bind_address = "127.0.0.1" bind_port = "{port}" socket_path = "{at}/s.sock" trust_domain = "example.org" data_dir = "{at}" }}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "{kind}" connection_string = "{connection}" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{at}/keys.json" }} }}
}}"#
        );
        std::fs::write(folder.join("server.conf"), server).unwrap();
        let agent = format!(
            r#"agent {{ server_address = "127.0.0.1" server_port = "{port}" socket_path = "{at}/a.sock" trust_domain = "example.org" data_dir = "{at}/agent" insecure_bootstrap = true }}
plugins {{ NodeAttestor "join_token" {{ plugin_data {{}} }} KeyManager "memory" {{ plugin_data {{}} }} WorkloadAttestor "unix" {{ plugin_data {{}} }} }}"#
        );
        std::fs::write(folder.join("agent.conf"), agent).unwrap();
        Some(Self { bin, folder, port, database })
    }

    fn database(&self) -> StoreSettings {
        match &self.database {
            None => StoreSettings::file(self.folder.join("db")),
            Some(database) => settings(database.kind().spire_type(), &database.dsn()),
        }
    }

    fn spawn(&self, program: &str, args: &[&str]) -> Process {
        let log = std::fs::File::create(self.folder.join(format!("{program}.log"))).unwrap();
        let child = Command::new(self.bin.join(program))
            .args(["run", "-config"])
            .arg(self.folder.join(format!("{}.conf", program.trim_start_matches("spire-"))))
            .args(args)
            .stdout(log)
            .stderr(Stdio::null())
            .spawn();
        Process(child.unwrap())
    }

    fn start(&self) -> Process {
        let server = self.spawn("spire-server", &[]);
        self.until("the server is healthy", || self.run(&["healthcheck"]).is_some().then_some(()));
        server
    }

    fn until<T>(&self, what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = ready() {
                return value;
            }
            let log = || std::fs::read_to_string(self.folder.join("spire-server.log")).unwrap_or_default();
            assert!(start.elapsed() < WAIT_MAX, "waited for: {what} (port {})\n{}", self.port, log());
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    fn run(&self, args: &[&str]) -> Option<String> {
        let output = Command::new(self.bin.join("spire-server"))
            .args(args)
            .arg("-socketPath")
            .arg(self.folder.join("s.sock"))
            .output()
            .unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn must(&self, args: &[&str]) -> String {
        self.run(args).unwrap_or_else(|| panic!("{args:?} failed"))
    }

    fn json(&self, args: &[&str], field: &str) -> Vec<Value> {
        let text = self.must(&[args, &["-output", "json"]].concat());
        let value: Value = serde_json::from_str(&text).unwrap();
        value[field].as_array().unwrap().clone()
    }

    /// What SPIRE lists, in a form that ours can be compared with.
    fn entries(&self) -> Vec<String> {
        sorted(self.json(&["entry", "show"], "entries").iter().map(entry_text).collect())
    }

    fn agents(&self) -> Vec<String> {
        let text = |agent: &Value| {
            format!(
                "{} {} serial={} expires={} banned={} reattest={} version={} {}",
                id_text(&agent["id"]),
                text(&agent["attestation_type"]),
                text(&agent["x509svid_serial_number"]),
                text(&agent["x509svid_expires_at"]),
                agent["banned"],
                agent["can_reattest"],
                text(&agent["agent_version"]),
                list(&agent["selectors"], selector_text),
            )
        };
        sorted(self.json(&["agent", "list"], "agents").iter().map(text).collect())
    }
}

fn sorted(mut all: Vec<String>) -> Vec<String> {
    all.sort();
    all
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn id_text(value: &Value) -> String {
    format!("spiffe://{}{}", text(&value["trust_domain"]), text(&value["path"]))
}

fn selector_text(value: &Value) -> String {
    format!("{}:{}", text(&value["type"]), text(&value["value"]))
}

fn list(value: &Value, each: impl Fn(&Value) -> String) -> String {
    sorted(value.as_array().unwrap().iter().map(each).collect()).join(",")
}

fn entry_text(e: &Value) -> String {
    let extra = |name: &str| e["additional_attributes"][name].as_bool().unwrap_or_default();
    format!(
        "{} {} <- {} [{}] x509={} jwt={} federates=[{}] admin={} downstream={} expires={} dns=[{}] revision={} store={} hint={} created={} prefetch={} jti={}",
        text(&e["id"]),
        id_text(&e["spiffe_id"]),
        id_text(&e["parent_id"]),
        list(&e["selectors"], selector_text),
        e["x509_svid_ttl"],
        e["jwt_svid_ttl"],
        list(&e["federates_with"], text),
        e["admin"],
        e["downstream"],
        text(&e["expires_at"]),
        list(&e["dns_names"], text),
        text(&e["revision_number"]),
        e["store_svid"],
        text(&e["hint"]),
        text(&e["created_at"]),
        !extra("disable_x509_svid_prefetch"),
        extra("jwt_svid_include_jti"),
    )
}

fn our_entry_text(e: &Entry) -> String {
    let join = |texts: Vec<String>| sorted(texts).join(",");
    format!(
        "{} {} <- {} [{}] x509={} jwt={} federates=[{}] admin={} downstream={} expires={} dns=[{}] revision={} store={} hint={} created={} prefetch={} jti={}",
        e.id,
        e.spiffe_id,
        e.parent_id,
        join(e.selectors.iter().map(ToString::to_string).collect()),
        e.x509_svid_ttl,
        e.jwt_svid_ttl,
        join(e.federates_with.iter().map(ToString::to_string).collect()),
        e.admin,
        e.downstream,
        e.expires_at,
        join(e.dns_names.clone()),
        e.revision_number,
        e.store_svid,
        e.hint,
        e.created_at,
        !e.disable_x509_svid_prefetch,
        e.jwt_svid_include_jti,
    )
}

async fn our_entries(store: &Store) -> Vec<String> {
    let all = entries(store).await;
    sorted(all.iter().map(our_entry_text).collect())
}

async fn our_agents(store: &Store) -> Vec<String> {
    let text = |a: &AgentRecord| {
        format!(
            "{} {} serial={} expires={} banned={} reattest={} version={} {}",
            a.id,
            a.attestation_type,
            a.serial_number,
            a.expires_at,
            a.serial_number.is_empty(),
            a.can_reattest,
            a.agent_version,
            sorted(a.selectors.iter().map(ToString::to_string).collect()).join(",")
        )
    };
    let listed = store.list_nodes(&AgentFilter::default(), None).await.unwrap();
    sorted(listed.items.iter().map(text).collect())
}

const BATCH: &str = r#"{"entries": [
  {"spiffe_id": "spiffe://example.org/full", "parent_id": "spiffe://example.org/spire/agent/x", "entry_id": "full-1",
   "selectors": [{"type": "unix", "value": "uid:1000"}, {"type": "unix", "value": "gid:1"}], "x509_svid_ttl": 60,
   "jwt_svid_ttl": 30, "federates_with": ["spiffe://b.test", "spiffe://a.test"], "admin": true, "downstream": true,
   "entryExpiry": 2000000000, "dns_names": ["z.example", "a.example"], "hint": "a hint",
   "additional_attributes": {"disable_x509_svid_prefetch": true, "jwt_svid_include_jti": true}},
  {"spiffe_id": "spiffe://example.org/stored", "parent_id": "spiffe://example.org/spire/agent/x",
   "selectors": [{"type": "aws", "value": "secret:s"}], "store_svid": true},
  {"spiffe_id": "spiffe://example.org/plain", "parent_id": "spiffe://example.org/spire/server",
   "selectors": [{"type": "unix", "value": "uid:1"}]}
]}"#;

on_every_database!(
    what_spire_wrote_is_read_here_and_the_other_way_round,
    a_database_made_here_has_spires_schema_and_serves_spire,
);

async fn what_spire_wrote_is_read_here_and_the_other_way_round(lab: Lab) {
    let Some(bin) = spire() else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(spire) = Spire::new(lab, bin, folder.path()) else { return };
    let (server_entries, server_agents, own_bundle) = spire_writes(&spire);
    assert_eq!((server_entries.len(), server_agents.len()), (4, 2));

    let store = Store::open(spire.database(), Arc::new(SystemClock)).await.unwrap();
    assert_eq!(our_entries(&store).await, server_entries);
    assert_eq!(our_agents(&store).await, server_agents);
    let bundles = store.list_bundles(None).await.unwrap().items;
    assert_eq!(
        bundles.iter().map(|b| b.trust_domain.as_str()).collect::<Vec<_>>(),
        ["example.org", "a.test", "b.test"]
    );
    let pem: String =
        bundles[0].x509_authorities.iter().map(|a| finial_crypto::pem::encode("CERTIFICATE", &a.der)).collect();
    assert_eq!(pem, own_bundle);
    assert_eq!(bundles[0].jwt_authorities.len(), 1);
    let full = store.fetch_entry(&finial_core::EntryId::parse("full-1").unwrap()).await.unwrap().unwrap();
    assert_eq!(full.dns_names, ["z.example", "a.example"], "their order has a meaning");
    let journals = store.list_ca_journals().await.unwrap();
    assert_eq!(journals.len(), 1);
    let found = store.fetch_ca_journal(&journals[0].active_x509_authority_id).await.unwrap();
    assert_eq!(found.as_ref(), journals.first());

    we_write(&store, &full).await;
    let (entries, agents) = (our_entries(&store).await, our_agents(&store).await);
    store.close().await;
    drop(store);
    let server = spire.start();
    assert_eq!(spire.entries(), entries);
    assert_eq!(spire.agents(), agents);
    assert_eq!(spire.must(&["bundle", "show"]), own_bundle);
    server.stop();
}

fn spire_writes(spire: &Spire) -> (Vec<String>, Vec<String>, String) {
    let server = spire.start();
    for (name, pem) in [("a.test", "root-a.pem"), ("b.test", "root-b.pem")] {
        let path = format!("{}/tests/data/{pem}", env!("CARGO_MANIFEST_DIR"));
        spire.must(&["bundle", "set", "-id", &format!("spiffe://{name}"), "-path", &path]);
    }
    let batch = spire.folder.join("batch.json");
    std::fs::write(&batch, BATCH).unwrap();
    spire.must(&["entry", "create", "-data", batch.to_str().unwrap()]);
    for (agents, node) in [(1, Some("spiffe://example.org/node")), (2, None)] {
        let mut args = vec!["token", "generate"];
        if let Some(node) = node {
            args.extend(["-spiffeID", node]);
        }
        let token = spire.must(&args);
        let token = token.lines().next().unwrap().trim_start_matches("Token: ").to_owned();
        let agent = spire.spawn("spire-agent", &["-joinToken", &token]);
        spire.until("the agent has joined", || (spire.agents().len() == agents).then_some(()));
        agent.stop();
        std::fs::remove_dir_all(spire.folder.join("agent")).unwrap();
    }
    let banned = spire.json(&["agent", "list"], "agents").iter().map(|a| id_text(&a["id"])).next_back().unwrap();
    spire.must(&["agent", "ban", "-spiffeID", &banned]);
    let all = (spire.entries(), spire.agents(), spire.must(&["bundle", "show"]));
    server.stop();
    all
}

async fn we_write(store: &Store, full: &Entry) {
    let ours = Entry { federates_with: vec![td("a.test")], spiffe_id: id("/ours"), ..full_entry("ours", &[]) };
    create(store, ours.clone()).await;
    create(store, entry("short", "/short", "/spire/agent/x", &["unix:uid:3"])).await;
    let update = EntryUpdate {
        hint: Some("changed here".into()),
        selectors: Some(selectors(&["unix:uid:7"])),
        ..EntryUpdate::default()
    };
    store.update_entry(&full.id, update).await.unwrap();
    let new =
        AgentRecord { new_serial_number: "77".into(), new_expires_at: 2_000_000_000, ..agent("/spire/agent/ours") };
    store.create_or_update_node(&new).await.unwrap();
    store.create_or_update_node(&agent("/spire/agent/gone")).await.unwrap();
    store.ban_node(&id("/spire/agent/gone")).await.unwrap();
}

async fn a_database_made_here_has_spires_schema_and_serves_spire(lab: Lab) {
    let Some(bin) = spire() else { return };
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(first) = Spire::new(lab, bin.clone(), theirs.path()) else { return };
    first.start().stop();

    let Some(spire) = Spire::new(lab, bin, ours.path()) else { return };
    let store = Store::open(spire.database(), Arc::new(SystemClock)).await.unwrap();
    store.create_bundle(&bundle("a.test")).await.unwrap();
    create(&store, full_entry("full", &["a.test"])).await;
    store.create_or_update_node(&agent("/spire/agent/one")).await.unwrap();
    let token = JoinToken { token: "a-token".into(), expires_at: 2_000_000_000 };
    store.create_join_token(&token, None).await.unwrap();
    let (entries, agents) = (our_entries(&store).await, our_agents(&store).await);
    store.close().await;
    drop(store);
    assert_eq!(schema(&spire).await, schema(&first).await);

    let server = spire.start();
    assert_eq!((spire.entries(), spire.agents()), (entries, agents));
    let agent = spire.spawn("spire-agent", &["-joinToken", "a-token"]);
    spire.until("the agent has joined with our token", || (spire.agents().len() == 2).then_some(()));
    agent.stop();
    // SPIRE changes an entry that was made here, and we read it again
    spire.must(&["entry", "delete", "-entryID", "full"]);
    spire.must(&["bundle", "delete", "-id", "spiffe://a.test"]);
    server.stop();
    let store = Store::open(spire.database(), Arc::new(SystemClock)).await.unwrap();
    assert_eq!(our_entries(&store).await, [""; 0]);
    assert_eq!(store.fetch_join_token("a-token").await.unwrap(), None);
    assert_eq!(store.count_nodes(&AgentFilter::default()).await.unwrap(), 2);
}

/// Every table and index as the database itself writes them down, without our own additions.
async fn schema(spire: &Spire) -> Vec<String> {
    let Some(database) = &spire.database else { return sqlite_schema(&spire.database()).await };
    let text = database.schema();
    // what counts rows, and what a dump is fenced with, differs from one to the next
    let noise = |line: &&str| line.is_empty() || ["--", "\\"].iter().any(|fence| line.starts_with(fence));
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !noise(line)).collect();
    // Tables of our own go with all their lines, in SPIRE's the lines of our own indexes.
    let statements = lines.split_inclusive(|line| line.ends_with(';') || line.starts_with(") ENGINE="));
    let spires = statements.filter(|lines| !lines[0].contains("finial")).flatten();
    let lines = spires.map(|line| line.trim_end_matches(',').to_owned());
    let kept = lines.filter(|line| !line.contains("finial")).map(|line| {
        line.split_whitespace().filter(|word| !word.starts_with("AUTO_INCREMENT=")).collect::<Vec<_>>().join(" ")
    });
    sorted(kept.collect())
}

async fn sqlite_schema(settings: &StoreSettings) -> Vec<String> {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(settings.path.as_ref().unwrap());
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let all: Vec<(String,)> = sqlx::query_as(
        "SELECT type || ' ' || name || ' ' || tbl_name || ' ' || COALESCE(sql, '') FROM sqlite_master WHERE name NOT LIKE 'finial%'",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    pool.close().await;
    sorted(all.into_iter().map(|(text,)| text.trim_end().to_owned()).collect())
}
