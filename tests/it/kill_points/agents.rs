//! What agents write: they join, renew their SVID and begin to use it.

use super::calls::Identity;
use super::{Ended, On, Point, Rig};
use std::sync::mpsc::{Receiver, sync_channel};
use testkit::{ServerOptions, Workdir, eventually};

impl Rig {
    /// Makes a call in the background; what it was answered comes once the server has been killed, or before.
    fn call<T: Send + 'static>(&self, call: impl FnOnce(super::Calls) -> T + Send + 'static) -> (Ended, Receiver<T>) {
        let (answer, answered) = sync_channel(1);
        let calls = self.calls();
        let calling = std::thread::spawn(move || answer.send(call(calls)));
        (Box::new(move || calling.is_finished()), answered)
    }

    /// Kills the server at that point of a call; whether it came to that, and what the caller was answered.
    fn kill_call<T: Send + 'static>(
        &mut self,
        point: Point,
        written: &[&str],
        call: impl FnOnce(super::Calls) -> T + Send + 'static,
    ) -> (bool, T) {
        let mut answer = None;
        let stopped = self.kill_after(point, written, |rig| {
            let (ended, answered) = rig.call(call);
            answer = Some(answered);
            ended
        });
        (stopped, answer.expect("it was called").recv().expect("the call ends with the server"))
    }

    fn count(&self, table: &str, condition: &str) -> String {
        self.sql(&format!("select count(*) from {table} where {condition}")).trim().to_owned()
    }

    /// The agent's serial numbers: of the SVID that it uses, and of the one that it was given.
    fn serials(&self, agent: &Identity) -> [String; 2] {
        let id = &agent.id;
        ["serial_number", "new_serial_number"].map(|column| {
            self.sql(&format!("select {column} from attested_node_entries where spiffe_id = '{id}'")).trim().to_owned()
        })
    }
}

/// What is stored of agents: with their selectors.
fn agents(rig: &Rig) -> [String; 2] {
    let stored = rig.stored();
    ["attested_node_entries|", "node_resolver_map_entries|"].map(|table| {
        let rows = stored.lines().filter(|line| line.starts_with(table));
        rows.map(|row| format!("{row}\n")).collect()
    })
}

/// An agent that proves by a certificate who it is has the selectors of that certificate, also when it attests again by
/// another one.
fn attesting(on: On) {
    const NEW: [&str; 3] = ["attested_node_entries", "node_resolver_map_entries", "attested_node_entries_events"];
    // Where nothing is to be deleted, MariaDB writes selectors last.
    const NEW_ON_MARIADB: [&str; 3] =
        ["attested_node_entries", "attested_node_entries_events", "node_resolver_map_entries"];
    let files = Workdir::new();
    crate::takeover_live::node_certificate(&files);
    crate::takeover_live::one_more_node_certificate(&files, "other");
    let by = ["node", "other"].map(|name| {
        let file = |kind: &str| files.path().join(format!("{name}.{kind}"));
        (file("pem"), file("key"))
    });
    let plugins = format!(
        "NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{}\" \
         agent_path_template = \"/x509pop/{{{{ .Subject.CommonName }}}}\" }} }}",
        files.path().join("ca.pem").display()
    );
    let Some(mut rig) = Rig::start(on, ServerOptions { plugins, ..Default::default() }) else { return };
    let selectors = by.clone().map(|(certificate, key)| {
        rig.calls().attest_by(&certificate, &key).expect("it is let in");
        let [_, selectors] = agents(&rig);
        selectors
    });
    assert!(selectors[0] != selectors[1] && selectors.iter().all(|all| all.lines().count() > 2), "{selectors:?}");
    let mut turn = 0;
    for is_new in [true, false] {
        let tables = if is_new && on == On::MariaDb { &NEW_ON_MARIADB } else { &NEW };
        let mut seen = Vec::new();
        for point in rig.points(tables) {
            let when = format!("attesting, new: {is_new}, killed at {point:?}");
            if is_new {
                rig.server.process.kill();
                rig.change("delete from node_resolver_map_entries");
                rig.change("delete from attested_node_entries");
                rig.server.restart();
            }
            let before = agents(&rig);
            turn = 1 - turn;
            let (certificate, key) = by[turn].clone();
            let (stopped, answer) = rig.kill_call(point, point.after(tables), {
                let (certificate, key) = (certificate.clone(), key.clone());
                move |calls| calls.attest_by(&certificate, &key)
            });
            rig.assert_whole(&when);
            let after = agents(&rig);
            let done = after[0] != before[0];
            let expected = if done { &selectors[turn] } else { &before[1] };
            assert_eq!(&after[1], expected, "{when}: selectors of {:?}", after[0]);
            match &answer {
                Ok(agent) => assert!(after[0].contains(&agent.serial), "{when}: acknowledged and lost"),
                Err(why) => assert!(stopped, "{when}: {why}"),
            }
            assert!(stopped || matches!(point, Point::Step(_)), "{when}: it did not stop there");
            let expected = match point {
                Point::Table(_) => false,
                Point::Commit(_) => true,
                Point::Step(_) => done,
            };
            assert_eq!(done, expected, "{when}");
            seen.push(done);
            rig.server.restart();
            let again = rig.calls().attest_by(&certificate, &key);
            let again = again.unwrap_or_else(|why| panic!("{when}: asked again: {why}"));
            let [agent, now] = agents(&rig);
            assert!(agent.contains(&again.serial) && agent.lines().count() == 1, "{when}: asked again: {agent}");
            assert_eq!(now, selectors[turn], "{when}: asked again");
            rig.calls().let_in(&again).unwrap_or_else(|why| panic!("{when}: {why}"));
            if !stopped {
                break;
            }
        }
        assert!(seen.contains(&false) && seen.contains(&true), "before and after: {seen:?}");
    }
}

