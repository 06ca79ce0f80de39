//! Memory against a plain filter over what is in the datastore: the same entries, the same pages.

use super::super::Turn;
use super::*;
use finial_core::{Entry, EntryId, ManualClock, SelectorSet, SpiffeId, TrustDomain};
use finial_proto::convert::entry_to_proto;
use finial_runtime::Supervisor;
use finial_store::{Store, StoreSettings};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

const BEHAVIORS: [MatchBehavior; 4] =
    [MatchBehavior::Exact, MatchBehavior::Subset, MatchBehavior::Superset, MatchBehavior::Any];

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap()
}

fn selectors(bits: u8) -> Vec<Selector> {
    (0..4).filter(|n| bits & (1 << n) != 0).map(|n| Selector { kind: "s".into(), value: n.to_string() }).collect()
}

fn domains(bits: u8) -> Vec<TrustDomain> {
    let names = ["a.test", "b.test"];
    names.iter().zip([1, 2]).filter(|(_, bit)| bits & bit != 0).map(|(n, _)| TrustDomain::parse(n).unwrap()).collect()
}

#[derive(Clone, Debug)]
struct Plan {
    path: u8,
    parent: u8,
    selectors: u8,
    federates_with: u8,
    downstream: bool,
    hint: u8,
}

fn plan() -> impl Strategy<Value = Plan> {
    (0..3u8, 0..3u8, 1..16u8, 0..4u8, any::<bool>(), 0..3u8).prop_map(
        |(path, parent, selectors, federates_with, downstream, hint)| Plan {
            path,
            parent,
            selectors,
            federates_with,
            downstream,
            hint,
        },
    )
}

fn parent(n: u8) -> SpiffeId {
    match n {
        0 => id("spire/server"),
        n => id(&format!("spire/agent/{n}")),
    }
}

fn entry(n: usize, plan: &Plan) -> Entry {
    Entry {
        federates_with: domains(plan.federates_with),
        downstream: plan.downstream,
        dns_names: vec!["x".into()],
        hint: ["", "x", "y"][plan.hint as usize].into(),
        ..Entry::new(
            EntryId::parse(&format!("e{n}")).unwrap(),
            id(&format!("w{}", plan.path)),
            parent(plan.parent),
            SelectorSet::new(selectors(plan.selectors)),
        )
    }
}

fn filter() -> impl Strategy<Value = EntryFilter> {
    let some = |range: std::ops::Range<u8>| proptest::option::weighted(0.3, range);
    (some(0..3), some(0..3), some(1..16), some(1..4), some(0..3), some(0..2), 0..4usize).prop_map(
        |(path, above, wanted, federates_with, hint, downstream, behavior)| EntryFilter {
            spiffe_id: path.map(|n| id(&format!("w{n}"))),
            parent_id: above.map(parent),
            selectors: wanted.map(|bits| (BEHAVIORS[behavior], selectors(bits))),
            federates_with: federates_with.map(|bits| (BEHAVIORS[behavior], domains(bits))),
            hint: hint.map(|n| ["", "x", "y"][n as usize].into()),
            downstream: downstream.map(|n| n == 1),
        },
    )
}

async fn memory(store: &Store) -> Arc<Entries> {
    let turn = Turn::new(Supervisor::default().spawner());
    Entries::load(store.clone(), turn, TrustDomain::parse("example.org").unwrap()).await.unwrap()
}

#[tokio::test]
async fn others_run_while_many_are_listed_or_counted() {
    let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(0))).await.unwrap();
    let entries = memory(&store).await;
    let plan = Plan { path: 1, parent: 1, selectors: 1, federates_with: 0, downstream: false, hint: 0 };
    let all = (0..=PIECE).map(|n| {
        let selector = Selector { kind: "s".into(), value: n.to_string() };
        Entry { selectors: SelectorSet::new(vec![selector]), ..entry(n, &plan) }
    });
    entries.create(all.collect()).await.unwrap();
    let below = EntryFilter { parent_id: Some(parent(1)), ..EntryFilter::default() };
    let hinted = EntryFilter { hint: Some(String::new()), ..EntryFilter::default() };
    for filter in [&EntryFilter::default(), &below, &hinted] {
        let mut list = std::pin::pin!(entries.list(filter, None));
        assert!(futures::poll!(&mut list).is_pending(), "{filter:?}");
        assert_eq!(list.await.unwrap().items.len(), PIECE + 1);
    }
    for filter in [&below, &hinted] {
        let mut count = std::pin::pin!(entries.count_matching(filter));
        assert!(futures::poll!(&mut count).is_pending(), "{filter:?}");
        assert_eq!(count.await, PIECE + 1);
    }
}

async fn same(plans: &[Plan], filters: &[EntryFilter], gone: usize, size: u32) {
    let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(0))).await.unwrap();
    for trust_domain in domains(3) {
        let bundle = finial_core::Bundle::empty(trust_domain);
        store.create_bundle(&bundle).await.unwrap();
    }
    let entries = memory(&store).await;
    let wanted = plans.iter().enumerate().map(|(n, plan)| entry(n, plan)).collect();
    entries.create(wanted).await.unwrap();
    entries.delete(vec![EntryId::parse(&format!("e{gone}")).unwrap()]).await.unwrap();
    for filter in filters {
        let mut stored = store.entries_after(0, u32::MAX).await.unwrap().0;
        stored.retain(|(_, entry)| expected(filter, entry));
        let all: Vec<_> = stored.iter().map(|(_, entry)| entry_to_proto(entry)).collect();
        assert_eq!(entries.list(filter, None).await.unwrap().items, all, "{filter:?}");
        assert_eq!(entries.count_matching(filter).await, all.len(), "{filter:?}");
        let mut page = Page { token: String::new(), size };
        for want in stored.chunks(size as usize).chain([&[][..]]) {
            let listed = entries.list(filter, Some(&page)).await.unwrap();
            assert_eq!(listed.items, want.iter().map(|(_, entry)| entry_to_proto(entry)).collect::<Vec<_>>());
            // The row of the last one; SPIRE's clients ask until there is none.
            page.token = listed.next_page_token;
            assert_eq!(page.token, want.last().map_or(String::new(), |(row, _)| row.to_string()), "{filter:?}");
        }
    }
}

fn relates<T: Ord>(wanted: &Option<(MatchBehavior, Vec<T>)>, have: BTreeSet<&T>) -> bool {
    let Some((behavior, given)) = wanted else { return true };
    let given: BTreeSet<&T> = given.iter().collect();
    !have.is_empty()
        && match behavior {
            MatchBehavior::Exact => have == given,
            MatchBehavior::Subset => have.is_subset(&given),
            MatchBehavior::Superset => have.is_superset(&given),
            MatchBehavior::Any => !have.is_disjoint(&given),
        }
}

fn expected(filter: &EntryFilter, entry: &Entry) -> bool {
    filter.spiffe_id.as_ref().is_none_or(|id| entry.spiffe_id == *id)
        && filter.parent_id.as_ref().is_none_or(|id| entry.parent_id == *id)
        && filter.hint.as_ref().is_none_or(|hint| entry.hint == *hint)
        && (entry.downstream || filter.downstream != Some(true))
        && relates(&filter.selectors, entry.selectors.iter().collect())
        && relates(&filter.federates_with, entry.federates_with.iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn memory_answers_with_what_the_datastore_holds(
        plans in proptest::collection::vec(plan(), 0..20),
        filters in proptest::collection::vec(filter(), 1..12),
        gone in 0..20usize,
        size in 1..5u32,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(same(&plans, &filters, gone, size));
    }
}
