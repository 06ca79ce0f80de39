//! A server that is slow, answers wrongly, or bans the agent.

use super::fake::{wire_bundle, wire_entry};
use super::harness::{World, next, until};
use finial_proto::sync::WatchResponse;
use finial_proto::types::{self, permission_denied_details::Reason};
use tonic::Code;

/// What a server could put where an SVID belongs. The key of the request cannot be in it.
const SPOILS: [fn(&mut types::X509svid); 4] = [
    |svid| svid.cert_chain.clear(),
    |svid| svid.cert_chain = vec![vec![0x30, 0x82, 0xff, 0xff].into()],
    |svid| svid.cert_chain.truncate(0),
    |svid| {
        let other = crate::testing::TestCa::new("td");
        let key = finial_crypto::PrivateKey::generate(finial_core::KeyType::EcP256).unwrap();
        let leaf = other.issue(&finial_core::SpiffeId::parse("spiffe://td/web").unwrap(), key.public_key(), 3600);
        svid.cert_chain = vec![leaf.to_vec().into()];
    },
];

#[tokio::test]
async fn svids_that_cannot_be_used_are_not_served_and_what_was_good_stays() {
    let world = World::new().await;
    world.entry("e0", "/good", &["test:any"]);
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    let good = next(&mut held).await.unwrap();
    for spoil in SPOILS {
        let asked = world.server.calls("BatchNewX509SVID");
        world.server.state().spoil = Some(spoil);
        // A changed entry asks for another SVID.
        let revision_number = world.server.state().entries["e0"].revision_number + 1;
        let changed = types::Entry { revision_number, ..wire_entry("e0", "/good", &["test:any"]) };
        world.server.state().entries.insert("e0".into(), changed);
        until("another was asked for", || world.server.calls("BatchNewX509SVID") > asked).await;
        let served = agent.x509_once().await.unwrap();
        assert_eq!(served.svids[0].x509_svid, good.svids[0].x509_svid, "the one before is still good");
    }
    world.server.state().spoil = None;
    let fresh = next(&mut held).await.unwrap();
    assert_ne!(fresh.svids[0].x509_svid, good.svids[0].x509_svid);
    agent.stop().await;
}

#[tokio::test]
async fn an_svid_for_another_identity_is_given_to_nobody() {
    let world = World::new().await;
    world.entry("e0", "/good", &["test:exe:other"]);
    let agent = world.started().await;
    world.server.state().issue_as = Some("/admin".into());
    world.entry("e1", "/web", &["test:any"]);
    let asked = world.server.calls("BatchNewX509SVID");
    until("it was asked for", || world.server.calls("BatchNewX509SVID") > asked).await;
    let caller = agent.caller();
    let waiting = world.supervisor.spawner().spawn("workload", async move {
        let request = super::harness::secure(finial_proto::workload::X509svidRequest {});
        caller().fetch_x509svid(request).await.unwrap().into_inner().message().await.unwrap().unwrap()
    });
    let asked = world.server.calls("BatchNewX509SVID");
    until("it was asked for again", || world.server.calls("BatchNewX509SVID") > asked).await;
    assert!(!waiting.is_finished(), "nothing was served");
    world.server.state().issue_as = None;
    assert_eq!(super::harness::within(waiting).await.unwrap().svids[0].spiffe_id, "spiffe://td/web");
    agent.stop().await;
}

#[tokio::test]
async fn another_trust_domains_bundle_reaches_no_workload_and_the_agent_goes_on() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    let before = next(&mut held).await.unwrap();
    let own = world.server.state().bundle.clone();
    let other = crate::testing::TestCa::new("other");
    let foreign = wire_bundle("other", &other.root, None);
    for wrong in [
        foreign.clone(),
        types::Bundle { trust_domain: "Not A Name".into(), ..foreign },
        types::Bundle {
            x509_authorities: vec![types::X509Certificate { asn1: vec![1, 2, 3].into(), tainted: false }],
            ..own.clone()
        },
        types::Bundle { x509_authorities: Vec::new(), ..own.clone() },
    ] {
        world.server.state().bundle = wrong;
        let calls = world.server.calls("GetBundle");
        until("it was fetched", || world.server.calls("GetBundle") > calls + 1).await;
        let served = agent.x509_once().await.unwrap();
        assert_eq!(served.svids[0].bundle, before.svids[0].bundle);
        assert_eq!(served.federated_bundles.len(), 0);
        let kept = std::fs::read_to_string(world.dir.path().join("data/agent-data.json")).unwrap();
        assert!(kept.contains("\"bundle\":[\""), "the roots to start with: {kept}");
    }
    world.server.state().bundle = own;
    world.entry("e2", "/more", &["test:any"]);
    assert_eq!(next(&mut held).await.unwrap().svids.len(), 2, "it comes back by itself");
    agent.stop().await;
}

