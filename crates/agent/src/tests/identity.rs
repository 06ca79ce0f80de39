//! X.509-SVIDs and bundles on the Workload API.

use super::fake::{wire_bundle, wire_entry};
use super::harness::{Running, StandsStill, World, next, secure, until, within};
use super::sds::asked;
use finial_core::{Selector, SpiffeId};
use finial_crypto::{Certificate, TrustRoots, verify_x509_svid};
use finial_net::client::uds_channel;
use finial_plugin::{Peer, PluginError, WorkloadAttestor};
use finial_proto::agent::delegatedidentity as delegated;
use finial_proto::agent::delegatedidentity::delegated_identity_client::DelegatedIdentityClient;
use finial_proto::convert::error_info;
use finial_proto::health::{HealthCheckRequest, health_client::HealthClient};
use finial_proto::workload::*;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

#[tokio::test]
async fn a_workload_gets_a_verifiable_svid_with_its_key() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let answer = agent.x509_once().await.unwrap();
    assert_eq!(answer.svids.len(), 1);
    let svid = &answer.svids[0];
    assert_eq!(svid.spiffe_id, "spiffe://td/web");
    let chain = Certificate::parse_chain(&svid.x509_svid).unwrap();
    let ders: Vec<_> = chain.iter().map(|c| c.der().clone()).collect();
    let root: Arc<[u8]> = Arc::from(svid.bundle.as_ref());
    let id = verify_x509_svid(&ders, &TrustRoots::new([&root]).unwrap(), world.clock.now()).unwrap();
    assert_eq!(id.as_str(), "spiffe://td/web");
    let key = finial_crypto::PrivateKey::from_pkcs8(&svid.x509_svid_key).unwrap();
    assert_eq!(key.public_key(), &chain[0].public_key().unwrap());
    assert_eq!(root, world.server.ca().root);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&agent.socket), 0o777);
    assert_eq!(mode(world.settings.admin_socket_path.as_ref().unwrap()), 0o770);
    agent.stop().await;
    world.supervisor.shutdown().trigger();
}

#[tokio::test]
async fn without_an_entry_there_is_no_identity_and_health_is_well() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:other"]);
    let agent = world.started().await;
    let denied = agent.x509_once().await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::PermissionDenied, "no identity issued"));
    let mut client = agent.client();
    let bundles = client.fetch_x509_bundles(secure(X509BundlesRequest {})).await.unwrap_err();
    assert_eq!(bundles.code(), Code::PermissionDenied);
    let jwt = client.fetch_jwtsvid(secure(JwtsvidRequest { audience: vec!["a".into()], ..Default::default() })).await;
    assert_eq!(jwt.unwrap_err().message(), "no identity issued");
    let mut health = HealthClient::new(finial_net::client::uds_channel(&agent.socket));
    let well = health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(well.get_ref().status, 1);
    let one = health.check(HealthCheckRequest { service: "x".into() }).await.unwrap_err();
    assert_eq!(one.code(), Code::InvalidArgument);
    agent.stop().await;
}

#[tokio::test]
async fn bundles_are_for_all_where_the_configuration_says_so() {
    let mut world = World::new().await;
    world.settings.allow_unauthenticated_verifiers = true;
    let agent = world.started().await;
    let mut stream = agent.client().fetch_jwt_bundles(secure(JwtBundlesRequest {})).await.unwrap().into_inner();
    let bundles = next(&mut stream).await.unwrap().bundles;
    assert_eq!(bundles.keys().collect::<Vec<_>>(), ["spiffe://td"]);
    let keys: serde_json::Value = serde_json::from_slice(&bundles["spiffe://td"]).unwrap();
    assert_eq!(keys["keys"][0]["kid"], "jwt-1");
    assert_eq!(agent.x509_once().await.unwrap_err().code(), Code::PermissionDenied);
    agent.stop().await;
}

