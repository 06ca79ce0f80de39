//! Which process is at the other end of a unix socket, and whether it still is.
//!
//! `SO_PEERCRED` gives the pid of the process that connected. A pid alone is no identity: the process may end and the
//! kernel may give its number to another one, also to one that an attacker starts for this purpose. So the process is
//! held by a pidfd, which never means another process, and everything that is read about it is read through a file
//! descriptor of its `/proc` folder that was opened while the pidfd said that the process lived.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::UnixStream;

/// Why the process at the other end cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It ended between `connect` and now, or another process has its pid.
    #[error("the peer process (pid {0}) has ended")]
    Gone(i32),
    /// It lives in a pid namespace that this process cannot see.
    #[error("the peer process is not visible from this pid namespace")]
    NotVisible,
    /// The kernel does not tell who it is.
    #[error("SO_PEERCRED: {0}")]
    Credentials(std::io::Error),
    /// The kernel refused.
    #[error("{0}: {1}")]
    Kernel(&'static str, Errno),
}

/// A local process that has connected: what the kernel said about it at that moment, and a hold on it.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Its process ID in our pid namespace.
    pub pid: i32,
    /// Its effective user ID when it connected.
    pub uid: u32,
    /// Its effective group ID when it connected.
    pub gid: u32,
    /// The hold.
    pub handle: Arc<PeerHandle>,
}

/// A hold on a process. It costs two file descriptors until dropped.
pub struct PeerHandle {
    pidfd: OwnedFd,
    proc_dir: OwnedFd,
}

impl PeerInfo {
    /// Asks the kernel who is at the other end of `socket`.
    pub fn of(socket: &UnixStream) -> Result<Self, PeerError> {
        let credentials = socket.peer_cred().map_err(PeerError::Credentials)?;
        // A process outside our pid namespace has the number 0.
        let pid = credentials.pid().and_then(Pid::from_raw).ok_or(PeerError::NotVisible)?;
        let handle = Arc::new(PeerHandle::of(socket.as_fd(), pid, credentials.uid())?);
        Ok(Self { pid: pid.as_raw_nonzero().get(), uid: credentials.uid(), gid: credentials.gid(), handle })
    }

    /// A process that somebody else names by its number. Whether that is the one that is meant, only they know.
    pub fn of_pid(pid: i32) -> Result<Self, PeerError> {
        let raw = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw).ok_or(PeerError::Gone(pid))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(failed(raw, "pidfd_open"))?;
        let handle = PeerHandle::held_by(pidfd, raw)?;
        let ids = |what| handle.effective_id(what).ok_or(PeerError::Gone(pid));
        Ok(Self { pid, uid: ids("Uid:")?, gid: ids("Gid:")?, handle: Arc::new(handle) })
    }
}

impl PeerHandle {
    fn of(socket: BorrowedFd<'_>, pid: Pid, uid: u32) -> Result<Self, PeerError> {
        match peer_pidfd(socket) {
            Some(pidfd) => Self::held_by(pidfd.map_err(failed(pid, "SO_PEERPIDFD"))?, pid),
            None => Self::by_number(pid, uid),
        }
    }

    /// Kernels before 6.5 do not hand out the pidfd of a peer; one opened by number leaves a window since `connect`, in
    /// which the number can change hands. Such a hold is only good when the process at least runs as who connected:
    /// nobody gets at another user's identities through that window.
    fn by_number(pid: Pid, uid: u32) -> Result<Self, PeerError> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed(pid, "pidfd_open"))?;
        let handle = Self::held_by(pidfd, pid)?;
        if handle.effective_id("Uid:") != Some(uid) {
            return Err(PeerError::Gone(pid.as_raw_nonzero().get()));
        }
        Ok(handle)
    }

    fn held_by(pidfd: OwnedFd, pid: Pid) -> Result<Self, PeerError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{}", pid.as_raw_nonzero());
        let proc_dir = open(path, flags, Mode::empty()).map_err(failed(pid, "open /proc"))?;
        let handle = Self { pidfd, proc_dir };
        // Only now is it certain that the folder is this process's and not a later one's.
        if handle.is_alive() { Ok(handle) } else { Err(PeerError::Gone(pid.as_raw_nonzero().get())) }
    }

    fn effective_id(&self, line: &str) -> Option<u32> {
        let status = openat(&self.proc_dir, "status", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let text = std::io::read_to_string(std::fs::File::from(status)).ok()?;
        text.lines().find_map(|l| l.strip_prefix(line))?.split_whitespace().nth(1)?.parse().ok()
    }

    /// Whether the process still runs. A pidfd becomes readable when its process ends.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Its folder in `/proc`, for `openat` and the like. They fail with `ESRCH` once the process has ended.
    pub fn proc_dir(&self) -> BorrowedFd<'_> {
        self.proc_dir.as_fd()
    }

    /// The pidfd, for waiting: it becomes readable when the process ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl fmt::Debug for PeerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerHandle")
    }
}

/// `ESRCH` and a missing folder mean that there is no such process any more.
fn failed(pid: Pid, call: &'static str) -> impl Fn(Errno) -> PeerError {
    move |error| match error {
        Errno::SRCH | Errno::NOENT => PeerError::Gone(pid.as_raw_nonzero().get()),
        other => PeerError::Kernel(call, other),
    }
}

/// `SO_PEERPIDFD`: a pidfd of exactly the process that connected. `None` when the kernel is too old for it.
fn peer_pidfd(socket: BorrowedFd<'_>) -> Option<Result<OwnedFd, Errno>> {
    static KERNEL_LACKS_IT: AtomicBool = AtomicBool::new(false);
    if KERNEL_LACKS_IT.load(Ordering::Relaxed) {
        return None;
    }
    match getsockopt_fd(socket, libc::SO_PEERPIDFD) {
        Err(Errno::NOPROTOOPT) => {
            KERNEL_LACKS_IT.store(true, Ordering::Relaxed);
            None
        }
        // What kernels up to 6.15 say when the process has been reaped already.
        Err(Errno::INVAL) => Some(Err(Errno::SRCH)),
        other => Some(other),
    }
}

/// Reads a socket option whose value is a new file descriptor. rustix does not know `SO_PEERPIDFD`.
#[allow(unsafe_code)]
fn getsockopt_fd(socket: BorrowedFd<'_>, option: libc::c_int) -> Result<OwnedFd, Errno> {
    use rustix::fd::{AsRawFd, FromRawFd};
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` and `len` live through the call and `len` is the size of `fd`. On success the kernel has installed a
    // descriptor of ours that nobody else knows, so it may be owned here.
    unsafe {
        let to = (&raw mut fd).cast::<libc::c_void>();
        if libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, to, &raw mut len) != 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_found_by_number_must_run_as_who_connected() {
        let pid = rustix::process::getpid();
        let uid = rustix::process::geteuid().as_raw();
        assert!(PeerHandle::by_number(pid, uid).unwrap().is_alive());
        assert!(matches!(PeerHandle::by_number(pid, uid + 1), Err(PeerError::Gone(_))));
    }

    #[test]
    fn no_such_process() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        child.wait().unwrap();
        assert!(matches!(PeerHandle::by_number(pid, 0), Err(PeerError::Gone(_))));
        for raw in [pid.as_raw_nonzero().get(), 0, -1, i32::MIN] {
            assert!(matches!(PeerInfo::of_pid(raw), Err(PeerError::Gone(_))), "{raw}");
        }
        let own = PeerInfo::of_pid(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
        assert_eq!((own.uid, own.gid), (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
    }
}
