//! An agent whose server is away, or is someone else.

use super::fake::FakeServer;
use super::harness::{World, next, secure, until};
use crate::testing::TestCa;
use finial_core::{Clock, ManualClock, SystemClock};
use finial_net::tls::bind;
use finial_proto::workload::JwtsvidRequest;
use finial_runtime::Spawner;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn workloads_are_served_from_the_cache() {
    let mut world = World::new().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    world.entry("e1", "/web", &["test:any"]);
    world.server.state().jwt_ttl = 300;
    let agent = world.started().await;
    let ask = || secure(JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() });
    let mut client = agent.client();
    let token = client.fetch_jwtsvid(ask()).await.unwrap().into_inner();
    let mut held = agent.x509().await.unwrap();
    next(&mut held).await.unwrap();
    world.server.state().away = true;
    clock.advance(200); // past the token's half-life, before its end
    let calls = world.server.calls("NewJWTSVID");
    assert_eq!(client.fetch_jwtsvid(ask()).await.unwrap().into_inner(), token, "the old token still serves");
    assert!(world.server.calls("NewJWTSVID") > calls, "a renewal was tried");
    assert_eq!(agent.x509_once().await.unwrap().svids.len(), 1);
    assert!(!agent.has_ended());
    clock.advance(200);
    let error = client.fetch_jwtsvid(ask()).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "an expired token is not served");

    world.server.state().away = false;
    world.entry("e2", "/more", &["test:any"]);
    assert_eq!(next(&mut held).await.unwrap().svids.len(), 2, "it comes back by itself");
    agent.stop().await;
}

#[tokio::test]
async fn a_server_of_an_unknown_authority_ends_the_agent() {
    let world = World::new().await;
    let agent = world.started().await;
    let address = world.server.address();
    world.stop_server.trigger();
    // The old connection stays open below; close it by making the agent's calls fail until it reconnects.
    world.server.state().away = true;
    let mut listener = None;
    until("the address is free", || {
        listener = bind(address).ok();
        listener.is_some()
    })
    .await;
    let impostor = FakeServer::start_with(
        TestCa::new("td"),
        listener.unwrap(),
        &world.supervisor.spawner(),
        world.supervisor.shutdown().child(),
    );
    let error = agent.failure().await.to_string();
    assert!(error.starts_with("failed to sync with SPIRE Server: "), "{error}");
    assert!(error.contains("unknown authority"), "{error}");
    assert_eq!(impostor.calls("SyncAuthorizedEntries"), 0);
    // The agent's SVID is not lost by that.
    assert!(std::fs::read_to_string(world.dir.path().join("data/agent-data.json")).unwrap().contains("\"svid\":[\""));
}

#[tokio::test]
async fn an_agent_that_may_bootstrap_again_waits_and_then_drops_its_bundle() {
    let mut world = World::new().await;
    world.settings.rebootstrap_mode = finial_config::RebootstrapMode::Auto;
    world.settings.rebootstrap_delay = std::time::Duration::from_secs(600);
    super::outage::keep_sealed(&mut world);
    world.puzzle = true;
    world.server.state().reattestable = true;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    let agent = world.started().await;
    let sealed = super::outage::file(&world);
    until("there is something to keep", || sealed.exists()).await;
    let address = world.server.address();
    world.stop_server.trigger();
    world.server.state().away = true;
    let mut listener = None;
    until("the address is free", || {
        listener = bind(address).ok();
        listener.is_some()
    })
    .await;
    let (spawner, stop) = (world.supervisor.spawner(), world.supervisor.shutdown().child());
    let impostor = FakeServer::start_with(TestCa::new("td"), listener.unwrap(), &spawner, stop);
    // The delay counts from the first sync that met the impostor, so time may only pass after it. The first handshakes may be
    // for the stream, which counts for nothing, but waits ever longer.
    until("the agent has met the impostor", || impostor.handshakes() > 6).await;
    assert!(!agent.has_ended(), "it waits");
    clock.advance(601);
    assert_eq!(agent.failure().await.to_string(), "shutting down for rebootstrapping");
    let kept = std::fs::read_to_string(world.dir.path().join("data/agent-data.json")).unwrap();
    assert!(kept.contains("\"svid\":null,\"bundle\":null"), "{kept}");
    assert!(!sealed.exists(), "nor is anything else kept of the trust domain that it left");
}