#[tokio::test]
async fn the_security_header_must_be_there_once_and_say_true() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut client = agent.client();
    let mut missing = vec![Request::new(X509svidRequest {})];
    for values in [&["TRUE"][..], &["true", "true"], &["false"], &[""]] {
        let mut request = Request::new(X509svidRequest {});
        for value in values {
            request.metadata_mut().append("workload.spiffe.io", value.parse().unwrap());
        }
        missing.push(request);
    }
    for request in missing {
        let error = client.fetch_x509svid(request).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "security header missing from request"));
    }
    agent.stop().await;
}

#[tokio::test]
async fn an_open_stream_waits_for_the_svid_of_an_entry_that_was_given_another_id() {
    let world = World::new().await;
    world.entry("e1", "/old", &["test:any"]);
    let agent = world.started().await;
    let mut svids = agent.x509().await.unwrap();
    assert_eq!(next(&mut svids).await.unwrap().svids[0].spiffe_id, "spiffe://td/old");
    world.entry("e1", "/new", &["test:any"]);
    world.server.state().entries.get_mut("e1").unwrap().revision_number += 1;
    assert_eq!(next(&mut svids).await.unwrap().svids[0].spiffe_id, "spiffe://td/new");
    agent.stop().await;
}

#[tokio::test]
async fn open_streams_see_new_entries_bundles_and_the_loss_of_identity() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut svids = agent.x509().await.unwrap();
    assert_eq!(next(&mut svids).await.unwrap().svids.len(), 1);
    let mut bundles = agent.client().fetch_x509_bundles(secure(X509BundlesRequest {})).await.unwrap().into_inner();
    assert_eq!(next(&mut bundles).await.unwrap().bundles.len(), 1);

    world.entry("e0", "/first", &["test:any", "test:exe:finial_agent"]);
    let ids = |answer: X509svidResponse| answer.svids.into_iter().map(|s| s.spiffe_id).collect::<Vec<_>>();
    assert_eq!(ids(next(&mut svids).await.unwrap()), ["spiffe://td/first", "spiffe://td/web"]);

    let other = crate::testing::TestCa::new("other");
    {
        let mut state = world.server.state();
        state.federated.insert("other".into(), wire_bundle("other", &other.root, None));
        state.entries.get_mut("e1").unwrap().federates_with = vec!["spiffe://other".into()];
        state.entries.get_mut("e1").unwrap().revision_number = 1;
    }
    let federated = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(federated.keys().collect::<Vec<_>>(), ["spiffe://other", "spiffe://td"]);
    loop {
        let answer = next(&mut svids).await.unwrap();
        if answer.federated_bundles.contains_key("spiffe://other") {
            break;
        }
    }

    world.server.state().entries.clear();
    let end = loop {
        match next(&mut svids).await {
            Ok(_) => {} // the renewed SVID of e1 may come before
            Err(status) => break status,
        }
    };
    assert_eq!((end.code(), end.message()), (Code::PermissionDenied, "no identity issued"));
    assert_eq!(next(&mut bundles).await.unwrap_err().code(), Code::PermissionDenied);
    agent.stop().await;
}

#[tokio::test]
async fn a_stream_gets_a_new_svid_before_the_old_one_ends() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    world.server.state().svid_ttl = 2; // began 10 s ago: past its half-life
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    let first = next(&mut stream).await.unwrap();
    let second = next(&mut stream).await.unwrap();
    assert_ne!(first.svids[0].x509_svid, second.svids[0].x509_svid);
    assert_ne!(first.svids[0].x509_svid_key, second.svids[0].x509_svid_key, "each SVID has its own key");
    agent.stop().await;
}

#[tokio::test]
async fn a_connection_is_attested_once_as_long_as_nothing_changes() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut client = agent.client();
    for _ in 0..5 {
        let mut stream = client.fetch_x509svid(secure(X509svidRequest {})).await.unwrap().into_inner();
        next(&mut stream).await.unwrap();
    }
    assert_eq!(world.attestor.asked.load(Ordering::SeqCst), 1);
    agent.x509_once().await.unwrap();
    assert_eq!(world.attestor.asked.load(Ordering::SeqCst), 2, "another connection");
    agent.stop().await;
}

/// Fails, for a reason that is not for everybody.
struct Broken;

