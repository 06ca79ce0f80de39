//! One connection to whichever database it is, and how it is made.

use super::{Dialect, Place, Query, Row, Value, literal, time::time_text};
use crate::StoreError;
use crate::dsn::mysql::MySqlDsn;
use crate::dsn::postgres::PostgresDsn;
use futures::{FutureExt, TryStreamExt};
use sqlx::mysql::{MySqlArguments, MySqlConnectOptions};
use sqlx::postgres::{PgArguments, PgConnectOptions};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, SqlSafeStr, SqlStr};
use sqlx::{MySqlConnection, PgConnection, SqliteConnection};
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a statement may take on a database server, from its sending to its answer.
const STATEMENT_MAX: Duration = Duration::from_secs(30);
/// How long connecting to a database server may take, logging in included.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// What each connection to a server begins with: a statement whose caller is gone ends, and so does a transaction whose
/// caller is gone, whose locks would stop everybody else.
pub(crate) const POSTGRES_SETUP: &str =
    "SET statement_timeout = '30s'; SET lock_timeout = '20s'; SET idle_in_transaction_session_timeout = '60s'";
/// The same. The second is for a table's definition, for which it would otherwise wait a day, and all others behind it.
const MYSQL_SETUP: &str = "SET SESSION innodb_lock_wait_timeout = 20, lock_wait_timeout = 20";
/// Whatever the connection string says of `sql_mode`: values that do not fit are refused rather than cut off, and `||`
/// concatenates.
const MYSQL_MODE: &str = "SET SESSION sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES,PIPES_AS_CONCAT')";

/// How to connect.
#[derive(Clone)]
pub(crate) struct Connector {
    options: Options,
    place: Arc<Place>,
    statement_max: Duration,
}

#[derive(Clone)]
enum Options {
    Sqlite(Box<SqliteConnectOptions>),
    Postgres {
        hosts: Vec<PgConnectOptions>,
        /// Which one served last.
        last: Arc<AtomicUsize>,
        writable: bool,
        connect_max: Duration,
    },
    MySql {
        options: Box<MySqlConnectOptions>,
        setup: String,
        connect_max: Duration,
    },
}

/// A connection.
pub(crate) struct Conn {
    link: Link,
    place: Arc<Place>,
    opened: Instant,
    state: State,
    news: bool,
    statement_max: Duration,
}

/// Whether a connection may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// A statement runs: a caller that gives up now leaves a connection in the middle of an answer.
    Busy,
    /// It is of no more use, and its server may be gone.
    Dead,
}

enum Link {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
    MySql(MySqlConnection),
}

impl Connector {
    pub(crate) fn sqlite(options: SqliteConnectOptions, place: Place) -> Self {
        Self { options: Options::Sqlite(Box::new(options)), place: Arc::new(place), statement_max: STATEMENT_MAX }
    }

    pub(crate) fn postgres(dsn: PostgresDsn) -> Self {
        let hosts = dsn.hosts.into_iter().map(ConnectOptions::disable_statement_logging).collect();
        let connect_max = dsn.connect_max.unwrap_or(CONNECT_MAX);
        let options = Options::Postgres { hosts, last: Arc::default(), writable: dsn.writable, connect_max };
        Self { options, place: Arc::new(Place::Server(dsn.name)), statement_max: STATEMENT_MAX }
    }

    pub(crate) fn mysql(dsn: MySqlDsn) -> Self {
        let options = Options::MySql {
            options: Box::new(dsn.options.disable_statement_logging()),
            setup: dsn.setup,
            connect_max: dsn.connect_max.unwrap_or(CONNECT_MAX),
        };
        Self { options, place: Arc::new(Place::Server(dsn.name)), statement_max: STATEMENT_MAX }
    }

    /// How long a statement may take, if not [`STATEMENT_MAX`].
    pub(crate) fn set_statement_max(&mut self, most: Duration) {
        self.statement_max = most;
    }

