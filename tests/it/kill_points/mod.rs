//! A server killed in the middle of each kind of write, on each kind of database: what is stored afterwards is all of it or
//! nothing, what was acknowledged is there, and the next server goes on.
//!
//! In a database process a write is stopped just before each table that it touches, with all its earlier statements done, and
//! once its commit is done, before the server hears of it; there the server is killed. With a SQLite file the server kills
//! itself within a write to the file, or just before a flush.

mod agents;
mod authorities;
mod calls;
mod unasked;
mod writes;

pub(crate) use authorities::{Orders, WIT};
use calls::Calls;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use testkit::{Database, Flavor, Output, Proxy, Server, ServerOptions, Workdir, eventually};

/// What there is of each table that is the same in each run: columns, and where they are from.
const TABLES: [(&str, &str, &str); 12] = [
    ("registered_entries", "e.spiffe_id, e.parent_id, e.hint, e.revision_number, e.expiry", "registered_entries e"),
    (
        "selectors",
        "e.spiffe_id, s.type, s.value",
        "selectors s left join registered_entries e on e.id = s.registered_entry_id",
    ),
    ("dns_names", "e.spiffe_id, d.value", "dns_names d left join registered_entries e on e.id = d.registered_entry_id"),
    (
        "federated_registration_entries",
        "e.spiffe_id, b.trust_domain",
        "federated_registration_entries f left join registered_entries e on e.id = f.registered_entry_id \
         left join bundles b on b.id = f.bundle_id",
    ),
    ("registered_entries_events", "count(*)", "registered_entries_events"),
    ("join_tokens", "count(*)", "join_tokens"),
    (
        "attested_node_entries",
        "spiffe_id, data_type, serial_number, new_serial_number, agent_version",
        "attested_node_entries",
    ),
    ("node_resolver_map_entries", "spiffe_id, type, value", "node_resolver_map_entries"),
    ("attested_node_entries_events", "count(*)", "attested_node_entries_events"),
    ("bundles", "trust_domain, DIGEST(data)", "bundles"),
    (
        "federated_trust_domains",
        "trust_domain, bundle_endpoint_url, bundle_endpoint_profile, endpoint_spiffe_id",
        "federated_trust_domains",
    ),
    ("ca_journals", "DIGEST(data)", "ca_journals"),
];

/// What must hold whatever was interrupted: queries that find nothing.
const BROKEN: [(&str, &str); 6] = [
    (
        "an entry without selectors",
        "registered_entries e where not exists (select 1 from selectors s where s.registered_entry_id = e.id)",
    ),
    (
        "selectors of no entry",
        "selectors s where not exists (select 1 from registered_entries e where s.registered_entry_id = e.id)",
    ),
    (
        "DNS names of no entry",
        "dns_names d where not exists (select 1 from registered_entries e where d.registered_entry_id = e.id)",
    ),
    (
        "a federation of no entry or with no bundle",
        "federated_registration_entries f where not exists (select 1 from registered_entries e where f.registered_entry_id = e.id) \
         or not exists (select 1 from bundles b where b.id = f.bundle_id)",
    ),
    (
        "selectors of no agent",
        "node_resolver_map_entries n where not exists (select 1 from attested_node_entries a where a.spiffe_id = n.spiffe_id)",
    ),
    (
        "a token that is both used and unused",
        "join_tokens t where exists (select 1 from attested_node_entries a where a.data_type = 'join_token' \
         and substr(a.spiffe_id, 45) = t.token)",
    ),
];

/// Which database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Postgres,
    MariaDb,
    Sqlite,
}

/// Where a server's data is.
enum Place {
    /// In a database process, reached through a proxy.
    Shared(Database, Proxy),
    /// In a file, written through a library that kills the server when a number is in a file of its folder.
    File(PathBuf, Workdir),
}

/// Where a server is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// Just before it writes this table, with all that the transaction wrote before done.
    Table(&'static str),
    /// When this commit of the work, from 1, is done, and the server has not heard of it.
    Commit(u32),
    /// At this step of writing the file.
    Step(u32),
}

