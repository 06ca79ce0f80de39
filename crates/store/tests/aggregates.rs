//! Bundles, agents, join tokens and journals.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{AgentRecord, Bundle, ErrorKind, JoinToken, JwtAuthority, MatchBehavior, X509Authority};
use finial_proto::journal;
use finial_store::{AgentFilter, AgentUpdate, BundleMask, CaJournal, DeleteMode, EventFeed, Page, Store, StoreError};
use prost::Message;
use std::collections::HashSet;

on_every_database!(
    bundles_are_created_changed_and_listed,
    appending_adds_what_is_missing,
    pruning_never_empties_a_bundle,
    a_root_that_cannot_be_read_holds_up_nothing,
    authorities_are_tainted_then_revoked,
    deleting_a_bundle_minds_the_entries_that_federate,
    agents_attest_renew_and_are_banned,
    a_bundle_that_cannot_be_read_hides_no_other,
    a_banned_agent_stays_banned_whoever_attests_it,
    agents_are_filtered,
    agents_that_differ_in_case_only_are_two_or_refused,
    a_join_token_brings_its_agent_and_takes_its_alias_along,
    of_many_callers_one_gets_the_token,
    journals_are_found_by_their_authority,
    calls_are_counted_under_spires_names,
);

/// Two self-signed roots of SPIRE's profile (EC P-256).
const ROOT_A: &str = include_str!("data/root-a.pem");
const ROOT_B: &str = include_str!("data/root-b.pem");

fn root(pem: &str) -> X509Authority {
    X509Authority { der: finial_crypto::pem::certificates(pem.as_bytes()).unwrap().remove(0), tainted: false }
}

fn skid(authority: &X509Authority) -> String {
    let certificate = finial_crypto::Certificate::parse(authority.der.clone()).unwrap();
    finial_crypto::hex(certificate.subject_key_id().unwrap())
}

fn key(key_id: &str, expires_at: i64) -> JwtAuthority {
    JwtAuthority { key_id: key_id.into(), public_key: vec![1, 2, 3].into(), expires_at, tainted: false }
}

fn full_bundle(name: &str) -> Bundle {
    Bundle {
        x509_authorities: vec![root(ROOT_A)],
        jwt_authorities: vec![key("j", NOW + 10)],
        wit_authorities: vec![key("w", 0)],
        refresh_hint: 300,
        sequence_number: 7,
        ..bundle(name)
    }
}

fn fails<T: std::fmt::Debug>(result: Result<T, StoreError>) -> (ErrorKind, String) {
    let error = result.unwrap_err();
    (error.kind(), error.to_string())
}

async fn bundles_are_created_changed_and_listed(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let full = full_bundle("a.test");
    assert_eq!(store.fetch_bundle(&td("a.test")).await.unwrap(), None);
    assert_eq!(fails(store.update_bundle(&full, BundleMask::ALL).await).0, ErrorKind::NotFound);
    store.create_bundle(&full).await.unwrap();
    assert_eq!(store.fetch_bundle(&td("a.test")).await.unwrap().as_ref(), Some(&full));
    let (kind, text) = fails(store.create_bundle(&full).await);
    assert_eq!(kind, ErrorKind::AlreadyExists);
    assert_eq!(text, lab.duplicate("bundles", "trust_domain", "spiffe://a.test"));
    let mask = BundleMask { refresh_hint: true, ..BundleMask { sequence_number: false, ..none() } };
    let hinted = Bundle { refresh_hint: 9, ..bundle("a.test") };
    assert_eq!(store.update_bundle(&hinted, mask).await.unwrap(), Bundle { refresh_hint: 9, ..full.clone() });
    let second = bundle("b.test");
    assert_eq!(store.set_bundle(&second).await.unwrap(), second);
    assert_eq!(store.set_bundle(&full).await.unwrap(), full);
    assert_eq!(store.count_bundles().await.unwrap(), 2);
    let page = Page { token: String::new(), size: 1 };
    let first = store.list_bundles(Some(&page)).await.unwrap();
    assert_eq!(first.items, std::slice::from_ref(&full));
    let rest = store.list_bundles(Some(&Page { token: first.next_page_token, size: 5 })).await.unwrap();
    assert_eq!(rest.items, std::slice::from_ref(&second));
    assert_eq!(store.list_bundles(None).await.unwrap().items, [full, second]);
}

