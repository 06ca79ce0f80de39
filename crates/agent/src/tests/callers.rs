//! Who calls: real processes that change under an open connection. They are Python scripts with just enough HTTP/2.

use super::harness::{StandsStill, World, within};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use tonic::Code;

/// `call(stream)` asks for X.509-SVIDs; `answered(name)` waits for an SVID of that name, or tells that the connection ended.
pub(super) const HTTP2: &str = r#"
import socket, struct, os, sys, time
def frame(kind, flags, stream, body): return struct.pack('>I', len(body))[1:] + bytes([kind, flags]) + struct.pack('>I', stream) + body
def lit(name, value): return b'\x00' + bytes([len(name)]) + name + bytes([len(value)]) + value
H = lit(b':method', b'POST') + lit(b':scheme', b'http') + lit(b':path', b'/SpiffeWorkloadAPI/FetchX509SVID') + lit(b':authority', b'localhost')
H += lit(b'content-type', b'application/grpc') + lit(b'te', b'trailers') + lit(b'workload.spiffe.io', b'true')
def hello(s): s.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + frame(4, 0, 0, b''))
def call(s, stream): s.sendall(frame(1, 4, stream, H) + frame(0, 1, stream, b'\0\0\0\0\0'))
def answered(s, name):
    got = b''
    while name not in got:
        more = s.recv(4096)
        if not more: return False
        got += more
    return True
"#;

async fn python(program: &Path, script: &str, arguments: &[&Path]) -> String {
    let mut command = tokio::process::Command::new(program);
    command.arg("-c").arg(format!("{HTTP2}{script}")).args(arguments).stdout(Stdio::piped()).kill_on_drop(true);
    let output = within(command.output()).await.unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

async fn world() -> World {
    let world = World::new().await;
    // whatever version of Python this machine has
    for minor in 8..20 {
        world.entry(&format!("p{minor}"), "/python", &[&format!("test:exe:python3.{minor}")]);
    }
    world.entry("snake", "/snake", &["test:exe:snake"]);
    world
}

#[tokio::test]
async fn selectors_are_those_of_the_process_at_the_other_end() {
    let world = world().await;
    let agent = world.started().await;
    assert_eq!(agent.x509_once().await.unwrap_err().code(), Code::PermissionDenied);
    let before = world.attestor.asked.load(Ordering::SeqCst);
    let script = r#"
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s)
call(s, 1); assert answered(s, b'spiffe://td/python')
call(s, 3); assert answered(s, b'spiffe://td/python')
print('ok')
"#;
    let still = StandsStill::begin();
    assert_eq!(python(Path::new("python3"), script, &[&agent.socket]).await, "ok");
    drop(still);
    assert_eq!(world.attestor.asked.load(Ordering::SeqCst), before + 1, "attested once for both calls");
    agent.stop().await;
}

#[tokio::test]
async fn a_process_that_runs_another_program_is_another_workload_at_once() {
    let world = world().await;
    let agent = world.started().await;
    // The same interpreter under another name: another file, so another program.
    let python3 = std::fs::canonicalize("/usr/bin/python3").unwrap();
    let snake = world.dir.path().join("snake");
    std::fs::copy(python3, &snake).unwrap();
    let script = r#"
if len(sys.argv) > 2:
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s)
    call(s, 1); assert answered(s, b'spiffe://td/python')
    os.set_inheritable(s.fileno(), True)
    code = open('/proc/self/cmdline', 'rb').read().split(b'\0')[2].decode()
    os.environ['PYTHONHOME'] = sys.prefix
    os.execv(sys.argv[2], [sys.argv[2], '-c', code, str(s.fileno())])
s = socket.socket(fileno=int(sys.argv[1]))
call(s, 3)
print('snake' if answered(s, b'spiffe://td/snake') else 'refused')
"#;
    // What was attested would not be forgotten by itself.
    let still = StandsStill::begin();
    assert_eq!(python(Path::new("python3"), script, &[&agent.socket, &snake]).await, "snake");
    drop(still);
    agent.stop().await;
}

#[tokio::test]
async fn a_process_that_changes_while_it_is_attested_is_attested_again() {
    let world = world().await;
    let agent = world.started().await;
    let python3 = std::fs::canonicalize("/usr/bin/python3").unwrap();
    let (snake, signal) = (world.dir.path().join("snake"), world.dir.path().join("signal"));
    std::fs::copy(python3, &snake).unwrap();
    *world.attestor.meanwhile.lock().unwrap() = Some(signal.clone());
    let script = r#"
if len(sys.argv) > 2:
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s)
    call(s, 1)
    while not os.path.exists(sys.argv[3]): time.sleep(0.001)
    os.set_inheritable(s.fileno(), True)
    code = open('/proc/self/cmdline', 'rb').read().split(b'\0')[2].decode()
    os.environ['PYTHONHOME'] = sys.prefix
    os.execv(sys.argv[2], [sys.argv[2], '-c', code, str(s.fileno())])
s = socket.socket(fileno=int(sys.argv[1]))
got = b''
while b'spiffe://td/' not in got: got += s.recv(4096)
print('snake' if b'spiffe://td/snake' in got else 'the program before')
"#;
    assert_eq!(python(Path::new("python3"), script, &[&agent.socket, &snake, &signal]).await, "snake");
    agent.stop().await;
}

#[tokio::test]
async fn a_connection_whose_process_has_ended_serves_no_one_else() {
    let world = world().await;
    let agent = world.started().await;
    let script = r#"
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); hello(s)
call(s, 1); assert answered(s, b'spiffe://td/python')
parent = os.getpid()
if os.fork(): os._exit(0)
while os.getppid() == parent: time.sleep(0.005)
call(s, 3)
print('served' if answered(s, b'spiffe://td/python') else 'closed')
"#;
    // The output ends when the child does, which still holds the pipe.
    assert_eq!(python(Path::new("python3"), script, &[&agent.socket]).await, "closed");
    assert_eq!(world.attestor.asked.load(Ordering::SeqCst), 1, "the child was not attested in its parent's place");
    agent.stop().await;
}
