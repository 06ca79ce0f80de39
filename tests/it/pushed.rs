//! A Finial agent under a Finial server hears of changes without asking: it is told to ask once an hour.

use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, eventually};

fn ids(agent: &Agent) -> Vec<String> {
    let shown = agent.command(&["api", "fetch", "x509"]).stdout;
    let ids = shown.lines().filter_map(|line| line.trim().strip_prefix("SPIFFE ID:"));
    let mut ids: Vec<_> = ids.map(|id| id.trim().to_owned()).collect();
    ids.sort();
    ids
}

fn wait_for(agent: &Agent, expected: &[&String]) {
    eventually("the agent hears of it", || {
        let ids = ids(agent);
        if ids.iter().eq(expected.iter().copied()) { Ok(()) } else { Err(format!("{ids:?}")) }
    });
}

fn entry_id(created: &str) -> String {
    let line = created.lines().find(|line| line.starts_with("Entry ID")).expect("an entry ID");
    line.rsplit(' ').next().expect("an entry ID").to_owned()
}

#[test]
fn an_agent_hears_of_created_and_deleted_entries_also_after_the_server_was_away() {
    let mut server = Server::start(Flavor::Finial, &ServerOptions::default());
    let first = server.entry("/a", &[]);
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions { sync_interval: "1h", ..Default::default() });
    eventually("the agent listens", || {
        if agent.process.log().contains("The server tells of changes by itself") {
            Ok(())
        } else {
            Err(agent.process.log())
        }
    });
    let second = server.entry("/b", &[]);
    wait_for(&agent, &[&first, &second]);
    let shown = server.command(&["entry", "show", "-spiffeID", &second]).ok().stdout;
    server.command(&["entry", "delete", "-entryID", &entry_id(&shown)]).ok();
    wait_for(&agent, &[&first]);
    server.process.kill();
    server.restart();
    let third = server.entry("/c", &[]);
    wait_for(&agent, &[&first, &third]);
}
