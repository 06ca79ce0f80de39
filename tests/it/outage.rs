//! The database goes away in every way it can: what reads and signs goes on, writes say that it is away, and all heals by
//! itself without a restart.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use testkit::{
    Agent, AgentOptions, Client, Database, Flavor, MariaDb, Output, Postgres, PostgresPair, Proxy, Server,
    ServerOptions, Weather, eventually,
};

/// A server on a database behind a proxy, an agent that has a workload's SVIDs, and what was acknowledged.
struct Rig {
    agent: Agent,
    server: Server,
    proxy: Proxy,
    writes: Writes,
}

/// Entries that are created one after the other, and those of them that were acknowledged.
#[derive(Default)]
pub(crate) struct Writes {
    acknowledged: Vec<String>,
    count: u32,
}

impl Writes {
    /// Creates one; remembers it when that was acknowledged.
    pub(crate) fn one(&mut self, server: &Server) -> Result<(), Output> {
        self.count += 1;
        let id = format!("spiffe://example.org/written/{}", self.count);
        let parent = "spiffe://example.org/node";
        let out = server.command(&["entry", "create", "-spiffeID", &id, "-parentID", parent, "-selector", "a:b"]);
        if out.code != 0 {
            return Err(out);
        }
        self.acknowledged.push(id);
        Ok(())
    }

    pub(crate) fn assert_nothing_is_lost(&self, server: &Server) {
        let shown = server.command(&["entry", "show"]).ok().stdout;
        for id in &self.acknowledged {
            assert!(shown.contains(&format!(": {id}\n")), "{id} was acknowledged and is gone:\n{shown}");
        }
    }
}

impl Rig {
    fn start(database: &Database) -> Self {
        let proxy = Proxy::to(database.port());
        let datastore = Some(testkit::datastore(database, proxy.port()));
        let server = Server::start(Flavor::Finial, &ServerOptions { datastore, ..Default::default() });
        server.entry("/workload", &["-x509SVIDTTL", "12"]);
        let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
        let mut rig = Self { agent, server, proxy, writes: Writes::default() };
        rig.write().expect("a write while all is well");
        rig
    }

    fn write(&mut self) -> Result<(), Output> {
        self.writes.one(&self.server)
    }

    /// What must work with no database: signing for admins and for the agent, and renewal of what the workload has.
    fn assert_reads_and_signs(&self, name: &str) {
        let mint = ["x509", "mint", "-spiffeID", "spiffe://example.org/minted"];
        self.server.command(&mint).ok();
        // An audience that nobody asked for before: the agent has to ask the server, which has to know the agent.
        let audience = format!("{name}-{}", self.writes.count);
        self.agent.command(&["api", "fetch", "jwt", "-audience", &audience]).ok();
        let shown = self.server.command(&["entry", "show", "-spiffeID", "spiffe://example.org/workload"]).ok();
        assert!(shown.stdout.contains("Found 1 entry"), "{shown:?}");
        self.server.command(&["bundle", "show"]).ok();
        Client("go").events(&self.agent, &["watch", "2"]);
    }

    /// The server says whose fault it is, in SPIRE's code for it.
    fn assert_refuses_writes(&mut self) {
        let refused = self.write().expect_err("there is no database to write to");
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(said.contains("Unavailable") && said.contains("database"), "{said}");
        assert!(!said.contains("p4ss-w0rd"), "the password is nobody's business:\n{said}");
    }

    fn assert_heals(&mut self) {
        eventually("writes work again", || {
            self.write().map_err(|out| format!("{out:?}\n{}", self.server.process.log()))
        });
        self.writes.assert_nothing_is_lost(&self.server);
        // What came meanwhile reaches the agent.
        let new = self.server.entry(&format!("/healed/{}", self.writes.count), &["-x509SVIDTTL", "12"]);
        eventually("the agent has the new entry", || {
            let out = self.agent.command(&["api", "fetch", "x509"]).stdout;
            if out.contains(&new) { Ok(()) } else { Err(out) }
        });
        // All is well without it; but only a server that begins shows what the database holds.
        self.server.process.kill();
        self.server.restart();
        self.writes.assert_nothing_is_lost(&self.server);
    }

    /// From all well through `begin` and `end` to all well again.
    fn survives(&mut self, name: &str, begin: impl FnOnce(&Proxy), end: impl FnOnce(&Proxy)) {
        begin(&self.proxy);
        self.assert_refuses_writes();
        self.assert_reads_and_signs(name);
        end(&self.proxy);
        self.assert_heals();
    }
}

#[test]
fn postgres_is_restarted_killed_and_made_read_only() {
    let Some(postgres) = Postgres::start() else { return };
    let database = postgres.database();
    let mut rig = Rig::start(&database);
    rig.survives("stopped", |_| postgres.stop(), |_| postgres.start_again());
    rig.survives("killed", |_| postgres.kill(), |_| postgres.start_again());
    rig.survives("read-only", |_| postgres.read_only(true), |_| postgres.read_only(false));
}

