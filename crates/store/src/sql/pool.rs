//! Connections that several callers take turns with. A pool of our own, as a driver's would start tasks of its own, and
//! as this one distrusts all its idle connections once one of them turned out to be dead.

use super::conn::State;
use super::{Conn, Connector, Dialect};
use crate::StoreError;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a call waits for a connection before it gives up.
pub(crate) const ACQUIRE_MAX: Duration = Duration::from_secs(30);
/// How long a connection is kept that nobody uses, as SPIRE keeps it.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// After so long without use a connection is asked whether it still lives before it is lent.
const TRUSTED: Duration = Duration::from_secs(1);
/// How long that answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// A bounded set of connections to one database.
pub(crate) struct Pool {
    connector: Connector,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    idle_max: usize,
    /// A connection older than this is not used again.
    lifetime: Option<Duration>,
}

struct Idle {
    conn: Conn,
    since: Instant,
}

/// A connection that goes back to its pool when it is dropped, if it is still of use.
pub(crate) struct Pooled {
    conn: Option<Conn>,
    pool: Arc<Pool>,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(crate) fn new(connector: Connector, open_max: u32, idle_max: u32, lifetime: Option<Duration>) -> Arc<Self> {
        let open_max = usize::try_from(open_max.max(1)).unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            connector,
            permits: Arc::new(Semaphore::new(open_max.min(Semaphore::MAX_PERMITS))),
            idle: Mutex::new(Vec::new()),
            idle_max: usize::try_from(idle_max).unwrap_or(usize::MAX),
            lifetime,
        })
    }

    pub(crate) fn dialect(&self) -> Dialect {
        self.connector.dialect()
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// A connection, as soon as there is a free place for one.
    pub(crate) async fn take(self: &Arc<Self>) -> Result<Pooled, StoreError> {
        let permit = tokio::time::timeout(ACQUIRE_MAX, self.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| StoreError::Busy(ACQUIRE_MAX.as_secs()))?;
        let permit = permit.map_err(|_| StoreError::Sql(sqlx::Error::PoolClosed))?;
        while let Some(Idle { mut conn, since }) = self.pop() {
            if since.elapsed() < TRUSTED || conn.answers(ANSWER_MAX).await {
                return Ok(Pooled { conn: Some(conn), pool: self.clone(), _permit: permit });
            }
            self.distrust();
        }
        let conn = self.connector.connect().await?;
        Ok(Pooled { conn: Some(conn), pool: self.clone(), _permit: permit })
    }

    /// A connection on which `statement` has been run. One that died unnoticed is replaced, which is safe as nothing
    /// has happened yet.
    pub(crate) async fn take_with(self: &Arc<Self>, statement: &'static str) -> Result<Pooled, StoreError> {
        let mut conn = self.take().await?;
        match conn.control(statement).await {
            Ok(()) => Ok(conn),
            Err(_) if conn.state() == State::Dead => {
                drop(conn);
                let mut conn = self.take().await?;
                conn.control(statement).await?;
                Ok(conn)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends all connections, those that are lent when they come back.
    pub(crate) async fn close(&self) {
        self.permits.close();
        let idle = std::mem::take(&mut *self.lock());
        for Idle { conn, .. } in idle {
            conn.close().await;
        }
    }

    /// The one that was used last; those that waited too long are let go.
    fn pop(&self) -> Option<Idle> {
        let mut idle = self.lock();
        let old = |i: &Idle| self.lifetime.is_some_and(|most| i.conn.age() >= most);
        idle.retain(|i| i.since.elapsed() < IDLE_MAX && !old(i));
        idle.pop()
    }

    fn distrust(&self) {
        self.lock().clear();
    }

    fn put(&self, conn: Conn) {
        match conn.state() {
            State::Ready => {}
            State::Busy => return,
            State::Dead => return self.distrust(),
        }
        let mut idle = self.lock();
        idle.retain(|i| i.since.elapsed() < IDLE_MAX);
        if idle.len() < self.idle_max && !self.permits.is_closed() {
            idle.push(Idle { conn, since: Instant::now() });
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.put(conn);
        }
    }
}

impl Deref for Pooled {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        let Some(conn) = &self.conn else { unreachable!("taken only by drop") };
        conn
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Conn {
        let Some(conn) = &mut self.conn else { unreachable!("taken only by drop") };
        conn
    }
}
