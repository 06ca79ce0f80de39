//! Servers that all write.

use crate::lab::*;
use finial_server::nodes::{Renewal, Standing};
use finial_store::EntryUpdate;
use proptest::prelude::*;
use std::sync::Arc;

#[derive(Clone, Debug)]
enum Change {
    Create(u32, u8),
    Hint(u32, u8),
    Delete(u32),
    Attest(u8, u8),
    Renew(u8, u8),
    Promote(u8, u8),
    Ban(u8),
    Evict(u8),
    Bundle(u8),
}

fn change() -> impl Strategy<Value = Change> {
    let (entry, agent, any) = (0..6u32, 0..3u8, 0..4u8);
    prop_oneof![
        3 => (entry.clone(), agent.clone()).prop_map(|(e, a)| Change::Create(e, a)),
        2 => (entry.clone(), any.clone()).prop_map(|(e, a)| Change::Hint(e, a)),
        1 => entry.prop_map(Change::Delete),
        2 => (agent.clone(), any.clone()).prop_map(|(a, n)| Change::Attest(a, n)),
        1 => (agent.clone(), any.clone()).prop_map(|(a, n)| Change::Renew(a, n)),
        1 => (agent.clone(), any.clone()).prop_map(|(a, n)| Change::Promote(a, n)),
        1 => agent.clone().prop_map(Change::Ban),
        1 => agent.prop_map(Change::Evict),
        1 => any.prop_map(Change::Bundle),
    ]
}

/// Refusals (no such entry, banned) are fine here.
async fn apply(server: &Server, change: Change) {
    let (entries, nodes) = (&server.entries, &server.nodes);
    match change {
        Change::Create(n, agent) => drop(entries.create(vec![entry(n, agent)]).await),
        Change::Hint(n, hint) => {
            let update = EntryUpdate { hint: Some(hint.to_string()), ..EntryUpdate::default() };
            drop(entries.update(vec![(entry_id(n), update)]).await);
        }
        Change::Delete(n) => drop(entries.delete(vec![entry_id(n)]).await),
        Change::Attest(n, serial) => drop(nodes.attest(record(n, &format!("1{serial}"))).await),
        Change::Renew(n, serial) => {
            let own =
                nodes.serials(&agent_id(n)).and_then(|known| known.last().map(ToString::to_string)).unwrap_or_default();
            drop(nodes.renew(&agent_id(n), &own, format!("2{serial}"), 2_000_000_000).await)
        }
        Change::Promote(n, serial) => drop(nodes.promote(&agent_id(n), &format!("2{serial}")).await),
        Change::Ban(n) => drop(nodes.ban(agent_id(n)).await),
        Change::Evict(n) => drop(nodes.delete(agent_id(n)).await),
        Change::Bundle(n) => {
            let mut bundle = finial_core::Bundle::empty(trust_domain());
            bundle.refresh_hint = i64::from(n);
            drop(server.store.set_bundle(&bundle).await);
        }
    }
}

async fn all_agree(database: &testkit::Database, plans: Vec<Vec<Change>>) {
    let mut servers = Vec::new();
    for _ in &plans {
        servers.push(Arc::new(Server::on(database).await));
    }
    servers.iter().for_each(|server| server.run());
    let work = servers.iter().zip(plans).map(|(server, plan)| async move {
        for change in plan {
            apply(server, change).await;
        }
    });
    futures::future::join_all(work).await;
    for server in &servers {
        server.assert_current().await;
        server.supervisor.shutdown().trigger();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn whoever_writes_every_server_knows_it(
        plans in proptest::collection::vec(proptest::collection::vec(change(), 1..25), 3..=3),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        for database in databases() {
            runtime.block_on(all_agree(&database, plans.clone()));
        }
    }
}

#[tokio::test]
async fn an_agent_that_moves_to_another_server_is_known_there() {
    for database in databases() {
        let (here, there) = (Server::on(&database).await, Server::on(&database).await);
        there.run();
        let judge = async |serial| there.nodes.judge(&agent_id(1), serial, &[]).await.unwrap();
        assert_eq!(judge("1").await, Standing::Unknown);
        here.nodes.attest(record(1, "1")).await.unwrap();
        assert_eq!(judge("1").await, Standing::Current);
        assert_eq!(here.nodes.renew(&agent_id(1), "1", "2".into(), 9).await.unwrap(), Renewal::Stored);
        assert_eq!(judge("2").await, Standing::Renewed);
        there.nodes.promote(&agent_id(1), "2").await.unwrap();
        here.nodes.ban(agent_id(1)).await.unwrap();
        until("the ban is known", async || there.nodes.standing(&agent_id(1), "2", &[]) == Standing::Banned).await;
        // Whoever lets it attest again looks first.
        assert!(matches!(there.nodes.attest(record(1, "3")).await.unwrap(), finial_server::nodes::Attested::Banned));
        here.nodes.delete(agent_id(1)).await.unwrap();
        assert_eq!(judge("2").await, Standing::Unknown);
    }
}

#[tokio::test]
async fn a_renewal_that_comes_after_evict_and_attest_is_refused() {
    for database in databases() {
        let (here, there) = (Server::on(&database).await, Server::on(&database).await);
        here.nodes.attest(record(1, "1")).await.unwrap();
        assert!(there.follower.catch_up().await);
        here.nodes.delete(agent_id(1)).await.unwrap();
        here.nodes.attest(record(1, "5")).await.unwrap();
        // The other server has not heard of it.
        assert_eq!(there.nodes.renew(&agent_id(1), "1", "6".into(), 9).await.unwrap(), Renewal::Superseded);
        here.assert_current().await;
        there.assert_current().await;
    }
}

#[tokio::test]
async fn pruning_by_several_servers_at_once_harms_nobody() {
    for database in databases() {
        let (here, there) = (Server::on(&database).await, Server::on(&database).await);
        let old = (0..50).map(|n| finial_core::Entry { expires_at: 1_000, ..entry(n, 1) });
        here.entries.create(old.chain([entry(99, 1)]).collect()).await.unwrap();
        assert!(there.follower.catch_up().await);
        let (one, two) = tokio::join!(here.store.prune_entries(2_000), there.store.prune_entries(2_000));
        assert_eq!(one.unwrap().len() + two.unwrap().len(), 50);
        let (one, two) = tokio::join!(here.store.prune_events(1), there.store.prune_events(1));
        assert_eq!((one.unwrap(), two.unwrap()), (0, 0));
        here.assert_current().await;
        there.assert_current().await;
        assert_eq!(there.entries.count(), 1);
        // Events that both have read may go; none of them is taken for one that was missed.
        let (one, two) = tokio::join!(here.store.prune_events(1_900_000_000), there.store.prune_events(1_900_000_000));
        assert!(one.unwrap() + two.unwrap() > 0);
        here.entries.create(vec![entry(100, 1)]).await.unwrap();
        here.assert_current().await;
        there.assert_current().await;
    }
}

#[tokio::test]
async fn while_nothing_changes_a_server_asks_once_a_second() {
    let Some(database) = testkit::postgres() else { return };
    let server = Server::on(&database).await;
    server.entries.create(vec![entry(1, 1)]).await.unwrap();
    // Whatever it takes until all is read.
    for _ in 0..3 {
        server.assert_current().await;
    }
    let before = database.statements();
    for _ in 0..20 {
        assert!(server.follower.catch_up().await);
    }
    let made = database.statements() - before;
    assert!((20..=22).contains(&made), "{made} statements for 20 looks");
}
