//! An agent that is restarted while its server is away.

use super::fake::wire_entry;
use super::harness::{Running, World, next, secure, until};
use finial_config::OfflineCache;
use finial_core::{Clock, ManualClock, SystemClock};
use finial_proto::convert::permission_denied;
use finial_proto::sync::WatchResponse;
use finial_proto::types::X509Certificate;
use finial_proto::types::permission_denied_details::Reason;
use finial_proto::workload::{JwtsvidRequest, X509svidResponse};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::{Code, Request};

fn ask() -> Request<JwtsvidRequest> {
    secure(JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() })
}

fn write_key(world: &World, byte: u8) {
    let path = world.dir.path().join("host.key");
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, [byte; 4096]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
}

pub(super) fn keep_sealed(world: &mut World) {
    write_key(world, 1);
    world.settings.offline_cache = OfflineCache::HostKey;
    world.settings.offline_cache_host_key_path = world.dir.path().join("host.key");
}

/// A world whose agent can keep its cache, with an entry.
async fn world() -> World {
    let mut world = World::new().await;
    keep_sealed(&mut world);
    world.entry("e1", "/web", &["test:any"]);
    world
}

pub(super) fn file(world: &World) -> PathBuf {
    world.settings.data_dir.join("agent-cache.sealed")
}

/// Lets an agent serve and stops it; what it served.
async fn served_before(world: &World) -> X509svidResponse {
    let agent = world.started().await;
    let svid = agent.x509_once().await.unwrap();
    agent.stop().await;
    svid
}

async fn token(agent: &Running) -> Result<String, Code> {
    let answer = agent.client().fetch_jwtsvid(ask()).await;
    answer.map(|a| a.into_inner().svids[0].svid.clone()).map_err(|status| status.code())
}

