//! Real databases: PostgreSQL and MariaDB processes, one of each shared by all tests of a process, and a fresh database on
//! it for each test; servers of a test's own where it wants to stop, break or promote one.
//!
//! Whatever happens to the test process, also `kill -9`, its database processes end: each has a watcher that waits for
//! the end of a pipe which only the test process holds, and then stops the server by the process id in its pid file.

mod mariadb;
mod postgres;
mod session;
mod tls;

pub use mariadb::MariaDb;
pub use postgres::{Postgres, PostgresPair};
pub use session::Held;
pub use tls::Pki;

use crate::process::Output;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The user that the databases belong to; may do anything in them and is no superuser.
pub const USER: &str = "spire";
/// A user without a password who must show the certificate of [`Pki::client`].
pub const CERTIFIED_USER: &str = "certified";
/// The password of [`USER`].
pub const PASSWORD: &str = "p4ss-w0rd";

/// Which kind of database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    /// PostgreSQL.
    Postgres,
    /// MariaDB, spoken to as MySQL.
    MariaDb,
}

impl DatabaseKind {
    /// SPIRE's `database_type`.
    pub fn spire_type(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::MariaDb => "mysql",
        }
    }
}

/// A fresh PostgreSQL database on the shared server; `None` (said loudly) where PostgreSQL is not installed.
pub fn postgres() -> Option<Database> {
    Postgres::shared().map(|server| server.database())
}

/// A fresh MariaDB database on the shared server; `None` (said loudly) where MariaDB is not installed.
pub fn mariadb() -> Option<Database> {
    MariaDb::shared().map(|server| server.database())
}

/// The server that a database is on.
#[derive(Clone)]
enum Host {
    Postgres(Arc<Postgres>),
    MariaDb(Arc<MariaDb>),
}

/// A database of the test's own, dropped at its end.
pub struct Database {
    host: Host,
    name: String,
    /// For [`Database::ask`].
    session: Mutex<Option<session::Session>>,
}

impl Database {
    /// A name that no other database of this process has.
    fn fresh_name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Which kind it is.
    pub fn kind(&self) -> DatabaseKind {
        match self.host {
            Host::Postgres(_) => DatabaseKind::Postgres,
            Host::MariaDb(_) => DatabaseKind::MariaDb,
        }
    }

    /// Its name on the server.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The port on 127.0.0.1 that its server listens on.
    pub fn port(&self) -> u16 {
        match &self.host {
            Host::Postgres(server) => server.port(),
            Host::MariaDb(server) => server.port(),
        }
    }

    /// SPIRE's `connection_string` for it, without TLS.
    pub fn dsn(&self) -> String {
        self.dsn_at(self.port())
    }

    /// The same through another port, a proxy's.
    pub fn dsn_at(&self, port: u16) -> String {
        let name = &self.name;
        match self.kind() {
            DatabaseKind::Postgres => {
                format!("dbname={name} user={USER} password={PASSWORD} host=127.0.0.1 port={port} sslmode=disable")
            }
            DatabaseKind::MariaDb => format!("{USER}:{PASSWORD}@tcp(127.0.0.1:{port})/{name}?parseTime=true"),
        }
    }

    /// Certificates of its server: it takes connections with TLS as well as without.
    pub fn pki(&self) -> &Pki {
        match &self.host {
            Host::Postgres(server) => server.pki(),
            Host::MariaDb(server) => server.pki(),
        }
    }

    /// Runs SQL in it as the superuser and gives what it answered: a line per row, columns separated by tabs, NULL empty
    /// in PostgreSQL and `NULL` in MariaDB. Panics with the database's words when it refuses. Several statements are one
    /// transaction in PostgreSQL.
    #[track_caller]
    pub fn sql(&self, text: &str) -> String {
        self.try_sql(text).ok().stdout
    }

    /// Like [`Self::sql`], for statements that may be refused.
    pub fn try_sql(&self, text: &str) -> Output {
        match &self.host {
            Host::Postgres(server) => server.try_sql(&self.name, text),
            Host::MariaDb(server) => server.try_sql(&self.name, text),
        }
    }

    /// How its tables are made, as the database itself tells it; to be compared with another's.
    pub fn schema(&self) -> String {
        match &self.host {
            Host::Postgres(server) => server.schema(&self.name),
            Host::MariaDb(server) => server.schema(&self.name),
        }
    }

    /// PostgreSQL: how many statements have been run in it so far, by anyone.
    pub fn statements(&self) -> u64 {
        self.statements_by_text().into_values().sum()
    }

    /// The same, how often each; without values, and without those that begin and end transactions.
    pub fn statements_by_text(&self) -> BTreeMap<String, u64> {
        match &self.host {
            Host::Postgres(server) => server.statements(&self.name),
            Host::MariaDb(_) => panic!("MariaDB does not count statements by database"),
        }
    }

    /// Ends all connections to it, as an administrator would.
    pub fn disconnect_all(&self) {
        match &self.host {
            Host::Postgres(server) => server.disconnect_all(&self.name),
            Host::MariaDb(server) => server.disconnect_all(&self.name),
        }
    }

    /// Allows at most `limit` connections of [`USER`]; `None` lifts it. PostgreSQL: to this database. MariaDB: to the whole
    /// server, so take one of your own, and it raises fewer than 10 to 10.
    pub fn limit_connections(&self, limit: Option<u32>) {
        match &self.host {
            Host::Postgres(server) => server.limit_connections(&self.name, limit),
            Host::MariaDb(server) => server.limit_connections(limit),
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        drop(self.session.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        match &self.host {
            Host::Postgres(server) => server.forget(&self.name),
            Host::MariaDb(server) => server.forget(&self.name),
        }
    }
}

/// Says that tests are left out because `what` is not installed; fails where everything was promised to be there
/// (`FINIAL_REAL_SPIRE`, which `./test` sets).
fn missing(what: &str, package: &str) {
    assert!(
        std::env::var_os("FINIAL_REAL_SPIRE").is_none(),
        "{what} is not installed (Debian: apt-get install {package}; ./test does it)"
    );
    // Not eprintln: what tests print is only shown when they fail.
    let _ = writeln!(std::io::stderr(), "\nSKIPPED: {what} is not installed (Debian: apt-get install {package})");
}

/// Whether this process may become another user.
fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The first of the folders on the PATH, and of Debian's `sbin`s, that has this program.
fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    dirs.map(|dir| dir.join(program)).find(|p| p.exists())
}

/// Stops a server process when this process is gone, by the pid on the first line of the server's own file.
struct Watcher(Child);

impl Watcher {
    /// `signal`: its name without SIG. `dir` is removed as well.
    fn start(pid_file: &Path, signal: &str, dir: &Path) -> Self {
        // The pid file goes when the server has ended; asking for the process would wait for whoever is to reap it.
        const SCRIPT: &str = r#"read -r _
pid=$(head -n 1 "$1" 2>/dev/null)
if [ -n "$pid" ] && kill -"$2" "$pid"; then
    i=0
    while [ -e "$1" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
    [ ! -e "$1" ] || kill -KILL "$pid"
fi
rm -rf "$3""#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SCRIPT, "watcher"]).arg(pid_file).arg(signal).arg(dir);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // Not in the terminal's process group: an interrupted test run must not take its watcher with it.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        Self(command.spawn().expect("a shell"))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