fn none() -> BundleMask {
    BundleMask {
        x509_authorities: false,
        jwt_authorities: false,
        wit_authorities: false,
        refresh_hint: false,
        sequence_number: false,
    }
}

async fn appending_adds_what_is_missing(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let full = full_bundle("a.test");
    assert_eq!(store.append_bundle(&full).await.unwrap(), full, "created as it is");
    assert_eq!(store.append_bundle(&full).await.unwrap(), full, "nothing new, no new number");
    let more = Bundle {
        x509_authorities: vec![root(ROOT_A), root(ROOT_B)],
        jwt_authorities: vec![key("k", 0)],
        ..bundle("a.test")
    };
    let merged = store.append_bundle(&more).await.unwrap();
    assert_eq!(merged.x509_authorities, [root(ROOT_A), root(ROOT_B)]);
    assert_eq!(merged.jwt_authorities, [key("j", NOW + 10), key("k", 0)]);
    assert_eq!((merged.sequence_number, merged.refresh_hint), (8, 300));
    // what is tainted is not added a second time by a server that does not know it yet, and can be revoked
    let key_id = skid(&root(ROOT_A));
    store.taint_x509_authority(&td("a.test"), &key_id).await.unwrap();
    store.taint_jwt_authority(&td("a.test"), "k").await.unwrap();
    let same = store.append_bundle(&more).await.unwrap();
    assert_eq!((same.x509_authorities.len(), same.jwt_authorities.len(), same.sequence_number), (2, 2, 10));
    assert!(same.x509_authorities[0].tainted && same.jwt_authorities[1].tainted);
    let left = store.revoke_x509_authority(&td("a.test"), &key_id).await.unwrap();
    assert_eq!(left.x509_authorities, [root(ROOT_B)]);
    // two of one name, as an older version may have left them
    let twice = vec![JwtAuthority { tainted: true, ..key("k", 0) }, key("k", 0), key("j", 0)];
    let mask = BundleMask { jwt_authorities: true, ..none() };
    store.update_bundle(&Bundle { jwt_authorities: twice, ..bundle("a.test") }, mask).await.unwrap();
    assert!(store.revoke_jwt_authority(&td("a.test"), "k").await.unwrap().tainted);
    assert_eq!(store.fetch_bundle(&td("a.test")).await.unwrap().unwrap().jwt_authorities, [key("j", 0)]);
}

async fn a_bundle_that_cannot_be_read_hides_no_other(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    for name in ["a.test", "b.test", "c.test"] {
        opened.create_bundle(&bundle(name)).await.unwrap();
    }
    let closed = opened.closed().await;
    let garbage = if lab == Lab::Postgres { r"'\xffff'" } else { "x'ffff'" };
    closed.edit(&[&format!("UPDATE bundles SET data = {garbage} WHERE trust_domain = 'spiffe://b.test'")]).await;
    let store = Store::open(closed.settings.clone(), clock()).await.unwrap();
    let names = |listed: Vec<Bundle>| listed.iter().map(|b| b.trust_domain.to_string()).collect::<Vec<_>>();
    assert_eq!(names(store.list_bundles(None).await.unwrap().items).len(), 2);
    let page = Page { token: String::new(), size: 2 };
    let first = store.list_bundles(Some(&page)).await.unwrap();
    assert_eq!(first.items.len(), 1);
    let rest = Page { token: first.next_page_token, size: 2 };
    assert_eq!(store.list_bundles(Some(&rest)).await.unwrap().items.len(), 1, "the pages go on");
    assert!(store.fetch_bundle(&td("b.test")).await.is_err(), "who asks for it is told");
    store.close().await;
}

