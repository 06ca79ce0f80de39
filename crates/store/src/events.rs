//! Event rows: each change of an entry or agent leaves one in its own transaction, so that other servers can follow.

use crate::sql::{Columns, Conn, LIST_MAX, seconds_of};
use crate::{Store, StoreError};
use finial_core::UnixSeconds;
use sqlx::AssertSqlSafe;

/// Which events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventFeed {
    /// Of registration entries; the subject is the entry ID.
    Entries,
    /// Of attested agents; the subject is the SPIFFE ID.
    Nodes,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Row ID, growing.
    pub id: i64,
    /// What changed.
    pub subject: String,
}

impl EventFeed {
    /// Table and subject column.
    fn table(self) -> (&'static str, &'static str) {
        match self {
            Self::Entries => ("registered_entries_events", "entry_id"),
            Self::Nodes => ("attested_node_entries_events", "spiffe_id"),
        }
    }

    /// What listing and pruning are counted as.
    fn calls(self) -> (&'static str, &'static str) {
        match self {
            Self::Entries => ("datastore.registration_entry_event.list", "datastore.registration_entry_event.prune"),
            Self::Nodes => ("datastore.node_event.list", "datastore.node_event.prune"),
        }
    }
}

impl Store {
    /// At most `limit` events after the one with ID `after`.
    pub async fn list_events(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        self.counted(feed.calls().0, async {
            let (table, subject) = feed.table();
            let mut tx = self.read().await?;
            let query = format!("SELECT id, {subject} FROM {table} WHERE id > ? ORDER BY id LIMIT ?");
            let rows = sqlx::query(AssertSqlSafe(query)).bind(after).bind(limit).fetch_all(&mut *tx).await;
            let events = rows.map_err(StoreError::from).and_then(|rows| {
                rows.iter().map(|row| Ok(Event { id: Columns(row).int(0)?, subject: Columns(row).text(1)? })).collect()
            });
            self.seen(events)
        })
        .await
    }

    /// Deletes the events of both feeds that were written before `before`, and returns how many.
    pub async fn prune_events(&self, before: UnixSeconds) -> Result<u64, StoreError> {
        let mut tx = self.begin().await?;
        let result = async {
            let mut deleted = 0;
            for feed in [EventFeed::Entries, EventFeed::Nodes] {
                let query = format!("DELETE FROM {} WHERE {} < ?", feed.table().0, seconds_of("created_at"));
                let delete = sqlx::query(AssertSqlSafe(query)).bind(before);
                let delete = async { Ok(delete.execute(&mut *tx).await?.rows_affected()) };
                deleted += self.counted(feed.calls().1, delete).await?;
            }
            Ok(deleted)
        }
        .await;
        self.finish(tx, result).await
    }
}

/// Writes one event per subject.
pub(crate) async fn write(
    conn: &mut Conn,
    feed: EventFeed,
    subjects: &[impl AsRef<str> + Sync],
    now: &str,
) -> Result<(), StoreError> {
    let (table, column) = feed.table();
    for some in subjects.chunks(LIST_MAX) {
        let mut query = sqlx::QueryBuilder::new(format!("INSERT INTO {table} (created_at, updated_at, {column}) "));
        query.push_values(some, |mut row, subject| {
            row.push_bind(now).push_bind(now).push_bind(subject.as_ref());
        });
        query.build().persistent(some.len() == 1).execute(&mut *conn).await?;
    }
    Ok(())
}
