use finial_plugin::{Peer, WorkloadAttestor};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Broken runs end here.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// A folder, open as a process's `/proc/PID` is held.
pub(super) fn open_folder(path: &Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("opens")
}

/// A process with its `/proc` folder, ended when dropped.
pub(super) struct Sleeper(pub(super) Child, pub(super) OwnedFd);

impl Sleeper {
    /// `command 600`.
    pub(super) fn start(command: &mut Command) -> Self {
        Self::of(command.arg("600"))
    }

    /// The command as it is.
    pub(super) fn of(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("starts");
        let proc_dir = open_folder(Path::new(&format!("/proc/{}", child.id())));
        Self(child, proc_dir)
    }

    pub(super) fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    pub(super) fn peer(&self) -> Peer<'_> {
        Peer { pid: self.pid(), proc_dir: self.1.as_fd() }
    }

    /// Its descendant that runs a program of this name, as soon as there is one.
    pub(super) fn descendant(&self, program: &str) -> Relative {
        eventually(&format!("a descendant that runs {program}"), || {
            descendants(self.pid()).into_iter().find_map(|pid| {
                let exe = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
                (exe.file_name()?.to_str()? == program).then(|| Relative::of(pid))
            })
        })
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that something else started, ended when dropped.
pub(super) struct Relative {
    pub(super) pid: i32,
    folder: OwnedFd,
    pidfd: OwnedFd,
}

impl Relative {
    pub(super) fn of(pid: i32) -> Self {
        let number = rustix::process::Pid::from_raw(pid).expect("a pid");
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).expect("is there");
        Self { pid, folder: open_folder(Path::new(&format!("/proc/{pid}"))), pidfd }
    }

    pub(super) fn peer(&self) -> Peer<'_> {
        Peer { pid: self.pid, proc_dir: self.folder.as_fd() }
    }
}

impl Drop for Relative {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        eventually("it ends", || (!super::process::is_alive(&self.pidfd)).then_some(()));
    }
}

/// All processes below this one.
fn descendants(pid: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<i32> = children.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let mut all = children.clone();
    all.extend(children.into_iter().flat_map(descendants));
    all
}

/// Asks again until there is a value.
#[track_caller]
pub(super) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

/// The values of what the attestor says, which are all of its own type.
pub(super) async fn values(attestor: &dyn WorkloadAttestor, peer: &Peer<'_>) -> BTreeSet<String> {
    let selectors = attestor.attest(peer).await.expect("attests");
    assert!(selectors.iter().all(|s| s.kind == attestor.name()));
    selectors.into_iter().map(|s| s.value).collect()
}

/// Whether a part of the machine that a test needs is there. Where all parts are promised (`./test` and CI), a missing one is a
/// failure; elsewhere the test is skipped, loudly.
#[track_caller]
pub(super) fn there(what: &str, is: bool) -> bool {
    let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(is || !promised, "{what} is missing");
    if !is {
        eprintln!("SKIPPED: {what} is missing");
    }
    is
}

/// Whether there is a program of this name.
#[track_caller]
pub(super) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    there(program, std::env::split_paths(&path).any(|folder| folder.join(program).exists()))
}