async fn a_banned_agent_stays_banned_whoever_attests_it(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let agent = agent("/spire/agent/a");
    store.create_or_update_node(&agent).await.unwrap();
    let banned = store.ban_node(&agent.id).await.unwrap();
    let error = store.create_or_update_node(&agent).await.unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Denied, "agent is banned"));
    assert_eq!(store.fetch_node(&agent.id).await.unwrap(), Some(banned));
    store.create_join_token(&JoinToken { token: "token".into(), expires_at: NOW + 60 }, None).await.unwrap();
    let without = AgentRecord { selectors: selectors(&[]), ..agent.clone() };
    assert!(store.attest_by_join_token("token", &without, NOW).await.is_err());
    assert!(store.fetch_node(&agent.id).await.unwrap().unwrap().is_banned());
    store.delete_node(&agent.id).await.unwrap();
    assert_eq!(store.create_or_update_node(&agent).await.unwrap(), agent, "until it is deleted");
}

async fn pruning_never_empties_a_bundle(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let td = td("a.test");
    assert_eq!(store.prune_bundle(&td, NOW).await.unwrap(), None);
    let ends = |a: &X509Authority| finial_crypto::Certificate::parse(a.der.clone()).unwrap().not_after();
    let (a, b) = (root(ROOT_A), root(ROOT_B));
    assert!(ends(&a) < ends(&b));
    let both = Bundle {
        x509_authorities: vec![a.clone(), b.clone()],
        jwt_authorities: vec![key("old", ends(&a)), key("new", ends(&b)), key("ever", 0)],
        ..bundle("a.test")
    };
    store.create_bundle(&both).await.unwrap();
    assert_eq!(store.prune_bundle(&td, ends(&a) - 1).await.unwrap(), None);
    let pruned = store.prune_bundle(&td, ends(&a)).await.unwrap().unwrap();
    assert_eq!((pruned.x509_authorities.len(), pruned.jwt_authorities.len(), pruned.sequence_number), (1, 2, 1));
    let (_, text) = fails(store.prune_bundle(&td, ends(&b)).await);
    assert_eq!(text, "datastore-sql: prune failed: would prune all certificates");
    assert_eq!(store.fetch_bundle(&td).await.unwrap(), Some(pruned));
}

async fn a_root_that_cannot_be_read_holds_up_nothing(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let td = td("a.test");
    let (a, b) = (root(ROOT_A), root(ROOT_B));
    let unreadable = X509Authority { der: b"garbage"[..].into(), tainted: false };
    let x509_authorities = vec![unreadable.clone(), a.clone(), b.clone()];
    store.create_bundle(&Bundle { x509_authorities, ..bundle("a.test") }).await.unwrap();
    let tainted = store.taint_x509_authority(&td, &skid(&a)).await.unwrap();
    assert_eq!(tainted.x509_authorities.iter().map(|root| root.tainted).collect::<Vec<_>>(), [false, true, false]);
    let revoked = store.revoke_x509_authority(&td, &skid(&a)).await.unwrap();
    assert_eq!(revoked.x509_authorities, [unreadable.clone(), b.clone()]);
    store.append_bundle(&Bundle { x509_authorities: vec![a.clone()], ..bundle("a.test") }).await.unwrap();
    let ends = |root: &X509Authority| finial_crypto::Certificate::parse(root.der.clone()).unwrap().not_after();
    let pruned = store.prune_bundle(&td, ends(&a)).await.unwrap().unwrap();
    assert_eq!(pruned.x509_authorities, [unreadable, b.clone()], "nobody knows when it ends");
    let (_, text) = fails(store.prune_bundle(&td, ends(&b)).await);
    assert_eq!(text, "datastore-sql: prune failed: would prune all certificates", "it is not one to go on with");
}