#[tokio::test]
async fn an_agent_that_cannot_attest_again_does_not_bootstrap_again() {
    let mut world = World::new().await;
    world.settings.rebootstrap_mode = finial_config::RebootstrapMode::Always;
    let error = world.start().failure().await.to_string();
    assert!(error.starts_with("you have requested rebootstrap support but the NodeAttestor plugin"), "{error}");
    world.settings.rebootstrap_mode = finial_config::RebootstrapMode::Auto;
    world.settings.data_dir = world.dir.path().join("other");
    world.settings.socket_path = Some(world.dir.path().join("other.sock"));
    world.started().await.stop().await;
}

#[tokio::test]
async fn entries_that_came_without_a_usable_bundle_reach_workloads_with_the_next_one() {
    let world = World::new().await;
    let agent = world.started().await;
    let wire = world.server.state().bundle.clone();
    world.server.state().bundle.trust_domain = "other".into();
    world.entry("e1", "/one", &["test:any"]);
    let calls = world.server.calls("GetBundle");
    until("a sync failed", || world.server.calls("GetBundle") > calls + 1).await;
    world.server.state().bundle = wire;
    let mut answer = agent.x509_once().await;
    let deadline = tokio::time::Instant::now() + super::harness::DEADLINE;
    while answer.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the entry never came");
        tokio::task::yield_now().await;
        answer = agent.x509_once().await;
    }
    assert_eq!(answer.unwrap().svids[0].spiffe_id, "spiffe://td/one");
    agent.stop().await;
}

/// Passes connections on to `server`; as often as `cut` says, the next data of an agent ends its connection instead.
pub(super) async fn relay(spawner: Spawner, server: SocketAddr, cut: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawner.clone().spawn("relay", async move {
        while let Ok((agent, _)) = listener.accept().await {
            let server = TcpStream::connect(server).await.unwrap();
            spawner.spawn("relayed", pass(agent, server, cut.clone()));
        }
    });
    address
}

async fn pass(mut agent: TcpStream, mut server: TcpStream, cut: Arc<AtomicUsize>) {
    let (mut from_agent, mut from_server) = ([0; 4096], [0; 4096]);
    loop {
        let passed = tokio::select! {
            read = agent.read(&mut from_agent) => match read {
                Ok(1..) if cut.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() => return,
                Ok(count @ 1..) => server.write_all(&from_agent[..count]).await,
                _ => return,
            },
            read = server.read(&mut from_server) => match read {
                Ok(count @ 1..) => agent.write_all(&from_server[..count]).await,
                _ => return,
            },
        };
        if passed.is_err() {
            return;
        }
    }
}

/// A server of several ended, and a workload asks for a token before the agent, or the balancer, knows.
#[tokio::test]
async fn a_token_is_asked_for_again_when_the_connection_ends() {
    let mut world = World::new().await;
    let cut = Arc::new(AtomicUsize::new(0));
    world.settings.server_port = relay(world.supervisor.spawner(), world.server.address(), cut.clone()).await.port();
    world.settings.sync_interval = std::time::Duration::from_secs(3600);
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    for (audience, times) in [("a", 1), ("b", 2), ("c", 3)] {
        cut.store(times, Ordering::SeqCst);
        let ask = JwtsvidRequest { audience: vec![audience.into()], spiffe_id: String::new() };
        agent.client().fetch_jwtsvid(secure(ask)).await.unwrap();
        assert_eq!(cut.load(Ordering::SeqCst), 0, "connections ended");
    }
    agent.stop().await;
}
