//! Processes that try to pass for others, in ways that need no rights.

use super::super::process::{self};
use super::super::testing::{Relative, Sleeper, eventually, has, there, values};
use super::*;
use finial_core::{SystemClock, TrustDomain};
use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const ALL: &str = "discover_workload_path = true\nverify_workload_path = true\ndiscover_parents = true\ndiscover_namespaces = true\ndiscover_selinux = true";

fn unix(config: &str) -> Unix {
    let trust_domain = TrustDomain::parse("example.org").expect("a name");
    let data = finial_hcl::parse(config).expect("is HCL");
    Unix::new(&data, &PluginContext { trust_domain, clock: Arc::new(SystemClock) }).expect("is configured well")
}

/// A folder that every user may look into, with programs that sleep: `trusted`, which is a copy of `sleep`, `evil`, which has
/// another hash; and with a shell.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new() -> Self {
        let programs = Self(tempfile::tempdir().expect("a folder"));
        std::fs::set_permissions(programs.0.path(), Permissions::from_mode(0o755)).expect("is ours");
        // By other processes: a test that forks while we hold a program open for writing would make it "busy".
        assert!(Command::new("cp").arg("/bin/sleep").arg(programs.path("trusted")).status().expect("runs").success());
        let evil = format!("cp /bin/sleep {evil} && echo evil >> {evil}", evil = programs.path("evil").display());
        assert!(Command::new("sh").args(["-c", &evil]).status().expect("runs").success());
        // Not the shell that may have started the test.
        assert!(Command::new("cp").arg("/bin/bash").arg(programs.path("shell")).status().expect("runs").success());
        programs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn hash(&self, name: &str) -> String {
        finial_crypto::sha256_hex(&std::fs::read(self.path(name)).expect("reads"))
    }
}

fn with(prefix: &str, found: &BTreeSet<String>) -> Vec<String> {
    found.iter().filter_map(|value| value.strip_prefix(prefix)).map(str::to_owned).collect()
}

/// Nobody of the trusted program is in what was found.
#[track_caller]
fn is_not_trusted(found: &BTreeSet<String>, programs: &Programs) {
    for word in ["path:", "sha256:", "parent_path:", "parent_sha256:"] {
        for claimed in with(word, found) {
            assert!(claimed != programs.path("trusted").to_str().expect("is text"), "{word}{claimed}");
            assert!(claimed != programs.hash("trusted"), "{word}{claimed}");
        }
    }
}

/// Whether we can be nobody, and nobody can make a user namespace.
fn anybody_makes_namespaces() -> bool {
    let mut command = Command::new("unshare");
    command.uid(65_534).gid(65_534).args(["--user", "--map-root-user", "--mount", "true"]);
    let can = command.status().is_ok_and(|status| status.success());
    there("root, and user namespaces for everybody", can)
}

/// A command that runs bubblewrap as nobody, where it is there.
fn bwrap(arguments: &[&str]) -> Option<Command> {
    if !anybody_makes_namespaces() || !has("bwrap") {
        return None;
    }
    let mut command = Command::new("bwrap");
    command
        .uid(65_534)
        .gid(65_534)
        .args(["--die-with-parent", "--unshare-user", "--ro-bind", "/", "/"])
        .args(arguments);
    Some(command)
}

#[tokio::test]
async fn nothing_of_ours_is_told_unless_it_is_asked_for() {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    let found = values(&unix("discover_workload_path = true"), &sleeper.peer()).await;
    let spires = ["uid:", "user:", "gid:", "group:", "supplementary_gid:", "supplementary_group:", "path:", "sha256:"];
    assert!(found.iter().all(|value| spires.iter().any(|word| value.starts_with(word))), "{found:?}");
}

