//! The Delegated Identity API: who may use it, and what a delegate gets.

use super::fake::wire_bundle;
use super::harness::{Running, World, next, until, within};
use crate::tests::fake::wire_entry;
use finial_core::SpiffeId;
use finial_net::client::uds_channel;
use finial_proto::agent::delegatedidentity::delegated_identity_client::DelegatedIdentityClient;
use finial_proto::agent::delegatedidentity::*;
use finial_proto::types::{Entry, Selector};
use std::process::{Child, Command};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A world in which this process may become a delegate.
async fn world() -> World {
    let mut world = World::new().await;
    world.settings.authorized_delegates = vec![SpiffeId::parse("spiffe://td/delegate").unwrap()];
    world
}

async fn with_delegate() -> World {
    let world = world().await;
    world.entry("delegate", "/delegate", &["test:exe:finial_agent"]);
    world
}

fn client(world: &World) -> DelegatedIdentityClient<Channel> {
    DelegatedIdentityClient::new(uds_channel(world.settings.admin_socket_path.as_deref().unwrap()))
}

fn by_selectors(selectors: &[&str]) -> SubscribeToX509sviDsRequest {
    let selector = |text: &&str| {
        let (kind, value) = text.split_once(':').unwrap();
        Selector { r#type: kind.into(), value: value.into() }
    };
    SubscribeToX509sviDsRequest { selectors: selectors.iter().map(selector).collect(), pid: 0 }
}

fn ids(answer: &SubscribeToX509sviDsResponse) -> Vec<String> {
    answer.x509_svids.iter().map(|s| s.x509_svid.as_ref().unwrap().id.as_ref().unwrap().path.clone()).collect()
}

async fn until_known(world: &World, running: &Running, path: &str) {
    until("the agent knows the entry", || world.server.calls("BatchNewX509SVID") > 0).await;
    let mut stream = running.x509().await.unwrap();
    while !next(&mut stream).await.unwrap().svids.iter().any(|svid| svid.spiffe_id.ends_with(path)) {}
}

#[tokio::test]
async fn only_a_delegate_is_answered_and_only_while_it_is_one() {
    let world = world().await;
    let agent = world.started().await;
    let mut client = client(&world);
    let refused = |status: Status| (status.code(), status.message().to_owned());
    let none = client.subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await.unwrap_err();
    assert_eq!(refused(none), (Code::PermissionDenied, "no identity issued".to_owned()));
    world.entry("other", "/other", &["test:any"]);
    until_known(&world, &agent, "/other").await;
    let other = client.subscribe_to_x509svi_ds(by_selectors(&["a:b"])).await.unwrap_err();
    let not_one = (Code::PermissionDenied, "caller not configured as an authorized delegate".to_owned());
    assert_eq!(refused(other), not_one);
    world.entry("delegate", "/delegate", &["test:any"]);
    until_known(&world, &agent, "/delegate").await;
    let mut svids = client.subscribe_to_x509svi_ds(by_selectors(&["a:b"])).await.unwrap().into_inner();
    let mut bundles = client.subscribe_to_jwt_bundles(SubscribeToJwtBundlesRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut svids).await.unwrap(), SubscribeToX509sviDsResponse::default());
    assert!(next(&mut bundles).await.unwrap().bundles.contains_key("spiffe://td"));
    // Told at once, though nothing of what it asked for changes.
    world.server.state().entries.remove("delegate");
    assert_eq!(refused(next(&mut svids).await.unwrap_err()), not_one);
    assert_eq!(refused(next(&mut bundles).await.unwrap_err()), not_one);
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_ends_ends_the_streams() {
    let world = with_delegate().await;
    let agent = world.started().await;
    until_known(&world, &agent, "/delegate").await;
    let mut client = client(&world);
    let mut svids = client.subscribe_to_x509svi_ds(by_selectors(&["a:b"])).await.unwrap().into_inner();
    next(&mut svids).await.unwrap();
    agent.stop().await;
    assert_eq!(next(&mut svids).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn svids_of_others_come_and_change_but_never_those_of_the_powerful() {
    let world = with_delegate().await;
    let other = wire_bundle("other", &world.server.ca().root, None);
    world.server.state().federated.insert("other".into(), other);
    let federated = |id: &str, path: &str| Entry {
        federates_with: vec!["other".into()],
        hint: "same".into(),
        ..wire_entry(id, path, &["a:b"])
    };
    let agent = world.started().await;
    until_known(&world, &agent, "/delegate").await;
    let mut client = client(&world);
    let mut stream = client.subscribe_to_x509svi_ds(by_selectors(&["a:b", "c:d"])).await.unwrap().into_inner();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), [""; 0]);
    {
        let entries = &mut world.server.state().entries;
        for (id, path) in [("e1", "/one"), ("e2", "/two")] {
            entries.insert(id.into(), federated(id, path));
        }
        let admin = Entry { admin: true, ..wire_entry("e3", "/admin", &["a:b"]) };
        let downstream = Entry { downstream: true, ..wire_entry("e4", "/downstream", &["a:b"]) };
        entries.insert("e3".into(), admin);
        entries.insert("e4".into(), downstream);
    }
    let answer = loop {
        let answer = next(&mut stream).await.unwrap();
        if answer.x509_svids.len() >= 2 && answer.federates_with == ["spiffe://other"] {
            break answer;
        }
    };
    assert_eq!(ids(&answer), ["/one", "/two"], "both, though they have one hint");
    for svid in &answer.x509_svids {
        let x509 = svid.x509_svid.as_ref().unwrap();
        assert_eq!(x509.hint, "same");
        let leaf = finial_crypto::Certificate::parse(x509.cert_chain[0].as_ref()).unwrap();
        let key = finial_crypto::PrivateKey::from_pkcs8(&svid.x509_svid_key).unwrap();
        assert_eq!(leaf.spki_der(), finial_crypto::Signer::public_key(&key).spki_der().as_ref());
        assert_eq!(x509.expires_at, leaf.not_after());
    }
    world.server.state().entries.remove("e1");
    while ids(&next(&mut stream).await.unwrap()) != ["/two"] {}
    let request = |selectors| FetchJwtsviDsRequest { audience: vec!["a".into()], selectors, pid: 0 };
    let tokens = client.fetch_jwtsvi_ds(request(by_selectors(&["a:b"]).selectors)).await.unwrap().into_inner().svids;
    assert_eq!(tokens.len(), 1);
    assert_eq!((tokens[0].hint.as_str(), tokens[0].expires_at - tokens[0].issued_at), ("same", 300));
    let none = client.fetch_jwtsvi_ds(request(by_selectors(&["a:c"]).selectors)).await.unwrap_err();
    assert_eq!((none.code(), none.message()), (Code::PermissionDenied, "no identity issued"));
    let mut bundles = client.subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await.unwrap().into_inner();
    let first = next(&mut bundles).await.unwrap().ca_certificates;
    assert_eq!(first.keys().collect::<Vec<_>>(), ["spiffe://other", "spiffe://td"]);
    world.server.state().entries.remove("e2");
    assert_eq!(next(&mut bundles).await.unwrap().ca_certificates.len(), 1, "gone with the last who needs it");
    agent.stop().await;
}

/// A process of another program, ended with the value.
pub(super) struct Sleeper(pub(super) Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_process_is_attested_by_its_number() {
    let world = with_delegate().await;
    world.entry("sleep", "/sleep", &["test:exe:sleep"]);
    let agent = world.started().await;
    until_known(&world, &agent, "/delegate").await;
    let mut client = client(&world);
    let mut process = Sleeper(Command::new("sleep").arg("1000").spawn().unwrap());
    let pid = i32::try_from(process.0.id()).unwrap();
    let exe = || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sleep"));
    until("the process is another program", exe).await;
    let ask = |pid| SubscribeToX509sviDsRequest { selectors: Vec::new(), pid };
    let mut stream = client.subscribe_to_x509svi_ds(ask(pid)).await.unwrap().into_inner();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["/sleep"]);
    let jwt = FetchJwtsviDsRequest { audience: vec!["a".into()], selectors: Vec::new(), pid };
    assert_eq!(client.fetch_jwtsvi_ds(jwt).await.unwrap().into_inner().svids.len(), 1);
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    for pid in [pid, -1, i32::MIN, i32::MAX] {
        let error = client.subscribe_to_x509svi_ds(ask(pid)).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::Unavailable, "workload attestation failed"), "{pid}");
    }
    agent.stop().await;
}

#[tokio::test]
async fn what_is_asked_is_checked() {
    let world = with_delegate().await;
    let agent = world.started().await;
    until_known(&world, &agent, "/delegate").await;
    let mut client = client(&world);
    let both = SubscribeToX509sviDsRequest { pid: 1, ..by_selectors(&["a:b"]) };
    let negative = SubscribeToX509sviDsRequest { pid: -1, ..by_selectors(&["a:b"]) };
    let one = "must provide either selectors or non-zero PID, but not both";
    let parse = "could not parse provided selectors";
    let too_many: Vec<String> = (0..1001).map(|n| format!("a:{n}")).collect();
    let too_many: Vec<&str> = too_many.iter().map(String::as_str).collect();
    for (request, text) in [
        (both, one),
        (negative, one),
        (by_selectors(&[]), one),
        (by_selectors(&[":b"]), parse),
        (by_selectors(&["a:"]), parse),
        (by_selectors(&too_many), parse),
    ] {
        let error = within(client.subscribe_to_x509svi_ds(request)).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, text));
    }
    agent.stop().await;
}
