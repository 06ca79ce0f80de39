//! How long a server takes to read its entries at the start, and what they cost in memory.
//!
//! ```text
//! index_load fill FILE COUNT     make a SQLite database with COUNT entries
//! index_load load FILE           read it, and tell seconds and anonymous memory
//! ```
//! Each in a process of its own, so that filling is not counted.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::indexing_slicing, clippy::panic)]

use finial_core::{Entry, EntryId, ManualClock, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_runtime::Supervisor;
use finial_server::entries::{Entries, Turn};
use finial_server::nodes::Nodes;
use finial_store::{Store, StoreSettings};
use std::sync::Arc;
use std::time::Instant;

/// Entries per agent, and per transaction.
const PER_AGENT: usize = 100;
const BATCH: usize = 5000;

fn anonymous_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

fn entry(trust_domain: &TrustDomain, n: usize) -> Entry {
    let id = |path: String| SpiffeId::new(trust_domain, &path).unwrap();
    let selector = |value: String| Selector { kind: "k8s".into(), value };
    Entry::new(
        EntryId::parse(&format!("01234567-89ab-cdef-0123-{n:012}")).unwrap(),
        id(format!("/ns/default/sa/service-{n}")),
        id(format!("/spire/agent/k8s_psat/cluster/node-{}", n / PER_AGENT)),
        SelectorSet::new(vec![selector("ns:default".into()), selector(format!("sa:service-{n}"))]),
    )
}

async fn fill(store: &Store, trust_domain: &TrustDomain, count: usize) {
    let mut from = 0;
    while from < count {
        let to = (from + BATCH).min(count);
        store.create_entries((from..to).map(|n| entry(trust_domain, n)).collect()).await.unwrap();
        from = to;
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let open = Instant::now();
    let settings = StoreSettings::file(&args[2]);
    let store = Store::open(settings, Arc::new(ManualClock::at(1_800_000_000))).await.unwrap();
    match args[1].as_str() {
        "fill" => fill(&store, &trust_domain, args[3].parse().unwrap()).await,
        "load" => {
            let before = anonymous_mib();
            let turn = Turn::new(Supervisor::default().spawner());
            let entries = Entries::load(store.clone(), turn.clone(), trust_domain).await.unwrap();
            let nodes = Nodes::load(store.clone(), turn, entries.clone()).await.unwrap();
            let (seconds, mib) = (open.elapsed().as_secs_f64(), anonymous_mib());
            let (entries, agents) = (entries.count(), nodes.count());
            println!("{entries} entries, {agents} agents: {seconds:.2} s, {mib:.1} MiB anonymous ({before:.1} before)");
        }
        other => panic!("fill or load, not {other:?}"),
    }
    store.close().await;
}
