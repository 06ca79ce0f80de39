//! Authorities: the first ones, and what operators order to be done with them. Whatever was published stays published until
//! it is revoked, and every authority that signs is published.

use super::calls::{Calls, KINDS, names};
use super::{Ended, On, Place, Point, Rig};
use finial_core::Bundle;
use finial_proto::convert::bundle_from_blob;
use finial_proto::{common, journal};
use prost::Message;
use std::path::PathBuf;
use std::process::Command;
use testkit::{Output, Server, ServerOptions, Workdir};

pub(crate) const WIT: &str = "experimental { feature_flags = [\"wit-svid\"] }";

impl Rig {
    /// A blob of a row; empty where there is none.
    fn blob(&self, query: &str) -> Vec<u8> {
        let hex = if self.is(On::Postgres) { "encode(data, 'hex')" } else { "hex(data)" };
        let said = self.sql(&query.replace("data", hex)).trim().to_owned();
        let digits = |at: usize| said.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).expect("hex");
        (0..said.len()).step_by(2).map(digits).collect()
    }

    fn is(&self, on: On) -> bool {
        match &self.place {
            Place::Shared(database, _) => {
                (database.kind() == testkit::DatabaseKind::Postgres) == (on == On::Postgres) && on != On::Sqlite
            }
            Place::File(..) => on == On::Sqlite,
        }
    }

    /// The own bundle as it is stored: what other servers, and all who ask them, know.
    pub(super) fn published(&self) -> Vec<String> {
        let blob = self.blob("select data from bundles where trust_domain = 'spiffe://example.org'");
        if blob.is_empty() {
            return Vec::new();
        }
        names(&bundle_from_blob(&common::Bundle::decode(blob.as_slice()).expect("a bundle")).expect("a bundle"))
    }

    /// The authorities that the journal calls active.
    fn active_in_journal(&self) -> Vec<String> {
        let entries =
            journal::Entries::decode(self.blob("select data from ca_journals").as_slice()).expect("a journal");
        let active = |status: i32| status == journal::Status::Active as i32;
        let x509 = entries.x509_c_as.into_iter().filter(|ca| active(ca.status)).map(|ca| ca.authority_id);
        let jwt = entries.jwt_keys.into_iter().filter(|key| active(key.status)).map(|key| key.authority_id);
        let wit = entries.wit_keys.into_iter().filter(|key| active(key.status)).map(|key| key.authority_id);
        x509.chain(jwt).chain(wit).collect()
    }

    /// All that was published is, and every authority signs and is published. Gives the bundle.
    fn assert_signs(&self, published: &[String], when: &str) -> Bundle {
        let calls = self.calls();
        let bundle = calls.bundle();
        let (now, stored) = (names(&bundle), self.published());
        assert!(published.iter().all(|id| now.contains(id)), "{when}: {published:?} became {now:?}");
        assert!(now.iter().all(|id| stored.contains(id)), "{when}: {now:?} is served and {stored:?} stored");
        for kind in KINDS {
            let [active, ..] = calls.authorities(kind);
            let hangs = kind == "x509" && self.upstream();
            assert!(hangs || now.contains(&active), "{when}: {kind} {active} signs and is not in {now:?}");
        }
        calls.sign();
        bundle
    }

    fn upstream(&self) -> bool {
        self.server.dir.path().join("upstream").exists()
    }
}

/// On each kind of database, the server is killed at each of these points of a first start.
fn first(on: On) {
    let Some(mut rig) = Rig::start(on, ServerOptions { server: WIT.into(), ..Default::default() }) else { return };
    let keys = rig.server.dir.path().join("data/keys.json");
    let points = match on {
        On::Sqlite => rig.points(&[]),
        _ => {
            let commits = (1..).take(40).map(Point::Commit);
            [Point::Table("bundles"), Point::Table("ca_journals")].into_iter().chain(commits).collect()
        }
    };
    let mut seen = Vec::new();
    for point in points {
        let when = format!("first authorities, killed at {point:?}");
        rig.server.process.kill();
        for table in ["ca_journals", "bundles"] {
            rig.change(&format!("delete from {table}"));
        }
        let _ = std::fs::remove_file(&keys);
        let stopped = rig.kill_at(point, |rig| {
            rig.server.begin();
            let (program, socket) = (rig.server.dir.path().join("bin/spire-server"), rig.server.socket());
            let mut healthy = Command::new(program);
            healthy.arg("healthcheck").arg("-socketPath").arg(socket);
            Box::new(move || Output::of(&mut healthy).code == 0)
        });
        let published = rig.published();
        rig.server.restart();
        // Another server may have let agents trust these, and they stay even where nobody has their keys.
        rig.assert_signs(&published, &when);
        let calls = rig.calls();
        let active: Vec<_> = KINDS.iter().map(|kind| calls.authorities(kind)[0].clone()).collect();
        assert!(active.iter().all(|id| rig.active_in_journal().contains(id)), "{when}: the journal knows what signs");
        rig.restart();
        for (kind, id) in KINDS.iter().zip(&active) {
            assert_eq!(&rig.calls().authorities(kind)[0], id, "{when}: the next start signs with the same {kind}");
        }
        if !stopped {
            break;
        }
        if !matches!(point, Point::Table(_)) {
            seen.push(published.len());
        }
    }
    seen.dedup();
    assert_eq!(seen, [0, 1, 2, 3], "killed before and after each kind was published");
}

