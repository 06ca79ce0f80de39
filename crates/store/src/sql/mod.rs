//! The SQL layer: one text for three databases. Statements are written once, with `?` for values ([`Query`]); what the
//! databases do differently is a method of [`Dialect`], and nothing else of the crate names a database.

mod conn;
mod fault;
mod literal;
mod pool;
mod query;
mod row;
mod time;

pub(crate) use conn::{Conn, Connector, POSTGRES_SETUP};
pub(crate) use fault::Place;
pub(crate) use pool::{ACQUIRE_MAX, Pool, Pooled};
pub(crate) use query::{Query, Value, insert_rows, rows_query};
pub(crate) use row::Row;
pub(crate) use time::{Moment, parse_time};

/// At most this many values in one `IN` list.
pub(crate) const LIST_MAX: usize = 500;

/// Which database it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
    /// MySQL and MariaDB.
    MySql,
}

impl Dialect {
    /// SPIRE's name of it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite3",
            Self::Postgres => "postgres",
            Self::MySql => "mysql",
        }
    }

    /// Begins a transaction that writes.
    pub(crate) fn begin_write(self) -> &'static str {
        match self {
            // takes the lock at once: a transaction that reads first and writes later could fail in between
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN",
            // the stricter level locks gaps between rows, and agents that attest side by side would wait for each other
            Self::MySql => "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION",
        }
    }

    /// Begins a transaction whose statements all see one moment. Reading everything may take longer than one statement.
    pub(crate) fn begin_read(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN",
            Self::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL statement_timeout = 0",
            Self::MySql => "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION READ ONLY",
        }
    }

    /// Asks for the version of the database itself.
    pub(crate) fn version(self) -> &'static str {
        match self {
            Self::Sqlite => "SELECT sqlite_version()",
            Self::Postgres => "SHOW server_version",
            Self::MySql => "SELECT VERSION()",
        }
    }

    /// Ends a `SELECT` of rows that this transaction will change. SQLite has one writer, which needs no such lock.
    pub(crate) fn for_update(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres | Self::MySql => " FOR UPDATE",
        }
    }

    /// Ends a `SELECT` of rows that must not go before this transaction ends.
    pub(crate) fn for_share(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " FOR KEY SHARE",
            Self::MySql => " LOCK IN SHARE MODE",
        }
    }

    /// Whether an insertion, update or deletion can answer with the rows.
    pub(crate) fn has_returning(self) -> bool {
        self != Self::MySql
    }

    /// What stands between `(a, b) IN (` and `)` before the pairs.
    pub(crate) fn pairs(self) -> &'static str {
        match self {
            Self::Sqlite | Self::Postgres => "VALUES ",
            Self::MySql => "",
        }
    }

    /// What the database says of a second row where the first has this value of a unique column.
    pub(crate) fn duplicate(self, table: &str, column: &str, value: &str) -> String {
        match self {
            Self::Sqlite => format!("UNIQUE constraint failed: {table}.{column}"),
            Self::Postgres => {
                format!("pq: duplicate key value violates unique constraint \"uix_{table}_{column}\" (23505)")
            }
            Self::MySql => format!("Error 1062 (23000): Duplicate entry '{value}' for key 'uix_{table}_{column}'"),
        }
    }
}
