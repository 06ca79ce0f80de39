//! What both suites need.

use finial_config::PluginConfig;
use finial_core::{SystemClock, TrustDomain};
use finial_plugin::PluginContext;
use finial_plugins_external::Surroundings;
use finial_runtime::Supervisor;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A program that runs plugins.
pub(crate) struct Program {
    pub(crate) supervisor: Supervisor,
    pub(crate) around: Surroundings,
}

impl Default for Program {
    fn default() -> Self {
        let supervisor = Supervisor::default();
        let context =
            PluginContext { trust_domain: TrustDomain::parse("example.org").unwrap(), clock: Arc::new(SystemClock) };
        let around = Surroundings { context, host: Arc::default(), spawner: supervisor.spawner() };
        Self { supervisor, around }
    }
}

impl Program {
    /// Ends it; all its plugins must end soon.
    pub(crate) async fn end(self) {
        self.supervisor.shutdown().trigger();
        tokio::time::timeout(Duration::from_secs(30), self.supervisor.run(Duration::from_secs(25)))
            .await
            .unwrap()
            .unwrap();
    }
}

pub(crate) fn config(kind: &str, name: &str, command: &Path, args: &[&str], data: &str) -> PluginConfig {
    PluginConfig {
        command: Some(command.to_owned()),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        ..PluginConfig::inline(kind, name, finial_hcl::parse(data).unwrap())
    }
}

/// The plugin of every kind, if it was built.
#[allow(dead_code, clippy::print_stderr)]
pub(crate) fn real_plugin() -> Option<PathBuf> {
    let cache = std::env::var_os("FINIAL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/finial"));
    let plugin = cache.join("plugins/plugin");
    if plugin.exists() {
        return Some(plugin);
    }
    let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(!promised, "{} is not there; tests/plugins/build.sh builds it", plugin.display());
    eprintln!("SKIPPED: {} is not there; tests/plugins/build.sh builds it", plugin.display());
    None
}

/// Asks again until it is true.
#[allow(dead_code)]
pub(crate) async fn until(what: &str, mut is_true: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !is_true().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An argument that no other run has.
#[allow(dead_code)]
pub(crate) fn own(mark: &str) -> String {
    format!("{mark}-{}", std::process::id())
}

/// The processes that run with this argument of [`own`], which is different for each test.
#[allow(dead_code)]
pub(crate) fn pids(mark: &str) -> Vec<String> {
    let mark = own(mark);
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
    let marked = |pid: &String| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).any(|arg| arg == mark.as_bytes())
    };
    all.filter(|name| name.bytes().all(|b| b.is_ascii_digit())).filter(marked).collect()
}