/// Carries out orders, also beside a test.
#[derive(Clone)]
pub(crate) struct Orders {
    program: PathBuf,
    calls: Calls,
}

impl Orders {
    fn of(rig: &Rig) -> Self {
        Self::to(&rig.server)
    }

    pub(crate) fn to(server: &Server) -> Self {
        Self { program: server.dir.path().join("bin/spire-server"), calls: Calls::to(server) }
    }

    /// The IDs of the server's authorities of that kind: what signs, its successor, its predecessor; empty where none is.
    pub(crate) fn authorities(&self, kind: &str) -> [String; 3] {
        self.calls.authorities(kind)
    }

    /// The IDs of all that is in the server's bundle.
    pub(crate) fn published(&self) -> Vec<String> {
        names(&self.calls.bundle())
    }

    pub(crate) fn is_tainted(&self, id: &str) -> bool {
        is_tainted(&self.calls.bundle(), id)
    }

    pub(crate) fn order(&self, kind: &str, step: &str, id: &str) -> Result<(), String> {
        if kind == "wit" {
            return self.calls.order_wit(step, id.to_owned());
        }
        let mut command = Command::new(&self.program);
        match (kind, step) {
            ("upstream", _) => command.args(["upstreamauthority", step, "-subjectKeyID", id]),
            (_, "prepare") => command.args(["localauthority", kind, step]),
            _ => command.args(["localauthority", kind, step, "-authorityID", id]),
        };
        match Output::of(command.arg("-socketPath").arg(self.calls.socket())) {
            out if out.code == 0 => Ok(()),
            out => Err(out.stderr),
        }
    }

    /// Everything that comes before a step; gives the authority that it is about.
    fn ready(&self, kind: &str, step: &str) -> String {
        let order = |step: &str, standing: usize| {
            let id = self.calls.authorities(kind)[standing].clone();
            self.order(kind, step, &id).unwrap_or_else(|why| panic!("{kind} {step}: {why}"));
        };
        let steps = [("prepare", 0), ("activate", 1), ("taint", 2), ("revoke", 2)];
        let before = steps.iter().take_while(|(name, _)| *name != step);
        before.for_each(|(name, standing)| order(name, *standing));
        steps
            .iter()
            .find(|(name, _)| *name == step)
            .map(|(_, at)| self.calls.authorities(kind)[*at].clone())
            .expect("a step")
    }
}

/// Kills the server at a point of an order.
fn kill_order(rig: &mut Rig, point: Point, kind: &'static str, step: &'static str, id: &str) -> bool {
    let (orders, id) = (Orders::of(rig), id.to_owned());
    rig.kill_at(point, |_| -> Ended {
        let ordering = std::thread::spawn(move || orders.order(kind, step, &id));
        Box::new(move || ordering.is_finished())
    })
}

