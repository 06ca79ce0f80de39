//! How fast entries are created, read, changed and deleted: `cargo run --release -p finial-store --example speed -- KIND CONNECTION [COUNT]`,
//! with `sqlite3`, `postgres` or `mysql` and a connection string as in the configuration.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use finial_core::{Entry, EntryId, Selector, SpiffeId, SystemClock};
use finial_store::{EntryUpdate, SqlConfig, Store};
use std::sync::Arc;
use std::time::Instant;

const BATCH: usize = 500;

fn entry(n: usize) -> Entry {
    let selectors = [format!("unix:uid:{n}"), "unix:gid:1".into()];
    Entry::new(
        EntryId::parse(&format!("speed-{n}")).unwrap(),
        SpiffeId::parse(&format!("spiffe://example.org/speed/{n}")).unwrap(),
        SpiffeId::parse("spiffe://example.org/spire/agent/a").unwrap(),
        selectors.iter().map(|text| Selector::parse(text).unwrap()).collect(),
    )
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut args = std::env::args().skip(1);
    let (kind, connection) = (args.next().unwrap(), args.next().unwrap());
    let count: usize = args.next().map_or(10_000, |text| text.parse().unwrap());
    let config = SqlConfig { database_type: kind, connection_string: connection, ..SqlConfig::default() };
    let store = Store::open(config.resolve().unwrap(), Arc::new(SystemClock)).await.unwrap();
    let rate = |what: &str, n: usize, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        println!("{what}: {n} in {seconds:.3} s = {:.0}/s", n as f64 / seconds);
    };
    let start = Instant::now();
    for first in (0..count).step_by(BATCH) {
        let results = store.create_entries((first..count.min(first + BATCH)).map(entry).collect()).await.unwrap();
        assert!(results.iter().all(|result| result.as_ref().is_ok_and(|created| !created.existing)));
    }
    rate("created in batches of 500", count, start);
    let start = Instant::now();
    for n in count..count + 500 {
        store.create_entries(vec![entry(n)]).await.unwrap();
    }
    rate("created one by one", 500, start);
    let start = Instant::now();
    let listed = store.entries_after(0, u32::MAX).await.unwrap().0.len();
    rate("listed", listed, start);
    let update = |n: usize, hint: &str| {
        (
            entry(n).id,
            EntryUpdate { hint: Some(hint.into()), selectors: Some(entry(n).selectors), ..EntryUpdate::default() },
        )
    };
    let start = Instant::now();
    for first in (0..count).step_by(BATCH) {
        let some: Vec<_> = (first..count.min(first + BATCH)).map(|n| update(n, "batch")).collect();
        assert!(store.update_entries(&some).await.unwrap().iter().all(Result::is_ok));
    }
    rate("changed in batches of 500", count, start);
    let start = Instant::now();
    for n in 0..500 {
        store.update_entries(&[update(n, "one")]).await.unwrap();
    }
    rate("changed one by one", 500, start);
    let start = Instant::now();
    let ids: Vec<EntryId> = (0..count + 500).map(|n| entry(n).id).collect();
    for id in ids.iter().rev().take(500) {
        store.delete_entry(id).await.unwrap();
    }
    rate("deleted one by one", 500, start);
    let start = Instant::now();
    for some in ids.get(..count).unwrap().chunks(BATCH) {
        assert!(store.delete_entries(some).await.unwrap().iter().all(Result::is_ok));
    }
    rate("deleted in batches of 500", count, start);
    store.close().await;
}
