//! A server that tells of changes by itself, and one that stops doing so.

use super::fake::wire_entry;
use super::harness::{World, next, until};
use finial_core::{Clock, ManualClock, SystemClock};
use finial_proto::convert::permission_denied;
use finial_proto::digest::Digests;
use finial_proto::sync::{VersionedBundle, WatchResponse};
use finial_proto::types::{self, permission_denied_details::Reason};
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// An agent that never asks again by itself, under a server that pushes.
async fn world() -> World {
    let mut world = World::new().await;
    world.settings.sync_interval = Duration::from_secs(3600);
    world.server.state().pushes = true;
    world
}

async fn listening(world: &World) {
    until("the agent listens to the server", || world.server.listeners() == 1).await;
}

fn upsert(entries: Vec<types::Entry>) -> WatchResponse {
    WatchResponse { entries, ..Default::default() }
}

#[tokio::test]
async fn what_the_server_tells_reaches_workloads_without_asking() {
    let world = world().await;
    world.entry("e1", "/one", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap().svids[0].spiffe_id, "spiffe://td/one");
    listening(&world).await;
    let said = world.server.state().watches[0].clone();
    let mut digests = Digests::sized_for(1);
    digests.add("e1", 0, 1);
    assert_eq!(said.entry_digests, digests.into_inner(), "the agent says what it has");

    world.entry("e2", "/two", &["test:any"]);
    world.server.push(upsert(vec![wire_entry("e2", "/two", &["test:any"])])).await;
    while next(&mut stream).await.unwrap().svids.len() != 2 {}
    world.server.push(WatchResponse { removed_entry_ids: vec!["e1".into()], ..Default::default() }).await;
    let left = next(&mut stream).await.unwrap();
    assert_eq!(left.svids.iter().map(|s| &*s.spiffe_id).collect::<Vec<_>>(), ["spiffe://td/two"]);
    assert_eq!(world.server.calls("SyncAuthorizedEntries"), 1, "asked at start only");
    agent.stop().await;
}

