//! A session that holds what it was asked to hold: how a test stops a server in the middle of a write.

use super::{Database, Host, USER};
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::PoisonError;

/// A client that stays.
pub(super) struct Session {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    /// Makes it say [`SAID`].
    mark: &'static str,
}

/// What ends the answer to a statement.
const SAID: &str = "that was all";

impl Session {
    fn begin(host: &Host, name: &str) -> Self {
        let (mut client, mark) = match host {
            Host::Postgres(server) => (server.session_command(name), "\\echo that was all"),
            Host::MariaDb(server) => (server.session_command(name), "SELECT 'that was all';"),
        };
        let mut child = client
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the database's client");
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, stdin, lines, mark }
    }

    /// Runs statements and gives what they answered.
    #[track_caller]
    fn sql(&mut self, text: &str) -> String {
        let stdin = self.stdin.as_mut().expect("until it is dropped");
        writeln!(stdin, "{text};\n{}", self.mark).and_then(|()| stdin.flush()).expect("the client listens");
        let mut answer = String::new();
        for line in self.lines.by_ref().map_while(Result::ok) {
            if line == SAID {
                return answer;
            }
            answer += &line;
            answer.push('\n');
        }
        panic!("the session ended instead of running {text:?}");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// An open transaction; rolled back when dropped.
pub struct Held(#[expect(dead_code, reason = "ends with it")] Session);

impl Database {
    /// [`Self::sql`] by a client that stays, for whoever asks often. Statements are transactions of their own.
    #[track_caller]
    pub fn ask(&self, text: &str) -> String {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.get_or_insert_with(|| Session::begin(&self.host, &self.name)).sql(text)
    }

    /// Begins a transaction, runs `statements` in it and keeps it open.
    #[track_caller]
    pub fn hold(&self, statements: &str) -> Held {
        let mut session = Session::begin(&self.host, &self.name);
        session.sql(&format!("BEGIN; {statements}"));
        Held(session)
    }

    /// Stops whoever writes this table just before it does, with all that the transaction wrote before done; everybody may
    /// read it. On MariaDB after [`Self::prepare_holds`].
    #[track_caller]
    pub fn hold_writes(&self, table: &str) -> Held {
        match self.host {
            Host::Postgres(_) => self.hold(&format!("LOCK TABLE {table} IN SHARE MODE")),
            Host::MariaDb(_) => self.hold(&format!("DO GET_LOCK(CONCAT(DATABASE(), '.{table}'), 0)")),
        }
    }

    /// Lets [`Self::hold_writes`] hold these tables. A lock of MariaDB's own would stop transactions earlier, where they look
    /// at rows that they are going to write.
    pub fn prepare_holds(&self, tables: &[&str]) {
        if let Host::MariaDb(_) = self.host {
            let trigger = |table: &str, event: &str| {
                let name = format!("CONCAT(DATABASE(), '.{table}')");
                // The last lock stays, to tell that somebody else than ourselves has written.
                format!(
                    "CREATE TRIGGER {event}_{table} BEFORE {event} ON {table} FOR EACH ROW DO GET_LOCK({name}, 60), \
                     RELEASE_LOCK({name}), IF(USER() LIKE '{USER}@%', GET_LOCK(CONCAT({name}, ' written ', CONNECTION_ID()), 0), 0);"
                )
            };
            let all = |table: &&str| ["INSERT", "UPDATE", "DELETE"].map(|event| trigger(table, event)).concat();
            self.sql(&tables.iter().map(all).collect::<String>());
        }
    }

    /// Whether a session that waits for a lock has written these tables: in its transaction (PostgreSQL), or since it began
    /// (MariaDB).
    pub fn has_written(&self, tables: &[&str]) -> bool {
        match self.host {
            Host::Postgres(_) => {
                let written = self.ask(
                    "select distinct c.relname from pg_locks l join pg_class c on c.oid = l.relation and c.relkind = 'r' \
                     join pg_stat_activity a on a.pid = l.pid and a.wait_event_type = 'Lock' \
                     where a.datname = current_database() and l.granted and l.mode = 'RowExclusiveLock'",
                );
                let written: Vec<_> = written.lines().collect();
                tables.iter().all(|table| written.contains(table))
            }
            Host::MariaDb(_) => {
                let written =
                    |table: &&str| format!(" and is_used_lock(concat(database(), '.{table} written ', p.id)) = p.id");
                let all: String = tables.iter().map(written).collect();
                let waits = "information_schema.processlist p where p.db = database() and p.state = 'User lock'";
                self.ask(&format!("select count(*) from {waits}{all}")).trim() != "0"
            }
        }
    }

    /// How many sessions of others there are in this database.
    pub fn sessions(&self) -> u32 {
        let sessions = match self.host {
            Host::Postgres(_) => {
                "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() \
                 and backend_type = 'client backend'"
            }
            Host::MariaDb(_) => {
                "select count(*) from information_schema.processlist where db = database() and id <> connection_id()"
            }
        };
        self.ask(sessions).trim().parse().expect("a number")
    }

    /// How many sessions wait for a lock in this database.
    pub fn waiting(&self) -> u32 {
        let waiting = match self.host {
            Host::Postgres(_) => {
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            }
            Host::MariaDb(_) => {
                "select count(*) from information_schema.processlist p where p.db = database() and \
                 (p.state like 'Waiting for table%' or p.state = 'User lock' or exists (select 1 from information_schema.innodb_trx t \
                  where t.trx_mysql_thread_id = p.id and t.trx_state = 'LOCK WAIT'))"
            }
        };
        self.ask(waiting).trim().parse().expect("a number")
    }
}