    /// Where the data is.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn dialect(&self) -> Dialect {
        match &self.options {
            Options::Sqlite(_) => Dialect::Sqlite,
            Options::Postgres { .. } => Dialect::Postgres,
            Options::MySql { .. } => Dialect::MySql,
        }
    }

    /// What a listening connection is made with.
    pub(crate) fn postgres_options(&self) -> Option<PgConnectOptions> {
        match &self.options {
            Options::Postgres { hosts, last, .. } => hosts.get(last.load(Ordering::Relaxed)).cloned(),
            _ => None,
        }
    }

    /// What an error of the driver means.
    pub(crate) fn fault(&self, error: sqlx::Error) -> StoreError {
        self.place.fault(error).0
    }

    pub(crate) async fn connect(&self) -> Result<Conn, StoreError> {
        match &self.options {
            Options::Sqlite(options) => {
                let link = options.connect().await.map(Link::Sqlite);
                self.opened(link)
            }
            Options::Postgres { hosts, last, writable, connect_max } => {
                let mut failed = None;
                for (at, options) in hosts.iter().enumerate() {
                    match self.connect_postgres(options, *writable, *connect_max).await {
                        Ok(conn) => {
                            last.store(at, Ordering::Relaxed);
                            return Ok(conn);
                        }
                        Err(error) => failed = Some(error),
                    }
                }
                Err(failed.unwrap_or(StoreError::NotFound))
            }
            Options::MySql { options, setup, connect_max } => {
                let link = limited(*connect_max, options.connect().boxed()).await.map(Link::MySql);
                let mut conn = self.opened(link)?;
                conn.control(MYSQL_SETUP).await?;
                if !setup.is_empty() {
                    conn.run(setup.clone()).await?;
                }
                conn.control(MYSQL_MODE).await?;
                Ok(conn)
            }
        }
    }

    async fn connect_postgres(
        &self,
        options: &PgConnectOptions,
        writable: bool,
        connect_max: Duration,
    ) -> Result<Conn, StoreError> {
        let link = limited(connect_max, options.connect().boxed()).await.map(Link::Postgres);
        let mut conn = self.opened(link)?;
        conn.control(POSTGRES_SETUP).await?;
        if writable && conn.one(Query::new("SHOW transaction_read_only")).await?.str(0)? == "on" {
            let text = "it cannot be written, and target_session_attrs asks for a server that can";
            return Err(self.fault(sqlx::Error::Io(std::io::Error::other(text))));
        }
        Ok(conn)
    }

    fn opened(&self, link: Result<Link, sqlx::Error>) -> Result<Conn, StoreError> {
        let link = link.map_err(|e| self.fault(e))?;
        let (place, opened, statement_max) = (self.place.clone(), Instant::now(), self.statement_max);
        Ok(Conn { link, place, opened, state: State::Ready, news: false, statement_max })
    }
}

impl std::fmt::Debug for Connector {
    /// Without what may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Connector").field(&self.place).finish()
    }
}

async fn limited<T>(most: Duration, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    match tokio::time::timeout(most, work).await {
        Ok(result) => result,
        Err(_) => {
            let text = format!("no answer within {} s", most.as_secs());
            Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, text)))
        }
    }
}

/// Runs `$work` on the driver's own connection and query; `$q` is made from a [`Query`].
macro_rules! with_driver {
    ($self:ident, $query:ident, |$conn:ident, $q:ident| $work:expr) => {{
        let persistent = $query.persistent;
        let text = sql_str(Query::text_for($query.text, $self.dialect()));
        $self.state = State::Busy;
        let result = match &mut $self.link {
            Link::Sqlite($conn) => match sqlite_arguments(&$query.values) {
                Ok(arguments) => {
                    let $q = sqlx::query_with(text, arguments).persistent(persistent);
                    $work.await.map(Into::into)
                }
                Err(e) => Err(e),
            },
            Link::Postgres($conn) => match postgres_arguments(&$query.values) {
                Ok(arguments) => {
                    let $q = sqlx::query_with(text, arguments).persistent(persistent);
                    limited($self.statement_max, $work).await.map(Into::into)
                }
                Err(e) => Err(e),
            },
            Link::MySql($conn) if !persistent => {
                let $q = sqlx::raw_sql(AssertSqlSafe(literal::inlined(text.as_str(), &$query.values)));
                limited($self.statement_max, $work).await.map(Into::into)
            }
            Link::MySql($conn) => match mysql_arguments(&$query.values) {
                Ok(arguments) => {
                    let $q = sqlx::query_with(text, arguments).persistent(persistent);
                    limited($self.statement_max, $work).await.map(Into::into)
                }
                Err(e) => Err(e),
            },
        };
        $self.judged(result)
    }};
}

