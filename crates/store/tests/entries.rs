//! Registration entries: creation, similar entries, reading, update, deletion, pruning, events.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{EntryId, ErrorKind};
use finial_store::{EntryUpdate, EventFeed, Store, StoreError};
use std::collections::HashSet;

on_every_database!(
    every_field_comes_back,
    pages_of_any_size_give_the_same_entries,
    bad_rows_are_left_out,
    a_similar_entry_is_returned_instead,
    a_refused_entry_leaves_the_rest_of_its_batch,
    what_the_database_refuses_leaves_the_rest_of_its_batch,
    a_batch_that_the_database_refuses_takes_a_bounded_number_of_transactions,
    an_update_changes_what_is_named_and_counts_the_revision,
    of_a_batch_of_changes_each_has_its_own_result,
    what_the_database_refuses_leaves_the_rest_of_its_changes,
    a_batch_of_deletions_takes_what_is_there,
    deletion_and_pruning_leave_no_rows,
    events_are_pruned_by_age,
    ten_thousand_entries_below_one_parent,
);

async fn paths(store: &Store) -> Vec<String> {
    entries(store).await.iter().map(|e| e.spiffe_id.path().to_owned()).collect()
}

async fn subjects(store: &Store, feed: EventFeed) -> Vec<String> {
    events(store, feed).await.into_iter().map(|e| e.subject).collect()
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

async fn pages_of_any_size_give_the_same_entries(lab: Lab) {
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
    let listed = entries(&store).await;
    assert_eq!((listed.len(), by_rows(&store).await), (8, listed.clone()));
}

/// A row that cannot be an entry or an agent takes no other with it, and no server with it either. One that is an entry but
/// for how SQLite keeps a value is one.
async fn bad_rows_are_left_out(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let all = 0..6;
    for n in all.clone() {
        let wanted = [format!("unix:uid:{n}"), format!("unix:gid:{n}")];
        let entry = entry(&n.to_string(), &format!("/w{n}"), "/a", &wanted.each_ref().map(String::as_str));
        create(&store, finial_core::Entry { dns_names: vec![format!("n{n}")], ..entry }).await;
        store.create_or_update_node(&agent(&format!("/spire/agent/{n}"))).await.unwrap();
    }
    let (before, agents) = (entries(&store).await, store.agents_after(0, 100).await.unwrap().0);
    let clock = store.clock.clone();
    let closed = store.closed().await;
    let mut bad = vec![
        "UPDATE registered_entries SET parent_id = 'nowhere' WHERE entry_id = '1'",
        "UPDATE attested_node_entries SET spiffe_id = 'nobody' WHERE spiffe_id LIKE '%/1'",
    ];
    let (mut gone, mut agents_gone) = (vec!["1"], vec!["/1"]);
    if lab == Lab::Sqlite {
        bad.extend([
            "UPDATE registered_entries SET spiffe_id = CAST(spiffe_id AS BLOB), hint = CAST('bytes' AS BLOB) WHERE entry_id = '2'",
            "UPDATE registered_entries SET hint = CAST(x'ff' AS TEXT) WHERE entry_id = '3'",
            "UPDATE selectors SET value = x'ff' WHERE value = 'uid:4'",
            "UPDATE dns_names SET value = x'ff' WHERE value = 'n5'",
            "UPDATE attested_node_entries SET spiffe_id = x'ff' WHERE spiffe_id LIKE '%/3'",
            "UPDATE node_resolver_map_entries SET value = x'ff' WHERE spiffe_id LIKE '%/4' AND value LIKE 'ca:%'",
        ]);
        gone.extend(["3", "4", "5"]);
        agents_gone.extend(["/3", "/4"]);
    }
    closed.edit(&bad).await;
    let store = Store::open(closed.settings.clone(), clock).await.unwrap();
    let mut expected: Vec<_> = before.into_iter().filter(|entry| !gone.contains(&entry.id.as_str())).collect();
    if lab == Lab::Sqlite {
        expected[1].hint = "bytes".into();
    }
    assert_eq!(by_rows(&store).await, expected);
    let mut loaded = Vec::new();
    store.each_entry(|_, entry| loaded.push(entry.clone())).await.unwrap();
    assert_eq!(loaded, expected, "as a server starts");
    let ids: Vec<EntryId> = all.map(|n| EntryId::parse(&n.to_string()).unwrap()).collect();
    assert_eq!(store.fetch_entries(&ids).await.unwrap(), expected, "as a server follows");
    let is_good = |agent: &finial_core::AgentRecord| !agents_gone.iter().any(|gone| agent.id.path().ends_with(gone));
    let good: Vec<_> = agents.iter().filter(|(_, agent)| is_good(agent)).cloned().collect();
    assert_eq!(store.agents_after(0, 100).await.unwrap().0, good);
    let ids: Vec<_> = agents.into_iter().map(|(_, agent)| agent.id).collect();
    assert_eq!(store.agent_rows(&ids).await.unwrap(), good);
    let mut pruned = Vec::new();
    for _ in &good {
        pruned.extend(store.prune_nodes(NOW + 3601, true, 1, &HashSet::new()).await.unwrap().0);
    }
    assert_eq!(pruned, good.into_iter().map(|(_, agent)| agent.id).collect::<Vec<_>>(), "one by one, past bad rows");
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
    assert_eq!(paths(&store).await, ["/g"]);
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

async fn a_batch_that_the_database_refuses_takes_a_bounded_number_of_transactions(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    // What SQLite refuses is refused before.
    let bad = match lab {
        Lab::Sqlite => return,
        Lab::Postgres => "a\0b".to_owned(),
        Lab::MySql => "x".repeat(300),
    };
    let new = |name: String, hint: &str| finial_core::Entry {
        hint: hint.into(),
        ..entry(&name, &format!("/{name}"), "/a", &["t:a"])
    };
    let one = (0..64).map(|n| new(format!("one-{n}"), if n == 41 { &bad } else { "" })).collect();
    let results = store.create_entries(one).await.unwrap();
    let refused: Vec<usize> = (0..64).filter(|n| results[*n].is_err()).collect();
    assert_eq!(refused, [41]);
    // 32, and of the other half 16, 8, 4, 2 and 1 are stored together: those beside it.
    assert_eq!(transactions(lab, &store, 0).as_deref().unwrap_or("6"), "6");
    let all = (0..300).map(|n| new(format!("all-{n}"), &bad)).collect();
    let results = store.create_entries(all).await.unwrap();
    let texts: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert_eq!(texts.len(), 300);
    let together = texts.iter().filter(|text| text.contains("try fewer at once")).count();
    assert!((150..200).contains(&together), "about half the tries are halves: {together} {}", texts[299]);
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
    assert_eq!(paths(&store).await, ["/2"]);
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
    assert_eq!(paths(&store).await, ["/late", "/ever"]);
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
