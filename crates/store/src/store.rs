//! The handle: the lock, the connections, and how a transaction begins and ends.

use crate::connections::{ACQUIRE_MAX, Readers, Tx, Writer};
use crate::sql::{BEGIN_READ, BEGIN_WRITE, Columns, Conn, DB_VERSION, time_text};
use crate::{StoreError, StoreSettings, migrations};
use finial_core::Clock;
use finial_runtime::Metrics;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a write waits for another process (a backup, `sqlite3`) that holds the database.
const FOREIGN_LOCK_MAX: Duration = Duration::from_secs(5);
/// How long a reading connection is kept that nobody uses.
const READER_IDLE_MAX: Duration = Duration::from_secs(30);
/// Page cache of one connection, KiB. The server answers from memory, so the store needs little.
const PAGE_CACHE_KIB: u32 = 512;

/// A handle to the open datastore; clones share it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    metrics: Metrics,
}

struct Inner {
    writer: Writer,
    readers: Readers,
    clock: Arc<dyn Clock>,
    path: Option<PathBuf>,
    // held, never read: the lock lasts as long as the handle
    _lock: Option<File>,
}

impl Store {
    /// Opens (and, if new, creates) the database, takes its lock for the life of this handle, and migrates the schema.
    pub async fn open(settings: StoreSettings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let lock = match &settings.path {
            Some(path) if !settings.read_only => Some(lock(path)?),
            _ => None,
        };
        let path = settings.path.clone();
        tracing::info!(subsystem_name = "sql", db_type = "sqlite3", "Opening SQL database");
        let opened = connect(&settings).await;
        let (writer, readers) = opened.map_err(|e| StoreError::from(e).at(path.as_deref()))?;
        let store =
            Self { inner: Arc::new(Inner { writer, readers, clock, path, _lock: lock }), metrics: Metrics::disabled() };
        let version = if settings.read_only {
            let mut tx = store.read().await?;
            store.seen(migrations::check(&mut tx).await)?;
            store.seen(database_version(&mut tx).await)?
        } else {
            let mut tx = store.begin().await?;
            let version = store.seen(database_version(&mut tx).await)?;
            let migrated = migrations::run(&mut tx, settings.disable_migration, &store.now_text()).await;
            store.finish(tx, migrated).await?;
            version
        };
        let read_only = settings.read_only;
        tracing::info!(subsystem_name = "sql", read_only, r#type = "sqlite3", version, "Connected to SQL database");
        Ok(store)
    }

    /// Waits for running work, folds the write-ahead log into the file, and lets the lock go with the last clone.
    pub async fn close(&self) {
        self.inner.readers.close().await;
        self.inner.writer.close().await;
    }

    /// The same store, whose calls are counted under SPIRE's names (`datastore.node.create`); a batch is one call.
    #[must_use]
    pub fn with_metrics(self, metrics: Metrics) -> Self {
        Self { metrics, ..self }
    }

    /// Counts and times one call.
    pub(crate) async fn counted<T>(
        &self,
        key: &'static str,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let call = self.metrics.call(key);
        let result = work.await;
        call.finish_with(&result, StoreError::kind);
        result
    }

    /// Begins a writing transaction. End it with [`Store::finish`]; dropped, it is rolled back.
    pub(crate) async fn begin(&self) -> Result<Tx, StoreError> {
        self.seen(self.inner.writer.begin(BEGIN_WRITE).await)
    }

    /// The writing connection for statements that begin a transaction themselves; ends like one of [`Store::begin`].
    pub(crate) async fn lend(&self) -> Result<Tx, StoreError> {
        self.seen(self.inner.writer.lend().await)
    }

    /// Commits what went well (durable when this returns), rolls back what did not.
    pub(crate) async fn finish<T>(&self, tx: Tx, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match result {
            Ok(value) => self.seen(tx.commit().await.map_err(StoreError::from)).map(|()| value),
            Err(error) => {
                tx.rollback().await;
                self.seen(Err(error))
            }
        }
    }

    /// A reading transaction: one consistent view, until it is dropped.
    pub(crate) async fn read(&self) -> Result<Tx, StoreError> {
        self.seen(self.inner.readers.begin(&self.inner.writer).await)
    }

    /// The same for a start, when nobody writes yet: another connection would cost a thread and a page cache.
    pub(crate) async fn read_at_start(&self) -> Result<Tx, StoreError> {
        self.seen(self.inner.writer.begin(BEGIN_READ).await)
    }

    /// A connection for a single statement that reads a few rows, which needs no transaction to be of one moment.
    pub(crate) async fn connection(&self) -> Result<Tx, StoreError> {
        self.seen(self.inner.readers.brief(&self.inner.writer).await)
    }

    /// Gives an error of the database its place and its advice.
    pub(crate) fn seen<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.map_err(|e| e.at(self.inner.path.as_deref()))
    }

