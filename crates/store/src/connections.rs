//! The connections, and how a transaction begins and ends.
//!
//! SQLite has one connection that writes, lent to one transaction at a time, and a few that only read. Each call on one
//! costs two switches to its thread and back, which is most of what a small transaction costs. So the writing connection
//! is no member of a pool, and small reads borrow it while nobody writes. A database server has a pool for everything,
//! and a [`Replica`] for a start if there is one.

use crate::StoreError;
use crate::replica::Replica;
use crate::sql::{ACQUIRE_MAX, Conn, Connector, Dialect, Pool, Pooled};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard};

const COMMIT: &str = "COMMIT";
const ROLLBACK: &str = "ROLLBACK";
/// Tells servers that listen that there is something new, which they hear once the commit is durable.
const NOTIFY_COMMIT: &str = "NOTIFY finial_changes; COMMIT";

type Place = Arc<Mutex<Option<Conn>>>;

/// All connections of a store.
pub(crate) enum Connections {
    /// SQLite. A database in memory is seen by the connection that made it only, so it has no readers.
    File { writer: Writer, readers: Option<Arc<Pool>> },
    /// PostgreSQL or MySQL.
    Server { primary: Arc<Pool>, replica: Option<Replica> },
}

/// The writing connection of SQLite.
pub(crate) struct Writer {
    /// Empty once it was closed.
    place: Place,
    connector: Connector,
}

enum Lent {
    Writer(OwnedMappedMutexGuard<Option<Conn>, Conn>),
    Pooled(Pooled),
}

/// A connection for as long as this lives, in a transaction or not. Dropped in a transaction it rolls back.
pub(crate) struct Tx {
    lent: Lent,
    open: bool,
}

impl Connections {
    pub(crate) fn dialect(&self) -> Dialect {
        match self {
            Self::File { writer, .. } => writer.connector.dialect(),
            Self::Server { primary, .. } => primary.dialect(),
        }
    }

    pub(crate) fn replica(&self) -> Option<&Replica> {
        match self {
            Self::File { .. } => None,
            Self::Server { replica, .. } => replica.as_ref(),
        }
    }

    /// How the connections that write are made.
    pub(crate) fn connector(&self) -> &Connector {
        match self {
            Self::File { writer, .. } => &writer.connector,
            Self::Server { primary, .. } => primary.connector(),
        }
    }

    /// Begins a transaction that writes.
    pub(crate) async fn begin(&self) -> Result<Tx, StoreError> {
        match self {
            Self::File { writer, .. } => writer.begin(writer.connector.dialect().begin_write()).await,
            Self::Server { primary, .. } => {
                Ok(Tx::pooled(primary.take_with(primary.dialect().begin_write()).await?, true))
            }
        }
    }

    /// The writing connection for statements that begin a transaction themselves, which the drop rolls back.
    pub(crate) async fn lend(&self) -> Result<Tx, StoreError> {
        match self {
            Self::File { writer, .. } => writer.lend().await,
            Self::Server { .. } => self.begin().await,
        }
    }

    /// One consistent view, on a connection that nobody waits for.
    pub(crate) async fn read(&self) -> Result<Tx, StoreError> {
        match self {
            Self::File { writer, readers: None } => writer.begin(Dialect::Sqlite.begin_read()).await,
            Self::File { readers: Some(pool), .. } | Self::Server { primary: pool, .. } => {
                Ok(Tx::pooled(pool.take_with(pool.dialect().begin_read()).await?, true))
            }
        }
    }

    /// The same for a page of all entries or agents. At a start, when nobody writes yet, another connection to SQLite would
    /// cost a thread and a page cache, and a replica may do the work.
    pub(crate) async fn read_page(&self) -> Result<Tx, StoreError> {
        match self {
            Self::File { writer, .. } => writer.begin(Dialect::Sqlite.begin_read()).await,
            Self::Server { replica, .. } => match replica {
                Some(replica) => match replica.read().await {
                    Some(conn) => Ok(Tx::pooled(conn, true)),
                    None => self.read().await,
                },
                None => self.read().await,
            },
        }
    }

