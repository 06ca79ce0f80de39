//! A session that holds what it was asked to hold: how a test stops a server in the middle of a write.

use super::{Database, Host};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};

/// An open transaction; rolled back when dropped.
pub struct Held {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Database {
    /// Begins a transaction, runs `statements` in it and keeps it open.
    #[track_caller]
    pub fn hold(&self, statements: &str) -> Held {
        let (mut client, held) = match &self.host {
            Host::Postgres(server) => (server.session_command(&self.name), "\\echo held"),
            Host::MariaDb(server) => (server.session_command(&self.name), "SELECT 'held';"),
        };
        let mut child = client
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the database's client");
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "BEGIN; {statements};\n{held}").and_then(|()| stdin.flush()).expect("the client listens");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let held = stdout.lines().map_while(Result::ok).any(|line| line == "held");
        assert!(held, "the session ended instead of holding {statements:?}");
        Held { child, stdin: Some(stdin) }
    }

    /// How many sessions wait for a lock in this database.
    pub fn waiting(&self) -> u32 {
        let waiting = match self.host {
            Host::Postgres(_) => {
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            }
            Host::MariaDb(_) => {
                "select count(*) from information_schema.processlist p where p.db = database() and \
                 (p.state like 'Waiting for table%' or exists (select 1 from information_schema.innodb_trx t \
                  where t.trx_mysql_thread_id = p.id and t.trx_state = 'LOCK WAIT'))"
            }
        };
        self.sql(waiting).trim().parse().expect("a number")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}