#[tokio::test]
async fn a_process_is_known_by_its_program_its_parents_and_its_namespaces() {
    let programs = Programs::new();
    let shell = Sleeper::of(Command::new("sh").args(["-c", "\"$0\" 600; :"]).arg(programs.path("trusted")));
    let sleeper = shell.descendant("trusted");
    let found = values(&unix(ALL), &sleeper.peer()).await;
    assert_eq!(with("path:", &found), [programs.path("trusted").to_str().expect("is text")]);
    assert_eq!(with("sha256:", &found), [programs.hash("trusted")]);
    let test = std::env::current_exe().expect("a path").canonicalize().expect("is there");
    let shell = Path::new("/bin/sh").canonicalize().expect("is there");
    for program in [&test, &shell] {
        assert!(with("parent_path:", &found).contains(&program.to_str().expect("is text").to_owned()), "{found:?}");
        let hash = finial_crypto::sha256_hex(&std::fs::read(program).expect("reads"));
        assert!(with("parent_sha256:", &found).contains(&hash), "{found:?}");
    }
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let link = std::fs::read_link(format!("/proc/self/ns/{kind}")).expect("is there");
        let number = link.to_str().expect("is text").trim_start_matches(&format!("{kind}:[")).trim_end_matches(']');
        assert!(with(&format!("{kind}ns:"), &found).contains(&number.to_owned()), "{found:?}");
    }
    let no_hash = unix(&format!("{ALL}\nworkload_size_limit = -1"));
    let found = values(&no_hash, &sleeper.peer()).await;
    assert!(with("sha256:", &found).is_empty() && with("parent_sha256:", &found).is_empty());
    // A parent above the size limit only has no hash; the process's own program above it fails, as in SPIRE.
    let size = std::fs::metadata(programs.path("trusted")).expect("is there").len();
    let small = unix(&format!("{ALL}\nworkload_size_limit = {size}"));
    let test_hash = finial_crypto::sha256_hex(&std::fs::read(&test).expect("reads"));
    let found = values(&small, &sleeper.peer()).await;
    assert!(!with("parent_sha256:", &found).contains(&test_hash));
    assert!(with("parent_path:", &found).contains(&test.to_str().expect("is text").to_owned()));
}

#[tokio::test]
async fn a_process_in_bubblewrap_is_itself() {
    let Some(mut command) =
        bwrap(&["--unshare-pid", "--unshare-net", "--uid", "0", "--proc", "/proc", "--dev", "/dev"])
    else {
        return;
    };
    let sandbox = Sleeper::of(command.args(["sleep", "600"]));
    let sleeper = sandbox.descendant("sleep");
    let host = values(&unix(ALL), &Sleeper::start(&mut Command::new("sleep")).peer()).await;
    let found = values(&unix(ALL), &sleeper.peer()).await;
    // Root in its own user namespace, nobody on the host.
    assert_eq!(with("uid:", &found), ["65534"]);
    assert!(with("parent_path:", &found).contains(&"/usr/bin/bwrap".to_owned()), "{found:?}");
    assert!(!with("parent_path:", &host).contains(&"/usr/bin/bwrap".to_owned()), "{host:?}");
    for kind in ["userns:", "mntns:", "pidns:", "netns:"] {
        assert!(!with(kind, &found).contains(&"host".to_owned()), "{found:?}");
        assert_eq!(with(kind, &found).len(), 1, "{found:?}");
    }
    assert_eq!(with("utsns:", &found), with("utsns:", &host), "it asked for none of its own");
    // The same file, but a mount of its own: the host's path is the host's.
    let second = Sleeper::of(bwrap(&[]).expect("was there").args(["sleep", "600"]));
    let second = values(&unix(ALL), &second.descendant("sleep").peer()).await;
    assert_ne!(with("userns:", &second), with("userns:", &found), "two sandboxes are told apart");
}

#[tokio::test]
async fn impostor_by_a_path_in_a_mount_namespace_of_its_own() {
    let programs = Programs::new();
    let (trusted, evil) = (programs.path("trusted"), programs.path("evil"));
    let Some(mut command) = bwrap(&["--ro-bind"]) else { return };
    command.arg(&evil).arg(&trusted).arg(&trusted).arg("600");
    let sandbox = Sleeper::of(&mut command);
    let sleeper = sandbox.descendant("trusted");
    // SPIRE's selector is forged. The hash is not, and a path that has to be true on the host is not told.
    let spires = values(&unix("discover_workload_path = true"), &sleeper.peer()).await;
    assert_eq!(with("path:", &spires), [trusted.to_str().expect("is text")]);
    let found = values(&unix(ALL), &sleeper.peer()).await;
    assert_eq!(with("path:", &found).len(), 0);
    assert_eq!(with("sha256:", &found), [programs.hash("evil")]);
    is_not_trusted(&found, &programs);
    // Nor as somebody's parent: a shell below it.
    let mut command = bwrap(&["--ro-bind", "/bin/bash"]).expect("was there");
    command.arg(&trusted).arg(&trusted).args(["-c", "\"$0\" 600; :"]).arg(&evil);
    let sandbox = Sleeper::of(&mut command);
    let found = values(&unix(ALL), &sandbox.descendant("evil").peer()).await;
    is_not_trusted(&found, &programs);
}

