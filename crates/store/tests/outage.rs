//! A database server that is away, slow, full of callers or read-only: the error says whose fault it is, and what comes
//! after it works again without a restart.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::ErrorKind;
use finial_store::{Store, StoreError};
use std::time::{Duration, Instant};
use testkit::{Proxy, Weather};

/// Long enough for whatever is awaited.
const WAIT_MAX: Duration = Duration::from_secs(60);

on_every_database!(
    refused_cut_and_back,
    a_hung_database_is_given_up_on,
    all_connections_die_at_once_and_nobody_notices,
    connections_run_out_and_come_back,
);

/// A store that reaches its database through a proxy; `None` for SQLite.
async fn behind_a_proxy(lab: Lab) -> Option<(Opened, Proxy, Store)> {
    let opened = lab.open().await?;
    let database = opened.database.as_ref()?;
    let proxy = Proxy::to(database.port());
    let settings = settings(database.kind().spire_type(), &database.dsn_at(proxy.port()));
    let store = Store::open(settings.statement_max(Duration::from_millis(500)), clock()).await.unwrap();
    Some((opened, proxy, store))
}

fn unavailable<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    let text = error.to_string();
    assert!(!text.contains(testkit::database::PASSWORD), "{text}");
    text
}

/// Until a write goes through.
async fn heals(store: &Store, name: &str) {
    let start = Instant::now();
    loop {
        let new = entry(name, &format!("/{name}"), "/p", &["t:a"]);
        match store.create_entries(vec![new]).await {
            Ok(results) => {
                assert!(results[0].is_ok());
                return;
            }
            Err(error) => assert!(start.elapsed() < WAIT_MAX, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

async fn refused_cut_and_back(lab: Lab) {
    let Some((_opened, proxy, store)) = behind_a_proxy(lab).await else { return };
    heals(&store, "before").await;
    proxy.weather(Weather::Refusing);
    proxy.cut(None);
    unavailable(store.create_entries(vec![entry("1", "/1", "/p", &["t:a"])]).await);
    let text = unavailable(store.count_bundles().await);
    assert!(text.contains("refuses connections") && text.contains("check that it runs"), "{text}");
    assert!(text.contains(&format!("127.0.0.1:{}", proxy.port())), "{text}");
    proxy.weather(Weather::Fair);
    heals(&store, "after").await;
    assert_eq!(entries(&store).await.len(), 2);
}

async fn a_hung_database_is_given_up_on(lab: Lab) {
    let Some((_opened, proxy, store)) = behind_a_proxy(lab).await else { return };
    heals(&store, "before").await;
    proxy.weather(Weather::Hung);
    let text = unavailable(store.create_entries(vec![entry("1", "/1", "/p", &["t:a"])]).await);
    assert!(text.contains("does not answer"), "{text}");
    proxy.weather(Weather::Fair);
    heals(&store, "after").await;
}

async fn all_connections_die_at_once_and_nobody_notices(lab: Lab) {
    let Some((opened, _proxy, store)) = behind_a_proxy(lab).await else { return };
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..8 {
        let store = store.clone();
        callers.spawn(async move { heals(&store, &format!("before-{n}")).await });
    }
    callers.join_all().await;
    opened.database.as_ref().unwrap().disconnect_all();
    // begun on a dead connection, and begun again on a new one
    let results = store.create_entries(vec![entry("after", "/after", "/p", &["t:a"])]).await.unwrap();
    assert!(results[0].is_ok());
    assert_eq!(store.count_bundles().await.unwrap(), 0);
}

async fn connections_run_out_and_come_back(lab: Lab) {
    if lab != Lab::Postgres {
        return;
    }
    let Some((opened, _proxy, store)) = behind_a_proxy(lab).await else { return };
    let database = opened.database.as_ref().unwrap();
    opened.close().await;
    database.limit_connections(Some(1));
    store.close().await;
    let fresh = || Store::open(settings("postgres", &database.dsn()), clock());
    let first = loop {
        // the server takes a moment to notice that the old ones are gone
        match fresh().await {
            Ok(store) => break store,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
        }
    };
    assert_eq!(first.count_bundles().await.unwrap(), 0);
    let text = unavailable(fresh().await);
    assert!(text.contains("max_open_conns"), "{text}");
    database.limit_connections(None);
    fresh().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_takes_over() {
    let Some(pair) = testkit::PostgresPair::start() else { return };
    let database = pair.primary.database();
    let (first, second) = (pair.primary.port(), pair.standby.port());
    let hosts = format!("host=127.0.0.1,127.0.0.1 port={first},{second} target_session_attrs=read-write");
    let dsn = database.dsn().replace(&format!("host=127.0.0.1 port={first}"), &hosts);
    assert!(dsn.contains("read-write"), "{dsn}");
    let store = Store::open(settings("postgres", &dsn), clock()).await.unwrap();
    heals(&store, "before").await;
    pair.wait_caught_up();
    pair.primary.kill();
    let text = unavailable(store.create_entries(vec![entry("1", "/1", "/p", &["t:a"])]).await);
    assert!(text.contains("PostgreSQL at 127.0.0.1:"), "{text}");
    pair.standby.promote();
    heals(&store, "after").await;
    let ids: Vec<String> = entries(&store).await.iter().map(|entry| entry.id.to_string()).collect();
    assert_eq!(ids, ["before", "after"], "nothing acknowledged was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_alone_is_no_place_to_write() {
    let Some(pair) = testkit::PostgresPair::start() else { return };
    let database = pair.primary.database();
    let primary = Store::open(settings("postgres", &database.dsn()), clock()).await.unwrap();
    heals(&primary, "1").await;
    pair.wait_caught_up();
    let standby = pair.standby.view(&database);
    let store = Store::open(settings("postgres", &standby.dsn()), clock()).await.unwrap();
    assert_eq!(entries(&store).await.len(), 1);
    let text = unavailable(store.create_entries(vec![entry("2", "/2", "/p", &["t:a"])]).await);
    assert!(text.contains("read-only transaction") && text.contains("must lead to the primary"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_made_read_only_says_so() {
    let Some(server) = testkit::MariaDb::start() else { return };
    let database = server.database();
    let store = Store::open(settings("mysql", &database.dsn()), clock()).await.unwrap();
    heals(&store, "before").await;
    server.read_only(true);
    let text = unavailable(store.create_entries(vec![entry("1", "/1", "/p", &["t:a"])]).await);
    assert!(text.contains("read-only") && text.contains("must lead to the primary"), "{text}");
    assert_eq!(entries(&store).await.len(), 1, "it can be read");
    server.read_only(false);
    heals(&store, "after").await;
    server.stop();
    unavailable(store.count_bundles().await);
    server.start_again();
    heals(&store, "again").await;
}

/// The certificate is checked where that is asked for, and the client shows its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_is_reached_with_tls() {
    let Some(database) = testkit::postgres() else { return };
    let (ca, (cert, key)) = (database.pki().ca(), database.pki().client());
    let plain = database.dsn();
    let with = |tls: &str| plain.replace("sslmode=disable", tls);
    let open = |dsn: String| async move { Store::open(settings("postgres", &dsn), clock()).await };
    for tls in [
        "sslmode=require".to_owned(),
        format!("sslmode=verify-ca sslrootcert={}", ca.display()),
        format!("sslmode=verify-full sslrootcert='{}'", ca.display()),
    ] {
        open(with(&tls)).await.unwrap();
    }
    let encrypted = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'finial-server' AND datname = current_database()";
    let kept = open(with("sslmode=require")).await.unwrap();
    assert_eq!(database.sql(encrypted).trim(), "t");
    drop(kept);
    let text = unavailable(open(with(&format!("sslmode=verify-full sslrootcert={}", cert.display()))).await);
    assert!(text.contains("TLS") && text.contains("root_ca_path"), "{text}");
    let certified = with(&format!(
        "sslmode=verify-full sslrootcert={} sslcert={} sslkey={}",
        ca.display(),
        cert.display(),
        key.display()
    ));
    let user = testkit::database::USER;
    let certified = certified
        .replace(&format!("user={user}"), &format!("user={}", testkit::database::CERTIFIED_USER))
        .replace(&format!("password={}", testkit::database::PASSWORD), "");
    open(certified).await.unwrap();
    let text = unavailable(open(plain.replace(testkit::database::PASSWORD, "wrong")).await);
    assert!(text.contains("check user, password and database name"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mariadb_is_reached_with_tls() {
    let Some(database) = testkit::mariadb() else { return };
    let (ca, (cert, key)) = (database.pki().ca(), database.pki().client());
    let config = |dsn: String| finial_store::SqlConfig {
        database_type: "mysql".into(),
        connection_string: dsn,
        ..Default::default()
    };
    let open = |config: finial_store::SqlConfig| async move { Store::open(config.resolve().unwrap(), clock()).await };
    open(config(format!("{}&tls=skip-verify", database.dsn()))).await.unwrap();
    open(config(format!("{}&tls=preferred", database.dsn()))).await.unwrap();
    let text = unavailable(open(config(format!("{}&tls=true", database.dsn()))).await);
    assert!(text.contains("TLS"), "{text}");
    let path = |path: &std::path::Path| path.display().to_string();
    let rooted = finial_store::SqlConfig { root_ca_path: path(&ca), ..config(database.dsn()) };
    open(rooted.clone()).await.unwrap();
    let dsn = database.dsn().replace(
        &format!("{}:{}@", testkit::database::USER, testkit::database::PASSWORD),
        &format!("{}@", testkit::database::CERTIFIED_USER),
    );
    let certified = finial_store::SqlConfig {
        client_cert_path: path(&cert),
        client_key_path: path(&key),
        connection_string: dsn,
        ..rooted
    };
    open(certified).await.unwrap();
}
