//! One order that replaces the authorities of all servers: `finial authority rotate`, `status`, `take-back`.

use crate::forced_rotation::serials;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;
use testkit::{
    Agent, AgentOptions, Database, Flavor, Output, Process, Server, ServerOptions, eventually, finial, free_port,
};

/// `finial authority …` at that server.
fn authority(server: &Server, args: &[&str]) -> Output {
    Output::of(&mut command(server, args))
}

fn command(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(finial());
    command.arg("authority").args(args).arg("-socketPath").arg(server.socket());
    command
}

/// The ID of the server's authority of that kind and standing (`active`, `prepared`, `old`).
fn id(server: &Server, kind: &str, standing: &str) -> String {
    let shown = server.command(&["localauthority", kind, "show", "-output", "json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown[standing]["authority_id"].as_str().unwrap_or_default().to_owned()
}

fn ids(servers: &[Server], kind: &str, standing: &str) -> Vec<String> {
    servers.iter().map(|server| id(server, kind, standing)).collect()
}

/// The order of that kind, as that server has it.
fn order(server: &Server, kind: &str) -> Value {
    let shown = authority(server, &["status", &format!("-{kind}"), "-output", "json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown["rotations"][0].clone()
}

fn number(order: &Value) -> String {
    order["id"].as_str().expect("an order").to_owned()
}

/// What the bundle has: X.509 roots and JWT keys.
fn bundle(server: &Server) -> (usize, BTreeSet<String>) {
    let shown = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let keys = shown["keys"].as_array().expect("keys");
    let roots = keys.iter().filter(|key| key["use"] == "x509-svid").count();
    let kids = keys.iter().filter_map(|key| key["kid"].as_str()).map(str::to_owned).collect();
    (roots, kids)
}

struct Domain {
    servers: Vec<Server>,
    agents: Vec<Agent>,
    workload: String,
}

/// An agent below each server, of these makes.
fn domain(options: &ServerOptions, servers: usize, agents: &[Flavor]) -> Domain {
    let servers: Vec<Server> = (0..servers).map(|_| Server::start(Flavor::Finial, options)).collect();
    let workload = servers[0].entry("/workload", &[]);
    // Who joins before all servers are in the bundle is told of them later, and so may be either.
    let agents = agents.iter().zip(servers.iter().cycle());
    let agents = agents.map(|(flavor, server)| Agent::serving(*flavor, server, &AgentOptions::default())).collect();
    Domain { servers, agents, workload }
}

fn on(database: &Database) -> ServerOptions {
    ServerOptions { datastore: Some(testkit::datastore(database, database.port())), ..Default::default() }
}

impl Domain {
    /// All sign with another authority than before, which alone are left in the bundle; nobody attested again.
    fn has_moved(&self, before: &[String], serials_before: &[String]) {
        let now = ids(&self.servers, "x509", "active");
        assert!(now.iter().all(|id| !before.contains(id)), "{before:?} before, {now:?}");
        for server in &self.servers {
            eventually("the former roots are gone everywhere", || match bundle(server).0 {
                roots if roots == self.servers.len() => Ok(()),
                roots => Err(format!("{roots} roots")),
            });
        }
        let serials = serials(&self.servers[0]);
        assert!(serials.iter().all(|serial| !serials_before.contains(serial)), "{serials_before:?}, {serials:?}");
        self.serves("/after");
    }

    /// Every agent gives what was there before, and what is made now.
    fn serves(&self, path: &str) {
        let new = self.servers.last().expect("a server").entry(path, &[]);
        for agent in &self.agents {
            eventually("the agent is in step with its server", || {
                let out = agent.command(&["api", "fetch", "x509"]);
                let all = out.stdout.contains(&new) && out.stdout.contains(&self.workload);
                if all { Ok(()) } else { Err(format!("{}{}\n{}", out.stdout, out.stderr, agent.process.log())) }
            });
            let attested = agent.process.log().matches("Node attestation was successful").count();
            assert_eq!(attested, 1, "it attested again:\n{}", agent.process.log());
        }
    }
}

#[test]
fn one_order_moves_three_servers_with_authorities_of_their_own_and_all_agents() {
    let Some(database) = testkit::postgres() else { return };
    let domain = domain(&on(&database), 3, &[Flavor::Finial, Flavor::Spire, Flavor::Finial]);
    let (before, serials) = (ids(&domain.servers, "x509", "active"), serials(&domain.servers[0]));
    let out = authority(&domain.servers[1], &["rotate", "-x509", "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    assert!(out.stdout.contains("X.509: 3 of 3 servers prepared, 3 of 3 agents have the new bundle"), "{}", out.stdout);
    assert!(out.stdout.contains("X.509: 3 of 3 servers revoked, 3 of 3 agents have moved"), "{}", out.stdout);
    domain.has_moved(&before, &serials);
    assert_eq!(order(&domain.servers[2], "x509")["done"], true);
}

#[test]
fn on_one_server_with_sqlite_x509_and_jwt_authorities_are_replaced() {
    let domain = domain(&ServerOptions::default(), 1, &[Flavor::Finial]);
    let server = &domain.servers[0];
    let (before, serials) = (ids(&domain.servers, "x509", "active"), serials(server));
    let out = authority(server, &["rotate", "-x509", "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    domain.has_moved(&before, &serials);
    let key = id(server, "jwt", "active");
    let out = authority(server, &["rotate", "-jwt", "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    assert_ne!(id(server, "jwt", "active"), key);
    assert!(!bundle(server).1.contains(&key), "the former key is gone");
    let token = domain.agents[0].command(&["api", "fetch", "jwt", "-audience", "x"]).ok().stdout;
    assert!(!token.is_empty());
}

/// An agent that hangs is named, and nothing is activated until it is back, or by force.
#[test]
fn nothing_is_activated_before_all_agents_have_the_bundle_unless_forced() {
    let Some(database) = testkit::postgres() else { return };
    let domain = domain(&on(&database), 2, &[Flavor::Finial, Flavor::Finial]);
    let before = ids(&domain.servers, "x509", "active");
    domain.agents[1].process.signal(Signal::STOP);
    let out = authority(&domain.servers[0], &["rotate", "-x509", "-wait", "-timeout", "5s"]);
    assert_eq!(out.code, 1, "{}", out.stdout);
    assert!(out.stderr.contains("lacks it: spiffe://example.org/spire/agent/join_token/"), "{}", out.stderr);
    assert!(out.stderr.contains("\nhint: the order stays in force; "), "{}", out.stderr);
    assert_eq!(ids(&domain.servers, "x509", "active"), before);
    let number = number(&order(&domain.servers[1], "x509"));
    let refused = authority(&domain.servers[1], &["rotate", "-order", &number]);
    assert_eq!(refused.code, 1, "{}", refused.stdout);
    assert!(refused.stderr.contains("code = FailedPrecondition"), "{}", refused.stderr);
    // Ctrl-C ends the wait, not the order.
    let log = domain.servers[0].dir.path().join("wait.log");
    let mut waiting = Process::start(
        "wait",
        log,
        &mut command(&domain.servers[0], &["rotate", "-order", &number, "-wait", "-timeout", "2m"]),
    );
    eventually("it waits", || if waiting.log().contains("servers prepared") { Ok(()) } else { Err(waiting.log()) });
    waiting.signal(Signal::INT);
    assert_eq!(waiting.wait(), 130);
    assert!(waiting.log().contains(&format!("Interrupted. Order {number} stays in force")), "{}", waiting.log());
    assert_eq!(ids(&domain.servers, "x509", "active"), before);
    let forced = authority(&domain.servers[1], &["rotate", "-order", &number, "-wait", "-force", "-timeout", "1m"]);
    assert_eq!(forced.code, 0, "{}{}", forced.stdout, forced.stderr);
    assert!(ids(&domain.servers, "x509", "active").iter().all(|id| !before.contains(id)));
    // It lacked the bundle for a while, and gets it now: the old roots are still there.
    domain.agents[1].process.signal(Signal::CONT);
    domain.serves("/after");
}

#[test]
fn an_order_is_taken_back_by_another_server_and_the_next_one_goes_through() {
    let Some(database) = testkit::postgres() else { return };
    let domain = domain(&on(&database), 2, &[Flavor::Finial, Flavor::Finial]);
    let before = ids(&domain.servers, "x509", "active");
    authority(&domain.servers[0], &["rotate", "-x509", "-revoke"]).ok();
    let number = number(&order(&domain.servers[0], "x509"));
    for goal in ["ACTIVATE", "TAINT"] {
        eventually("the next step may be done", || {
            let out = authority(&domain.servers[1], &["rotate", "-order", &number]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
        eventually("all do it", || {
            let order = order(&domain.servers[0], "x509");
            let reached = |server: &Value| server["reached"] == goal;
            if order["servers"].as_array().is_some_and(|all| all.iter().all(reached)) {
                Ok(())
            } else {
                Err(order.to_string())
            }
        });
    }
    authority(&domain.servers[1], &["take-back"]).ok();
    eventually("every server signs with what it had", || {
        let (now, order) = (ids(&domain.servers, "x509", "active"), order(&domain.servers[0], "x509"));
        if now == before && order["done"] == true {
            Ok(())
        } else {
            Err(format!("{before:?} before, {now:?}; {order}"))
        }
    });
    domain.serves("/taken-back");
    let serials = serials(&domain.servers[0]);
    let out = authority(&domain.servers[0], &["rotate", "-x509", "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    domain.has_moved(&before, &serials);
}

/// A server that is killed before a step does it, and those after, when it is back.
#[test]
fn a_server_that_is_killed_between_two_steps_catches_up() {
    let Some(database) = testkit::postgres() else { return };
    let mut domain = domain(&on(&database), 3, &[Flavor::Finial, Flavor::Finial]);
    let (before, serials) = (ids(&domain.servers, "x509", "active"), serials(&domain.servers[0]));
    domain.servers[2].process.kill();
    let begun = authority(&domain.servers[0], &["rotate", "-x509", "-revoke", "-output", "json"]).ok().stdout;
    let begun: Value = serde_json::from_str(&begun).expect("JSON");
    let (number, obstacles) = (number(&begun), begun["obstacles"].to_string());
    assert_eq!(obstacles.matches("the server of journal ").count(), 3, "all three are waited for: {begun}");
    let reached = |server: &Server, count: usize, goal: &str| {
        eventually("so many have come to it", || {
            let order = order(server, "x509");
            let all = order["servers"].as_array().cloned().unwrap_or_default();
            let there = all.iter().filter(|server| server["reached"] == goal).count();
            if there >= count { Ok(()) } else { Err(order.to_string()) }
        });
    };
    reached(&domain.servers[0], 2, "PREPARE");
    domain.servers[2].restart();
    reached(&domain.servers[0], 3, "PREPARE");
    eventually("it is activated", || {
        let out = authority(&domain.servers[0], &["rotate", "-order", &number]);
        if out.code == 0 { Ok(()) } else { Err(out.stderr) }
    });
    // This time in the middle of the step.
    domain.servers[1].process.kill();
    reached(&domain.servers[0], 2, "ACTIVATE");
    domain.servers[1].restart();
    let out = authority(&domain.servers[1], &["rotate", "-order", &number, "-wait", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    domain.has_moved(&before, &serials);
}

/// Who fetches the bundle endpoint is shown with the version that it has, as it gets newer.
#[test]
fn a_partner_that_lags_behind_is_shown_until_it_has_fetched_the_new_bundle() {
    let port = free_port();
    let endpoint = format!("bundle_endpoint {{ address = \"127.0.0.1\" port = {port} profile \"https_spiffe\" {{}} }}");
    let ours = Server::start(
        Flavor::Finial,
        &ServerOptions { server: format!("federation {{ {endpoint} }}"), ..Default::default() },
    );
    let partner = format!(
        "federation {{ federates_with \"example.org\" {{ bundle_endpoint_url = \"https://127.0.0.1:{port}\" \
         bundle_endpoint_profile \"https_spiffe\" {{ endpoint_spiffe_id = \"spiffe://example.org/spire/server\" }} }} }}"
    );
    let options = ServerOptions { trust_domain: "partner.test".into(), server: partner, ..Default::default() };
    let partner = Server::start(Flavor::Finial, &options);
    let first = ours.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let first = partner.dir.write("first.json", &first).display().to_string();
    partner.command(&["bundle", "set", "-id", "spiffe://example.org", "-format", "spiffe", "-path", &first]).ok();
    let refresh = || {
        eventually("the partner fetches it", || {
            let out = partner.command(&["federation", "refresh", "-id", "spiffe://example.org"]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    };
    refresh();
    let begun = authority(&ours, &["rotate", "-x509", "-output", "json"]).ok().stdout;
    let number = number(&serde_json::from_str(&begun).expect("JSON"));
    eventually("the successor is prepared", || {
        let order = order(&ours, "x509");
        if order["servers"][0]["reached"] == "PREPARE" { Ok(()) } else { Err(order.to_string()) }
    });
    let shown = || authority(&ours, &["status"]).ok().stdout;
    assert!(shown().contains("Peers: 0 of 1 fetched the new bundle\n    127.0.0.1 (finial/"), "{}", shown());
    refresh();
    eventually("it is shown", || {
        let shown = shown();
        if shown.contains("Peers: 1 of 1 fetched the new bundle\n") { Ok(()) } else { Err(shown) }
    });
    let out = authority(&ours, &["rotate", "-order", &number, "-wait", "-timeout", "1m"]);
    assert!(out.code == 0 && out.stdout.contains(", 1 of 1 peers fetched it\n"), "{}{}", out.stdout, out.stderr);
}

/// It shares the datastore, and has an authority that no order reaches.
#[test]
fn a_server_of_spires_beside_is_named_and_keeps_its_authority() {
    let Some(database) = testkit::postgres() else { return };
    let spires = Server::start(Flavor::Spire, &on(&database));
    let domain = domain(&on(&database), 1, &[Flavor::Finial]);
    let (before, theirs) = (ids(&domain.servers, "x509", "active"), id(&spires, "x509", "active"));
    let out = authority(&domain.servers[0], &["rotate", "-x509", "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    assert!(
        out.stderr.contains(" is not waited for: it is SPIRE's (order it there, with `spire-server"),
        "{}",
        out.stderr
    );
    assert!(!before.contains(&id(&domain.servers[0], "x509", "active")));
    assert_eq!(id(&spires, "x509", "active"), theirs);
    assert_eq!(bundle(&domain.servers[0]).0, 2, "its root is still there");
    domain.serves("/after");
}

#[test]
fn of_two_operators_at_once_one_begins_and_the_other_is_told_of_it() {
    let Some(database) = testkit::postgres() else { return };
    let domain = domain(&on(&database), 2, &[]);
    let outs: Vec<Output> = std::thread::scope(|scope| {
        let calls: Vec<_> =
            domain.servers.iter().map(|server| scope.spawn(move || authority(server, &["rotate", "-x509"]))).collect();
        calls.into_iter().map(|call| call.join().expect("it ran")).collect()
    });
    let (first, second): (Vec<_>, Vec<_>) = outs.iter().partition(|out| out.code == 0);
    assert_eq!((first.len(), second.len()), (1, 1), "{outs:?}");
    let number = number(&order(&domain.servers[0], "x509"));
    assert!(first[0].stdout.starts_with(&format!("Order {number}: ")), "{}", first[0].stdout);
    assert!(second[0].stderr.contains(&format!("rotate -x509 -order {number} -wait` goes on with it")), "{outs:?}");
    // Both go on with it, side by side.
    let outs: Vec<Output> = std::thread::scope(|scope| {
        let args = ["rotate", "-order", &number, "-wait", "-timeout", "1m"];
        let calls: Vec<_> = domain.servers.iter().map(|server| scope.spawn(move || authority(server, &args))).collect();
        calls.into_iter().map(|call| call.join().expect("it ran")).collect()
    });
    assert!(outs.iter().all(|out| out.code == 0 && out.stdout.contains("is done: every server signs")), "{outs:?}");
}
