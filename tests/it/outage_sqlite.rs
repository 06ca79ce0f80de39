//! SQLite's file is locked or damaged, its disk full, failing or read-only: what reads from memory and signs goes on, agents
//! renew their own SVIDs, writes say what is wrong, nothing that was acknowledged is lost, and what heals does so by itself.

use crate::outage::Writes;
use rustix::io::Errno;
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use testkit::{Agent, AgentOptions, Client, Flavor, Output, Server, ServerOptions, Workdir, eventually};

/// An agent renews its own SVID every eight seconds or so.
const TIMES: &str = r#"agent_ttl = "16s""#;

/// Runs a script of Python's with the file as its argument.
fn python(script: &str, file: &Path) -> String {
    Output::of(Command::new("python3").args(["-c", script]).arg(file)).ok().stdout
}

/// A server on a SQLite file, an agent that has a workload's SVIDs, and what was acknowledged.
struct Rig {
    agent: Agent,
    server: Server,
    file: PathBuf,
    writes: Writes,
}

impl Rig {
    fn start(folder: &Path) -> Self {
        Self::start_with(folder, Vec::new())
    }

    fn start_with(folder: &Path, environment: Vec<(&'static str, PathBuf)>) -> Self {
        let file = folder.join("datastore.sqlite3");
        let datastore = Some(format!("database_type = \"sqlite3\" connection_string = \"{}\"", file.display()));
        let options = ServerOptions { datastore, server: TIMES.into(), environment, ..Default::default() };
        let server = Server::start(Flavor::Finial, &options);
        server.entry("/workload", &["-x509SVIDTTL", "12"]);
        let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
        let mut rig = Self { agent, server, file, writes: Writes::default() };
        rig.write().expect("a write while all is well");
        rig
    }

    fn write(&mut self) -> Result<(), Output> {
        self.writes.one(&self.server)
    }

    /// Moves what lies beside the file into it, so that the next write needs room.
    fn checkpoint(&self) {
        eventually("a checkpoint", || self.try_checkpoint());
    }

    fn try_checkpoint(&self) -> Result<(), String> {
        const SCRIPT: &str = "import sqlite3, sys
with sqlite3.connect(sys.argv[1], timeout=2) as c: print(c.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchone()[0])";
        match python(SCRIPT, &self.file).trim() {
            "0" => Ok(()),
            busy => Err(busy.to_owned()),
        }
    }

    /// The same, after which the server has read nothing: it stands still, and what it had read before counts no more.
    fn checkpoint_and_stop(&self) {
        eventually("a checkpoint while the server stands still", || {
            self.server.process.signal(Signal::STOP);
            // It may have been stopped in the middle of a write.
            self.try_checkpoint().inspect_err(|_| self.server.process.signal(Signal::CONT))
        });
    }

    /// The agent's serial numbers as the file has them.
    fn stored(&self) -> String {
        const SCRIPT: &str = "import sqlite3, sys
with sqlite3.connect(sys.argv[1], timeout=30) as c:
    print(c.execute('select serial_number, new_serial_number from attested_node_entries').fetchall())";
        python(SCRIPT, &self.file)
    }

    fn renewals(&self) -> usize {
        self.agent.process.log().matches("Successfully rotated agent SVID").count()
    }

    /// How often the server renewed an agent's SVID on its own: the datastore failed, or did not answer in time.
    fn without_datastore(&self) -> usize {
        self.server.process.log().matches("SVID is renewed without").count()
    }

    /// The serial number of the agent's newest SVID.
    fn newest(&self) -> String {
        let log = self.server.process.log();
        let signed = log.lines().rev().find(|line| line.contains("purpose=Agent")).expect("there is one");
        let (_, number) = signed.split_once("serial_num=").expect("its number is told");
        number.split(' ').next().expect("a word").to_owned()
    }

    fn assert_refuses_writes(&mut self, why: &str) {
        let refused = eventually("a write is refused", || self.write().err().ok_or_else(|| "it went well".to_owned()));
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(said.contains(why) && said.contains("datastore.sqlite3"), "{said}");
    }

    /// The server signs for admins and for the agent, whose own SVID is renewed and used and renewed again.
    fn assert_signs(&mut self, name: &str) {
        let (before, without) = (self.renewals(), self.without_datastore());
        self.server.command(&["x509", "mint", "-spiffeID", "spiffe://example.org/minted"]).ok();
        self.assert_agent_is_let_in(name);
        Client("go").events(&self.agent, &["watch", "2"]);
        eventually("the agent renews its own SVID", || {
            assert!(self.agent.process.ended().is_none(), "the agent ended:\n{}", self.agent.process.log());
            match (self.renewals() - before, self.without_datastore() - without) {
                (2.., 2..) => Ok(()),
                counts => Err(format!("{counts:?} times:\n{}", self.server.process.log())),
            }
        });
        self.assert_agent_is_let_in(&format!("{name}-renewed"));
        // What is only read is there.
        self.writes.assert_nothing_is_lost(&self.server);
    }

    /// For an audience that nobody asked for before the agent has to ask the server, which has to know the agent.
    fn assert_agent_is_let_in(&self, audience: &str) {
        self.agent.command(&["api", "fetch", "jwt", "-audience", audience]).ok();
    }

    fn assert_heals(&mut self, name: &str) {
        eventually("writes work again", || {
            self.write().map_err(|out| format!("{out:?}\n{}", self.server.process.log()))
        });
        self.writes.assert_nothing_is_lost(&self.server);
        eventually("the agent's SVID is stored", || match self.stored() {
            stored if stored.contains(&self.newest()) => Ok(()),
            stored => Err(format!("{stored}\n{}", self.server.process.log())),
        });
        // What came meanwhile reaches the agent; and another server on the file knows the agent.
        let new = self.server.entry(&format!("/healed/{name}"), &["-x509SVIDTTL", "12"]);
        eventually("the agent has the new entry", || {
            let out = self.agent.command(&["api", "fetch", "x509"]).stdout;
            if out.contains(&new) { Ok(()) } else { Err(out) }
        });
        self.server.process.kill();
        self.server.restart();
        self.writes.assert_nothing_is_lost(&self.server);
        self.assert_goes_on(&format!("{name}-restarted"));
    }

    fn assert_goes_on(&mut self, audience: &str) {
        eventually("the agent is let in", || {
            let out = self.agent.command(&["api", "fetch", "jwt", "-audience", audience]);
            if out.code == 0 { Ok(()) } else { Err(format!("{out:?}\n{}", self.agent.process.log())) }
        });
        self.agent.assert_attested_once();
        assert!(self.agent.process.ended().is_none(), "{}", self.agent.process.log());
    }
}

/// Another process has the file for itself, until this is dropped.
struct Held(Child);

impl Held {
    fn file(file: &Path) -> Self {
        const SCRIPT: &str = "import sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
c.execute('BEGIN EXCLUSIVE')
print('held', flush=True)
sys.stdin.read()
c.execute('ROLLBACK')";
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn another_process_holds_the_file() {
    let dir = Workdir::new();
    let mut rig = Rig::start(dir.path());
    let held = Held::file(&rig.file);
    rig.assert_refuses_writes("is in use by another process");
    rig.assert_signs("held");
    drop(held);
    rig.assert_heals("held");
}

/// A file system of a few megabytes.
struct Disk(Workdir);

impl Disk {
    /// `None`, and a word about it, where mounting is not permitted and nobody promised that it is.
    fn mount() -> Option<Self> {
        let dir = Workdir::new();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=8m,mode=755", "finial-test"]).arg(dir.path());
        let mounted = Output::of(&mut mount);
        if mounted.code == 0 {
            return Some(Self(dir));
        }
        let promised = ["FINIAL_REAL_SPIRE", "CI"].iter().any(|name| std::env::var_os(name).is_some());
        assert!(!promised, "a full disk needs the right to mount a file system: {}", mounted.stderr);
        let _ = writeln!(std::io::stderr(), "\nSKIPPED: mounting is not permitted");
        None
    }

    fn remount(&self, how: &str) {
        let options = format!("remount,{how}");
        Output::of(Command::new("mount").args(["-o", &options]).arg(self.0.path())).ok();
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("what fills the disk")
    }

    /// To the last byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).expect("a file");
        let mut piece = vec![0; 64 << 10];
        loop {
            match file.write(&piece) {
                Ok(0) | Err(_) if piece.len() == 1 => return,
                Ok(0) | Err(_) => piece.truncate(piece.len() / 2),
                Ok(_) => {}
            }
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.filler()).expect("it is there");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn the_disk_is_full_and_later_read_only() {
    let Some(disk) = Disk::mount() else { return };
    let mut rig = Rig::start(disk.0.path());
    rig.checkpoint();
    disk.fill();
    rig.assert_refuses_writes("no room left for database");
    rig.assert_signs("full");
    disk.make_room();
    rig.assert_heals("full");

    // The kernel lets nobody take away a file system that is being written; a start is where it is met.
    assert_eq!(rig.server.process.terminate(), 0, "{}", rig.server.process.log());
    disk.remount("ro");
    let refused = rig.server.second_on_same_data();
    let said = format!("{}{}", refused.stdout, refused.stderr);
    assert_ne!(refused.code, 0, "{said}");
    assert!(said.contains("datastore.sqlite3") && said.contains("cannot be written"), "{said}");
    disk.remount("rw");
    rig.server.restart();
    rig.writes.assert_nothing_is_lost(&rig.server);
    rig.assert_goes_on("writable");
    rig.write().expect("a write");
}

/// A library that makes a server's own reads and writes of its datastore's file fail, while a file beside it says how.
struct Faults(Workdir);

impl Faults {
    fn build() -> Self {
        let dir = Workdir::new();
        let source = dir.write("faults.c", include_str!("faults.c"));
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(dir.path().join("faults.so"));
        Output::of(compile.arg(source).arg("-ldl")).ok();
        Self(dir)
    }

    fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![("LD_PRELOAD", self.0.path().join("faults.so")), ("FAULTS", self.0.path().join("faults"))]
    }

    fn begin(&self, error: Errno) {
        let new = self.0.write("new", &error.raw_os_error().to_string());
        std::fs::rename(new, self.0.path().join("faults")).expect("begins at once");
    }

    fn end(&self) {
        std::fs::remove_file(self.0.path().join("faults")).expect("it is there");
    }
}

#[test]
fn the_disk_fails_and_its_file_system_becomes_read_only_for_a_while() {
    let (dir, faults) = (Workdir::new(), Faults::build());
    let mut rig = Rig::start_with(dir.path(), faults.environment());
    faults.begin(Errno::IO);
    rig.assert_refuses_writes("check the disk and its file system");
    rig.assert_signs("failing");
    faults.end();
    rig.assert_heals("failing");
    faults.begin(Errno::ROFS);
    rig.assert_refuses_writes("check the disk and its file system");
    rig.assert_signs("read-only");
    faults.end();
    rig.assert_heals("read-only");
}

#[test]
fn the_file_is_cut_short() {
    let dir = Workdir::new();
    let mut rig = Rig::start(dir.path());
    // A copy as of this moment, which is what a backup is.
    rig.checkpoint_and_stop();
    let beside = |name: &str| dir.path().join(format!("datastore.sqlite3{name}"));
    let parts = ["", "-wal"].map(|name| (beside(name), std::fs::read(beside(name)).expect("it is there")));
    let cut = std::fs::File::options().write(true).open(&rig.file).expect("it is there");
    cut.set_len(4096).expect("cut");
    rig.server.process.signal(Signal::CONT);

    rig.assert_refuses_writes("restore a backup");
    rig.assert_signs("cut");
    rig.server.process.kill();
    let _ = std::fs::remove_file(beside("-shm"));
    for (path, bytes) in parts {
        std::fs::write(path, bytes).expect("put back");
    }
    rig.server.restart();
    rig.assert_goes_on("put-back");
    rig.assert_heals("cut");
}
