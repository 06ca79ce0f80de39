//! Bringing the known entries up to date: the server tells revisions, and we ask for what we do not have.

use crate::cache::Record;
use crate::entry::WorkloadEntry;
use finial_core::EntryId;
use finial_proto::digest::{Digests, bucket_of};
use finial_proto::server::entry::EntryRevision;
use finial_proto::sync::WatchResponse;
use finial_proto::types;
use std::collections::{BTreeMap, BTreeSet, HashSet};
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

/// All entries in order of their IDs, those that did not change as the same values; `None` if none of them changed.
pub(crate) type NewEntries = Option<Vec<Arc<WorkloadEntry>>>;

/// What the server is told that we have.
pub(crate) fn digests(known: &[Record]) -> Vec<u64> {
    if known.is_empty() {
        return Vec::new();
    }
    let mut digests = Digests::sized_for(known.len());
    for Record { entry, .. } in known {
        digests.add(entry.id.as_str(), entry.revision_number, entry.created_at);
    }
    digests.into_inner()
}

/// One sync under way. Nothing changes before it is finished.
pub(crate) struct EntrySync<'a> {
    /// In order of entry IDs.
    known: &'a [Record],
    /// Which of those are still authorized.
    seen: Vec<bool>,
    wanted: BTreeSet<String>,
    fresh: BTreeMap<EntryId, WorkloadEntry>,
    stats: SyncStats,
}

fn is_stale(entry: &WorkloadEntry, revision_number: i64, created_at: i64) -> bool {
    // An entry that was deleted and made again has the same ID and revision; old servers do not tell when it was made.
    entry.revision_number != revision_number || (created_at != 0 && entry.created_at != created_at)
}

fn find<'a>(known: &'a [Record], id: &str) -> Option<(usize, &'a Arc<WorkloadEntry>)> {
    let at = known.binary_search_by(|record| record.entry.id.as_str().cmp(id)).ok()?;
    known.get(at).map(|record| (at, &record.entry))
}

impl<'a> EntrySync<'a> {
    /// Of what is known, in order of entry IDs.
    pub(crate) fn new(known: &'a [Record]) -> Self {
        let (wanted, fresh, stats) = Default::default();
        Self { known, seen: vec![false; known.len()], wanted, fresh, stats }
    }

    /// Takes known entries for still authorized.
    fn keep(&mut self, still: impl Fn(&str) -> bool) {
        for (seen, record) in self.seen.iter_mut().zip(self.known) {
            *seen |= still(record.entry.id.as_str());
        }
    }

    /// Takes one for still authorized; what is known of it.
    fn see(&mut self, id: &str) -> Option<&'a Arc<WorkloadEntry>> {
        let (at, entry) = find(self.known, id)?;
        if let Some(seen) = self.seen.get_mut(at) {
            *seen = true;
        }
        Some(entry)
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
            let known = self.see(&revision.id);
            if known.is_none_or(|e| is_stale(e, revision.revision_number, revision.created_at)) {
                self.wanted.insert(revision.id.clone());
            }
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
            // Also one that makes no sense is still authorized: the version that we know stays.
            let known = self.see(&id);
            let entry = match WorkloadEntry::try_from(entry) {
                Ok(entry) => entry,
                Err(error) => {
                    tracing::warn!(subsystem_name = SUBSYSTEM, entry_id = %id, revision_number, %error,
                        "Received malformed entry from SPIRE server; are the server and agent versions compatible?"
                    );
                    continue;
                }
            };
            match known {
                None => self.stats.missing += 1,
                Some(old) if is_stale(old, entry.revision_number, entry.created_at) => self.stats.stale += 1,
                Some(_) => {}
            }
            self.fresh.insert(entry.id.clone(), entry);
        }
    }

    /// All entries now.
    pub(crate) fn finish(mut self) -> (NewEntries, SyncStats) {
        let same =
            |id: &EntryId, entry: &WorkloadEntry| find(self.known, id.as_str()).is_some_and(|(_, e)| **e == *entry);
        self.fresh.retain(|id, entry| !same(id, entry));
        self.stats.dropped = self.seen.iter().filter(|seen| !**seen).count();
        let changed = !self.fresh.is_empty() || self.stats.dropped > 0;
        let entries = changed.then(|| {
            let kept = self.known.iter().zip(&self.seen).filter(|(_, seen)| **seen).map(|(record, _)| &record.entry);
            let kept = kept.filter(|entry| !self.fresh.contains_key(&entry.id));
            let mut entries: Vec<_> = kept.cloned().collect();
            entries.reserve_exact(self.fresh.len());
            entries.extend(self.fresh.into_values().map(Arc::new));
            entries.sort_by(|a, b| a.id.cmp(&b.id)); // two runs, each in order
            entries
        });
        self.stats.total = entries.as_ref().map_or(self.known.len(), Vec::len);
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

    fn all(list: &[types::Entry]) -> Vec<Arc<WorkloadEntry>> {
        let entry = |e: &types::Entry| Arc::new(WorkloadEntry::try_from(e.clone()).unwrap());
        let mut entries: Vec<_> = list.iter().map(entry).collect();
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        entries
    }

    fn records(entries: &[Arc<WorkloadEntry>]) -> Vec<Record> {
        entries.iter().cloned().map(Record::new).collect()
    }

    fn known(list: &[types::Entry]) -> Vec<Record> {
        records(&all(list))
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
            let (known_before, wanted) = (known(&list(&ours)), all(&list(&theirs)));
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
            let after = sync.finish().0.unwrap_or_else(|| all(&list(&ours)));
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
            let known = records(&after);
            let mut sync = EntrySync::new(&known);
            sync.pushed(&mut answer);
            let last = sync.finish().0.unwrap_or_else(|| after.clone());
            prop_assert_eq!(last, all(&list(&then)));
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
            let (before, expected) = (all(&ours), all(&theirs));
            prop_assert_eq!(entries.is_none(), expected == before);
            prop_assert_eq!(entries.as_ref().unwrap_or(&before), &expected);
            prop_assert_eq!(stats.total, expected.len());
            for entry in entries.iter().flatten() {
                if let Some((_, before)) = find(&known_before, entry.id.as_str()).filter(|(_, b)| ***b == **entry) {
                    prop_assert!(Arc::ptr_eq(before, entry), "unchanged entries stay the same value");
                }
            }
        }
    }
}
