//! `src/descriptors.bin` is what the contracts in `/proto` give. `UPDATE_GEN=1 cargo test -p finial-proto --test descriptors`
//! writes it anew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use prost::Message as _;
use std::path::Path;

#[test]
fn descriptors_are_those_of_the_contracts() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let contracts = here.join("../../proto");
    let mut files = Vec::new();
    for folder in ["spire/server", "spire/agent"] {
        let mut names: Vec<String> = std::fs::read_dir(contracts.join(folder))
            .unwrap()
            .map(|entry| format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap()))
            .collect();
        names.sort();
        files.append(&mut names);
    }
    files.extend(
        [
            "finial/agent.proto",
            "finial/rotation.proto",
            "spiffe/workload.proto",
            "spiffe/broker.proto",
            "envoy/secret.proto",
            "grpc/health.proto",
        ]
        .map(String::from),
    );
    let set = protox::Compiler::new([&contracts])
        .unwrap()
        .include_imports(true)
        .include_source_info(false)
        .open_files(&files)
        .unwrap()
        .file_descriptor_set()
        .encode_to_vec();
    let path = here.join("src/descriptors.bin");
    if std::env::var_os("UPDATE_GEN").is_some() {
        std::fs::write(&path, &set).unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == set, "run UPDATE_GEN=1 cargo test -p finial-proto --test descriptors");
}
