//! WIT-SVIDs that were fetched already, each with its key: at most so many, besides those that streams hold.

use crate::entry::WorkloadEntry;
use finial_core::{EntryId, Secret, SpiffeId, UnixSeconds};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// A token with the key that it is bound to.
#[derive(Debug)]
pub(crate) struct CachedWit {
    pub(crate) id: SpiffeId,
    pub(crate) token: String,
    /// A private JWK.
    pub(crate) key: Secret<String>,
    pub(crate) expires_at: UnixSeconds,
    /// From then on it is to be renewed. Milliseconds since the epoch.
    pub(crate) rotate_at_ms: i64,
    /// Of the entry, when it was issued.
    pub(crate) revision_number: i64,
    /// Of the entry, when it was issued.
    pub(crate) created_at: i64,
    /// Who signed it; none if that was tainted even then: a server that still signs with it would give the same again.
    pub(crate) key_id: Option<String>,
}

impl CachedWit {
    /// Whether the workload of this entry may have it. An entry that was given another ID may be for other workloads, too.
    fn serves(&self, entry: &WorkloadEntry, now_ms: i64) -> bool {
        now_ms < self.expires_at.saturating_mul(1000) && self.id == entry.spiffe_id
    }

    fn is_fresh(&self, entry: &WorkloadEntry, tainted: &[String], now_ms: i64) -> bool {
        now_ms < self.rotate_at_ms
            && self.serves(entry, now_ms)
            && (self.revision_number, self.created_at) == (entry.revision_number, entry.created_at)
            && self.key_id.as_ref().is_none_or(|key| !tainted.contains(key))
    }
}

#[derive(Default)]
struct State {
    /// With the number of its last use.
    svids: HashMap<EntryId, (Arc<CachedWit>, u64)>,
    uses: u64,
}

/// The cache.
pub(crate) struct WitCache {
    state: Mutex<State>,
    changed: Arc<Notify>,
}

impl WitCache {
    /// Tells `changed` of new ones.
    pub(crate) fn new(changed: Arc<Notify>) -> Self {
        Self { state: Mutex::default(), changed }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of these entries for which one is to be fetched.
    pub(crate) fn due(
        &self,
        entries: &[Arc<WorkloadEntry>],
        tainted: &[String],
        now_ms: i64,
    ) -> Vec<Arc<WorkloadEntry>> {
        let state = self.state();
        let fresh = |entry: &WorkloadEntry| {
            state.svids.get(&entry.id).is_some_and(|(svid, _)| svid.is_fresh(entry, tainted, now_ms))
        };
        entries.iter().filter(|entry| !fresh(entry)).cloned().collect()
    }

    /// What serves the workload of these entries now, in their order.
    pub(crate) fn serving(
        &self,
        entries: &[Arc<WorkloadEntry>],
        now_ms: i64,
    ) -> Vec<(Arc<WorkloadEntry>, Arc<CachedWit>)> {
        let mut state = self.state();
        state.uses += 1;
        let now = state.uses;
        let mut one = |entry: &Arc<WorkloadEntry>| {
            let (svid, used) = state.svids.get_mut(&entry.id).filter(|(svid, _)| svid.serves(entry, now_ms))?;
            *used = now;
            Some((entry.clone(), svid.clone()))
        };
        entries.iter().filter_map(&mut one).collect()
    }

    /// Keeps new ones; beyond the limit those go that no stream holds, the least recently used first.
    pub(crate) fn put(&self, svids: Vec<(EntryId, CachedWit)>, limit: usize) {
        let mut state = self.state();
        for (id, svid) in svids {
            state.uses += 1;
            let used = state.uses;
            state.svids.insert(id, (Arc::new(svid), used));
        }
        let extra = state.svids.len().saturating_sub(limit);
        if extra > 0 {
            let unheld = state.svids.iter().filter(|(_, (svid, _))| Arc::strong_count(svid) == 1);
            let mut unheld: Vec<(u64, EntryId)> = unheld.map(|(id, (_, used))| (*used, id.clone())).collect();
            unheld.sort_unstable();
            for (_, id) in unheld.iter().take(extra) {
                state.svids.remove(id);
            }
        }
        self.changed.notify_one();
    }

    /// Forgets those that were signed with one of these keys.
    pub(crate) fn purge(&self, key_ids: &[String]) {
        let signed = |svid: &CachedWit| svid.key_id.as_ref().is_some_and(|id| key_ids.contains(id));
        self.state().svids.retain(|_, (svid, _)| !signed(svid));
    }

    /// All of them, the least recently used first.
    pub(crate) fn all(&self) -> Vec<(EntryId, Arc<CachedWit>)> {
        let state = self.state();
        let mut all: Vec<_> = state.svids.iter().collect();
        all.sort_by_key(|(_, (_, used))| *used);
        all.into_iter().map(|(id, (svid, _))| (id.clone(), svid.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::{entry, wit};

    fn cache(entries: &[Arc<WorkloadEntry>], limit: usize) -> WitCache {
        let cache = WitCache::new(Arc::default());
        cache.put(entries.iter().map(|e| (e.id.clone(), wit(e))).collect(), limit);
        cache
    }

    fn entries(count: usize) -> Vec<Arc<WorkloadEntry>> {
        (0..count).map(|n| Arc::new(entry(&format!("e{n}"), &format!("spiffe://td/{n}"), &["unix:uid:1"]))).collect()
    }

    #[test]
    fn what_a_stream_holds_is_kept_beyond_the_limit() {
        let entries = entries(6);
        let cache = cache(&entries[..5], 5);
        let held = cache.serving(&entries[..1], 0);
        cache.serving(&entries[3..4], 0);
        cache.put(vec![(entries[5].id.clone(), wit(&entries[5]))], 3);
        let left: Vec<_> = cache.all().into_iter().map(|(id, _)| id).collect();
        assert_eq!(left, [0, 3, 5].map(|n| entries[n].id.clone()), "those used last, the oldest use first");
        drop(held);
        cache.put(Vec::new(), 2);
        assert_eq!(cache.all().len(), 2);
    }

    #[test]
    fn one_of_an_entry_that_was_changed_or_made_again_is_fetched_anew_and_never_served_under_another_id() {
        let all = entries(1);
        let cache = cache(&all, 9);
        let with = |edit: &dyn Fn(&mut WorkloadEntry)| {
            let mut entry = (*all[0]).clone();
            edit(&mut entry);
            [Arc::new(entry)]
        };
        let (due, serving) = (|e: &[_]| cache.due(e, &[], 0).len(), |e: &[_]| cache.serving(e, 0).len());
        assert_eq!((due(&all), serving(&all)), (0, 1));
        let changed = with(&|e| e.revision_number += 1);
        assert_eq!((due(&changed), serving(&changed)), (1, 1));
        let again = with(&|e| e.created_at += 1);
        assert_eq!((due(&again), serving(&again)), (1, 1));
        let other = with(&|e| e.spiffe_id = SpiffeId::parse("spiffe://td/other").unwrap());
        assert_eq!((due(&other), serving(&other)), (1, 0));
        assert_eq!(cache.due(&all, &["k1".into()], 0).len(), 1, "tainted");
        assert_eq!((cache.due(&all, &[], 1_000_000).len(), cache.serving(&all, 2_000_000).len()), (1, 0));
    }
}
