//! `docs/guides/nested.md`, followed word by word: its commands are taken from the text and run in order, on a root server with an
//! agent, and a region's server that the text starts.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::guide::{Step, steps};
use testkit::{Agent, AgentOptions, Flavor, Output, Process, Server, ServerOptions, Workdir, eventually, free_port};

const GUIDE: &str = include_str!("../../docs/guides/nested.md");

struct Lab {
    root: Server,
    agent: Agent,
    region: Option<Process>,
    region_port: u16,
    dir: Workdir,
    /// The root's authority at first, and the one that was prepared.
    old: String,
    new: String,
}

impl Lab {
    fn new() -> Self {
        let root = Server::start(Flavor::Finial, &ServerOptions::default());
        let id = "spiffe://example.org/region-agent";
        let token = root.command(&["token", "generate", "-spiffeID", id]).ok().stdout;
        let token = token.lines().find_map(|line| line.strip_prefix("Token: ")).expect("a token");
        let options = AgentOptions { join: false, agent: format!("join_token = \"{token}\""), ..Default::default() };
        let agent = Agent::start(Flavor::Finial, &root, &options);
        let dir = Workdir::new();
        for name in ["spire-server", "spire-agent"] {
            symlink(testkit::finial(), dir.sub("bin").join(name)).expect("a link");
        }
        dir.sub("data");
        let mut lab =
            Self { root, agent, region: None, region_port: free_port(), dir, old: String::new(), new: String::new() };
        lab.old = lab.root.authority("x509", "active");
        lab
    }

    fn region_socket(&self) -> PathBuf {
        self.dir.path().join("region.sock")
    }

    /// What the text's words stand for here.
    fn filled(&self, text: &str) -> String {
        let path = |path: &Path| path.display().to_string();
        text.replace("/run/spire/root-agent/api.sock", &path(&self.agent.socket()))
            .replace("/run/spire/server/api.sock", &path(&self.region_socket()))
            .replace("/var/lib/spire-server", &path(&self.dir.path().join("data")))
            .replace("root.example.org", "127.0.0.1")
            .replace("0.0.0.0", "127.0.0.1")
            .replace("server_port = \"8081\"", &format!("server_port = \"{}\"", self.root.port))
            .replace("bind_port = \"8081\"", &format!("bind_port = \"{}\"", self.region_port))
            .replace("unix:uid:0", &format!("unix:uid:{}", testkit::uid()))
            .replace("OLD", &self.old)
            .replace("NEW", &self.new)
    }

    fn command(&self, on: &str, text: &str) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let socket = if on == "root" { self.root.socket() } else { self.region_socket() };
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", &self.filled(text)])
            .current_dir(self.dir.path())
            .env("PATH", format!("{}:{path}", self.dir.path().join("bin").display()))
            .env("SPIRE_SERVER_PRIVATE_SOCKET", socket);
        command
    }

    fn start_region(&mut self, text: &str) {
        let mut command = self.command("region", &format!("exec {}", text.trim()));
        self.region = Some(Process::start("region", self.dir.path().join("region.log"), &mut command));
        eventually("the region's server is healthy", || {
            let out = Output::of(&mut self.command("region", "spire-server healthcheck"));
            let log = self.region.as_ref().map(Process::log).unwrap_or_default();
            if out.code == 0 { Ok(()) } else { Err(format!("{}{}\n{log}", out.stdout, out.stderr)) }
        });
    }

    fn follow(&mut self, step: &Step) {
        let hosts: Vec<&str> = step.value("on=").split(',').collect();
        if step.is("hcl") {
            self.dir.write(step.value("file="), &self.filled(step.text));
            return;
        }
        assert!(step.is("bash"), "{:?}", step.info);
        if step.is("start") {
            return self.start_region(step.text);
        }
        let once = |lab: &Self, on: &str| -> Result<Output, String> {
            let out = Output::of(&mut lab.command(on, step.text));
            if out.code == 0 { Ok(out) } else { Err(format!("{}: {}{}", out.code, out.stdout, out.stderr)) }
        };
        let holds = |lab: &Self, out: &Output| {
            let missing = step.says.lines().find(|line| {
                // The ID of what was prepared is known from here on.
                let (want, known) = (lab.filled(line), !lab.new.is_empty() || !line.contains("NEW"));
                known && !line.is_empty() && !out.stdout.lines().any(|said| said.trim_end() == want.trim_end())
            });
            missing.map_or(Ok(()), |line| Err(format!("{line:?} is not in\n{}", out.stdout)))
        };
        let what = format!("on {hosts:?}:\n{}", step.text);
        if step.is("same") {
            eventually(&what, || {
                let said: Vec<String> =
                    hosts.iter().map(|on| Ok(once(self, on)?.stdout)).collect::<Result<_, String>>()?;
                let same = said.iter().all(|text| !text.is_empty() && *text == said[0]);
                if same { Ok(()) } else { Err(format!("{said:#?}")) }
            });
        } else if step.is("until") {
            eventually(&what, || holds(self, &once(self, hosts[0])?));
        } else {
            let out = once(self, hosts[0]).unwrap_or_else(|why| panic!("{what}\n{why}"));
            if step.text.contains("x509 prepare") {
                self.new = self.root.authority("x509", "prepared");
            }
            holds(self, &out).unwrap_or_else(|why| panic!("{what}\n{why}"));
        }
    }
}

#[test]
fn the_guide_to_a_server_below_a_server_holds_word_by_word() {
    let mut lab = Lab::new();
    let steps = steps(GUIDE);
    assert!(steps.len() > 10, "the guide's form has changed");
    steps.iter().for_each(|step| lab.follow(step));
}
