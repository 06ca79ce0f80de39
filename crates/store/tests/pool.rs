//! How many connections are made, kept and let go.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_store::{SqlConfig, Store};
use testkit::Proxy;

on_every_database!(
    one_connection_serves_one_caller_after_the_other,
    a_connection_that_is_too_old_is_replaced,
    none_is_kept_where_none_may_be,
    no_more_are_open_than_allowed,
);

/// A store behind a proxy, which counts connections; `None` for SQLite.
async fn counted(lab: Lab, change: impl FnOnce(&mut SqlConfig)) -> Option<(Opened, Proxy, Store)> {
    let opened = lab.open().await?;
    let database = opened.database.as_ref()?;
    let proxy = Proxy::to(database.port());
    let mut config = SqlConfig {
        database_type: database.kind().spire_type().into(),
        connection_string: database.dsn_at(proxy.port()),
        ..SqlConfig::default()
    };
    change(&mut config);
    let store = Store::open(config.resolve().unwrap(), clock()).await.unwrap();
    Some((opened, proxy, store))
}

/// How many connections five calls make.
async fn made_by_five_calls(opened: &Opened, proxy: &Proxy, store: &Store) -> u64 {
    let port = opened.database.as_ref().unwrap().port();
    let before = proxy.accepted(port);
    for _ in 0..5 {
        store.count_bundles().await.unwrap();
    }
    proxy.accepted(port) - before
}

async fn one_connection_serves_one_caller_after_the_other(lab: Lab) {
    let Some((opened, proxy, store)) = counted(lab, |_| ()).await else { return };
    assert_eq!(made_by_five_calls(&opened, &proxy, &store).await, 0, "that of the start is still there");
    assert_eq!(proxy.open(None), 1);
}

async fn a_connection_that_is_too_old_is_replaced(lab: Lab) {
    let old = |config: &mut SqlConfig| config.conn_max_lifetime = Some("1ns".into());
    let Some((opened, proxy, store)) = counted(lab, old).await else { return };
    assert_eq!(made_by_five_calls(&opened, &proxy, &store).await, 5);
}

async fn none_is_kept_where_none_may_be(lab: Lab) {
    let none = |config: &mut SqlConfig| config.max_idle_conns = Some(-1);
    let Some((opened, proxy, store)) = counted(lab, none).await else { return };
    assert_eq!(made_by_five_calls(&opened, &proxy, &store).await, 5);
}

async fn no_more_are_open_than_allowed(lab: Lab) {
    let two = |config: &mut SqlConfig| config.max_open_conns = Some(2);
    let Some((opened, proxy, store)) = counted(lab, two).await else { return };
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..24 {
        let store = store.clone();
        callers.spawn(async move { create(&store, entry(&n.to_string(), &format!("/{n}"), "/p", &["t:a"])).await });
    }
    callers.join_all().await;
    let port = opened.database.as_ref().unwrap().port();
    assert!(proxy.accepted(port) <= 2, "{}", proxy.accepted(port));
    assert_eq!(entries(&store).await.len(), 24);
}
