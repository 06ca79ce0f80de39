//! Registration entries.

use crate::{Listed, Page, Store, StoreError};
use finial_core::{Entry, EntryId, MatchBehavior, Selector, SpiffeId, TrustDomain, UnixSeconds};

/// What became of one entry of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedEntry {
    /// As stored.
    pub entry: Entry,
    /// An entry with the same SPIFFE ID, parent and selectors was there before: this is that one, and nothing was stored.
    pub existing: bool,
}

/// Which entries are wanted; every part that is set must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryFilter {
    /// Exactly this SPIFFE ID.
    pub spiffe_id: Option<SpiffeId>,
    /// Exactly this parent.
    pub parent_id: Option<SpiffeId>,
    /// The selectors relate so to the given ones; never an empty list.
    pub selectors: Option<(MatchBehavior, Vec<Selector>)>,
    /// The federated trust domains relate so to the given ones; never an empty list.
    pub federates_with: Option<(MatchBehavior, Vec<TrustDomain>)>,
    /// Exactly this hint.
    pub hint: Option<String>,
    /// Downstream or not.
    pub downstream: Option<bool>,
}

/// Which parts of an entry an update replaces; `None` leaves a part as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of `Entry`
pub struct EntryUpdate {
    pub spiffe_id: Option<SpiffeId>,
    pub parent_id: Option<SpiffeId>,
    pub selectors: Option<finial_core::SelectorSet>,
    pub x509_svid_ttl: Option<i32>,
    pub jwt_svid_ttl: Option<i32>,
    pub federates_with: Option<Vec<TrustDomain>>,
    pub admin: Option<bool>,
    pub downstream: Option<bool>,
    pub expires_at: Option<UnixSeconds>,
    pub dns_names: Option<Vec<String>>,
    pub store_svid: Option<bool>,
    pub hint: Option<String>,
    pub disable_x509_svid_prefetch: Option<bool>,
    pub jwt_svid_include_jti: Option<bool>,
}

impl Store {
    /// Stores a batch in one transaction; each entry has its own result, in order. `entry.id` is kept, so the caller
    /// makes it when the operator did not; `created_at` is set here; the revision starts at 0.
    pub async fn create_entries(
        &self,
        entries: Vec<Entry>,
    ) -> Result<Vec<Result<CreatedEntry, StoreError>>, StoreError> {
        todo!()
    }

    /// One entry.
    pub async fn fetch_entry(&self, id: &EntryId) -> Result<Option<Entry>, StoreError> {
        todo!()
    }

    /// The entries with these IDs; missing ones are left out.
    pub async fn fetch_entries(&self, ids: &[EntryId]) -> Result<Vec<Entry>, StoreError> {
        todo!()
    }

    /// The entries that match.
    pub async fn list_entries(&self, filter: &EntryFilter, page: Option<&Page>) -> Result<Listed<Entry>, StoreError> {
        todo!()
    }

    /// How many entries match.
    pub async fn count_entries(&self, filter: &EntryFilter) -> Result<u64, StoreError> {
        todo!()
    }

    /// Hands every entry to `each`, in pages of bounded size.
    pub async fn load_entries(&self, each: impl FnMut(Entry) + Send) -> Result<(), StoreError> {
        todo!()
    }

    /// Changes an entry; the revision grows even when nothing differs. `NotFound` when there is none.
    pub async fn update_entry(&self, id: &EntryId, update: EntryUpdate) -> Result<Entry, StoreError> {
        todo!()
    }

    /// Deletes an entry with all that belongs to it, and returns it. `NotFound` when there is none.
    pub async fn delete_entry(&self, id: &EntryId) -> Result<Entry, StoreError> {
        todo!()
    }

    /// Deletes the entries that expired before `expires_before`, and returns their IDs.
    pub async fn prune_entries(&self, expires_before: UnixSeconds) -> Result<Vec<EntryId>, StoreError> {
        todo!()
    }
}
