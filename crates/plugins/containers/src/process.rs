//! Where a process runs, read through its open `/proc/PID`: never another process's that got the number later.
//!
//! Its cgroups tell, and nothing else. SPIRE also looks at the mounts of a process whose cgroups name no container; but a
//! process can make itself mounts of another container's cgroup, and the kernel shows both by the same paths.

use crate::cgroup::LocateError;
use finial_core::ErrorKind;
use finial_plugin::{Peer, PluginError};
use rustix::fs::{Mode, OFlags, openat};
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

/// The most of `/proc/PID/cgroup` that is read: each of some fifteen hierarchies has a path of at most 4096 bytes.
const CGROUP_BYTES_MAX: u64 = 256 << 10;

/// The text of the process's `/proc/PID/cgroup`.
pub(crate) fn cgroups(peer: &Peer<'_>) -> Result<String, PluginError> {
    read(peer.proc_dir, "cgroup").map_err(|e| {
        let gone = PluginError::new(ErrorKind::NotFound, format!("unable to obtain cgroups: {e}"));
        gone.because(format!("reading /proc/{}/cgroup", peer.pid))
    })
}

/// The cgroups of the process with that number, if there is one: of a container's first process, as its engine names it.
pub(crate) fn cgroups_of(pid: i32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()
}

/// The agent's own cgroups; none, if they cannot be read.
pub(crate) fn own_cgroups() -> String {
    std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// As SPIRE reports it.
pub(crate) fn locate_error(error: LocateError) -> PluginError {
    let kind = match error {
        LocateError::Line { .. } => ErrorKind::Internal,
        _ => ErrorKind::FailedPrecondition,
    };
    PluginError::new(kind, error.to_string())
}

fn read(folder: BorrowedFd<'_>, name: &str) -> Result<String, String> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| e.to_string())?;
    let mut text = Vec::with_capacity(1024);
    File::from(file).take(CGROUP_BYTES_MAX).read_to_end(&mut text).map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
