//! Registration entries: creation, similar entries, filters, paging, update, deletion, pruning, events.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{EntryId, ErrorKind, MatchBehavior, Selector};
use finial_store::{EntryFilter, EntryUpdate, EventFeed, Page, Store, StoreError};

on_every_database!(
    every_field_comes_back,
    pages_by_rows_are_what_lists_say,
    a_similar_entry_is_returned_instead,
    a_refused_entry_leaves_the_rest_of_its_batch,
    what_the_database_refuses_leaves_the_rest_of_its_batch,
    filters_match_as_sets,
    pages_are_full_and_end_with_an_empty_one,
    an_update_changes_what_is_named_and_counts_the_revision,
    of_a_batch_of_changes_each_has_its_own_result,
    what_the_database_refuses_leaves_the_rest_of_its_changes,
    a_batch_of_deletions_takes_what_is_there,
    deletion_and_pruning_leave_no_rows,
    events_are_pruned_by_age,
    ten_thousand_entries_below_one_parent,
);

async fn paths(store: &Store, filter: EntryFilter) -> Vec<String> {
    let listed = store.list_entries(&filter, None).await.unwrap();
    assert_eq!(listed.next_page_token, "");
    let paths: Vec<_> = listed.items.iter().map(|e| e.spiffe_id.path().to_owned()).collect();
    assert_eq!(store.count_entries(&filter).await.unwrap(), paths.len() as u64);
    paths
}

async fn subjects(store: &Store, feed: EventFeed) -> Vec<String> {
    store.list_events(feed, 0, 1000).await.unwrap().into_iter().map(|e| e.subject).collect()
}

async fn every_field_comes_back(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    for name in ["b.test", "a.test"] {
        store.create_bundle(&bundle(name)).await.unwrap();
    }
    let full = full_entry("full", &["a.test", "b.test", "a.test"]);
    let created = create(&store, full.clone()).await;
    let stored = store.fetch_entry(&created.id).await.unwrap().unwrap();
    let expected = finial_core::Entry { federates_with: vec![td("b.test"), td("a.test")], ..full };
    assert_eq!(stored, expected);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["full"]);
}

/// Everything, a page at a time, as a server reads it at its start.
async fn by_rows(store: &Store) -> Vec<finial_core::Entry> {
    let (mut all, mut after) = (Vec::new(), Some(0));
    while let Some(row) = after {
        let (entries, next) = store.entries_after(row, 3).await.unwrap();
        assert!(entries.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let ids: Vec<EntryId> = entries.iter().map(|(_, entry)| entry.id.clone()).collect();
        assert_eq!(store.entry_rows(&ids).await.unwrap(), entries);
        all.extend(entries.into_iter().map(|(_, entry)| entry));
        after = next;
    }
    all
}

async fn pages_by_rows_are_what_lists_say(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    for name in ["b.test", "a.test"] {
        store.create_bundle(&bundle(name)).await.unwrap();
    }
    create(&store, full_entry("full", &["a.test", "b.test"])).await;
    for (n, odd) in ["a\"b", "a\\b", "a\nb\u{1}", "\u{e9}", "'", "[1,2]", " "].into_iter().enumerate() {
        let mut entry = entry(&n.to_string(), "/w", "/a", &[&format!("unix:{odd}"), "unix:uid:1"]);
        entry.hint = odd.into();
        create(&store, entry).await;
    }
    let listed = store.list_entries(&EntryFilter::default(), None).await.unwrap().items;
    assert_eq!((listed.len(), by_rows(&store).await), (8, listed.clone()));
    // A row that cannot be an entry takes no other with it.
    let clock = store.clock.clone();
    let closed = store.closed().await;
    closed.edit(&["UPDATE registered_entries SET parent_id = 'nowhere' WHERE entry_id = '2'"]).await;
    let store = Store::open(closed.settings.clone(), clock).await.unwrap();
    let expected: Vec<_> = listed.into_iter().filter(|entry| entry.id.as_str() != "2").collect();
    assert_eq!(by_rows(&store).await, expected);
    store.close().await;
}

async fn a_similar_entry_is_returned_instead(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let first = create(&store, entry("1", "/w", "/a", &["unix:uid:1", "unix:gid:1"])).await;
    let results = store
        .create_entries(vec![
            entry("2", "/w", "/a", &["unix:gid:1", "unix:uid:1", "unix:uid:1"]),
            entry("3", "/w", "/a", &["unix:uid:1"]),
            entry("4", "/w", "/a", &["unix:uid:1", "unix:gid:1", "unix:user:x"]),
            entry("5", "/w", "/b", &["unix:uid:1", "unix:gid:1"]),
            entry("6", "/v", "/a", &["unix:uid:1", "unix:gid:1"]),
            entry("7", "/w", "/a", &["unix:uid:1"]),
            entry("1", "/other", "/a", &["unix:uid:1"]),
        ])
        .await
        .unwrap();
    let outcome: Vec<_> = results
        .iter()
        .map(|r| r.as_ref().map(|c| (c.entry.id.as_str(), c.existing)).map_err(|e| (e.kind(), e.to_string())))
        .collect();
    let taken = lab.duplicate("registered_entries", "entry_id", "1");
    assert_eq!(
        outcome,
        [
            Ok(("1", true)),
            Ok(("3", false)),
            Ok(("4", false)),
            Ok(("5", false)),
            Ok(("6", false)),
            Ok(("3", true)),
            Err((ErrorKind::AlreadyExists, taken)),
        ]
    );
    assert_eq!(results[0].as_ref().unwrap().entry, first);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["1", "3", "4", "5", "6"]);
}

