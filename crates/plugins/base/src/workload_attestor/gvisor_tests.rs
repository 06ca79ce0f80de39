use super::super::testing::{Sleeper, eventually, there, values};
use super::*;
use async_trait::async_trait;
use finial_core::{ManualClock, SystemClock, TrustDomain};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A folder of records as runsc keeps it, and one for what has to lie elsewhere.
struct World {
    root: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = || tempfile::tempdir().expect("a folder");
        let world = Self { root: folder(), elsewhere: folder() };
        for folder in [&world.root, &world.elsewhere] {
            std::fs::set_permissions(folder.path(), Permissions::from_mode(0o711)).expect("is ours");
        }
        world
    }

    fn attestor_with(&self, more: &str, clock: Arc<dyn Clock>) -> Gvisor {
        let trust_domain = TrustDomain::parse("example.org").expect("a name");
        let data = format!("roots = [\"/nonexistent\", {:?}]\n{more}", self.root.path());
        let data = finial_hcl::parse(&data).expect("is HCL");
        Gvisor::new(&data, &PluginContext { trust_domain, clock }).expect("is configured well")
    }

    fn attestor(&self) -> Gvisor {
        self.attestor_with("runsc_paths = []", Arc::new(SystemClock))
    }

    /// The name, and that of its file.
    fn record(&self, container: &str, gofer: i32, sandbox: i32) -> PathBuf {
        let state = serde_json::json!({
            "id": container, "status": "running", "goferPid": gofer, "sandbox": {"id": "pod", "pid": sandbox},
            "spec": {"annotations": {"io.kubernetes.cri.sandbox-namespace": "pay", "n": "a:b"}},
        });
        self.write(container, &state.to_string())
    }

    fn write(&self, container: &str, content: &str) -> PathBuf {
        let path = self.root.path().join(format!("{container}_sandbox:pod.state"));
        std::fs::write(&path, content).expect("writes");
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("is ours");
        path
    }

    fn claim(&self, container: &str) -> Vec<String> {
        vec![format!("--root={}", self.root.path().display()), "gofer".into(), container.into()]
    }
}

/// A process that calls itself `name`, with these arguments. It stops itself at once.
fn process(program: &str, name: &str, arguments: &[String], uid: Option<u32>) -> Sleeper {
    let mut command = Command::new(program);
    command.arg0(name).args(["-c", "kill -STOP $$"]).args(arguments);
    if let Some(uid) = uid {
        command.uid(uid);
    }
    let process = Sleeper::of(&mut command);
    eventually("its command line is set", || {
        (!std::fs::read(format!("/proc/{}/cmdline", process.pid())).ok()?.is_empty()).then_some(())
    });
    process
}

fn gofer(arguments: &[String]) -> Sleeper {
    process("/bin/sh", "runsc-gofer", arguments, None)
}

async fn refusal(attestor: &Gvisor, process: &Sleeper) -> String {
    attestor.attest(&process.peer()).await.expect_err("is refused").to_string()
}

const KNOWN: [&str; 4] =
    ["sandbox_id:pod", "container_id:c1", "annotation:io.kubernetes.cri.sandbox-namespace:pay", "annotation:n:a:b"];

#[tokio::test]
async fn a_gofer_is_known_by_its_container_and_a_sandbox_by_itself() {
    let world = World::new();
    let (first, second) = (gofer(&world.claim("c1")), gofer(&world.claim("c2")));
    let sandbox = process("/bin/sh", "runsc-sandbox", &world.claim("c1"), None);
    world.record("c1", first.pid(), sandbox.pid());
    world.record("c2", second.pid(), sandbox.pid());
    assert_eq!(values(&world.attestor(), &first.peer()).await, KNOWN.map(str::to_owned).into());
    let found = values(&world.attestor(), &second.peer()).await;
    assert!(found.contains("container_id:c2") && !found.contains("container_id:c1"), "{found:?}");
    // Of which container of a pod the sandbox itself speaks, nobody knows.
    assert_eq!(values(&world.attestor(), &sandbox.peer()).await, ["sandbox_id:pod".to_owned()].into());
    let other = process("/bin/sh", "sh", &world.claim("c1"), None);
    assert_eq!(values(&world.attestor(), &other.peer()).await.len(), 0, "who is not of gVisor has no selectors");
}

