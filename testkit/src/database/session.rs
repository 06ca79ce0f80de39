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
    /// PostgreSQL: begins a transaction, runs `statements` in it and keeps it open.
    #[track_caller]
    pub fn hold(&self, statements: &str) -> Held {
        let Host::Postgres(server) = &self.host else { panic!("only PostgreSQL sessions can be held") };
        let mut child = server
            .session_command(&self.name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("psql");
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "BEGIN; {statements};\n\\echo held").and_then(|()| stdin.flush()).expect("psql listens");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let held = stdout.lines().map_while(Result::ok).any(|line| line == "held");
        assert!(held, "the session ended instead of holding {statements:?}");
        Held { child, stdin: Some(stdin) }
    }

    /// PostgreSQL: how many sessions wait for a lock in this database.
    pub fn waiting(&self) -> u32 {
        let waiting =
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
        self.sql(waiting).trim().parse().expect("a number")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}
