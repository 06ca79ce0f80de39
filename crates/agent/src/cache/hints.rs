//! Of several matching entries with one hint only the oldest counts; of equally old ones the one with the lower ID.

use crate::entry::WorkloadEntry;
use std::collections::HashMap;

/// Removes entries whose hint a better entry has; the order stays. Entries without a hint all stay.
/// Returns what was removed.
pub(crate) fn drop_duplicate_hints<T>(items: Vec<T>, entry: impl Fn(&T) -> &WorkloadEntry) -> (Vec<T>, Vec<T>) {
    let mut best: HashMap<&str, &WorkloadEntry> = HashMap::new();
    for item in &items {
        let one = entry(item);
        if one.hint.is_empty() {
            continue;
        }
        let kept = best.entry(&one.hint).or_insert(one);
        if (one.created_at, one.id.as_str()) < (kept.created_at, kept.id.as_str()) {
            *kept = one;
        }
    }
    let keep: Vec<bool> = items
        .iter()
        .map(|item| {
            let one = entry(item);
            best.get(one.hint.as_str()).is_none_or(|kept| kept.id.as_str() == one.id.as_str())
        })
        .collect();
    let mut keep = keep.into_iter();
    items.into_iter().partition(|_| keep.next().unwrap_or(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::entry;
    use proptest::prelude::*;

    fn with(id: &str, hint: &str, created_at: i64) -> WorkloadEntry {
        WorkloadEntry { hint: hint.into(), created_at, ..entry(id, "spiffe://td/x", &["unix:uid:1"]) }
    }

    fn ids(entries: &[WorkloadEntry]) -> Vec<&str> {
        entries.iter().map(|e| e.id.as_str()).collect()
    }

    #[test]
    fn the_oldest_entry_of_a_hint_stays() {
        let (kept, gone) = drop_duplicate_hints(
            vec![with("a", "x", 30), with("b", "x", 10), with("c", "", 1), with("d", "", 1), with("e", "y", 9)],
            |e| e,
        );
        assert_eq!(ids(&kept), ["b", "c", "d", "e"]);
        assert_eq!(ids(&gone), ["a"]);
    }

    #[test]
    fn of_equally_old_ones_the_lower_id_stays() {
        let (kept, _) = drop_duplicate_hints(vec![with("b", "x", 5), with("a", "x", 5)], |e| e);
        assert_eq!(ids(&kept), ["a"]);
    }

    proptest! {
        #[test]
        fn each_hint_stays_once_and_nothing_is_lost(spec in proptest::collection::vec((0u8..4, 0i64..3), 0..20)) {
            let hints = ["", "x", "y", "z"];
            let all: Vec<_> = spec.iter().enumerate()
                .map(|(i, (h, t))| with(&format!("e{i:02}"), hints[usize::from(*h)], *t)).collect();
            let (kept, gone) = drop_duplicate_hints(all.clone(), |e| e);
            prop_assert_eq!(kept.len() + gone.len(), all.len());
            for hint in &hints[1..] {
                let expected = all.iter().filter(|e| e.hint == *hint).min_by_key(|e| (e.created_at, e.id.as_str().to_owned()));
                let found: Vec<_> = kept.iter().filter(|e| e.hint == *hint).collect();
                prop_assert_eq!(found.len(), usize::from(expected.is_some()));
                prop_assert_eq!(found.first().map(|e| e.id.as_str()), expected.map(|e| e.id.as_str()));
            }
            prop_assert_eq!(kept.iter().filter(|e| e.hint.is_empty()).count(), all.iter().filter(|e| e.hint.is_empty()).count());
        }
    }
}
