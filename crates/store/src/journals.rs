//! CA journals: which authorities each server prepared, activated and retired.

use crate::{Store, StoreError};
use finial_core::UnixSeconds;

/// The journal of one server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaJournal {
    /// Row ID; 0 = not stored yet.
    pub id: i64,
    /// `journal.Entries`, protobuf.
    pub data: Vec<u8>,
    /// Subject key ID of the active X.509 authority, lowercase hex.
    pub active_x509_authority_id: String,
}

impl Store {
    /// Creates (`id` = 0) or replaces a journal. `NotFound` when a row with another ID does not exist.
    pub async fn set_ca_journal(&self, journal: &CaJournal) -> Result<CaJournal, StoreError> {
        todo!()
    }

    /// The journal of the server whose active X.509 authority this is.
    pub async fn fetch_ca_journal(&self, active_x509_authority_id: &str) -> Result<Option<CaJournal>, StoreError> {
        todo!()
    }

    /// All journals.
    pub async fn list_ca_journals(&self) -> Result<Vec<CaJournal>, StoreError> {
        todo!()
    }

    /// Deletes the journals whose authorities all ended before this moment, and returns how many.
    pub async fn prune_ca_journals(&self, all_authorities_expire_before: UnixSeconds) -> Result<u64, StoreError> {
        todo!()
    }
}
