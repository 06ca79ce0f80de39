//! Process IDs that come back, forced: in a PID namespace of our own, where nobody else starts processes and the next number can
//! be chosen. An attacker connects, leaves the connection to a child and dies; a program with an identity gets its number.

use super::callers::HTTP2;
use super::harness::{World, until, within};
use std::path::Path;
use std::process::Stdio;
use tokio::process::{Child, Command};

const ROUNDS: usize = 15;

/// The child calls until it is hung up on: all the time, also while its parent dies and the heir is born, or (told `quiet`) only
/// from when the heir lives.
const ATTACKER: &str = r#"
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s)
call(s, 1)
s.recv(4096)
if os.fork(): os._exit(0)
while sys.argv[3] == 'quiet' and not os.path.exists(sys.argv[2]): time.sleep(0.0005)
s.setblocking(False)
got, stream = b'', 3
while True:
    try:
        call(s, stream); stream += 2
        time.sleep(0.0005)
        more = s.recv(65536)
        if not more: break
        got += more
    except BlockingIOError: pass
    except OSError: break
print('STOLEN' if b'spiffe://td/heir' in got else 'closed')
"#;

/// The whole test again, as the first process of a new namespace.
#[tokio::test]
async fn who_gets_the_number_of_a_dead_caller_lends_it_no_identity() {
    const INSIDE: &str = "FINIAL_TEST_PID_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        return inside().await;
    }
    let must = ["FINIAL_REAL_SPIRE", "CI"].iter().any(|name| std::env::var_os(name).is_some());
    let unshare = |program: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(program).kill_on_drop(true);
        command.stdin(Stdio::null());
        command
    };
    if !unshare(Path::new("true")).output().await.is_ok_and(|tried| tried.status.success()) {
        assert!(!must, "no PID namespaces here");
        eprintln!("SKIPPED: no PID namespaces here (unshare --pid needs root)");
        return;
    }
    let mut again = unshare(&std::env::current_exe().unwrap());
    again.args([
        "--exact",
        "tests::pid_reuse::who_gets_the_number_of_a_dead_caller_lends_it_no_identity",
        "--nocapture",
    ]);
    let output = within(again.env(INSIDE, "1").output()).await.unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && said.contains("NUMBERS CAME BACK"), "{said}");
}

async fn inside() {
    let world = World::new().await;
    world.entry("e1", "/heir", &["test:exe:heir"]);
    let agent = world.started().await;
    let python = std::fs::canonicalize("/usr/bin/python3").unwrap();
    let (heir, done) = (world.dir.path().join("heir"), world.dir.path().join("done"));
    std::fs::copy(&python, &heir).unwrap();
    // It really would have an identity.
    let script = "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s); call(s, 1); print(answered(s, b'spiffe://td/heir'))";
    let mut honest = start(&heir, script, &[&agent.socket]);
    assert!(within(said(&mut honest)).await.contains("True"));
    let mut came_back = 0;
    for round in 0..ROUNDS {
        let how = if round % 2 == 0 { "quiet" } else { "loud" };
        let mut attacker = start(&python, ATTACKER, &[&agent.socket, &done, Path::new(how)]);
        let pid = attacker.id().unwrap();
        let out = attacker.stdout.take().unwrap();
        within(attacker.wait()).await.unwrap();
        let living = reincarnate(pid, &heir).await;
        came_back += usize::from(living.is_some());
        if living.is_some() {
            // Looked at as the heir, if it were looked at by its number.
            until("the heir runs", || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == heir))
                .await;
        }
        std::fs::write(&done, "").unwrap();
        let said = within(read(out)).await;
        assert!(said.contains("closed"), "{said}");
        std::fs::remove_file(&done).unwrap();
        drop(living);
    }
    assert!(came_back >= ROUNDS / 2, "only {came_back} of {ROUNDS} numbers came back");
    println!("NUMBERS CAME BACK: {came_back} of {ROUNDS}");
    agent.stop().await;
}

fn start(program: &Path, script: &str, arguments: &[&Path]) -> Child {
    let mut command = Command::new(program);
    command.arg("-c").arg(format!("{HTTP2}{script}")).args(arguments).kill_on_drop(true);
    command.env("PYTHONHOME", "/usr").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Starts a process with this number that does nothing.
async fn reincarnate(pid: u32, program: &Path) -> Option<Child> {
    for _ in 0..50 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut child = start(program, "sys.stdin.read()", &[]);
        if child.id() == Some(pid) {
            return Some(child);
        }
        child.kill().await.unwrap();
    }
    None
}

async fn said(child: &mut Child) -> String {
    read(child.stdout.take().unwrap()).await
}

async fn read(mut from: tokio::process::ChildStdout) -> String {
    use tokio::io::AsyncReadExt;
    let mut text = String::new();
    from.read_to_string(&mut text).await.unwrap();
    text
}
