//! An agent that takes over from the one that runs.

use super::harness::{Running, World, next, secure, until, within};
use finial_proto::convert::permission_denied;
use finial_proto::types::permission_denied_details::Reason;
use finial_proto::workload::JwtsvidRequest;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::task::JoinHandle;
use tonic::Code;

/// Workloads that come without a pause, each over a connection of its own.
struct Rush {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    ended: Vec<JoinHandle<()>>,
}

impl Rush {
    fn on(agent: &Running) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let ended = (0..4)
            .map(|i| {
                let (stop, served, client) = (stop.clone(), served.clone(), agent.caller());
                #[allow(clippy::disallowed_methods)] // a test
                tokio::spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        if i % 2 == 0 {
                            let mut stream =
                                client().fetch_x509svid(secure(Default::default())).await.unwrap().into_inner();
                            assert_eq!(next(&mut stream).await.unwrap().svids.len(), 1);
                        } else {
                            let ask = JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() };
                            client().fetch_jwtsvid(secure(ask)).await.unwrap();
                        }
                        served.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        Self { stop, served, ended }
    }

    /// Waits until some more were served.
    async fn goes_on(&self) {
        let before = self.served.load(Ordering::SeqCst);
        until("workloads are served", || self.served.load(Ordering::SeqCst) > before + 20).await;
    }

    /// Ends it: nobody was refused.
    async fn end(self) {
        self.goes_on().await;
        self.stop.store(true, Ordering::SeqCst);
        for ended in self.ended {
            within(ended).await.expect("every workload was served");
        }
    }
}

#[tokio::test]
async fn nobody_is_refused_while_one_agent_takes_over_from_another() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let mut agent = world.started().await;
    let before = agent.x509_once().await.unwrap();
    let rush = Rush::on(&agent);
    rush.goes_on().await;
    let attested = world.server.calls("AttestAgent");
    for _ in 0..5 {
        let mut held = agent.x509().await.unwrap();
        next(&mut held).await.unwrap();
        let following = world.start();
        within(agent.ended()).await.expect("the old one ends, and that is no failure");
        let end = next(&mut held).await.unwrap_err();
        assert_eq!(end.code(), Code::Unavailable, "streams are told to come again");
        rush.goes_on().await;
        assert!(!following.has_ended() && following.socket.exists());
        agent = following;
    }
    rush.end().await;
    assert_eq!(agent.x509_once().await.unwrap().svids[0].spiffe_id, before.svids[0].spiffe_id);
    assert_eq!(world.server.calls("AttestAgent"), attested, "it is the same agent");
    let socket = agent.socket.clone();
    agent.stop().await;
    assert!(!socket.exists(), "the last one takes the socket with it");
}

#[tokio::test]
async fn one_that_does_not_get_ready_leaves_the_old_one_as_it_was() {
    let mut world = World::new().await;
    world.settings.offline_cache = finial_config::OfflineCache::Off;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let rush = Rush::on(&agent);
    rush.goes_on().await;
    world.server.state().hangs = true;
    let asked = world.server.calls("SyncAuthorizedEntries");
    let late = world.start();
    until("it waits for its server", || world.server.calls("SyncAuthorizedEntries") > asked + 1).await;
    late.stop().await;
    rush.goes_on().await;
    assert!(!agent.has_ended() && agent.socket.exists());
    world.server.state().hangs = false;
    // And the next one finds it ready.
    let following = world.start();
    within(agent.ended()).await.unwrap();
    rush.end().await;
    following.stop().await;
}

/// What it would attest is what the next one starts with.
#[tokio::test]
async fn an_agent_that_is_evicted_does_not_attest_while_the_next_one_starts() {
    let mut world = World::new().await;
    world.settings.offline_cache = finial_config::OfflineCache::Off;
    world.settings.sync_interval = std::time::Duration::from_secs(3600);
    world.puzzle = true;
    {
        let mut state = world.server.state();
        (state.pushes, state.reattestable) = (true, true);
    }
    let agent = world.started().await;
    let listens = |times| world.server.listeners() == 1 && world.server.state().watches.len() == times;
    until("it listens to the server", || listens(1)).await;
    let evict = || world.server.end_streams(Some(permission_denied("evicted", Reason::AgentNotAttested)));
    world.server.state().hangs = true;
    let asked = world.server.calls("SyncAuthorizedEntries");
    let late = world.start();
    until("the next one waits for its server", || world.server.calls("SyncAuthorizedEntries") > asked).await;
    let attested = world.server.calls("AttestAgent");
    evict().await;
    until("it listens again", || listens(2)).await;
    assert_eq!(world.server.calls("AttestAgent"), attested);
    late.stop().await;
    world.server.state().hangs = false;
    let end = tokio::time::Instant::now() + super::harness::DEADLINE;
    while world.server.calls("AttestAgent") == attested {
        assert!(tokio::time::Instant::now() < end, "it attests when the other one is gone");
        evict().await;
        tokio::task::yield_now().await;
    }
    agent.stop().await;
}

/// Whoever asks while one is about to end and the next one is not yet there waits for the next one.
#[tokio::test]
async fn two_that_start_at_once_take_over_one_after_the_other() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let rush = Rush::on(&agent);
    rush.goes_on().await;
    let (one, other) = (world.start(), world.start());
    within(agent.ended()).await.expect("the first one ends, and that is no failure");
    until("one of them has taken over from the other", || one.has_ended() || other.has_ended()).await;
    let (ended, last) = if one.has_ended() { (one, other) } else { (other, one) };
    ended.ended().await.expect("none of them fails");
    rush.end().await;
    assert!(!last.has_ended() && last.socket.exists());
    last.stop().await;
    assert!(!world.settings.data_dir.join("handover.sock").exists(), "the last one takes it with it");
}

#[tokio::test]
async fn where_it_is_off_a_second_agent_is_refused() {
    let mut world = World::new().await;
    world.settings.handover = false;
    let agent = world.started().await;
    let error = world.start().failure().await.to_string();
    assert!(error.contains("another process listens on"), "{error}");
    assert!(!agent.has_ended() && agent.socket.exists());
    agent.stop().await;
}

#[tokio::test]
async fn tcp_sockets_are_handed_over_by_their_addresses() {
    let sockets = crate::handover::Sockets::default();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listener = sockets.tcp(address).unwrap();
    assert_eq!(listener.local_addr().unwrap(), address);
    assert!(sockets.tcp(address).is_err(), "it was not given to this process");
    let (names, copies) = sockets.copies().unwrap();
    let next = crate::handover::Sockets::given(names.into_iter().zip(copies));
    let taken = next.tcp(address).unwrap();
    let _client = tokio::net::TcpStream::connect(address).await.unwrap();
    drop(listener);
    sockets.close();
    within(taken.accept()).await.unwrap();
}