async fn a_refused_entry_leaves_the_rest_of_its_batch(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let mut negative = entry("n", "/n", "/a", &["unix:uid:1"]);
    negative.x509_svid_ttl = -1;
    let mut mixed = entry("m", "/m", "/a", &["unix:uid:1", "k8s:ns:x"]);
    mixed.store_svid = true;
    let mut cached = entry("c", "/c", "/a", &["unix:uid:1"]);
    (cached.store_svid, cached.disable_x509_svid_prefetch) = (true, true);
    let mut strange = entry("s", "/s", "/a", &["unix:uid:1"]);
    strange.federates_with = vec![td("strange.test")];
    let none = entry("0", "/0", "/a", &[]);
    let good = entry("g", "/g", "/a", &["unix:uid:1"]);
    let results = store.create_entries(vec![negative, mixed, cached, strange, none, good]).await.unwrap();
    let texts: Vec<_> = results.iter().map(|r| r.as_ref().map(|_| ()).map_err(ToString::to_string)).collect();
    let refused = |text: &str| Err(text.to_owned());
    assert_eq!(
        texts,
        [
            refused("datastore-validation: invalid registration entry: X509SvidTtl is not set"),
            refused(
                "datastore-validation: invalid registration entry: selector types must be the same when store SVID is enabled"
            ),
            refused("datastore-validation: specifying cache behaviour is incompatible with storable SVIDs"),
            refused("unable to find federated bundle \"spiffe://strange.test\""),
            refused("datastore-validation: invalid registration entry: missing selector list"),
            Ok(()),
        ]
    );
    assert_eq!(paths(&store, EntryFilter::default()).await, ["/g"]);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["g"]);
}

