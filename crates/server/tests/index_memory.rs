//! What a hundred thousand entries cost in memory; a process of its own, so that nothing else is counted.
#![allow(clippy::unwrap_used)]

use finial_core::{Entry, EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_server::entries::Index;

/// Anonymous memory of this process, in bytes.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[test]
fn a_hundred_thousand_entries_fit_in_forty_megabytes() {
    const COUNT: usize = 100_000;
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let mut index = Index::new(trust_domain.clone());
    let before = anonymous();
    for n in 0..COUNT {
        let id = |path: String| SpiffeId::new(&trust_domain, &path).unwrap();
        let selector = |value: String| Selector { kind: "k8s".into(), value };
        index.put(
            &Entry {
                created_at: 1_800_000_000,
                ..Entry::new(
                    EntryId::parse(&format!("01234567-89ab-cdef-0123-{n:012}")).unwrap(),
                    id(format!("/ns/default/sa/service-{n}")),
                    id(format!("/k8s/node-{}", n / 100)),
                    SelectorSet::new(vec![selector("ns:default".into()), selector(format!("sa:service-{n}"))]),
                )
            },
            n as i64 + 1,
        );
    }
    let bytes = anonymous().saturating_sub(before);
    println!("{} bytes an entry", bytes / COUNT);
    assert_eq!(index.len(), COUNT);
    assert!(bytes <= 40_000_000, "{bytes}");
}