#[tokio::test]
async fn impostor_by_an_overlay_on_the_trusted_folder() {
    if !anybody_makes_namespaces() {
        return;
    }
    let (programs, upper) = (Programs::new(), Programs::new());
    std::fs::rename(upper.path("evil"), upper.path("trusted")).expect("renames");
    let script = "mount -t overlay overlay -o lowerdir=\"$0:$1\" \"$1\" && exec \"$1/$2\" 600";
    std::fs::copy("/bin/sleep", programs.path("other")).expect("copies");
    for (program, hash) in [("trusted", upper.hash("trusted")), ("other", programs.hash("other"))] {
        let mut command = Command::new("unshare");
        command.uid(65_534).gid(65_534).args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
        command.arg(upper.0.path()).arg(programs.0.path()).arg(program);
        let sandbox = Sleeper::of(&mut command);
        let path = programs.path(program);
        eventually("it runs the program on the overlay", || {
            (std::fs::read_link(format!("/proc/{}/exe", sandbox.pid())).ok()? == path).then_some(())
        });
        let found = values(&unix(ALL), &sandbox.peer()).await;
        assert_eq!(with("sha256:", &found), [hash]);
        // Not even the genuine program has its path there: it is not the host's file, whatever its content.
        assert_eq!(with("path:", &found).len(), 0, "{found:?}");
    }
}

#[tokio::test]
async fn impostor_on_the_host_with_a_program_out_of_a_sandbox() {
    let programs = Programs::new();
    let (trusted, evil) = (programs.path("trusted"), programs.path("evil"));
    let Some(mut command) = bwrap(&["--ro-bind"]) else { return };
    let sandbox = Sleeper::of(command.arg(&evil).arg(&trusted).arg(&trusted).arg("600"));
    let inside = sandbox.descendant("trusted");
    // In the host's namespaces, by the sandbox's file of the trusted name.
    let path = format!("/proc/{}/root{}", inside.pid, trusted.display());
    let sleeper = Sleeper::start(&mut Command::new(path));
    let found = values(&unix(ALL), &sleeper.peer()).await;
    assert!(with("mntns:", &found).contains(&"host".to_owned()), "{found:?}");
    assert_eq!(std::fs::read_link(format!("/proc/{}/exe", sleeper.pid())).expect("is there"), trusted);
    is_not_trusted(&found, &programs);
}

#[tokio::test]
async fn impostor_by_a_link_a_name_or_a_comm() {
    let programs = Programs::new();
    std::fs::create_dir(programs.path("d")).expect("a folder");
    symlink(programs.path("evil"), programs.path("d/trusted")).expect("links");
    let linked = Sleeper::start(&mut Command::new(programs.path("d/trusted")));
    let named = Sleeper::start(Command::new(programs.path("evil")).arg0(programs.path("trusted")));
    let hard = programs.path("d/hard");
    std::fs::hard_link(programs.path("evil"), &hard).expect("links");
    for sleeper in [linked, named, Sleeper::start(&mut Command::new(hard))] {
        let found = values(&unix(ALL), &sleeper.peer()).await;
        assert_eq!(with("sha256:", &found), [programs.hash("evil")]);
        is_not_trusted(&found, &programs);
    }
}

#[tokio::test]
async fn impostor_whose_program_was_deleted_or_replaced() {
    let programs = Programs::new();
    let swapped = programs.path("swapped");
    std::fs::rename(programs.path("evil"), &swapped).expect("renames");
    let hash = programs.hash("swapped");
    let sleeper = Sleeper::start(&mut Command::new(&swapped));
    std::fs::remove_file(&swapped).expect("removes");
    std::fs::copy(programs.path("trusted"), &swapped).expect("copies");
    // A file that is called as the kernel calls a deleted one.
    let deleted = format!("{} (deleted)", swapped.display());
    std::fs::copy(programs.path("trusted"), &deleted).expect("copies");
    let found = values(&unix(ALL), &sleeper.peer()).await;
    assert_eq!((with("path:", &found).len(), with("sha256:", &found)), (0, vec![hash]));
    // Without the key it is what SPIRE says.
    let found = values(&unix("discover_workload_path = true"), &sleeper.peer()).await;
    assert_eq!(with("path:", &found), [deleted]);
}