impl Conn {
    pub(crate) fn dialect(&self) -> Dialect {
        match &self.link {
            Link::Sqlite(_) => Dialect::Sqlite,
            Link::Postgres(_) => Dialect::Postgres,
            Link::MySql(_) => Dialect::MySql,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// What the transaction writes concerns whoever follows this database: they are told when it commits.
    pub(crate) fn set_news(&mut self) {
        self.news = true;
    }

    pub(crate) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// How long it has been open.
    pub(crate) fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// Runs a statement and returns how many rows it concerned.
    pub(crate) async fn execute(&mut self, query: Query<'_>) -> Result<u64, StoreError> {
        let done: Done = with_driver!(self, query, |conn, q| q.execute(conn))?;
        Ok(done.rows)
    }

    /// Runs statements one after the other.
    pub(crate) async fn execute_all(&mut self, queries: Vec<Query<'_>>) -> Result<(), StoreError> {
        for query in queries {
            self.execute(query).await?;
        }
        Ok(())
    }

    /// Runs the insertion of one row and returns its `id`.
    pub(crate) async fn insert(&mut self, mut query: Query<'_>) -> Result<i64, StoreError> {
        if self.dialect().has_returning() {
            query.push(" RETURNING id");
            return self.one(query).await?.int(0);
        }
        let done: Done = with_driver!(self, query, |conn, q| q.execute(conn))?;
        i64::try_from(done.id)
            .map_err(|e| StoreError::BadRow { what: format!("row ID {}", done.id), cause: e.to_string() })
    }

    /// All rows.
    pub(crate) async fn all(&mut self, query: Query<'_>) -> Result<Vec<Row>, StoreError> {
        let rows: Rows = with_driver!(self, query, |conn, q| q.fetch_all(conn))?;
        Ok(rows.0)
    }

    /// The first row if there is one.
    pub(crate) async fn optional(&mut self, query: Query<'_>) -> Result<Option<Row>, StoreError> {
        Ok(self.all(query).await?.into_iter().next())
    }

    /// The first row, `NotFound` without one.
    pub(crate) async fn one(&mut self, query: Query<'_>) -> Result<Row, StoreError> {
        self.optional(query).await?.ok_or(StoreError::NotFound)
    }

    /// Hands each row over as it comes, without keeping it; the deadline holds for each row.
    pub(crate) async fn each(
        &mut self,
        query: Query<'_>,
        mut take: impl FnMut(&Row) -> Result<(), StoreError> + Send,
    ) -> Result<(), StoreError> {
        let (persistent, most) = (query.persistent, self.statement_max);
        let text = sql_str(Query::text_for(query.text, self.dialect()));
        self.state = State::Busy;
        let result = match &mut self.link {
            Link::Sqlite(conn) => {
                let q = sqlx::query_with(text, sqlite_arguments(&query.values)?).persistent(persistent);
                drain(most, q.fetch(conn).map_ok(Row::Sqlite), &mut take).await
            }
            Link::Postgres(conn) => {
                let q = sqlx::query_with(text, postgres_arguments(&query.values)?).persistent(persistent);
                drain(most, q.fetch(conn).map_ok(Row::Postgres), &mut take).await
            }
            Link::MySql(conn) if !persistent => {
                let q = sqlx::raw_sql(AssertSqlSafe(literal::inlined(text.as_str(), &query.values)));
                drain(most, q.fetch(conn).map_ok(Row::MySql), &mut take).await
            }
            Link::MySql(conn) => {
                let q = sqlx::query_with(text, mysql_arguments(&query.values)?).persistent(persistent);
                drain(most, q.fetch(conn).map_ok(Row::MySql), &mut take).await
            }
        };
        match result {
            Ok(taken) => self.judged(Ok(())).and(taken),
            Err(error) => self.judged(Err(error)),
        }
    }

    /// Runs statements without values, several of them with `;` between; on SQLite the text is kept prepared.
    pub(crate) async fn control(&mut self, statements: &'static str) -> Result<(), StoreError> {
        self.state = State::Busy;
        let result = match &mut self.link {
            Link::Sqlite(conn) => sqlx::query(statements).execute(conn).await.map(drop),
            Link::Postgres(conn) => {
                limited(self.statement_max, sqlx::raw_sql(statements).execute(conn)).await.map(drop)
            }
            Link::MySql(conn) => limited(self.statement_max, sqlx::raw_sql(statements).execute(conn)).await.map(drop),
        };
        self.judged(result)
    }

    /// The same for a text that is made, which is not kept.
    pub(crate) async fn run(&mut self, statements: String) -> Result<u64, StoreError> {
        let text = AssertSqlSafe(statements);
        self.state = State::Busy;
        let result = match &mut self.link {
            Link::Sqlite(conn) => sqlx::query(text).persistent(false).execute(conn).await.map(|d| d.rows_affected()),
            Link::Postgres(conn) => {
                limited(self.statement_max, sqlx::raw_sql(text).execute(conn)).await.map(|d| d.rows_affected())
            }
            Link::MySql(conn) => {
                limited(self.statement_max, sqlx::raw_sql(text).execute(conn)).await.map(|d| d.rows_affected())
            }
        };
        self.judged(result)
    }

    /// Begins to undo a transaction whose caller is gone: SQLite's thread does so before whatever comes next, a
    /// connection to a server is not used again, and its end is the end of the transaction.
    pub(crate) fn abandon(&mut self, rollback: &'static str) {
        match &mut self.link {
            // polled once it is in line before whatever the next borrower sends; nobody waits for its result
            Link::Sqlite(conn) => drop(sqlx::query(rollback).execute(conn).now_or_never()),
            _ => self.state = State::Busy,
        }
    }

    /// Whether the server still answers.
    pub(crate) async fn answers(&mut self, most: Duration) -> bool {
        self.state = State::Busy;
        let answer = match &mut self.link {
            Link::Sqlite(_) => Ok(()),
            Link::Postgres(conn) => limited(most, conn.ping()).await,
            Link::MySql(conn) => limited(most, conn.ping()).await,
        };
        self.state = if answer.is_ok() { State::Ready } else { State::Dead };
        answer.is_ok()
    }

    /// Ends it in good order.
    pub(crate) async fn close(self) {
        let closed = match self.link {
            Link::Sqlite(conn) => conn.close().await,
            Link::Postgres(conn) => limited(CONNECT_MAX, conn.close()).await,
            Link::MySql(conn) => limited(CONNECT_MAX, conn.close()).await,
        };
        if let Err(error) = closed {
            tracing::debug!(%error, "closing a connection to the database failed");
        }
    }

    fn judged<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, StoreError> {
        match result {
            Ok(value) => {
                self.state = State::Ready;
                Ok(value)
            }
            Err(error) => {
                let (error, broken) = self.place.fault(error);
                self.state = if broken { State::Dead } else { State::Ready };
                Err(error)
            }
        }
    }
}

/// The outer error is the driver's, the inner one the taker's, after which nothing more is read.
async fn drain(
    most: Duration,
    mut rows: impl futures::Stream<Item = Result<Row, sqlx::Error>> + Unpin,
    take: &mut (impl FnMut(&Row) -> Result<(), StoreError> + Send),
) -> Result<Result<(), StoreError>, sqlx::Error> {
    while let Some(row) = limited(most, rows.try_next()).await? {
        if let Err(error) = take(&row) {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// How many rows, and the ID that the last insertion made (MySQL).
struct Done {
    rows: u64,
    id: u64,
}

impl From<sqlx::sqlite::SqliteQueryResult> for Done {
    fn from(done: sqlx::sqlite::SqliteQueryResult) -> Self {
        Self { rows: done.rows_affected(), id: 0 }
    }
}

impl From<sqlx::postgres::PgQueryResult> for Done {
    fn from(done: sqlx::postgres::PgQueryResult) -> Self {
        Self { rows: done.rows_affected(), id: 0 }
    }
}

impl From<sqlx::mysql::MySqlQueryResult> for Done {
    fn from(done: sqlx::mysql::MySqlQueryResult) -> Self {
        Self { rows: done.rows_affected(), id: done.last_insert_id() }
    }
}

struct Rows(Vec<Row>);

impl From<Vec<sqlx::sqlite::SqliteRow>> for Rows {
    fn from(rows: Vec<sqlx::sqlite::SqliteRow>) -> Self {
        Self(rows.into_iter().map(Row::Sqlite).collect())
    }
}

impl From<Vec<sqlx::postgres::PgRow>> for Rows {
    fn from(rows: Vec<sqlx::postgres::PgRow>) -> Self {
        Self(rows.into_iter().map(Row::Postgres).collect())
    }
}

impl From<Vec<sqlx::mysql::MySqlRow>> for Rows {
    fn from(rows: Vec<sqlx::mysql::MySqlRow>) -> Self {
        Self(rows.into_iter().map(Row::MySql).collect())
    }
}

fn sql_str(text: Cow<'static, str>) -> SqlStr {
    match text {
        Cow::Borrowed(text) => text.into_sql_str(),
        Cow::Owned(text) => AssertSqlSafe(text).into_sql_str(),
    }
}

macro_rules! arguments {
    ($name:ident, $arguments:ty, |$time:ident| $moment:expr) => {
        fn $name(values: &[Value<'_>]) -> Result<$arguments, sqlx::Error> {
            let mut arguments = <$arguments>::default();
            for value in values {
                let added = match value {
                    Value::Int(value) => arguments.add(*value),
                    Value::Bool(value) => arguments.add(*value),
                    Value::Text(value) => arguments.add(value.as_ref()),
                    Value::Blob(value) => arguments.add(value.as_deref()),
                    Value::Time(value) => arguments.add(value.map(|$time| $moment)),
                };
                added.map_err(sqlx::Error::Encode)?;
            }
            Ok(arguments)
        }
    };
}

arguments!(sqlite_arguments, SqliteArguments, |moment| time_text(moment));
arguments!(postgres_arguments, PgArguments, |moment| moment.utc());
arguments!(mysql_arguments, MySqlArguments, |moment| moment.utc());
