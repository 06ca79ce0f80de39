//! `gvisor`: the container and sandbox of a process that runs inside gVisor (`runsc`).
//!
//! Such a process is none of the host's: its calls of the Workload API come from its container's gofer, a process of runsc's on the
//! host, which opens the socket for it (`--host-uds=open`). So the gofer is asked which container it is of, and runsc's own records,
//! which only root can write, whether that is true. All processes of a container have the same selectors.
//!
//! The gofer runs as root. What the `unix` attestor says of it is not true of the workload; [`fence`] keeps it from saying so.

use super::process::{self, Owner};
use super::unix::program::{Host, Program};
use async_trait::async_trait;
use finial_core::{Clock, Selector, UnixSeconds};
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, Reference, WorkloadAttestor, decode, prefixed_selectors};
use rustix::fd::BorrowedFd;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// The longest command line that is read.
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// The largest record of a container: it holds the container's whole specification.
const STATE_BYTES_MAX: u64 = 8 << 20;
/// Containers that one folder of records may have.
const ENTRIES_MAX: usize = 100_000;
/// How often a record is read that cannot be understood.
const LOOKS_MAX: usize = 100;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);
/// How long they may take to be found and read; `roots` may lie on a file system that does not answer.
const RECORDS_TIMEOUT: Duration = Duration::from_secs(5);
/// How many of them may be read at a time.
const READS_MAX: usize = 8;
/// How exactly the start of a process and the change of a file are known.
const EXACT_TO_SECONDS: UnixSeconds = 2;
/// In which the kernel counts for its users, on every machine that Rust runs on.
const TICKS_PER_SECOND: i64 = 100;

#[derive(Deserialize)]
#[serde(default)]
struct Config {
    /// Below which runsc keeps its records (its `--root`).
    roots: Vec<PathBuf>,
    /// Where runsc is installed.
    runsc_paths: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        let roots = ["/run/runsc", "/run/containerd/runsc", "/run/docker"].map(PathBuf::from);
        let runsc_paths = ["/usr/local/bin/runsc", "/usr/bin/runsc", "/usr/sbin/runsc"].map(str::to_owned);
        Self { roots: roots.into(), runsc_paths: runsc_paths.into() }
    }
}

/// The attestor.
pub struct Gvisor {
    config: Config,
    host: Host,
    clock: Arc<dyn Clock>,
    /// Reads of records: on a file system that does not answer they go on after who asked has given up.
    reads: Arc<Semaphore>,
}

/// What a process of runsc's says of itself, which anybody could.
#[derive(Clone, Debug, PartialEq)]
struct Claim {
    /// The sandbox itself, not the gofer of one container.
    is_sandbox: bool,
    root: PathBuf,
    container: String,
}

/// What runsc has on record for a container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    id: String,
    status: String,
    #[serde(default)]
    gofer_pid: i32,
    sandbox: Option<Sandbox>,
    #[serde(default)]
    spec: Spec,
}

#[derive(Debug, Deserialize)]
struct Sandbox {
    id: String,
    #[serde(default)]
    pid: i32,
}

#[derive(Debug, Default, Deserialize)]
struct Spec {
    /// `null` when there are none.
    annotations: Option<BTreeMap<String, String>>,
}

impl Gvisor {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "gvisor";

