//! Which entries match a workload: all whose selectors are among the workload's.

use crate::entry::WorkloadEntry;
use finial_core::SelectorSet;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// Entries filed under their rarest selector, so that a lookup looks at few that do not match. Each entry is filed once; those
/// whose SVIDs are for a store not at all, as no workload gets them. Eight bytes an entry: agents have up to 100,000.
#[derive(Debug, Default)]
pub(crate) struct SelectorIndex {
    /// Hash of the selector and position of the entry, in this order. Two selectors may have the same hash.
    filed: Box<[(u32, u32)]>,
    hasher: RandomState,
}

impl SelectorIndex {
    /// Indexes entries by their positions.
    pub(crate) fn new<'a>(entries: impl Iterator<Item = &'a WorkloadEntry> + Clone) -> Self {
        let hasher = RandomState::new();
        let hashes = |entry: &'a WorkloadEntry| entry.selectors.parts().map(|parts| hash(&hasher, parts));
        let mut uses: HashMap<u32, u32> = HashMap::new();
        let for_workloads = |e: &&WorkloadEntry| !e.store_svid;
        for hash in entries.clone().filter(for_workloads).flat_map(hashes) {
            *uses.entry(hash).or_default() += 1;
        }
        let mut filed = Vec::new();
        for (position, entry) in entries.enumerate().filter(|(_, e)| for_workloads(e)) {
            let rarest = hashes(entry).min_by_key(|hash| uses.get(hash).copied().unwrap_or(0));
            if let (Some(hash), Ok(position)) = (rarest, u32::try_from(position)) {
                filed.push((hash, position));
            }
        }
        filed.sort_unstable();
        Self { filed: filed.into_boxed_slice(), hasher }
    }

    /// Positions of entries that may match, ascending; the caller checks each.
    pub(crate) fn candidates(&self, workload: &SelectorSet) -> Vec<usize> {
        let mut found = Vec::new();
        for selector in workload.iter() {
            let wanted = hash(&self.hasher, (&selector.kind, &selector.value));
            let from = self.filed.partition_point(|(hash, _)| *hash < wanted);
            let same = self.filed.iter().skip(from).take_while(|(hash, _)| *hash == wanted);
            found.extend(same.filter_map(|(_, position)| usize::try_from(*position).ok()));
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// The lower half is as good as the whole.
#[allow(clippy::cast_possible_truncation)]
fn hash(hasher: &RandomState, parts: (&str, &str)) -> u32 {
    hasher.hash_one(parts) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::{entry, selectors};
    use proptest::prelude::*;
    use std::sync::Arc;

    /// An agent may hold 100,000 entries, in 60 MiB with all else. Says what they cost: `cargo test -p finial-agent --lib
    /// memory_of -- --ignored --nocapture`, alone in its process.
    #[test]
    #[ignore = "a measurement"]
    fn memory_of_100_000_entries() {
        let anonymous_kib = || -> u64 {
            let text = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let clock = Arc::new(finial_core::SystemClock);
        let (cache, mut writer) = crate::cache::Cache::new(crate::cache::testing::bundle("td", &["k"]), 0, clock);
        let before = anonymous_kib();
        let one = |n: usize| {
            let id = format!("{n:08x}-1d2c-4a5e-8b7a-0123456789ab");
            Arc::new(entry(&id, &format!("spiffe://example.org/bench/m/{n}"), &[&format!("unix:uid:{}", 300_000 + n)]))
        };
        let entries: Vec<_> = (0..100_000).map(one).collect();
        writer.publish(crate::cache::Change { entries: Some(entries), ..Default::default() });
        let bytes = (anonymous_kib() - before) * 1024 / 100_000;
        println!("{bytes} bytes an entry, {} of them indexed", cache.snapshot().records.len());
    }

    proptest! {
        #[test]
        fn exactly_the_entries_within_the_workloads_selectors_match(
            entries in proptest::collection::vec(proptest::collection::btree_set(0u8..8, 1..4), 0..30),
            workload in proptest::collection::btree_set(0u8..8, 0..8),
        ) {
            let name = |n: &u8| format!("unix:uid:{n}");
            let all: Vec<_> = entries.iter().enumerate().map(|(i, set)| {
                let texts: Vec<String> = set.iter().map(name).collect();
                entry(&format!("e{i:02}"), "spiffe://td/x", &texts.iter().map(String::as_str).collect::<Vec<_>>())
            }).collect();
            let texts: Vec<String> = workload.iter().map(name).collect();
            let workload = selectors(&texts.iter().map(String::as_str).collect::<Vec<_>>());
            let index = SelectorIndex::new(all.iter());
            let found: Vec<usize> = index.candidates(&workload).into_iter()
                .filter(|i| all[*i].selectors.is_subset_of(&workload)).collect();
            let expected: Vec<usize> = (0..all.len()).filter(|i| all[*i].selectors.is_subset_of(&workload)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
