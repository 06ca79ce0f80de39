//! What an agent that changes while its call is under way gets from then on.

use super::*;
use crate::authz::{Connection, Gate, GateSettings, Identity, Method, Peer, Permit, method};
use crate::entries::Turn;
use crate::live::{Live, LiveSettings};
use crate::nodes::Nodes;
use crate::publish::BundleFeed;
use crate::testing::Memory;
use finial_core::{AgentRecord, ManualClock, Selector, TrustDomain};
use finial_proto::types::permission_denied_details::Reason;
use finial_runtime::{Metrics, Supervisor};
use finial_store::{Store, StoreSettings};
use futures::FutureExt;
use tokio_stream::StreamExt;
use tonic::{Code, Request};

/// A server's memory with one agent, whose SVID has the serial number 1.
struct World {
    nodes: Arc<Nodes>,
    entries: Arc<Entries>,
    gate: Arc<Gate>,
    watchers: Arc<Watchers>,
    agent: SpiffeId,
}

fn record(agent: &SpiffeId, serial: &str, selector: &str) -> AgentRecord {
    let selector = Selector { kind: "test".into(), value: selector.into() };
    AgentRecord {
        id: agent.clone(),
        attestation_type: "test".into(),
        serial_number: serial.into(),
        expires_at: 100,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: true,
        agent_version: String::new(),
        selectors: SelectorSet::new(vec![selector]),
    }
}

impl World {
    async fn new() -> Self {
        let clock = Arc::new(ManualClock::at(0));
        let store = Store::open(StoreSettings::memory(), clock.clone()).await.unwrap();
        let turn = Turn::new(Supervisor::default().spawner());
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await.unwrap();
        let nodes = Nodes::load(store, turn, entries.clone()).await.unwrap();
        let agent = trust_domain.agent_id("test/a").unwrap();
        nodes.attest(record(&agent, "1", "before")).await.unwrap();
        let live = LiveSettings::new(Live::default());
        let settings = GateSettings { live, audit_log_enabled: false, policy: None };
        let gate = Gate::new(settings, entries.clone(), nodes.clone(), Metrics::disabled(), clock);
        let watchers = Watchers::new(BundleFeed::open(Arc::new(Memory::default()), trust_domain).await.unwrap());
        Self { nodes, entries, gate, watchers, agent }
    }

    /// A call of the agent that has passed the gate.
    async fn call<M: Method>(&self) -> Permit<M> {
        let (id, follows) = (self.agent.clone(), Box::default());
        let identity = Identity::Svid { id, serial: "1".into(), not_after: 100, follows, issuer: 0 };
        let peer = Peer::Remote { address: "10.0.0.1:1000".parse().unwrap(), identity };
        let mut request = Request::new(());
        request.extensions_mut().insert(Connection::from(peer));
        self.gate.check::<M, _>(&request).await.unwrap()
    }

    fn open(&self, permit: &Permit<method::WatchAuthorized>, selectors: Arc<SelectorSet>) -> WatchStream {
        let opening = Opening {
            call: permit.call(),
            timer: self.gate.timer(method::WatchAuthorized::ROW),
            agent: self.agent.clone(),
            selectors,
            not_after: 100,
            request: WatchRequest { entry_digests: vec![0], ..WatchRequest::default() },
            held: crate::endpoints::Streams::default().hold(),
        };
        WatchStream::open(&self.watchers, &self.entries, opening).unwrap()
    }
}

fn denied<T>(result: Result<T, Status>) -> Option<Reason> {
    let status = result.err().expect("an error");
    assert_eq!(status.code(), Code::PermissionDenied);
    finial_proto::convert::permission_denied_reason(&status)
}

#[tokio::test]
async fn a_stream_is_refused_to_an_agent_that_was_banned_before_it_was_heard_of() {
    let world = World::new().await;
    let permit = world.call().await;
    let (_, selectors) = permit.agent().unwrap();
    world.nodes.ban(world.agent.clone()).await.unwrap();
    let mut stream = world.open(&permit, selectors);
    assert_eq!(denied(stream.next().now_or_never().flatten().expect("an answer at once")), Some(Reason::AgentBanned));
}

#[tokio::test]
async fn a_stream_with_selectors_of_the_past_is_to_be_opened_again() {
    let world = World::new().await;
    let permit = world.call().await;
    let (_, selectors) = permit.agent().unwrap();
    world.nodes.attest(record(&world.agent, "1", "after")).await.unwrap();
    assert!(matches!(world.open(&permit, selectors).next().now_or_never(), Some(None)));
    let (_, selectors) = permit.agent().unwrap();
    let mut stream = world.open(&permit, selectors);
    assert!(stream.next().now_or_never().is_none(), "it waits for changes");
}

#[tokio::test]
async fn who_is_banned_while_waiting_for_a_signature_gets_none() {
    let world = World::new().await;
    let (x509, jwt) = (world.call::<method::BatchNewX509SVID>().await, world.call::<method::NewJWTSVID>().await);
    let (wit, renewal) = (world.call::<method::BatchNewWITSVID>().await, world.call::<method::RenewAgent>().await);
    // Its own renewal takes nothing from a call that was under way.
    world.nodes.attest(record(&world.agent, "2", "before")).await.unwrap();
    jwt.limit(1, "").await.unwrap();
    assert_eq!(denied(jwt.still_agent()), Some(Reason::AgentNotActive));
    world.nodes.ban(world.agent.clone()).await.unwrap();
    for call in [x509.call(), jwt.call(), wit.call(), renewal.call()] {
        assert_eq!(denied(call.limit(1, "").await), Some(Reason::AgentBanned));
        assert_eq!(denied(call.after_waiting()), Some(Reason::AgentBanned));
    }
    world.nodes.delete(world.agent.clone()).await.unwrap();
    assert_eq!(denied(jwt.limit(1, "").await), Some(Reason::AgentNotAttested));
}
