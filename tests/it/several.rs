//! Several servers on one database.

use testkit::{Agent, AgentOptions, Database, DatabaseKind, Flavor, Server, ServerOptions, eventually};

fn server_on(database: &Database, clock_ahead_seconds: i64) -> Server {
    let datastore = Some(testkit::datastore(database, database.port()));
    Server::start(Flavor::Finial, &ServerOptions { datastore, clock_ahead_seconds, ..Default::default() })
}

/// Both requests stand before the token's row when it is let go.
fn lets_one_in(database: &Database) {
    let servers = [server_on(database, 0), server_on(database, 0)];
    let token = servers[0].join_token();
    let options = AgentOptions { join: false, agent: format!("join_token = \"{token}\""), ..Default::default() };
    let held = database.hold(match database.kind() {
        DatabaseKind::Postgres => "LOCK TABLE join_tokens IN SHARE MODE",
        DatabaseKind::MariaDb => "SELECT * FROM join_tokens FOR UPDATE",
    });
    let mut agents = servers.each_ref().map(|server| Agent::start(Flavor::Finial, server, &options));
    eventually("both wait for the token", || match database.waiting() {
        2 => Ok(()),
        n => Err(format!("{n} wait:\n{}\n{}", agents[0].process.log(), agents[1].process.log())),
    });
    drop(held);
    let attested = |agent: &Agent| agent.process.log().contains("Node attestation was successful");
    let refused = |agent: &Agent| agent.process.log().contains("join token does not exist or has already been used");
    eventually("one is let in and one is not", || {
        let logs = || agents.iter().map(|agent| agent.process.log()).collect::<String>();
        if agents.iter().any(&attested) && agents.iter().any(&refused) { Ok(()) } else { Err(logs()) }
    });
    assert_eq!(agents.iter().filter(|agent| attested(agent)).count(), 1);
    assert_eq!(database.sql("select count(*) from join_tokens").trim(), "0");
    agents.iter_mut().for_each(|agent| agent.process.kill());
}

#[test]
fn a_token_used_at_two_servers_in_the_same_instant_lets_one_agent_in() {
    for kind in [testkit::postgres, testkit::mariadb] {
        let Some(database) = kind() else { continue };
        lets_one_in(&database);
    }
}

/// What was written at one is known at the other, whoever's clock says what, and nothing is pruned for being "old".
#[test]
fn servers_with_clocks_a_minute_apart_agree() {
    for kind in [testkit::postgres, testkit::mariadb] {
        let Some(database) = kind() else { continue };
        let mut servers = [server_on(&database, 0), server_on(&database, -60)];
        let id = servers[0].entry("/workload", &["-entryID", "shared"]);
        let shown = |server: &Server, want: &str| {
            eventually("the other server knows", || {
                let out = server.command(&["entry", "show"]).stdout;
                if out.contains(want) { Ok(()) } else { Err(out) }
            });
        };
        shown(&servers[1], &id);
        let update = |server: &Server, hint: &str| {
            let parent = "spiffe://example.org/node";
            let args = ["entry", "update", "-entryID", "shared", "-parentID", parent, "-spiffeID", &id, "-hint", hint];
            server.command(&[&args[..], &["-selector", &format!("unix:uid:{}", testkit::uid())]].concat()).ok();
        };
        // Each of them is the later one once, by order and against the clock.
        for (at, other, hint) in [(0, 1, "first"), (1, 0, "second"), (0, 1, "third")] {
            update(&servers[at], hint);
            shown(&servers[other], &format!(": {hint}\n"));
        }
        // The agents of both have it, with tokens made at the other; the one in the past is believed, too.
        let tokens = [servers[1].join_token(), servers[0].join_token()];
        for (server, token) in servers.iter().zip(tokens) {
            let options =
                AgentOptions { join: false, agent: format!("join_token = \"{token}\""), ..Default::default() };
            Agent::serving(Flavor::Finial, server, &options);
        }
        // Both authorities are in the bundle of both, and stay when each starts again.
        let bundle = |server: &Server| server.command(&["bundle", "show"]).ok().stdout;
        let both = bundle(&servers[0]);
        assert_eq!(both.matches("BEGIN CERTIFICATE").count(), 2, "{both}");
        for server in &mut servers {
            server.process.kill();
            server.restart();
            assert_eq!(bundle(server), both);
        }
    }
}
