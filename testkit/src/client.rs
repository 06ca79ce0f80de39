//! The client programs of `tests/clients`, one for each SPIFFE library.

use crate::process::{self, Output, Process, Workdir, eventually};
use crate::spire::Agent;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One of the client programs: `go`, `python`, `java` or `rust`.
#[derive(Clone, Copy, Debug)]
pub struct Client(pub &'static str);

impl Client {
    /// All of them.
    pub const ALL: [Self; 4] = [Self("go"), Self("python"), Self("java"), Self("rust")];

    /// The program's path.
    pub fn program(self) -> PathBuf {
        process::cache().join("clients").join(self.0)
    }

    fn command(self, socket: &Path) -> Command {
        let path = self.program();
        assert!(path.exists(), "{} is missing: run tests/clients/build.sh", path.display());
        let mut command = process::command(path);
        command.env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", socket.display()));
        command
    }

    /// Runs it to its end.
    pub fn run(self, agent: &Agent, args: &[&str]) -> Output {
        Output::of(self.command(&agent.socket()).args(args))
    }

    /// Runs it to its end, which must be a success, and gives the lines that it printed.
    #[track_caller]
    pub fn events(self, agent: &Agent, args: &[&str]) -> Vec<Value> {
        let out = self.run(agent, args).ok();
        out.stdout.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    /// Starts it as a service that lives on its SVIDs from an agent's socket (`live`, in Go only), with a log at `log`.
    pub fn live(self, socket: &Path, audience: &str, expected: &[String], log: PathBuf) -> Process {
        Process::start(self.0, log, self.command(socket).arg("live").arg(audience).args(expected))
    }

    /// Starts it as a service at `address` that calls its peers until the file `stop` is there (`mesh`, in Go only).
    pub fn mesh(self, socket: &Path, address: &str, stop: &Path, peers: &[&str], log: PathBuf) -> Process {
        Process::start(self.0, log, self.command(socket).args(["mesh", address]).arg(stop).args(peers))
    }

    /// Starts it as a server for callers with the ID `expected`.
    pub fn serve(self, agent: &Agent, expected: &str) -> Serving {
        let dir = Workdir::new();
        let log = dir.path().join("client.log");
        let process = Process::start(self.0, log, self.command(&agent.socket()).args(["serve", expected]));
        let addr = eventually("the client listens", || {
            process
                .log()
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .find_map(|event| Some(event.get("addr")?.as_str()?.to_owned()))
                .ok_or_else(|| process.log())
        });
        Serving { process, addr, _dir: dir }
    }
}

/// A client program that serves mutual TLS.
pub struct Serving {
    /// The process; its log holds the events.
    pub process: Process,
    /// Where it listens.
    pub addr: String,
    _dir: Workdir,
}
