//! Processes of ours.

use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the kernel kill the child when we end, whatever ends us. (Linux counts the thread that starts the child as "us", so
/// it must be one that lives as long as the process: not one of those that run blocking work.)
#[allow(unsafe_code)]
pub fn dies_with_us(command: &mut Command) {
    let parent = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have ended before it asked.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: what runs between fork and exec makes two system calls and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

/// Tells when a child has ended, without waiting for it: until somebody does, its number is its own.
pub struct End(AsyncFd<OwnedFd>);

impl End {
    /// That of a child that nobody has waited for.
    ///
    /// # Errors
    /// When there are no files left, or the kernel is older than 5.3.
    #[allow(unsafe_code)]
    pub fn of(child: Pid) -> io::Result<Self> {
        let pidfd = pidfd_open(child, PidfdFlags::empty())?;
        // SAFETY: it stays the same open file until it is dropped, and nobody else has it.
        let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// Returns when it has ended.
    pub async fn reached(&self) {
        let _ = self.0.readable().await; // fails when the runtime ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::test_kill_process;
    use std::io::Read;
    use std::process::Stdio;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let (mut child, pid) = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("1000").stdout(Stdio::piped());
            dies_with_us(&mut command);
            let child = command.spawn().unwrap();
            let pid = Pid::from_child(&child);
            test_kill_process(pid).unwrap();
            (child, pid)
        })
        .join()
        .unwrap();
        // Its standard output ends when it does.
        child.stdout.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
        assert!(!child.wait().unwrap().success(), "{pid:?} was killed");
    }
}