#[tokio::test]
async fn bundles_come_as_they_change_and_with_the_entries_that_need_them() {
    let world = world().await;
    world.entry("e1", "/one", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    next(&mut stream).await.unwrap();
    listening(&world).await;
    let other = crate::testing::TestCa::new("other");
    let bundle = super::fake::wire_bundle("other", &other.root, None);
    let federating = types::Entry { federates_with: vec!["other".into()], ..wire_entry("e1", "/one", &["test:any"]) };
    let federating = types::Entry { revision_number: 1, ..federating };
    let bundles = vec![VersionedBundle { bundle: Some(bundle), version: 7 }];
    world.server.push(WatchResponse { entries: vec![federating], bundles, ..Default::default() }).await;
    while !next(&mut stream).await.unwrap().federated_bundles.contains_key("spiffe://other") {}
    let own = world.server.state().bundle.clone();
    let own = types::Bundle {
        sequence_number: 9,
        x509_authorities: [
            own.x509_authorities,
            vec![types::X509Certificate { asn1: other.root.to_vec().into(), tainted: false }],
        ]
        .concat(),
        ..own
    };
    let both = own.x509_authorities.iter().map(|a| a.asn1.len()).sum::<usize>();
    let bundles = vec![VersionedBundle { bundle: Some(own), version: 8 }];
    world.server.push(WatchResponse { bundles, ..Default::default() }).await;
    while next(&mut stream).await.unwrap().svids[0].bundle.len() != both {}
    // The next stream begins with what this one told.
    world.server.end_streams(None).await;
    listening(&world).await;
    let said = world.server.state().watches[1].bundles.clone();
    assert_eq!(said.iter().map(|b| (&*b.trust_domain, b.version)).collect::<Vec<_>>(), [("other", 7), ("td", 8)]);
    agent.stop().await;
}

#[tokio::test]
async fn when_the_stream_is_lost_the_agent_asks_and_opens_another() {
    let mut world = world().await;
    world.settings.sync_interval = Duration::from_millis(50);
    let agent = world.started().await;
    listening(&world).await;
    world.entry("e1", "/one", &["test:any"]);
    world.server.state().pushes = false;
    world.server.end_streams(Some(Status::unavailable("going away"))).await;
    let mut stream = agent.x509().await;
    while stream.is_err() {
        stream = agent.x509().await;
    }
    world.server.state().pushes = true;
    listening(&world).await;
    let last = world.server.state().watches.last().unwrap().clone();
    assert!(!last.entry_digests.is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn a_server_without_such_a_stream_is_asked_for_it_once_a_connection() {
    let world = World::new().await;
    let agent = world.started().await;
    until("the agent has polled often", || world.server.calls("SyncAuthorizedEntries") > 10).await;
    assert_eq!(world.server.calls("WatchAuthorized"), 1);
    agent.stop().await;
}

#[tokio::test]
async fn a_ban_told_by_the_stream_ends_the_agent() {
    let world = world().await;
    let agent = world.started().await;
    listening(&world).await;
    world.server.state().refuse = Some(Reason::AgentBanned);
    world.server.end_streams(Some(permission_denied("banned", Reason::AgentBanned))).await;
    assert_eq!(agent.failure().await.kind(), finial_core::ErrorKind::Denied);
}

#[tokio::test]
async fn a_renewed_svid_opens_a_stream_of_its_own_and_ends_the_old_one() {
    let mut world = world().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    let agent = world.started().await;
    listening(&world).await;
    clock.advance(2500);
    until("the agent renewed its SVID", || world.server.calls("RenewAgent") >= 1).await;
    until("it opened another stream", || world.server.state().watches.len() >= 2).await;
    until("the old stream was left", || world.server.state().streams.first().is_some_and(|s| s.is_closed())).await;
    let serials = world.server.state().serials.clone();
    assert_eq!(serials.len(), 2, "each SVID once, in order: {serials:?}");
    assert!(!agent.has_ended());
    agent.stop().await;
}

#[tokio::test]
async fn an_answer_that_cannot_be_used_is_not_taken_for_known() {
    let world = world().await;
    world.entry("e1", "/one", &["test:any"]);
    let agent = world.started().await;
    listening(&world).await;
    let before = world.server.state().watches[0].clone();
    let other = crate::testing::TestCa::new("other");
    let bundle = super::fake::wire_bundle("other", &other.root, None);
    let own = types::Bundle {
        x509_authorities: vec![types::X509Certificate { asn1: vec![1u8].into(), tainted: false }],
        ..world.server.state().bundle.clone()
    };
    let bundles =
        vec![VersionedBundle { bundle: Some(bundle), version: 7 }, VersionedBundle { bundle: Some(own), version: 8 }];
    let entries = vec![wire_entry("e2", "/two", &["test:any"])];
    world.server.push(WatchResponse { entries: entries.clone(), bundles, ..Default::default() }).await;
    until("the agent opens another stream", || world.server.state().watches.len() == 2).await;
    let again = world.server.state().watches[1].clone();
    assert_eq!(again.entry_digests, before.entry_digests, "it does not have e2");
    assert!(again.bundles.is_empty(), "nor the other bundle: {:?}", again.bundles);
    world.entry("e2", "/two", &["test:any"]);
    world.server.push(upsert(entries)).await;
    let mut stream = agent.x509().await.unwrap();
    while next(&mut stream).await.unwrap().svids.len() != 2 {}
    agent.stop().await;
}

/// What a server that pushes tells of its own bundle, under this number.
fn own_bundle(world: &World, sequence_number: u64) -> WatchResponse {
    let bundle = types::Bundle { sequence_number, ..world.server.state().bundle.clone() };
    let bundles = vec![VersionedBundle { bundle: Some(bundle), version: sequence_number }];
    WatchResponse { bundles, ..Default::default() }
}

#[tokio::test]
async fn the_server_hears_once_of_each_bundle_that_is_in_use() {
    let world = world().await;
    let agent = world.started().await;
    listening(&world).await;
    world.server.push(own_bundle(&world, 4)).await;
    until("the agent says so", || world.server.state().confirmed == [4]).await;
    let other = crate::testing::TestCa::new("other");
    let federated = VersionedBundle { bundle: Some(super::fake::wire_bundle("other", &other.root, None)), version: 1 };
    world.server.push(WatchResponse { bundles: vec![federated], ..Default::default() }).await;
    world.server.push(own_bundle(&world, 5)).await;
    until("and of the next", || world.server.state().confirmed == [4, 5]).await;
    assert_eq!(world.server.calls("BundleSeen"), 2);
    agent.stop().await;
}

/// Who replaces authorities would revoke what workloads still have.
#[tokio::test]
async fn a_bundle_with_a_taint_is_confirmed_once_the_workloads_have_left_it() {
    let world = world().await;
    world.entry("e1", "/one", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    let before = next(&mut stream).await.unwrap();
    listening(&world).await;
    let asked = world.server.calls("BatchNewX509SVID");
    world.server.state().batch_limit = 0;
    world.server.state().bundle.x509_authorities[0].tainted = true;
    world.server.push(own_bundle(&world, 4)).await;
    until("the server refused them", || world.server.calls("BatchNewX509SVID") > asked).await;
    until("it opens another stream", || world.server.state().watches.len() == 2).await;
    {
        let mut state = world.server.state();
        assert!(state.confirmed.is_empty() && state.watches[1].bundles.is_empty(), "it does not say that it has it");
        state.batch_limit = 500;
    }
    while next(&mut stream).await.unwrap().svids[0].x509_svid == before.svids[0].x509_svid {}
    until("the agent says so", || world.server.state().confirmed == [4]).await;
    agent.stop().await;
}

/// Nor while one of them cannot: who replaces authorities sees it, and decides.
#[tokio::test]
async fn a_bundle_with_a_taint_is_not_confirmed_while_an_svid_that_hangs_from_it_is_refused() {
    let world = world().await;
    world.entry("e1", "/one", &["test:any"]);
    world.entry("e2", "/two", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    while next(&mut stream).await.unwrap().svids.len() != 2 {}
    listening(&world).await;
    let asked = world.server.calls("BatchNewX509SVID");
    let refused = world.server.state().entries.remove("e2").unwrap();
    world.server.state().bundle.x509_authorities[0].tainted = true;
    world.server.push(own_bundle(&world, 4)).await;
    until("it asks again for what was refused", || world.server.calls("BatchNewX509SVID") >= asked + 2).await;
    assert!(world.server.state().confirmed.is_empty(), "a workload still has what would be revoked");
    world.server.state().entries.insert("e2".into(), refused);
    until("the agent says so", || world.server.state().confirmed == [4]).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_older_server_is_not_told_again_over_the_same_connection() {
    let world = world().await;
    world.server.state().no_confirming = Some(Status::unimplemented("unknown method BundleSeen"));
    world.entry("e1", "/one", &["test:any"]);
    let agent = world.started().await;
    listening(&world).await;
    world.server.push(own_bundle(&world, 4)).await;
    until("it was tried", || world.server.calls("BundleSeen") == 1).await;
    world.server.push(own_bundle(&world, 5)).await;
    world.entry("e2", "/two", &["test:any"]);
    world.server.push(upsert(vec![wire_entry("e2", "/two", &["test:any"])])).await;
    let mut stream = agent.x509().await.unwrap();
    while next(&mut stream).await.unwrap().svids.len() != 2 {}
    assert_eq!(world.server.calls("BundleSeen"), 1);
    agent.stop().await;
}

#[tokio::test]
async fn a_server_that_does_not_answer_that_keeps_nothing_waiting() {
    let world = world().await;
    let agent = world.started().await;
    listening(&world).await;
    world.server.state().hangs = true;
    world.server.push(own_bundle(&world, 4)).await;
    until("it was asked", || world.server.state().confirmed == [4]).await;
    world.entry("e1", "/one", &["test:any"]);
    world.server.push(upsert(vec![wire_entry("e1", "/one", &["test:any"])])).await;
    let mut stream = agent.x509().await;
    while stream.is_err() {
        stream = agent.x509().await;
    }
    assert_eq!(next(stream.as_mut().unwrap()).await.unwrap().svids[0].spiffe_id, "spiffe://td/one");
    agent.stop().await;
}
