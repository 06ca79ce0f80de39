//! MariaDB servers.

use super::{CERTIFIED_USER, Database, Host, PASSWORD, Pki, USER, Watcher, missing, on_path};
use crate::process::{Output, Process, Workdir, eventually, free_port};
use rustix::process::Signal;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A MariaDB server on 127.0.0.1, stopped and removed when dropped.
pub struct MariaDb {
    process: Mutex<Option<Process>>,
    port: u16,
    pki: Pki,
    _watcher: Watcher,
    dir: Workdir,
}

impl MariaDb {
    /// The server that all tests of this process share, or `None` (said loudly) where MariaDB is not installed. Not to be
    /// stopped or changed: take [`Self::start`] for that.
    pub fn shared() -> Option<Arc<Self>> {
        static SHARED: OnceLock<Option<Arc<MariaDb>>> = OnceLock::new();
        SHARED.get_or_init(Self::start).clone()
    }

    /// A server of the test's own.
    pub fn start() -> Option<Arc<Self>> {
        if ["mariadbd", "mariadb-install-db", "mariadb"].iter().any(|p| on_path(p).is_none()) {
            missing("MariaDB", "mariadb-server-core mariadb-client-core");
            return None;
        }
        let dir = Workdir::new();
        let pki = Pki::new(&dir);
        // It has been seen to fail on a machine under full load: once more, on an empty folder.
        let data = dir.path().join("data");
        if install(&data).code != 0 {
            let _ = std::fs::remove_dir_all(&data);
            install(&data).ok();
        }
        let watcher = Watcher::start(&dir.path().join("pid"), "TERM", dir.path());
        let server = Self { process: Mutex::new(None), port: free_port(), pki, _watcher: watcher, dir };
        server.start_again();
        server.query(
            "",
            &format!(
                "create user {USER}@'%' identified by '{PASSWORD}'; grant all on *.* to {USER}@'%'; \
                 create user {CERTIFIED_USER}@'%' require x509; grant all on *.* to {CERTIFIED_USER}@'%'; \
                 revoke super, read_only admin on *.* from {USER}@'%'"
            ),
        );
        Some(Arc::new(server))
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its certificates.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A fresh database.
    pub fn database(self: &Arc<Self>) -> Database {
        let name = Database::fresh_name();
        self.query("", &format!("create database {name}"));
        Database { host: Host::MariaDb(Arc::clone(self)), name, session: Mutex::default() }
    }

    /// Starts it (again, after one of the stops) and waits until it answers.
    pub fn start_again(&self) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let (cert, key) = self.pki.server();
        let mut mariadbd = Command::new(on_path("mariadbd").expect("mariadbd"));
        mariadbd.arg("--no-defaults").arg(as_whom()).args([
            format!("--datadir={}", path("data")),
            format!("--socket={}", path("my.sock")),
            format!("--pid-file={}", path("pid")),
            format!("--port={}", self.port),
            format!("--ssl-ca={}", self.pki.ca().display()),
            format!("--ssl-cert={}", cert.display()),
            format!("--ssl-key={}", key.display()),
            "--bind-address=127.0.0.1".into(),
            // A commit is given to the kernel before it is acknowledged: kill -9 loses nothing.
            "--innodb-flush-log-at-trx-commit=2".into(),
            "--innodb-buffer-pool-size=64M".into(),
            "--skip-name-resolve".into(),
            "--max-connections=200".into(),
        ]);
        let mut process = self.lock();
        let running = process.insert(Process::start("mariadbd", self.dir.path().join("mariadb.log"), &mut mariadbd));
        eventually("MariaDB answers", || {
            if let Some(code) = running.ended() {
                panic!("MariaDB ended with {code}:\n{}", running.log());
            }
            let out = self.try_sql("", "select 1");
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    }

    /// Stops it as an administrator does.
    pub fn stop(&self) {
        self.end(Signal::TERM);
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.end(Signal::KILL);
    }

    fn end(&self, signal: Signal) {
        if let Some(mut process) = self.lock().take() {
            process.signal(signal);
            process.wait();
        }
    }

    /// Stops the server where it stands (SIGSTOP), or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        if let Some(process) = self.lock().as_ref() {
            process.signal(if frozen { Signal::STOP } else { Signal::CONT });
        }
    }

    /// Refuses everybody's writes (error 1290), or lifts that.
    pub fn read_only(&self, on: bool) {
        self.query("", &format!("set global read_only = {}", i32::from(on)));
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("mariadb.log")).unwrap_or_default()
    }

    pub(super) fn try_sql(&self, database: &str, text: &str) -> Output {
        Output::of(self.session_command(database).arg("-e").arg(text))
    }

    /// A client that reads statements from its standard input.
    pub(super) fn session_command(&self, database: &str) -> Command {
        let mut mariadb = Command::new("mariadb");
        mariadb.args(["--no-defaults", "--user=root", "--batch", "--skip-column-names", "--unbuffered"]);
        mariadb.arg(format!("--socket={}", self.dir.path().join("my.sock").display()));
        if !database.is_empty() {
            mariadb.arg(format!("--database={database}"));
        }
        mariadb
    }

    #[track_caller]
    fn query(&self, database: &str, text: &str) -> String {
        self.try_sql(database, text).ok().stdout
    }

    pub(super) fn schema(&self, database: &str) -> String {
        let tables = self.query(database, "show tables");
        let mut tables: Vec<&str> = tables.lines().collect();
        tables.sort_unstable();
        let made = tables
            .iter()
            .map(|table| self.query(database, &format!("show create table `{table}`")).replace("\\n", "\n"));
        made.collect()
    }

    pub(super) fn disconnect_all(&self, database: &str) {
        let ids = self.query("", &format!("select id from information_schema.processlist where db = '{database}'"));
        for id in ids.lines() {
            let _ = self.try_sql("", &format!("kill {id}"));
        }
    }

    pub(super) fn limit_connections(&self, limit: Option<u32>) {
        // Root has one more than the maximum.
        self.query("", &format!("set global max_connections = {}", limit.map_or(200, |l| l.max(10))));
    }

    pub(super) fn forget(&self, database: &str) {
        if self.lock().is_some() {
            self.disconnect_all(database);
            let _ = self.try_sql("", &format!("drop database if exists {database}"));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        // Before the watcher, which would wait for it.
        self.end(Signal::KILL);
    }
}

fn install(data: &Path) -> Output {
    let mut install = Command::new("mariadb-install-db");
    install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]).arg(as_whom());
    Output::of(install.arg(format!("--datadir={}", data.display())))
}

/// It runs as whoever runs the tests; root has to say that it means it.
fn as_whom() -> String {
    let name = Command::new("id").arg("-un").output().expect("id").stdout;
    format!("--user={}", String::from_utf8_lossy(&name).trim())
}