fn start(on: On) -> Option<Rig> {
    Rig::start(on, ServerOptions::default())
}

/// A token that let an agent in is used up, and one whose agent was not stored is not.
fn joining(on: On) {
    const TABLES: &[&str] = &["join_tokens", "attested_node_entries", "attested_node_entries_events"];
    let Some(mut rig) = start(on) else { return };
    let mut spent = Vec::new();
    for point in rig.points(TABLES) {
        let when = format!("joining, killed at {point:?}");
        let token = rig.server.join_token();
        let (joined, unused) = (format!("spiffe_id like '%/join_token/{token}'"), format!("token = '{token}'"));
        let written = point.after(TABLES);
        let (stopped, answer) = rig.kill_call(point, written, {
            let token = token.clone();
            move |calls| calls.attest(&token)
        });
        rig.assert_whole(&when);
        let (tokens, agents) = (rig.count("join_tokens", &unused), rig.count("attested_node_entries", &joined));
        assert_ne!(tokens, agents, "{when}: {tokens} tokens are left and {agents} agents are there");
        rig.server.restart();
        let again = rig.calls().attest(&token);
        match (agents.as_str(), &answer) {
            // What was acknowledged is there, and lets nobody else in.
            ("1", _) => assert!(again.is_err(), "{when}: the token was used twice"),
            (_, Err(_)) => assert!(again.is_ok(), "{when}: the token still lets the agent in: {:?}", again.err()),
            (_, Ok(_)) => panic!("{when}: the agent that was let in is lost"),
        }
        if let Ok(agent) = answer.or(again) {
            rig.calls().let_in(&agent).unwrap_or_else(|why| panic!("{when}: the agent: {why}"));
        }
        assert!(rig.calls().attest(&token).is_err(), "{when}: the token is used up now");
        spent.push(agents);
        if !stopped {
            assert!(matches!(point, Point::Step(_)), "{when}: it did not stop there");
            break;
        }
    }
    assert!(spent.contains(&"0".into()) && spent.contains(&"1".into()), "{spent:?}");
}

/// Killed while it renews an agent's SVID, and while it notes the first use of that: the agent is let in with what it has.
fn renewing(on: On) {
    const TABLES: &[&str] = &["attested_node_entries", "attested_node_entries_events"];
    let Some(mut rig) = start(on) else { return };
    let token = rig.server.join_token();
    let mut agent = rig.calls().attest(&token).expect("an agent");
    let mut seen = Vec::new();
    for point in rig.points(TABLES) {
        let when = format!("renewing, killed at {point:?}");
        let before_it = rig.serials(&agent);
        let caller = agent.clone();
        let (stopped, answer) = rig.kill_call(point, point.after(TABLES), move |calls| calls.renew(&caller));
        rig.assert_whole(&when);
        let after = rig.serials(&agent);
        seen.push(after != before_it);
        assert_eq!(after[0], agent.serial, "{when}: it is not the current one before it is used");
        match &answer {
            Ok(renewed) => assert_eq!(after[1], renewed.serial, "{when}: acknowledged and lost"),
            Err(_) => assert!(stopped, "{when}: {:?}", answer.as_ref().err()),
        }
        rig.server.restart();
        rig.calls().let_in(&agent).unwrap_or_else(|why| panic!("{when}: with the SVID that it has: {why}"));
        let renewed = match answer {
            Ok(renewed) => renewed,
            Err(_) => rig.calls().renew(&agent).unwrap_or_else(|why| panic!("{when}: asked again: {why}")),
        };
        assert_eq!(rig.serials(&agent), [agent.serial.clone(), renewed.serial.clone()], "{when}: asked again");
        agent = promoting(&mut rig, point, &agent, renewed);
        if !stopped {
            assert!(matches!(point, Point::Step(_)), "{when}: it did not stop there");
            break;
        }
    }
    assert!(seen.contains(&false) && seen.contains(&true), "before and after: {seen:?}");
    without_datastore(&mut rig, &agent);
}

