use super::state::{Circumstances, state};
use super::*;
use crate::cache::Record;
use crate::cache::testing::{entry, selectors, svid};
use crate::entry::WorkloadEntry;
use finial_core::EntryId;
use finial_proto::agent::explain::State;
use proptest::prelude::*;
use std::sync::Arc;

fn records(entries: &[(&str, &[&str])]) -> Vec<Record> {
    entries.iter().map(|(id, texts)| Record::new(Arc::new(entry(id, "spiffe://td/x", texts)))).collect()
}

fn near_ids(explanation: &Explanation<'_>) -> Vec<String> {
    explanation.nearest.iter().map(|near| near.record.entry.id.as_str().to_owned()).collect()
}

#[test]
fn the_fewest_missing_come_first_and_among_them_those_with_the_most_there() {
    let process = selectors(&["unix:uid:1000", "unix:path:/bin/web", "docker:label:app:web"]);
    let records = records(&[
        ("a", &["k8s:ns:default"]),
        ("b", &["unix:uid:1001"]),
        ("c", &["unix:uid:1000", "docker:label:app:api"]),
        ("d", &["unix:uid:7", "k8s:ns:default", "unix:path:/x"]),
        ("e", &["unix:uid:1000", "unix:path:/bin/web"]),
        ("f", &["spiffe_id:spiffe://td/spire/agent/x"]),
    ]);
    let explanation = explain(&process, &records);
    assert_eq!(explanation.fitting.iter().map(|r| r.entry.id.as_str()).collect::<Vec<_>>(), ["e"]);
    assert_eq!(near_ids(&explanation), ["c", "b", "a", "d"]);
    assert_eq!(explanation.all, 5, "the last one is an agent's");
    let nearest = &explanation.nearest[0];
    assert_eq!(nearest.present, 1);
    assert_eq!(nearest.missing[0].wanted.to_string(), "docker:label:app:api");
    assert_eq!(nearest.missing[0].found[0].to_string(), "docker:label:app:web");
    assert!(explanation.nearest[2].missing[0].found.is_empty(), "nothing of that kind");
}

