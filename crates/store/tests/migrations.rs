//! Databases of other SPIRE releases: brought forward, opened with a warning, or refused.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::AgentRecord;
use finial_store::{AgentFilter, Store, StoreError, StoreSettings};
use tokio::task::JoinSet;

on_every_database!(
    older_schemas_are_brought_forward,
    what_cannot_be_migrated_is_refused_and_stays_as_it_was,
    the_next_minor_release_may_have_been_there,
);

/// Makes a database with one entry and one agent, states another version in it, and opens it again. `None` where the
/// database is not installed.
async fn reopened(lab: Lab, statements: &[&str], disabled: bool) -> Option<(Result<Store, StoreError>, Closed)> {
    let opened = lab.open().await?;
    create(&opened, entry("1", "/1", "/p", &["t:a"])).await;
    opened.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
    let opened = opened.closed().await;
    opened.edit(statements).await;
    let settings = StoreSettings { disable_migration: disabled, ..opened.settings.clone() };
    Some((Store::open(settings, clock()).await, opened))
}

async fn older_schemas_are_brought_forward(lab: Lab) {
    let to_24 = [
        "ALTER TABLE registered_entries DROP COLUMN additional_attributes",
        "UPDATE migrations SET version = 24, code_version = '1.14.0'",
    ];
    let to_23 = [
        "ALTER TABLE registered_entries DROP COLUMN additional_attributes",
        "ALTER TABLE attested_node_entries DROP COLUMN agent_version",
        "UPDATE migrations SET version = 23, code_version = '1.8.0'",
    ];
    for statements in [&to_24[..], &to_23[..]] {
        let Some((store, opened)) = reopened(lab, statements, false).await else { return };
        let store = store.unwrap();
        let mut new = entry("2", "/2", "/p", &["t:a"]);
        new.jwt_svid_include_jti = true;
        create(&store, new.clone()).await;
        assert_eq!(store.fetch_entry(&new.id).await.unwrap(), Some(new));
        assert_eq!(entries(&store).await.len(), 2);
        assert_eq!(store.count_nodes(&AgentFilter::default()).await.unwrap(), 1);
        store.create_or_update_node(&agent("/spire/agent/a")).await.unwrap();
        store.close().await;
        assert_eq!(opened.stated().await, (25, "1.15.3".to_owned()));
    }
}

async fn what_cannot_be_migrated_is_refused_and_stays_as_it_was(lab: Lab) {
    for (statement, disabled, text) in [
        (
            "UPDATE migrations SET version = 22, code_version = '1.7.2'",
            false,
            "datastore-sql: migrating from schema version 22 requires a previous SPIRE release; please follow the upgrade strategy at doc/upgrading.md",
        ),
        (
            "UPDATE migrations SET version = 26, code_version = '1.17.0'",
            false,
            "datastore-sql: incompatible DB schema and code version",
        ),
        (
            "UPDATE migrations SET version = 24, code_version = '1.13.0'",
            true,
            "datastore-sql: auto-migration must be enabled for current DB",
        ),
    ] {
        let Some((store, opened)) = reopened(lab, &[statement], disabled).await else { return };
        assert_eq!(store.map(|_| ()).unwrap_err().to_string(), text);
        let version = opened.stated().await;
        assert!(statement.contains(&format!("{}, code_version = '{}'", version.0, version.1)));
    }
}

async fn the_next_minor_release_may_have_been_there(lab: Lab) {
    let next = "UPDATE migrations SET version = 26, code_version = '1.16.0-dev'";
    let Some((store, opened)) = reopened(lab, &[next], false).await else { return };
    let store = store.unwrap();
    assert_eq!(entries(&store).await.len(), 1);
    store.close().await;
    assert_eq!(opened.stated().await, (26, "1.16.0-dev".to_owned()));
}

/// A live deployment's writes go on while our own index is made, at the first start beside other servers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_index_stops_nobodys_writes() {
    let Some(opened) = Lab::Postgres.open().await else { return };
    create(&opened, entry("1", "/1", "/p", &["t:a"])).await;
    let opened = opened.closed().await;
    opened.edit(&[DROP_OWN]).await;
    let database = opened.database.as_ref().unwrap();
    // Another server is in the middle of a write, for which the index has to wait.
    let writing = database.hold("LOCK TABLE registered_entries IN ROW EXCLUSIVE MODE");
    let mut starting = JoinSet::new();
    starting.spawn(Store::open(opened.settings.clone(), clock()));
    testkit::eventually("the index waits for the write", || match database.waiting() {
        0 => Err(String::new()),
        _ => Ok(()),
    });
    // A third one's writes do not wait behind it.
    database.sql("SET lock_timeout = '10s'; UPDATE registered_entries SET hint = 'meanwhile'");
    drop(writing);
    let store = starting.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(own_is_valid(database), "t");
    assert_eq!(store.fetch_entry(&finial_core::EntryId::parse("1").unwrap()).await.unwrap().unwrap().hint, "meanwhile");
}