#[tokio::test]
async fn impostor_who_claims_anothers_container() {
    let world = World::new();
    let (genuine, impostor) = (gofer(&world.claim("c1")), gofer(&world.claim("c1")));
    world.record("c1", genuine.pid(), genuine.pid());
    let expected = format!("gVisor container \"c1\": runsc has process {} on record for it", genuine.pid());
    assert_eq!(refusal(&world.attestor(), &impostor).await, expected);
    // Its own record says another container than the command line.
    world.write(
        "c3",
        &format!(
            "{{\"id\":\"c1\",\"status\":\"running\",\"goferPid\":{},\"sandbox\":{{\"id\":\"s\"}}}}",
            impostor.pid()
        ),
    );
    let mixed = gofer(&world.claim("c3"));
    assert!(refusal(&world.attestor(), &mixed).await.contains("on record for it"));
}

#[tokio::test]
async fn impostor_who_brings_records_of_his_own() {
    let world = World::new();
    let forged = format!("--root={}", world.elsewhere.path().display());
    let link = world.elsewhere.path().join("link");
    std::os::unix::fs::symlink(world.elsewhere.path(), &link).expect("links");
    let dots = format!(
        "--root={}/../{}",
        world.root.path().display(),
        world.elsewhere.path().file_name().expect("a name").display()
    );
    for root in [forged, format!("--root={}", link.display()), dots, "--root=/nonexistent/x".into(), "--root=".into()] {
        let impostor = gofer(&[root.clone(), "c1".into()]);
        let state = format!(
            "{{\"id\":\"c1\",\"status\":\"running\",\"goferPid\":{},\"sandbox\":{{\"id\":\"s\"}}}}",
            impostor.pid()
        );
        std::fs::write(world.elsewhere.path().join("c1_sandbox:s.state"), state).expect("writes");
        let error = refusal(&world.attestor(), &impostor).await;
        assert!(
            error.contains("which is in none of the folders that the attestor's key \"roots\" names"),
            "{root}: {error}"
        );
    }
}

/// Who asks gives up; the thread that waits for the file system cannot.
#[tokio::test]
async fn a_read_that_hangs_counts_until_it_ends() {
    let world = World::new();
    let process = gofer(&world.claim("c1"));
    // To open it takes until somebody writes.
    let record = world.root.path().join("c1_sandbox:pod.state");
    assert!(Command::new("mkfifo").arg(&record).status().expect("runs").success());
    let attestor = world.attestor();
    let peer = process.peer();
    assert!(tokio::time::timeout(Duration::ZERO, attestor.attest(&peer)).await.is_err(), "it hangs");
    let left = attestor.reads.available_permits();
    let writer = std::fs::File::options().write(true).open(&record).expect("opens");
    std::fs::remove_file(&record).expect("is ours");
    drop(writer);
    assert_eq!(left, READS_MAX - 1, "given up, and still there");
    eventually("the read ends", || (attestor.reads.available_permits() == READS_MAX).then_some(()));
}

/// The folder is chosen by the caller, and to look at one on a dead file system takes for ever.
#[tokio::test]
async fn folders_elsewhere_are_not_even_looked_at() {
    let world = World::new();
    let link = world.elsewhere.path().join("link");
    std::os::unix::fs::symlink(world.root.path(), &link).expect("links");
    let process = gofer(&[format!("--root={}", link.display()), "c1".into()]);
    world.record("c1", process.pid(), 1);
    assert!(refusal(&world.attestor(), &process).await.contains("\"roots\" names"), "the link was followed");
    let (run, known) = (PathBuf::from("/run"), world.root.path().to_owned());
    assert_eq!(
        root_of(Path::new("/var/run"), std::slice::from_ref(&run)),
        Path::new("/var/run").canonicalize().map_err(|e| e.to_string())
    );
    assert!(root_of(Path::new("/run/../run"), &[run]).is_err());
    // Whoever configures the link may also be called by what is behind it, and the other way round.
    for claimed in [&known, &link] {
        assert_eq!(root_of(claimed, std::slice::from_ref(&link)), Ok(known.canonicalize().expect("is there")));
    }
}

#[tokio::test]
async fn impostor_of_another_user_with_the_right_number() {
    if !there("root", rustix::process::geteuid().is_root()) {
        return;
    }
    let world = World::new();
    let impostor = process("/bin/sh", "runsc-gofer", &world.claim("c1"), Some(65_534));
    world.record("c1", impostor.pid(), 1);
    let error = refusal(&world.attestor(), &impostor).await;
    assert!(error.ends_with("others than the process's user may write it"), "{error}");
}

#[tokio::test]
async fn impostor_who_may_write_the_records() {
    let world = World::new();
    let impostor = gofer(&world.claim("c1"));
    let record = world.record("c1", impostor.pid(), 1);
    for (what, mode) in
        [(record.as_path(), 0o666), (&record, 0o660), (world.root.path(), 0o777), (world.root.path(), 0o771)]
    {
        let before = what.metadata().expect("is there").permissions();
        std::fs::set_permissions(what, Permissions::from_mode(mode)).expect("is ours");
        let error = refusal(&world.attestor(), &impostor).await;
        assert!(error.ends_with("others than the process's user may write it"), "{error}");
        std::fs::set_permissions(what, before).expect("is ours");
    }
    assert_eq!(values(&world.attestor(), &impostor.peer()).await.len(), 4);
}

