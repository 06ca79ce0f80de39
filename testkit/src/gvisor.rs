//! Real gVisor: `runsc` as `tests/gvisor/build.sh` leaves it in the cache folder.

use crate::process::{Output, Process, Workdir, cache, eventually};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A `runsc` with records of its own. It ends what it started when it is dropped.
pub struct Runsc {
    program: PathBuf,
    root: Workdir,
}

impl Runsc {
    /// One that can be used; `None` where gVisor cannot be had, which is said loudly, and is a failure where it is promised.
    pub fn find() -> Option<Self> {
        let program = cache().join("runsc-20260905/runsc");
        let problem = match (program.exists(), rustix::process::geteuid().is_root()) {
            (true, true) => return Some(Self { program, root: Workdir::new() }),
            (false, _) => format!("{} is missing: run tests/gvisor/build.sh", program.display()),
            (_, false) => "runsc needs root".to_owned(),
        };
        let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
        assert!(!promised, "{problem}");
        eprintln!("SKIPPED: {problem}");
        None
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where it keeps its records.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.root());
        command.args([
            "--platform=systrap",
            "--network=none",
            "--ignore-cgroups",
            "--overlay2=none",
            "--host-uds=open",
        ]);
        command
    }

    /// A container that does nothing, with this machine's files as its own, sockets among them. It runs when this returns.
    pub fn run(&self, name: &str, annotations: &[(&str, &str)]) -> Container<'_> {
        let bundle = self.root.sub(&format!("bundle-{name}"));
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        let config = serde_json::json!({
            "ociVersion": "1.0.0",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["/bin/sleep", "1000"], "cwd": "/",
                "env": ["PATH=/usr/bin:/bin", "HOME=/"], "noNewPrivileges": true, "capabilities": {},
            },
            "root": {"path": "/", "readonly": true},
            "hostname": name,
            "annotations": annotations,
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
            ]},
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("writes");
        let log = self.root.path().join(format!("{name}.log"));
        let process = Process::start("runsc", log, self.command().args(["run", "-bundle"]).arg(&bundle).arg(name));
        let mut container = Container { runsc: self, name: name.to_owned(), process };
        eventually("the container runs", || {
            assert_eq!(container.process.ended(), None, "runsc ended:\n{}", container.process.log());
            let state = Output::of(self.command().args(["state", name]));
            if state.stdout.contains("\"running\"") { Ok(()) } else { Err(format!("{}{}", state.stdout, state.stderr)) }
        });
        container
    }

    /// What it has on record for a container.
    pub fn record(&self, name: &str) -> PathBuf {
        self.root().join(format!("{name}_sandbox:{name}.state"))
    }
}

impl Drop for Runsc {
    fn drop(&mut self) {
        // A mount that runsc leaves there.
        let _ = Output::of(Command::new("umount").arg(self.root().join("null-netns")));
    }
}

/// A container of gVisor's with a sandbox of its own.
pub struct Container<'a> {
    runsc: &'a Runsc,
    name: String,
    process: Process,
}

impl Container<'_> {
    /// Runs a command inside.
    pub fn exec(&self, command: &[&str]) -> Output {
        Output::of(self.runsc.command().args(["exec", &self.name]).args(command))
    }

    /// The numbers of its gofer and its sandbox on this machine.
    pub fn processes(&self) -> (i32, i32) {
        let record = std::fs::read(self.runsc.record(&self.name)).expect("a record");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
        let number = |value: &serde_json::Value| i32::try_from(value.as_i64().expect("a number")).expect("a pid");
        (number(&record["goferPid"]), number(&record["sandbox"]["pid"]))
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = Output::of(self.runsc.command().args(["delete", "-force", &self.name]));
        self.process.kill();
    }
}
