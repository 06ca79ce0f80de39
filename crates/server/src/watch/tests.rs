//! Whoever's entries differ after a change hears of every entry that differs; against a comparison of everything.

use super::*;
use crate::testing::Memory;
use finial_core::{Entry, EntryId, Selector, TrustDomain};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&trust_domain(), path).unwrap()
}

fn selectors(values: &[u8]) -> SelectorSet {
    values.iter().map(|v| Selector { kind: "s".into(), value: v.to_string() }).collect()
}

fn entry(entry_id: &str, path: &str, parent: &str, wanted: &[u8], revision_number: i64) -> Entry {
    Entry {
        revision_number,
        created_at: 9,
        ..Entry::new(EntryId::parse(entry_id).unwrap(), id(path), id(parent), selectors(wanted))
    }
}

async fn watchers() -> Arc<Watchers> {
    let feed = BundleFeed::open(Arc::new(Memory::default()), trust_domain()).await.unwrap();
    Watchers::new(feed)
}

#[derive(Clone, Debug)]
enum Step {
    Put(Entry),
    Remove(String),
}

fn step() -> impl Strategy<Value = Step> {
    let path = (0..6u8).prop_map(|n| format!("/w{n}"));
    let parent = prop_oneof![
        2 => (0..6u8).prop_map(|n| format!("/w{n}")),
        2 => Just("/spire/server".to_owned()),
        1 => Just("/spire/agent/a".to_owned()),
        1 => Just("/spire/agent/b".to_owned()),
    ];
    let wanted = proptest::collection::vec(0..4u8, 1..4);
    let put = (0..12u8, path, parent, wanted, 0..3i64)
        .prop_map(|(n, path, parent, wanted, r)| Step::Put(entry(&format!("e{n}"), &path, &parent, &wanted, r)));
    prop_oneof![4 => put, 2 => (0..12u8).prop_map(|n| Step::Remove(format!("e{n}")))]
}

fn seen(index: &Index, watcher: &Watcher) -> BTreeMap<String, Vec<u8>> {
    let entries = index.authorized(&watcher.agent, &watcher.selectors);
    entries.iter().map(|e| (e.id().to_owned(), e.encoded().to_vec())).collect()
}

proptest! {
    #[test]
    fn everyone_hears_of_every_entry_that_differs_for_them(
        batches in proptest::collection::vec(proptest::collection::vec(step(), 1..6), 1..12),
        agents in proptest::collection::vec((prop_oneof![Just("a"), Just("b"), Just("c")], proptest::collection::vec(0..4u8, 0..4)), 1..5),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let registry = runtime.block_on(watchers());
        let open: Vec<_> = agents.iter()
            .map(|(name, have)| registry.register(id(&format!("/spire/agent/{name}")), Arc::new(selectors(have)), i64::MAX))
            .collect();
        let mut index = Index::new(trust_domain());
        for batch in batches {
            // As the index is changed: each ID once.
            let batch: BTreeMap<String, Step> = batch.into_iter().map(|step| match &step {
                Step::Put(entry) => (entry.id.as_str().to_owned(), step),
                Step::Remove(id) => (id.clone(), step),
            }).collect();
            let ids: Vec<&str> = batch.keys().map(String::as_str).collect();
            let before: Vec<_> = open.iter().map(|w| seen(&index, w)).collect();
            registry.before(&index, &ids);
            for step in batch.values() {
                match step {
                    Step::Put(entry) => index.put(entry, 0),
                    Step::Remove(id) => index.remove(id),
                }
            }
            registry.after(&index, &ids);
            for (watcher, before) in open.iter().zip(before) {
                let after = seen(&index, watcher);
                let pending = watcher.take();
                prop_assert!(!pending.everything);
                let told: BTreeSet<&str> = pending.ids.iter().flat_map(|ids| ids.iter().map(|id| &**id)).collect();
                for id in before.keys().chain(after.keys()).filter(|id| before.get(*id) != after.get(*id)) {
                    prop_assert!(told.contains(&**id), "{} of {:?}", id, watcher.agent);
                }
            }
        }
        open.iter().for_each(|watcher| registry.forget(watcher));
        prop_assert_eq!(registry.count(), 0);
        prop_assert!(lock(&registry.open).by_agent.is_empty());
    }
}

/// What waits for an agent that does not read is bounded, and then it is told to compare.
#[tokio::test]
async fn more_than_can_wait_becomes_everything() {
    let registry = watchers().await;
    let watcher = registry.register(id("/spire/agent/a"), Arc::default(), i64::MAX);
    let mut index = Index::new(trust_domain());
    for n in 0..PENDING_MAX + 1 {
        let entry = entry(&format!("e{n}"), "/x", "/spire/agent/a", &[1], 0);
        registry.before(&index, &[entry.id.as_str()]);
        index.put(&entry, 0);
        registry.after(&index, &[entry.id.as_str()]);
    }
    let pending = watcher.take();
    assert!(pending.everything && pending.ids.is_empty());
    // And many at once as well.
    let other = registry.register(id("/spire/agent/a"), Arc::default(), i64::MAX);
    let ids: Vec<String> = (0..PENDING_MAX + 1).map(|n| format!("e{n}")).collect();
    registry.after(&index, &ids.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(other.take().everything);
}

/// What comes between the question whether the stream goes on and the look at what to send is heard the next time.
#[tokio::test]
async fn a_look_at_changes_leaves_what_ends_the_stream() {
    let registry = watchers().await;
    let agent = id("/spire/agent/a");
    let watchers: Vec<_> =
        (0..=PER_AGENT_MAX).map(|_| registry.register(agent.clone(), Arc::default(), i64::MAX)).collect();
    registry.replaced(&Index::new(trust_domain()));
    registry.agent_changed(&agent);
    registry.all(|pending| pending.closing = true);
    let first = &watchers[0];
    assert!(first.take().everything);
    let pending = lock(&first.pending);
    assert!(pending.agent && pending.displaced && pending.closing);
    assert!(!pending.everything, "that was taken");
}