    /// With `roots` (the folders below which runsc keeps its records) and `runsc_paths` (where it is installed).
    ///
    /// # Errors
    /// When a value has the wrong type.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        let (host, reads) = (Host::look(), Arc::new(Semaphore::new(READS_MAX)));
        Ok(Self { config: decode(data)?, host, clock: context.clock.clone(), reads })
    }

    /// Whether runsc's own record bears the claim out; what it says then.
    async fn prove(&self, claim: Claim, peer: &Peer<'_>) -> Result<Vec<String>, String> {
        let status = process::status(peer.proc_dir).map_err(|e| format!("failed to get process: {e}"))?;
        let owner = Owner::of(&status).map_err(|e| e.to_string())?.uid;
        let read = tokio::time::timeout(RECORDS_TIMEOUT, self.read(&claim, owner)).await;
        let (state, changed) = read.map_err(|_| "runsc's records cannot be read in time")??;
        let sandbox = state.sandbox.as_ref().ok_or("the container has no sandbox")?;
        let recorded = if claim.is_sandbox { sandbox.pid } else { state.gofer_pid };
        if state.id != claim.container || recorded != peer.pid {
            return Err(format!("runsc has process {recorded} on record for it"));
        }
        if !matches!(state.status.as_str(), "creating" | "created" | "running" | "paused") {
            return Err(format!("runsc has it on record as {:?}", state.status));
        }
        // A record may outlive its processes, and their numbers are given out again. Then the process is neither runsc, nor as
        // old as the record. One is enough: runsc may have been upgraded since, or the clock been set.
        if !self.is_runsc(peer.proc_dir).await && self.started(peer.proc_dir)? > changed + EXACT_TO_SECONDS {
            return Err("the process is younger than runsc's record, and is not runsc".to_owned());
        }
        let mut values = vec![format!("sandbox_id:{}", sandbox.id)];
        if !claim.is_sandbox {
            values.push(format!("container_id:{}", state.id));
            let annotations = state.spec.annotations.into_iter().flatten();
            values.extend(annotations.map(|(key, value)| format!("annotation:{key}:{value}")));
        }
        Ok(values)
    }

    /// The container's record, read on a thread that may wait.
    async fn read(&self, claim: &Claim, owner: u32) -> Result<(State, UnixSeconds), String> {
        let permit = self.reads.clone().acquire_owned().await.map_err(|e| e.to_string())?;
        let (claim, roots) = (claim.clone(), self.config.roots.clone());
        let read = move || {
            let read = root_of(&claim.root, &roots).and_then(|root| read_state(&root, &claim.container, owner));
            drop(permit);
            read
        };
        tokio::task::spawn_blocking(read).await.map_err(|e| e.to_string())?
    }

    async fn is_runsc(&self, folder: BorrowedFd<'_>) -> bool {
        let Ok(mut program) = Program::of(folder) else { return false };
        for path in &self.config.runsc_paths {
            program.path.clone_from(path);
            if self.host.has(&program).await {
                return true;
            }
        }
        false
    }

    /// When the process was started, as far as the clock is right.
    fn started(&self, folder: BorrowedFd<'_>) -> Result<UnixSeconds, String> {
        let stat = process::read(folder, "stat", 4096, |_| false).map_err(|e| format!("failed to get process: {e}"))?;
        let uptime = std::fs::read_to_string("/proc/uptime").map_err(|e| format!("/proc/uptime: {e}"))?;
        let uptime: Option<i64> = uptime.split('.').next().and_then(|seconds| seconds.parse().ok());
        let (ticks, uptime) = (start_ticks(&stat).ok_or("/proc/PID/stat is malformed")?, uptime.unwrap_or_default());
        Ok(self.clock.now() - uptime + ticks / TICKS_PER_SECOND)
    }
}

/// The 22nd field. The second is the name in parentheses, which the process chooses.
fn start_ticks(stat: &[u8]) -> Option<i64> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The folder with the records, if it is one that we were told to believe. It is named by who calls, so nobody looks at what
/// is elsewhere: a look may hang.
fn root_of(claimed: &Path, known: &[PathBuf]) -> Result<PathBuf, String> {
    let unknown = || {
        let root = claimed.display();
        format!("its records are in {root}, which is in none of the folders that the attestor's key \"roots\" names")
    };
    let real: Vec<PathBuf> = known.iter().filter_map(|known| known.canonicalize().ok()).collect();
    let within = |path: &Path| known.iter().chain(&real).any(|known| path.starts_with(known));
    // Docker's is there, by its other name.
    let other_name = claimed.strip_prefix("/var/run").map(|rest| Path::new("/run").join(rest));
    let is_plain = !claimed.components().any(|part| part == Component::ParentDir);
    if !is_plain || !(within(claimed) || other_name.is_ok_and(|path| within(&path))) {
        return Err(unknown());
    }
    let root = claimed.canonicalize().map_err(|_| unknown())?;
    if real.iter().any(|known| root.starts_with(known)) { Ok(root) } else { Err(unknown()) }
}

/// Whether a process with this command line says that it is runsc's; with which part of it.
fn is_sandbox(command: &[u8]) -> Option<bool> {
    match command.split(|b| *b == 0).next()? {
        b"runsc-gofer" => Some(false),
        b"runsc-sandbox" => Some(true),
        _ => None,
    }
}

