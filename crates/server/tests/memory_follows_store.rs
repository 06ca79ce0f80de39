//! Whatever happens to many changes at once, what the server has in memory is what the datastore holds.
#![allow(clippy::unwrap_used)]

use finial_core::{AgentRecord, Entry, EntryId, ManualClock, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_runtime::Supervisor;
use finial_server::entries::{Entries, Turn};
use finial_server::nodes::Nodes;
use finial_store::{EntryUpdate, Store, StoreSettings};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;

const AGENTS: u8 = 3;
const ENTRIES: u8 = 8;

#[derive(Clone, Debug)]
enum Change {
    Create(u8, u8, u8),
    Reparent(u8, u8),
    Delete(u8),
    Attest(u8, u8),
    Renew(u8, u8),
    Promote(u8, u8),
    Ban(u8),
    Evict(u8),
}

fn change() -> impl Strategy<Value = Change> {
    let (entry, agent, any) = (0..ENTRIES, 0..AGENTS, 0..4u8);
    prop_oneof![
        3 => (entry.clone(), agent.clone(), any.clone()).prop_map(|(e, a, s)| Change::Create(e, a, s)),
        2 => (entry.clone(), agent.clone()).prop_map(|(e, a)| Change::Reparent(e, a)),
        1 => entry.prop_map(Change::Delete),
        2 => (agent.clone(), any.clone()).prop_map(|(a, n)| Change::Attest(a, n)),
        2 => (agent.clone(), any.clone()).prop_map(|(a, n)| Change::Renew(a, n)),
        2 => (agent.clone(), any).prop_map(|(a, n)| Change::Promote(a, n)),
        1 => agent.clone().prop_map(Change::Ban),
        1 => agent.prop_map(Change::Evict),
    ]
}

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn agent_id(n: u8) -> SpiffeId {
    trust_domain().agent_id(&format!("test/{n}")).unwrap()
}

fn selectors(n: u8) -> SelectorSet {
    SelectorSet::new(vec![Selector { kind: "s".into(), value: n.to_string() }])
}

fn entry(n: u8, agent: u8, selector: u8) -> Entry {
    // Every other one is a node alias.
    let parent_id = if selector.is_multiple_of(2) { trust_domain().server_id() } else { agent_id(agent) };
    Entry {
        admin: selector == 1,
        ..Entry::new(
            EntryId::parse(&format!("e{n}")).unwrap(),
            SpiffeId::new(&trust_domain(), &format!("/w{n}")).unwrap(),
            parent_id,
            selectors(selector),
        )
    }
}

fn record(n: u8, serial: u8) -> AgentRecord {
    AgentRecord {
        id: agent_id(n),
        attestation_type: "test".into(),
        serial_number: format!("{}", 100 + serial),
        expires_at: 2_000_000_000,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: serial > 1,
        agent_version: String::new(),
        selectors: selectors(serial),
    }
}

/// Failures are fine here (no such entry, banned); being out of step is not.
async fn apply(change: Change, entries: Arc<Entries>, nodes: Arc<Nodes>) {
    match change {
        Change::Create(n, agent, selector) => drop(entries.create(vec![entry(n, agent, selector)]).await),
        Change::Reparent(n, agent) => {
            let update = EntryUpdate { parent_id: Some(agent_id(agent)), ..EntryUpdate::default() };
            drop(entries.update(vec![(EntryId::parse(&format!("e{n}")).unwrap(), update)]).await);
        }
        Change::Delete(n) => drop(entries.delete(vec![EntryId::parse(&format!("e{n}")).unwrap()]).await),
        Change::Attest(n, serial) => drop(nodes.attest(record(n, serial)).await),
        Change::Renew(n, serial) => {
            let own =
                nodes.serials(&agent_id(n)).and_then(|known| known.last().map(ToString::to_string)).unwrap_or_default();
            drop(nodes.renew(&agent_id(n), &own, format!("{}", 200 + serial), 2_000_000_000).await)
        }
        Change::Promote(n, serial) => drop(nodes.promote(&agent_id(n), &format!("{}", 200 + serial)).await),
        Change::Ban(n) => drop(nodes.ban(agent_id(n)).await),
        Change::Evict(n) => drop(nodes.delete(agent_id(n)).await),
    }
}

/// All that calls can learn from memory.
fn view(entries: &Entries, nodes: &Nodes) -> Vec<String> {
    let mut seen = vec![format!("{} entries, {} agents", entries.count(), nodes.count())];
    for agent in (0..AGENTS).map(agent_id) {
        let have = nodes.selectors(&agent);
        let mut found: Vec<_> =
            entries.authorized(&agent, &have).iter().map(|e| format!("{agent} {:?}", e.to_proto())).collect();
        found.sort();
        seen.append(&mut found);
        for serial in (100..104).chain(200..204) {
            seen.push(format!("{agent} {serial} {:?}", nodes.standing(&agent, &serial.to_string(), &[])));
        }
        seen.push(format!("{agent} {:?} {have:?}", nodes.can_reattest(&agent)));
    }
    for n in 0..ENTRIES {
        let id = SpiffeId::new(&trust_domain(), &format!("/w{n}")).unwrap();
        seen.push(format!("{id} {}", entries.is_admin(&id)));
    }
    seen
}

async fn load(store: &Store, turn: &Turn) -> (Arc<Entries>, Arc<Nodes>) {
    let entries = Entries::load(store.clone(), turn.clone(), trust_domain()).await.unwrap();
    let nodes = Nodes::load(store.clone(), turn.clone(), entries.clone()).await.unwrap();
    (entries, nodes)
}

async fn out_of_step(changes: Vec<(Change, bool)>) -> Option<(Vec<String>, Vec<String>)> {
    let clock = Arc::new(ManualClock::at(1_800_000_000));
    let store = Store::open(StoreSettings::memory(), clock).await.unwrap();
    let supervisor = Supervisor::default();
    let turn = Turn::new(supervisor.spawner());
    let (entries, nodes) = load(&store, &turn).await;
    let run = |(change, patient): (Change, bool)| {
        let work = apply(change, entries.clone(), nodes.clone());
        async move {
            if patient {
                work.await;
            } else {
                // A caller that hangs up after it was first heard.
                let _ = tokio::time::timeout(Duration::ZERO, work).await;
            }
        }
    };
    futures::future::join_all(changes.into_iter().map(run)).await;
    // What was begun is finished, also for those who went away.
    supervisor.shutdown().trigger();
    supervisor.run(Duration::from_secs(20)).await.unwrap();
    let after = view(&entries, &nodes);
    let again = Supervisor::default();
    let (entries, nodes) = load(&store, &Turn::new(again.spawner())).await;
    let stored = view(&entries, &nodes);
    (after != stored).then_some((after, stored))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_what_the_store_holds(changes in proptest::collection::vec((change(), any::<bool>()), 1..40)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        prop_assert_eq!(runtime.block_on(out_of_step(changes)), None);
    }
}