/// A process has the parent that it has, and that is what it runs now: who may not run a program is never its child.
#[tokio::test]
async fn impostor_whose_parent_becomes_another_by_exec() {
    if !there("root", rustix::process::geteuid().is_root()) {
        return;
    }
    let programs = Programs::new();
    std::fs::set_permissions(programs.path("trusted"), Permissions::from_mode(0o700)).expect("is ours");
    let script = "shopt -s execfail; \"$1\" 600 & exec \"$0\" 600 2>/dev/null; wait";
    let mut command = Command::new(programs.path("shell"));
    command.args(["-c", script]).arg(programs.path("trusted")).arg(programs.path("evil")).uid(65_534).gid(65_534);
    let shell = Sleeper::of(&mut command);
    let sleeper = shell.descendant("evil");
    let found = values(&unix(ALL), &sleeper.peer()).await;
    is_not_trusted(&found, &programs);
    // Whoever may run it can be its child: the guide says so.
    std::fs::set_permissions(programs.path("trusted"), Permissions::from_mode(0o755)).expect("is ours");
    let mut command = Command::new(programs.path("shell"));
    command.args(["-c", script]).arg(programs.path("trusted")).arg(programs.path("evil"));
    let shell = Sleeper::of(&mut command);
    let sleeper = shell.descendant("evil");
    let trusted = programs.path("trusted");
    eventually("the shell has become the other program", || {
        (std::fs::read_link(format!("/proc/{}/exe", shell.pid())).ok()? == trusted).then_some(())
    });
    let found = values(&unix(ALL), &sleeper.peer()).await;
    assert!(with("parent_path:", &found).contains(&trusted.to_str().expect("is text").to_owned()));
    assert!(!with("parent_path:", &found).contains(&programs.path("shell").to_str().expect("is text").to_owned()));
}

#[tokio::test]
async fn impostor_who_is_left_by_its_parents() {
    let programs = Programs::new();
    // The middle one ends; whoever takes the orphan in was above it already.
    let mut command = Command::new(programs.path("shell"));
    command.args(["-c", "(\"$0\" 600 >&2 & echo $!)"]).arg(programs.path("evil"));
    let said = command.stderr(std::process::Stdio::null()).output().expect("runs").stdout;
    let orphan = Relative::of(String::from_utf8(said).expect("text").trim().parse().expect("a pid"));
    let found = values(&unix(ALL), &orphan.peer()).await;
    let bystander = Sleeper::start(&mut Command::new("sleep"));
    let of_test = with("parent_path:", &values(&unix(ALL), &bystander.peer()).await);
    let parents = with("parent_path:", &found);
    assert!(parents.iter().all(|path| of_test.contains(path)), "{parents:?} of {of_test:?}");
    assert!(!parents.contains(&programs.path("shell").to_str().expect("is text").to_owned()), "{parents:?}");
}

/// The number of a parent changes hands between two looks.
#[test]
fn a_parent_that_ends_meanwhile_never_lends_its_number() {
    let (first, second) = (Sleeper::start(&mut Command::new("sleep")), Sleeper::start(&mut Command::new("sleep")));
    let mut gone = Sleeper::start(&mut Command::new("sleep"));
    gone.0.kill().expect("kills");
    gone.0.wait().expect("waits");
    let (first, second, gone) = (first.pid(), second.pid(), gone.pid());
    for (looks, expected) in [
        (vec![first, first], Some(first)),
        (vec![first, second, second, second], Some(second)), // was another's when it was opened
        (vec![gone, second, second], Some(second)),          // was nobody's
        (vec![first, 0, 0], None),                           // out of our sight
        ([first, second].repeat(16), None),                  // never twice the same
    ] {
        let looks = std::sync::Mutex::new(looks.into_iter());
        let found = program::parent(|| Ok(looks.lock().expect("no panics").next()));
        assert_eq!(found.ok().flatten().map(|parent| parent.pid), expected);
    }
}

