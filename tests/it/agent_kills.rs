//! An agent that is killed at each step of its attestation, and of the renewal of its own SVID: it comes back as the same agent.
//!
//! The steps are those at which something lasts: the key that is made, and what the server answered. Between them nothing
//! does, so that one that is killed there (asked and not answered, answered and not begun to write) is as one that is killed at
//! the step before, or the one after.

use crate::forced_rotation::serials;
use crate::takeover_live::node_certificate;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::{Agent, AgentOptions, Flavor, Output, Process, Server, ServerOptions, Workdir, eventually};

/// Where an agent writes its key, and what the server answered.
const FILES: [&str; 2] = ["keys.json.tmp", "agent-data.json.tmp"];
/// Opening, writing, flushing, moving, flushing the folder.
const STEPS: usize = 5;

/// Kills an agent at a step.
struct Killer {
    dir: Workdir,
    preloaded: PathBuf,
    /// Holds the number of the step, once steps count.
    at: PathBuf,
}

impl Killer {
    fn new() -> Self {
        let dir = Workdir::new();
        let (source, library) = (dir.write("killed.c", include_str!("killed.c")), dir.path().join("killed.so"));
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&library).arg(source).arg("-ldl");
        Output::of(&mut compile).ok();
        let at = dir.path().join("at");
        Self { dir, preloaded: library, at }
    }

    /// Starts it again, to be killed while it writes that file.
    fn start(&self, agent: &mut Agent, file: &str, round: &str) {
        let _ = std::fs::remove_file(&self.at);
        let mut command = agent.program();
        command.env("LD_PRELOAD", &self.preloaded).env("KILLED_IN", file).env("KILLED_AT", &self.at);
        agent.process = Process::start("agent", self.dir.path().join(format!("{round}.log")), &mut command);
    }

    /// From now on steps count.
    fn arm(&self, step: usize) {
        let beside = self.at.with_extension("new");
        std::fs::write(&beside, step.to_string()).expect("written");
        std::fs::rename(&beside, &self.at).expect("moved");
    }
}

fn serves(agent: &Agent) -> Result<(), String> {
    let out = agent.command(&["api", "fetch", "x509"]);
    if out.code == 0 { Ok(()) } else { Err(out.stderr) }
}

/// Whether the agent is killed before `done`.
fn is_killed(agent: &mut Agent, done: impl Fn(&Agent) -> bool) -> bool {
    eventually("it is killed, or is through", || match agent.process.ended() {
        Some(_) => Ok(true),
        None if done(agent) => Ok(false),
        None => Err(agent.process.log()),
    })
}

fn count_agents(server: &Server) -> String {
    server.command(&["agent", "count"]).ok().stdout
}

/// A server that lets nodes in by their certificate, and an agent with that of [`node_certificate`].
pub(crate) fn by_certificate(pki: &Workdir) -> (ServerOptions, AgentOptions) {
    let path = |name: &str| pki.path().join(name).display().to_string();
    let plugins = format!("NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{}\" }} }}", path("ca.pem"));
    let node_attestor = format!(
        "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{}\" certificate_path = \"{}\" }} }}",
        path("node.key"),
        path("node.pem")
    );
    let agent = AgentOptions { node_attestor, join: false, ..Default::default() };
    (ServerOptions { plugins, ..Default::default() }, agent)
}

/// The agent is `spiffe://TD/node`, too, which entries hang from.
pub(crate) fn name_the_node(server: &Server) {
    let node = format!("spiffe://{}/node", server.trust_domain);
    server.command(&["entry", "create", "-node", "-spiffeID", &node, "-selector", "x509pop:subject:cn:node"]).ok();
}

#[test]
fn killed_at_each_step_of_its_attestation_it_attests_again_or_goes_on() {
    let (pki, killer) = (Workdir::new(), Killer::new());
    node_certificate(&pki);
    let (server, options) = by_certificate(&pki);
    let server = Server::start(Flavor::Finial, &server);
    name_the_node(&server);
    server.entry("/workload", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &options);
    for file in FILES {
        let mut killed = 0;
        for step in 1.. {
            agent.process.kill();
            std::fs::remove_dir_all(agent.dir.path().join("data")).expect("its data");
            killer.start(&mut agent, file, &format!("attests-{file}-{step}"));
            killer.arm(step);
            let died = is_killed(&mut agent, |agent| serves(agent).is_ok());
            agent.process.kill();
            agent.restart();
            agent.wait_serving();
            assert!(
                count_agents(&server).contains("1 attested agent"),
                "{file}, step {step}: {}",
                count_agents(&server)
            );
            if !died {
                break;
            }
            killed += 1;
        }
        assert!(killed >= STEPS, "{file}: killed {killed} times only");
        println!("{file}: killed at {killed} steps of an attestation");
    }
}

/// By a join token, which lets nobody in a second time: an agent that lost its SVID or the key to it would be lost.
#[test]
fn killed_at_each_step_of_the_renewal_of_its_svid_it_is_the_agent_that_it_was() {
    let killer = Killer::new();
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    for file in FILES {
        let mut killed = 0;
        for step in 1.. {
            agent.process.kill();
            killer.start(&mut agent, file, &format!("renews-{file}-{step}"));
            agent.wait_serving();
            let before = serials(&server);
            server.order("x509", "prepare");
            server.order("x509", "activate");
            wait_stored(&agent, &server);
            killer.arm(step);
            // Told so, it renews its own SVID at once.
            server.order("x509", "taint");
            let died = is_killed(&mut agent, |_| serials(&server) != before);
            agent.process.kill();
            agent.restart();
            agent.wait_serving();
            eventually("it has another SVID", || match serials(&server) {
                now if now != before && now.len() == 1 => Ok(()),
                now => Err(format!("{now:?} after {before:?}, {file}, step {step}\n{}", agent.process.log())),
            });
            let attested = agent.process.log().matches("Node attestation was successful").count();
            assert_eq!(attested, 1, "{file}, step {step}: {}", agent.process.log());
            server.order("x509", "revoke");
            if !died {
                break;
            }
            killed += 1;
        }
        assert!(killed >= STEPS, "{file}: killed {killed} times only");
        println!("{file}: killed at {killed} steps of a renewal");
    }
}

/// Waits until the agent has kept the roots that the server has: they are written to the same file as its SVID.
fn wait_stored(agent: &Agent, server: &Server) {
    let shown = server.command(&["bundle", "show"]).ok().stdout;
    let roots = shown.matches("BEGIN CERTIFICATE").count();
    eventually("the agent keeps the new root", || {
        let kept = kept_roots(&agent.dir.path().join("data/agent-data.json"))?;
        if kept == roots { Ok(()) } else { Err(format!("{kept} of {roots} roots")) }
    });
}

fn kept_roots(path: &Path) -> Result<usize, String> {
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    let data: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    Ok(data["bundle"].as_array().map_or(0, Vec::len))
}