#[test]
fn postgres_fails_over_to_its_standby() {
    let Some(pair) = PostgresPair::start() else { return };
    let database = pair.primary.database();
    let mut rig = Rig::start(&database);
    let begin = |_: &Proxy| {
        pair.wait_caught_up();
        pair.primary.crash();
    };
    rig.survives("failed over", begin, |proxy| {
        pair.standby.promote();
        proxy.set_targets(&[pair.standby.port()]);
    });
    // The dead primary's place is taken for good: nobody asks it again.
    rig.write().expect("a write on the new primary");
}

#[test]
fn postgres_is_unreachable_or_out_of_connections() {
    let Some(postgres) = Postgres::start() else { return };
    let database = postgres.database();
    let mut rig = Rig::start(&database);
    rig.survives("refused", refuse, |proxy| proxy.weather(Weather::Fair));
    let fill = |_: &Proxy| {
        database.limit_connections(Some(0));
        database.disconnect_all();
    };
    rig.survives("full", fill, |_| database.limit_connections(None));
}

#[test]
fn mariadb_is_unreachable_or_out_of_connections() {
    let Some(mariadb) = MariaDb::start() else { return };
    let (database, others) = (mariadb.database(), mariadb.database());
    let mut rig = Rig::start(&database);
    rig.survives("refused", refuse, |proxy| proxy.weather(Weather::Fair));
    let held = std::cell::RefCell::new(Vec::new());
    let fill = |proxy: &Proxy| {
        // One more is for administrators, as which SPIRE's user counts here.
        held.replace((0..11).map(|_| others.hold("SELECT 1")).collect());
        database.limit_connections(Some(10));
        proxy.cut(None);
    };
    rig.survives("full", fill, |_| {
        held.take();
        // They are gone for the server a moment later.
        eventually("the administrator is let in", || {
            let out = database.try_sql("SET GLOBAL max_connections = 200");
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    });
}

fn refuse(proxy: &Proxy) {
    proxy.weather(Weather::Refusing);
    proxy.cut(None);
}

#[test]
fn postgres_is_slow() {
    let Some(postgres) = Postgres::start() else { return };
    is_slow(&postgres.database());
}

#[test]
fn mariadb_is_slow() {
    let Some(mariadb) = MariaDb::start() else { return };
    is_slow(&mariadb.database());
}

fn is_slow(database: &Database) {
    let mut rig = Rig::start(database);
    rig.proxy.weather(Weather::Slow(Duration::from_secs(2)));
    std::thread::scope(|scope| {
        let (socket, dir) = (rig.server.socket(), rig.server.dir.path());
        let write = scope.spawn(move || create(dir, &socket));
        rig.assert_reads_and_signs("slow");
        let out = write.join().expect("the writer");
        assert!(out.code == 0 || out.stdout.contains("Unavailable"), "{out:?}");
    });
    rig.proxy.weather(Weather::Fair);
    rig.assert_heals();
}

#[test]
fn postgres_hangs() {
    let Some(postgres) = Postgres::start() else { return };
    hangs(&postgres.database());
}

#[test]
fn mariadb_hangs() {
    let Some(mariadb) = MariaDb::start() else { return };
    hangs(&mariadb.database());
}

/// The network is well, and the database itself does not answer.
#[test]
fn mariadb_is_frozen() {
    let Some(mariadb) = MariaDb::start() else { return };
    let database = mariadb.database();
    let mut rig = Rig::start(&database);
    rig.survives("frozen", |_| mariadb.freeze(true), |_| mariadb.freeze(false));
}

fn hangs(database: &Database) {
    let mut rig = Rig::start(database);
    rig.survives("hung", |proxy| proxy.weather(Weather::Hung), |proxy| proxy.weather(Weather::Fair));
    // Such a one is given many seconds to answer before anybody says that it is away.
    let log = rig.server.process.log();
    let said = log.split("The datastore answers again\" seconds=").nth(1).expect("how long it was away");
    assert!(!said.starts_with("0 "), "{log}");
}

#[test]
fn mariadb_is_restarted_killed_and_made_read_only() {
    let Some(mariadb) = MariaDb::start() else { return };
    let database: Database = Arc::clone(&mariadb).database();
    let mut rig = Rig::start(&database);
    rig.survives("stopped", |_| mariadb.stop(), |_| mariadb.start_again());
    rig.survives("killed", |_| mariadb.kill(), |_| mariadb.start_again());
    rig.survives("read-only", |_| mariadb.read_only(true), |_| mariadb.read_only(false));
}

/// The same command without the server's own handle, for another thread.
fn create(dir: &Path, socket: &Path) -> Output {
    let id = ["-spiffeID", "spiffe://example.org/slow", "-parentID", "spiffe://example.org/node", "-selector", "a:b"];
    let mut command = std::process::Command::new(dir.join("bin/spire-server"));
    Output::of(command.args(["entry", "create"]).args(id).arg("-socketPath").arg(socket))
}
