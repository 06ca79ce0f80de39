//! What a server writes that nobody asked for: bundles that it fetches, and the end of what has expired.

use super::calls::KINDS;
use super::{Ended, On, Place, Point, Rig};
use finial_core::{Clock, SystemClock};
use std::path::Path;
use std::process::Command;
use testkit::{Flavor, Output, Server, ServerOptions, Workdir, eventually, free_port};

/// What is removed when its time has passed, in the order in which a server looks after it: each part of it, and the tables in
/// the order in which they are written.
const EXPIRED: [(&[&str], &[&str]); 6] = [
    (
        &[
            "registered_entries where entry_id = 'kill-me'",
            "selectors where type = 'a'",
            "dns_names",
            "federated_registration_entries",
        ],
        &[
            "federated_registration_entries",
            "selectors",
            "dns_names",
            "registered_entries",
            "registered_entries_events",
        ],
    ),
    (&["join_tokens"], &["join_tokens"]),
    (
        &[
            "attested_node_entries",
            "node_resolver_map_entries",
            "registered_entries where spiffe_id = 'spiffe://example.org/node'",
            "selectors where type = 'spiffe_id'",
        ],
        &[
            "selectors",
            "registered_entries",
            "registered_entries_events",
            "node_resolver_map_entries",
            "attested_node_entries",
            "attested_node_entries_events",
        ],
    ),
    (
        &["registered_entries_events where id <= 2", "attested_node_entries_events where id <= 1"],
        &["registered_entries_events", "attested_node_entries_events"],
    ),
    (&[], &["bundles"]),
    (&["ca_journals where active_x509_authority_id = 'gone'"], &["ca_journals"]),
];

/// A server's clock: forty days from now, and how many hours more.
fn set_clock(dir: &Path, hours_more: Option<u32>) {
    let seconds = hours_more.map_or(0, |hours| 40 * 24 * 3600 + hours * 3600);
    std::fs::write(dir.join("new"), format!("+{seconds}")).expect("a file");
    std::fs::rename(dir.join("new"), dir.join("clock")).expect("at once");
}

impl Rig {
    /// How much there still is of each part.
    fn left_of(&self, parts: &[&str]) -> Vec<String> {
        let count = |part: &&str| self.sql(&format!("select count(*) from {part}")).trim().to_owned();
        parts.iter().map(count).collect()
    }
}

