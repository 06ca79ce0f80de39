//! The state of the cache at one moment: immutable, shared.

use super::bundle::Bundles;
use super::index::SelectorIndex;
use crate::entry::WorkloadEntry;
use bytes::Bytes;
use finial_core::{EntryId, Secret, SelectorSet, SpiffeId, UnixSeconds};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

/// An X.509-SVID that was issued to a workload.
pub(crate) struct WorkloadSvid {
    pub(crate) id: SpiffeId,
    /// Leaf first, DER, one after the other.
    pub(crate) chain: Bytes,
    /// PKCS#8, DER; wiped when the last user lets go.
    pub(crate) key: Bytes,
    pub(crate) not_after: UnixSeconds,
    /// From then on it is to be renewed. Milliseconds since the epoch.
    pub(crate) rotate_at_ms: i64,
    /// Of the entry, when it was issued.
    pub(crate) revision_number: i64,
    /// Of the entry, when it was issued.
    pub(crate) created_at: i64,
    /// Key IDs of those who signed the certificates of the chain.
    pub(crate) signed_by: Vec<Box<[u8]>>,
    /// The round of [`crate::sync::taints::Taints`] in which it was issued.
    pub(crate) issued_in: u32,
}

impl WorkloadSvid {
    /// Whether it has the entry's ID. An entry that was given another one may be for other workloads, too, and those must
    /// not get the key of the ID before.
    pub(crate) fn is_for(&self, entry: &WorkloadEntry) -> bool {
        self.id == entry.spiffe_id
    }
}

impl std::fmt::Debug for WorkloadSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WorkloadSvid({}, until {})", self.id, self.not_after)
    }
}

/// Lets a key's bytes be sent without copying them; they are wiped with the last user.
struct KeyBytes(Arc<Secret<Vec<u8>>>);

impl AsRef<[u8]> for KeyBytes {
    fn as_ref(&self) -> &[u8] {
        self.0.expose()
    }
}

/// A key as [`WorkloadSvid`] holds it.
pub(crate) fn key_bytes(key: Arc<Secret<Vec<u8>>>) -> Bytes {
    Bytes::from_owner(KeyBytes(key))
}

/// An entry with what was issued for it.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) entry: Arc<WorkloadEntry>,
    pub(crate) svid: Option<Arc<WorkloadSvid>>,
    /// When a workload asked for it last, milliseconds since the epoch; 0 = never.
    pub(crate) last_used_ms: Arc<AtomicI64>,
}

impl Record {
    pub(crate) fn new(entry: Arc<WorkloadEntry>) -> Self {
        Self { entry, svid: None, last_used_ms: Arc::default() }
    }
}

/// The records, in order of entry IDs, and the bundles.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) records: Arc<[Record]>,
    pub(crate) index: Arc<SelectorIndex>,
    pub(crate) bundles: Bundles,
}

impl Snapshot {
    /// Records whose selectors are all among the workload's, in order of entry IDs.
    pub(crate) fn matching<'a>(&'a self, workload: &'a SelectorSet) -> impl Iterator<Item = &'a Record> {
        let candidates = self.index.candidates(workload).into_iter();
        candidates.filter_map(|at| self.records.get(at)).filter(|r| r.entry.selectors.is_subset_of(workload))
    }

    /// One record.
    pub(crate) fn record(&self, id: &EntryId) -> Option<&Record> {
        let at = self.records.binary_search_by(|r| r.entry.id.cmp(id)).ok()?;
        self.records.get(at)
    }

    /// How many SVIDs are held for workloads.
    pub(crate) fn svid_count(&self) -> usize {
        self.records.iter().filter(|r| r.svid.is_some() && !r.entry.store_svid).count()
    }

    /// Those whose SVIDs are for a store.
    pub(crate) fn for_stores(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|r| r.entry.store_svid)
    }
}
