//! What was acknowledged is there after a kill, one server at a time, and files that cannot be used say why.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod common;
use common::*;
use finial_core::{EntryId, ErrorKind, SystemClock};
use finial_store::{Store, StoreError, StoreSettings};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

const CHILD_DATABASE: &str = "FINIAL_STORE_CHILD_DATABASE";

/// Not a test of its own: the process that `kill_loses_nothing_that_was_acknowledged` starts and kills.
#[tokio::test]
#[ignore = "the child of another test"]
async fn child_writes_and_acknowledges() {
    let Some(path) = std::env::var_os(CHILD_DATABASE) else { return };
    let store = Store::open(StoreSettings::file(path), Arc::new(SystemClock)).await.unwrap();
    for n in 0.. {
        let new = entry(
            &format!("{}-{n}", std::process::id()),
            &format!("/w/{n}"),
            &format!("/p{}", std::process::id()),
            &["t:a"],
        );
        let acknowledged = create(&store, new).await.id;
        let mut out = std::io::stdout().lock();
        writeln!(out, "ack {acknowledged}").and_then(|()| out.flush()).unwrap();
    }
}

fn spawn_child(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_writes_and_acknowledges", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD_DATABASE, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The first one stands behind what the test harness says of the test.
fn acknowledgment(line: &str) -> Option<EntryId> {
    let (_, id) = line.split_once("ack ")?;
    EntryId::parse(id).ok()
}

#[tokio::test]
async fn kill_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let mut acknowledged = Vec::new();
    for round in 1..=3 {
        let mut child = spawn_child(&path);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut here = 0;
        // killed after a number of writes that differs per round, while the next one is under way
        for line in &mut lines {
            if let Some(id) = acknowledgment(&line.unwrap()) {
                acknowledged.push(id);
                here += 1;
                if here == 7 * round {
                    break;
                }
            }
        }
        child.kill().unwrap();
        // acknowledged, but not read yet when the child was killed
        acknowledged.extend(lines.map_while(Result::ok).filter_map(|line| acknowledgment(&line)));
        child.wait().unwrap();
    }
    assert!(acknowledged.len() >= 42);
    let store = Store::open(StoreSettings::file(&path), clock()).await.unwrap();
    let found = store.fetch_entries(&acknowledged).await.unwrap();
    assert_eq!(found.len(), acknowledged.len());
    let all = entries(&store).await.len();
    assert!(all <= acknowledged.len() + 3, "at most one unacknowledged write per kill");
    assert!(found.iter().all(|e| e.selectors == selectors(&["t:a"])), "no entry without its selectors");
}

#[tokio::test]
async fn a_second_server_is_refused_and_told_who_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let mut child = spawn_child(&path);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("ack ")));
    let refused = Store::open(StoreSettings::file(&path), clock()).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    let text = refused.to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains(&format!("(pid {})", child.id())), "{text}");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let refused = Store::open(StoreSettings::file(&link), clock()).await.map(|_| ()).unwrap_err();
    assert!(matches!(refused, StoreError::Locked { .. }), "{refused}");
    child.kill().unwrap();
    child.wait().unwrap();
    let store = reopened(&path).await;
    store.close().await;
    drop(store);
    reopened(&path).await;
}

/// Opens a database that nobody uses any more.
async fn reopened(path: &Path) -> Store {
    Store::open(StoreSettings::file(path), clock()).await.unwrap()
}

async fn refused(settings: StoreSettings) -> StoreError {
    Store::open(settings, clock()).await.map(|_| ()).unwrap_err()
}

#[tokio::test]
async fn another_process_that_holds_the_database_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    Store::open(StoreSettings::file(&path), clock()).await.unwrap().close().await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let _held = pool.begin_with("BEGIN EXCLUSIVE").await.unwrap();
    let error = refused(StoreSettings::file(&path)).await;
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("in use by another process"));
}