#[tokio::test]
async fn a_federated_bundle_that_cannot_be_read_leaves_the_good_one() {
    let world = World::new().await;
    let other = crate::testing::TestCa::new("other");
    let good = wire_bundle("other", &other.root, None);
    world.server.state().federated.insert("other".into(), good.clone());
    let entry = types::Entry { federates_with: vec!["other".into()], ..wire_entry("e1", "/web", &["test:any"]) };
    world.server.state().entries.insert("e1".into(), entry);
    let agent = world.started().await;
    let before = agent.x509_once().await.unwrap().federated_bundles;
    assert_eq!(before.len(), 1);
    let x509_authorities = vec![types::X509Certificate { asn1: vec![1, 2, 3].into(), tainted: false }];
    world.server.state().federated.insert("other".into(), types::Bundle { x509_authorities, ..good });
    let calls = world.server.calls("GetFederatedBundle");
    until("it was fetched", || world.server.calls("GetFederatedBundle") > calls + 2).await;
    assert_eq!(agent.x509_once().await.unwrap().federated_bundles, before);
    world.server.state().federated.clear();
    let mut held = agent.x509().await.unwrap();
    while !next(&mut held).await.unwrap().federated_bundles.is_empty() {}
    agent.stop().await;
}

/// A server that refuses one SVID, and says what changes by itself.
#[tokio::test]
async fn an_svid_that_is_refused_is_asked_for_ever_later_and_keeps_no_other_one_waiting() {
    let mut world = World::new().await;
    world.settings.sync_interval = std::time::Duration::from_secs(3600);
    world.server.state().pushes = true;
    let agent = world.started().await;
    until("the agent listens to the server", || world.server.listeners() == 1).await;
    world.server.state().issue_as = Some("/admin".into());
    let refused = wire_entry("e1", "/web", &["test:exe:other"]);
    world.server.state().entries.insert("e1".into(), refused.clone());
    let entries = vec![refused];
    world.server.push(WatchResponse { entries, ..Default::default() }).await;
    until("it was refused", || world.server.calls("BatchNewX509SVID") > 0).await;
    // Its time comes again and again, but never at once.
    until("it was asked for again", || world.server.calls("BatchNewX509SVID") > 2).await;
    world.server.state().issue_as = None;
    let still = super::harness::StandsStill::begin();
    let asked = world.server.calls("BatchNewX509SVID");
    let attributes = types::entry::AdditionalAttributes { disable_x509_svid_prefetch: true, ..Default::default() };
    let additional_attributes = Some(attributes);
    let entries = vec![types::Entry { additional_attributes, ..wire_entry("e2", "/two", &["test:any"]) }];
    world.server.state().entries.insert("e2".into(), entries[0].clone());
    world.server.push(WatchResponse { entries, ..Default::default() }).await;
    let mut answer = agent.x509_once().await;
    while answer.is_err() {
        answer = agent.x509_once().await; // until the agent has heard of it
    }
    assert_eq!(answer.unwrap().svids[0].spiffe_id, "spiffe://td/two");
    assert_eq!(world.server.calls("BatchNewX509SVID"), asked + 1);
    assert_eq!(world.server.state().batches.last(), Some(&1), "the refused one was not asked for with it");
    drop(still);
    agent.stop().await;
}

#[tokio::test]
async fn workloads_do_not_wait_for_a_server_that_does_not_answer() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    world.server.state().hangs = true;
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("a sync hangs", || world.server.calls("SyncAuthorizedEntries") > syncs).await;
    let still = super::harness::StandsStill::begin();
    assert_eq!(agent.x509_once().await.unwrap().svids.len(), 1);
    drop(still);
    agent.stop().await;
}

#[tokio::test]
async fn a_banned_agent_ends_its_streams_and_leaves_its_socket() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    next(&mut held).await.unwrap();
    world.server.state().refuse = Some(Reason::AgentBanned);
    let end = next(&mut held).await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable, "{end}");
    let socket = agent.socket.clone();
    let error = agent.failure().await;
    assert_eq!(error.kind(), finial_core::ErrorKind::Denied);
    assert!(!socket.exists(), "nobody can ask any more");
    // And not after a restart either: there is no SVID, and what was kept for outages is gone.
    let again = world.start().failure().await;
    assert!(!socket.exists(), "{again}");
}
