//! Several servers on one database: what each of them was told holds, whoever else writes at the same moment.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{Bundle, JoinToken, JwtAuthority};
use finial_store::{AgentUpdate, CaJournal, EntryUpdate, EventFeed, Store, StoreError};
use tokio::task::JoinSet;

on_every_database!(
    a_token_lets_one_in_whichever_server_it_is_shown_to,
    no_authority_is_lost_when_all_append,
    every_update_of_an_entry_counts,
    an_entry_id_is_given_once,
    one_renewal_wins,
    an_agent_attests_at_many_servers_at_once,
    servers_start_together_on_an_empty_database,
    one_bundle_is_made_when_all_make_it,
);

/// Stores as of as many servers; on SQLite there is one, which all share.
async fn servers(opened: &Opened, count: usize) -> Vec<Store> {
    let mut all = vec![opened.store.clone()];
    while all.len() < count {
        all.push(if opened.database.is_some() { opened.another().await } else { opened.store.clone() });
    }
    all
}

async fn a_token_lets_one_in_whichever_server_it_is_shown_to(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let servers = servers(&opened, 4).await;
    for round in 0..10 {
        let token = JoinToken { token: format!("t{round}"), expires_at: NOW + 60 };
        opened.create_join_token(&token, None).await.unwrap();
        let mut callers = JoinSet::new();
        for (caller, store) in servers.iter().cloned().cycle().take(16).enumerate() {
            let text = token.token.clone();
            callers.spawn(async move {
                let record = agent(&format!("/spire/agent/join_token/{text}-{caller}"));
                store.attest_by_join_token(&text, &record, NOW).await.unwrap().is_some()
            });
        }
        assert_eq!(callers.join_all().await.into_iter().filter(|got| *got).count(), 1);
    }
    assert_eq!(opened.count_nodes(&Default::default()).await.unwrap(), 10);
}