/// A value that the database cannot keep whole is refused, never cut off or changed.
async fn what_the_database_refuses_leaves_the_rest_of_its_batch(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let hinted = |id: &str, hint: String| finial_core::Entry { hint, ..entry(id, &format!("/{id}"), "/a", &["t:a"]) };
    let new = [("good", "h".to_owned()), ("long", "x".repeat(300)), ("zero", "a\0b".into()), ("wide", "😀".into())];
    let results = store.create_entries(new.iter().map(|(id, hint)| hinted(id, hint.clone())).collect()).await.unwrap();
    let kept: Vec<&str> = new.iter().zip(&results).filter(|(_, r)| r.is_ok()).map(|((id, _), _)| *id).collect();
    let expected: &[&str] = match lab {
        Lab::Sqlite => &["good", "long", "zero", "wide"],
        Lab::Postgres => &["good", "long", "wide"],
        Lab::MySql => &["good", "zero"],
    };
    assert_eq!(kept, expected, "{results:?}");
    for (id, hint) in &new {
        let stored = store.fetch_entry(&EntryId::parse(id).unwrap()).await.unwrap();
        let wanted = kept.contains(id).then(|| hint.clone());
        assert_eq!(stored.map(|entry| entry.hint), wanted, "{id}");
    }
}

async fn filters_match_as_sets(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    for name in ["a.test", "b.test"] {
        store.create_bundle(&bundle(name)).await.unwrap();
    }
    let mut one = entry("1", "/1", "/p", &["t:a"]);
    one.hint = "h".into();
    let mut two = entry("2", "/2", "/p", &["t:a", "t:b"]);
    two.federates_with = vec![td("a.test")];
    let mut three = entry("3", "/3", "/q", &["t:a", "t:b", "t:c"]);
    three.federates_with = vec![td("a.test"), td("b.test")];
    three.downstream = true;
    let four = entry("4", "/4", "/q", &["t:d"]);
    for new in [one, two, three, four] {
        create(&store, new).await;
    }
    let by_selectors = |behavior, texts: &[&str]| EntryFilter {
        selectors: Some((behavior, selectors(texts).into_vec())),
        ..EntryFilter::default()
    };
    for (behavior, given, expected) in [
        (MatchBehavior::Exact, &["t:a", "t:b"][..], &["/2"][..]),
        (MatchBehavior::Subset, &["t:a", "t:b"], &["/1", "/2"]),
        (MatchBehavior::Superset, &["t:a", "t:b"], &["/2", "/3"]),
        (MatchBehavior::Any, &["t:b", "t:d"], &["/2", "/3", "/4"]),
        (MatchBehavior::Exact, &["t:x"], &[]),
    ] {
        assert_eq!(paths(&store, by_selectors(behavior, given)).await, expected, "{behavior:?} {given:?}");
    }
    let federated = |behavior, names: &[&str]| EntryFilter {
        federates_with: Some((behavior, names.iter().map(|n| td(n)).collect())),
        ..EntryFilter::default()
    };
    for (behavior, given, expected) in [
        (MatchBehavior::Exact, &["a.test"][..], &["/2"][..]),
        (MatchBehavior::Subset, &["a.test"], &["/2"]),
        (MatchBehavior::Subset, &["a.test", "b.test"], &["/2", "/3"]),
        (MatchBehavior::Superset, &["a.test"], &["/2", "/3"]),
        (MatchBehavior::Any, &["b.test", "c.test"], &["/3"]),
    ] {
        assert_eq!(paths(&store, federated(behavior, given)).await, expected, "{behavior:?} {given:?}");
    }
    let of = |change: &dyn Fn(&mut EntryFilter)| {
        let mut filter = EntryFilter::default();
        change(&mut filter);
        filter
    };
    assert_eq!(paths(&store, of(&|f| f.parent_id = Some(id("/q")))).await, ["/3", "/4"]);
    assert_eq!(paths(&store, of(&|f| f.spiffe_id = Some(id("/2")))).await, ["/2"]);
    assert_eq!(paths(&store, of(&|f| f.hint = Some("h".into()))).await, ["/1"]);
    assert_eq!(paths(&store, of(&|f| f.downstream = Some(true))).await, ["/3"]);
    assert_eq!(paths(&store, of(&|f| f.downstream = Some(false))).await.len(), 4);
    let both = EntryFilter { parent_id: Some(id("/p")), ..by_selectors(MatchBehavior::Superset, &["t:b"]) };
    assert_eq!(paths(&store, both).await, ["/2"]);
    let empty = store.list_entries(&by_selectors(MatchBehavior::Any, &[]), None).await.unwrap_err();
    assert_eq!(
        (empty.kind(), empty.to_string().as_str()),
        (ErrorKind::InvalidArgument, "cannot list by empty selector set")
    );
}

