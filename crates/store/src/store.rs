//! The handle: the lock, the connections, and how a transaction begins and ends.

use crate::connections::{Connections, Tx, Writer};
use crate::replica::Replica;
use crate::sql::{Connector, Dialect, Moment, Place, Pool, Query};
use crate::{StoreError, StoreSettings, migrations};
use finial_core::Clock;
use finial_runtime::Metrics;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// How long a write waits for another process (a backup, `sqlite3`) that holds the database.
const FOREIGN_LOCK_MAX: Duration = Duration::from_secs(5);
/// Page cache of one connection, KiB. The server answers from memory, so the store needs little.
const PAGE_CACHE_KIB: u32 = 512;

/// A handle to the open datastore; clones share it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    metrics: Metrics,
}

struct Inner {
    connections: Connections,
    clock: Arc<dyn Clock>,
    /// Whether our own tables are there.
    rotations: AtomicBool,
    // held, never read: the lock lasts as long as the handle
    _lock: Option<Lock>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("dialect", &self.dialect()).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens (and, if new, creates) the database, takes its lock for the life of this handle, and migrates the schema.
    pub async fn open(settings: StoreSettings, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let lock = match &settings.path {
            Some(path) if !settings.read_only => Some(lock(path)?),
            _ => None,
        };
        let connections = connect(&settings).await?;
        let dialect = connections.dialect();
        let store = Self {
            inner: Arc::new(Inner { connections, clock, rotations: AtomicBool::new(false), _lock: lock }),
            metrics: Metrics::disabled(),
        };
        if settings.read_only {
            let mut tx = store.read().await?;
            let checked = migrations::check(&mut tx).await;
            store.finish_read(tx, checked).await?;
        } else {
            migrations::run(&store, settings.disable_migration).await?;
        }
        if let Err(error) = store.look_for_rotations(!settings.read_only && !settings.disable_migration).await {
            tracing::warn!(subsystem_name = "sql", %error, "Tables could not be made; authorities can be replaced at one server at a time only");
        }
        let version = store.database_version().await?;
        let (read_only, kind) = (settings.read_only, dialect.name());
        tracing::info!(subsystem_name = "sql", read_only, r#type = kind, version, "Connected to SQL database");
        Ok(store)
    }

    async fn database_version(&self) -> Result<String, StoreError> {
        let mut conn = self.connection().await?;
        let version = conn.dialect().version();
        conn.one(Query::new(version)).await?.text(0)
    }

    /// Waits for running work, folds the write-ahead log into the file, and lets the lock go with the last clone.
    pub async fn close(&self) {
        self.inner.connections.close().await;
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

    /// Which database it is.
    pub(crate) fn dialect(&self) -> Dialect {
        self.inner.connections.dialect()
    }

    pub(crate) fn rotations_flag(&self) -> &AtomicBool {
        &self.inner.rotations
    }

    /// How connections are made, and what their errors mean.
    pub(crate) fn connector(&self) -> &Connector {
        self.inner.connections.connector()
    }

    /// Begins a writing transaction. End it with [`Store::finish`]; dropped, it is rolled back.
    pub(crate) async fn begin(&self) -> Result<Tx, StoreError> {
        self.inner.connections.begin().await
    }

    /// A writing transaction whose beginning is left to the first statement on SQLite (see [`Dialect::begin_write`]);
    /// ends like one of [`Store::begin`].
    pub(crate) async fn lend(&self) -> Result<Tx, StoreError> {
        self.inner.connections.lend().await
    }

    /// Commits what went well (durable when this returns), rolls back what did not.
    pub(crate) async fn finish<T>(&self, tx: Tx, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match result {
            Ok(value) => tx.commit().await.map(|()| value),
            Err(error) => {
                tx.rollback().await;
                Err(error)
            }
        }
    }

    /// A reading transaction: one consistent view, until [`Store::finish_read`].
    pub(crate) async fn read(&self) -> Result<Tx, StoreError> {
        self.inner.connections.read().await
    }

    /// The same for a page of all entries or agents.
    pub(crate) async fn read_page(&self) -> Result<Tx, StoreError> {
        self.inner.connections.read_page().await
    }

    pub(crate) fn replica(&self) -> Option<&Replica> {
        self.inner.connections.replica()
    }

    /// Ends a reading transaction.
    pub(crate) async fn finish_read<T>(&self, tx: Tx, result: Result<T, StoreError>) -> Result<T, StoreError> {
        tx.end().await;
        result
    }

    /// A connection for a single statement that reads a few rows, which needs no transaction to be of one moment.
    pub(crate) async fn connection(&self) -> Result<Tx, StoreError> {
        self.inner.connections.brief().await
    }

    /// Now, as a value of a time column.
    pub(crate) fn now(&self) -> Moment {
        Moment(self.inner.clock.now_ms())
    }
}

/// How often a change is tried before others that change the same rows win for good.
pub(crate) const TRIES_MAX: u32 = 10;

/// Waits a little, longer each time, if `error` says that another try may go well.
pub(crate) async fn try_again(error: &StoreError, tries: u32) -> bool {
    if !matches!(error, StoreError::Contended(_)) || tries >= TRIES_MAX {
        return false;
    }
    // spread by what differs between the servers that met
    let spread = u64::from(std::process::id()).wrapping_mul(2_654_435_761).wrapping_add(u64::from(tries)) % 16;
    tokio::time::sleep(Duration::from_millis(u64::from(tries) * 4 + spread)).await;
    true
}

/// Runs a block in a writing transaction, which is called `$tx` in it, and again where others changed the same rows at
/// the same time. So the block leaves what it takes from outside as it is.
macro_rules! transact {
    ($store:expr, |$tx:ident| $work:expr) => {{
        let mut tries = 0;
        loop {
            let mut $tx = $store.begin().await?;
            let result: Result<_, StoreError> = async { $work }.await;
            match $store.finish($tx, result).await {
                Err(error) => {
                    tries += 1;
                    if !crate::store::try_again(&error, tries).await {
                        break Err(error);
                    }
                }
                done => break done,
            }
        }
    }};
}
pub(crate) use transact;

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

async fn connect(settings: &StoreSettings) -> Result<Connections, StoreError> {
    let kind = settings.server.as_ref().map_or(Dialect::Sqlite, |server| server.primary.dialect());
    tracing::info!(subsystem_name = "sql", db_type = kind.name(), "Opening SQL database");
    if let Some(server) = &settings.server {
        let pool =
            |connector: &Connector| Pool::new(connector.clone(), server.open_max, server.idle_max, server.lifetime);
        let replica = server.replica.as_ref().map(|connector| Replica::new(pool(connector)));
        return Ok(Connections::Server { primary: pool(&server.primary), replica });
    }
    let place = settings.path.clone().map_or(Place::Memory, Place::File);
    let mut options = settings.connect_options();
    if !settings.read_only {
        options = options.create_if_missing(true);
        if settings.path.is_some() {
            // FULL: a commit is on disk before it is answered, whatever happens to the process or to the power
            options = options.journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full);
        }
    }
    let writer = Writer::open(Connector::sqlite(options, place.clone())).await?;
    let readers = settings.path.as_ref().map(|_| {
        let connector = Connector::sqlite(settings.connect_options().read_only(true), place);
        Pool::new(connector, settings.readers_max, settings.readers_max, None)
    });
    Ok(Connections::File { writer, readers })
}

/// Lets go of the lock at once: a process that another thread is just starting shares it until it runs its program.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "lock not released before its end");
        }
    }
}

/// Makes sure that no second server works on the same file: the kernel drops the lock when the process ends.
fn lock(database: &Path) -> Result<Lock, StoreError> {
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
    Ok(Lock(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_free_though_a_process_that_was_just_started_still_shares_it() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("db");
        let held = lock(&database).unwrap();
        let shared = held.0.try_clone().unwrap();
        assert!(matches!(lock(&database), Err(StoreError::Locked { .. })));
        drop(held);
        lock(&database).unwrap();
        drop(shared);
    }
}