async fn authorities_are_tainted_then_revoked(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let td = td("a.test");
    let full = Bundle { x509_authorities: vec![root(ROOT_A), root(ROOT_B)], ..full_bundle("a.test") };
    store.create_bundle(&full).await.unwrap();
    let a = skid(&root(ROOT_A));
    let untainted = "it is not possible to revoke an untainted root CA";
    assert_eq!(fails(store.revoke_x509_authority(&td, &a).await), (ErrorKind::InvalidArgument, untainted.into()));
    let tainted = store.taint_x509_authority(&td, &a).await.unwrap();
    assert_eq!((tainted.x509_authorities[0].tainted, tainted.x509_authorities[1].tainted), (true, false));
    assert_eq!(fails(store.taint_x509_authority(&td, &a).await).1, "root CA is already tainted");
    assert_eq!(fails(store.taint_x509_authority(&td, "00").await).1, "no ca found with provided subject key ID");
    let revoked = store.revoke_x509_authority(&td, &a).await.unwrap();
    assert_eq!((revoked.x509_authorities.len(), revoked.sequence_number), (1, 9));
    assert_eq!(fails(store.revoke_x509_authority(&td, &a).await).1, "no root CA found with provided subject key ID");
    assert_eq!(fails(store.revoke_jwt_authority(&td, "j").await).1, "it is not possible to revoke an untainted key");
    assert!(store.taint_jwt_authority(&td, "j").await.unwrap().tainted);
    assert_eq!(fails(store.taint_jwt_authority(&td, "j").await).1, "key is already tainted");
    assert_eq!(store.revoke_jwt_authority(&td, "j").await.unwrap().key_id, "j");
    let missing = fails(store.taint_jwt_authority(&td, "j").await);
    assert_eq!(missing, (ErrorKind::NotFound, "no JWT Key found with provided key ID".into()));
}

async fn deleting_a_bundle_minds_the_entries_that_federate(lab: Lab) {
    for (mode, left) in [(DeleteMode::Dissociate, 2), (DeleteMode::Delete, 1)] {
        let Some(store) = lab.open().await else { return };
        store.create_bundle(&bundle("a.test")).await.unwrap();
        let federated = create(&store, full_entry("f", &["a.test"])).await;
        create(&store, entry("o", "/o", "/p", &["t:a"])).await;
        let (kind, text) = fails(store.delete_bundle(&td("a.test"), DeleteMode::Restrict).await);
        assert_eq!(kind, ErrorKind::FailedPrecondition);
        assert_eq!(text, "datastore-sql: cannot delete bundle; federated with 1 registration entries");
        assert_eq!(store.delete_bundle(&td("a.test"), mode).await.unwrap(), std::slice::from_ref(&federated.id));
        assert_eq!(entries(&store).await.len(), left);
        assert_eq!(store.fetch_bundle(&td("a.test")).await.unwrap(), None);
        if let Some(stays) = store.fetch_entry(&federated.id).await.unwrap() {
            assert_eq!(stays.federates_with, []);
        }
        assert_eq!(fails(store.delete_bundle(&td("a.test"), mode).await).0, ErrorKind::NotFound);
    }
}

async fn paths(store: &Store, filter: AgentFilter) -> Vec<String> {
    let listed = store.list_nodes(&filter, None).await.unwrap().items;
    assert_eq!(store.count_nodes(&filter).await.unwrap(), listed.len() as u64);
    listed.iter().map(|a| a.id.path().trim_start_matches("/spire/agent/").to_owned()).collect()
}

