//! The Broker API: who is let in, whom they may name, and for how long.

use super::delegated::Sleeper;
use super::fake::{wire_bundle, wire_entry};
use super::harness::{StandsStill, World, next, until, within};
use crate::broker::LIFETIME;
use crate::testing::TestCa;
use finial_config::{BrokerReference, BrokerSettings, BrokerUser};
use finial_core::{Clock, KeyType, ManualClock, SpiffeId, SystemClock};
use finial_crypto::tls::{BundleSource, PeerPolicy, ServerAuth, TlsIdentity, client_config};
use finial_crypto::{PrivateKey, TrustRoots};
use finial_net::client::uds_tls_channel;
use finial_proto::broker::api_client::ApiClient;
use finial_proto::broker::*;
use finial_proto::types::Entry;
use prost::Message;
use std::process::Command;
use std::sync::Arc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const PID: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

/// A world whose agent has brokers.
async fn world() -> World {
    let mut world = World::new().await;
    let user = |text: &str, types: &[&str]| BrokerUser {
        id: id(text),
        allowed_reference_types: types
            .iter()
            .map(|t| BrokerReference { type_url: (*t).into(), allow_over_tcp: false })
            .collect(),
    };
    world.settings.broker = Some(BrokerSettings {
        socket_path: Some(world.dir.path().join("broker/api.sock")),
        bind_address: None,
        brokers: vec![
            user("spiffe://td/all", &["*"]),
            user("spiffe://td/pids", &[PID]),
            user("spiffe://other/all", &["*"]),
        ],
    });
    world
}

struct Trust(Arc<TrustRoots>);

impl BundleSource for Trust {
    fn x509_roots(&self, _: &str) -> Option<Arc<TrustRoots>> {
        Some(self.0.clone())
    }
}

/// A client with an SVID that `ca` issued.
fn client(world: &World, ca: &TestCa, as_: &str) -> ApiClient<Channel> {
    client_for(world, ca, as_, 3600)
}

fn client_for(world: &World, ca: &TestCa, as_: &str, ttl: i64) -> ApiClient<Channel> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let leaf = ca.issue(&id(as_), key.public_key(), ttl);
    let identity = Arc::new(TlsIdentity::new(&[leaf], &key).unwrap());
    let roots = Arc::new(Trust(Arc::new(TrustRoots::new([&world.server.ca().root]).unwrap())));
    let agent = world.server.ca().trust_domain.agent_id("join_token/1").unwrap();
    let server = ServerAuth::Spiffe { bundles: roots, policy: PeerPolicy::Exact(agent) };
    let config = client_config(Some(identity), server, Arc::new(SystemClock)).unwrap();
    ApiClient::new(uds_tls_channel(world.dir.path().join("broker/api.sock"), Arc::new(config)))
}

fn with_header<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("broker.spiffe.io", "true".parse().unwrap());
    request
}

fn reference(type_url: &str, value: &[u8]) -> Option<WorkloadReference> {
    let reference = Some(prost_types::Any { type_url: type_url.into(), value: value.to_vec() });
    Some(WorkloadReference { reference })
}

fn by_pid(pid: i32) -> Option<WorkloadReference> {
    reference(PID, &WorkloadPidReference { pid }.encode_to_vec())
}

async fn svids(
    client: &mut ApiClient<Channel>,
    reference: Option<WorkloadReference>,
) -> Result<tonic::Streaming<SubscribeToX509svidResponse>, Status> {
    let request = with_header(SubscribeToX509svidRequest { reference });
    Ok(within(client.subscribe_to_x509svid(request)).await?.into_inner())
}

fn ids(answer: &SubscribeToX509svidResponse) -> Vec<&str> {
    answer.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect()
}

#[tokio::test]
async fn only_brokers_with_known_authorities_are_let_in() {
    let world = world().await;
    let other = TestCa::new("other");
    let agent = world.started().await;
    let named = reference("test/named", b"x");
    let mut all = client(&world, world.server.ca(), "spiffe://td/all");
    assert_eq!(next(&mut svids(&mut all, named.clone()).await.unwrap()).await.unwrap().svids.len(), 0);
    let mut stranger = client(&world, world.server.ca(), "spiffe://td/stranger");
    assert!(svids(&mut stranger, named.clone()).await.is_err(), "no handshake");
    assert!(svids(&mut client(&world, &other, "spiffe://other/all"), named.clone()).await.is_err(), "nobody knows it");
    // An entry that federates makes the bundle known.
    world.server.state().federated.insert("other".into(), wire_bundle("other", &other.root, None));
    let entry = Entry { federates_with: vec!["other".into()], ..wire_entry("e1", "/x", &["test:name:x"]) };
    world.server.state().entries.insert("e1".into(), entry);
    let deadline = tokio::time::Instant::now() + super::harness::DEADLINE;
    while svids(&mut client(&world, &other, "spiffe://other/all"), named.clone()).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "never let in");
    }
    let mut pids = client(&world, world.server.ca(), "spiffe://td/pids");
    let refused = svids(&mut pids, named).await.unwrap_err();
    let text = "broker \"spiffe://td/pids\" is not allowed to use reference type \"test/named\"";
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, text));
    agent.stop().await;
}

