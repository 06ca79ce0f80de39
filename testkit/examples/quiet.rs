//! How many SQL statements a quiet deployment runs: three servers on one PostgreSQL, agents connected to each, nothing
//! happening. Counts by `pg_stat_statements`, transaction control left out.
//!
//!     FINIAL_BIN=target/release/finial cargo run -p testkit --example quiet -- target/release/fleet [AGENTS, 10000] [SECONDS, 30]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use testkit::{Flavor, Server, ServerOptions, datastore};

const SERVERS: usize = 3;

fn main() {
    let mut words = std::env::args().skip(1);
    let fleet = words.next().expect("the fleet program");
    let agents: usize = words.next().map_or(10_000, |n| n.parse().expect("a number of agents"));
    let seconds: u64 = words.next().map_or(30, |n| n.parse().expect("a number of seconds"));
    let database = testkit::postgres().expect("PostgreSQL");
    let options = ServerOptions { datastore: Some(datastore(&database, database.port())), ..Default::default() };
    let servers: Vec<Server> = (0..SERVERS).map(|_| Server::start(Flavor::Finial, &options)).collect();
    let mut fleets: Vec<Child> = servers.iter().map(|server| hold(&fleet, server, agents / SERVERS, seconds)).collect();
    let before = database.statements();
    std::thread::sleep(Duration::from_secs(seconds));
    let run = database.statements() - before;
    println!(
        "{SERVERS} servers, {agents} agents, nothing changing: {run} statements in {seconds} s, {:.1} a second",
        run as f64 / seconds as f64
    );
    for fleet in &mut fleets {
        let _ = fleet.kill();
        let _ = fleet.wait();
    }
}

/// Agents on one server; returns when all of them are connected and at rest.
fn hold(fleet: &str, server: &Server, agents: usize, seconds: u64) -> Child {
    let mut child = Command::new(fleet)
        .args(["--address", &format!("127.0.0.1:{}", server.port), "--socket"])
        .arg(server.socket())
        .args(["--trust-domain", &server.trust_domain, "--pid", &server.process.pid().to_string()])
        .args(["--agents", &agents.to_string(), "--writes", "0", "--csrs", "0"])
        // Until all fleets are there and have been watched.
        .args(["--idle", &(seconds + 600).to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the fleet starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    for line in lines {
        println!("{line}");
        if line.contains("per connected agent") {
            break;
        }
    }
    child
}