async fn agents_attest_renew_and_are_banned(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let first = agent("/spire/agent/a");
    assert_eq!(store.create_or_update_node(&first).await.unwrap(), first);
    let again = AgentRecord {
        serial_number: "2".into(),
        agent_version: String::new(),
        selectors: selectors(&["x509pop:other"]),
        ..first.clone()
    };
    let stored = store.create_or_update_node(&again).await.unwrap();
    assert_eq!(stored, AgentRecord { agent_version: "1.15.3".into(), ..again });
    assert_eq!(store.fetch_node(&first.id).await.unwrap(), Some(stored));
    let renewed =
        AgentUpdate { new_serial_number: Some("3".into()), new_expires_at: Some(NOW + 7200), ..AgentUpdate::default() };
    let renewed = store.update_node(&first.id, renewed).await.unwrap();
    assert_eq!((renewed.serial_number.as_str(), renewed.new_expires_at), ("2", NOW + 7200));
    assert_eq!(store.promote_serial(&first.id, "9").await.unwrap(), renewed, "not the renewed one");
    let promoted = store.promote_serial(&first.id, "3").await.unwrap();
    let expected = ("3", NOW + 7200, "", 0);
    let serials =
        |a: &AgentRecord| (a.serial_number.clone(), a.expires_at, a.new_serial_number.clone(), a.new_expires_at);
    assert_eq!(serials(&promoted), (expected.0.into(), expected.1, expected.2.into(), expected.3));
    assert!(store.ban_node(&first.id).await.unwrap().is_banned());
    assert!(store.fetch_node(&first.id).await.unwrap().unwrap().is_banned());
    let (deleted, aliases) = store.delete_node(&first.id).await.unwrap();
    assert_eq!((deleted.id, aliases), (first.id.clone(), vec![]));
    assert_eq!(
        fails(store.delete_node(&first.id).await),
        (ErrorKind::NotFound, "datastore-sql: record not found".into())
    );
    assert_eq!(events(&store, EventFeed::Nodes).await.len(), 6);
}

async fn agents_are_filtered(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let put = |name: &str, change: &dyn Fn(&mut AgentRecord)| {
        let mut new = agent(&format!("/spire/agent/{name}"));
        change(&mut new);
        let store = store.store.clone();
        async move { store.create_or_update_node(&new).await.unwrap() }
    };
    put("a", &|_| ()).await;
    put("b", &|a| a.can_reattest = false).await;
    put("c", &|a| a.serial_number.clear()).await;
    put("d", &|a| (a.attestation_type, a.expires_at) = ("k8s".into(), NOW - 1)).await;
    put("e", &|a| a.selectors = selectors(&["t:x"])).await;
    let of = |change: &dyn Fn(&mut AgentFilter)| {
        let mut filter = AgentFilter::default();
        change(&mut filter);
        paths(&store, filter)
    };
    let filters: Vec<(Vec<String>, &[&str])> = vec![
        (of(&|_| ()).await, &["a", "b", "c", "d", "e"]),
        (of(&|f| f.can_reattest = Some(false)).await, &["b"]),
        (of(&|f| f.banned = Some(true)).await, &["c"]),
        (of(&|f| f.banned = Some(false)).await, &["a", "b", "d", "e"]),
        (of(&|f| f.attestation_type = Some("k8s".into())).await, &["d"]),
        (of(&|f| f.expires_before = Some(NOW)).await, &["d"]),
        (of(&|f| f.valid_at = Some(NOW)).await, &["a", "b", "c", "e"]),
        (of(&|f| f.selectors = Some((MatchBehavior::Any, selectors(&["t:x", "t:y"]).into_vec()))).await, &["e"]),
        (of(&|f| f.selectors = Some((MatchBehavior::Exact, selectors(&["t:x", "t:y"]).into_vec()))).await, &[]),
        (of(&|f| f.selectors = Some((MatchBehavior::Subset, selectors(&["t:x", "t:y"]).into_vec()))).await, &["e"]),
    ];
    for (at, (found, expected)) in filters.into_iter().enumerate() {
        assert_eq!(found, expected, "filter {at}");
    }
    let page = Page { token: String::new(), size: 3 };
    let first = store.list_nodes(&AgentFilter::default(), Some(&page)).await.unwrap();
    assert_eq!((first.items.len(), first.next_page_token.as_str()), (3, "3"));
    let (some, after) = store.agents_after(0, 3).await.unwrap();
    let (rest, end) = store.agents_after(after.unwrap(), 3).await.unwrap();
    assert_eq!((some.len(), rest.len(), end), (3, 2, None));
    let keep = HashSet::new();
    let (gone, _) = store.prune_nodes(NOW + 3601, false, 1, &keep).await.unwrap();
    assert_eq!(gone, [id("/spire/agent/a")], "in batches");
    let (gone, _) = store.prune_nodes(NOW + 3601, true, 100, &keep).await.unwrap();
    assert_eq!(gone, ["b", "d", "e"].map(|n| id(&format!("/spire/agent/{n}"))), "never the banned one");
    for name in ["f", "g"] {
        put(name, &|_| ()).await;
    }
    let (f, g) = (id("/spire/agent/f"), id("/spire/agent/g"));
    store.renew_node(&f, &["12345".into()], "2", NOW + 9000).await.unwrap();
    let keep = HashSet::from([g.clone()]);
    assert_eq!(store.prune_nodes(NOW + 9000, true, 100, &keep).await.unwrap().0, [], "renewed, and to be kept");
    assert_eq!(store.prune_nodes(NOW + 9001, true, 1, &HashSet::new()).await.unwrap().0, [f]);
    assert_eq!(store.prune_nodes(NOW + 3601, true, 1, &HashSet::new()).await.unwrap().0, [g]);
}

