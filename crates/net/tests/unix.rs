//! Unix sockets against real processes and real file systems.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod common;

use common::{Recorder, service, soon};
use finial_net::unix::{self, BindError};
use finial_net::{Limits, client};
use finial_proto::health::HealthCheckRequest;
use finial_proto::health::health_client::HealthClient;
use finial_runtime::Supervisor;
use futures::StreamExt;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Server;

/// Not a test by itself: the process that other tests start to have a peer. It connects, says so, and lives until its
/// standard input ends, or not at all.
#[test]
fn peer_process() {
    let Some(path) = std::env::var_os("FINIAL_TEST_CONNECT") else { return };
    let _connection = UnixStream::connect(path).unwrap();
    println!("\nconnected");
    if std::env::var_os("FINIAL_TEST_STAY").is_some() {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    }
}

fn start_peer(socket: &Path, stay: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "peer_process", "--nocapture"]).env("FINIAL_TEST_CONNECT", socket);
    if stay {
        command.env("FINIAL_TEST_STAY", "1");
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn wait_connected(peer: &mut Child) {
    let mut seen = String::new();
    let out = peer.stdout.as_mut().unwrap();
    while !seen.contains("\nconnected") {
        let mut byte = [0];
        assert_eq!(out.read(&mut byte).unwrap(), 1, "peer ended early: {seen}");
        seen.push(byte[0] as char);
    }
}

#[tokio::test]
async fn the_peer_is_the_process_that_connected_and_is_noticed_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut incoming = unix::bind(&socket, 0o777, 0o755, Limits::default()).unwrap();
    let mut peer = start_peer(&socket, true);
    wait_connected(&mut peer);
    let connection = soon(incoming.next()).await.unwrap().unwrap();
    let info = connection.peer().clone();
    assert_eq!(info.pid as u32, peer.id());
    assert_eq!(info.uid, rustix::process::geteuid().as_raw());
    assert_eq!(info.gid, rustix::process::getegid().as_raw());
    assert!(info.handle.is_alive());
    let exe = rustix::fs::readlinkat(info.handle.proc_dir(), "exe", Vec::new()).unwrap();
    assert_eq!(exe.to_str().unwrap(), std::env::current_exe().unwrap().to_str().unwrap());

    drop(peer.stdin.take());
    peer.wait().unwrap();
    assert!(!info.handle.is_alive());
    assert!(rustix::fs::readlinkat(info.handle.proc_dir(), "exe", Vec::new()).is_err(), "nothing can be read any more");
}

#[tokio::test]
async fn a_peer_that_has_ended_is_refused_also_when_its_pid_lives_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut incoming = unix::bind(&socket, 0o777, 0o755, Limits::default()).unwrap();
    let mut peer = start_peer(&socket, false);
    let pid = peer.id();
    peer.wait().unwrap();
    // Its connection now waits in the queue. If the system lets us, another process gets its number.
    let heir = reincarnate(pid);

    let mut living = start_peer(&socket, true);
    wait_connected(&mut living);
    let connection = soon(incoming.next()).await.unwrap().unwrap();
    assert_eq!(connection.peer().pid as u32, living.id(), "the dead one was hung up on, the next one served");
    for mut process in heir.into_iter().chain([living]) {
        drop(process.stdin.take());
        process.wait().unwrap();
    }
}

/// Starts processes until one has the number `pid`; `None` where the kernel's counter cannot be set or others are
/// quicker each time. The test then still shows that the dead are refused.
fn reincarnate(pid: u32) -> Option<Child> {
    for _ in 0..50 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        if child.id() == pid {
            return Some(child);
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }
    None
}

#[tokio::test]
async fn binding_sets_permissions_replaces_the_stale_and_respects_the_living() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a/b/s");
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o7777;
    let incoming = unix::bind(&socket, 0o770, 0o755, Limits::default()).unwrap();
    assert_eq!(mode(&socket), 0o770);
    assert_eq!(mode(&dir.path().join("a/b")), 0o755);

    let second = unix::bind(&socket, 0o777, 0o755, Limits::default());
    assert!(matches!(second, Err(BindError::InUse(_))));
    drop(incoming);
    assert!(!socket.exists(), "the file goes with its listener");

    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists(), "left behind by a killed process");
    let incoming = unix::bind(&socket, 0o777, 0o755, Limits::default()).unwrap();
    assert_eq!(mode(&socket), 0o777);
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "someone's file").unwrap();
    drop(incoming);
    assert!(socket.exists(), "what has taken the place stays");
    let over_file = unix::bind(&socket, 0o777, 0o755, Limits::default());
    assert!(matches!(over_file, Err(BindError::NotASocket(_))));
}

