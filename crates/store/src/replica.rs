//! The read-only database (`ro_connection_string`): a standby of PostgreSQL, from which a server reads all entries and agents
//! when it starts. All other reads are small, or must not be older than what memory knows already.
//!
//! A page must be at least as new as the standpoint from which events are followed. So, once that was read, the primary is
//! asked where its log ends, and a standby is read on connections of which each has told that it has replayed the log of
//! this same history up to there; what it shows only gets newer. Whatever is in doubt is read from the primary.

use crate::feed::{DATABASE, TIMELINE};
use crate::sql::{Conn, Dialect, Pool, Pooled, Query};
use crate::{Store, StoreError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a start waits for a standby to answer and to catch up.
const CATCH_UP_MAX: Duration = Duration::from_secs(3);
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// A read-only database.
pub(crate) struct Replica {
    pool: Arc<Pool>,
    /// What it must have; without one it is not read.
    must_have: Mutex<Option<Position>>,
}

/// The end of a primary's log.
#[derive(Clone)]
struct Position {
    /// Which database, and which history of it.
    history: String,
    end: String,
}

impl Replica {
    pub(crate) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, must_have: Mutex::default() }
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// A connection in a transaction that reads, if this is to be read now.
    pub(crate) async fn read(&self) -> Option<Pooled> {
        let position = self.lock().clone()?;
        let begin = async {
            let mut conn = self.pool.take().await?;
            // Before the transaction: its snapshot must be the later one.
            if !position.is_reached(&mut conn).await? {
                return Err(unfit("is behind the primary"));
            }
            conn.control(Dialect::Postgres.begin_read()).await?;
            Ok(conn)
        };
        match begin.await {
            Ok(conn) => Some(conn),
            Err(error) => {
                self.leave(&error);
                None
            }
        }
    }

    async fn caught_up(&self, position: &Position) -> Result<(), StoreError> {
        let mut conn = self.pool.take().await?;
        while !position.is_reached(&mut conn).await? {
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Reads from the primary from now on. Returns whether that is new.
    fn leave(&self, error: &StoreError) -> bool {
        let was_read = self.lock().take().is_some();
        if was_read {
            tell(error);
        }
        was_read
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Position>> {
        self.must_have.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Position {
    /// Where the log of a primary ends, what has been written only into its memory included.
    async fn of_primary(conn: &mut Conn) -> Result<Self, StoreError> {
        let query = format!("SELECT {DATABASE} || {TIMELINE}, pg_current_wal_insert_lsn()::text");
        let row = conn.one(Query::once(query)).await?;
        Ok(Self { history: row.text(0)?, end: row.text(1)? })
    }

    /// Whether a standby of that primary has replayed the log so far.
    async fn is_reached(&self, conn: &mut Conn) -> Result<bool, StoreError> {
        let timeline = "GREATEST((SELECT timeline_id FROM pg_control_checkpoint()), \
                        (SELECT min_recovery_end_timeline FROM pg_control_recovery()))";
        let query = Query::once(format!(
            "SELECT pg_is_in_recovery(), {DATABASE} || lpad(upper(to_hex({timeline})), 8, '0'), \
             COALESCE(pg_last_wal_replay_lsn() >= CAST(? AS pg_lsn), FALSE)"
        ));
        let row = conn.one(query.bind(&self.end)).await?;
        if !row.flag(0)? {
            return Err(unfit("is no standby"));
        }
        if row.str(1)? != self.history {
            return Err(unfit("is the standby of another database, or of another history of it"));
        }
        row.flag(2)
    }
}

impl Store {
    /// Lets the pages of all entries and agents come from the replica, if there is one and it has everything that the primary
    /// has committed by now: until [`Store::read_from_primary`], or until it fails.
    pub async fn read_from_replica(&self) {
        let Some(replica) = self.replica() else { return };
        let position = async { Position::of_primary(&mut *self.connection().await?).await };
        let position = match position.await {
            Ok(position) => position,
            Err(error) => return tell(&error),
        };
        match tokio::time::timeout(CATCH_UP_MAX, replica.caught_up(&position)).await {
            Ok(Ok(())) => {
                tracing::info!(subsystem_name = "sql", "Reading all entries and agents from the read-only database");
                *replica.lock() = Some(position);
            }
            Ok(Err(error)) => tell(&error),
            Err(_) => tell(&unfit("does not answer, or is behind the primary")),
        }
    }

    /// Ends [`Store::read_from_replica`].
    pub fn read_from_primary(&self) {
        if let Some(replica) = self.replica() {
            replica.lock().take();
        }
    }

    /// Whether what failed so was read from the replica; it is read from the primary now, so try again.
    pub(crate) fn leave_replica(&self, error: &StoreError) -> bool {
        self.replica().is_some_and(|replica| replica.leave(error))
    }
}

fn unfit(detail: &str) -> StoreError {
    let advice = "ro_connection_string should lead to a streaming standby that keeps up";
    StoreError::Unavailable { what: "the read-only database".into(), detail: detail.into(), advice }
}

fn tell(error: &StoreError) {
    tracing::warn!(subsystem_name = "sql", %error, "The read-only database is not used; reading from the primary");
}
