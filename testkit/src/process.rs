//! Processes, folders, ports and waiting.

use rustix::process::Signal;
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up on it: generous, since it only ends broken runs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// Lower ones have names.
const PORTS_FROM: u16 = 15_000;

/// A folder of the test's own, removed at its end.
pub struct Workdir(tempfile::TempDir);

impl Workdir {
    /// Makes a new one. Its path is short: unix socket paths may have at most 107 bytes.
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("fin").tempdir().expect("a temporary folder"))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes (if it is not there) a folder in it.
    pub fn sub(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    }

    /// Writes a file in it and gives its path.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }
}

impl Default for Workdir {
    fn default() -> Self {
        Self::new()
    }
}

/// A TCP port on loopback that nobody listens on. It is none of those that the kernel gives to whoever asks for any, such as
/// connections: so nobody has it before the one that it is meant for, not even while a server on it is restarted.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU64> = OnceLock::new();
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let given_from = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    let ports = if given_from > PORTS_FROM + 1_000 { PORTS_FROM..given_from } else { 61_000..65_535 };
    // Other test processes begin elsewhere.
    let next = NEXT.get_or_init(|| AtomicU64::new(RandomState::new().hash_one(std::process::id()) >> 1));
    let listens = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (0..ports.len() as u64)
        .map(|_| ports.start + (next.fetch_add(1, Ordering::Relaxed) % ports.len() as u64) as u16)
        .find(listens)
        .expect("a free port")
}

/// Asks again until `probe` gives a value; panics with `what` and its last complaint when the deadline has passed.
#[track_caller]
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Result<T, String>) -> T {
    eventually_within(DEADLINE, what, probe)
}

/// [`eventually`] with a deadline of one's own, for what takes its time by design.
#[track_caller]
pub fn eventually_within<T>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(why) if Instant::now() > end => panic!("{what}: not within {deadline:?}: {why}"),
            Err(_) => std::thread::sleep(POLL), // between two questions to a real process
        }
    }
}

/// What a finished command said.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Runs a command to its end (at most the deadline).
    pub fn of(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut err = child.stderr.take().expect("piped");
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = err.read_to_end(&mut text);
            text
        });
        let mut out = child.stdout.take().expect("piped");
        let out = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = out.read_to_end(&mut text);
            text
        });
        let end = Instant::now() + DEADLINE * 3;
        let status = loop {
            match child.try_wait().expect("wait") {
                Some(status) => break status,
                None if Instant::now() > end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!("{what}: still running after {:?}", DEADLINE * 3);
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let text = |handle: std::thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&handle.join().expect("reader")).into_owned()
        };
        Self { code: status.code().unwrap_or(-1), stdout: text(out), stderr: text(reader) }
    }

    /// The output, or a panic with all that was said unless the exit code was 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// A process in the background with its output in a log file.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    stop: Signal,
}

impl Process {
    /// Starts it; standard output and error both go to `log`.
    pub fn start(name: &str, log: PathBuf, command: &mut Command) -> Self {
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a log file"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|e| panic!("{name}: {command:?}: {e}"));
        Self { name: name.to_owned(), child, log, stop: Signal::TERM }
    }

    /// Ends by another signal than SIGTERM when it is dropped.
    pub(crate) fn stopped_by(mut self, stop: Signal) -> Self {
        self.stop = stop;
        self
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The lines of that which are JSON.
    pub fn events(&self) -> Vec<serde_json::Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The exit code, if it has ended.
    pub fn ended(&mut self) -> Option<i32> {
        self.child.try_wait().expect("wait").map(|s| s.code().unwrap_or(-1))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> i32 {
        let name = self.name.clone();
        eventually(&format!("{name} ends"), || self.ended().ok_or_else(|| "still running".into()))
    }

    /// SIGTERM, then waits; the exit code.
    pub fn terminate(&mut self) -> i32 {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// SIGKILL, then waits.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends it a signal. After one that stops it, none of its threads runs any more.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
        if signal == Signal::STOP {
            stands_still(self.pid());
        }
    }
}

/// Waits until no thread of a process that was stopped runs any more: on another core, one goes on for a moment after the
/// signal, long enough to answer somebody.
pub(crate) fn stands_still(pid: i32) {
    eventually("its threads stand still", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
        for task in tasks.flatten() {
            let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
            // "pid (name) state …"; the name may have any characters.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if state != Some('T') {
                return Err(format!("{} is in state {state:?}", task.path().display()));
            }
        }
        Ok(())
    });
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- {} (last lines of its log)", self.name);
            tail.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
        if self.child.try_wait().ok().flatten().is_some() {
            return;
        }
        self.signal(self.stop);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if self.child.try_wait().ok().flatten().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
    }
}

/// The folder with what is built once: `FINIAL_CACHE`, or `~/.cache/finial`.
pub fn cache() -> PathBuf {
    match std::env::var_os("FINIAL_CACHE") {
        Some(path) => path.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/finial"),
    }
}

/// Finial's own binary: `FINIAL_BIN`, or the one beside this test in the target folder.
pub fn finial() -> PathBuf {
    if let Some(path) = std::env::var_os("FINIAL_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("the test's own path");
    let path = test.ancestors().nth(2).unwrap_or(Path::new("")).join("finial");
    assert!(path.exists(), "{} is missing: cargo build --workspace", path.display());
    path
}

pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    // Nothing of the caller's environment may lead a test to a socket that is not its own.
    for name in ["SPIRE_SERVER_PRIVATE_SOCKET", "SPIRE_AGENT_PUBLIC_SOCKET", "SPIFFE_ENDPOINT_SOCKET"] {
        command.env_remove(name);
    }
    command
}

/// The user that the tests run as.
pub fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_given_a_free_port_by_chance() {
        let ports: Vec<u16> = (0..100).map(|_| free_port()).collect();
        let by_chance: Vec<_> = (0..100).map(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap()).collect();
        let lowest = by_chance.iter().map(|l| l.local_addr().unwrap().port()).min().unwrap();
        let is_room = lowest > PORTS_FROM + 1_000;
        assert!(!is_room || *ports.iter().max().unwrap() < lowest, "below all that the kernel gives");
        let _held = TcpListener::bind(("127.0.0.1", ports[0])).unwrap();
        assert!(ports[1..].iter().all(|port| *port != ports[0]));
    }
}