/// Where an order is stopped; each of the tables is a transaction of its own.
fn points_of(rig: &Rig, tables: &[&'static str]) -> Vec<Point> {
    match &rig.place {
        Place::File(..) => rig.points(tables),
        Place::Shared(..) => {
            let commits = (1..).take(tables.len()).map(Point::Commit);
            tables.iter().map(|table| Point::Table(table)).chain(commits).collect()
        }
    }
}

fn orders(on: On) {
    let Some(mut rig) = Rig::start(on, ServerOptions { server: WIT.into(), ..Default::default() }) else { return };
    const STEPS: [(&str, &[&str]); 4] = [
        ("prepare", &["ca_journals", "bundles"]),
        ("activate", &["ca_journals"]),
        ("taint", &["bundles"]),
        ("revoke", &["bundles"]),
    ];
    for kind in KINDS {
        for (step, tables) in STEPS {
            for point in points_of(&rig, tables) {
                let when = format!("{kind} {step}, killed at {point:?}");
                let id = Orders::of(&rig).ready(kind, step);
                let [active, ..] = rig.calls().authorities(kind);
                let mut published = rig.published();
                let stopped = kill_order(&mut rig, point, kind, step, &id);
                assert!(stopped || matches!(point, Point::Step(_)), "{when}: it did not stop there");
                let done = if step == "revoke" { !rig.published().contains(&id) } else { false };
                assert!(!done || !matches!(point, Point::Table(_)), "{when}: it was not stopped before that");
                published.retain(|name| step != "revoke" || *name != id);
                rig.server.restart();
                rig.assert_signs(&published, &when);
                let [now, ..] = rig.calls().authorities(kind);
                let may_sign = now == active || step == "activate" && now == id;
                assert!(may_sign, "{when}: {now} signs after {active}");
                finish(&rig, kind, step, &id, &when);
                rig.restart();
                published.retain(|name| step != "revoke" || *name != id);
                let bundle = rig.assert_signs(&published, &when);
                assert_eq!(names(&bundle).contains(&id), step != "revoke", "{when}: {id} in {:?}", names(&bundle));
                if !stopped {
                    break;
                }
            }
        }
    }
}

/// What was not done is done now; what was done is refused, and is done once.
fn finish(rig: &Rig, kind: &str, step: &str, id: &str, when: &str) {
    let orders = Orders::of(rig);
    let again = orders.order(kind, step, id);
    let [active, prepared, _] = orders.calls.authorities(kind);
    match step {
        "prepare" => {
            again.unwrap_or_else(|why| panic!("{when}: {why}"));
            assert!(rig.published().contains(&prepared), "{when}: {prepared} is published");
        }
        "activate" => assert_eq!(active, id, "{when}: {again:?}"),
        "taint" => {
            let tainted = again.as_ref().err().is_none_or(|why| why.contains("already tainted"));
            assert!(tainted && is_tainted(&orders.calls.bundle(), id), "{when}: {again:?}");
        }
        _ => assert!(!rig.published().contains(&id.to_owned()), "{when}: {again:?}"),
    }
}

fn is_tainted(bundle: &Bundle, id: &str) -> bool {
    let tainted = bundle.x509_authorities.iter().map(|root| root.tainted);
    let keys = bundle.jwt_authorities.iter().chain(&bundle.wit_authorities).map(|key| key.tainted);
    names(bundle).into_iter().zip(tainted.chain(keys)).any(|(name, tainted)| name == id && tainted)
}

/// The same about what stands above: a new root comes, the old one is tainted and revoked.
fn orders_about_upstream(on: On) {
    let folder = Workdir::new();
    let new_root = || crate::forced_rotation::root(folder.path(), "upstream");
    let mut old = new_root();
    let at = folder.path().display();
    let plugins = format!(
        "UpstreamAuthority \"disk\" {{ plugin_data {{ cert_file_path = \"{at}/root.pem\" key_file_path = \"{at}/root.key\" }} }}"
    );
    let Some(mut rig) = Rig::start(on, ServerOptions { plugins, server: WIT.into(), ..Default::default() }) else {
        return;
    };
    rig.server.dir.sub("upstream");
    for point in points_of(&rig, &["bundles"]) {
        let (new, mut any) = (new_root(), false);
        for (step, kind) in [("prepare", "x509"), ("taint", "upstream"), ("revoke", "upstream")] {
            // Before a root is in the bundle, what hangs from it is in the journal.
            let point = if (step, point) == ("prepare", Point::Commit(1)) { Point::Commit(2) } else { point };
            let when = format!("{step} of what stands above, killed at {point:?}");
            let mut published = rig.published();
            let stopped = kill_order(&mut rig, point, kind, step, &old);
            any |= stopped;
            assert!(stopped || matches!(point, Point::Step(_)), "{when}: it did not stop there");
            published.retain(|name| step != "revoke" || *name != old);
            rig.server.restart();
            rig.assert_signs(&published, &when);
            let orders = Orders::of(&rig);
            let again = orders.order(kind, step, &old);
            match step {
                "prepare" => {
                    again.unwrap_or_else(|why| panic!("{when}: {why}"));
                    assert!(rig.published().contains(&new), "{when}: the new root is published");
                    let prepared = &orders.calls.authorities("x509")[1];
                    orders.order("x509", "activate", prepared).unwrap_or_else(|why| panic!("{when}: {why}"));
                }
                "taint" => assert!(is_tainted(&orders.calls.bundle(), &old), "{when}: {again:?}"),
                _ => assert!(!rig.published().contains(&old), "{when}: {again:?}"),
            }
            rig.restart();
            rig.assert_signs(&published, &when);
        }
        assert!(!rig.published().contains(&old), "what was revoked does not come back");
        old = new;
        if !any {
            return;
        }
    }
}

#[test]
fn on_postgresql_first_authorities_are_published_before_they_sign() {
    first(On::Postgres);
}

#[test]
fn on_mariadb_first_authorities_are_published_before_they_sign() {
    first(On::MariaDb);
}

#[test]
fn on_sqlite_first_authorities_are_published_before_they_sign() {
    first(On::Sqlite);
}

#[test]
fn on_postgresql_orders_about_authorities_lose_none() {
    orders(On::Postgres);
    orders_about_upstream(On::Postgres);
}

#[test]
fn on_mariadb_orders_about_authorities_lose_none() {
    orders(On::MariaDb);
    orders_about_upstream(On::MariaDb);
}

#[test]
fn on_sqlite_orders_about_authorities_lose_none() {
    orders(On::Sqlite);
    orders_about_upstream(On::Sqlite);
}