#[tokio::test]
async fn files_that_cannot_be_used_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| -> PathBuf { folder.path().join(name) };

    std::fs::write(file("garbage"), vec![b'x'; 8192]).unwrap();
    let error = refused(StoreSettings::file(file("garbage"))).await;
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("garbage is damaged (file is not a database)"), "{error}");

    let error = refused(StoreSettings::file(folder.path().join("no/such/folder"))).await;
    assert!(matches!(error, StoreError::CannotOpen { .. }), "{error}");
    assert!(error.to_string().contains("check that its folder exists"), "{error}");

    let store = Store::open(StoreSettings::file(file("db")), clock()).await.unwrap();
    create(&store, entry("1", "/1", "/p", &["t:a"])).await;
    store.close().await;
    drop(store);
    let read_only = StoreSettings { read_only: true, ..StoreSettings::file(file("db")) };
    let store = Store::open(read_only.clone(), clock()).await.unwrap();
    assert_eq!(entries(&store).await.len(), 1);
    let error = store.create_entries(vec![entry("2", "/2", "/p", &["t:a"])]).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
    assert!(error.to_string().contains("cannot be written"), "{error}");
    store.close().await;
    drop(store);

    // the pages behind the schema are overwritten: it opens, and the first reader of them says so
    let size = std::fs::metadata(file("db")).unwrap().len();
    let mut bytes = std::fs::read(file("db")).unwrap();
    bytes[8192..].fill(0xa5);
    std::fs::write(file("db"), bytes).unwrap();
    assert!(size > 8192);
    let error = match Store::open(read_only, clock()).await {
        Err(error) => error,
        Ok(store) => store.entries_after(0, 1000).await.unwrap_err(),
    };
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
}

/// A file system of two megabytes, for as long as this lives.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` where mounting is not permitted and nobody promised that everything is there (`FINIAL_REAL_SPIRE`, which
    /// `./test` sets, or `CI`).
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounting =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "finial-test"]).arg(folder.path()).output();
        let refused = match mounting {
            Ok(output) if output.status.success() => return Some(Self(folder)),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let promised = ["FINIAL_REAL_SPIRE", "CI"].into_iter().find(|name| std::env::var_os(name).is_some());
        assert!(promised.is_none(), "{promised:?} is set, but no disk can be mounted to be filled: {refused}");
        // not eprintln: what tests print is only shown when they fail
        let _ = writeln!(std::io::stderr(), "\nSKIPPED: the full disk, as mounting one is not permitted ({refused})");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_fails_the_write_keeps_the_rest_and_ends_with_the_shortage() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (error, before, after) = fill(disk.0.path()).await;
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("no room left for database"), "{error}");
    assert_eq!(before, after, "the failed batch left nothing");
}

async fn fill(folder: &Path) -> (StoreError, usize, usize) {
    let others = folder.join("what fills the disk");
    std::fs::write(&others, vec![0; 1 << 20]).unwrap();
    let store = Store::open(StoreSettings::file(folder.join("db")), clock()).await.unwrap();
    let mut stored = 0;
    for batch in 0.. {
        let new = (0..100).map(|n| entry(&format!("{batch}-{n}"), &format!("/{batch}/{n}"), "/p", &["t:a"])).collect();
        match store.create_entries(new).await {
            Ok(_) => stored += 100,
            Err(error) => {
                let after = entries(&store).await.len();
                let more =
                    (0..100).map(|n| entry(&format!("more-{n}"), &format!("/more/{n}"), "/p", &["t:a"])).collect();
                let again = store.create_entries(more).await.unwrap_err();
                assert!(matches!(again, StoreError::Full { .. }), "{again}");
                // room again: the same store writes on, as often as it is asked to
                std::fs::remove_file(&others).unwrap();
                for n in 0..3 {
                    create(&store, entry(&format!("room-{n}"), &format!("/room/{n}"), "/p", &["t:a"])).await;
                }
                assert_eq!(entries(&store).await.len(), after + 3);
                store.close().await;
                return (error, stored, after);
            }
        }
    }
    unreachable!()
}
