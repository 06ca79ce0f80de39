//! Finial beside the real SPIRE: each one's agents under the other's server.

use testkit::{Agent, AgentOptions, Client, Flavor, Server, ServerOptions, eventually};

/// An agent of one kind under a server of the other: SVIDs come, and come anew twice.
fn agent_under_server(agent: Flavor, server: Flavor) {
    let options = ServerOptions { server: server_speed(server), ..Default::default() };
    let server = Server::start(server, &options);
    // 12 s: renewed at about half of that, twice within the test.
    let id = server.entry("/workload", &["-x509SVIDTTL", "12"]);
    let agent = Agent::serving(agent, &server, &AgentOptions::default());
    let seen = Client("go").events(&agent, &["watch", "3"]);
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.iter().all(|e| e["id"] == id.as_str()), "{seen:?}");
    let checked = Client("go").events(&agent, &["check", "audience"]);
    assert_eq!(checked[1]["id"], id.as_str(), "{checked:?}");
}

/// The real SPIRE reloads its entries from SQL on a timer; make that short.
fn server_speed(flavor: Flavor) -> String {
    match flavor {
        Flavor::Spire => "experimental { cache_reload_interval = \"1s\" }".into(),
        Flavor::Finial => String::new(),
    }
}

#[test]
fn finial_agent_under_spire_server() {
    agent_under_server(Flavor::Finial, Flavor::Spire);
}

#[test]
fn spire_agent_under_finial_server() {
    agent_under_server(Flavor::Spire, Flavor::Finial);
}

/// The agent's own SVID is renewed under the other's server, twice.
fn agent_svid_rotates(agent: Flavor, server: Flavor) {
    let more = format!("agent_ttl = \"12s\"\n{}", server_speed(server));
    let server = Server::start(server, &ServerOptions { server: more, ..Default::default() });
    server.entry("/workload", &[]);
    let _agent = Agent::serving(agent, &server, &AgentOptions::default());
    let serial = || {
        let out = server.command(&["agent", "list"]).ok().stdout;
        let serial = out.lines().find_map(|l| l.strip_prefix("Serial number")).map(str::to_owned);
        serial.ok_or(out)
    };
    let mut last = eventually("the agent is listed", serial);
    for _ in 0..2 {
        last = eventually("the agent renews its SVID", || match serial()? {
            now if now != last => Ok(now),
            same => Err(format!("still {same}")),
        });
    }
}

#[test]
fn finial_agent_renews_its_svid_under_spire_server() {
    agent_svid_rotates(Flavor::Finial, Flavor::Spire);
}

#[test]
fn spire_agent_renews_its_svid_under_finial_server() {
    agent_svid_rotates(Flavor::Spire, Flavor::Finial);
}

/// The control: the harness and its expectations hold for SPIRE alone.
#[test]
fn spire_agent_under_spire_server() {
    agent_under_server(Flavor::Spire, Flavor::Spire);
    agent_svid_rotates(Flavor::Spire, Flavor::Spire);
}