#[async_trait::async_trait]
impl WorkloadAttestor for Broken {
    fn name(&self) -> &str {
        "second"
    }

    async fn attest(&self, _: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        Err(PluginError::internal("broken: /somebody/elses/path"))
    }
}

fn delegate(world: &World) -> DelegatedIdentityClient<Channel> {
    DelegatedIdentityClient::new(uds_channel(world.settings.admin_socket_path.as_deref().unwrap()))
}

/// The refusal of one that asks for tokens in the name of this process.
async fn refused_delegate(world: &World) -> Option<Status> {
    let pid = i32::try_from(std::process::id()).unwrap();
    let jwt = delegated::FetchJwtsviDsRequest { audience: vec!["a".into()], selectors: Vec::new(), pid };
    within(delegate(world).fetch_jwtsvi_ds(jwt)).await.err()
}

/// Refusals by all methods of the Workload API and by the others that attest who calls, by their names.
async fn refusals(world: &World, agent: &Running) -> Vec<(&'static str, Status)> {
    let mut workload = agent.client();
    let jwt = JwtsvidRequest { audience: vec!["a".into()], ..Default::default() };
    let mut refused = vec![
        ("FetchX509SVID", agent.x509_once().await.err()),
        ("FetchX509Bundles", workload.fetch_x509_bundles(secure(X509BundlesRequest {})).await.err()),
        ("FetchJWTSVID", workload.fetch_jwtsvid(secure(jwt)).await.err()),
        ("FetchJWTBundles", workload.fetch_jwt_bundles(secure(JwtBundlesRequest {})).await.err()),
        ("FetchSecrets", within(agent.sds().fetch_secrets(asked(&["spiffe://td/no"]))).await.err()),
    ];
    let one = tokio_stream::once(asked(&["spiffe://td/no"]));
    let streamed = match within(agent.sds().stream_secrets(one)).await {
        Ok(stream) => next(&mut stream.into_inner()).await.err(),
        Err(status) => Some(status),
    };
    refused.push(("StreamSecrets", streamed));
    let svids = delegate(world).subscribe_to_x509svi_ds(delegated::SubscribeToX509sviDsRequest::default()).await;
    refused.push(("SubscribeToX509SVIDs", svids.err()));
    refused.push(("FetchJWTSVIDs", refused_delegate(world).await));
    refused.into_iter().map(|(name, status)| (name, status.unwrap_or_else(|| panic!("{name} answers")))).collect()
}

/// The attestors that are said to have failed, and no more than that.
fn blamed(status: &Status) -> Vec<(String, String)> {
    let shown = String::from_utf8_lossy(status.details()).into_owned();
    assert!(!shown.contains("broken") && !shown.contains("/somebody"), "{shown}");
    let info = error_info(status).unwrap_or_default();
    assert!(info.metadata.is_empty() || info.reason == "WORKLOAD_ATTESTORS_FAILED", "{info:?}");
    info.metadata.into_iter().collect()
}

fn failed(name: &str) -> (String, String) {
    (name.to_owned(), "failed; the agent's log says why".to_owned())
}