/// Killed while it removes what has expired: of each part nothing is gone, or all, and the rest goes later.
fn prune(on: On) {
    let clock = Workdir::new();
    set_clock(clock.path(), None);
    let environment = vec![
        ("LD_PRELOAD", testkit::faketime()),
        ("FAKETIME_TIMESTAMP_FILE", clock.path().join("clock")),
        ("FAKETIME_NO_CACHE", "1".into()),
    ];
    let server = "prune_attested_nodes_expired_for = \"1h\"\n prune_tofu_nodes = true\n \
                  experimental { feature_flags = [\"wit-svid\"] prune_events_older_than = \"1h\" }";
    let Some(mut rig) = Rig::start(on, ServerOptions { environment, server: server.into(), ..Default::default() })
    else {
        return;
    };
    let foreign = rig.server.dir.write("other.json", &super::writes::bundles()[0]);
    rig.run(&format!("bundle set -id other.example -format spiffe -path {}", foreign.display())).ok();
    let token = rig.server.join_token();
    let agent = rig.calls().attest(&token).expect("an agent");
    rig.run("token generate").ok();
    let expiry = SystemClock.now() + 3600;
    rig.run(&format!(
        "entry create -parentID spiffe://example.org/node -spiffeID spiffe://example.org/a -selector a:1 -selector a:2 \
         -dns a.example.org -federatesWith other.example -entryID kill-me -entryExpiry {expiry}"
    ))
    .ok();
    rig.server.process.kill();
    let id = agent.id;
    rig.change(&format!("insert into node_resolver_map_entries (spiffe_id, type, value) values ('{id}', 'x', 'y')"));
    // Of another server, which is no more.
    rig.change("insert into ca_journals (data, active_x509_authority_id) select data, 'gone' from ca_journals");
    let roots = rig.published();
    set_clock(clock.path(), Some(0));
    rig.server.restart();
    assert!(roots.iter().all(|root| rig.published().contains(root)), "what has expired is still there");
    let all: Vec<_> = EXPIRED.iter().map(|(parts, _)| rig.left_of(parts)).collect();
    assert!(all.iter().flatten().all(|left| left != "0"), "{all:?}");
    rig.keep();
    prune_in_turn(&mut rig, &clock, &all, &roots);
    if on == On::Sqlite {
        return;
    }
    rig.put_back();
    for (nth, (parts, tables)) in EXPIRED.iter().enumerate() {
        if tables.contains(&"attested_node_entries_events") && tables.len() == 2 {
            // The agents that expired would be what stops there.
            EXPIRED[nth - 1].0.iter().for_each(|part| rig.change(&format!("delete from {part}")));
        }
        for (at, table) in tables.iter().copied().enumerate() {
            let when = format!("{parts:?} expire, killed at {table}");
            rig.server.process.kill();
            let stopped = rig.kill_after(Point::Table(table), tables.get(..at).unwrap_or_default(), |rig| {
                set_clock(clock.path(), Some(0));
                rig.server.restart();
                set_clock(clock.path(), Some(9));
                Box::new(|| false)
            });
            assert!(stopped, "{when}: it did not stop there");
            rig.assert_whole(&when);
            let left: Vec<_> = EXPIRED.iter().map(|(parts, _)| rig.left_of(parts)).collect();
            assert_eq!(left[nth..], all[nth..], "{when}: nothing is gone of this, nor of what comes later");
            assert!(left[..nth].iter().flatten().all(|left| left == "0"), "{when}: {left:?}");
            assert!(
                !parts.is_empty() || roots.iter().all(|root| rig.published().contains(root)),
                "{when}: nothing is gone"
            );
        }
    }
    set_clock(clock.path(), Some(0));
    rig.server.restart();
    set_clock(clock.path(), Some(9));
    eventually("all goes in the end", || {
        let left: Vec<_> = EXPIRED.iter().flat_map(|(parts, _)| rig.left_of(parts)).collect();
        let published = rig.published();
        let gone = left.iter().all(|left| left == "0") && !roots.iter().any(|root| published.contains(root));
        if gone { Ok(()) } else { Err(format!("{left:?}, {published:?}\n{}", rig.server.process.log())) }
    });
    rig.assert_whole("at the end");
    for kind in KINDS {
        assert!(rig.published().contains(&rig.calls().authorities(kind)[0]), "{kind}: what signs is published");
    }
}

/// Killed after each commit, or at steps of writing the file: what comes earlier is gone, and of nothing only a part.
fn prune_in_turn(rig: &mut Rig, clock: &Workdir, all: &[Vec<String>], roots: &[String]) {
    let points = match rig.place {
        Place::File(..) => rig.points(&[]),
        Place::Shared(..) => (1..).take(EXPIRED.len()).map(Point::Commit).collect(),
    };
    let mut seen = Vec::new();
    for point in points {
        let when = format!("what has expired goes, killed at {point:?}");
        set_clock(clock.path(), Some(0));
        rig.restore();
        let gone = last_is_gone(rig);
        let stopped = rig.kill_at(point, |_| {
            set_clock(clock.path(), Some(9));
            gone
        });
        rig.assert_whole(&when);
        let left: Vec<_> = EXPIRED.iter().map(|(parts, _)| rig.left_of(parts)).collect();
        let published = rig.published();
        let mut is_gone: Vec<bool> = Vec::new();
        for (nth, (left, all)) in left.iter().zip(all).enumerate() {
            let gone = match left.is_empty() {
                true => roots.iter().all(|root| !published.contains(root)),
                false => left.iter().all(|left| left == "0"),
            };
            let whole = left == all && (!left.is_empty() || roots.iter().all(|root| published.contains(root)));
            assert!(
                gone || whole,
                "{when}: a part of {:?} is gone: {left:?} of {all:?}, {published:?}",
                EXPIRED[nth].0
            );
            is_gone.push(gone);
        }
        assert!(is_gone.is_sorted_by(|earlier, later| earlier >= later), "{when}: in another order: {is_gone:?}");
        let count = is_gone.iter().filter(|gone| **gone).count();
        if let Point::Commit(nth) = point {
            assert!(!stopped || count == nth as usize, "{when}: {is_gone:?}");
        }
        seen.push(count);
        if !stopped {
            assert_eq!(count, EXPIRED.len(), "{when}: {is_gone:?}");
            break;
        }
    }
    assert!(seen.is_sorted() && seen.last() == Some(&EXPIRED.len()), "{seen:?}");
    assert!(seen.first() < Some(&2), "{seen:?}");
}