/// What the process says it is; `None` when it does not say that it is runsc's.
fn claim(folder: BorrowedFd<'_>) -> Option<Claim> {
    let command = process::read(folder, "cmdline", COMMAND_BYTES_MAX, |_| false).ok()?;
    let is_sandbox = is_sandbox(&command)?;
    let command = String::from_utf8_lossy(&command);
    let arguments = || command.trim_end_matches('\0').split('\0').skip(1);
    let root = arguments().find_map(|a| a.strip_prefix("--root=").or_else(|| a.strip_prefix("-root=")));
    let container = arguments().last().unwrap_or_default().to_owned();
    Some(Claim { is_sandbox, root: root.unwrap_or("/run/runsc").into(), container })
}

/// The record of a container, and when it was last changed. Folder and file must be whose process it is, and nobody else's to write.
fn read_state(root: &Path, container: &str, owner: u32) -> Result<(State, UnixSeconds), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if container.is_empty() || !container.chars().all(allowed) {
        return Err("it has no container's name".to_owned());
    }
    let failed = |what: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", what.display());
    let trusted = |what: &Path, of: &Metadata| {
        let good = of.uid() == owner && of.mode() & 0o022 == 0;
        if good { Ok(()) } else { Err(failed(what, &"others than the process's user may write it")) }
    };
    trusted(root, &root.metadata().map_err(|e| failed(root, &e))?)?;
    let prefix = format!("{container}_sandbox:");
    let is_it = |name: &str| name.starts_with(&prefix) && name.ends_with(".state");
    let names = root.read_dir().map_err(|e| failed(root, &e))?.take(ENTRIES_MAX).flatten();
    let mut found = names.filter(|entry| entry.file_name().to_str().is_some_and(is_it));
    let (Some(entry), None) = (found.next(), found.next()) else {
        return Err(format!("runsc has not exactly one record of it in {}", root.display()));
    };
    let path = entry.path();
    let mut looks = 0;
    loop {
        looks += 1;
        let file = std::fs::File::open(&path).map_err(|e| failed(&path, &e))?;
        let metadata = file.metadata().map_err(|e| failed(&path, &e))?;
        trusted(&path, &metadata)?;
        let mut content = Vec::new();
        file.take(STATE_BYTES_MAX).read_to_end(&mut content).map_err(|e| failed(&path, &e))?;
        match serde_json::from_slice(&content) {
            Ok(state) => return Ok((state, metadata.mtime())),
            // runsc writes it in place: it may be half written.
            Err(_) if looks < LOOKS_MAX => std::thread::sleep(LOOK_AGAIN_AFTER),
            Err(error) => return Err(failed(&path, &error)),
        }
    }
}

#[async_trait]
impl WorkloadAttestor for Gvisor {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        // Who is not of gVisor has no selectors, which is no failure.
        let Some(claim) = claim(peer.proc_dir) else { return Ok(Vec::new()) };
        let about = format!("gVisor container {:?}", claim.container);
        let values = self.prove(claim, peer).await;
        Ok(prefixed_selectors(Self::NAME, values.map_err(|e| PluginError::internal(format!("{about}: {e}")))?))
    }
}

/// Keeps the `unix` attestor, where there is a `gvisor` one as well, from stating of a sandboxed workload what is only true of the
/// process that runsc runs for it: that it is root, and runsc.
pub fn fence(attestors: Vec<Arc<dyn WorkloadAttestor>>) -> Vec<Arc<dyn WorkloadAttestor>> {
    if !attestors.iter().any(|attestor| attestor.name() == Gvisor::NAME) {
        return attestors;
    }
    let fenced = |attestor: Arc<dyn WorkloadAttestor>| match attestor.name() {
        super::Unix::NAME => Arc::new(Fenced(attestor)) as Arc<dyn WorkloadAttestor>,
        _ => attestor,
    };
    attestors.into_iter().map(fenced).collect()
}

struct Fenced(Arc<dyn WorkloadAttestor>);

#[async_trait]
impl WorkloadAttestor for Fenced {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        // By the claim alone: a gofer's is runsc's, and who makes it without being one only loses his own selectors.
        let command = process::read(peer.proc_dir, "cmdline", COMMAND_BYTES_MAX, |read| read.contains(&0));
        let command = command.map_err(|e| PluginError::internal(format!("failed to get process: {e}")))?;
        if is_sandbox(&command).is_some() { Ok(Vec::new()) } else { self.0.attest(peer).await }
    }

    async fn attest_reference(&self, reference: &Reference<'_>) -> Result<Option<Vec<Selector>>, PluginError> {
        self.0.attest_reference(reference).await
    }
}

#[cfg(test)]
#[path = "gvisor_tests.rs"]
mod tests;
