//! The connections: one that writes, lent to one transaction at a time, and a few that only read.
//!
//! Each call on a connection costs two switches to its thread and back, which is most of what a small transaction costs.
//! So the writing connection is no member of a pool (which would ping it after each use), transactions begin and end with
//! plain statements, and small reads borrow the writing connection while nobody writes.

use crate::StoreError;
use crate::sql::{BEGIN_READ, COMMIT, Conn, Db, ROLLBACK};
use futures::FutureExt;
use sqlx::ConnectOptions;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::SqliteConnectOptions;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard};

/// How long a call waits for a connection before it gives up.
pub(crate) const ACQUIRE_MAX: Duration = Duration::from_secs(30);

type Place = Arc<Mutex<Option<Conn>>>;

/// The writing connection.
pub(crate) struct Writer {
    /// Empty once it was closed.
    place: Place,
    options: SqliteConnectOptions,
}

/// Where the reading connections are.
pub(crate) enum Readers {
    /// Connections of their own.
    Pool(sqlx::Pool<Db>),
    /// A database in memory is seen by the connection that made it only.
    Writer,
}

enum Lent {
    Writer(OwnedMappedMutexGuard<Option<Conn>, Conn>),
    Reader(PoolConnection<Db>),
}

/// A connection for as long as this lives, in a transaction or not. Dropped in a transaction it rolls back.
pub(crate) struct Tx {
    lent: Lent,
    open: bool,
}

impl Writer {
    pub(crate) async fn open(options: SqliteConnectOptions) -> Result<Self, sqlx::Error> {
        let conn = options.connect().await?;
        Ok(Self { place: Arc::new(Mutex::new(Some(conn))), options })
    }

    /// The connection for statements that begin a transaction themselves, which the drop rolls back.
    pub(crate) async fn lend(&self) -> Result<Tx, StoreError> {
        let waited = tokio::time::timeout(ACQUIRE_MAX, self.place.clone().lock_owned()).await;
        let mut tx = Tx::of(waited.map_err(|_| StoreError::Busy(ACQUIRE_MAX.as_secs()))?)?;
        tx.open = true;
        Ok(tx)
    }

    /// Begins a transaction as soon as the one before has ended.
    pub(crate) async fn begin(&self, statement: &'static str) -> Result<Tx, StoreError> {
        let mut tx = self.lend().await?;
        match tx.begin(statement).await {
            // Its thread is gone: a panic, or a rollback that failed. What was committed is in the file.
            Err(sqlx::Error::WorkerCrashed) => {
                tx.open = false;
                *tx = self.options.connect().await?;
                tx.begin(statement).await?;
            }
            result => result?,
        }
        Ok(tx)
    }

    /// The connection if nobody writes now.
    fn idle(&self) -> Option<Tx> {
        Tx::of(self.place.clone().try_lock_owned().ok()?).ok()
    }

    pub(crate) async fn close(&self) {
        let conn = self.place.lock().await.take();
        if let Some(conn) = conn
            && let Err(error) = sqlx::Connection::close(conn).await
        {
            tracing::warn!(%error, "closing the database failed");
        }
    }
}

impl Readers {
    /// One consistent view, on a connection that nobody waits for.
    pub(crate) async fn begin(&self, writer: &Writer) -> Result<Tx, StoreError> {
        let Self::Pool(pool) = self else { return writer.begin(BEGIN_READ).await };
        let mut tx = Tx { lent: Lent::Reader(pool.acquire().await?), open: false };
        tx.begin(BEGIN_READ).await?;
        Ok(tx)
    }

    /// A connection for one small statement, outside of transactions.
    pub(crate) async fn brief(&self, writer: &Writer) -> Result<Tx, StoreError> {
        match (writer.idle(), self) {
            (Some(tx), _) => Ok(tx),
            (None, Self::Pool(pool)) => Ok(Tx { lent: Lent::Reader(pool.acquire().await?), open: false }),
            (None, Self::Writer) => writer.begin(BEGIN_READ).await,
        }
    }

    pub(crate) async fn close(&self) {
        if let Self::Pool(pool) = self {
            pool.close().await;
        }
    }
}

impl Tx {
    fn of(place: OwnedMutexGuard<Option<Conn>>) -> Result<Self, StoreError> {
        let conn = OwnedMutexGuard::try_map(place, Option::as_mut);
        Ok(Self { lent: Lent::Writer(conn.map_err(|_| sqlx::Error::PoolClosed)?), open: false })
    }

    /// `open` goes first: if the caller gives up while the statement runs, the drop rolls back what it began.
    async fn begin(&mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.open = true;
        sqlx::query(statement).execute(&mut **self).await.map(drop)
    }

    /// A statement has committed.
    pub(crate) fn committed(mut self) {
        self.open = false;
    }

    /// Durable when this returns.
    pub(crate) async fn commit(mut self) -> Result<(), sqlx::Error> {
        sqlx::query(COMMIT).execute(&mut *self).await?;
        self.open = false;
        Ok(())
    }

    /// Undoes all of it. SQLite has done so already after some errors; then there is nothing to end.
    pub(crate) async fn rollback(mut self) {
        let ended = sqlx::query(ROLLBACK).execute(&mut *self).await;
        self.open = false;
        if let Err(error) = ended {
            tracing::debug!(%error, "nothing was left to roll back");
        }
    }
}

impl Deref for Tx {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        match &self.lent {
            Lent::Writer(conn) => conn,
            Lent::Reader(conn) => conn,
        }
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Conn {
        match &mut self.lent {
            Lent::Writer(conn) => conn,
            Lent::Reader(conn) => conn,
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if self.open {
            // Polled once it is in line before whatever the next borrower sends; nobody waits for its result.
            let _ = sqlx::query(ROLLBACK).execute(&mut **self).now_or_never();
        }
    }
}
