//! The house rules that a machine can check: which way dependencies point, which crates may not come in, and how long
//! a file may be. The rules themselves stand in ARCHITECTURE.md.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The level of each room; a crate may only depend on rooms below it, or beside it where `beside` says so.
const LEVELS: &[(&str, u8)] = &[
    ("finial-core", 0),
    ("finial-hcl", 0),
    ("finial-crypto", 1),
    ("finial-proto", 1),
    ("finial-runtime", 2),
    ("finial-net", 2),
    ("finial-config", 2),
    ("finial-acme", 3),
    ("finial-policy", 3),
    ("finial-plugin", 3),
    ("finial-store", 3),
    ("finial-plugins-base", 4),
    ("finial-plugins-cloud", 4),
    ("finial-plugins-containers", 4),
    ("finial-plugins-external", 4),
    ("finial-plugins-k8s", 4),
    ("finial-plugins-vault", 4),
    ("finial-server", 5),
    ("finial-agent", 5),
    ("finial-oidc", 5),
    ("finial-catalog", 6),
    ("finial-cli", 6),
    ("finial", 7),
    ("finial-agent-bin", 7),
    ("testkit", 7),
    ("finial-tests", 8),
    ("fleet", 8),
];

/// Dependencies between rooms of one level that the house allows.
const BESIDE: &[(&str, &str)] = &[("finial-net", "finial-runtime"), ("finial-cli", "finial-catalog")];

/// Longest source file, in lines; generated code is exempt.
const LINES_MAX: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn metadata() -> serde_json::Value {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn level(name: &str) -> Option<u8> {
    LEVELS.iter().find(|(n, _)| *n == name).map(|(_, l)| *l)
}

#[test]
fn dependencies_point_downwards() {
    let mut wrong = Vec::new();
    for package in metadata()["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some(own) = level(name) else {
            wrong.push(format!("{name} has no level in this test"));
            continue;
        };
        for dep in package["dependencies"].as_array().unwrap() {
            // What only tests use may come from anywhere.
            if dep["kind"].as_str() == Some("dev") {
                continue;
            }
            let dep = dep["name"].as_str().unwrap();
            let Some(theirs) = level(dep) else { continue };
            let plugins_see_store = own == 4 && dep == "finial-store";
            if (theirs >= own && !BESIDE.contains(&(name, dep))) || plugins_see_store {
                wrong.push(format!("{name} (level {own}) depends on {dep} (level {theirs})"));
            }
        }
    }
    assert!(wrong.is_empty(), "dependencies must point downwards:\n{}", wrong.join("\n"));
}

#[test]
fn banned_crates_are_not_compiled_in() {
    let deny = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let banned: Vec<&str> = deny
        .lines()
        .filter_map(|line| line.trim().strip_prefix("{ name = \""))
        .filter_map(|rest| rest.split('"').next())
        .collect();
    assert!(banned.len() >= 4, "deny.toml lists no bans: its form changed?");
    // Not the lock file, which also names optional crates that nothing turns on.
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--workspace", "--target", "all", "--prefix", "none", "--edges", "normal,build,dev", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(tree.status.success(), "cargo tree: {}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).unwrap();
    let present: Vec<_> =
        banned.iter().filter(|name| tree.lines().any(|l| l.split(' ').next() == Some(**name))).collect();
    assert!(present.is_empty(), "banned in deny.toml, but compiled in: {present:?}");
}

#[test]
fn source_files_stay_readable() {
    let listed = Command::new("git").args(["ls-files", "-z", "*.rs"]).current_dir(root()).output().unwrap();
    let long: Vec<String> = String::from_utf8(listed.stdout)
        .unwrap()
        .split('\0')
        .filter(|f| !f.is_empty() && !f.contains("/gen/"))
        .filter_map(|f| Some((f.to_owned(), std::fs::read_to_string(root().join(f)).ok()?.lines().count())))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(f, lines)| format!("{f}: {lines} lines"))
        .collect();
    assert!(long.is_empty(), "files over {LINES_MAX} lines:\n{}", long.join("\n"));
}

#[test]
fn unsafe_code_stands_only_in_net() {
    let listed = Command::new("git").args(["ls-files", "-z", "*.rs"]).current_dir(root()).output().unwrap();
    let marker = concat!("allow(unsafe", "_code)");
    let wrong: Vec<String> = String::from_utf8(listed.stdout)
        .unwrap()
        .split('\0')
        .filter(|f| !f.is_empty() && !f.starts_with("crates/net/"))
        .filter(|f| std::fs::read_to_string(root().join(f)).is_ok_and(|text| text.contains(marker)))
        .map(str::to_owned)
        .collect();
    assert!(wrong.is_empty(), "unsafe outside net: {wrong:?}");
}
