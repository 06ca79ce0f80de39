//! Event rows: each change of an entry or agent leaves one in its own transaction, so that other servers can follow.

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

impl Store {
    /// At most `limit` events after the one with ID `after`.
    pub async fn list_events(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        todo!()
    }

    /// Deletes the events of both feeds that were written before `before`, and returns how many.
    pub async fn prune_events(&self, before: UnixSeconds) -> Result<u64, StoreError> {
        todo!()
    }
}