/// The same on MariaDB, where making it would have everybody wait until the longest transaction of others has ended: it
/// is left for another start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_index_waits_for_nobodys_backup() {
    let Some(opened) = Lab::MySql.open().await else { return };
    create(&opened, entry("1", "/1", "/p", &["t:a"])).await;
    let opened = opened.closed().await;
    opened.edit(&["DROP INDEX finial_registered_entries_spiffe_id_parent_id ON registered_entries"]).await;
    let database = opened.database.as_ref().unwrap();
    let backup = database.hold("SELECT id FROM registered_entries");
    let mut starting = JoinSet::new();
    starting.spawn(Store::open(opened.settings.clone(), clock()));
    testkit::eventually("the index waits for the backup", || match database.waiting() {
        0 => Err(String::new()),
        _ => Ok(()),
    });
    // Another server's write comes through although the backup goes on.
    database.sql("SET lock_wait_timeout = 15; UPDATE registered_entries SET hint = 'meanwhile'");
    starting.join_next().await.unwrap().unwrap().unwrap().close().await;
    let indexes = format!(
        "SELECT COUNT(DISTINCT index_name) FROM information_schema.statistics \
         WHERE table_schema = DATABASE() AND index_name = '{OWN}'"
    );
    assert_eq!(database.sql(&indexes).trim(), "0");
    drop(backup);
    Store::open(opened.settings.clone(), clock()).await.unwrap().close().await;
    assert_eq!(database.sql(&indexes).trim(), "1");
}

/// Several servers that start together make one index between them, and what a killed one left is made anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_index_is_made_by_whoever_comes_and_mended() {
    let Some(opened) = Lab::Postgres.open().await else { return };
    let opened = opened.closed().await;
    let database = opened.database.as_ref().unwrap();
    let invalid = format!("UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{OWN}'::regclass");
    for state in [DROP_OWN, &invalid] {
        for _ in 0..3 {
            opened.edit(&[state]).await;
            let mut starting = JoinSet::new();
            for _ in 0..5 {
                starting.spawn(Store::open(opened.settings.clone(), clock()));
            }
            for start in starting.join_all().await {
                start.unwrap().close().await;
            }
            assert_eq!(own_is_valid(database), "t", "{state}");
        }
    }
}

const OWN: &str = "finial_registered_entries_spiffe_id_parent_id";
const DROP_OWN: &str = "DROP INDEX finial_registered_entries_spiffe_id_parent_id";

fn own_is_valid(database: &testkit::Database) -> String {
    let valid = format!("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{OWN}')");
    database.sql(&valid).trim().to_owned()
}

/// MySQL ends a transaction with each table that is made: what a server that was killed half-way left is completed.
#[tokio::test]
async fn half_made_tables_are_completed() {
    let Some(opened) = Lab::MySql.open().await else { return };
    let opened = opened.closed().await;
    let whole = opened.database.as_ref().unwrap().schema();
    opened.edit(&["DELETE FROM migrations", "DROP TABLE ca_journals", "DROP TABLE selectors"]).await;
    let store = Store::open(opened.settings.clone(), clock()).await.unwrap();
    create(&store, entry("1", "/1", "/p", &["t:a"])).await;
    assert_eq!(opened.stated().await, (25, "1.15.3".to_owned()));
    // how far the numbers have come is no part of it
    let line = |line: &str| line.split(' ').filter(|word| !word.starts_with("AUTO_INCREMENT=")).collect::<String>();
    let lines = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(line).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&opened.database.as_ref().unwrap().schema()), lines(&whole));
}

/// SPIRE writes moments in the time zone of its machine.
#[tokio::test]
async fn moments_of_every_time_zone_are_compared_as_moments() {
    // NOW is 22:03:30 UTC; the text sorts after that of NOW, the moment lies before
    let statements = [
        "UPDATE attested_node_entries SET expires_at = '2026-11-22 23:03:29.123456789+01:00', new_expires_at = NULL",
        "UPDATE registered_entries SET created_at = '2026-11-22 17:33:30.5-04:30'",
        "UPDATE attested_node_entries_events SET created_at = '2026-11-23 03:03:20+05:00'",
    ];
    let Some((store, _opened)) = reopened(Lab::Sqlite, &statements, false).await else { return };
    let store = store.unwrap();
    let listed = store.list_nodes(&AgentFilter::default(), None).await.unwrap().items;
    assert_eq!(listed.iter().map(|a: &AgentRecord| a.expires_at).collect::<Vec<_>>(), [NOW - 1]);
    for (before, count) in [(NOW - 1, 0), (NOW, 1)] {
        let filter = AgentFilter { expires_before: Some(before), ..AgentFilter::default() };
        assert_eq!(store.count_nodes(&filter).await.unwrap(), count);
    }
    let entries = entries(&store).await;
    assert_eq!(entries[0].created_at, NOW + 1, "rounded to the nearest second");
    assert_eq!(store.prune_events(NOW - 10).await.unwrap(), 0);
    assert_eq!(store.prune_events(NOW - 9).await.unwrap(), 1);
}