#[tokio::test]
async fn references_are_resolved_by_those_who_understand_them() {
    let world = world().await;
    let hinted = |id: &str, path: &str| Entry { hint: "h".into(), ..wire_entry(id, path, &["test:name:shop"]) };
    world.server.state().entries.insert("e1".into(), hinted("e1", "/one"));
    world.server.state().entries.insert("e2".into(), hinted("e2", "/two"));
    let downstream = Entry { downstream: true, ..wire_entry("e3", "/downstream", &["test:name:shop"]) };
    world.server.state().entries.insert("e3".into(), downstream);
    world.entry("e4", "/four", &["test:name:shop"]);
    let agent = world.started().await;
    let mut client = client(&world, world.server.ca(), "spiffe://td/all");
    let shop = reference("test/named", b"shop");
    let answer = next(&mut svids(&mut client, shop.clone()).await.unwrap()).await.unwrap();
    assert_eq!(ids(&answer), ["spiffe://td/one", "spiffe://td/four"], "one for each hint, none of a server's");
    let jwt = |spiffe_id: &str| FetchJwtsvidRequest {
        reference: shop.clone(),
        audience: vec!["a".into()],
        spiffe_id: spiffe_id.into(),
    };
    let tokens = client.fetch_jwtsvid(with_header(jwt(""))).await.unwrap().into_inner().svids;
    assert_eq!(tokens.len(), 2);
    let tokens = client.fetch_jwtsvid(with_header(jwt("spiffe://td/four"))).await.unwrap().into_inner().svids;
    assert_eq!(tokens.iter().map(|t| t.spiffe_id.as_str()).collect::<Vec<_>>(), ["spiffe://td/four"]);
    for (asked, code, text) in [
        (reference("test/named", b"\xff"), Code::InvalidArgument, "workload attestor \"test\" failed: no name"),
        (reference("test/else", b""), Code::Unimplemented, "no workload attestor handled reference"),
        (None, Code::InvalidArgument, "workload reference must be provided"),
    ] {
        let error = svids(&mut client, asked).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (code, text));
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_process_is_served_until_it_ends() {
    let world = world().await;
    world.entry("sleep", "/sleep", &["test:exe:sleep"]);
    let agent = world.started().await;
    let mut client = client(&world, world.server.ca(), "spiffe://td/pids");
    let mut process = Sleeper(Command::new("sleep").arg("1000").spawn().unwrap());
    let pid = i32::try_from(process.0.id()).unwrap();
    let exe = || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sleep"));
    until("the process is another program", exe).await;
    let mut stream = svids(&mut client, by_pid(pid)).await.unwrap();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["spiffe://td/sleep"]);
    process.0.kill().unwrap();
    process.0.wait().unwrap();
    // What changes for it now is not said any more.
    world.entry("sleep-2", "/sleep-2", &["test:exe:sleep"]);
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::NotFound);
    for (pid, code) in [(pid, Code::NotFound), (0, Code::InvalidArgument), (-1, Code::InvalidArgument)] {
        assert_eq!(svids(&mut client, by_pid(pid)).await.unwrap_err().code(), code, "{pid}");
    }
    let garbage = svids(&mut client, reference(PID, b"\xff\xff")).await.unwrap_err();
    assert_eq!(garbage.code(), Code::InvalidArgument);
    agent.stop().await;
}

#[tokio::test]
async fn a_process_that_changes_while_it_is_attested_is_attested_again() {
    let world = world().await;
    for (id, shell) in [("e1", "dash"), ("e2", "bash"), ("e3", "busybox")] {
        world.entry(id, "/shell", &[&format!("test:exe:{shell}")]);
    }
    world.entry("e4", "/sleep", &["test:exe:sleep"]);
    let agent = world.started().await;
    let mut client = client(&world, world.server.ca(), "spiffe://td/pids");
    let signal = world.dir.path().join("signal");
    let mut shell = Command::new("sh");
    shell.args(["-c", "while [ ! -e \"$0\" ]; do :; done; exec sleep 1000"]).arg(&signal);
    let process = Sleeper(shell.spawn().unwrap());
    let pid = i32::try_from(process.0.id()).unwrap();
    let sh = std::fs::canonicalize("/bin/sh").unwrap();
    until("the shell runs", || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == sh)).await;
    *world.attestor.meanwhile.lock().unwrap() = Some(signal);
    let mut stream = svids(&mut client, by_pid(pid)).await.unwrap();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["spiffe://td/sleep"]);
    drop(process);
    agent.stop().await;
}

#[tokio::test]
async fn a_connection_proves_nothing_for_ever() {
    let world = world().await;
    world.entry("e1", "/one", &["test:name:shop"]);
    let agent = world.started().await;
    let mut client = client(&world, world.server.ca(), "spiffe://td/all");
    let mut stream = svids(&mut client, reference("test/named", b"shop")).await.unwrap();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["spiffe://td/one"]);
    let still = StandsStill::begin();
    tokio::time::advance(LIFETIME).await;
    assert!(within(stream.message()).await.is_err(), "it was not cut off");
    drop(still);
    // With the next connection it says again who it is.
    let mut stream = svids(&mut client, reference("test/named", b"shop")).await.unwrap();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["spiffe://td/one"]);
    agent.stop().await;
}

#[tokio::test]
async fn nothing_is_said_to_a_broker_whose_svid_has_expired() {
    let mut world = world().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    world.entry("e1", "/one", &["test:name:shop"]);
    let agent = world.started().await;
    let mut client = client_for(&world, world.server.ca(), "spiffe://td/all", 100);
    let mut stream = svids(&mut client, reference("test/named", b"shop")).await.unwrap();
    assert_eq!(ids(&next(&mut stream).await.unwrap()), ["spiffe://td/one"]);
    clock.advance(200);
    let refused = svids(&mut client, reference("test/named", b"shop")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    world.entry("e2", "/two", &["test:name:shop"]);
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::Unauthenticated);
    agent.stop().await;
}

#[tokio::test]
async fn a_broker_endpoint_for_nobody_is_a_mistake() {
    let mut world = world().await;
    world.settings.broker.as_mut().unwrap().brokers.clear();
    assert_eq!(world.start().failure().await.to_string(), "at least one broker is required");
}
