//! A daemon for tests, and processes that ask it.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};

pub(crate) use testkit::fake::{Act, Asked, Pki, tcp, unix};

/// A process of which the attestor believes what the test says: a folder in place of `/proc/PID`.
pub(crate) struct FakeProcess {
    folder: OwnedFd,
    _kept: tempfile::TempDir,
}

impl FakeProcess {
    pub(crate) fn in_cgroups(cgroups: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cgroup"), cgroups).unwrap();
        Self { folder: std::fs::File::open(folder.path()).unwrap().into(), _kept: folder }
    }

    pub(crate) fn peer(&self) -> finial_plugin::Peer<'_> {
        finial_plugin::Peer { pid: 1, proc_dir: self.folder.as_fd() }
    }
}

/// A child that does nothing, ended when dropped.
pub(crate) struct Sleeper(Child, OwnedFd);

impl Sleeper {
    pub(crate) fn start() -> Self {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let folder = std::fs::File::open(format!("/proc/{}", child.id())).unwrap();
        Self(child, folder.into())
    }

    pub(crate) fn peer(&self) -> finial_plugin::Peer<'_> {
        finial_plugin::Peer { pid: self.pid(), proc_dir: self.1.as_fd() }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.end();
    }
}
