use super::super::testing::{DEADLINE, Sleeper, eventually, has, there, values};
use super::*;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// A process that ends with its value.
struct Guard(Child);

impl Guard {
    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).expect("signals");
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bus of the test's own with the manager's interface behind it.
struct World {
    folder: tempfile::TempDir,
    daemon: Option<Guard>,
    manager: Option<Guard>,
}

const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=SOCKET</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy></busconfig>"#;

/// The interpreter that has the distribution's D-Bus module.
const PYTHON: &str = "/usr/bin/python3";

impl World {
    fn start(mode: &str) -> Option<Self> {
        let module = Command::new(PYTHON).args(["-c", "import dbus, gi"]).stderr(Stdio::null()).status();
        let module = there("python3-dbus with python3-gi", module.is_ok_and(|status| status.success()));
        if !has("dbus-daemon") || !module {
            return None;
        }
        let mut world = Self { folder: tempfile::tempdir().expect("a folder"), daemon: None, manager: None };
        std::fs::write(world.file("bus.conf"), CONFIG.replace("SOCKET", world.file("bus").to_str()?)).expect("writes");
        world.begin(mode);
        Some(world)
    }

    fn begin(&mut self, mode: &str) {
        let mut daemon = Command::new("dbus-daemon");
        daemon.arg(format!("--config-file={}", self.file("bus.conf").display())).args(["--nofork", "--nopidfile"]);
        self.daemon = Some(Guard(daemon.stderr(Stdio::null()).spawn().expect("starts")));
        eventually("the bus is there", || std::os::unix::net::UnixStream::connect(self.file("bus")).ok());
        self.manage(mode);
    }

    /// Another manager instead of the one that is there.
    fn manage(&mut self, mode: &str) {
        self.manager = None;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/systemd_manager.py");
        let mut manager = Command::new(PYTHON);
        manager
            .arg(script)
            .arg(mode)
            .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", self.file("bus").display()));
        manager.stdout(Stdio::piped());
        let mut child = manager.spawn().expect("starts");
        let mut line = String::new();
        let said = BufReader::new(child.stdout.take().expect("is piped")).read_line(&mut line);
        self.manager = Some(Guard(child));
        assert_eq!((said.is_ok(), line.trim()), (true, "ready"));
    }

    fn end(&mut self) {
        (self.manager, self.daemon) = (None, None);
        let _ = std::fs::remove_file(self.file("bus"));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn address(&self) -> String {
        // The first address is of a kind that we do not know; the second leads nowhere.
        format!("tcp:host=localhost,port=1;unix:path=/nonexistent;unix:path={},guid=1f", self.file("bus").display())
    }

    fn attestor(&self) -> Systemd {
        Systemd::at(self.address())
    }
}

fn sleeper() -> Sleeper {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    eventually("sleep runs", || {
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", sleeper.pid())).ok()?;
        (comm == "sleep\n").then_some(())
    });
    sleeper
}

async fn is_known(attestor: &Systemd, sleeper: &Sleeper) {
    let expected = ["id:sleep.service".to_owned(), "fragment_path:/lib/systemd/system/sleep.service".to_owned()];
    assert_eq!(values(attestor, &sleeper.peer()).await, expected.into());
}

async fn refusal(attestor: &Systemd, sleeper: &Sleeper) -> String {
    attestor.attest(&sleeper.peer()).await.expect_err("fails").to_string()
}

#[tokio::test]
async fn the_unit_of_a_process_is_told_to_many_at_once() {
    let Some(world) = World::start("good") else { return };
    let (attestor, sleeper) = (world.attestor(), sleeper());
    is_known(&attestor, &sleeper).await;
    let all = at_once(&attestor, &sleeper, 64).await;
    assert_eq!(all.len(), 64);
    assert!(all.iter().all(|answer| answer.len() == 2), "{all:?}");
    // Of a process that is gone the manager knows nothing; the connection stays good.
    let mut gone = Sleeper::start(&mut Command::new("sleep"));
    gone.0.kill().expect("kills");
    gone.0.wait().expect("waits");
    let pid = gone.pid();
    let expected = format!("failed to get unit by pid {pid}: PID {pid} does not belong to any loaded unit.");
    assert_eq!(refusal(&attestor, &gone).await, expected);
    assert!(attestor.bus.lock().await.is_some(), "the connection is kept");
    is_known(&attestor, &sleeper).await;
}

/// What as many answers say, all of them asked for before the first is waited for.
async fn at_once(attestor: &Systemd, sleeper: &Sleeper, count: usize) -> Vec<Vec<Selector>> {
    let peer = sleeper.peer();
    let mut asked: Vec<_> = (0..count).map(|_| attestor.attest(&peer)).collect();
    let mut answers = Vec::new();
    std::future::poll_fn(|cx| {
        asked.retain_mut(|one| match one.as_mut().poll(cx) {
            std::task::Poll::Ready(answer) => {
                answers.push(answer.expect("attests"));
                false
            }
            std::task::Poll::Pending => true,
        });
        if asked.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    answers
}

#[tokio::test]
async fn a_bus_that_is_started_again_is_used_again_at_once() {
    let Some(mut world) = World::start("good") else { return };
    let (attestor, sleeper) = (world.attestor(), sleeper());
    is_known(&attestor, &sleeper).await;
    world.end();
    let error = refusal(&attestor, &sleeper).await;
    assert!(error.starts_with("failed to open dbus connection: No such file or directory"), "{error}");
    world.begin("good");
    is_known(&attestor, &sleeper).await;
    // Also when nobody asked meanwhile.
    world.end();
    world.begin("good");
    is_known(&attestor, &sleeper).await;
}

#[tokio::test]
async fn a_bus_or_a_manager_that_hangs_costs_no_more_than_the_deadline() {
    let Some(mut world) = World::start("hang") else { return };
    let sleeper = sleeper();
    let attestor = Systemd { deadline: Duration::from_millis(300), ..world.attestor() };
    let expected = format!("failed to get unit by pid {}: systemd did not answer over D-Bus in time", sleeper.pid());
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the manager hangs");
    assert!(attestor.bus.lock().await.is_none(), "nobody waits on this connection again");
    world.manage("good");
    let attestor = Systemd { deadline: DEADLINE, ..attestor };
    is_known(&attestor, &sleeper).await;
    let daemon = world.daemon.as_ref().expect("runs");
    daemon.signal(rustix::process::Signal::STOP);
    let attestor = Systemd { deadline: Duration::from_millis(300), ..attestor };
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the bus hangs, on a connection");
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the bus hangs, and lets nobody in");
    daemon.signal(rustix::process::Signal::CONT);
    let attestor = Arc::new(Systemd { deadline: DEADLINE, ..attestor });
    is_known(&attestor, &sleeper).await;
}

#[tokio::test]
async fn a_manager_that_lies_or_is_away_is_no_unit() {
    let Some(mut world) = World::start("number") else { return };
    let (attestor, sleeper) = (world.attestor(), sleeper());
    let expected = "Returned value for Id was not a string: it has the type \"u\"";
    assert_eq!(refusal(&attestor, &sleeper).await, expected);
    world.manage("huge");
    let error = refusal(&attestor, &sleeper).await;
    assert_eq!(error, "error getting value for Id: the bus sent too large a message");
    assert!(attestor.bus.lock().await.is_none(), "what is left of it is never read");
    world.manager = None;
    let error = refusal(&attestor, &sleeper).await;
    assert!(error.contains("org.freedesktop.systemd1 was not provided by any .service files"), "{error}");
    world.manage("good");
    is_known(&attestor, &sleeper).await;
}