async fn pages_are_full_and_end_with_an_empty_one(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let new = (0..5).map(|n| entry(&n.to_string(), &format!("/{n}"), "/p", &[if n == 1 { "t:b" } else { "t:a" }]));
    store.create_entries(new.collect()).await.unwrap();
    let filter = EntryFilter {
        selectors: Some((MatchBehavior::Exact, vec![Selector::parse("t:a").unwrap()])),
        ..EntryFilter::default()
    };
    let mut page = Page { token: String::new(), size: 2 };
    let mut seen = Vec::new();
    loop {
        let listed = store.list_entries(&filter, Some(&page)).await.unwrap();
        seen.push(listed.items.iter().map(|e| e.id.to_string()).collect::<Vec<_>>().join(","));
        page.token = listed.next_page_token;
        if page.token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["0,2", "3,4", ""]);
    for (token, text) in [("x", "could not parse token 'x'"), ("-1", "could not parse token '-1'")] {
        let error = store.list_entries(&filter, Some(&Page { token: token.into(), size: 2 })).await.unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::InvalidArgument, text));
    }
    let error = store.list_entries(&filter, Some(&Page::default())).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot paginate with pagesize = 0");
}

async fn an_update_changes_what_is_named_and_counts_the_revision(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    store.create_bundle(&bundle("a.test")).await.unwrap();
    let old = create(&store, full_entry("e", &["a.test"])).await;
    let nothing = store.update_entry(&old.id, EntryUpdate::default()).await.unwrap();
    assert_eq!(nothing, finial_core::Entry { revision_number: 1, ..old.clone() });
    let update = EntryUpdate {
        selectors: Some(selectors(&["t:new"])),
        dns_names: Some(vec!["n.example".into(), "n.example".into()]),
        federates_with: Some(Vec::new()),
        admin: Some(false),
        hint: Some(String::new()),
        jwt_svid_include_jti: Some(false),
        disable_x509_svid_prefetch: Some(false),
        ..EntryUpdate::default()
    };
    let updated = store.update_entry(&old.id, update).await.unwrap();
    let expected = finial_core::Entry {
        selectors: selectors(&["t:new"]),
        dns_names: vec!["n.example".into()],
        federates_with: Vec::new(),
        admin: false,
        hint: String::new(),
        jwt_svid_include_jti: false,
        disable_x509_svid_prefetch: false,
        revision_number: 2,
        ..old.clone()
    };
    assert_eq!(updated, expected);
    let bad =
        EntryUpdate { federates_with: Some(vec![td("no.test")]), hint: Some("x".into()), ..EntryUpdate::default() };
    assert!(matches!(store.update_entry(&old.id, bad).await, Err(StoreError::NoFederatedBundle(_))));
    assert_eq!(store.fetch_entry(&old.id).await.unwrap().unwrap(), expected, "a failed update leaves nothing");
    let missing = store.update_entry(&EntryId::parse("none").unwrap(), EntryUpdate::default()).await.unwrap_err();
    assert_eq!(missing.to_string(), "datastore-sql: record not found");
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["e", "e", "e"]);
}

fn named(id: &str) -> EntryId {
    EntryId::parse(id).unwrap()
}

/// How many transactions wrote the events after the first `known`, where the database tells.
fn transactions(lab: Lab, store: &Opened, known: usize) -> Option<String> {
    let database = store.database.as_ref().filter(|_| lab == Lab::Postgres)?;
    let count = format!("SELECT COUNT(DISTINCT xmin::text) FROM registered_entries_events WHERE id > {known}");
    Some(database.sql(&count).trim().to_owned())
}