async fn no_authority_is_lost_when_all_append(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let mut callers = JoinSet::new();
    for (caller, store) in servers(&opened, 4).await.into_iter().enumerate() {
        callers.spawn(async move {
            for n in 0..8 {
                let key_id = format!("{caller}-{n}");
                let key = JwtAuthority { key_id, public_key: vec![1].into(), expires_at: 0, tainted: false };
                let new = Bundle { jwt_authorities: vec![key], ..bundle("a.test") };
                store.append_bundle(&new).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let stored = opened.fetch_bundle(&td("a.test")).await.unwrap().unwrap();
    assert_eq!((stored.jwt_authorities.len(), stored.sequence_number), (32, 31), "created once, appended to 31 times");
}

async fn every_update_of_an_entry_counts(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let id = create(&opened, entry("e", "/e", "/p", &["t:a"])).await.id;
    let mut callers = JoinSet::new();
    for (caller, store) in servers(&opened, 4).await.into_iter().enumerate() {
        let id = id.clone();
        callers.spawn(async move {
            for n in 0..6 {
                let selectors = Some(selectors(&[&format!("t:{caller}-{n}"), "t:both"]));
                store.update_entry(&id, EntryUpdate { selectors, ..Default::default() }).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let stored = opened.fetch_entry(&id).await.unwrap().unwrap();
    assert_eq!((stored.revision_number, stored.selectors.len()), (24, 2));
    assert_eq!(events(&opened, EventFeed::Entries).await.len(), 25);
}

async fn an_entry_id_is_given_once(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    for round in 0..5 {
        let mut callers = JoinSet::new();
        for (caller, store) in servers(&opened, 3).await.into_iter().enumerate() {
            callers.spawn(async move {
                let new = |n: usize| entry(&format!("{round}-{n}"), &format!("/{round}/{caller}/{n}"), "/p", &["t:a"]);
                let results = store.create_entries((0..20).map(new).collect()).await.unwrap();
                results.iter().filter(|result| result.is_ok()).count()
            });
        }
        assert_eq!(callers.join_all().await.into_iter().sum::<usize>(), 20);
    }
    let all = entries(&opened).await;
    assert_eq!((all.len(), all.iter().filter(|e| e.selectors.len() == 1).count()), (100, 100));
}

async fn one_renewal_wins(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let record = opened.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    let mut callers = JoinSet::new();
    for (caller, store) in servers(&opened, 4).await.into_iter().enumerate() {
        let id = record.id.clone();
        callers.spawn(async move {
            let new = AgentUpdate { new_serial_number: Some(caller.to_string()), ..Default::default() };
            store.update_node(&id, new).await.unwrap();
            store.promote_serial(&id, &caller.to_string()).await.unwrap().serial_number == caller.to_string()
        });
    }
    let promoted = callers.join_all().await.into_iter().filter(|own| *own).count();
    let stored = opened.fetch_node(&record.id).await.unwrap().unwrap();
    assert!(promoted >= 1 && stored.serial_number != record.serial_number, "{promoted} {stored:?}");
    assert!(stored.new_serial_number.is_empty() || stored.new_serial_number != stored.serial_number);
}

async fn an_agent_attests_at_many_servers_at_once(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let mut callers = JoinSet::new();
    for (caller, store) in servers(&opened, 4).await.into_iter().enumerate() {
        callers.spawn(async move {
            for n in 0..10 {
                let mut record = agent(&format!("/spire/agent/{n}"));
                record.selectors = selectors(&[&format!("t:{caller}"), "t:all"]);
                record.serial_number = caller.to_string();
                store.create_or_update_node(&record).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let all = opened.list_nodes(&Default::default(), None).await.unwrap().items;
    assert_eq!(all.len(), 10);
    for record in all {
        assert_eq!(record.selectors, selectors(&[&format!("t:{}", record.serial_number), "t:all"]));
    }
}

async fn servers_start_together_on_an_empty_database(lab: Lab) {
    let (database, kind) = match lab {
        Lab::Sqlite => return,
        Lab::Postgres => (testkit::postgres(), "postgres"),
        Lab::MySql => (testkit::mariadb(), "mysql"),
    };
    let Some(database) = database else { return };
    let mut starts = JoinSet::new();
    for _ in 0..6 {
        let settings = settings(kind, &database.dsn());
        starts.spawn(async move { Store::open(settings, clock()).await.unwrap().count_bundles().await.unwrap() });
    }
    assert_eq!(starts.join_all().await, [0; 6]);
    assert_eq!(database.sql("SELECT COUNT(*) FROM migrations").trim(), "1");
}

async fn one_bundle_is_made_when_all_make_it(lab: Lab) {
    let Some(opened) = lab.open().await else { return };
    let mut callers = JoinSet::new();
    for store in servers(&opened, 4).await {
        callers.spawn(async move { store.create_bundle(&bundle("a.test")).await });
    }
    let results = callers.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().all(|result| matches!(result, Ok(_) | Err(StoreError::AlreadyExists(_)))), "{results:?}");
}

/// A journal per server: one server's row is not another's.
#[tokio::test]
async fn journals_stay_apart() {
    let Some(opened) = Lab::Postgres.open().await else { return };
    let mut callers = JoinSet::new();
    for (caller, store) in servers(&opened, 3).await.into_iter().enumerate() {
        callers.spawn(async move {
            let new = CaJournal { id: 0, data: vec![1], active_x509_authority_id: format!("{caller}-0") };
            let mut own = store.set_ca_journal(&new).await.unwrap();
            for n in 1..10 {
                own = CaJournal { data: vec![n], active_x509_authority_id: format!("{caller}-{n}"), ..own };
                store.set_ca_journal(&own).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let all = opened.list_ca_journals().await.unwrap();
    let ids: Vec<_> = all.iter().map(|j| (j.active_x509_authority_id.ends_with("-9"), j.data.clone())).collect();
    assert_eq!(ids, vec![(true, vec![9]); 3]);
}

/// A store with a read-only database beside its own.
async fn with_replica(primary: &str, replica: &str) -> Store {
    let config = finial_store::SqlConfig {
        database_type: "postgres".into(),
        connection_string: primary.into(),
        ro_connection_string: replica.into(),
        ..Default::default()
    };
    Store::open(config.resolve().unwrap(), clock()).await.unwrap()
}

/// The names of all entries, and how many agents there are.
async fn everything(store: &Store) -> (Vec<String>, usize) {
    let names = entries(store).await.iter().map(|entry| entry.id.to_string()).collect();
    (names, store.agents_after(0, 100).await.unwrap().0.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_read_at_a_start_if_it_has_everything() {
    let Some(pair) = testkit::PostgresPair::start() else { return };
    let database = pair.primary.database();
    pair.wait_caught_up();
    let standby = pair.standby.view(&database);
    let store = with_replica(&database.dsn(), &standby.dsn()).await;
    create(&store, entry("1", "/1", "/p", &["t:a"])).await;
    store.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    let one = (vec!["1".to_owned()], 1);

    // Nobody waits for it to catch up but the call itself.
    let pages =
        || standby.statements_by_text().into_keys().filter(|text| text.contains("FROM registered_entries e")).count();
    assert_eq!(pages(), 0);
    store.read_from_replica().await;
    assert_eq!(everything(&store).await, one);
    assert_eq!(pages(), 1);
    store.read_from_primary();
    pair.standby.stop();
    assert_eq!(everything(&store).await, one, "not asked any more");
    store.read_from_replica().await;
    assert_eq!(everything(&store).await, one, "it is away");
    pair.standby.start_again();

    // It goes away, and later others are told to go, in the middle of reading.
    pair.wait_caught_up();
    store.read_from_replica().await;
    pair.standby.stop();
    assert_eq!(everything(&store).await, one);
    pair.standby.start_again();

    // It stands still: what it does not have is read from the primary.
    pair.wait_caught_up();
    standby.sql("SELECT pg_wal_replay_pause()");
    create(&store, entry("2", "/2", "/p", &["t:a"])).await;
    store.read_from_replica().await;
    let two = (vec!["1".to_owned(), "2".to_owned()], 1);
    assert_eq!(everything(&store).await, two);
    standby.sql("SELECT pg_wal_replay_resume()");
    pair.wait_caught_up();
    store.read_from_replica().await;
    assert_eq!(everything(&store).await, two);

    // Once promoted it goes its own way.
    pair.standby.promote();
    let own = Store::open(settings("postgres", &standby.dsn()), clock()).await.unwrap();
    create(&own, entry("3", "/3", "/p", &["t:a"])).await;
    store.read_from_replica().await;
    assert_eq!(everything(&store).await, two);
}

/// Whatever else is named as read-only is not read: the primary itself, and another database of the same or another server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_standby_is_not_read() {
    let Some(pair) = testkit::PostgresPair::start() else { return };
    let (database, beside) = (pair.primary.database(), pair.primary.database());
    let Some(elsewhere) = testkit::postgres() else { return };
    for other in [&beside, &elsewhere] {
        let store = Store::open(settings("postgres", &other.dsn()), clock()).await.unwrap();
        create(&store, entry("foreign", "/foreign", "/p", &["t:a"])).await;
        store.close().await;
    }
    pair.wait_caught_up();
    let others = [database.dsn(), beside.dsn(), elsewhere.dsn(), pair.standby.view(&beside).dsn()];
    for (nth, replica) in others.into_iter().enumerate() {
        let store = with_replica(&database.dsn(), &replica).await;
        let name = nth.to_string();
        create(&store, entry(&name, &format!("/{name}"), "/p", &["t:a"])).await;
        store.read_from_replica().await;
        let expected: Vec<String> = (0..=nth).map(|n| n.to_string()).collect();
        assert_eq!(everything(&store).await.0, expected, "{replica}");
    }
}