/// The container is gone, its record is not, and the number of its gofer is given out again.
#[tokio::test]
async fn impostor_with_the_number_of_a_gofer_that_is_gone() {
    let world = World::new();
    let impostor = gofer(&world.claim("c1"));
    let record = world.record("c1", impostor.pid(), 1);
    let old = std::fs::File::options().write(true).open(&record).expect("opens");
    let changed = record.metadata().expect("is there").mtime();
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(changed as u64 - 60)).expect("is ours");
    let error = refusal(&world.attestor(), &impostor).await;
    assert!(error.ends_with("the process is younger than runsc's record, and is not runsc"), "{error}");
    // A clock that was set forwards makes genuine ones look younger. They are runsc, nevertheless.
    let program = world.elsewhere.path().join("runsc");
    assert!(Command::new("cp").arg("/bin/sh").arg(&program).status().expect("runs cp").success());
    let genuine = process(program.to_str().expect("is text"), "runsc-gofer", &world.claim("c2"), None);
    world.record("c2", genuine.pid(), 1);
    let installed = format!("runsc_paths = [{program:?}]");
    let ahead: Arc<dyn Clock> = Arc::new(ManualClock::at(changed + 1_000_000));
    assert_eq!(values(&world.attestor_with(&installed, ahead.clone()), &genuine.peer()).await.len(), 4);
    assert!(world.attestor_with("runsc_paths = []", ahead.clone()).attest(&genuine.peer()).await.is_err());
    // And one that was replaced by a newer version still is as old as its record.
    std::fs::remove_file(&program).expect("removes");
    assert!(Command::new("cp").arg("/bin/true").arg(&program).status().expect("runs cp").success());
    assert_eq!(values(&world.attestor_with(&installed, Arc::new(SystemClock)), &genuine.peer()).await.len(), 4);
    assert!(world.attestor_with(&installed, ahead).attest(&genuine.peer()).await.is_err());
}

#[tokio::test]
async fn impostor_who_is_a_sandbox_where_a_gofer_is_on_record() {
    let world = World::new();
    let sandbox = process("/bin/sh", "runsc-sandbox", &world.claim("c1"), None);
    world.record("c1", sandbox.pid(), 1);
    assert!(refusal(&world.attestor(), &sandbox).await.ends_with("runsc has process 1 on record for it"));
    let gofer = gofer(&world.claim("c2"));
    world.record("c2", 1, gofer.pid());
    assert!(refusal(&world.attestor(), &gofer).await.ends_with("runsc has process 1 on record for it"));
}

#[tokio::test]
async fn impostor_of_a_container_that_has_stopped() {
    let world = World::new();
    let impostor = gofer(&world.claim("c1"));
    let state = format!(
        "{{\"id\":\"c1\",\"status\":\"stopped\",\"goferPid\":{},\"sandbox\":{{\"id\":\"s\"}}}}",
        impostor.pid()
    );
    world.write("c1", &state);
    assert!(refusal(&world.attestor(), &impostor).await.ends_with("runsc has it on record as \"stopped\""));
    world.write("c1", &state.replace("\"stopped\"", "\"running\"").replace("{\"id\":\"s\"}", "null"));
    assert!(refusal(&world.attestor(), &impostor).await.ends_with("the container has no sandbox"));
}

#[tokio::test]
async fn impostor_with_a_name_that_leads_elsewhere() {
    let world = World::new();
    let below = world.root.path().join("x");
    std::fs::create_dir(&below).expect("a folder");
    for name in ["", "../c1", "x/c1", "c1_sandbox:pod", "c", "c1*", "c1\n", "cé", "--root"] {
        let impostor = gofer(&world.claim(name));
        world.record("c1", impostor.pid(), impostor.pid());
        std::fs::copy(world.root.path().join("c1_sandbox:pod.state"), below.join("c1_sandbox:pod.state"))
            .expect("copies");
        let error = refusal(&world.attestor(), &impostor).await;
        let expected =
            error.ends_with("it has no container's name") || error.contains("runsc has not exactly one record of it");
        assert!(expected, "{name:?}: {error}");
    }
    // Two sandboxes with a container of this name.
    let impostor = gofer(&world.claim("c1"));
    world.record("c1", impostor.pid(), impostor.pid());
    std::fs::copy(world.root.path().join("c1_sandbox:pod.state"), world.root.path().join("c1_sandbox:q.state"))
        .expect("copies");
    assert!(refusal(&world.attestor(), &impostor).await.contains("runsc has not exactly one record of it"));
}