#[tokio::test]
async fn requests_carry_their_peer() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let incoming = unix::bind(&socket, 0o777, 0o755, Limits::default()).unwrap();
    let supervisor = Supervisor::default();
    let recorder = Recorder::default();
    let serving = Server::builder().serve_with_incoming(service(&recorder), incoming);
    supervisor.spawner().spawn("server", serving);
    let mut health = HealthClient::new(client::uds_channel(&socket));
    soon(health.check(HealthCheckRequest::default())).await.unwrap();
    assert_eq!(recorder.0.lock().unwrap().unix[0].pid as u32, std::process::id());
}

#[tokio::test]
async fn one_connection_too_many_is_closed_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let limits = Limits { connections: 2, ..Limits::default() };
    let mut incoming = unix::bind(&socket, 0o777, 0o755, limits).unwrap();
    let _clients: Vec<_> = (0..2).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let first = soon(incoming.next()).await.unwrap().unwrap();
    let _second = soon(incoming.next()).await.unwrap().unwrap();
    let mut third = tokio::net::UnixStream::connect(&socket).await.unwrap();
    tokio::select! {
        _ = incoming.next() => panic!("the third was let in"),
        read = soon(third.read_u8()) => assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof),
    }
    drop(first);
    let _fourth = UnixStream::connect(&socket).unwrap();
    soon(incoming.next()).await.unwrap().unwrap();
}

/// What gRPC's C core and Java send: the socket's path, percent-encoded, as the authority.
#[tokio::test]
async fn a_socket_path_as_authority_is_no_offence() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let incoming = unix::bind(&socket, 0o777, 0o755, Limits::default()).unwrap();
    let supervisor = Supervisor::default();
    let serving = Server::builder().serve_with_incoming(service(&Recorder::default()), incoming);
    supervisor.spawner().spawn("server", serving);

    let text = |name: &[u8], value: &str| [name, &[value.len() as u8], value.as_bytes()].concat();
    let block = [
        vec![0x83, 0x86],
        text(b"\x40\x05:path", "/grpc.health.v1.Health/Check"),
        text(b"\x40\x0a:authority", "tmp%2Fs"),
        text(&[0x5f], "application/grpc"),
        text(&[0x40, 2, b't', b'e'], "trailers"),
    ]
    .concat();
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let request = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &block),
        frame(0, 1, 1, &[0; 5]),
    ]
    .concat();
    let mut client = tokio::net::UnixStream::connect(&socket).await.unwrap();
    client.write_all(&request).await.unwrap();
    let answered = async {
        loop {
            let mut head = [0; 9];
            client.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            client.read_exact(&mut payload).await.unwrap();
            if head[8] == 1 {
                return head[3];
            }
        }
    };
    const HEADERS: u8 = 1;
    assert_eq!(soon(answered).await, HEADERS, "not RST_STREAM (3)");
}

#[tokio::test]
async fn a_socket_that_is_taken_over_keeps_its_file_until_it_is_the_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("api.sock"), dir.path().join("other.sock"));
    let mut old = unix::bind(&path, 0o700, 0o700, Limits::default()).unwrap();
    let hand = old.listening().unwrap();
    assert!(old.listening().is_none() && hand.path() == path);
    let copy = || hand.socket().try_clone_to_owned().unwrap();
    assert!(unix::adopt(copy(), &other, 0o777, Limits::default()).is_err(), "it listens elsewhere");
    // A new one that does not get far leaves all as it was.
    drop(unix::adopt(copy(), &path, 0o777, Limits::default()).unwrap());
    assert!(path.exists());
    let mut new = unix::adopt(copy(), &path, 0o777, Limits::default()).unwrap();
    hand.leave_file(true);
    drop(old);
    let _client = UnixStream::connect(&path).unwrap();
    assert_eq!(new.next().await.unwrap().unwrap().peer().pid, std::process::id() as i32);
    new.listening().unwrap().leave_file(false);
    drop(new);
    assert!(!path.exists());
    assert!(unix::adopt(copy(), &path, 0o777, Limits::default()).is_err(), "nobody could connect to it");
}

#[tokio::test]
async fn a_socket_of_anothers_that_lets_more_users_in_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let mut old = unix::bind(&path, 0o666, 0o700, Limits::default()).unwrap();
    let hand = old.listening().unwrap();
    let adopt = |mode| unix::adopt(hand.socket().try_clone_to_owned().unwrap(), &path, mode, Limits::default());
    let refused = adopt(0o770).err().unwrap().to_string();
    assert!(refused.contains("has mode 0666") && refused.contains("SocketMode=0770"), "{refused}");
    assert!(adopt(0o777).is_ok());
}