#[tokio::test]
async fn a_restart_without_a_server_serves_what_was_served_and_heals() {
    let world = world().await;
    let agent = world.started().await;
    let before = agent.x509_once().await.unwrap();
    let token_before = token(&agent).await.unwrap();
    agent.stop().await;

    world.server.state().away = true;
    let attested = world.server.calls("AttestAgent");
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    assert_eq!(next(&mut held).await.unwrap(), before, "the same SVID, with its key and bundle");
    assert_eq!(token(&agent).await.unwrap(), token_before);

    world.entry("e2", "/more", &["test:any"]);
    world.server.state().away = false;
    let healed = next(&mut held).await.unwrap();
    assert_eq!(healed.svids.len(), 2);
    assert_eq!(healed.svids[0], before.svids[0], "what is good is not fetched again");
    assert_eq!(world.server.calls("AttestAgent"), attested);
    until("it tells its version", || world.server.calls("PostStatus") > 1).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_server_that_hangs_is_not_waited_for() {
    let world = world().await;
    let before = served_before(&world).await;
    world.server.state().hangs = true;
    let agent = world.started().await;
    assert_eq!(agent.x509_once().await.unwrap(), before);
    agent.stop().await;
}

#[tokio::test]
async fn what_was_deleted_meanwhile_goes_as_soon_as_the_server_says_so() {
    let world = world().await;
    served_before(&world).await;
    // A server that answers at once is heard before anybody is served.
    world.server.state().entries.clear();
    let agent = world.started().await;
    assert_eq!(agent.x509_once().await.unwrap_err().code(), Code::PermissionDenied);
    agent.stop().await;

    world.entry("e1", "/web", &["test:any"]);
    served_before(&world).await;
    world.server.state().away = true;
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    next(&mut held).await.unwrap();
    world.server.state().entries.clear();
    world.server.state().away = false;
    assert_eq!(next(&mut held).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(token(&agent).await, Err(Code::PermissionDenied));
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_was_banned_meanwhile_serves_nobody_and_keeps_nothing() {
    for reason in [Reason::AgentBanned, Reason::AgentNotAttested] {
        let world = world().await;
        served_before(&world).await;
        assert!(file(&world).exists());
        world.server.state().refuse = Some(reason);
        let agent = world.start();
        let socket = agent.socket.clone();
        agent.failure().await;
        assert!(!socket.exists() && !file(&world).exists(), "{reason:?}");
    }
    // The same when it is told later.
    let world = world().await;
    served_before(&world).await;
    world.server.state().away = true;
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    world.server.state().refuse = Some(Reason::AgentBanned);
    world.server.state().away = false;
    agent.failure().await;
    assert!(!file(&world).exists());
}

#[tokio::test]
async fn a_cache_of_another_key_or_none_is_waited_out() {
    let mut world = world().await;
    served_before(&world).await;
    write_key(&world, 2);
    world.server.state().away = true;
    let agent = world.start();
    let syncs = world.server.calls("SyncAuthorizedEntries") + world.server.calls("GetBundle");
    until("the agent asked", || world.server.calls("SyncAuthorizedEntries") + world.server.calls("GetBundle") > syncs)
        .await;
    assert!(!agent.socket.exists(), "there is nothing to serve");
    agent.stop().await;
    world.server.state().away = false;
    let before = served_before(&world).await;
    world.server.state().away = true;
    let agent = world.started().await;
    assert_eq!(agent.x509_once().await.unwrap(), before, "written anew");
    agent.stop().await;
    world.settings.offline_cache = OfflineCache::Off;
    let agent = world.start();
    until("the agent asked", || world.server.calls("SyncAuthorizedEntries") > 2).await;
    assert!(!agent.socket.exists(), "by choice");
    agent.stop().await;
}

#[tokio::test]
async fn what_ended_meanwhile_is_not_served() {
    let mut world = world().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    world.server.state().svid_ttl = 600;
    world.server.state().jwt_ttl = 300;
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    token(&agent).await.unwrap();
    agent.stop().await;
    world.server.state().away = true;
    clock.advance(601);
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    assert_eq!(token(&agent).await, Err(Code::Unavailable));
    world.server.state().svid_ttl = 3600;
    world.server.state().away = false;
    assert_eq!(next(&mut held).await.unwrap().svids.len(), 1, "it waited for a new one");
    agent.stop().await;
}

#[tokio::test]
async fn tokens_in_use_are_renewed_ahead_so_that_an_outage_is_not_seen() {
    let mut world = world().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    world.server.state().jwt_ttl = 300;
    let agent = world.started().await;
    let first = token(&agent).await.unwrap();
    let calls = world.server.calls("NewJWTSVID");
    clock.advance(170); // past the half-life
    until("it is renewed though nobody asks", || world.server.calls("NewJWTSVID") > calls).await;
    let mut second = token(&agent).await.unwrap();
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    while second == first {
        assert!(tokio::time::Instant::now() < end, "never renewed");
        tokio::task::yield_now().await;
        second = token(&agent).await.unwrap();
    }
    // From now on the server hangs: workloads do not wait for it while they have a token that serves.
    world.server.state().away = true;
    clock.advance(100);
    assert_eq!(token(&agent).await.unwrap(), second);
    agent.stop().await;
}

#[tokio::test]
async fn health_says_that_the_agent_serves_without_its_server() {
    let mut world = world().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    served_before(&world).await;
    world.settings.health.listener_enabled = true;
    (world.settings.health.bind_address, world.settings.health.bind_port) = ("127.0.0.1".into(), port);
    world.server.state().away = true;
    let agent = world.started().await;
    let ready = || async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut http = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        http.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.ok()?;
        let mut text = String::new();
        http.read_to_string(&mut text).await.ok()?;
        Some(text)
    };
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    let text = loop {
        match ready().await {
            Some(text) if text.contains("degraded") => break text,
            last => assert!(tokio::time::Instant::now() < end, "{last:?}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert!(text.starts_with("HTTP/1.1 200"), "served is served: {text}");
    assert!(text.contains("last_sync_success"), "{text}");
    agent.stop().await;
}

/// An agent that was away while an authority was tainted, and until it was revoked, never heard of a taint.
#[tokio::test]
async fn tokens_of_an_authority_that_was_revoked_meanwhile_are_asked_for_again() {
    let world = world().await;
    let agent = world.started().await;
    token(&agent).await.unwrap();
    agent.stop().await;
    let calls = world.server.calls("NewJWTSVID");
    let kept = std::mem::take(&mut world.server.state().bundle.jwt_authorities);
    let agent = world.started().await;
    token(&agent).await.unwrap();
    assert_eq!(world.server.calls("NewJWTSVID"), calls + 1, "nobody trusts the one that was kept");
    // The same while it runs.
    let mut bundles = agent.client().fetch_jwt_bundles(secure(Default::default())).await.unwrap().into_inner();
    next(&mut bundles).await.unwrap();
    world.server.state().bundle.jwt_authorities = kept;
    next(&mut bundles).await.unwrap();
    token(&agent).await.unwrap();
    assert_eq!(world.server.calls("NewJWTSVID"), calls + 1);
    world.server.state().bundle.jwt_authorities.clear();
    next(&mut bundles).await.unwrap();
    token(&agent).await.unwrap();
    assert_eq!(world.server.calls("NewJWTSVID"), calls + 2);
    agent.stop().await;
}

/// What a node's agent has when its own SVID ends first, by half an hour.
async fn short_lived() -> (World, Arc<ManualClock>) {
    let mut world = world().await;
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    world.clock = clock.clone();
    world.puzzle = true;
    world.server.state().reattestable = true;
    world.server.state().agent_ttl = 1800;
    (world, clock)
}

/// What the agent says of its server.
async fn server_error(world: &World) -> String {
    let admin = finial_net::client::uds_channel(world.settings.admin_socket_path.clone().unwrap());
    let mut explain = finial_proto::agent::explain::explain_client::ExplainClient::new(admin);
    let pid = i32::try_from(std::process::id()).unwrap();
    let asked = explain.explain_process(finial_proto::agent::explain::ExplainProcessRequest { pid }).await;
    asked.unwrap().into_inner().server_error
}

async fn says(world: &World, text: &str) {
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    loop {
        let said = server_error(world).await;
        if said.contains(text) {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "it says {said:?}, not {text:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_agent_whose_own_svid_ends_in_an_outage_serves_on_and_attests_anew() {
    let (world, clock) = short_lived().await;
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    let before = next(&mut held).await.unwrap();
    world.server.state().away = true;
    clock.advance(1900);
    says(&world, "own SVID expired at ").await;
    assert_eq!(agent.x509_once().await.unwrap(), before, "also who comes now");
    assert!(!agent.has_ended());

    // Its own SVID first: then it hears of what is new.
    let (syncs, attested) = (world.server.calls("SyncAuthorizedEntries"), world.server.calls("AttestAgent"));
    world.server.state().agent_ttl = 7200;
    world.entry("e2", "/more", &["test:any"]);
    world.server.state().away = false;
    until("it attests", || world.server.calls("AttestAgent") > attested).await;
    while next(&mut held).await.unwrap().svids.len() < 2 {}
    assert!(world.server.calls("SyncAuthorizedEntries") > syncs);
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    while !server_error(&world).await.is_empty() {
        assert!(tokio::time::Instant::now() < end, "all is well again");
    }
    agent.stop().await;
}

/// A join token serves once: nothing comes of waiting.
#[tokio::test]
async fn a_token_does_not_wait_for_an_agent_that_an_operator_must_help() {
    let (mut world, clock) = short_lived().await;
    world.puzzle = false;
    world.server.state().reattestable = false;
    served_before(&world).await;
    clock.advance(1900);
    world.server.state().refuse = Some(Reason::AgentExpired);
    world.settings.join_token = Some(finial_core::Secret::new("used".to_owned()));
    let agent = world.started().await;
    says(&world, "an operator must act").await;
    let calls = world.server.calls("NewJWTSVID");
    let still = super::harness::StandsStill::begin();
    token(&agent).await.unwrap_err();
    drop(still);
    assert_eq!(world.server.calls("NewJWTSVID"), calls + 1);
    agent.stop().await;
}

/// The server is back, and a workload wants a token before the agent has attested anew.
#[tokio::test]
async fn a_token_waits_for_the_agent_to_attest_anew() {
    let (mut world, clock) = short_lived().await;
    let cut = Arc::new(AtomicUsize::new(0));
    let road = super::server_away::relay(world.supervisor.spawner(), world.server.address(), cut.clone()).await;
    world.settings.server_port = road.port();
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    cut.store(usize::MAX, Ordering::SeqCst);
    clock.advance(1900);
    says(&world, "own SVID expired at ").await;
    // It waits ever longer before it tries again.
    let tried = usize::MAX - cut.load(Ordering::SeqCst);
    until("it tries", || usize::MAX - cut.load(Ordering::SeqCst) > tried + 3).await;
    {
        let mut state = world.server.state();
        state.expired = state.serials.clone();
        state.agent_ttl = 7200;
    }
    cut.store(0, Ordering::SeqCst);
    let attested = world.server.calls("AttestAgent");
    token(&agent).await.unwrap();
    assert_eq!(world.server.calls("AttestAgent"), attested + 1);
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_restarted_after_its_own_svid_ended_serves_what_has_not() {
    let (world, clock) = short_lived().await;
    let before = served_before(&world).await;
    world.server.state().away = true;
    clock.advance(1900);
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    assert_eq!(next(&mut held).await.unwrap(), before);
    says(&world, "own SVID expired at ").await;
    world.server.state().agent_ttl = 7200;
    world.server.state().entries.clear();
    world.server.state().away = false;
    let gone = loop {
        if let Err(status) = next(&mut held).await {
            break status;
        }
    };
    assert_eq!(gone.code(), Code::PermissionDenied, "it attested and heard what was deleted");
    agent.stop().await;
}

#[tokio::test]
async fn nothing_is_left_to_serve_when_all_has_ended() {
    let (world, clock) = short_lived().await;
    world.server.state().svid_ttl = 1700;
    let agent = world.started().await;
    agent.x509_once().await.unwrap();
    world.server.state().away = true;
    clock.advance(1900);
    let error = agent.failure().await.to_string();
    assert!(error.starts_with("current SVID has already expired and reattest agent failed: "), "{error}");
    // Nor does a restart serve: it attests first, as ever.
    let attested = world.server.calls("AttestAgent");
    let agent = world.start();
    until("it attests", || world.server.calls("AttestAgent") > attested).await;
    assert!(!agent.socket.exists());
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_was_banned_serves_no_more_once_it_attests_anew() {
    for reattestable in [true, false] {
        let (world, clock) = short_lived().await;
        world.server.state().reattestable = reattestable;
        let agent = world.started().await;
        agent.x509_once().await.unwrap();
        until("it is kept", || file(&world).exists()).await;
        world.server.state().away = true;
        clock.advance(1900);
        says(&world, "own SVID expired at ").await;
        world.server.state().refuse = Some(Reason::AgentBanned);
        world.server.state().away = false;
        assert_eq!(agent.failure().await.kind(), finial_core::ErrorKind::Denied);
        assert!(!file(&world).exists());
    }
}

#[tokio::test]
async fn a_join_token_that_was_used_is_for_an_operator_to_replace_and_workloads_are_served_meanwhile() {
    let (mut world, clock) = short_lived().await;
    world.puzzle = false;
    world.server.state().reattestable = false;
    let before = served_before(&world).await;
    clock.advance(1900);
    world.server.state().refuse = Some(Reason::AgentExpired);
    world.settings.join_token = Some(finial_core::Secret::new("used".to_owned()));
    let agent = world.started().await;
    says(&world, "an operator must act").await;
    assert_eq!(agent.x509_once().await.unwrap(), before);
    agent.stop().await;
    // As it does with another token.
    world.settings.join_token = Some(finial_core::Secret::new(super::fake::TOKEN.to_owned()));
    world.server.state().refuse = None;
    world.server.state().agent_ttl = 7200;
    world.server.state().renewed_ttl = 7200;
    let agent = world.started().await;
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    while !server_error(&world).await.is_empty() {
        assert!(tokio::time::Instant::now() < end, "all is well again");
    }
    agent.stop().await;
}

/// As at a start before the time is known: a machine whose clock was wrong.
#[tokio::test]
async fn a_clock_that_was_ahead_and_is_set_back_makes_the_own_svid_good_again() {
    let (world, clock) = short_lived().await;
    served_before(&world).await;
    clock.advance(1900);
    world.server.state().away = true;
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    next(&mut held).await.unwrap();
    says(&world, "own SVID expired at ").await;
    clock.advance(-1900);
    world.entry("e2", "/more", &["test:any"]);
    world.server.state().away = false;
    while next(&mut held).await.unwrap().svids.len() < 2 {}
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    while !server_error(&world).await.is_empty() {
        assert!(tokio::time::Instant::now() < end, "all is well again");
    }
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_was_evicted_while_its_own_svid_had_ended_attests_and_goes_on() {
    let (mut world, clock) = short_lived().await;
    world.settings.sync_interval = std::time::Duration::from_secs(3600);
    {
        let mut state = world.server.state();
        (state.pushes, state.svid_ttl) = (true, 36_000);
    }
    let agent = world.started().await;
    let mut held = agent.x509().await.unwrap();
    next(&mut held).await.unwrap();
    until("the agent listens to the server", || world.server.listeners() == 1).await;
    world.server.state().away = true;
    clock.advance(1900);
    says(&world, "own SVID expired at ").await;
    {
        let mut state = world.server.state();
        (state.agent_ttl, state.away) = (7200, false);
    }
    world.server.end_streams(Some(permission_denied("evicted", Reason::AgentNotAttested))).await;
    until("it listens again", || world.server.listeners() == 1).await;
    world.entry("e2", "/more", &["test:any"]);
    let entries = vec![wire_entry("e2", "/more", &["test:any"])];
    world.server.push(WatchResponse { entries, ..Default::default() }).await;
    while next(&mut held).await.unwrap().svids.len() < 2 {}
    agent.stop().await;
}

/// One thread for the disk, and what it does does not end.
#[test]
fn a_disk_that_hangs_keeps_no_root_with_workloads_that_is_gone() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let world = world().await;
        let other = crate::testing::TestCa::new("other");
        let more = X509Certificate { asn1: other.root.to_vec().into(), tainted: false };
        world.server.state().bundle.x509_authorities.push(more);
        let agent = world.started().await;
        let mut held = agent.x509().await.unwrap();
        let before = next(&mut held).await.unwrap().svids[0].bundle.len();
        let data = world.settings.data_dir.join("agent-data.json");
        let stored = || std::fs::read(&data).unwrap();
        let both = stored();
        let (release, disk) = std::sync::mpsc::channel::<()>();
        let hangs = tokio::task::spawn_blocking(move || disk.recv().is_ok());
        world.server.state().bundle.x509_authorities.pop();
        while next(&mut held).await.unwrap().svids[0].bundle.len() == before {}
        assert_eq!(stored(), both);
        drop(release);
        hangs.await.unwrap();
        until("it is on disk", || stored() != both).await;
        agent.stop().await;
    });
}
