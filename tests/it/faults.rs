//! What must not be lost when something dies.

use testkit::{Agent, AgentOptions, Client, Flavor, Server, ServerOptions, eventually};

#[test]
fn acknowledged_entries_survive_kill_9() {
    let mut server = Server::start(Flavor::Finial, &ServerOptions::default());
    let mut made = Vec::new();
    for round in 0..3 {
        for i in 0..5 {
            made.push(server.entry(&format!("/kill/{round}/{i}"), &[]));
        }
        server.process.kill();
        server.restart();
    }
    let shown = server.command(&["entry", "show"]).ok().stdout;
    for id in &made {
        assert!(shown.contains(&format!(": {id}\n")), "{id} was acknowledged and is gone:\n{shown}");
    }
}

#[test]
fn authorities_survive_kill_9_and_agents_go_on() {
    let mut server = Server::start(Flavor::Finial, &ServerOptions::default());
    let id = server.entry("/workload", &["-x509SVIDTTL", "12"]);
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    let before = server.command(&["bundle", "show"]).ok().stdout;
    server.process.kill();
    // The agent serves what it has while the server is away.
    agent.command(&["api", "fetch", "x509"]).ok();
    server.restart();
    assert_eq!(server.command(&["bundle", "show"]).ok().stdout, before, "the same authorities");
    let seen = Client("go").events(&agent, &["watch", "3"]);
    assert!(seen.iter().all(|e| e["id"] == id.as_str()), "{seen:?}");
}

#[test]
fn a_second_server_on_the_same_data_is_refused() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let out = server.second_on_same_data();
    assert_ne!(out.code, 0);
    let said = format!("{}{}", out.stdout, out.stderr);
    assert!(said.contains("datastore.sqlite3"), "it names the file:\n{said}");
    // And the first goes on.
    server.command(&["healthcheck"]).ok();
}

#[test]
fn sigterm_ends_both_cleanly() {
    let mut server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    assert_eq!(agent.process.terminate(), 0, "{}", agent.process.log());
    assert_eq!(server.process.terminate(), 0, "{}", server.process.log());
}

#[test]
fn an_agent_restarts_with_the_svid_it_had() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    agent.process.kill();
    agent.restart();
    agent.wait_serving();
    assert!(server.command(&["agent", "count"]).ok().stdout.contains("1 attested agent"));
}

/// SPIRE's as well: it is what workloads of other users pass through to the socket.
#[test]
fn the_folder_of_the_socket_is_open_to_every_user() {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    for flavor in [Flavor::Finial, Flavor::Spire] {
        let server = Server::start(Flavor::Finial, &ServerOptions::default());
        server.entry("/workload", &[]);
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        let beside = agent.dir.path().join("beside");
        std::fs::DirBuilder::new().mode(0o755).create(&beside).unwrap();
        assert_eq!(mode(agent.socket().parent().unwrap()), mode(&beside), "{flavor:?}");
        assert_eq!(mode(&agent.socket()), 0o777, "{flavor:?}");
    }
}

#[test]
fn a_banned_agent_ends() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    let listed = server.command(&["agent", "list"]).ok().stdout;
    let id = listed.lines().find_map(|l| l.strip_prefix("SPIFFE ID         : ")).expect("an agent").to_owned();
    server.command(&["agent", "ban", "-spiffeID", &id]).ok();
    let code = eventually("the banned agent ends", || agent.process.ended().ok_or_else(|| agent.process.log()));
    assert_ne!(code, 0, "{}", agent.process.log());
}