async fn agents_that_differ_in_case_only_are_two_or_refused(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    store.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    let second = store.create_or_update_node(&agent("/spire/agent/A")).await;
    match lab {
        Lab::MySql => {
            let (kind, text) = fails(second);
            assert_eq!(kind, ErrorKind::FailedPrecondition);
            assert!(text.contains("cannot be told from spiffe://example.org/spire/agent/a "), "{text}");
        }
        _ => assert_eq!(second.unwrap().id, id("/spire/agent/A")),
    }
}

fn token(text: &str) -> JoinToken {
    JoinToken { token: text.into(), expires_at: NOW + 60 }
}

async fn a_join_token_brings_its_agent_and_takes_its_alias_along(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let agent_id = "/spire/agent/join_token/t";
    let alias = entry("alias", "/node", agent_id, &[&format!("spiffe_id:spiffe://example.org{agent_id}")]);
    assert!(!store.create_join_token(&token("t"), Some(alias)).await.unwrap().unwrap().existing);
    assert_eq!(fails(store.create_join_token(&token("t"), None).await).0, ErrorKind::AlreadyExists);
    let missing = fails(store.create_join_token(&JoinToken { expires_at: 0, ..token("u") }, None).await);
    assert_eq!(missing, (ErrorKind::InvalidArgument, "token and expiry are required".into()));
    create(&store, entry("work", "/work", agent_id, &["unix:uid:1"])).await;
    assert_eq!(store.fetch_join_token("t").await.unwrap(), Some(token("t")));
    let record = AgentRecord { attestation_type: "join_token".into(), can_reattest: false, ..agent(agent_id) };
    assert_eq!(store.attest_by_join_token("t", &record, NOW).await.unwrap(), Some(token("t")));
    assert_eq!(store.attest_by_join_token("t", &record, NOW).await.unwrap(), None);
    assert_eq!(store.fetch_node(&record.id).await.unwrap(), Some(record.clone()));
    let (_, aliases) = store.delete_node(&record.id).await.unwrap();
    assert_eq!(aliases.iter().map(|e| e.id.as_str()).collect::<Vec<_>>(), ["alias"]);
    assert_eq!(entries(&store).await.len(), 1, "the operator's entry stays");
    store.create_join_token(&token("late"), None).await.unwrap();
    let late = store.attest_by_join_token("late", &record, NOW + 61).await.unwrap();
    assert_eq!(late, Some(token("late")), "the caller sees that it expired");
    assert_eq!(store.fetch_node(&record.id).await.unwrap(), None);
    store.create_join_token(&token("old"), None).await.unwrap();
    assert_eq!(store.prune_join_tokens(NOW + 60).await.unwrap(), 0);
    assert_eq!(store.prune_join_tokens(NOW + 61).await.unwrap(), 1);
}

