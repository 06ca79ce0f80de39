//! The fuzz target's body on stable: every committed seed as it is, cut at each byte, and with each byte replaced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "../../../fuzz/src/config.rs"]
#[allow(unreachable_pub)]
mod bodies;

use std::path::Path;

#[test]
fn hcl() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/hcl");
    let seeds: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| std::fs::read(f.unwrap().path()).unwrap()).collect();
    assert!(!seeds.is_empty());
    for seed in &seeds {
        bodies::hcl(seed);
        for at in 0..seed.len() {
            bodies::hcl(&seed[..at]);
            for replacement in *b"\"{}[]<#\\$\n0" {
                let mut bytes = seed.clone();
                bytes[at] = replacement;
                bodies::hcl(&bytes);
            }
        }
    }
}