#[tokio::test]
async fn parents_that_come_and_go_are_never_somebody_elses() {
    let programs = Programs::new();
    let attestor = unix(&format!("{ALL}\nworkload_size_limit = -1"));
    // Decoys that run the trusted program, so that numbers of ended parents go to them.
    let script = "while :; do \"$0\" 0; done";
    let mut decoys = Command::new("bash");
    decoys.args(["-c", script]).arg(programs.path("trusted")).stderr(std::process::Stdio::null());
    let _decoys = Sleeper::of(&mut decoys);
    for _ in 0..10 {
        let shell = Sleeper::of(
            Command::new("bash").args(["-c", "(\"$0\" 600 & :) & wait; sleep 600"]).arg(programs.path("evil")),
        );
        let sleeper = shell_or_orphan(&programs);
        for _ in 0..5 {
            is_not_trusted(&values(&attestor, &sleeper.peer()).await, &programs);
        }
        drop(shell);
        is_not_trusted(&values(&attestor, &sleeper.peer()).await, &programs);
    }
}

/// The process that runs `evil`, whoever its parent is by now.
fn shell_or_orphan(programs: &Programs) -> Relative {
    let evil = programs.path("evil");
    eventually("somebody runs evil", || {
        let all = std::fs::read_dir("/proc").ok()?.flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let mut found = pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == evil));
        Some(Relative::of(found.next()?))
    })
}

#[tokio::test]
async fn impostor_with_a_proc_of_its_own() {
    let programs = Programs::new();
    // A /proc that says that process 1, 2 and 3 are trusted ones, mounted over the sandbox's.
    let forged = programs.path("proc");
    for pid in ["1", "2", "3", "self"] {
        std::fs::create_dir_all(forged.join(pid)).expect("a folder");
        symlink(programs.path("trusted"), forged.join(pid).join("exe")).expect("links");
        std::fs::write(forged.join(pid).join("status"), "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t0\n")
            .expect("writes");
    }
    let Some(mut command) = bwrap(&["--unshare-pid", "--ro-bind"]) else { return };
    let sandbox = Sleeper::of(command.arg(&forged).arg("/proc").arg(programs.path("evil")).arg("600"));
    let found = values(&unix(ALL), &sandbox.descendant("evil").peer()).await;
    assert_eq!(with("uid:", &found), ["65534"]);
    is_not_trusted(&found, &programs);
}

#[tokio::test]
async fn impostor_by_a_setuid_program() {
    if !there("root", rustix::process::geteuid().is_root()) {
        return;
    }
    let programs = Programs::new();
    std::fs::set_permissions(programs.path("evil"), Permissions::from_mode(0o4755)).expect("is ours");
    let sleeper = Sleeper::start(Command::new(programs.path("evil")).uid(65_534).gid(65_534));
    let found = values(&unix(ALL), &sleeper.peer()).await;
    // The user that it runs as, as in SPIRE: whoever made it setuid let others be him. It is no other program by that.
    assert_eq!((with("uid:", &found), with("gid:", &found)), (vec!["0".to_owned()], vec!["65534".to_owned()]));
    is_not_trusted(&found, &programs);
}

/// The first thread of a process has ended, others go on: what the process runs cannot be told any more, and is not guessed.
#[tokio::test]
async fn impostor_without_its_first_thread() {
    let script = "import threading, ctypes, time\n\
                  threading.Thread(target=lambda: time.sleep(600)).start()\n\
                  ctypes.CDLL(None).pthread_exit(None)";
    if !there("python3", Path::new("/usr/bin/python3").exists()) {
        return;
    }
    let python = Sleeper::of(Command::new("/usr/bin/python3").args(["-c", script]));
    eventually("the first thread has ended", || {
        let status = process::status(python.1.as_fd()).ok()?;
        process::fields(&status, "State:")?.next().filter(|state| *state == "Z").map(|_| ())
    });
    let error = unix(ALL).attest(&python.peer()).await.expect_err("has no program");
    assert!(error.to_string().starts_with("path lookup: "), "{error}");
}