impl Point {
    /// Those of the tables, in the order in which they are written, that are written before.
    fn after<'t>(&self, tables: &'t [&'static str]) -> &'t [&'static str] {
        match self {
            Self::Table(table) => tables.split(|t| t == table).next().unwrap_or_default(),
            Self::Commit(_) | Self::Step(_) => &[],
        }
    }
}

/// Whether the work has ended; holds what does it.
type Ended = Box<dyn FnMut() -> bool>;

fn ended(mut command: Child) -> Ended {
    Box::new(move || command.try_wait().expect("wait").is_some())
}

struct Rig {
    place: Place,
    server: Server,
}

impl Rig {
    fn start(on: On, more: ServerOptions) -> Option<Self> {
        let database = match on {
            On::Postgres => Some(testkit::postgres()?),
            On::MariaDb => Some(testkit::mariadb()?),
            On::Sqlite => None,
        };
        let (place, options) = match database {
            Some(database) => {
                let proxy = Proxy::to(database.port());
                let datastore = Some(testkit::datastore(&database, proxy.port()));
                (Place::Shared(database, proxy), ServerOptions { datastore, ..more })
            }
            None => {
                let dir = killing_library();
                let file = dir.path().join("datastore.sqlite3");
                let datastore = Some(format!("database_type = \"sqlite3\" connection_string = \"{}\"", file.display()));
                let mut environment = killing_environment(&dir);
                for (name, value) in &more.environment {
                    match environment.iter_mut().find(|(known, _)| known == name) {
                        Some((_, library)) => library.as_mut_os_string().extend([":".as_ref(), value.as_os_str()]),
                        None => environment.push((name, value.clone())),
                    }
                }
                (Place::File(file, dir), ServerOptions { datastore, environment, ..more })
            }
        };
        let server = Server::start(Flavor::Finial, &options);
        let rig = Self { place, server };
        if let Place::Shared(database, _) = &rig.place {
            database.prepare_holds(&TABLES.map(|(table, ..)| table));
        }
        Some(rig)
    }