#[tokio::test]
async fn records_that_cannot_be_read_prove_nothing() {
    let world = World::new();
    let process = gofer(&world.claim("c1"));
    let pid = process.pid();
    for content in ["", "{", "null", "[]", "{}", &format!("{{\"id\":\"c1\",\"goferPid\":{pid}}}"), &"[".repeat(100_000)]
    {
        world.write("c1", content);
        refusal(&world.attestor(), &process).await;
    }
    // One that is just being written is waited for.
    let path = world.record("c1", pid, 1);
    let content = std::fs::read(&path).expect("reads");
    std::fs::write(&path, &content[..content.len() / 2]).expect("writes");
    let attestor = world.attestor();
    let writer = std::thread::spawn(move || std::fs::write(path, content));
    assert_eq!(values(&attestor, &process.peer()).await.len(), 4);
    writer.join().expect("ends").expect("writes");
}

#[test]
fn the_start_of_a_process_is_read_behind_whatever_name_it_has() {
    let own = std::fs::read("/proc/self/stat").expect("reads");
    assert!(start_ticks(&own).expect("a number") > 0);
    let rest: Vec<String> = (3..30).map(|n| n.to_string()).collect();
    let stat = format!("7 (a) S 1 ) 1 2 3 (x)) {}", rest.join(" "));
    assert_eq!(start_ticks(stat.as_bytes()), Some(22));
    for bad in ["", "1 (a", "1 (a) S 1", "1 (a) \u{e9}"] {
        assert_eq!(start_ticks(bad.as_bytes()), None);
    }
}

struct Fixed(&'static str);

#[async_trait]
impl WorkloadAttestor for Fixed {
    fn name(&self) -> &str {
        self.0
    }

    async fn attest(&self, _: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        Ok(prefixed_selectors(self.0, ["uid:0".to_owned()]))
    }
}

#[tokio::test]
async fn a_gofer_is_not_the_root_user_that_it_runs_as() {
    let (gofer, other) = (gofer(&["c1".into()]), process("/bin/sh", "runsc", &["c1".into()], None));
    let all = |names: &[&'static str]| -> Vec<Arc<dyn WorkloadAttestor>> {
        fence(names.iter().map(|name| Arc::new(Fixed(name)) as Arc<dyn WorkloadAttestor>).collect())
    };
    for (attestors, of_gofer) in
        [(all(&["unix", "docker", "gvisor"]), ["docker", "gvisor"].as_slice()), (all(&["unix"]), &["unix"])]
    {
        let mut kinds = Vec::new();
        for attestor in attestors {
            assert_eq!(
                attestor.attest(&other.peer()).await.expect("attests").len(),
                1,
                "any other process is as it was"
            );
            let selectors = attestor.attest(&gofer.peer()).await.expect("attests");
            kinds.extend(selectors.into_iter().map(|s| s.kind));
        }
        assert_eq!(kinds, of_gofer);
    }
}

#[tokio::test]
async fn whatever_else_a_gofer_is_called_with_it_is_fenced() {
    use std::os::unix::ffi::OsStrExt;
    let world = World::new();
    let of = |argument: &[u8]| {
        let mut command = Command::new("/bin/sh");
        command.arg0("runsc-gofer").args(["-c", "kill -STOP $$"]).arg(std::ffi::OsStr::from_bytes(argument));
        let process = Sleeper::of(command.args(world.claim("c1")));
        eventually("it has its name", || claim(process.peer().proc_dir));
        process
    };
    let fenced = fence(vec![Arc::new(Fixed("unix")), Arc::new(world.attestor())]);
    // Not text, and a letter that the limit cuts through, wherever that is.
    let letters = "é".repeat(COMMAND_BYTES_MAX / 2 + 9);
    for argument in [b"\xff".as_slice(), letters.as_bytes(), format!("a{letters}").as_bytes()] {
        let process = of(argument);
        let unix = fenced.first().expect("is there");
        assert_eq!(unix.attest(&process.peer()).await.expect("attests"), []);
    }
    let odd = of(b"\xff");
    world.record("c1", odd.pid(), 1);
    assert_eq!(values(&world.attestor(), &odd.peer()).await.len(), 4, "and still is who it is");
}

proptest::proptest! {
    #[test]
    fn any_record_is_answered(content in "\\PC{0,60}") {
        let _ = serde_json::from_str::<State>(&content);
        let _ = start_ticks(content.as_bytes());
    }
}
