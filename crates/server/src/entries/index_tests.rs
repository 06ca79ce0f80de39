//! The index against a model that is slow and obviously right.

use super::super::indexed::SERVER_PATH;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&trust_domain(), path).unwrap()
}

fn selectors(values: &[u8]) -> SelectorSet {
    values.iter().map(|v| Selector { kind: "s".into(), value: v.to_string() }).collect()
}

fn entry(entry_id: &str, path: &str, parent: &str, wanted: &[u8]) -> Entry {
    Entry {
        admin: wanted.contains(&1),
        downstream: wanted.contains(&2),
        revision_number: 7,
        created_at: 9,
        ..Entry::new(EntryId::parse(entry_id).unwrap(), id(path), id(parent), selectors(wanted))
    }
}

/// SPIRE's rule, read off its text: everything below the agent, below the aliases whose selectors it has, and below
/// what was found so.
fn authorized_by_rule(entries: &BTreeMap<String, Entry>, agent: &SpiffeId, have: &SelectorSet) -> Vec<String> {
    let alias = |e: &&Entry| e.parent_id.path() == SERVER_PATH && e.selectors.is_subset_of(have);
    let mut reached: Vec<SpiffeId> = entries.values().filter(alias).map(|e| e.spiffe_id.clone()).collect();
    reached.push(agent.clone());
    loop {
        let below = |e: &&Entry| e.parent_id.path() != SERVER_PATH && reached.contains(&e.parent_id);
        let found: Vec<&Entry> = entries.values().filter(below).collect();
        let new: Vec<SpiffeId> = found.iter().map(|e| e.spiffe_id.clone()).filter(|id| !reached.contains(id)).collect();
        if new.is_empty() {
            return found.into_iter().map(|e| e.id.as_str().to_owned()).collect();
        }
        reached.extend(new);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(Entry),
    Remove(String),
}

fn step() -> impl Strategy<Value = Step> {
    let path = (0..6u8).prop_map(|n| format!("/w{n}"));
    let parent = prop_oneof![
        (0..6u8).prop_map(|n| format!("/w{n}")),
        Just(SERVER_PATH.to_owned()),
        Just("/spire/agent/a".to_owned()),
        Just("/spire/agent/b".to_owned()),
    ];
    let wanted = proptest::collection::vec(0..4u8, 1..4);
    let put = (0..12u8, path, parent, wanted)
        .prop_map(|(n, path, parent, wanted)| Step::Put(entry(&format!("e{n}"), &path, &parent, &wanted)));
    prop_oneof![4 => put, 1 => (0..12u8).prop_map(|n| Step::Remove(format!("e{n}")))]
}

proptest! {
    #[test]
    fn after_any_changes_the_index_answers_as_the_rule_does(
        steps in proptest::collection::vec(step(), 0..40),
        have in proptest::collection::vec(0..4u8, 0..4),
    ) {
        let mut index = Index::new(trust_domain());
        let mut model = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(entry) => {
                    index.put(&entry, 0);
                    model.insert(entry.id.as_str().to_owned(), entry);
                }
                Step::Remove(id) => {
                    index.remove(&id);
                    model.remove(&id);
                }
            }
        }
        prop_assert_eq!(index.len(), model.len());
        let have = selectors(&have);
        for agent in ["/spire/agent/a", "/spire/agent/b", "/spire/agent/none"].map(id) {
            let expected = authorized_by_rule(&model, &agent, &have);
            let mut found: Vec<_> = index.authorized(&agent, &have).iter().map(|e| e.id().to_owned()).collect();
            found.sort();
            let mut sorted = expected.clone();
            sorted.sort();
            prop_assert_eq!(found, sorted);
            let all: Vec<String> = (0..12u8).map(|n| format!("e{n}")).collect();
            let picked = index.authorized_among(&agent, &have, all.iter().map(String::as_str));
            for (id, picked) in all.iter().zip(picked) {
                prop_assert_eq!(picked.is_some(), expected.contains(id), "{}", id);
            }
        }
        for path in (0..6u8).map(|n| format!("/w{n}")) {
            let any = |flag: fn(&Entry) -> bool| model.values().any(|e| e.spiffe_id.path() == path && flag(e));
            prop_assert_eq!(index.is_admin(&id(&path)), any(|e| e.admin));
            prop_assert_eq!(index.is_downstream(&id(&path)), any(|e| e.downstream));
        }
        for (id, entry) in &model {
            prop_assert_eq!(index.get(id).unwrap().to_proto(), finial_proto::convert::entry_to_proto(entry));
        }
    }

    #[test]
    fn positions_are_found_in_entries_of_any_length(
        entry_id in "[a-z0-9.-]{1,255}",
        path in "(/[a-z]{1,120}){1,7}",
        parent in "(/[a-z]{1,120}){1,7}",
    ) {
        let kept = Indexed::new(&entry(&entry_id, &path, &parent, &[1]), 5, &trust_domain());
        prop_assert_eq!((kept.id(), kept.path(), kept.parent_path()), (&*entry_id, &*path, &*parent));
        prop_assert_eq!((kept.row(), kept.revision_number(), kept.created_at()), (5, 7, 9));
        prop_assert!(kept.is_admin() && !kept.is_downstream() && !kept.is_foreign());
    }
}

