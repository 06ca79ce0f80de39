//! The server that is given an order is killed: while it carries it out, and when it has. It comes back, its journal and the
//! bundle tell which, and the operator goes on from there.

use super::{Domain, How, On, STEPS, Standing, Traffic};
use crate::forced_rotation::serials;
use crate::kill_points::{Orders, kill_at_step};
use std::io::Write;
use testkit::{Proxy, eventually_within};

/// When it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// The order is under way.
    Amid,
    /// The order was acknowledged.
    After,
}

impl Domain {
    /// The next write of the server at this place does not come to its end: it is stopped before it writes anything, or when
    /// all is written and it has not heard so; a SQLite file is left in the middle of it.
    fn stop_within(&self, at: usize, turn: usize) {
        if let Some(killer) = &self.killer {
            kill_at_step(killer, 1 + 5 * u32::try_from(turn).unwrap_or_default());
        }
        if let Some(road) = self.roads.get(at) {
            road.hold_answer(if turn % 2 == 0 { "COMMIT" } else { "BEGIN" }, 1);
        }
    }
}

/// Whether the step about this authority was carried out, by what a server says that has just been started.
fn is_done(orders: &Orders, kind: &str, step: &str, id: &str) -> bool {
    let [active, prepared, _] = orders.authorities(kind);
    match step {
        "prepare" => !prepared.is_empty() && orders.published().contains(&prepared),
        "activate" => active == id,
        "taint" => orders.is_tainted(id),
        _ => !orders.published().contains(&id.to_owned()),
    }
}

/// Gives the order to the server at this place, which is killed; the step is done in the end. Says how it went.
fn killed(domain: &mut Domain, kind: &'static str, turn: usize, when: When) -> &'static str {
    let (step, standing) = STEPS[turn];
    let at = turn % domain.servers.len();
    let orders = Orders::to(&domain.servers[at]);
    let id = orders.authorities(kind)[standing as usize].clone();
    if when == When::Amid {
        domain.stop_within(at, turn);
    }
    let server = &mut domain.servers[at];
    let ordering = std::thread::spawn({
        let (orders, id) = (orders.clone(), id.clone());
        move || orders.order(kind, step, &id)
    });
    let finished = |ordering: &std::thread::JoinHandle<_>| ordering.is_finished();
    let acknowledged = match when {
        When::After => Some(ordering.join().expect("an order")),
        When::Amid => {
            eventually_within(super::FLOW, "the server is in the middle of it", || {
                let held = domain.roads.get(at).is_some_and(Proxy::holds_answer);
                let ended = server.process.ended().is_some();
                if held || ended || finished(&ordering) { Ok(()) } else { Err(server.process.log()) }
            });
            None
        }
    };
    server.process.kill();
    domain.roads.iter().for_each(Proxy::release);
    if let Some(killer) = &domain.killer {
        let _ = std::fs::remove_file(killer.path().join("at"));
    }
    server.restart();
    let done = is_done(&orders, kind, step, &id);
    match acknowledged {
        Some(said) => {
            said.unwrap_or_else(|why| panic!("{kind} {step}: {why}"));
            assert!(done, "{kind} {step} of {id} was acknowledged and is not done");
            "kept"
        }
        None if done => "done",
        None => {
            orders.order(kind, step, &id).unwrap_or_else(|why| panic!("{kind} {step} again: {why}"));
            assert!(is_done(&orders, kind, step, &id), "{kind} {step} of {id}");
            "not done"
        }
    }
}

fn replaced(domain: &mut Domain, traffic: &Traffic, kind: &'static str, when: When, story: &mut Vec<String>) {
    let (old, agents) = (domain.authorities(kind, Standing::Active), serials(&domain.servers[0]));
    let mut new = Vec::new();
    for (turn, step) in STEPS.into_iter().enumerate() {
        let victim = turn % domain.servers.len();
        for at in 0..domain.servers.len() {
            if at == victim {
                let how = killed(domain, kind, turn, when);
                story.push(format!("{kind} {} {when:?} {how}", step.0));
            } else {
                let orders = Orders::to(&domain.servers[at]);
                let id = orders.authorities(kind)[step.1 as usize].clone();
                orders.order(kind, step.0, &id).unwrap_or_else(|why| panic!("{kind} {} {id}: {why}", step.0));
            }
        }
        match step.0 {
            "prepare" => {
                new = domain.authorities(kind, Standing::Prepared);
                traffic.all_say("trusted", &new);
            }
            "activate" => assert_eq!(domain.authorities(kind, Standing::Active), new),
            "taint" => {
                traffic.all_hang(domain, kind, &new, &old);
                if kind == "x509" {
                    domain.agents_moved(&agents);
                }
            }
            _ => traffic.all_say("left", &old),
        }
        traffic.goes_on();
    }
}

fn interrupted(on: On, what: &str) {
    let Some(mut domain) = Domain::start(on, &How { killed: true, ..How::default() }) else { return };
    let traffic = Traffic::among(&[&domain]);
    let mut story = Vec::new();
    for kind in ["x509", "jwt"] {
        for when in [When::Amid, When::After] {
            replaced(&mut domain, &traffic, kind, when, &mut story);
        }
    }
    let _ = writeln!(std::io::stderr(), "\n{what}: {}", story.join(", "));
    traffic.finish(&[&domain], what, on == On::One);
}

#[test]
fn one_server_is_killed_at_every_step_of_an_order() {
    interrupted(On::One, "killed, one server");
}

#[test]
fn the_one_of_three_servers_that_is_told_is_killed_at_every_step() {
    interrupted(On::Three, "killed, one of three servers");
}
