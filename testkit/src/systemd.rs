//! A D-Bus of a test's own with the interface of systemd's manager behind it: a real dbus-daemon, and a stand-in for the manager.

use crate::process::{Workdir, eventually, stands_still};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=SOCKET</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy></busconfig>"#;

/// The interpreter that has the distribution's D-Bus module.
const PYTHON: &str = "/usr/bin/python3";

/// A process that ends with its value.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bus. Each process belongs to the unit that is called as its program.
pub struct SystemBus {
    folder: Workdir,
    daemon: Option<Guard>,
    manager: Option<Guard>,
}

impl SystemBus {
    /// With a manager that is `good`, lets everybody wait (`hang`), or lies (`number`, `huge`). `None` where there is no D-Bus,
    /// which is said loudly, and is a failure where it is promised.
    pub fn start(manager: &str) -> Option<Self> {
        let runs = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        };
        if !runs("dbus-daemon", &["--version"]) || !runs(PYTHON, &["-c", "import dbus, gi"]) {
            let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
            assert!(!promised, "dbus, python3-dbus or python3-gi is missing");
            eprintln!("SKIPPED: dbus, python3-dbus or python3-gi is missing");
            return None;
        }
        let mut bus = Self { folder: Workdir::new(), daemon: None, manager: None };
        bus.folder.write("bus.conf", &CONFIG.replace("SOCKET", bus.socket().to_str()?));
        bus.begin(manager);
        Some(bus)
    }

    /// Starts bus and manager, after [`SystemBus::end`].
    pub fn begin(&mut self, manager: &str) {
        let config = self.folder.path().join("bus.conf");
        let mut daemon = Command::new("dbus-daemon");
        daemon.arg(format!("--config-file={}", config.display())).args(["--nofork", "--nopidfile"]);
        self.daemon = Some(Guard(daemon.stderr(Stdio::null()).spawn().expect("starts")));
        eventually("the bus is there", || UnixStream::connect(self.socket()).map_err(|e| e.to_string()));
        self.manage(Some(manager));
    }

    /// Another manager instead of the one that is there, or none.
    pub fn manage(&mut self, manager: Option<&str>) {
        self.manager = None;
        let Some(manager) = manager else { return };
        let mut command = Command::new(PYTHON);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("data/systemd_manager.py")).arg(manager);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.address()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("starts");
        let mut line = String::new();
        let said = BufReader::new(child.stdout.take().expect("is piped")).read_line(&mut line);
        self.manager = Some(Guard(child));
        assert_eq!((said.is_ok(), line.trim()), (true, "ready"), "the manager is on the bus");
    }

    /// Ends both.
    pub fn end(&mut self) {
        (self.manager, self.daemon) = (None, None);
        let _ = std::fs::remove_file(self.socket());
    }

    /// Stops the bus, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        let daemon = self.daemon.as_ref().expect("the bus runs");
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        let pid = Pid::from_child(&daemon.0);
        kill_process(pid, signal).expect("signals");
        if frozen {
            stands_still(pid.as_raw_pid());
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("bus")
    }

    /// As `DBUS_SYSTEM_BUS_ADDRESS` says it.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket().display())
    }
}
