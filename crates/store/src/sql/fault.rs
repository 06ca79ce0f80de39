//! What the drivers and databases say, sorted by whose fault it is and by what to do.

use crate::StoreError;
use std::path::PathBuf;

/// Where the data is, as messages name it: never with a user's password.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// SQLite without a file.
    Memory,
    /// SQLite.
    File(PathBuf),
    /// A database server.
    Server(String),
}

const RUNS: &str = "check that it runs and that connection_string names it";
const RESTARTS: &str = "it was restarted, failed over or stopped; the next call connects anew";
const SLOW: &str = "check its load, its locks and the network to it";
const CONNECTIONS: &str = "raise its limit, or lower max_open_conns of its users";
const READ_ONLY: &str =
    "connection_string must lead to the primary: a standby or a server in read-only mode cannot be written";
const FULL: &str = "free space there: nothing of the failed change was kept";
const LOGIN: &str = "check user, password and database name in connection_string";
const TLS: &str = "check the TLS settings in connection_string, and root_ca_path";

impl Place {
    /// The error that a caller sees, and whether the connection is of no more use.
    pub(super) fn fault(&self, error: sqlx::Error) -> (StoreError, bool) {
        let Self::Server(name) = self else { return (self.file_fault(error), false) };
        let away =
            |detail: String, advice: &'static str| StoreError::Unavailable { what: name.clone(), detail, advice };
        match error {
            sqlx::Error::Database(db) => {
                let (message, code) = (db.message().to_owned(), db.code().unwrap_or_default().into_owned());
                match db.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
                    Some(my) => {
                        let number = my.number();
                        let text = format!("Error {number} ({code}): {message}");
                        mysql_fault(number, text, away)
                    }
                    None => postgres_fault(&code, format!("pq: {message} ({code})"), away),
                }
            }
            sqlx::Error::Io(e) => (io_fault(&e, away), true),
            sqlx::Error::Tls(e) => (away(format!("cannot be reached with TLS ({e})"), TLS), true),
            sqlx::Error::Protocol(text) => (away(format!("ended the conversation ({text})"), RESTARTS), true),
            other => (StoreError::from(other), true),
        }
    }

    /// Turns what SQLite says of its file into an error that names the file and what to do.
    fn file_fault(&self, error: sqlx::Error) -> StoreError {
        let path = match self {
            Self::File(path) => path.clone(),
            _ => PathBuf::from("(in memory)"),
        };
        let sqlx::Error::Database(db) = &error else { return StoreError::from(error) };
        let detail = db.message().to_owned();
        // the low byte of SQLite's extended result codes is the primary one
        match db.code().and_then(|c| c.parse::<u32>().ok()).map(|c| c & 0xff) {
            Some(5 | 6) => StoreError::Locked { path, detail: String::new() },
            Some(8) => StoreError::ReadOnly { path, detail },
            Some(10) => StoreError::Io { path, detail },
            Some(11 | 26) => StoreError::Corrupt { path, detail },
            Some(13) => StoreError::Full { path, detail },
            Some(14) => StoreError::CannotOpen { path, detail },
            Some(19) => StoreError::AlreadyExists(detail),
            _ => StoreError::Sql(error),
        }
    }
}

fn io_fault(error: &std::io::Error, away: impl Fn(String, &'static str) -> StoreError) -> StoreError {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => away("refuses connections".into(), RUNS),
        Kind::TimedOut => away(format!("does not answer ({error})"), SLOW),
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::UnexpectedEof => {
            away(format!("ended the connection ({error})"), RESTARTS)
        }
        // what rustls refuses comes so
        Kind::InvalidData => away(format!("cannot be reached with TLS ({error})"), TLS),
        _ => away(format!("cannot be reached ({error})"), RUNS),
    }
}

/// By SQLSTATE: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
fn postgres_fault(code: &str, text: String, away: impl Fn(String, &'static str) -> StoreError) -> (StoreError, bool) {
    let says = |advice| away(format!("says: {text}"), advice);
    match code {
        "40001" | "40P01" | "55P03" => (StoreError::Contended(text), false),
        // the connection is fine, what it leads to is not: a new one may lead to another server
        "25006" => (says(READ_ONLY), true),
        "53300" => (says(CONNECTIONS), true),
        "57014" => (says(SLOW), false),
        "53100" => (says(FULL), false),
        "28000" | "28P01" | "3D000" => (says(LOGIN), true),
        _ => match code.get(..2) {
            Some("23") => (StoreError::AlreadyExists(text), false),
            Some("08" | "57") => (says(RESTARTS), true),
            Some("53" | "58") => (says(SLOW), true),
            _ => (StoreError::Database(text), false),
        },
    }
}

/// By MySQL's and MariaDB's error numbers.
fn mysql_fault(number: u16, text: String, away: impl Fn(String, &'static str) -> StoreError) -> (StoreError, bool) {
    let says = |advice| away(format!("says: {text}"), advice);
    match number {
        1205 | 1213 => (StoreError::Contended(text), false),
        1062 => (StoreError::AlreadyExists(text), false),
        1290 | 1792 | 1836 => (says(READ_ONLY), true),
        1040 | 1203 | 1226 => (says(CONNECTIONS), true),
        1021 | 1114 => (says(FULL), false),
        1044 | 1045 | 1049 | 1698 => (says(LOGIN), true),
        1317 | 1969 | 3024 => (says(SLOW), false),
        1053 | 1129 | 1130 | 1158..=1161 | 1927 | 4031 => (says(RESTARTS), true),
        _ => (StoreError::Database(text), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::ErrorKind;

    fn away(detail: String, advice: &'static str) -> StoreError {
        StoreError::Unavailable { what: "PostgreSQL at db:5432 (spire)".into(), detail, advice }
    }

    #[test]
    fn the_states_of_postgresql_are_told_apart() {
        for (code, kind, broken) in [
            ("57P01", ErrorKind::Unavailable, true),
            ("57P03", ErrorKind::Unavailable, true),
            ("25006", ErrorKind::Unavailable, true),
            ("53300", ErrorKind::Unavailable, true),
            ("08006", ErrorKind::Unavailable, true),
            ("57014", ErrorKind::Unavailable, false),
            ("40001", ErrorKind::Unavailable, false),
            ("23505", ErrorKind::AlreadyExists, false),
            ("42P01", ErrorKind::Internal, false),
        ] {
            let (error, useless) = postgres_fault(code, "pq: x".into(), away);
            assert_eq!((error.kind(), useless), (kind, broken), "{code}");
        }
        let (error, _) =
            postgres_fault("25006", "pq: cannot execute INSERT in a read-only transaction (25006)".into(), away);
        assert_eq!(
            error.to_string(),
            "datastore-sql: PostgreSQL at db:5432 (spire) says: pq: cannot execute INSERT in a read-only transaction (25006); connection_string must lead to the primary: a standby or a server in read-only mode cannot be written"
        );
    }

    #[test]
    fn the_numbers_of_mysql_are_told_apart() {
        for (number, kind, broken) in [
            (1290, ErrorKind::Unavailable, true),
            (1040, ErrorKind::Unavailable, true),
            (1213, ErrorKind::Unavailable, false),
            (1062, ErrorKind::AlreadyExists, false),
            (1054, ErrorKind::Internal, false),
        ] {
            let (error, useless) = mysql_fault(number, "Error".into(), away);
            assert_eq!((error.kind(), useless), (kind, broken), "{number}");
        }
    }
}