    /// A connection for one small statement, outside of transactions.
    pub(crate) async fn brief(&self) -> Result<Tx, StoreError> {
        match self {
            Self::File { writer, readers } => match (writer.idle(), readers) {
                (Some(tx), _) => Ok(tx),
                (None, Some(pool)) => Ok(Tx::pooled(pool.take().await?, false)),
                (None, None) => writer.begin(Dialect::Sqlite.begin_read()).await,
            },
            Self::Server { primary, .. } => Ok(Tx::pooled(primary.take().await?, false)),
        }
    }

    pub(crate) async fn close(&self) {
        match self {
            Self::File { writer, readers } => {
                if let Some(readers) = readers {
                    readers.close().await;
                }
                writer.close().await;
            }
            Self::Server { primary, replica } => {
                if let Some(replica) = replica {
                    replica.pool().close().await;
                }
                primary.close().await;
            }
        }
    }
}

impl Writer {
    pub(crate) async fn open(connector: Connector) -> Result<Self, StoreError> {
        let conn = connector.connect().await?;
        Ok(Self { place: Arc::new(Mutex::new(Some(conn))), connector })
    }

    async fn lend(&self) -> Result<Tx, StoreError> {
        let waited = tokio::time::timeout(ACQUIRE_MAX, self.place.clone().lock_owned()).await;
        let mut tx = Tx::of(waited.map_err(|_| StoreError::Busy(ACQUIRE_MAX.as_secs()))?)?;
        tx.open = true;
        Ok(tx)
    }

    /// Begins a transaction as soon as the one before has ended.
    async fn begin(&self, statement: &'static str) -> Result<Tx, StoreError> {
        // it counts as open: if the caller gives up while the statement runs, the drop rolls back what it began
        let mut tx = self.lend().await?;
        match tx.control(statement).await {
            // Its thread is gone: a panic, or a rollback that failed. What was committed is in the file.
            Err(StoreError::Sql(sqlx::Error::WorkerCrashed)) => {
                tx.open = false;
                *tx = self.connector.connect().await?;
                tx.open = true;
                tx.control(statement).await?;
            }
            result => result?,
        }
        Ok(tx)
    }

    /// The connection if nobody writes now.
    fn idle(&self) -> Option<Tx> {
        Tx::of(self.place.clone().try_lock_owned().ok()?).ok()
    }

    async fn close(&self) {
        let conn = self.place.lock().await.take();
        if let Some(conn) = conn {
            conn.close().await;
        }
    }
}

impl Tx {
    fn of(place: OwnedMutexGuard<Option<Conn>>) -> Result<Self, StoreError> {
        let conn = OwnedMutexGuard::try_map(place, Option::as_mut);
        let conn = conn.map_err(|_| StoreError::Sql(sqlx::Error::PoolClosed))?;
        Ok(Self { lent: Lent::Writer(conn), open: false })
    }

    fn pooled(conn: Pooled, open: bool) -> Self {
        Self { lent: Lent::Pooled(conn), open }
    }

    /// A statement has committed.
    pub(crate) fn committed(mut self) {
        self.open = false;
    }

    /// Durable when this returns.
    pub(crate) async fn commit(mut self) -> Result<(), StoreError> {
        let tell = self.take_news() && self.dialect() == Dialect::Postgres;
        self.control(if tell { NOTIFY_COMMIT } else { COMMIT }).await?;
        self.open = false;
        Ok(())
    }

    /// Undoes all of it. SQLite has done so already after some errors; then there is nothing to end.
    pub(crate) async fn rollback(mut self) {
        self.take_news();
        let ended = self.control(ROLLBACK).await;
        match ended {
            Ok(()) => self.open = false,
            Err(error) => {
                self.open = self.dialect() != Dialect::Sqlite;
                tracing::debug!(%error, "nothing was left to roll back");
            }
        }
    }

    /// Ends a transaction that only read. SQLite does so with the drop, at no cost for the caller.
    pub(crate) async fn end(self) {
        if self.open && self.dialect() != Dialect::Sqlite {
            self.rollback().await;
        }
    }
}

impl Deref for Tx {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        match &self.lent {
            Lent::Writer(conn) => conn,
            Lent::Pooled(conn) => conn,
        }
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Conn {
        match &mut self.lent {
            Lent::Writer(conn) => conn,
            Lent::Pooled(conn) => conn,
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if self.open {
            self.abandon(ROLLBACK);
        }
    }
}
