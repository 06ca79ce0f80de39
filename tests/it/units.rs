//! systemd's units and Slurm's steps: what they get from our agent, they get from SPIRE's.

use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::systemd::SystemBus;
use testkit::{Agent, AgentOptions, Flavor, Output, Process, Server, ServerOptions, eventually};

fn entry(server: &Server, path: &str, selectors: &[&str]) -> String {
    let selectors: Vec<&str> = selectors.iter().flat_map(|s| ["-selector", s]).collect();
    server.entry(path, &selectors)
}

fn options(attestor: &str) -> AgentOptions {
    let usual = AgentOptions::default();
    let attestor = format!("WorkloadAttestor \"{attestor}\" {{ plugin_data {{}} }}");
    AgentOptions { node_attestor: format!("{}\n    {attestor}", usual.node_attestor), ..usual }
}

/// What `fetch` is given, as soon as it is given anything.
fn served(mut fetch: impl FnMut() -> Output) -> Vec<String> {
    let fetched = eventually("it is served", || {
        let out = fetch();
        if out.code == 0 { Ok(out.stdout) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
    });
    let ids = fetched.lines().filter_map(|line| line.trim().strip_prefix("SPIFFE ID:"));
    ids.map(|id| id.trim().to_owned()).collect()
}

#[test]
fn a_unit_of_systemd_is_known_by_its_name_and_its_file() {
    let Some(mut bus) = SystemBus::start("good") else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let unit = "systemd:id:spire-agent.service";
    let expected = [entry(&server, "/unit", &[unit, "systemd:fragment_path:/lib/systemd/system/spire-agent.service"])];
    entry(&server, "/other", &["systemd:id:other.service"]);
    entry(&server, "/another", &[unit, "systemd:fragment_path:/etc/systemd/system/spire-agent.service"]);
    for flavor in [Flavor::Finial, Flavor::Spire] {
        let mut agent = Agent::start(flavor, &server, &options("systemd"));
        eventually("the agent is there", || agent.socket().exists().then_some(()).ok_or_else(|| agent.process.log()));
        // Again, on our bus.
        agent.process.terminate();
        let log = agent.dir.path().join("agent.log");
        agent.process = Process::start("agent", log, agent.program().env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()));
        let fetch = || agent.command_by(Flavor::Finial, &["api", "fetch", "x509"]);
        assert_eq!(served(fetch), expected, "{flavor:?}");
        bus.end();
        bus.begin("good");
        assert_eq!(served(fetch), expected, "{flavor:?}, after the bus was started again");
    }
}

/// A cgroup of version 2 and the folders above it that were made for it, removed at the end.
struct Cgroup(PathBuf, Vec<PathBuf>);

impl Cgroup {
    fn make(path: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
        let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
        let root = Path::new(line.split(' ').nth(1)?);
        let full = root.join(path);
        let missing = full.ancestors().take_while(|p| *p != root && !p.exists()).map(Path::to_path_buf).collect();
        std::fs::create_dir_all(&full).ok().map(|()| Self(full, missing))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.1.iter().for_each(|folder| {
            let _ = std::fs::remove_dir(folder);
        });
    }
}

#[test]
fn a_step_of_slurm_is_known_by_its_job() {
    let number = std::process::id();
    let scope = format!("system.slice/it{number}_slurmstepd.scope/job_{number}/step_batch/user/task_0");
    let (genuine, forged) = (Cgroup::make(&scope), Cgroup::make(&format!("it{number}.slice/{scope}")));
    let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
    let (Some(genuine), Some(forged)) = (genuine, forged) else {
        assert!(!promised, "no writable cgroup hierarchy of version 2");
        eprintln!("SKIPPED: no writable cgroup hierarchy of version 2");
        return;
    };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let expected = [entry(&server, "/step", &[&format!("slurm:job_id:{number}"), "slurm:step:batch"])];
    entry(&server, "/other", &["slurm:step:0"]);
    for flavor in [Flavor::Finial, Flavor::Spire] {
        let agent = Agent::start(flavor, &server, &options("slurm"));
        let fetch = |cgroup: &Cgroup| {
            let mut command = Command::new("sh");
            command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(cgroup.0.join("cgroup.procs"));
            command.arg(testkit::finial()).args(["agent", "api", "fetch", "x509", "-socketPath"]).arg(agent.socket());
            Output::of(&mut command)
        };
        assert_eq!(served(|| fetch(&genuine)), expected, "{flavor:?}");
        let none = fetch(&forged);
        assert!(none.code != 0 && none.stderr.contains("no identity issued"), "{flavor:?}: {none:?}");
    }
}
