//! The Entry service, for managers.

use crate::harness::*;
use finial_proto::server::entry::*;
use finial_proto::types;
use tonic::Code;

on_every_database!(
    an_entry_comes_back_as_it_was_sent,
    bad_entries_are_refused_one_by_one,
    the_same_entry_again_is_answered_with_the_first,
    of_identical_creates_that_race_one_makes_an_entry,
    updates_change_what_the_mask_names,
    a_batch_of_updates_is_answered_one_by_one,
    deletes_are_answered_one_by_one,
    filters,
    pages,
    entries_survive_a_restart_in_index_and_store,
);

async fn create(server: &Server, entries: Vec<types::Entry>) -> Vec<batch_create_entry_response::Result> {
    let request = BatchCreateEntryRequest { entries, output_mask: None };
    server.entries().batch_create_entry(request).await.unwrap().into_inner().results
}

async fn an_entry_comes_back_as_it_was_sent(lab: Lab) {
    let server = lab.start().await;
    let own = "01234567-89ab-cdef.X_y";
    let full = types::Entry {
        id: own.into(),
        spiffe_id: id("/workload"),
        parent_id: id("/spire/server"),
        selectors: selectors(&["unix:uid:1", "k8s:ns:a:b"]),
        x509_svid_ttl: 60,
        jwt_svid_ttl: 30,
        admin: true,
        downstream: true,
        expires_at: NOW + 1000,
        dns_names: vec!["*.example.org".into(), "a".into()],
        hint: "external".into(),
        additional_attributes: Some(types::entry::AdditionalAttributes {
            disable_x509_svid_prefetch: true,
            jwt_svid_include_jti: true,
        }),
        ..Default::default()
    };
    let created = server.create(vec![full.clone()]).await.remove(0);
    let mut expected = full.clone();
    expected.created_at = NOW;
    let sorted = |entry: &types::Entry| {
        let mut entry = entry.clone();
        entry.selectors.sort_by(|a, b| a.r#type.cmp(&b.r#type));
        entry
    };
    assert_eq!(sorted(&created), sorted(&expected));
    let found = server.entries().get_entry(GetEntryRequest { id: own.into(), output_mask: None }).await.unwrap();
    assert_eq!(sorted(&found.into_inner()), sorted(&expected));
    let mask = types::EntryMask { hint: true, ..Default::default() };
    let found = server.entries().get_entry(GetEntryRequest { id: own.into(), output_mask: Some(mask) }).await.unwrap();
    let expected = types::Entry { id: own.into(), hint: "external".into(), ..Default::default() };
    assert_eq!(found.into_inner(), expected);
}

fn good() -> types::Entry {
    entry("/w", "/p", &["a:b"])
}

/// A good entry but for one change.
fn with(change: fn(&mut types::Entry)) -> types::Entry {
    let mut entry = good();
    change(&mut entry);
    entry
}

/// Entries that make no sense, and why.
fn senseless() -> Vec<(types::Entry, &'static str)> {
    let foreign = types::Spiffeid { trust_domain: "other.test".into(), path: "/x".into() };
    let with_foreign = types::Entry { parent_id: Some(foreign), ..good() };
    vec![
        (with(|e| e.parent_id = None), "invalid parent ID: request must specify SPIFFE ID"),
        (with(|e| e.spiffe_id = None), "invalid spiffe ID: request must specify SPIFFE ID"),
        (with(|e| e.spiffe_id = Some(types::Spiffeid::default())), "invalid spiffe ID: trust domain is missing"),
        (
            with(|e| e.spiffe_id = id("")),
            "invalid spiffe ID: \"spiffe://example.org\" is not a workload in trust domain \"example.org\"; path is empty",
        ),
        (
            with(|e| e.spiffe_id = id("/spire/server")),
            "invalid spiffe ID: \"spiffe://example.org/spire/server\" is not a workload in trust domain \"example.org\"; path is in the reserved namespace",
        ),
        (with_foreign, "invalid parent ID: \"spiffe://other.test/x\" is not a member of trust domain \"example.org\""),
        (with(|e| e.spiffe_id = id("/a//b")), "invalid spiffe ID: path cannot contain empty segments"),
        (with(|e| e.spiffe_id = id("/a/../b")), "invalid spiffe ID: path cannot contain dot segments"),
        (
            with(|e| e.spiffe_id = id("/a b")),
            "invalid spiffe ID: path segment characters are limited to letters, numbers, dots, dashes, and underscores",
        ),
        (with(|e| e.spiffe_id = id("a")), "invalid spiffe ID: path must have a leading slash"),
        (with(|e| e.selectors = vec![]), "selector list is empty"),
        (
            with(|e| e.selectors = vec![types::Selector { r#type: String::new(), value: "x".into() }]),
            "missing selector type",
        ),
        (
            with(|e| e.selectors = vec![types::Selector { r#type: "a:b".into(), value: "x".into() }]),
            "selector type contains ':'",
        ),
        (
            with(|e| e.selectors = vec![types::Selector { r#type: "a".into(), value: String::new() }]),
            "missing selector value",
        ),
        (with(|e| e.hint = "x".repeat(1025)), "hint is too long, max length is 1024 characters"),
        (
            with(|e| e.dns_names = vec!["c.d".into(), "a b".into()]),
            "invalid DNS name: idna error: \"a b\" is no DNS name: its labels must be of letters, digits, dashes and underscores",
        ),
        (with(|e| e.dns_names = vec![String::new()]), "invalid DNS name: empty or only whitespace"),
        (
            with(|e| e.federates_with = vec!["Bad".into()]),
            "invalid federated trust domain: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
        ),
    ]
}

/// Entries that the datastore does not take, and why.
fn not_storable() -> Vec<(types::Entry, &'static str)> {
    let long_id = "x".repeat(256);
    let with_long_id = types::Entry { id: long_id, ..good() };
    vec![
        (with_long_id, "invalid registration entry: entry ID too long"),
        (with(|e| e.id = "a/b".into()), "invalid registration entry: entry ID contains invalid characters"),
        (with(|e| e.x509_svid_ttl = -1), "invalid registration entry: X509SvidTtl is not set"),
        (with(|e| e.jwt_svid_ttl = -1), "invalid registration entry: JwtSvidTtl is not set"),
        (
            with(|e| {
                e.store_svid = true;
                e.selectors = selectors(&["a:b", "c:d"]);
            }),
            "invalid registration entry: selector types must be the same when store SVID is enabled",
        ),
    ]
}

async fn bad_entries_are_refused_one_by_one(lab: Lab) {
    let server = lab.start().await;
    let (cases, stored) = (senseless(), not_storable());
    let expected: Vec<_> = cases.iter().map(|(_, why)| format!("failed to convert entry: {why}")).collect();
    let more = stored.iter().map(|(_, why)| format!("failed to create entry: datastore-validation: {why}"));
    let expected: Vec<_> = expected.into_iter().chain(more).collect();
    let mut entries: Vec<_> = cases.into_iter().chain(stored).map(|(entry, _)| entry).collect();
    // A good one among them is stored all the same.
    entries.push(good());
    let mut results = create(&server, entries).await;
    assert_eq!(results.pop().unwrap().status.unwrap().code, 0);
    for (result, expected) in results.into_iter().zip(expected) {
        let status = result.status.unwrap();
        assert_eq!((status.code, status.message), (Code::InvalidArgument as i32, expected));
        assert_eq!(result.entry, None);
    }
}

async fn the_same_entry_again_is_answered_with_the_first(lab: Lab) {
    let server = lab.start().await;
    let first = server.create(vec![entry("/w", "/p", &["a:1", "a:2"])]).await.remove(0);
    let mut again = entry("/w", "/p", &["a:2", "a:1", "a:2"]);
    again.hint = "other".into();
    let mut same_id = entry("/other", "/p", &["a:1"]);
    same_id.id = first.id.clone();
    let results = create(&server, vec![again, entry("/w", "/p", &["a:1"]), same_id]).await;
    let status = results[0].status.as_ref().unwrap();
    assert_eq!((status.code, status.message.as_str()), (Code::AlreadyExists as i32, "similar entry already exists"));
    assert_eq!(results[0].entry.as_ref().unwrap().id, first.id);
    assert_eq!(results[1].status.as_ref().unwrap().code, 0, "a smaller set of selectors is another entry");
    assert_eq!(results[2].status.as_ref().unwrap().code, Code::AlreadyExists as i32);
}

async fn of_identical_creates_that_race_one_makes_an_entry(lab: Lab) {
    let server = lab.start().await;
    let tries = (0..10).map(|_| create(&server, vec![entry("/w", "/p", &["a:1"])]));
    let results: Vec<_> = futures::future::join_all(tries).await.into_iter().flatten().collect();
    let codes: Vec<_> = results.iter().map(|r| r.status.as_ref().unwrap().code).collect();
    assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1);
    assert_eq!(codes.iter().filter(|code| **code == Code::AlreadyExists as i32).count(), 9);
    let ids: std::collections::BTreeSet<_> = results.into_iter().map(|r| r.entry.unwrap().id).collect();
    assert_eq!(ids.len(), 1);
}

async fn updates_change_what_the_mask_names(lab: Lab) {
    let server = lab.start().await;
    let mut wanted = entry("/w", "/p", &["a:1"]);
    wanted.hint = "before".into();
    let created = server.create(vec![wanted]).await.remove(0);
    let update = |entries: Vec<types::Entry>, mask| {
        let mut client = server.entries();
        async move {
            let request = BatchUpdateEntryRequest { entries, input_mask: mask, output_mask: None };
            client.batch_update_entry(request).await.unwrap().into_inner().results
        }
    };
    let ttl = types::Entry { id: created.id.clone(), x509_svid_ttl: 77, hint: "ignored".into(), ..Default::default() };
    let mask = Some(types::EntryMask { x509_svid_ttl: true, ..Default::default() });
    let updated = update(vec![ttl], mask).await.remove(0).entry.unwrap();
    let expected = types::Entry { x509_svid_ttl: 77, revision_number: 1, ..created.clone() };
    assert_eq!(updated, expected);
    // Without a mask everything is replaced, and the three parts are mandatory.
    let whole = types::Entry { id: created.id.clone(), ..entry("/w2", "/p", &["a:2"]) };
    let updated = update(vec![whole], None).await.remove(0).entry.unwrap();
    assert_eq!((updated.spiffe_id, updated.hint, updated.revision_number), (id("/w2"), String::new(), 2));
    let partial = types::Entry { id: created.id.clone(), hint: "x".into(), ..Default::default() };
    let nobody = types::Entry { id: "no-such".into(), ..entry("/w", "/p", &["a:1"]) };
    let results = update(vec![partial, nobody], None).await;
    let status = results[0].status.clone().unwrap();
    let message = "failed to convert entry: invalid parent ID: request must specify SPIFFE ID";
    assert_eq!((status.code, status.message.as_str()), (Code::InvalidArgument as i32, message));
    let status = results[1].status.clone().unwrap();
    assert_eq!((status.code, status.message.as_str()), (Code::NotFound as i32, "failed to update entry"));
}

async fn a_batch_of_updates_is_answered_one_by_one(lab: Lab) {
    let server = lab.start().await;
    let created = server.create(vec![entry("/a", "/p", &["a:1"]), entry("/b", "/p", &["a:1"])]).await;
    let change = |id: &str, hint: &str| types::Entry { id: id.into(), hint: hint.into(), ..Default::default() };
    let entries = vec![
        change("a/b", "no ID"),
        change(&created[1].id, "b1"),
        change(&created[0].id, &"x".repeat(1025)),
        change("no-such", "x"),
        change(&created[1].id, "b2"),
        change(&created[0].id, "a"),
    ];
    let input_mask = Some(types::EntryMask { hint: true, ..Default::default() });
    let request = BatchUpdateEntryRequest { entries, input_mask, output_mask: None };
    let results = server.entries().batch_update_entry(request).await.unwrap().into_inner().results;
    let said: Vec<_> = results.iter().map(|r| (r.status.as_ref().unwrap().code, r.entry.clone())).collect();
    let after = |n: usize, hint: &str, revision_number| {
        (0, Some(types::Entry { hint: hint.into(), revision_number, ..created[n].clone() }))
    };
    let missing = (Code::NotFound as i32, None);
    let expected = [
        missing.clone(),
        after(1, "b1", 1),
        (Code::InvalidArgument as i32, None),
        missing,
        after(1, "b2", 2),
        after(0, "a", 1),
    ];
    assert_eq!(said, expected);
    // and from memory it is the last word
    for (n, at) in [(0, 5), (1, 4)] {
        let request = GetEntryRequest { id: created[n].id.clone(), output_mask: None };
        assert_eq!(server.entries().get_entry(request).await.unwrap().into_inner(), expected[at].1.clone().unwrap());
    }
}

async fn deletes_are_answered_one_by_one(lab: Lab) {
    let server = lab.start().await;
    let created = server.create(vec![entry("/w", "/p", &["a:1"])]).await.remove(0);
    let ids = vec![created.id.clone(), String::new(), "no-such".into(), "a/b".into(), created.id.clone()];
    let results = server.entries().batch_delete_entry(BatchDeleteEntryRequest { ids: ids.clone() }).await.unwrap();
    let outcome: Vec<_> = results.into_inner().results.into_iter().map(|r| (r.id, r.status.unwrap())).collect();
    let expected = [
        (0, "OK"),
        (Code::InvalidArgument as i32, "missing entry ID"),
        (Code::NotFound as i32, "entry not found"),
        (Code::NotFound as i32, "entry not found"),
        (Code::NotFound as i32, "entry not found"),
    ];
    for ((got, id), (code, message)) in outcome.into_iter().zip(ids).zip(expected) {
        assert_eq!(got, (id, types::Status { code, message: message.into() }));
    }
    let gone = server.entries().get_entry(GetEntryRequest { id: created.id, output_mask: None }).await;
    assert_eq!(refused(gone, Code::NotFound), "entry not found");
    let empty = server.entries().get_entry(GetEntryRequest::default()).await;
    assert_eq!(refused(empty, Code::InvalidArgument), "missing ID");
}

async fn filters(lab: Lab) {
    let server = lab.start().await;
    let mut hinted = entry("/a", "/p", &["a:1", "a:2"]);
    hinted.hint = "h".into();
    let mut below = entry("/b", "/p", &["a:1"]);
    below.downstream = true;
    server.create(vec![hinted, below, entry("/c", "/q", &["a:2", "a:3"])]).await;
    use list_entries_request::Filter;
    let count = |filter: Filter| {
        let mut client = server.entries();
        async move {
            let same = count_entries_request::Filter {
                by_spiffe_id: filter.by_spiffe_id.clone(),
                by_parent_id: filter.by_parent_id.clone(),
                by_selectors: filter.by_selectors.clone(),
                by_federates_with: filter.by_federates_with.clone(),
                by_hint: filter.by_hint.clone(),
                by_downstream: filter.by_downstream,
            };
            let counted = client.count_entries(CountEntriesRequest { filter: Some(same) }).await;
            let listed = client.list_entries(ListEntriesRequest { filter: Some(filter), ..Default::default() }).await;
            match (counted, listed) {
                (Ok(counted), Ok(listed)) => {
                    let count = counted.into_inner().count;
                    assert_eq!(count as usize, listed.into_inner().entries.len());
                    Ok(count)
                }
                (Err(counted), Err(listed)) => {
                    assert_eq!((counted.code(), counted.message()), (listed.code(), listed.message()));
                    Err(counted)
                }
                other => panic!("{other:?}"),
            }
        }
    };
    let by = |texts: &[&str], r#match| Filter {
        by_selectors: Some(types::SelectorMatch { selectors: selectors(texts), r#match }),
        ..Default::default()
    };
    for (filter, want) in [
        (Filter::default(), 3),
        (Filter { by_spiffe_id: id("/a"), ..Default::default() }, 1),
        (Filter { by_parent_id: id("/p"), ..Default::default() }, 2),
        (Filter { by_parent_id: id("/spire/server"), ..Default::default() }, 0),
        (Filter { by_hint: Some("h".into()), ..Default::default() }, 1),
        (Filter { by_hint: Some(String::new()), ..Default::default() }, 3),
        (Filter { by_downstream: Some(true), ..Default::default() }, 1),
        // As in SPIRE: `false` filters nothing.
        (Filter { by_downstream: Some(false), ..Default::default() }, 3),
        (by(&["a:2", "a:1"], 0), 1),
        (by(&["a:2", "a:1"], 1), 2),
        (by(&["a:2"], 2), 2),
        (by(&["a:1", "a:3"], 3), 3),
    ] {
        assert_eq!(count(filter.clone()).await.unwrap(), want, "{filter:?}");
    }
    for (filter, want) in [
        (Filter { by_spiffe_id: id("/spire/agent/x"), ..Default::default() }, "malformed SPIFFE ID filter: "),
        (Filter { by_parent_id: id(""), ..Default::default() }, "malformed parent ID filter: "),
        (by(&[], 0), "malformed selectors filter: empty selector set"),
        (by(&["a:1"], 7), "malformed selectors filter: unhandled match 7"),
        (
            Filter { by_federates_with: Some(types::FederatesWithMatch::default()), ..Default::default() },
            "malformed federates with filter: empty trust domain set",
        ),
    ] {
        let message = refused(count(filter).await, Code::InvalidArgument);
        assert!(message.starts_with(want), "{message}");
    }
}

async fn pages(lab: Lab) {
    let server = lab.start().await;
    server.create(vec![entry("/a", "/p", &["a:1"]), entry("/b", "/p", &["a:1"]), entry("/c", "/q", &["a:2"])]).await;
    let page = |page_size, token: String| {
        let mut client = server.entries();
        async move {
            let request = ListEntriesRequest { page_size, page_token: token, ..Default::default() };
            client.list_entries(request).await.map(tonic::Response::into_inner)
        }
    };
    let first = page(2, String::new()).await.unwrap();
    let second = page(2, first.next_page_token.clone()).await.unwrap();
    assert_eq!((first.entries.len(), second.entries.len()), (2, 1));
    assert_eq!(page(i32::MAX, String::new()).await.unwrap().entries.len(), 3);
    for bad in ["x", "-1", "99999999999999999999", "1 "] {
        let message = refused(page(2, bad.into()).await, Code::InvalidArgument);
        assert_eq!(message, format!("failed to list entries: could not parse token '{bad}'"));
    }
}

async fn entries_survive_a_restart_in_index_and_store(lab: Lab) {
    let server = lab.start().await;
    let agent = server.agent().await;
    server.create(vec![agent.entry("/w")]).await;
    let server = server.restart(|_| {}).await;
    let agent = Agent::new(&server, agent.identity).await;
    let seen = agent.entries().get_authorized_entries(GetAuthorizedEntriesRequest::default()).await.unwrap();
    assert_eq!(seen.into_inner().entries.len(), 1);
}
