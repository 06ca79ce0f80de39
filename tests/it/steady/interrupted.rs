//! The server that is given an order is killed: while it carries it out, and when it has. It comes back, its journal and the
//! bundle tell which, and the operator goes on from there.

use super::upstream::below;
use super::{Domain, FLOW, How, On, STEPS, Standing, Traffic, replace};
use crate::forced_rotation::{root, serials};
use crate::kill_points::{Orders, kill_at_step};
use std::io::Write;
use testkit::{Proxy, Workdir, eventually_within};

/// When it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// The order is under way.
    Amid,
    /// The order was acknowledged.
    After,
}

/// An order: kind, step, and of which authority.
type Order = (&'static str, &'static str, String);

/// Whether it was carried out, by what a server says that has just been started.
fn is_done(orders: &Orders, (kind, step, id): &Order) -> bool {
    let published = |id: &String| orders.published().contains(id);
    match *step {
        "prepare" => !orders.authorities(kind)[Standing::Prepared as usize].is_empty(),
        "activate" => orders.authorities(kind)[Standing::Active as usize] == *id,
        "taint" => orders.is_tainted(id),
        _ => !published(id),
    }
}

impl Domain {
    /// The next write of the server at this place does not come to its end: it is stopped before it writes anything, or when
    /// all is written and it has not heard so; a SQLite file is left in the middle of it.
    fn stop_within(&self, at: usize, turn: usize) {
        if let Some(killer) = &self.killer {
            kill_at_step(killer, 1 + 2 * u32::try_from(turn).unwrap_or_default());
        }
        if let Some(road) = self.roads.get(at) {
            road.hold_answer(if turn.is_multiple_of(2) { "COMMIT" } else { "BEGIN" }, 1);
        }
    }

    /// Gives an order to the server at this place, which is killed; it is done in the end. Says how it went.
    fn killed(&mut self, at: usize, turn: usize, order: Order, when: When) -> String {
        let orders = Orders::to(&self.servers[at]);
        if when == When::Amid {
            self.stop_within(at, turn);
        }
        let server = &mut self.servers[at];
        let ordering = std::thread::spawn({
            let (orders, (kind, step, id)) = (orders.clone(), order.clone());
            move || orders.order(kind, step, &id)
        });
        let acknowledged = match when {
            When::After => Some(ordering.join().expect("an order")),
            When::Amid => {
                eventually_within(FLOW, "the server is in the middle of it", || {
                    let held = self.roads.get(at).is_some_and(Proxy::holds_answer);
                    let over = server.process.ended().is_some() || ordering.is_finished();
                    if held || over { Ok(()) } else { Err(server.process.log()) }
                });
                None
            }
        };
        server.process.kill();
        self.roads.iter().for_each(Proxy::release);
        if let Some(killer) = &self.killer {
            let _ = std::fs::remove_file(killer.path().join("at"));
        }
        server.restart();
        let done = is_done(&orders, &order);
        let (kind, step, id) = &order;
        let how = match acknowledged {
            Some(said) => {
                said.unwrap_or_else(|why| panic!("{kind} {step}: {why}"));
                assert!(done, "{kind} {step} of {id} was acknowledged and is not done");
                "kept"
            }
            None if done => "done",
            None => {
                orders.order(kind, step, id).unwrap_or_else(|why| panic!("{kind} {step} again: {why}"));
                assert!(is_done(&orders, &order), "{kind} {step} of {id}");
                "not done, again"
            }
        };
        format!("{kind} {step} {when:?}: {how}")
    }
}

/// At each step another server is killed, at which the step is done last.
fn replaced(domain: &mut Domain, traffic: &Traffic, kind: &'static str, when: When) -> Vec<String> {
    let mut story = Vec::new();
    replace(domain, traffic, kind, |domain, turn, (step, standing)| {
        let count = domain.servers.len();
        for at in (1..=count).map(|place| (turn + place) % count) {
            let orders = Orders::to(&domain.servers[at]);
            let id = orders.authorities(kind)[standing as usize].clone();
            if at == turn % count {
                story.push(domain.killed(at, turn, (kind, step, id), when));
            } else {
                orders.order(kind, step, &id).unwrap_or_else(|why| panic!("{kind} {step} {id}: {why}"));
            }
        }
    });
    story
}

fn interrupted(on: On, what: &str) {
    let Some(mut domain) = Domain::start(on, &How { killed: true, ..How::default() }) else { return };
    let traffic = Traffic::among(&[&domain]);
    let mut story = Vec::new();
    for kind in ["x509", "jwt"] {
        for when in [When::Amid, When::After] {
            story.extend(replaced(&mut domain, &traffic, kind, when));
        }
    }
    let _ = writeln!(std::io::stderr(), "\n{what}: {}", story.join(", "));
    traffic.finish(&[&domain], what, on == On::One);
}

/// The same with the root above; of several servers one is told, and killed.
fn interrupted_above(on: On, what: &str) {
    let folder = Workdir::new();
    let mut old = vec![root(folder.path(), "ROOT")];
    let how = How { killed: true, plugins: below(&folder), ..How::default() };
    let Some(mut domain) = Domain::start(on, &how) else { return };
    let traffic = Traffic::among(&[&domain]);
    let mut story = Vec::new();
    for when in [When::Amid, When::After] {
        let agents = serials(&domain.servers[0]);
        let new = vec![root(folder.path(), &format!("ROOT {when:?}"))];
        for (turn, (step, _)) in STEPS.into_iter().enumerate() {
            let of_root = matches!(step, "taint" | "revoke");
            let prepared = || domain.authorities("x509", Standing::Prepared)[0].clone();
            let id = if of_root { old[0].clone() } else { prepared() };
            let kind = if of_root { "upstream" } else { "x509" };
            story.push(domain.killed(0, turn, (kind, step, id), when));
            match step {
                "prepare" => traffic.all_say("trusted", &new),
                "activate" => {}
                "taint" => {
                    traffic.all_hang(domain.name, "x509", &new, &old);
                    domain.agents_moved(&agents);
                }
                _ => traffic.all_say("left", &old),
            }
            traffic.goes_on();
        }
        old = new;
    }
    let _ = writeln!(std::io::stderr(), "\n{what}: {}", story.join(", "));
    traffic.finish(&[&domain], what, on == On::One);
}

#[test]
fn one_server_is_killed_at_every_step_of_an_order() {
    interrupted(On::One, "killed, one server");
}

#[test]
fn one_of_three_servers_is_killed_at_every_step_of_an_order() {
    interrupted(On::Three, "killed, one of three servers");
}

#[test]
fn one_server_is_killed_at_every_step_of_an_order_about_the_root_above() {
    interrupted_above(On::One, "killed, root above, one server");
}

#[test]
fn the_one_of_three_servers_that_is_told_of_the_root_above_is_killed_at_every_step() {
    interrupted_above(On::Three, "killed, root above, one of three servers");
}
