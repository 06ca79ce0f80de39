//! The fuzz target's body on stable: every committed seed as it is, cut at each byte, and with each byte replaced.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../../../fuzz/src/net.rs"]
#[allow(unreachable_pub)]
mod bodies;

use std::path::Path;

#[test]
fn proxy_headers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/proxy_header");
    let seeds: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| std::fs::read(f.unwrap().path()).unwrap()).collect();
    assert!(seeds.len() >= 5);
    for seed in &seeds {
        finial_net::proxy::parse_header(seed).unwrap();
        for at in 0..seed.len() {
            bodies::proxy_header(&seed[..at]);
            for replacement in *b" \r\n\0\x21\xff:9" {
                let mut bytes = seed.clone();
                bytes[at] = replacement;
                bodies::proxy_header(&bytes);
            }
        }
    }
}
