//! Which entries match a workload: all whose selectors are among the workload's.

use crate::entry::WorkloadEntry;
use finial_core::{Selector, SelectorSet};
use std::collections::HashMap;

/// Entries filed under their rarest selector, so that a lookup looks at few that do not match. Each entry is filed once; those
/// whose SVIDs are for a store not at all, as no workload gets them.
#[derive(Debug, Default)]
pub(crate) struct SelectorIndex {
    filed: HashMap<Selector, Box<[u32]>>,
}

impl SelectorIndex {
    /// Indexes entries by their positions.
    pub(crate) fn new<'a>(entries: impl Iterator<Item = &'a WorkloadEntry> + Clone) -> Self {
        let mut uses: HashMap<&Selector, u32> = HashMap::new();
        let for_workloads = |e: &&WorkloadEntry| !e.store_svid;
        for selector in entries.clone().filter(for_workloads).flat_map(|e| e.selectors.iter()) {
            *uses.entry(selector).or_default() += 1;
        }
        let mut filed: HashMap<&Selector, Vec<u32>> = HashMap::new();
        for (position, entry) in entries.enumerate().filter(|(_, e)| for_workloads(e)) {
            let rarest = entry.selectors.iter().min_by_key(|s| uses.get(s).copied().unwrap_or(0));
            if let (Some(selector), Ok(position)) = (rarest, u32::try_from(position)) {
                filed.entry(selector).or_default().push(position);
            }
        }
        Self { filed: filed.into_iter().map(|(s, p)| (s.clone(), p.into_boxed_slice())).collect() }
    }

    /// Positions of entries that may match, ascending; the caller checks each.
    pub(crate) fn candidates(&self, workload: &SelectorSet) -> Vec<usize> {
        let mut found: Vec<usize> = workload
            .iter()
            .filter_map(|selector| self.filed.get(selector))
            .flat_map(|positions| positions.iter().filter_map(|p| usize::try_from(*p).ok()))
            .collect();
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::{entry, selectors};
    use proptest::prelude::*;

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