    /// Now, as the text of a time column.
    pub(crate) fn now_text(&self) -> String {
        time_text(self.inner.clock.now_ms())
    }
}

impl StoreSettings {
    fn connect_options(&self) -> SqliteConnectOptions {
        let options = SqliteConnectOptions::new()
            .foreign_keys(true)
            .busy_timeout(FOREIGN_LOCK_MAX)
            .pragma("cache_size", format!("-{PAGE_CACHE_KIB}"))
            .thread_name(|n| format!("store-{n}"));
        match &self.path {
            Some(path) => options.filename(path).read_only(self.read_only),
            None => options.in_memory(true),
        }
    }
}

async fn connect(settings: &StoreSettings) -> Result<(Writer, Readers), sqlx::Error> {
    let mut options = settings.connect_options();
    if !settings.read_only {
        options = options.create_if_missing(true);
        if settings.path.is_some() {
            // FULL: a commit is on disk before it is answered, whatever happens to the process or to the power
            options = options.journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full);
        }
    }
    let writer = Writer::open(options).await?;
    if settings.path.is_none() {
        return Ok((writer, Readers::Writer));
    }
    let pool = SqlitePoolOptions::new()
        .acquire_timeout(ACQUIRE_MAX)
        .max_lifetime(None)
        .test_before_acquire(false)
        .max_connections(settings.readers_max.max(1))
        .idle_timeout(READER_IDLE_MAX);
    Ok((writer, Readers::Pool(pool.connect_lazy_with(settings.connect_options().read_only(true)))))
}

/// Makes sure that no second server works on the same file: the kernel drops the lock when the process ends.
fn lock(database: &Path) -> Result<File, StoreError> {
    // through links, too: the lock stands beside the file itself
    let mut name = std::fs::canonicalize(database).unwrap_or_else(|_| database.to_path_buf()).into_os_string();
    name.push(".lock");
    let cannot = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::StorageFull => StoreError::Full { path: database.into(), detail: e.to_string() },
        std::io::ErrorKind::ReadOnlyFilesystem | std::io::ErrorKind::PermissionDenied => {
            StoreError::ReadOnly { path: database.into(), detail: e.to_string() }
        }
        _ => StoreError::CannotOpen { path: database.into(), detail: e.to_string() },
    };
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&name).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let read = (&mut file).take(32).read_to_string(&mut holder);
            let detail = match read {
                Ok(_) if !holder.is_empty() => format!(" (pid {})", holder.trim()),
                _ => String::new(),
            };
            return Err(StoreError::Locked { path: database.into(), detail });
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(cannot(e)),
    }
    // the pid only serves the message above
    let noted = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    if let Err(e) = noted {
        tracing::debug!(error = %e, "lock file not written");
    }
    Ok(file)
}

async fn database_version(conn: &mut Conn) -> Result<String, StoreError> {
    Columns(&sqlx::query(DB_VERSION).fetch_one(conn).await?).text(0)
}

/// Runs a statement without values; the text is ours, never a caller's.
pub(crate) async fn run(conn: &mut Conn, statement: String) -> Result<u64, StoreError> {
    Ok(sqlx::query(sqlx::AssertSqlSafe(statement)).persistent(false).execute(conn).await?.rows_affected())
}
