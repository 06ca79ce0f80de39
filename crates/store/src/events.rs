//! Event rows: each change of an entry or agent leaves one in its own transaction, so that other servers can follow.

use crate::sql::{Conn, Moment, Query, insert_rows};
use crate::store::transact;
use crate::{Store, StoreError};
use finial_core::UnixSeconds;

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
    pub(crate) fn table(self) -> (&'static str, &'static str) {
        match self {
            Self::Entries => ("registered_entries_events", "entry_id"),
            Self::Nodes => ("attested_node_entries_events", "spiffe_id"),
        }
    }

    /// What listing and pruning are counted as.
    pub(crate) fn calls(self) -> (&'static str, &'static str) {
        match self {
            Self::Entries => ("datastore.registration_entry_event.list", "datastore.registration_entry_event.prune"),
            Self::Nodes => ("datastore.node_event.list", "datastore.node_event.prune"),
        }
    }
}

impl Store {
    /// Deletes the events of both feeds that were written before `before`, and returns how many.
    pub async fn prune_events(&self, before: UnixSeconds) -> Result<u64, StoreError> {
        transact!(self, |tx| {
            let mut deleted = 0;
            for feed in [EventFeed::Entries, EventFeed::Nodes] {
                let mut query = Query::new(format!("DELETE FROM {} WHERE ", feed.table().0));
                query.push_time(self.dialect(), "created_at", "<", before);
                deleted += self.counted(feed.calls().1, tx.execute(query)).await?;
            }
            Ok(deleted)
        })
    }
}

/// Writes one event per subject.
pub(crate) async fn write(
    conn: &mut Conn,
    feed: EventFeed,
    subjects: &[impl AsRef<str> + Sync],
    now: Moment,
) -> Result<(), StoreError> {
    if subjects.is_empty() {
        return Ok(());
    }
    conn.set_news();
    let (table, column) = feed.table();
    let rows = subjects.iter().map(|subject| [now.into(), now.into(), subject.as_ref().into()]);
    conn.execute_all(insert_rows(&format!("{table} (created_at, updated_at, {column})"), rows)).await
}
