//! `docs/guides/oidc.md`, followed word by word: its configuration and its commands, with the provider in the server and beside it.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use testkit::guide::{Step, steps};
use testkit::oidc::{Provider, web_certificate_for};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually, free_port};

const GUIDE: &str = include_str!("../../docs/guides/oidc.md");

/// What stands in `server { }`.
fn within_server(block: &str) -> &str {
    let inner = block.trim().strip_prefix("server {").and_then(|rest| rest.strip_suffix('}'));
    inner.unwrap_or_else(|| panic!("this is no server block:\n{block}"))
}

struct World {
    /// The certificate, and commands as the guide calls them.
    dir: Workdir,
    port: u16,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: Workdir::new(), port: free_port() };
        let [certificate, _] = web_certificate_for(world.dir.path(), "oidc", "oidc.example.org");
        let (port, certificate) = (world.port, certificate.display());
        let host = format!("--cacert {certificate} --connect-to oidc.example.org:443:127.0.0.1:{port}");
        world.command("curl", &format!("/usr/bin/curl --silent --fail --noproxy '*' --max-time 20 {host} \"$@\""));
        world
    }

    /// What the guide calls by this name.
    fn command(&self, name: &str, text: &str) {
        let file = self.dir.sub("bin").join(name);
        std::fs::write(&file, format!("#!/bin/sh\nexec {text}\n")).expect("a script");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    }

    /// The paths and the port are the test's own.
    fn filled(&self, config: &str) -> String {
        let listen = format!("serving_cert_file {{\n addr = \"127.0.0.1:{}\"", self.port);
        config.replace("/etc/finial", &self.dir.path().display().to_string()).replace("serving_cert_file {", &listen)
    }

    fn look_at_it(&self, agent: &Agent) {
        let called = format!("{} agent \"$@\" -socketPath {}", testkit::finial().display(), agent.socket().display());
        self.command("spire-agent", &called);
        let path = format!("{}:{}", self.dir.sub("bin").display(), std::env::var("PATH").unwrap_or_default());
        let commands: Vec<_> = steps(GUIDE).into_iter().filter(|step| step.is("bash")).collect();
        assert_eq!(commands.len(), 3, "the guide's form has changed");
        for Step { text, says, .. } in commands {
            assert!(!says.is_empty(), "what does it print? {text}");
            eventually(text, || {
                let out = Output::of(Command::new("bash").args(["-c", text]).env("PATH", &path));
                match says.lines().find(|line| !out.stdout.contains(line.trim())) {
                    None if out.code == 0 => Ok(()),
                    lacks => Err(format!("{lacks:?} is not in {out:?}")),
                }
            });
        }
    }
}

#[test]
fn the_guide_to_oidc_holds_word_by_word() {
    let config: Vec<_> = steps(GUIDE).into_iter().filter(|step| step.is("hcl")).map(|step| step.text).collect();
    let [issuer, inside, beside, acme] = config[..] else { panic!("the guide's form has changed") };
    let world = World::new();
    let server = |server: String| Server::start(Flavor::Finial, &ServerOptions { server, ..Default::default() });
    let agent_of = |server: &Server| {
        server.entry("/workload", &[]);
        Agent::serving(Flavor::Finial, server, &AgentOptions::default())
    };
    {
        let server = server(world.filled(&format!("{}{}", within_server(issuer), within_server(inside))));
        world.look_at_it(&agent_of(&server));
    }
    let server = server(within_server(issuer).to_owned());
    let agent = agent_of(&server);
    let socket = agent.socket().display().to_string();
    // testkit has its own line for health checks
    let beside =
        world.filled(beside).replace("/tmp/spire-agent/public/api.sock", &socket).replace("health_checks {}", "");
    let _provider = Provider::start(Flavor::Finial, &beside);
    world.look_at_it(&agent);
    // That it gets a certificate is shown elsewhere; here, that it is taken as it stands.
    let source = beside.split_once("workload_api").expect("its keys' source").1;
    let nobody = format!("acme {{\n addr = \"127.0.0.1:{}\"\n directory_url = \"https://127.0.0.1:1/\"", free_port());
    let kept = world.dir.sub("acme").display().to_string();
    let acme = acme.replace("acme {", &nobody).replace("/var/lib/finial/acme", &kept);
    Provider::start(Flavor::Finial, &format!("{acme}\nworkload_api{source}"));
}
