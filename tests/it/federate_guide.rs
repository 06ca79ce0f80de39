//! `docs/guides/federate.md`, followed word by word: its commands are taken from the text and run in order, by us and a partner
//! with the real SPIRE.

use crate::answers_trust::web_certificate;
use std::path::Path;
use std::process::Command;
use testkit::guide::{Step, steps};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually, free_port};

const GUIDE: &str = include_str!("../../docs/guides/federate.md");
/// Where the federation block goes.
const PLACE: &str = "# federation";

/// One side of the border.
struct Side {
    name: &'static str,
    server: Server,
    agent: Agent,
    endpoint: u16,
}

struct Lab {
    sides: [Side; 2],
    web: Workdir,
    /// Where both work: what is brought over is there.
    dir: Workdir,
}

impl Lab {
    fn new() -> Self {
        let web = Workdir::new();
        let (_, _, root) = web_certificate(web.path());
        let side = |name, flavor, trust_domain: &str| {
            let options = ServerOptions {
                trust_domain: trust_domain.into(),
                server: format!("{PLACE}\nexperimental {{ cache_reload_interval = \"1s\" }}"),
                web_roots: Some(root.clone()),
                ..ServerOptions::default()
            };
            let server = Server::start(flavor, &options);
            let agent = Agent::start(flavor, &server, &AgentOptions::default());
            Side { name, server, agent, endpoint: free_port() }
        };
        let sides = [side("here", Flavor::Finial, "example.org"), side("there", Flavor::Spire, "partner.test")];
        Self { sides, web, dir: Workdir::new() }
    }

    /// What the text's words stand for on that side.
    fn filled(&self, side: &Side, text: &str) -> String {
        let path = |path: &Path| path.display().to_string();
        let [here, there] = &self.sides;
        text.replace("spire.example.org:8443", &format!("127.0.0.1:{}", here.endpoint))
            .replace("spire.partner.test:8443", &format!("127.0.0.1:{}", there.endpoint))
            .replace("port = 8443", &format!("port = {}", side.endpoint))
            .replace("0.0.0.0", "127.0.0.1")
            .replace("/etc/spire", &path(self.web.path()))
            .replace("server.conf", &path(&side.server.dir.path().join("server.conf")))
            .replace("unix:uid:0", &format!("unix:uid:{}", testkit::uid()))
    }

    fn run(&self, side: &Side, text: &str) -> Output {
        let path = std::env::var("PATH").unwrap_or_default();
        let programs = self.dir.sub(&format!("bin-{}", side.name));
        for name in ["spire-server", "spire-agent"] {
            let program = match side.name {
                "here" => testkit::finial(),
                _ => testkit::require_spire().join(name),
            };
            let _ = std::os::unix::fs::symlink(program, programs.join(name));
        }
        Output::of(
            Command::new("bash")
                .args(["-euo", "pipefail", "-c", &self.filled(side, text)])
                .current_dir(self.dir.path())
                .env("PATH", format!("{}:{path}", programs.display()))
                .env("SPIRE_SERVER_PRIVATE_SOCKET", side.server.socket())
                .env("SPIRE_AGENT_PUBLIC_SOCKET", side.agent.socket()),
        )
    }

    /// Puts the text's block into the configuration, in the place of the one before.
    fn configure(&mut self, at: usize, block: &str) {
        let filled = self.filled(&self.sides[at], block).replace('\n', " ");
        let file = self.sides[at].server.dir.path().join("server.conf");
        let text = std::fs::read_to_string(&file).expect("a configuration");
        let lines = text.lines().map(|line| {
            let is = line.trim_start().starts_with(PLACE) || line.trim_start().starts_with("federation {");
            if is { filled.as_str() } else { line }
        });
        std::fs::write(&file, lines.collect::<Vec<_>>().join("\n")).expect("written");
    }

    fn follow(&mut self, step: &Step) {
        let on = step.value("on=");
        for at in
            [0, 1].into_iter().filter(|at| on.split(',').any(|name| name == self.sides[*at].name)).collect::<Vec<_>>()
        {
            if step.is("into=server") {
                self.configure(at, step.text);
            } else if step.is("valid") {
                self.validate(at, step.text);
            } else {
                assert!(step.is("bash"), "{:?}", step.info);
                self.command(at, step);
            }
        }
    }

    /// An example that is not put to use here: it is a valid configuration.
    fn validate(&self, at: usize, block: &str) {
        let side = &self.sides[at];
        let text = format!(
            "server {{ trust_domain = \"example.org\" data_dir = \"{}\"\n{block}\n}}\nplugins {{\n",
            self.dir.path().display()
        );
        let rest = "DataStore \"sql\" { plugin_data { database_type = \"sqlite3\" connection_string = \"x\" } }\n\
                    KeyManager \"memory\" { plugin_data {} }\nNodeAttestor \"join_token\" { plugin_data {} }\n}\n";
        let file = self.dir.write("example.conf", &(text + rest));
        let out = self.run(side, &format!("spire-server validate -config {}", file.display())).ok();
        assert!(!out.stderr.contains("not supported"), "{block}\n{}", out.stderr);
    }

    fn command(&mut self, at: usize, step: &Step) {
        let what = format!("on {}:\n{}", self.sides[at].name, step.text);
        let once = |lab: &Self| -> Result<(), String> {
            let side = &lab.sides[at];
            let out = lab.run(side, step.text);
            let told = format!("{}: {}{}\n{}", out.code, out.stdout, out.stderr, tail(&side.server));
            if (out.code == 0) == step.is("fails") {
                return Err(told);
            }
            let said = format!("{}{}", out.stdout, out.stderr);
            let missing =
                step.says.lines().find(|line| !line.is_empty() && !said.contains(lab.filled(side, line).trim_end()));
            missing.map_or(Ok(()), |line| Err(format!("{line:?} is not in\n{told}")))
        };
        match step.is("until") {
            true => eventually(&what, || once(self)),
            false => once(self).unwrap_or_else(|why| panic!("{what}\n{why}")),
        }
        if step.is("restart") {
            self.sides[at].server.process.terminate();
            self.sides[at].server.restart();
        }
    }
}

fn tail(server: &Server) -> String {
    let log = server.process.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[test]
fn the_guide_to_a_federation_holds_word_by_word() {
    let mut lab = Lab::new();
    let steps = steps(GUIDE);
    assert!(steps.len() > 25, "the guide's form has changed");
    steps.iter().for_each(|step| lab.follow(step));
}