    /// Where a write of these tables is stopped, in order.
    fn points(&self, tables: &[&'static str]) -> Vec<Point> {
        match &self.place {
            Place::Shared(..) => tables.iter().map(|table| Point::Table(table)).chain([Point::Commit(1)]).collect(),
            // Of a page, its header and itself are written.
            Place::File(..) => (0..40).map(|n| Point::Step(1 + 8 * n)).collect(),
        }
    }

    fn calls(&self) -> Calls {
        Calls::to(&self.server)
    }

    /// Changes what is stored. A file has no server meanwhile.
    fn change(&self, text: &str) {
        match &self.place {
            Place::Shared(database, _) => drop(database.ask(text)),
            Place::File(file, _) => drop(sqlite(file, text)),
        }
    }

    /// Starts a command in the background.
    fn command(&self, command: &str) -> Child {
        Command::new(self.server.dir.path().join("bin/spire-server"))
            .args(command.split_whitespace())
            .arg("-socketPath")
            .arg(self.server.socket())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a command")
    }

    fn run(&self, command: &str) -> Output {
        self.server.command(&command.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs SQL beside the server: of a file on a copy, so that the next server finds what the last one left.
    fn sql(&self, text: &str) -> String {
        match &self.place {
            Place::Shared(database, _) => database.ask(text),
            Place::File(file, dir) => sqlite(&copied(file, &dir.sub("copy")), text),
        }
    }

    /// All that is stored, a line per row; each begins with the name of its table.
    fn stored(&self) -> String {
        let digest = if matches!(self.place, Place::File(..)) { "hex" } else { "md5" };
        let rows = |(table, columns, from): &(&str, &str, &str)| match self.place {
            Place::Shared(..) => format!("select concat_ws('|', '{table}', {columns}) as stored from {from}"),
            Place::File(..) => {
                let columns: Vec<_> = columns.split(", ").map(|c| format!("coalesce({c}, '')")).collect();
                format!("select '{table}' || '|' || {} as stored from {from}", columns.join(" || '|' || "))
            }
        };
        let all: Vec<_> = TABLES.iter().map(rows).collect();
        self.sql(&format!("{} order by stored", all.join(" union all ").replace("DIGEST", digest)))
    }

    fn assert_whole(&self, when: &str) {
        let broken: Vec<_> = BROKEN.iter().map(|(what, from)| format!("select '{what}' from {from}")).collect();
        assert_eq!(self.sql(&broken.join(" union all ")), "", "{when}");
    }

    /// Begins `work` and kills the server at that point; gives whether it came to that, or the work ended before.
    fn kill_at(&mut self, point: Point, work: impl FnOnce(&mut Self) -> Ended) -> bool {
        self.kill_after(point, &[], work)
    }

    /// The same where the work has written these tables before.
    fn kill_after(&mut self, point: Point, written: &[&str], work: impl FnOnce(&mut Self) -> Ended) -> bool {
        let held = match (&self.place, point) {
            (Place::Shared(database, _), Point::Table(table)) => Some(database.hold_writes(table)),
            (Place::Shared(_, proxy), Point::Commit(nth)) => {
                proxy.hold_answer("COMMIT", nth);
                None
            }
            (Place::File(_, dir), Point::Step(number)) => {
                kill_at_step(dir, number);
                None
            }
            (_, point) => panic!("{point:?} is none of this place"),
        };
        let mut ended = work(self);
        let process = &mut self.server.process;
        let killed = |process: &mut testkit::Process| match &self.place {
            // Who has called hears of the end before the process is gone.
            Place::File(_, dir) => !dir.path().join("at").exists(),
            Place::Shared(..) => process.ended().is_some(),
        };
        let stopped = eventually("the write stops or ends", || {
            let stopped = match (&self.place, point) {
                (Place::Shared(_, proxy), Point::Commit(_)) => proxy.holds_answer(),
                (Place::Shared(database, _), _) => database.waiting() > 0,
                (Place::File(..), _) => killed(process),
            };
            // Who waits is not the work, if that has ended.
            match (stopped, ended()) {
                (_, true) => Ok(killed(process)),
                (true, false) => Ok(true),
                (false, false) => Err(process.log()),
            }
        });
        if let (Place::Shared(database, _), Point::Table(_), true) = (&self.place, point, stopped) {
            eventually("all before that was written", || match database.has_written(written) {
                true => Ok(()),
                false => Err(format!("not all of {written:?}")),
            });
        }
        self.server.process.kill();
        drop(held);
        match &self.place {
            Place::Shared(database, proxy) => {
                proxy.release();
                eventually("the database is done with the dead server", || match database.sessions() {
                    0 => Ok(()),
                    n => Err(format!("{n} sessions")),
                });
            }
            Place::File(_, dir) => drop(std::fs::remove_file(dir.path().join("at"))),
        }
        stopped
    }

    fn restart(&mut self) {
        self.server.process.kill();
        self.server.restart();
    }

    /// Keeps what is stored for [`Self::restore`]. The server ends.
    fn keep(&mut self) {
        self.server.process.terminate();
        match &self.place {
            Place::Shared(database, _) => {
                let copy =
                    |(table, ..): &(&str, &str, &str)| format!("create table kept_{table} as select * from {table};");
                database.sql(&TABLES.iter().map(copy).collect::<String>());
            }
            Place::File(file, dir) => copy_files(file.parent().expect("a folder"), &dir.sub("kept")),
        }
    }

    /// What was kept, and a server on it.
    fn restore(&mut self) {
        self.put_back();
        self.server.restart();
    }

    /// What was kept. The server has ended.
    fn put_back(&mut self) {
        self.server.process.kill();
        match &self.place {
            Place::Shared(database, _) => {
                let back = |(table, ..): &(&str, &str, &str)| {
                    format!("delete from {table}; insert into {table} select * from kept_{table};")
                };
                // One transaction, and the numbers go on: who read events before reads no other ones under the same numbers.
                database.ask(&format!("begin; {} commit", TABLES.iter().map(back).collect::<String>()));
            }
            Place::File(file, dir) => {
                let folder = file.parent().expect("a folder");
                for part in ["-wal", "-shm"] {
                    let _ = std::fs::remove_file(folder.join(format!("datastore.sqlite3{part}")));
                }
                copy_files(&dir.sub("kept"), folder);
            }
        }
    }
}

/// Copies a SQLite file with what lies beside it.
fn copy_files(from: &Path, to: &Path) {
    for name in ["datastore.sqlite3", "datastore.sqlite3-wal"] {
        if from.join(name).exists() {
            std::fs::copy(from.join(name), to.join(name)).expect("a copy");
        }
    }
}

/// A copy in that folder, which is emptied first.
fn copied(file: &Path, folder: &Path) -> PathBuf {
    std::fs::remove_dir_all(folder).expect("it is there");
    std::fs::create_dir(folder).expect("a folder");
    copy_files(file.parent().expect("a folder"), folder);
    folder.join("datastore.sqlite3")
}

fn sqlite(file: &Path, text: &str) -> String {
    sqlite_output(file, text).ok().stdout
}

fn sqlite_output(file: &Path, text: &str) -> Output {
    const SCRIPT: &str = "import sqlite3, sys
with sqlite3.connect(sys.argv[1], timeout=30) as c:
    for row in c.execute(sys.argv[2]): print(*row, sep='\\t')";
    Output::of(Command::new("python3").args(["-c", SCRIPT]).arg(file).arg(text))
}

/// With that library, a process kills itself while it writes its SQLite file, at the step whose number is in the folder's file
/// `at`, which is then gone.
pub(crate) fn killing_environment(library: &Workdir) -> Vec<(&'static str, PathBuf)> {
    vec![
        ("LD_PRELOAD", library.path().join("killed.so")),
        ("KILLED_IN", "datastore.sqlite3".into()),
        ("KILLED_AT", library.path().join("at")),
    ]
}

/// Begins to count steps, now.
pub(crate) fn kill_at_step(library: &Workdir, number: u32) {
    std::fs::write(library.path().join("new"), number.to_string()).expect("a file");
    std::fs::rename(library.path().join("new"), library.path().join("at")).expect("begins at once");
}

/// A folder with the library.
pub(crate) fn killing_library() -> Workdir {
    let dir = Workdir::new();
    let source = dir.write("killed.c", include_str!("../killed.c"));
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(dir.path().join("killed.so"));
    Output::of(compile.arg(source).arg("-ldl")).ok();
    dir
}