/// The first use of a renewed SVID, killed at the same point. Gives the agent with it.
fn promoting(rig: &mut Rig, point: Point, agent: &Identity, renewed: Identity) -> Identity {
    const TABLES: &[&str] = &["attested_node_entries", "attested_node_entries_events"];
    let when = format!("the first use of an SVID, killed at {point:?}");
    let caller = renewed.clone();
    let (stopped, answer) = rig.kill_call(point, point.after(TABLES), move |calls| calls.let_in(&caller));
    assert!(stopped || answer.is_ok(), "{when}: {answer:?}");
    assert!(stopped || matches!(point, Point::Step(_)), "{when}: it did not stop there");
    rig.assert_whole(&when);
    let [current, next] = rig.serials(agent);
    let noted = current == renewed.serial && matches!(next.as_str(), "" | "NULL");
    assert!(noted || [&current, &next] == [&agent.serial, &renewed.serial], "{when}: {current} and {next}");
    let must = answer.is_ok() || matches!(point, Point::Commit(_));
    assert!(noted || !must, "{when}: acknowledged and lost");
    rig.server.restart();
    rig.calls().let_in(&renewed).unwrap_or_else(|why| panic!("{when}: it is let in with it: {why}"));
    eventually("its use is noted", || match rig.serials(agent) {
        [current, _] if current == renewed.serial => Ok(()),
        serials => Err(format!("{serials:?}")),
    });
    renewed
}

/// Renewed while nothing can be stored, which is acknowledged, and killed then: what the agent was given is good.
fn without_datastore(rig: &mut Rig, agent: &Identity) {
    let super::Place::Shared(database, _) = &rig.place else { return };
    let when = "killed after an SVID was renewed without the datastore";
    let held = database.hold_writes("attested_node_entries");
    let renewed = rig.calls().renew(agent).unwrap_or_else(|why| panic!("{when}: {why}"));
    rig.server.process.kill();
    drop(held);
    assert!(!rig.serials(agent).contains(&renewed.serial), "{when}: it was stored");
    rig.server.restart();
    rig.calls().let_in(&renewed).unwrap_or_else(|why| panic!("{when}: {why}"));
    eventually("it is stored", || match rig.serials(agent) {
        serials if serials.contains(&renewed.serial) => Ok(()),
        serials => Err(format!("{serials:?}")),
    });
    assert_eq!(rig.count("attested_node_entries", "1 = 1"), "1", "{when}: it did not attest again");
}

#[test]
fn on_postgresql_a_token_is_spent_with_the_agent_or_not_at_all() {
    joining(On::Postgres);
}

#[test]
fn on_mariadb_a_token_is_spent_with_the_agent_or_not_at_all() {
    joining(On::MariaDb);
}

#[test]
fn on_sqlite_a_token_is_spent_with_the_agent_or_not_at_all() {
    joining(On::Sqlite);
}

#[test]
fn on_postgresql_an_agent_has_the_selectors_of_its_last_attestation() {
    attesting(On::Postgres);
}

#[test]
fn on_mariadb_an_agent_has_the_selectors_of_its_last_attestation() {
    attesting(On::MariaDb);
}

#[test]
fn on_sqlite_an_agent_has_the_selectors_of_its_last_attestation() {
    attesting(On::Sqlite);
}

#[test]
fn on_postgresql_an_agent_that_renews_is_let_in_afterwards() {
    renewing(On::Postgres);
}

#[test]
fn on_mariadb_an_agent_that_renews_is_let_in_afterwards() {
    renewing(On::MariaDb);
}

#[test]
fn on_sqlite_an_agent_that_renews_is_let_in_afterwards() {
    renewing(On::Sqlite);
}
