//! PostgreSQL servers, alone or as a primary with a streaming standby.

use super::{CERTIFIED_USER, Database, Host, PASSWORD, Pki, USER, Watcher, missing, on_path, root};
use crate::process::{Output, Process, Workdir, eventually, free_port};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const HBA: &str = "hostssl all certified 127.0.0.1/32 cert
host all all 127.0.0.1/32 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
";

/// A PostgreSQL server on 127.0.0.1, stopped and removed when dropped.
pub struct Postgres {
    process: Mutex<Option<Process>>,
    port: u16,
    bin: PathBuf,
    pki: Arc<Pki>,
    _watcher: Watcher,
    dir: Workdir,
}

impl Postgres {
    /// The server that all tests of this process share, or `None` (said loudly) where PostgreSQL is not installed. Not
    /// to be stopped or changed: take [`Self::start`] for that.
    pub fn shared() -> Option<Arc<Self>> {
        static SHARED: OnceLock<Option<Arc<Postgres>>> = OnceLock::new();
        SHARED.get_or_init(Self::start).clone()
    }

    /// A server of the test's own.
    pub fn start() -> Option<Arc<Self>> {
        let Some(bin) = binaries() else {
            missing("PostgreSQL", "postgresql");
            return None;
        };
        let dir = Workdir::new();
        let pki = Pki::new(&dir);
        dir.write("password", PASSWORD);
        belongs_to_postgres(dir.path());
        let data = dir.path().join("data");
        let mut initdb = command(&bin, "initdb");
        initdb.arg("-D").arg(&data).args([
            "-U",
            "postgres",
            "--auth=scram-sha-256",
            "-E",
            "UTF8",
            "--no-sync",
            "--locale=C",
        ]);
        Output::of(initdb.arg("--pwfile").arg(dir.path().join("password"))).ok();
        let port = free_port();
        let (cert, key) = pki.server();
        let conf = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nmax_connections = 200\n\
             shared_buffers = 32MB\nfsync = off\nfull_page_writes = off\nwal_level = replica\nhot_standby = on\n\
             max_wal_senders = 4\nwal_keep_size = 64MB\nssl = on\nssl_cert_file = '{}'\nssl_key_file = '{}'\n\
             ssl_ca_file = '{}'\nshared_preload_libraries = 'pg_stat_statements'\npg_stat_statements.track_utility = off\n",
            cert.display(),
            key.display(),
            pki.ca().display()
        );
        append(&data.join("postgresql.conf"), &conf);
        std::fs::write(data.join("pg_hba.conf"), HBA).expect("pg_hba.conf");
        let server = Self::of(dir, bin, port, Arc::new(pki));
        server.start_again();
        server.psql(
            "postgres",
            &format!(
                "create role {USER} login createdb password '{PASSWORD}'; create role {CERTIFIED_USER} login in role {USER}; \
                 create extension pg_stat_statements"
            ),
        );
        Some(Arc::new(server))
    }

    fn of(dir: Workdir, bin: PathBuf, port: u16, pki: Arc<Pki>) -> Self {
        // SIGQUIT: at once, without waiting for clients.
        let watcher = Watcher::start(&dir.path().join("data/postmaster.pid"), "QUIT", dir.path());
        Self { process: Mutex::new(None), port, bin, pki, _watcher: watcher, dir }
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its certificates.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A fresh database that belongs to [`USER`].
    pub fn database(self: &Arc<Self>) -> Database {
        let name = Database::fresh_name();
        self.psql("postgres", &format!("create database {name} owner {USER}"));
        Database { host: Host::Postgres(Arc::clone(self)), name, session: Mutex::default() }
    }

    /// A database of another server of the same data (its primary), seen here.
    pub fn view(self: &Arc<Self>, of: &Database) -> Database {
        Database { host: Host::Postgres(Arc::clone(self)), name: of.name().to_owned(), session: Mutex::default() }
    }

    /// Starts it (again, after one of the stops) and waits until it answers.
    pub fn start_again(&self) {
        let mut process = self.lock();
        let log = self.dir.path().join("postgres.log");
        let launch = || {
            let mut postgres = command(&self.bin, "postgres");
            postgres.arg("-D").arg(self.dir.path().join("data"));
            Process::start("postgres", log.clone(), &mut postgres).stopped_by(Signal::QUIT)
        };
        let running = process.insert(launch());
        eventually("PostgreSQL answers", || {
            if running.ended().is_some() {
                // After kill -9 it refuses to start until its orphaned children have gone.
                let said = running.log();
                *running = launch();
                return Err(said);
            }
            let out = self.try_sql("postgres", "select 1");
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    }

    /// Stops it as an administrator does (fast mode: open transactions are rolled back).
    pub fn stop(&self) {
        self.end(Signal::INT);
    }

    /// Stops it without a checkpoint (immediate mode), as a crash of the machine would.
    pub fn crash(&self) {
        self.end(Signal::QUIT);
    }

    /// `kill -9` of its main process.
    pub fn kill(&self) {
        self.end(Signal::KILL);
    }

    fn end(&self, signal: Signal) {
        if let Some(mut process) = self.lock().take() {
            process.signal(signal);
            process.wait();
        }
    }

    /// Stops the processes of the server where they stand (SIGSTOP), or lets them go on.
    pub fn freeze(&self, frozen: bool) {
        if let Some(process) = self.lock().as_ref() {
            let children = Output::of(Command::new("pgrep").arg("-P").arg(process.pid().to_string()));
            let signal = if frozen { Signal::STOP } else { Signal::CONT };
            process.signal(signal);
            for pid in children.stdout.lines().filter_map(|l| l.parse().ok()).filter_map(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    }

    /// Makes every new transaction of everybody read-only, or lifts that.
    pub fn read_only(&self, on: bool) {
        let set = if on { "set default_transaction_read_only = on" } else { "reset default_transaction_read_only" };
        self.psql("postgres", &format!("alter system {set}"));
        self.psql("postgres", "select pg_reload_conf()");
        let want = if on { "on" } else { "off" };
        eventually("the setting is taken", || {
            let is = Output::of(&mut self.psql_command("postgres", "show default_transaction_read_only")).stdout;
            if is.trim() == want { Ok(()) } else { Err(is) }
        });
    }

    /// Makes a standby the primary.
    pub fn promote(&self) {
        self.psql("postgres", "select pg_promote(true, 60)");
        eventually("it is the primary", || match self.psql("postgres", "select pg_is_in_recovery()").trim() {
            "f" => Ok(()),
            other => Err(format!("in recovery: {other}")),
        });
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("postgres.log")).unwrap_or_default()
    }

    pub(super) fn try_sql(&self, database: &str, text: &str) -> Output {
        // Also while everybody else is held to reading.
        Output::of(self.psql_command(database, text).env("PGOPTIONS", "-c default_transaction_read_only=off"))
    }

    fn psql_command(&self, database: &str, text: &str) -> Command {
        let mut psql = self.session_command(database);
        psql.args(["-c", text]);
        psql
    }

    /// A client that reads statements from its standard input.
    pub(super) fn session_command(&self, database: &str) -> Command {
        let mut psql = Command::new(self.bin.join("psql"));
        psql.args(["-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres"]);
        psql.arg("-p").arg(self.port.to_string()).args(["-d", database]);
        psql.env("PGPASSWORD", PASSWORD).env("PGCONNECT_TIMEOUT", "20");
        psql
    }

    #[track_caller]
    fn psql(&self, database: &str, text: &str) -> String {
        self.try_sql(database, text).ok().stdout
    }

    pub(super) fn schema(&self, database: &str) -> String {
        let mut dump = Command::new(self.bin.join("pg_dump"));
        dump.args(["-s", "-O", "-x", "-h", "127.0.0.1", "-U", "postgres", "-d", database])
            .arg("-p")
            .arg(self.port.to_string());
        let text = Output::of(dump.env("PGPASSWORD", PASSWORD)).ok().stdout;
        // Newer minor versions wrap the dump in \restrict with a random word.
        text.lines().filter(|l| !l.starts_with('\\')).collect::<Vec<_>>().join("\n")
    }

    pub(super) fn statements(&self, database: &str) -> BTreeMap<String, u64> {
        let query = format!(
            "select sum(calls), regexp_replace(query, '\\s+', ' ', 'g') from pg_stat_statements s \
             join pg_database d on d.oid = s.dbid where datname = '{database}' group by 2"
        );
        let counted = |line: &str| {
            let (calls, text) = line.split_once('\t').expect("two columns");
            (text.to_owned(), calls.parse().expect("a number"))
        };
        self.psql("postgres", &query).lines().map(counted).collect()
    }

    pub(super) fn disconnect_all(&self, database: &str) {
        self.psql(
            "postgres",
            &format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'"),
        );
    }

    pub(super) fn limit_connections(&self, database: &str, limit: Option<u32>) {
        let limit = limit.map_or(-1, i64::from);
        self.psql("postgres", &format!("alter database {database} connection limit {limit}"));
    }

    pub(super) fn forget(&self, database: &str) {
        if self.lock().is_some() {
            let _ = self.try_sql("postgres", &format!("drop database if exists {database} with (force)"));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A standby of this server that streams from it.
    fn standby(&self) -> Arc<Self> {
        let dir = Workdir::new();
        belongs_to_postgres(dir.path());
        let data = dir.path().join("data");
        let mut base = command(&self.bin, "pg_basebackup");
        base.args(["-h", "127.0.0.1", "-U", "postgres", "-R", "-X", "stream", "--no-sync", "--checkpoint=fast"]);
        let port = free_port();
        Output::of(base.arg("-p").arg(self.port.to_string()).arg("-D").arg(&data).env("PGPASSWORD", PASSWORD)).ok();
        append(&data.join("postgresql.conf"), &format!("port = {port}\n"));
        let standby = Self::of(dir, self.bin.clone(), port, Arc::clone(&self.pki));
        standby.start_again();
        Arc::new(standby)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Before the watcher, which would wait for it.
        self.end(Signal::QUIT);
    }
}

/// A primary and a standby that streams from it.
pub struct PostgresPair {
    /// The primary.
    pub primary: Arc<Postgres>,
    /// The standby: read-only until [`Postgres::promote`].
    pub standby: Arc<Postgres>,
}

impl PostgresPair {
    /// Starts both; `None` (said loudly) where PostgreSQL is not installed.
    pub fn start() -> Option<Self> {
        let primary = Postgres::start()?;
        let standby = primary.standby();
        Some(Self { primary, standby })
    }

    /// Waits until the standby has all that the primary has committed.
    pub fn wait_caught_up(&self) {
        let at = self.primary.psql("postgres", "select pg_current_wal_lsn()");
        let query = format!("select coalesce(pg_last_wal_replay_lsn() >= '{}', false)", at.trim());
        eventually("the standby has caught up", || match self.standby.psql("postgres", &query).trim() {
            "t" => Ok(()),
            other => Err(format!("{other}: not yet at {at}")),
        });
    }
}

/// The folder with PostgreSQL's server programs.
fn binaries() -> Option<PathBuf> {
    let said = on_path("pg_config").and_then(|program| Command::new(program).arg("--bindir").output().ok());
    let said = said.map(|out| PathBuf::from(String::from_utf8_lossy(&out.stdout).trim().to_owned()));
    let mut debian: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|dirs| dirs.flatten().map(|d| d.path().join("bin")).collect())
        .unwrap_or_default();
    debian.sort();
    let on_path = on_path("initdb").and_then(|p| p.parent().map(Path::to_path_buf));
    said.into_iter().chain(debian.into_iter().rev()).chain(on_path).find(|dir| dir.join("initdb").exists())
}

/// A server program, as the user `postgres` when this is root: it refuses to run as root.
fn command(bin: &Path, program: &str) -> Command {
    let path = bin.join(program);
    if !root() {
        return Command::new(path);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(path).current_dir("/");
    command
}

/// Gives a folder with all that is in it to the user `postgres` when this is root.
fn belongs_to_postgres(dir: &Path) {
    if root() {
        Output::of(Command::new("chown").args(["-R", "postgres:"]).arg(dir)).ok();
    }
}

fn append(path: &Path, text: &str) {
    let all = std::fs::read_to_string(path).expect("the file") + text;
    std::fs::write(path, all).expect("the file"); // the owner stays
}
