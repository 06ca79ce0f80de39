//! Where a process runs, read through its open `/proc/PID`: never another process's that got the number later.

use crate::cgroup::{self, LocateError};
use finial_core::ErrorKind;
use finial_plugin::{Peer, PluginError};
use rustix::fs::{Mode, OFlags, openat};
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

/// The most of `/proc/PID/cgroup` that is read: each of some fifteen hierarchies has a path of at most 4096 bytes.
const CGROUP_BYTES_MAX: u64 = 256 << 10;
/// The most of `/proc/self/mountinfo` that is read.
const MOUNTS_BYTES_MAX: u64 = 16 << 20;

/// The text of the process's `/proc/PID/cgroup`.
pub(crate) fn cgroups(peer: &Peer<'_>) -> Result<String, PluginError> {
    read(peer.proc_dir, "cgroup", CGROUP_BYTES_MAX).map_err(|e| {
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

/// The paths in which to look for the process's container.
///
/// From inside a container the kernel shows cgroups relative to it: a process that shares the agent's container is at `/`.
/// Its container is then the agent's, which the agent's own mounts tell. SPIRE reads the *process's* mounts there, and
/// whenever its cgroup tells nothing; but a process can make itself mounts of another container's cgroup.
pub(crate) fn container_paths(cgroups: &str) -> Result<Vec<String>, PluginError> {
    let paths = cgroup::paths(cgroups).map_err(locate_error)?;
    if paths.is_empty() || paths.iter().any(|path| *path != "/") {
        return Ok(paths.into_iter().map(str::to_owned).collect());
    }
    let mounts = File::open("/proc/self").map_err(|e| e.to_string());
    let mounts = mounts.and_then(|own| read(std::os::fd::AsFd::as_fd(&own), "mountinfo", MOUNTS_BYTES_MAX));
    let mounts = mounts.map_err(|e| PluginError::internal(format!("failed to read own mounts: {e}")))?;
    Ok(cgroup_mounts(&mounts))
}

/// What of the cgroup file systems is mounted: the fourth field, where the first after the lone dash is `cgroup` or `cgroup2`.
fn cgroup_mounts(mountinfo: &str) -> Vec<String> {
    let root = |line: &str| {
        let (place, file_system) = line.split_once(" - ")?;
        let is_cgroup = matches!(file_system.split(' ').next(), Some("cgroup" | "cgroup2"));
        is_cgroup.then(|| place.split(' ').nth(3).map(str::to_owned)).flatten()
    };
    mountinfo.lines().filter_map(root).collect()
}

/// As SPIRE reports it.
pub(crate) fn locate_error(error: LocateError) -> PluginError {
    let kind = match error {
        LocateError::Line { .. } => ErrorKind::Internal,
        _ => ErrorKind::FailedPrecondition,
    };
    PluginError::new(kind, error.to_string())
}

fn read(folder: BorrowedFd<'_>, name: &str, limit: u64) -> Result<String, String> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| e.to_string())?;
    let mut text = Vec::with_capacity(1024);
    File::from(file).take(limit).read_to_end(&mut text).map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cgroup_mounts_count() {
        let mounts = "24 30 0:22 / /proc rw shared:1 - proc proc rw\n\
                      31 23 0:26 /kubepods/podX/abc /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n\
                      119 206 0:68 / /local rw,relatime - tmpfs  rw,size=8192k\n\
                      40 31 0:33 /a\\040b /sys/fs/cgroup/cpu rw master:9 - cgroup cgroup rw,cpu\n\
                      nonsense\n";
        assert_eq!(cgroup_mounts(mounts), ["/kubepods/podX/abc", "/a\\040b"]);
    }

    #[test]
    fn a_process_at_the_root_is_looked_up_by_our_own_mounts() {
        let paths = container_paths("12:cpu:/docker/x\n0::/\n").unwrap();
        assert_eq!(paths, ["/docker/x", "/"]);
        // Whatever our own mounts say: they are not read from the process.
        let own = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(container_paths("1:name=systemd:/\n0::/\n").unwrap(), cgroup_mounts(&own));
    }
}