#[test]
fn what_is_there_instead_is_about_the_same_thing() {
    let process =
        selectors(&["docker:env:A=1", "docker:env:B=2", "docker:label:x:1", "docker:label:y:1", "unix:uid:1"]);
    let found = |wanted: &str| {
        let wanted = Selector::parse(wanted).unwrap();
        instead(&process, &wanted).into_iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(found("docker:env:B=3"), ["docker:env:B=2"]);
    assert_eq!(found("docker:label:y:2"), ["docker:label:y:1"]);
    assert_eq!(found("docker:label:z:2"), ["docker:label:x:1", "docker:label:y:1"]);
    assert_eq!(found("unix:gid:1"), [""; 0]);
    assert_eq!(found("unix:1"), [""; 0]);
}

#[test]
fn the_state_of_an_svid_says_why_it_is_not_there() {
    let plain = Arc::new(entry("e1", "spiffe://td/x", &["unix:uid:1"]));
    let lazy = Arc::new(WorkloadEntry { disable_x509_svid_prefetch: true, ..WorkloadEntry::clone(&plain) });
    let changed = Arc::new(WorkloadEntry { revision_number: 9, ..WorkloadEntry::clone(&plain) });
    let held =
        |entry: &Arc<WorkloadEntry>| Record { svid: Some(Arc::new(svid(&plain, 1))), ..Record::new(entry.clone()) };
    let at = |now_ms| Circumstances { now_ms, hidden_by: None, refused: None, away: None };
    // The SVID is to be renewed at 1,000,000 ms and ends at 2,000,000 ms.
    assert_eq!(state(&held(&plain), &at(999_999)), (State::Issued, String::new()));
    assert_eq!(state(&held(&plain), &at(1_000_000)).0, State::Renewing);
    assert_eq!(state(&held(&changed), &at(0)).0, State::Renewing);
    let away = Circumstances { away: Some("no route"), ..at(2_000_000) };
    assert_eq!(state(&held(&plain), &away), (State::Expired, "the server cannot be asked: no route".into()));
    let none = Record::new(plain.clone());
    assert!(state(&none, &at(0)).1.contains("x509_svid_cache_max_size"));
    assert!(state(&Record::new(lazy), &at(0)).1.contains("prefetching disabled"));
    let refused = Circumstances { refused: Some("not yours"), ..at(0) };
    assert_eq!(state(&none, &refused), (State::Waiting, "the server did not issue it: not yours".into()));
    let stored = Arc::new(WorkloadEntry { store_svid: true, ..WorkloadEntry::clone(&plain) });
    assert_eq!(state(&held(&stored), &at(0)).0, State::Hidden);
    let other = EntryId::parse("older").unwrap();
    let hidden = Circumstances { hidden_by: Some(&other), ..at(0) };
    assert_eq!(state(&held(&plain), &hidden).0, State::Hidden);
}

proptest! {
    #[test]
    fn an_explanation_holds(
        entries in proptest::collection::vec(proptest::collection::btree_set((0u8..3, 0u8..4), 1..4), 0..30),
        process in proptest::collection::btree_set((0u8..3, 0u8..4), 0..8),
    ) {
        let set = |parts: &std::collections::BTreeSet<(u8, u8)>| {
            let texts: Vec<String> = parts.iter().map(|(kind, value)| format!("kind{}:name:{value}", kind % 2)).collect();
            selectors(&texts.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let process = set(&process);
        let records: Vec<Record> = entries.iter().enumerate().map(|(at, parts)| {
            let entry = WorkloadEntry { selectors: set(parts).into(), ..entry(&format!("e{at:02}"), "spiffe://td/x", &["a:b"]) };
            Record::new(Arc::new(entry))
        }).collect();
        let explanation = explain(&process, &records);
        // Exactly those fit that the cache would give.
        let expected: Vec<_> = records.iter().filter(|r| r.entry.selectors.is_subset_of(&process)).map(|r| &r.entry.id).collect();
        prop_assert_eq!(explanation.fitting.iter().map(|r| &r.entry.id).collect::<Vec<_>>(), expected);
        prop_assert_eq!(explanation.nearest.len(), NEAREST_MAX.min(records.len() - explanation.fitting.len()));
        for near in &explanation.nearest {
            prop_assert_eq!(near.present + near.missing.len(), near.record.entry.selectors.len());
            prop_assert!(!near.missing.is_empty());
            prop_assert!(near.missing.iter().all(|m| !process.contains(&m.wanted)));
            prop_assert!(near.missing.iter().flat_map(|m| &m.found).all(|found| process.contains(found)));
            // With the missing ones it would fit, and without any one of them it would not.
            let all: SelectorSet = process.iter().chain(near.missing.iter().map(|m| &m.wanted)).cloned().collect();
            prop_assert!(near.record.entry.selectors.is_subset_of(&all));
            for left_out in &near.missing {
                let fewer: SelectorSet = all.iter().filter(|s| **s != left_out.wanted).cloned().collect();
                prop_assert!(!near.record.entry.selectors.is_subset_of(&fewer));
            }
        }
        // Nothing that is left out lacks less than what is told.
        let listed: Vec<String> = near_ids(&explanation);
        let lacks = |r: &Record| r.entry.selectors.iter().filter(|s| !process.contains(s)).count();
        let worst = explanation.nearest.iter().map(|near| near.missing.len()).max().unwrap_or_default();
        let others = records.iter().filter(|r| lacks(r) > 0 && !listed.iter().any(|id| id == r.entry.id.as_str()));
        prop_assert!(others.clone().all(|r| lacks(r) >= worst));
        prop_assert!(explanation.nearest.is_sorted_by_key(|near| near.missing.len()));
        // The order in which the entries come does not matter.
        let backwards: Vec<Record> = records.iter().rev().cloned().collect();
        prop_assert_eq!(near_ids(&explain(&process, &backwards)), listed);
    }
}
