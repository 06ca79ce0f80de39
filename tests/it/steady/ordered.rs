//! One order replaces the authorities of all servers: seen through in one go, taken step by step with the server that takes the
//! step killed each time, and taken back.

use super::{Domain, How, On, Standing, Traffic};
use crate::forced_rotation::serials;
use serde_json::Value;
use std::process::Command;
use std::time::Duration;
use testkit::{Output, Server, eventually_within, finial};

/// A step is not taken before everybody is ready for it, and a server that was killed is waited for.
const STEP: Duration = Duration::from_secs(120);

fn authority(server: &Server, args: &[&str]) -> Output {
    Output::of(Command::new(finial()).arg("authority").args(args).arg("-socketPath").arg(server.socket()))
}

/// The newest order of that kind, as that server has it.
fn order(server: &Server, kind: &str) -> Result<Value, String> {
    let out = authority(server, &["status", kind, "-output", "json"]);
    let said: Value = serde_json::from_str(&out.stdout).map_err(|e| format!("{e}: {}{}", out.stdout, out.stderr))?;
    Ok(said["rotations"][0].clone())
}

/// Everything is off what was there before, and that is trusted no more.
fn has_moved(domain: &Domain, traffic: &Traffic, kind: &str, old: &[String], agents: &[String]) {
    let new = domain.authorities(kind, Standing::Active);
    assert!(new.iter().all(|id| !old.contains(id)), "{new:?} after {old:?}");
    traffic.all_say("trusted", &new);
    traffic.all_say("left", old);
    traffic.all_hang(domain.name, kind, &new, old);
    if kind == "x509" {
        domain.agents_moved(agents);
    }
    traffic.goes_on();
}

/// The order is waited for where it was given.
fn in_one_go(domain: &Domain, traffic: &Traffic, kind: &str) {
    let (old, agents) = (domain.authorities(kind, Standing::Active), serials(&domain.servers[0]));
    let out = authority(&domain.servers[0], &["rotate", &format!("-{kind}"), "-wait", "-revoke", "-timeout", "2m"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    has_moved(domain, traffic, kind, &old, &agents);
}

/// At each step another server is told, and killed when it has said that it heard.
fn step_by_step(domain: &mut Domain, traffic: &Traffic, kind: &str) {
    let (old, agents) = (domain.authorities(kind, Standing::Active), serials(&domain.servers[0]));
    let flag = format!("-{kind}");
    let mut number = String::new();
    for turn in 0..4 {
        let at = turn % domain.servers.len();
        eventually_within(STEP, "the step may be taken", || {
            let begin = ["rotate", &flag, "-revoke"];
            let go_on = ["rotate", &flag, "-order", &number];
            let out = authority(&domain.servers[at], if turn == 0 { &begin } else { &go_on });
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
        domain.servers[at].process.kill();
        domain.servers[at].restart();
        let known = order(&domain.servers[at], &flag).expect("an order");
        number = known["id"].as_str().expect("a number").to_owned();
        traffic.goes_on();
    }
    for server in &domain.servers {
        eventually_within(STEP, "the order is done", || {
            let order = order(server, &flag)?;
            if order["done"] == true { Ok(()) } else { Err(order.to_string()) }
        });
    }
    has_moved(domain, traffic, kind, &old, &agents);
}

/// When all servers sign with what is new.
fn taken_back(domain: &Domain, traffic: &Traffic, kind: &str) {
    let (old, flag) = (domain.authorities(kind, Standing::Active), format!("-{kind}"));
    authority(&domain.servers[0], &["rotate", &flag, "-revoke"]).ok();
    let number = order(&domain.servers[0], &flag).expect("an order")["id"].as_str().expect("a number").to_owned();
    eventually_within(STEP, "the step may be taken", || {
        let out = authority(&domain.servers[0], &["rotate", &flag, "-order", &number]);
        if out.code == 0 { Ok(()) } else { Err(out.stderr) }
    });
    traffic.goes_on();
    authority(&domain.servers[0], &["take-back", &flag]).ok();
    for server in &domain.servers {
        eventually_within(STEP, "the order is taken back", || {
            let order = order(server, &flag)?;
            if order["done"] == true { Ok(()) } else { Err(order.to_string()) }
        });
    }
    assert_eq!(domain.authorities(kind, Standing::Active), old);
    traffic.goes_on();
}

/// The last token of a former authority is waited for.
fn tokens_of_seconds() -> How {
    How { server: "default_jwt_svid_ttl = \"10s\"".into(), ..How::default() }
}

fn ordered(on: On, what: &str) {
    let Some(mut domain) = Domain::start(on, &tokens_of_seconds()) else { return };
    let traffic = Traffic::among(&[&domain]);
    for kind in ["x509", "jwt"] {
        in_one_go(&domain, &traffic, kind);
        step_by_step(&mut domain, &traffic, kind);
    }
    traffic.finish(&[&domain], what, on == On::One);
}

#[test]
fn one_order_replaces_the_authorities_of_one_server() {
    ordered(On::One, "one order, one server");
}

#[test]
fn one_order_replaces_the_authorities_of_three_servers() {
    ordered(On::Three, "one order, three servers");
}

#[test]
fn one_order_to_three_servers_is_taken_back() {
    let Some(domain) = Domain::start(On::Three, &tokens_of_seconds()) else { return };
    let traffic = Traffic::among(&[&domain]);
    for kind in ["x509", "jwt"] {
        taken_back(&domain, &traffic, kind);
        in_one_go(&domain, &traffic, kind);
    }
    traffic.finish(&[&domain], "one order, taken back, three servers", false);
}
