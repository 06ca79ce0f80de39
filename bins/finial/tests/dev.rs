//! `finial dev` as a newcomer runs it: the real program, its real workloads, its output.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

fn finial(data: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finial"));
    command.arg("dev").arg("--data").arg(data).args(extra).stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Processes whose program is below `data`.
fn workloads(data: &Path) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("reads").filter_map(Result::ok);
    let numbers = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.starts_with(data)))
        .collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::yield_now();
    }
}

/// A program that runs, and its lines as they come.
struct Running(Child, Receiver<String>);

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (sender, receiver) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self(child, receiver)
    }
    fn wait_for_line(&self, start: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.1.recv_timeout(left).unwrap_or_else(|_| panic!("no line {start:?} in time"));
            if line.trim_start().starts_with(start) {
                return line;
            }
        }
    }
    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.0.id().to_string()]).status().expect("runs kill");
        assert!(sent.success());
    }
    fn ended(mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the program ends", || {
            status = self.0.try_wait().expect("waits");
            status.is_some()
        });
        status.expect("has ended")
    }
}
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each promise of the story, with the words that only a real success prints; how long it took is told, and a question for
/// `bench/`.
fn check_story(story: &str) {
    let frontend = "spiffe://example.org/frontend";
    for promise in [
        "1. The server is up",
        "2. The entries",
        "3. The agent is attested",
        "spiffe://example.org/spire/agent/join_token/",
        "4. An X.509-SVID",
        "The certificate verifies: yes.",
        "5. A JWT-SVID",
        "The agent validates it: yes, it is from spiffe://example.org/user/",
        "6. Mutual TLS",
        &format!("backend lets in {frontend}"),
        &format!("Hello {frontend}, this is spiffe://example.org/backend."),
        "backend refuses: unexpected ID \"spiffe://example.org/stranger\"",
        "stranger sees: received fatal alert",
        "7. Rotation",
        "its next request used the new certificate and was accepted.",
        "Everything is stopped.",
    ] {
        assert!(story.contains(promise), "{promise:?} is missing in:\n{story}");
    }
    let line = story.lines().find(|line| line.starts_with("4. ")).expect("step 4");
    let words: Vec<_> = line.split(['(', ' ']).collect();
    let at = words.iter().position(|word| *word == "ms").expect("a time");
    words[at - 1].parse::<u64>().expect("a number");
}

#[test]
fn the_story_is_told_and_nothing_is_left_running() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().canonicalize().expect("is there").join("d");
    let first = finial(&data, &[]).output().expect("runs");
    assert!(first.status.success(), "{}", text(&first));
    let first = text(&first);
    check_story(&first);
    assert!(first.contains("It proved itself once, by join_token"), "{first}");
    assert_eq!(workloads(&data), [], "no workload is left");

    let again = finial(&data, &[]).output().expect("runs");
    assert!(again.status.success(), "{}", text(&again));
    let again = text(&again);
    check_story(&again);
    assert!(again.contains("It joined in an earlier run"), "{again}");
    let agent = |story: &str| story.lines().find(|l| l.contains("/spire/agent/join_token/")).map(str::to_owned);
    assert_eq!(agent(&first), agent(&again), "the agent keeps its identity");
}

#[test]
fn it_stays_up_when_asked_and_stops_when_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().canonicalize().expect("is there").join("d");
    let kept = Running::start(finial(&data, &["--keep"]));
    kept.wait_for_line("The trust domain stays up. Workload API: unix://");
    kept.wait_for_line("The log is ");

    let second = finial(&data, &[]).output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second).contains("another `finial dev` is using"), "{}", text(&second));

    let socket = data.join("agent.sock");
    let fetch = Command::new(env!("CARGO_BIN_EXE_finial"))
        .args(["agent", "api", "fetch", "x509", "-socketPath"])
        .arg(&socket)
        .output()
        .expect("runs");
    assert!(fetch.status.success() && text(&fetch).contains("spiffe://example.org/user/"), "{}", text(&fetch));

    kept.signal("-TERM");
    kept.wait_for_line("Everything is stopped.");
    assert!(kept.ended().success());
    assert_eq!(workloads(&data), []);
    assert!(!socket.exists() || std::os::unix::net::UnixStream::connect(&socket).is_err());
}

#[test]
fn workloads_do_not_outlive_a_killed_parent() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().canonicalize().expect("is there").join("d");
    let story = Running::start(finial(&data, &[]));
    story.wait_for_line("7. Rotation");
    assert!(workloads(&data).len() >= 2, "frontend and backend run");
    story.signal("-KILL");
    assert!(!story.ended().success());
    wait_until("the workloads end", || workloads(&data).is_empty());
    // And what was killed can be started again.
    let again = finial(&data, &[]).output().expect("runs");
    assert!(again.status.success(), "{}", text(&again));
}

#[test]
fn mistakes_end_with_what_to_do() {
    let usage = finial(Path::new("/tmp"), &["--kep"]).output().expect("runs");
    assert_eq!(usage.status.code(), Some(2));
    assert!(text(&usage).contains("Usage: finial dev"), "{}", text(&usage));
    let unwritable = finial(Path::new("/proc/finial"), &[]).output().expect("runs");
    assert_eq!(unwritable.status.code(), Some(1));
    assert!(text(&unwritable).contains("hint: "), "{}", text(&unwritable));
}