#[tokio::test]
async fn failed_attestation_is_not_an_empty_set_of_selectors_and_says_which_attestors_failed() {
    let mut world = World::new().await;
    world.settings.allow_unauthenticated_verifiers = true;
    world.more_attestors.push(Arc::new(Broken));
    let agent = world.started().await;
    *world.attestor.fail.lock().unwrap() = true;
    for (method, status) in refusals(&world, &agent).await {
        let told = (status.code(), status.message());
        assert_eq!(told, (Code::Unavailable, "workload attestation failed"), "{method}");
        assert_eq!(blamed(&status), [failed("second"), failed("test")], "{method}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn who_gets_no_identity_is_told_which_attestors_failed() {
    let mut world = World::new().await;
    world.settings.authorized_delegates = vec![SpiffeId::parse("spiffe://td/delegate").unwrap()];
    world.more_attestors.push(Arc::new(Broken));
    world.entry("e1", "/web", &["test:any", "second:any"]);
    let agent = world.started().await;
    for (method, status) in refusals(&world, &agent).await {
        if !method.ends_with("Secrets") {
            let told = (status.code(), status.message());
            assert_eq!(told, (Code::PermissionDenied, "no identity issued"), "{method}");
        }
        assert_eq!(blamed(&status), [failed("second")], "{method}");
    }
    agent.stop().await;
    // Nobody is blamed where nobody failed.
    world.more_attestors.clear();
    let agent = world.started().await;
    for (method, status) in refusals(&world, &agent).await {
        assert!(status.details().is_empty(), "{method}: {status:?}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_delegate_is_told_which_attestors_failed_for_the_process_that_it_names() {
    let mut world = World::new().await;
    world.settings.authorized_delegates = vec![SpiffeId::parse("spiffe://td/delegate").unwrap()];
    world.more_attestors.push(Arc::new(Broken));
    // Privileged: of all that this process may have, a delegate gets nothing.
    let mut entry = wire_entry("e1", "/delegate", &["test:any"]);
    entry.admin = true;
    world.server.state().entries.insert("e1".into(), entry);
    let agent = world.started().await;
    // What the others found is enough for who needs no more.
    assert_eq!(agent.x509_once().await.unwrap().svids[0].spiffe_id, "spiffe://td/delegate");
    let refused = refused_delegate(&world).await.unwrap();
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, "no identity issued"));
    assert_eq!(blamed(&refused), [failed("second")]);
    agent.stop().await;
}

#[tokio::test]
async fn duplicate_hints_give_the_oldest_entry() {
    let world = World::new().await;
    for (id, created_at) in [("a", 9), ("b", 5)] {
        let mut entry = wire_entry(id, &format!("/{id}"), &["test:any"]);
        entry.hint = "main".into();
        entry.created_at = created_at;
        world.server.state().entries.insert(id.into(), entry);
    }
    let agent = world.started().await;
    let answer = agent.x509_once().await.unwrap();
    assert_eq!(answer.svids.len(), 1);
    assert_eq!((answer.svids[0].spiffe_id.as_str(), answer.svids[0].hint.as_str()), ("spiffe://td/b", "main"));
    agent.stop().await;
}

#[tokio::test]
async fn more_entries_than_a_page_are_synced_and_svids_come_in_batches() {
    let mut world = World::new().await;
    world.settings.x509_svid_cache_max_size = 100;
    {
        let mut state = world.server.state();
        state.page_size = 7;
        state.batch_limit = 40;
        for i in 0..60 {
            let id = format!("e{i:02}");
            state.entries.insert(id.clone(), wire_entry(&id, &format!("/w{i}"), &[&format!("test:n{i}")]));
        }
    }
    world.entry("me", "/me", &["test:any"]);
    let agent = world.start();
    until("batches shrank until the server took them", || world.server.state().batches.contains(&30)).await;
    until("the agent listens", || agent.socket.exists()).await;
    assert_eq!(agent.x509_once().await.unwrap().svids[0].spiffe_id, "spiffe://td/me");
    let batches = world.server.state().batches.clone();
    assert!(batches.iter().all(|n| *n <= 500));
    agent.stop().await;
}

#[tokio::test]
async fn a_lazy_entry_is_fetched_when_its_workload_comes() {
    let mut world = World::new().await;
    let mut entry = wire_entry("e1", "/lazy", &["test:any"]);
    entry.additional_attributes = Some(finial_proto::types::entry::AdditionalAttributes {
        disable_x509_svid_prefetch: true,
        ..Default::default()
    });
    world.server.state().entries.insert("e1".into(), entry);
    let agent = world.started().await;
    until("some syncs have passed", || world.server.calls("SyncAuthorizedEntries") > 3).await;
    assert_eq!(world.server.calls("BatchNewX509SVID"), 0);
    agent.stop().await;
    // And not by the next sync, nor by any other timer.
    world.settings.sync_interval = Duration::from_secs(3600);
    let agent = world.started().await;
    let still = StandsStill::begin();
    assert_eq!(agent.x509_once().await.unwrap().svids[0].spiffe_id, "spiffe://td/lazy");
    drop(still);
    agent.stop().await;
}

#[tokio::test]
async fn keys_are_of_the_configured_type() {
    use finial_config::WorkloadKeyType;
    for (configured, expected) in [(WorkloadKeyType::EcP384, "ec-p384"), (WorkloadKeyType::Rsa2048, "rsa-2048")] {
        let mut world = World::new().await;
        world.settings.workload_key_type = configured;
        world.entry("e1", "/web", &["test:any"]);
        let agent = world.started().await;
        let answer = agent.x509_once().await.unwrap();
        let key = finial_crypto::PrivateKey::from_pkcs8(&answer.svids[0].x509_svid_key).unwrap();
        assert_eq!(key.public_key().key_type().unwrap().as_str(), expected);
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_tainted_authority_renews_its_svids_once() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    let first = next(&mut stream).await.unwrap();
    world.server.state().bundle.x509_authorities[0].tainted = true;
    let second = next(&mut stream).await.unwrap();
    assert_ne!(first.svids[0].x509_svid, second.svids[0].x509_svid);
    until("the agent's own SVID is renewed, too", || world.server.calls("RenewAgent") > 0).await;
    // This server goes on with the tainted authority; that must not make the agent ask without end.
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("some syncs have passed", || world.server.calls("SyncAuthorizedEntries") > syncs + 5).await;
    assert_eq!(world.server.calls("BatchNewX509SVID"), 2);
    assert_eq!(world.server.calls("RenewAgent"), 1);
    // The taint is taken back, and comes again.
    world.server.state().bundle.x509_authorities[0].tainted = false;
    let syncs = world.server.calls("SyncAuthorizedEntries");
    until("the agent knows", || world.server.calls("SyncAuthorizedEntries") > syncs + 1).await;
    world.server.state().bundle.x509_authorities[0].tainted = true;
    while next(&mut stream).await.unwrap().svids[0].x509_svid == second.svids[0].x509_svid {}
    until("the agent's own SVID is renewed again", || world.server.calls("RenewAgent") == 2).await;
    agent.stop().await;
}

#[tokio::test]
async fn what_the_server_refuses_is_not_asked_for_again_with_each_sync_unless_it_changed() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    world.server.state().issue_as = Some("/other".into());
    let agent = world.started().await;
    until("many syncs have passed", || world.server.calls("SyncAuthorizedEntries") > 80).await;
    let (asked, syncs) = (world.server.calls("BatchNewX509SVID"), world.server.calls("SyncAuthorizedEntries"));
    assert!(asked * 5 < syncs, "asked {asked} times in {syncs} syncs");
    // Nobody has to wait for the next time when the entry is another one.
    {
        let mut state = world.server.state();
        state.issue_as = None;
        state.entries.get_mut("e1").unwrap().revision_number = 1;
    }
    until("it is asked for", || world.server.calls("BatchNewX509SVID") > asked).await;
    let syncs = world.server.calls("SyncAuthorizedEntries") - syncs;
    assert!(syncs < 10, "after {syncs} more syncs");
    assert_eq!(agent.x509_once().await.unwrap().svids[0].spiffe_id, "spiffe://td/web");
    agent.stop().await;
}

#[tokio::test]
async fn an_svid_that_ends_before_the_next_look_is_renewed_before_its_end() {
    let mut world = World::new().await;
    world.settings.sync_interval = Duration::from_secs(3600);
    world.server.state().pushes = true;
    world.entry("e1", "/web", &["test:any"]);
    world.server.state().svid_ttl = 4;
    let agent = world.started().await;
    let mut stream = agent.x509().await.unwrap();
    let lives = |answer: &X509svidResponse| {
        let leaf = Certificate::parse_chain(&answer.svids[0].x509_svid).unwrap().remove(0);
        (leaf.not_before(), leaf.not_after())
    };
    let first = lives(&next(&mut stream).await.unwrap());
    let second = lives(&next(&mut stream).await.unwrap());
    // An SVID is good from ten seconds before it is issued.
    assert!(second.0 + 10 <= first.1, "{first:?} {second:?}");
    agent.stop().await;
}