async fn of_a_batch_of_changes_each_has_its_own_result(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    store.create_bundle(&bundle("a.test")).await.unwrap();
    let first = create(&store, full_entry("first", &["a.test"])).await;
    let second = create(&store, entry("second", "/second", "/p", &["t:a"])).await;
    let third = create(&store, entry("third", "/third", "/p", &["t:a"])).await;
    let hint = |text: &str| EntryUpdate { hint: Some(text.into()), ..EntryUpdate::default() };
    let federated = |name: &str| EntryUpdate { federates_with: Some(vec![td(name)]), ..hint("kept out") };
    let updates = [
        ("second", hint("one")),
        ("none", hint("x")),
        ("first", federated("no.test")),
        ("first", EntryUpdate { x509_svid_ttl: Some(-1), ..EntryUpdate::default() }),
        // what was refused leaves no trace in what comes after
        ("first", EntryUpdate { dns_names: Some(Vec::new()), ..EntryUpdate::default() }),
        (
            "second",
            EntryUpdate { admin: Some(true), selectors: Some(selectors(&["t:c", "t:b"])), ..EntryUpdate::default() },
        ),
        ("third", EntryUpdate { federates_with: Some(vec![td("a.test")]), ..EntryUpdate::default() }),
    ];
    let results = store.update_entries(&updates.map(|(id, update)| (named(id), update))).await.unwrap();
    let results: Vec<_> = results.into_iter().map(|r| r.map_err(|e| e.to_string())).collect();
    let hinted = finial_core::Entry { hint: "one".into(), revision_number: 1, ..second };
    let expected = [
        Ok(hinted.clone()),
        Err("datastore-sql: record not found".into()),
        Err("unable to find federated bundle \"spiffe://no.test\"".into()),
        Err("datastore-validation: invalid registration entry: X509SvidTtl is not set".into()),
        Ok(finial_core::Entry { dns_names: Vec::new(), revision_number: 1, ..first }),
        Ok(finial_core::Entry { admin: true, selectors: selectors(&["t:b", "t:c"]), revision_number: 2, ..hinted }),
        Ok(finial_core::Entry { federates_with: vec![td("a.test")], revision_number: 1, ..third }),
    ];
    assert_eq!(results, expected);
    for (id, at) in [("first", 4), ("second", 5), ("third", 6)] {
        assert_eq!(store.fetch_entry(&named(id)).await.unwrap(), expected[at].clone().ok());
    }
    let events = ["first", "second", "third", "second", "first", "second", "third"];
    assert_eq!(subjects(&store, EventFeed::Entries).await, events);
    assert_eq!(transactions(lab, &store, 3).as_deref().unwrap_or("1"), "1");
    assert!(store.update_entries(&[]).await.unwrap().is_empty());
}

async fn what_the_database_refuses_leaves_the_rest_of_its_changes(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let hints = [("good", "h".to_owned()), ("long", "x".repeat(300)), ("zero", "a\0b".into()), ("last", "l".into())];
    for (id, _) in &hints {
        create(&store, entry(id, &format!("/{id}"), "/a", &["t:a"])).await;
    }
    let update = |hint: &String| EntryUpdate { hint: Some(hint.clone()), ..EntryUpdate::default() };
    let updates: Vec<_> = hints.iter().map(|(id, hint)| (named(id), update(hint))).collect();
    let results = store.update_entries(&updates).await.unwrap();
    let kept: Vec<&str> = hints.iter().zip(&results).filter(|(_, r)| r.is_ok()).map(|((id, _), _)| *id).collect();
    let expected: &[&str] = match lab {
        Lab::Sqlite => &["good", "long", "zero", "last"],
        Lab::Postgres => &["good", "long", "last"],
        Lab::MySql => &["good", "zero", "last"],
    };
    assert_eq!(kept, expected, "{results:?}");
    for (id, hint) in &hints {
        let stored = store.fetch_entry(&named(id)).await.unwrap().unwrap();
        let wanted = if kept.contains(id) { (hint.as_str(), 1) } else { ("", 0) };
        assert_eq!((stored.hint.as_str(), stored.revision_number), wanted, "{id}");
    }
    assert_eq!(subjects(&store, EventFeed::Entries).await[4..], *kept);
}

