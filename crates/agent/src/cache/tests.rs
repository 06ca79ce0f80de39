use super::testing::{bundle, entry, selectors, svid};
use super::*;
use finial_core::ManualClock;
use finial_crypto::JwtKeySource;

fn empty() -> (Arc<Cache>, CacheWriter) {
    Cache::new(bundle("td", &["k1"]), 0, Arc::new(ManualClock::at(1_000)))
}

fn entries(list: &[WorkloadEntry]) -> Option<Vec<Arc<WorkloadEntry>>> {
    let mut entries: Vec<_> = list.iter().cloned().map(Arc::new).collect();
    entries.sort_by(|a, b| a.id.cmp(&b.id));
    Some(entries)
}

fn issued(list: &[&WorkloadEntry], serial: u8) -> Vec<(EntryId, Arc<WorkloadSvid>)> {
    list.iter().map(|e| (e.id.clone(), Arc::new(svid(e, serial)))).collect()
}

/// A stream, as far as the cache is concerned.
struct Watcher(tokio::sync::watch::Receiver<Arc<ViewState>>, #[allow(dead_code)] Subscription);

fn watch(cache: &Cache, selectors: &SelectorSet) -> Watcher {
    let subscription = cache.subscribe(&cache.view(selectors));
    Watcher(subscription.states(), subscription)
}

impl Watcher {
    fn current(&mut self) -> Arc<ViewState> {
        self.0.borrow_and_update().clone()
    }
}

fn woken(watcher: &mut Watcher) -> bool {
    let woken = watcher.0.has_changed().unwrap();
    watcher.current();
    woken
}

#[test]
fn identities_are_in_order_of_entry_ids_and_complete_answers_are_ready_made() {
    let (cache, mut writer) = empty();
    let (b, a) =
        (entry("b", "spiffe://td/1", &["unix:uid:1"]), entry("a", "spiffe://td/2", &["unix:uid:1", "unix:gid:1"]));
    writer.publish(Change { entries: entries(&[b.clone(), a.clone()]), ..Change::default() });
    let view = cache.view(&selectors(&["unix:uid:1", "unix:gid:1", "unix:path:/x"]));
    assert!(view.now().incomplete && !view.now().has_identity());
    writer.publish(Change { svids: issued(&[&b, &a], 9), ..Change::default() });
    let state = view.now();
    assert!(!state.incomplete);
    let answer = state.x509_svids().decode().unwrap();
    let ids: Vec<_> = answer.svids.iter().map(|s| s.spiffe_id.as_str()).collect();
    assert_eq!(ids, ["spiffe://td/2", "spiffe://td/1"]);
    assert_eq!(answer.svids[0].x509_svid.as_ref(), [9; 4]);
    assert_eq!(answer.svids[0].x509_svid_key.as_ref(), [9; 2]);
    assert!(cache.view(&selectors(&["unix:uid:2"])).now().entries.is_empty());
}

#[test]
fn only_those_whom_a_change_concerns_are_woken() {
    let (cache, mut writer) = empty();
    let one = entry("a", "spiffe://td/1", &["unix:uid:1"]);
    let two = entry("b", "spiffe://td/2", &["unix:uid:2"]);
    writer.publish(Change {
        entries: entries(&[one.clone(), two.clone()]),
        svids: issued(&[&one, &two], 1),
        ..Change::default()
    });
    let mut first = watch(&cache, &selectors(&["unix:uid:1"]));
    let mut second = watch(&cache, &selectors(&["unix:uid:2"]));
    first.current();
    second.current();

    writer.publish(Change { svids: issued(&[&one], 2), ..Change::default() });
    assert!(woken(&mut first) && !woken(&mut second));

    // the same entries again: nobody
    let same = cache.snapshot().records.iter().map(|r| r.entry.clone()).collect();
    writer.publish(Change { entries: Some(same), ..Change::default() });
    assert!(!woken(&mut first) && !woken(&mut second));

    // a new own bundle: everybody
    let own = bundle("td", &["k2"]);
    writer.publish(Change { bundles: Some(Bundles { own, federated: BTreeMap::new() }), ..Change::default() });
    assert!(woken(&mut first) && woken(&mut second));

    // an entry goes: its workload only
    let left = cache.snapshot().record(&two.id).unwrap().entry.clone();
    writer.publish(Change { entries: Some(vec![left]), ..Change::default() });
    assert!(woken(&mut first) && !woken(&mut second));
    assert!(!first.current().has_identity());
}

#[test]
fn a_federated_bundle_concerns_those_who_federate() {
    let (cache, mut writer) = empty();
    let other = TrustDomain::parse("other").unwrap();
    let one = WorkloadEntry { federates_with: vec![other.clone()], ..entry("a", "spiffe://td/1", &["unix:uid:1"]) };
    let two = entry("b", "spiffe://td/2", &["unix:uid:2"]);
    writer.publish(Change {
        entries: entries(&[one.clone(), two.clone()]),
        svids: issued(&[&one, &two], 1),
        ..Change::default()
    });
    let mut first = watch(&cache, &selectors(&["unix:uid:1"]));
    let mut second = watch(&cache, &selectors(&["unix:uid:2"]));
    assert!(first.current().jwt_keys("other").is_none());
    second.current();
    let own = cache.snapshot().bundles.own.clone();
    let federated = [(other, bundle("other", &["o1"]))].into();
    writer.publish(Change { bundles: Some(Bundles { own, federated }), ..Change::default() });
    assert!(woken(&mut first) && !woken(&mut second));
    let state = first.current();
    assert!(state.jwt_keys("other").is_some());
    assert!(state.jwt_bundles().decode().unwrap().bundles.contains_key("spiffe://other"));
    assert!(second.current().jwt_keys("other").is_none());
}

#[test]
fn many_changes_at_once_reach_everyone_they_concern() {
    let (cache, mut writer) = empty();
    let all: Vec<_> =
        (0..200).map(|i| entry(&format!("e{i:03}"), "spiffe://td/x", &[&format!("unix:uid:{i}")])).collect();
    let mut watchers: Vec<_> = all.iter().map(|e| watch(&cache, &e.selectors.iter().collect())).collect();
    watchers.iter_mut().for_each(|w| drop(w.current()));
    writer.publish(Change { entries: entries(&all), ..Change::default() });
    assert!(watchers.iter_mut().all(woken));
    writer.publish(Change { svids: issued(&all.iter().take(100).collect::<Vec<_>>(), 1), ..Change::default() });
    let (with, without) = watchers.split_at_mut(100);
    assert!(with.iter_mut().all(woken));
    assert!(!without.iter_mut().any(woken));
}

#[test]
fn a_watched_view_asks_for_what_it_lacks_and_counts_as_in_use() {
    use futures::FutureExt;
    let (cache, mut writer) = empty();
    let one = entry("a", "spiffe://td/1", &["unix:uid:1"]);
    writer.publish(Change { entries: entries(std::slice::from_ref(&one)), ..Change::default() });
    assert!(cache.in_use().is_empty());
    let subscription = watch(&cache, &one.selectors.iter().collect());
    assert!(cache.wanted().now_or_never().is_some());
    assert!(cache.in_use().contains(&one.id));
    drop(subscription);
    assert!(cache.in_use().is_empty());
}

#[test]
fn what_changes_nothing_wakes_nobody() {
    use futures::FutureExt;
    let (cache, mut writer) = empty();
    let before = cache.snapshot();
    writer.publish(Change::default());
    assert!(Arc::ptr_eq(&before, &cache.snapshot()));
    assert!(cache.changed().now_or_never().is_none() && cache.to_store().now_or_never().is_none());
    let one = entry("a", "spiffe://td/1", &["unix:uid:1"]);
    writer.publish(Change { entries: entries(std::slice::from_ref(&one)), ..Change::default() });
    assert!(cache.changed().now_or_never().is_some() && cache.to_store().now_or_never().is_some());
}

#[test]
fn closing_ends_present_and_future_views() {
    let (cache, _writer) = empty();
    let mut subscription = watch(&cache, &selectors(&["unix:uid:1"]));
    subscription.current();
    cache.close();
    assert!(woken(&mut subscription) && subscription.current().closed);
    assert!(cache.view(&selectors(&["unix:uid:2"])).now().closed);
}

#[test]
fn an_entry_with_another_id_gives_nobody_the_key_of_the_one_before() {
    let (cache, mut writer) = empty();
    let old = entry("a", "spiffe://td/old", &["unix:uid:1"]);
    writer.publish(Change {
        entries: entries(std::slice::from_ref(&old)),
        svids: issued(&[&old], 1),
        ..Change::default()
    });
    // As long as it has the same ID, the SVID serves until there is another.
    let edited = WorkloadEntry { revision_number: 1, ..entry("a", "spiffe://td/old", &["unix:uid:2"]) };
    writer.publish(Change { entries: entries(std::slice::from_ref(&edited)), ..Change::default() });
    let state = cache.view(&selectors(&["unix:uid:2"])).now();
    assert_eq!(state.x509_svids().decode().unwrap().svids[0].spiffe_id, "spiffe://td/old");

    let new = WorkloadEntry { revision_number: 2, ..entry("a", "spiffe://td/new", &["unix:uid:3"]) };
    writer.publish(Change { entries: entries(std::slice::from_ref(&new)), ..Change::default() });
    let view = cache.view(&selectors(&["unix:uid:3"]));
    let state = view.now();
    assert!(!state.has_identity() && state.incomplete, "it is missing, and so asked for at once");
    assert!(state.records().iter().all(|r| r.svid.is_none()), "nor has anyone it who looks at the records");
    // One that was asked for before the change comes too late.
    writer.publish(Change { svids: issued(&[&old], 2), ..Change::default() });
    assert!(!view.now().has_identity());
    writer.publish(Change { svids: issued(&[&new], 3), ..Change::default() });
    assert_eq!(view.now().x509_svids().decode().unwrap().svids[0].spiffe_id, "spiffe://td/new");
}
