//! Bringing the known entries up to date: the server tells revisions, and we ask for what we do not have.

use crate::entry::WorkloadEntry;
use finial_core::EntryId;
use finial_proto::digest::{Digests, bucket_of};
use finial_proto::server::entry::EntryRevision;
use finial_proto::sync::WatchResponse;
use finial_proto::types;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// As log lines say it.
const SUBSYSTEM: &str = "manager";

/// How much a sync moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SyncStats {
    pub(crate) total: usize,
    pub(crate) missing: usize,
    pub(crate) stale: usize,
    pub(crate) dropped: usize,
}

/// What the server is told that we have.
pub(crate) fn digests(known: &BTreeMap<EntryId, Arc<WorkloadEntry>>) -> Vec<u64> {
    if known.is_empty() {
        return Vec::new();
    }
    let mut digests = Digests::sized_for(known.len());
    for (id, entry) in known {
        digests.add(id.as_str(), entry.revision_number, entry.created_at);
    }
    digests.into_inner()
}

/// One sync under way. Nothing changes before it is finished.
pub(crate) struct EntrySync<'a> {
    known: &'a BTreeMap<EntryId, Arc<WorkloadEntry>>,
    /// Still authorized, by ID.
    seen: HashSet<String>,
    wanted: BTreeSet<String>,
    fresh: HashMap<EntryId, WorkloadEntry>,
    stats: SyncStats,
}

fn is_stale(entry: &WorkloadEntry, revision_number: i64, created_at: i64) -> bool {
    // An entry that was deleted and made again has the same ID and revision; old servers do not tell when it was made.
    entry.revision_number != revision_number || (created_at != 0 && entry.created_at != created_at)
}

impl<'a> EntrySync<'a> {
    pub(crate) fn new(known: &'a BTreeMap<EntryId, Arc<WorkloadEntry>>) -> Self {
        Self {
            known,
            seen: HashSet::new(),
            wanted: BTreeSet::new(),
            fresh: HashMap::new(),
            stats: SyncStats::default(),
        }
    }

    /// Takes known entries for still authorized.
    pub(crate) fn keep(&mut self, still: impl Fn(&str) -> bool) {
        let kept = self.known.keys().map(EntryId::as_str).filter(|id| still(id));
        self.seen.extend(kept.map(str::to_owned));
    }

    /// Takes a whole answer of the stream.
    pub(crate) fn pushed(&mut self, answer: &mut WatchResponse) {
        let buckets: HashSet<u32> = answer.buckets.iter().copied().collect();
        let count = usize::try_from(answer.bucket_count).unwrap_or_default();
        let replaced = |id: &str| u32::try_from(bucket_of(id, count)).is_ok_and(|at| buckets.contains(&at));
        let removed: HashSet<&str> = answer.removed_entry_ids.iter().map(String::as_str).collect();
        self.keep(|id| !removed.contains(id) && (buckets.is_empty() || !replaced(id)));
        self.entries(std::mem::take(&mut answer.entries));
    }

    /// Takes a page of revisions.
    pub(crate) fn revisions(&mut self, page: &[EntryRevision]) {
        for revision in page {
            if revision.id.is_empty() || revision.revision_number < 0 {
                tracing::warn!(subsystem_name = SUBSYSTEM, entry_id = %revision.id,
                    revision_number = revision.revision_number,
                    "Received malformed entry revision from SPIRE server; are the server and agent versions compatible?"
                );
                continue;
            }
            let current = self.known.get(revision.id.as_str());
            if current.is_none_or(|e| is_stale(e, revision.revision_number, revision.created_at)) {
                self.wanted.insert(revision.id.clone());
            }
            self.seen.insert(revision.id.clone());
        }
    }

    /// IDs of entries to ask for, in order, which spares the server some work.
    pub(crate) fn missing(&self) -> Vec<String> {
        self.wanted.iter().cloned().collect()
    }