#[test]
fn foreign_entries_reach_nobody() {
    let mut index = Index::new(trust_domain());
    let mut foreign = entry("e", "/w", "/spire/agent/a", &[1]);
    foreign.spiffe_id = SpiffeId::parse("spiffe://other.test/w").unwrap();
    index.put(&foreign, 3);
    let roots = SelectorSet::default();
    assert!(index.authorized(&id("/spire/agent/a"), &roots).is_empty());
    assert_eq!(index.authorized_among(&id("/spire/agent/a"), &roots, ["e"].into_iter()).iter().flatten().count(), 0);
    assert_eq!(index.after(0, 10).count(), 1, "it is listed");
    assert!(!index.is_admin(&foreign.spiffe_id) && !index.is_admin(&id("/w")));
}

#[test]
fn lists_are_in_the_order_of_rows_and_go_on_after_one() {
    let mut index = Index::new(trust_domain());
    for (name, row) in [("c", 30), ("a", 10), ("b", 20)] {
        index.put(&entry(name, "/w", "/spire/agent/a", &[1]), row);
    }
    let names = |index: &Index, after, count| index.after(after, count).map(|e| e.id().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&index, 0, 2), ["a", "b"]);
    assert_eq!(names(&index, 20, 2), ["c"]);
    // An update whose row is not told keeps its place; a new entry in a freed slot does not take another's.
    index.put(&entry("a", "/w2", "/spire/agent/a", &[1]), 0);
    index.remove("b");
    index.put(&entry("d", "/w", "/spire/agent/a", &[1]), 40);
    assert_eq!(names(&index, 0, 9), ["a", "c", "d"]);
    // Created again under the same ID, it is another row.
    index.put(&entry("a", "/w", "/spire/agent/a", &[1]), 50);
    assert_eq!(names(&index, 0, 9), ["c", "d", "a"]);
}

/// All nodes of a fleet that joined by tokens for one ID: very many entries lie above what all of them may have.
#[test]
fn an_entry_below_very_many_is_found_from_either_side() {
    let mut index = Index::new(trust_domain());
    for n in 0..10 * CLIMB_MAX {
        index.put(&entry(&format!("alias{n}"), "/fleet", &format!("/spire/agent/{n}"), &[0]), 0);
    }
    index.put(&entry("shared", "/shared", "/fleet", &[0]), 0);
    index.put(&entry("deeper", "/deeper", "/shared", &[0]), 0);
    index.put(&entry("other", "/other", "/elsewhere", &[0]), 0);
    for (agent, has) in [("/spire/agent/0", true), ("/spire/agent/639", true), ("/spire/agent/stranger", false)] {
        let found = index.authorized_among(&id(agent), &selectors(&[]), ["shared", "deeper", "other"].into_iter());
        assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [has, has, false], "{agent}");
    }
}