/// Whether the last that goes is gone, where no point may be left.
fn last_is_gone(rig: &Rig) -> Ended {
    let Place::File(file, dir) = &rig.place else { return Box::new(|| false) };
    let (file, to) = (file.clone(), dir.sub("looked-at"));
    Box::new(move || {
        let looked = super::sqlite_output(
            &super::copied(&file, &to),
            "select count(*) from ca_journals where active_x509_authority_id = 'gone'",
        );
        // What is being written cannot always be copied.
        looked.code == 0 && looked.stdout.trim() == "0"
    })
}

/// Killed while it stores a bundle that it fetched: the old one is there or the new one, and the next server gets the new one.
fn refresh(on: On) {
    let port = free_port();
    let endpoint = format!(
        "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} profile \"https_spiffe\" {{}} }} }}"
    );
    let options = ServerOptions { trust_domain: "other.example".into(), server: endpoint, ..Default::default() };
    let other = Server::start(Flavor::Finial, &options);
    let Some(mut rig) = Rig::start(on, ServerOptions::default()) else { return };
    let bundle = other.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let file = other.dir.write("bundle.json", &bundle);
    rig.run(&format!("bundle set -id other.example -format spiffe -path {}", file.display())).ok();
    other.command(&["localauthority", "x509", "prepare"]).ok();
    // A server that starts looks at once.
    rig.server.process.terminate();
    let relationship = format!(
        "insert into federated_trust_domains (trust_domain, bundle_endpoint_url, bundle_endpoint_profile, endpoint_spiffe_id, implicit) \
         values ('other.example', 'https://127.0.0.1:{port}', 'https_spiffe', 'spiffe://other.example/spire/server', false)"
    );
    match &rig.place {
        Place::Shared(database, _) => drop(database.ask(&relationship)),
        Place::File(file, _) => drop(super::sqlite(file, &relationship)),
    }
    rig.keep();
    let before = rig.stored();
    rig.server.restart();
    let refreshed = |rig: &Rig| {
        eventually("the new bundle is there", || match rig.stored() {
            stored if stored != before => Ok(stored),
            _ => Err(rig.server.process.log()),
        })
    };
    let done = refreshed(&rig);
    let mut seen = Vec::new();
    let points = match on {
        On::Sqlite => rig.points(&[]),
        // What a start commits comes first.
        _ => [Point::Table("bundles")].into_iter().chain((1..10).map(Point::Commit)).collect(),
    };
    for point in points {
        let when = format!("a fetched bundle, killed at {point:?}");
        rig.server.process.kill();
        rig.put_back();
        let stopped = rig.kill_at(point, |rig| {
            rig.server.begin();
            let (program, socket) = (rig.server.dir.path().join("bin/spire-server"), rig.server.socket());
            let mut list = Command::new(program);
            list.args(["bundle", "list", "-id", "other.example", "-socketPath"]).arg(socket);
            // Two roots: it is stored, and served.
            Box::new(move || Output::of(&mut list).stdout.matches("BEGIN CERTIFICATE").count() == 2)
        });
        let after = rig.stored();
        assert!([&before, &done].contains(&&after), "{when}: {after:?} is neither {before:?} nor {done:?}");
        assert!(stopped || after == done, "{when}: it did not stop there");
        assert!(after == before || !matches!(point, Point::Table(_)), "{when}: it was not stopped before that");
        seen.push(after == done);
        rig.server.restart();
        assert_eq!(refreshed(&rig), done, "{when}: the next server has the new one");
        if after == done {
            break;
        }
    }
    assert!(seen.contains(&false) && seen.contains(&true), "before and after: {seen:?}");
}

#[test]
fn on_postgresql_a_fetched_bundle_is_there_wholly_or_not_at_all() {
    refresh(On::Postgres);
}

#[test]
fn on_mariadb_a_fetched_bundle_is_there_wholly_or_not_at_all() {
    refresh(On::MariaDb);
}

#[test]
fn on_sqlite_a_fetched_bundle_is_there_wholly_or_not_at_all() {
    refresh(On::Sqlite);
}

#[test]
fn on_sqlite_what_expires_goes_wholly_or_not_at_all() {
    prune(On::Sqlite);
}

#[test]
fn on_postgresql_what_expires_goes_wholly_or_not_at_all() {
    prune(On::Postgres);
}

#[test]
fn on_mariadb_what_expires_goes_wholly_or_not_at_all() {
    prune(On::MariaDb);
}