async fn a_batch_of_deletions_takes_what_is_there(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    store.create_bundle(&bundle("a.test")).await.unwrap();
    let full = create(&store, full_entry("full", &["a.test"])).await;
    for id in ["1", "2", "3"] {
        create(&store, entry(id, &format!("/{id}"), "/p", &["t:a"])).await;
    }
    let deleted = store.delete_entries(&["3", "none", "full", "1", "3"].map(named)).await.unwrap();
    let gone: Vec<_> = deleted.iter().map(|r| r.as_ref().map(|e| e.id.as_str()).map_err(ToString::to_string)).collect();
    let missing = || Err("datastore-sql: record not found".to_owned());
    assert_eq!(gone, [Ok("3"), missing(), Ok("full"), Ok("1"), missing()]);
    assert_eq!(deleted[2].as_ref().unwrap(), &full);
    assert_eq!(paths(&store, EntryFilter::default()).await, ["/2"]);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["full", "1", "2", "3", "3", "full", "1"]);
    assert_eq!(transactions(lab, &store, 4).as_deref().unwrap_or("1"), "1");
    // unique indexes would refuse its parts if rows had stayed behind
    create(&store, full_entry("full", &["a.test"])).await;
}

async fn deletion_and_pruning_leave_no_rows(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    store.create_bundle(&bundle("a.test")).await.unwrap();
    let first = create(&store, full_entry("e", &["a.test"])).await;
    assert_eq!(store.delete_entry(&first.id).await.unwrap(), first);
    assert!(matches!(store.delete_entry(&first.id).await, Err(StoreError::NotFound)));
    // the same parts again: unique indexes would refuse them if rows had stayed behind
    create(&store, full_entry("e", &["a.test"])).await;
    let mut late = entry("late", "/late", "/p", &["t:a"]);
    late.expires_at = 2_000_000_001;
    create(&store, late).await;
    create(&store, entry("ever", "/ever", "/p", &["t:a"])).await;
    assert_eq!(store.prune_entries(2_000_000_000).await.unwrap(), []);
    assert_eq!(store.prune_entries(2_000_000_001).await.unwrap(), [EntryId::parse("e").unwrap()]);
    assert_eq!(paths(&store, EntryFilter::default()).await, ["/late", "/ever"]);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["e", "e", "e", "late", "ever", "e"]);
}

async fn events_are_pruned_by_age(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let clock = store.clock.clone();
    create(&store, entry("1", "/1", "/p", &["t:a"])).await;
    store.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    clock.advance(10);
    create(&store, entry("2", "/2", "/p", &["t:a"])).await;
    assert_eq!(store.prune_events(NOW).await.unwrap(), 0);
    assert_eq!(store.prune_events(NOW + 5).await.unwrap(), 2);
    assert_eq!(subjects(&store, EventFeed::Entries).await, ["2"]);
    assert_eq!(subjects(&store, EventFeed::Nodes).await, [""; 0]);
}

/// All of them are made and read back; how fast is a question for `bench/`.
async fn ten_thousand_entries_below_one_parent(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    for batch in 0..20 {
        let some = (0..500).map(|n| {
            let n = batch * 500 + n;
            entry(&format!("e{n}"), &format!("/w/{n}"), "/spire/agent/a", &[&format!("unix:uid:{n}"), "unix:gid:1"])
        });
        let results = store.create_entries(some.collect()).await.unwrap();
        assert!(results.iter().all(|r| matches!(r, Ok(created) if !created.existing)));
    }
    let (mut after, mut loaded) = (Some(0), 0);
    while let Some(row) = after {
        let (some, next) = store.entries_after(row, 3000).await.unwrap();
        (after, loaded) = (next, loaded + some.len());
    }
    assert_eq!(loaded, 10_000);
}