async fn of_many_callers_one_gets_the_token(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    for round in 0..5 {
        let text = format!("t{round}");
        store.create_join_token(&token(&text), None).await.unwrap();
        let mut callers = tokio::task::JoinSet::new();
        for caller in 0..32 {
            let (store, text) = (store.store.clone(), text.clone());
            callers.spawn(async move {
                let record = agent(&format!("/spire/agent/join_token/{text}-{caller}"));
                store.attest_by_join_token(&text, &record, NOW).await.unwrap().is_some()
            });
        }
        assert_eq!(callers.join_all().await.into_iter().filter(|got| *got).count(), 1);
    }
}

async fn journals_are_found_by_their_authority(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let entries = |ends: i64| journal::Entries {
        x509_c_as: vec![journal::X509caEntry { not_after: ends, ..Default::default() }],
        jwt_keys: vec![journal::JwtKeyEntry { not_after: ends - 5, ..Default::default() }],
        ..Default::default()
    };
    let new = CaJournal { id: 0, data: entries(NOW).encode_to_vec(), active_x509_authority_id: "aa".into() };
    let stored = store.set_ca_journal(&new).await.unwrap();
    assert_eq!(store.fetch_ca_journal("aa").await.unwrap(), Some(stored.clone()));
    assert_eq!(store.fetch_ca_journal("bb").await.unwrap(), None);
    let moved = CaJournal { active_x509_authority_id: "bb".into(), ..stored.clone() };
    store.set_ca_journal(&moved).await.unwrap();
    assert_eq!(store.fetch_ca_journal("aa").await.unwrap(), None);
    assert_eq!(store.list_ca_journals().await.unwrap(), std::slice::from_ref(&moved));
    let text = "active X509 authority ID is required";
    assert_eq!(fails(store.fetch_ca_journal("").await), (ErrorKind::InvalidArgument, text.into()));
    assert!(matches!(store.set_ca_journal(&CaJournal { id: 99, ..moved }).await, Err(StoreError::NotFound)));
    assert_eq!(store.prune_ca_journals(NOW - 1).await.unwrap(), 0);
    assert_eq!(store.prune_ca_journals(NOW).await.unwrap(), 1);
}

async fn calls_are_counted_under_spires_names(lab: Lab) {
    let metrics = finial_runtime::Metrics::new(finial_runtime::telemetry::Settings {
        prefix: "spire_server".into(),
        ..Default::default()
    });
    let Some(store) = lab.open().await else { return };
    let store = store.store.clone().with_metrics(metrics.clone());
    store.create_bundle(&bundle("a.test")).await.unwrap();
    store.create_bundle(&bundle("a.test")).await.unwrap_err();
    store.fetch_node(&id("/spire/agent/none")).await.unwrap();
    store.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    store.delete_node(&id("/spire/agent/none")).await.unwrap_err();
    store.prune_events(NOW).await.unwrap();
    let text = metrics.render();
    for want in [
        "spire_server_datastore_bundle_create{status=\"OK\"} 1",
        "spire_server_datastore_bundle_create{status=\"AlreadyExists\"} 1",
        "spire_server_datastore_node_fetch{status=\"OK\"} 1",
        "spire_server_datastore_node_create{status=\"OK\"} 1",
        "spire_server_datastore_node_delete{status=\"NotFound\"} 1",
        "spire_server_datastore_node_event_prune{status=\"OK\"} 1",
        "spire_server_datastore_registration_entry_event_prune{status=\"OK\"} 1",
        "spire_server_datastore_bundle_create_elapsed_time_count{status=\"OK\"} 1",
    ] {
        assert!(text.lines().any(|line| line == want), "{want}\n{text}");
    }
}