    /// Takes a page of entries.
    pub(crate) fn entries(&mut self, page: Vec<types::Entry>) {
        for entry in page {
            let (id, revision_number) = (entry.id.clone(), entry.revision_number);
            let entry = match WorkloadEntry::try_from(entry) {
                Ok(entry) => entry,
                Err(error) => {
                    tracing::warn!(subsystem_name = SUBSYSTEM, entry_id = %id, revision_number, %error,
                        "Received malformed entry from SPIRE server; are the server and agent versions compatible?"
                    );
                    self.seen.insert(id); // still authorized: the version that we know stays
                    continue;
                }
            };
            match self.known.get(&entry.id) {
                None => self.stats.missing += 1,
                Some(old) if is_stale(old, entry.revision_number, entry.created_at) => self.stats.stale += 1,
                Some(_) => {}
            }
            self.seen.insert(id);
            self.fresh.insert(entry.id.clone(), entry);
        }
    }

    /// All entries now, unless they are what they were.
    pub(crate) fn finish(mut self) -> (Option<BTreeMap<EntryId, Arc<WorkloadEntry>>>, SyncStats) {
        self.fresh.retain(|id, entry| self.known.get(id).is_none_or(|old| **old != *entry));
        self.stats.dropped = self.known.keys().filter(|id| !self.seen.contains(id.as_str())).count();
        let changed = !self.fresh.is_empty() || self.stats.dropped > 0;
        let entries = changed.then(|| {
            let kept = self.known.iter().filter(|(id, _)| self.seen.contains(id.as_str()));
            let mut entries: BTreeMap<_, _> = kept.map(|(id, e)| (id.clone(), e.clone())).collect();
            entries.extend(self.fresh.into_iter().map(|(id, e)| (id, Arc::new(e))));
            entries
        });
        self.stats.total = entries.as_ref().unwrap_or(self.known).len();
        (entries, self.stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wire(id: &str, revision_number: i64, created_at: i64) -> types::Entry {
        types::Entry {
            id: id.into(),
            spiffe_id: Some(types::Spiffeid { trust_domain: "td".into(), path: "/x".into() }),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            revision_number,
            created_at,
            ..Default::default()
        }
    }

    fn known(list: &[types::Entry]) -> BTreeMap<EntryId, Arc<WorkloadEntry>> {
        list.iter().map(|e| WorkloadEntry::try_from(e.clone()).unwrap()).map(|e| (e.id.clone(), Arc::new(e))).collect()
    }

    fn revision(entry: &types::Entry) -> EntryRevision {
        EntryRevision { id: entry.id.clone(), revision_number: entry.revision_number, created_at: entry.created_at }
    }

    #[test]
    fn the_same_revisions_change_nothing() {
        let known = known(&[wire("a", 0, 5)]);
        let mut sync = EntrySync::new(&known);
        sync.revisions(&[revision(&wire("a", 0, 5))]);
        assert!(sync.missing().is_empty());
        assert_eq!(sync.finish(), (None, SyncStats { total: 1, ..Default::default() }));
    }

    #[test]
    fn an_entry_made_again_under_its_old_id_is_another_one() {
        let known = known(&[wire("a", 0, 5)]);
        let mut sync = EntrySync::new(&known);
        sync.revisions(&[revision(&wire("a", 0, 6))]);
        assert_eq!(sync.missing(), ["a"]);
        // a server that does not tell when it was made
        let mut sync = EntrySync::new(&known);
        sync.revisions(&[revision(&wire("a", 0, 0))]);
        assert!(sync.missing().is_empty());
    }

    #[test]
    fn a_malformed_entry_is_left_out_and_an_old_version_of_it_stays() {
        let known = known(&[wire("a", 0, 5)]);
        let mut sync = EntrySync::new(&known);
        sync.revisions(&[revision(&wire("a", 1, 5)), EntryRevision { id: String::new(), ..Default::default() }]);
        sync.entries(vec![types::Entry { selectors: Vec::new(), ..wire("a", 1, 5) }]);
        assert_eq!(sync.finish().0, None);
        // Also when the server tells of a whole bucket, or of all.
        let bad = types::Entry { selectors: Vec::new(), ..wire("a", 1, 5) };
        let mut sync = EntrySync::new(&known);
        sync.pushed(&mut WatchResponse {
            buckets: vec![0],
            bucket_count: 1,
            entries: vec![bad.clone()],
            ..Default::default()
        });
        assert_eq!(sync.finish().0, None);
        let mut sync = EntrySync::new(&known);
        sync.entries(vec![bad]);
        assert_eq!(sync.finish().0, None);
    }

    proptest! {
        /// Against the server's rule: it sends what is in buckets that differ.
        #[test]
        fn after_an_answer_of_the_stream_we_have_what_the_server_has(
            ours in proptest::collection::btree_map(0u8..40, (0i64..2, 1i64..3), 0..30),
            theirs in proptest::collection::btree_map(0u8..40, (0i64..2, 1i64..3), 0..30),
            changed in proptest::collection::btree_map(0u8..40, (0i64..2, 1i64..3), 0..5),
            gone in proptest::collection::btree_set(0u8..40, 0..5),
        ) {
            let list = |map: &std::collections::BTreeMap<u8, (i64, i64)>| -> Vec<_> {
                map.iter().map(|(id, (r, c))| wire(&format!("e{id}"), *r, *c)).collect()
            };
            let (known_before, wanted) = (known(&list(&ours)), known(&list(&theirs)));
            let mut answer = WatchResponse::default();
            match digests(&known_before) {
                sums if sums.is_empty() => {
                    (answer.buckets, answer.bucket_count, answer.entries) = (vec![0], 1, list(&theirs));
                }
                sums => {
                    let agents = Digests::received(sums).unwrap();
                    let mut servers = Digests::new(agents.buckets());
                    list(&theirs).iter().for_each(|e| servers.add(&e.id, e.revision_number, e.created_at));
                    answer.buckets = servers.differing(&agents);
                    answer.bucket_count = servers.buckets() as u32;
                    let differs = |e: &types::Entry| answer.buckets.contains(&(bucket_of(&e.id, servers.buckets()) as u32));
                    answer.entries = list(&theirs).into_iter().filter(differs).collect();
                }
            }
            let mut sync = EntrySync::new(&known_before);
            sync.pushed(&mut answer);
            let after = sync.finish().0.unwrap_or(known_before);
            prop_assert_eq!(&after, &wanted);
            // And then a change.
            let mut then = theirs.clone();
            then.extend(changed.clone());
            then.retain(|id, _| !gone.contains(id));
            let mut answer = WatchResponse {
                entries: list(&changed).into_iter().filter(|e| !gone.iter().any(|g| e.id == format!("e{g}"))).collect(),
                removed_entry_ids: gone.iter().map(|g| format!("e{g}")).collect(),
                ..Default::default()
            };
            let mut sync = EntrySync::new(&after);
            sync.pushed(&mut answer);
            let last = sync.finish().0.unwrap_or_else(|| after.clone());
            prop_assert_eq!(last, known(&list(&then)));
        }

        #[test]
        fn after_a_sync_we_have_what_the_server_has(
            ours in proptest::collection::btree_map(0u8..20, (0i64..3, 1i64..3), 0..15),
            theirs in proptest::collection::btree_map(0u8..20, (0i64..3, 1i64..3), 0..15),
            sparse: bool,
        ) {
            let list = |map: &std::collections::BTreeMap<u8, (i64, i64)>| -> Vec<_> {
                map.iter().map(|(id, (r, c))| wire(&format!("e{id}"), *r, *c)).collect()
            };
            let (ours, theirs) = (list(&ours), list(&theirs));
            let known_before = known(&ours);
            let mut sync = EntrySync::new(&known_before);
            if sparse {
                sync.revisions(&theirs.iter().map(revision).collect::<Vec<_>>());
                let ask = sync.missing();
                sync.entries(theirs.iter().filter(|e| ask.contains(&e.id)).cloned().collect());
            } else {
                sync.entries(theirs.clone());
            }
            let (entries, stats) = sync.finish();
            let expected = known(&theirs);
            prop_assert_eq!(entries.is_none(), expected == known_before);
            prop_assert_eq!(entries.as_ref().unwrap_or(&known_before), &expected);
            prop_assert_eq!(stats.total, expected.len());
            for (id, entry) in entries.iter().flatten() {
                if let Some(before) = known_before.get(id).filter(|b| ***b == **entry) {
                    prop_assert!(Arc::ptr_eq(before, entry), "unchanged entries stay the same value");
                }
            }
        }
    }
}
