//! `docs/guides/rotate.md`, followed word by word: its commands are taken from the text and run in order, on two servers on one
//! database, with an agent.

use std::os::unix::fs::symlink;
use std::process::Command;
use testkit::guide::{Step, steps};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually};

const GUIDE: &str = include_str!("../../docs/guides/rotate.md");

/// As the guide says.
const TOKENS_OF_SECONDS: &str = "default_jwt_svid_ttl = \"10s\"";

/// What is run on a machine; configuration is for reading.
fn commands() -> Vec<Step> {
    let mut steps = steps(GUIDE);
    steps.retain(|step| !step.is("hcl"));
    assert!(steps.iter().all(|step| step.is("bash")), "the guide's form has changed");
    steps
}

fn follow(step: &Step, servers: &[Server; 2], bin: &Workdir) {
    let number = match step.value("on=") {
        "server1" => 0,
        "server2" => 1,
        on => panic!("{on:?} is no machine"),
    };
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap_or_default());
    let run = || -> Result<(), String> {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", step.text]).env("PATH", &path);
        let out = Output::of(command.env("SPIRE_SERVER_PRIVATE_SOCKET", servers[number].socket()));
        let lacks = step.says.lines().find(|line| !out.stdout.lines().any(|said| said.trim_end() == line.trim_end()));
        match lacks {
            None if out.code == 0 => Ok(()),
            _ => Err(format!("{lacks:?} is not in\n{}{}", out.stdout, out.stderr)),
        }
    };
    let what = format!("on server{}:\n{}", number + 1, step.text);
    if step.is("until") {
        eventually(&what, run);
    } else {
        run().unwrap_or_else(|why| panic!("{what}\n{why}\n{}", servers.each_ref().map(|s| s.process.log()).concat()));
    }
}

#[test]
fn the_guide_to_replacing_authorities_holds_word_by_word() {
    let Some(database) = testkit::postgres() else { return };
    let datastore = Some(testkit::datastore(&database, database.port()));
    let servers = [(); 2].map(|()| {
        let (datastore, server) = (datastore.clone(), TOKENS_OF_SECONDS.into());
        Server::start(Flavor::Finial, &ServerOptions { datastore, server, ..Default::default() })
    });
    servers[0].entry("/workload", &[]);
    let agent = Agent::serving(Flavor::Finial, &servers[1], &AgentOptions::default());
    let bin = Workdir::new();
    for name in ["finial", "spire-server"] {
        symlink(testkit::finial(), bin.path().join(name)).expect("a link");
    }
    let steps = commands();
    assert!(steps.len() > 8, "the guide's form has changed");
    steps.iter().for_each(|step| follow(step, &servers, &bin));
    agent.command(&["api", "fetch", "x509"]).ok();
    let attested = agent.process.log().matches("Node attestation was successful").count();
    assert_eq!(attested, 1, "it attested again:\n{}", agent.process.log());
}
