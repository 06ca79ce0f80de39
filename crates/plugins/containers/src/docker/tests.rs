use super::*;
use crate::fake::{Act, Asked, FakeProcess, Sleeper, unix};
use finial_core::{SystemClock, TrustDomain};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::time::Instant;

const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
const DIGEST: &str = "sha256:93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26";

fn made(config: &str) -> Result<Docker, String> {
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let context = PluginContext { trust_domain, clock: Arc::new(SystemClock) };
    Docker::new(&finial_hcl::parse(config).unwrap(), &context).map_err(|e| e.to_string())
}

/// An attestor of a daemon that does what `script` says, but offers a version of its API.
struct Rig {
    docker: Docker,
    asked: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock");
    (folder, path)
}

fn rig(script: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> Rig {
    let (folder, path) = socket();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    unix(&path, move |request| {
        log.lock().unwrap().push(request.path.clone());
        match request.path.as_str() {
            "/_ping" => Act::With("Api-Version: 1.41", "OK".into()),
            _ => script(request),
        }
    });
    let docker = made(&format!("docker_socket_path = \"unix://{}\"", path.display())).unwrap();
    Rig { docker, asked, _folder: folder }
}

fn container(id: &str, pid: i32) -> String {
    format!(
        r#"{{"Id":"{id}","Name":"/w1","Image":"{DIGEST}","State":{{"Running":true,"Pid":{pid},"Status":"running"}},
            "Config":{{"Image":"local/busybox:1","Labels":{{"team":"pay","a:b":"c=d"}},"Env":["FOO=bar","EMPTY="]}}}}"#
    )
}

fn in_docker() -> FakeProcess {
    FakeProcess::in_cgroups(&format!("12:cpu:/docker/{ID}\n0::/docker/{ID}\n"))
}

async fn attest(docker: &Docker, process: &FakeProcess) -> Result<BTreeSet<String>, String> {
    let selectors = docker.attest(&process.peer()).await.map_err(|e| e.to_string())?;
    assert!(selectors.iter().all(|s| s.kind == "docker"));
    Ok(selectors.into_iter().map(|s| s.value).collect())
}

#[tokio::test]
async fn selectors_are_those_of_spire() {
    let rig = rig(|_| Act::Say(200, container(ID, 0)));
    let found = attest(&rig.docker, &in_docker()).await.unwrap();
    let digest = format!("image_config_digest:{DIGEST}");
    let expected =
        ["label:team:pay", "label:a:b:c=d", "env:FOO=bar", "env:EMPTY=", "image_id:local/busybox:1", digest.as_str()];
    assert_eq!(found, expected.map(str::to_owned).into());
    attest(&rig.docker, &in_docker()).await.unwrap();
    let path = format!("/v1.41/containers/{ID}/json");
    assert_eq!(*rig.asked.lock().unwrap(), ["/_ping", &path, &path], "the version is asked for once");
}

#[tokio::test]
async fn what_is_in_no_container_asks_nobody() {
    let docker = made("docker_socket_path = \"unix:///nowhere/docker.sock\"").unwrap();
    let process = FakeProcess::in_cgroups("1:name=systemd:/user.slice\n0::/user.slice/user-1000.slice\n");
    assert_eq!(attest(&docker, &process).await, Ok(BTreeSet::new()));
}

#[tokio::test]
async fn a_process_that_has_gone_is_not_another() {
    let docker = made("").unwrap();
    let mut sleeper = Sleeper::start();
    assert!(docker.attest(&sleeper.peer()).await.is_ok());
    sleeper.end();
    let error = docker.attest(&sleeper.peer()).await.expect_err("it is gone");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn an_answer_about_another_container_is_refused() {
    let other = ID.replace('9', "8");
    let rig = rig(move |_| Act::Say(200, container(&other, 0)));
    let error = attest(&rig.docker, &in_docker()).await.unwrap_err();
    assert!(error.contains(&format!("asked about container {ID}, the daemon answered about")), "{error}");
}

#[tokio::test]
async fn answers_that_are_none_are_refused() {
    for (body, text) in [
        ("no json".to_owned(), "answers what is not of Docker's API"),
        ("{\"Id\":\"x\"}".to_owned(), "answers what is not of Docker's API"),
        (container(ID, 0).replace("true", "false"), "is not running"),
        (format!("{{\"Id\":\"{ID}\",\"Config\":{{\"Env\":7}}}}"), "answers what is not of Docker's API"),
        (" ".repeat(9 << 20), "the answer is larger than 8388608 bytes"),
    ] {
        let rig = rig(move |_| Act::Say(200, body.clone()));
        let error = attest(&rig.docker, &in_docker()).await.unwrap_err();
        assert!(error.contains(text), "{error}");
    }
}

/// A forged name: the process is where the container's own first process is not.
#[test]
fn a_cgroup_named_after_a_container_is_not_that_container() {
    let check = |path: &str, first: Option<&str>| {
        let with_id = |text: &str| text.replace("ID", ID);
        check_place(ID, &["/", &with_id(path)], first.map(with_id).as_deref()).is_ok()
    };
    let docker = Some("9:cpu:/docker/ID\n0::/docker/ID\n");
    for good in ["/docker/ID", "/docker/ID/below", "/docker/ID/init.scope"] {
        assert!(check(good, docker), "{good}");
    }
    for forged in ["/user.slice/user@1000.service/docker/ID", "/docker/ID0/ID", "/docker/other/docker/ID", "/x/ID"] {
        assert!(!check(forged, docker), "{forged}");
    }
    // The first process of a container may itself be further down.
    assert!(check("/m/libpod-ID.scope/app", Some("0::/m/libpod-ID.scope/init.scope/ID\n")));
    // Nothing is known of it, or it is another process: an engine in another PID namespace.
    assert!(check("/docker/ID", None) && check("/docker/ID", Some("0::/system.slice/x.service\n")));
}

#[tokio::test]
async fn a_missing_container_is_told_at_once_and_a_busy_daemon_is_asked_again() {
    let gone = rig(|_| Act::Say(404, format!("{{\"message\":\"No such container: {ID}\"}}")));
    let error = attest(&gone.docker, &in_docker()).await.unwrap_err();
    assert_eq!(error, format!("Error response from daemon: No such container: {ID}"));
    assert_eq!(gone.asked.lock().unwrap().len(), 2);
    let count = AtomicUsize::new(0);
    let busy = rig(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Act::Say(503, "{\"message\":\"starting\"}".into()),
        1 => Act::Close,
        2 => Act::Raw(b"SSH-2.0-x\r\n".to_vec()),
        _ => Act::Say(200, container(ID, 0)),
    });
    assert_eq!(attest(&busy.docker, &in_docker()).await.unwrap().len(), 6);
}

#[tokio::test]
async fn a_daemon_that_comes_back_is_found_again() {
    let (folder, path) = socket();
    let docker = made(&format!("docker_socket_path = \"unix://{}\"", path.display())).unwrap();
    let error = attest(&docker, &in_docker()).await.unwrap_err();
    let expected =
        format!("failed to connect to the docker API at unix://{}; check if the path is correct", path.display());
    assert!(error.starts_with(&expected), "{error}");
    let answer = |request: &Asked| match request.path.as_str() {
        "/_ping" => Act::With("Api-Version: 1.50", "OK".into()),
        _ => Act::With("Connection: close", container(ID, 0)),
    };
    unix(&path, answer);
    assert!(attest(&docker, &in_docker()).await.is_ok());
    // Another one, which does not have the version of the one before.
    std::fs::remove_file(&path).unwrap();
    unix(&path, |request| match request.path.as_str() {
        "/_ping" => Act::With("Api-Version: 1.40", "OK".into()),
        path if path.starts_with("/v1.40/") => Act::Say(200, container(ID, 0)),
        _ => Act::Say(400, "{\"message\":\"client version 1.50 is too new\"}".into()),
    });
    assert!(attest(&docker, &in_docker()).await.is_ok());
    drop(folder);
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_hangs_is_given_up() {
    let rig = rig(|_| Act::Hang);
    let began = Instant::now();
    let error = attest(&rig.docker, &in_docker()).await.unwrap_err();
    assert!(error.contains("no answer within 5s"), "{error}");
    assert!(began.elapsed() <= TIMEOUT);
}

#[test]
fn podman_is_found_by_its_cgroups() {
    for (path, expected) in [
        ("/docker/x", Runs::Docker),
        ("/machine.slice/libpod-x.scope", Runs::Podman),
        ("/libpod_parent/libpod-x", Runs::Podman),
        ("/a/libpod/x", Runs::Podman),
        ("/user.slice/user-1001.slice/user@1001.service/user.slice/libpod-x.scope", Runs::PodmanOf(1001)),
        ("/user.slice/user-99999999999.slice/libpod-x.scope", Runs::Podman),
    ] {
        assert_eq!(who_runs(&[path]), expected, "{path}");
    }
}

/// The user that runs the tests, and so listens.
fn me() -> u32 {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap())
}

fn in_podman_of(uid: u32) -> FakeProcess {
    let path = format!("/user.slice/user-{uid}.slice/user@{uid}.service/user.slice/libpod-{ID}.scope");
    FakeProcess::in_cgroups(&format!("0::{path}"))
}

#[tokio::test]
async fn a_users_podman_is_asked_at_that_users_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (me, other) = (me(), me() + 1);
    let socket = folder.path().join(format!("{me}.sock"));
    unix(&socket, |request| match request.path.as_str() {
        "/_ping" => Act::Say(200, "OK".into()),
        // podman's image IDs come without their algorithm.
        path if path.starts_with("/containers/") => Act::Say(200, container(ID, 0).replace("\"sha256:", "\"")),
        path => {
            assert_eq!(path, format!("/images/{}/json", DIGEST.trim_start_matches("sha256:")));
            Act::Say(200, format!("{{\"Id\":\"{DIGEST}\"}}"))
        }
    });
    let template = format!("podman_socket_path_template = \"unix://{}/%d.sock\"", folder.path().display());
    let docker = made(&template).unwrap();
    let found = attest(&docker, &in_podman_of(me)).await.unwrap();
    assert!(found.contains(&format!("image_config_digest:{DIGEST}")), "{found:?}");
    assert!(found.contains(&format!("podman_user:{me}")), "whose word it is: {found:?}");
    // Only those count whom the configuration names, if it names some.
    for (users, counts) in [(format!("[{me}]"), true), (format!("[{other}]"), false), ("[]".to_owned(), false)] {
        let docker = made(&format!("{template}\npodman_users = {users}")).unwrap();
        match attest(&docker, &in_podman_of(me)).await {
            Ok(_) => assert!(counts, "{users}"),
            Err(error) => {
                assert!(!counts && error.contains("podman_users does not name that user"), "{users}: {error}")
            }
        }
    }
    // Another's socket, to which a user leads us from his own.
    std::os::unix::fs::symlink(&socket, folder.path().join(format!("{other}.sock"))).unwrap();
    let error = attest(&docker, &in_podman_of(other)).await.unwrap_err();
    assert!(error.contains(&format!("user {me} listens there, not user {other}")), "{error}");
    assert!(docker.users.each.lock().unwrap().len() <= 1, "users are forgotten");
}

#[tokio::test]
async fn a_users_silent_podman_holds_up_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let silent = Arc::new(AtomicUsize::new(0));
    let count = silent.clone();
    unix(&folder.path().join(format!("{}.sock", me())), move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Act::Hang
    });
    let rig = rig(|_| Act::Say(200, container(ID, 0)));
    let template = format!("podman_socket_path_template = \"unix://{}/%d.sock\"", folder.path().display());
    let docker = Docker { docker: rig.docker.docker, ..made(&template).unwrap() };
    let process = in_podman_of(me());
    let hung = futures::future::join_all((0..40).map(|_| attest(&docker, &process)));
    let (others, docker_process) = (in_podman_of(me() + 1), in_docker());
    let next = async {
        // Nobody listens there, which is told at once.
        let error = attest(&docker, &others).await.unwrap_err();
        assert!(error.contains("check if the path is correct"), "{error}");
        attest(&docker, &docker_process).await
    };
    tokio::select! {
        biased;
        _ = hung => panic!("who asked later waited"),
        found = next => assert!(found.is_ok(), "{found:?}"),
    }
    assert!(silent.load(Ordering::SeqCst) <= ASKING_USER_MAX);
}

#[test]
fn malformed_configurations_are_refused() {
    for (config, text) in [
        ("docker_socket_path = \"/var/run/docker.sock\"", "unable to parse docker host \"/var/run/docker.sock\""),
        ("docker_socket_path = \"ssh://host\"", "unable to parse docker host"),
        ("podman_socket_path = \"x\"", "unable to parse docker host"),
        ("docker_version = \"latest\"", "is no API version"),
        ("podman_socket_path_template = \"unix:///x\"", "template must contain exactly one %d UID placeholder"),
        ("podman_socket_path_template = \"%d%d\"", "template must contain exactly one %d UID placeholder"),
        ("podman_socket_path_template = \"%d%\"", "trailing % at end of template"),
        ("podman_socket_path_template = \"%d%s\"", "template only supports escaped %% or the %d UID placeholder"),
        ("container_id_cgroup_matchers = [\"/docker/<id>\"]", "cannot both be used"),
        ("container_id_cgroup_matchers = [\"/docker/x\"]\nuse_new_container_locator = false", "exactly once"),
        ("sigstore { ignore_tlog = true }", "sigstore is not supported yet"),
    ] {
        let error = made(config).err().unwrap_or_else(|| panic!("{config} is taken"));
        assert!(error.contains(text), "{config}: {error}");
    }
    for good in
        ["", "docker_version = \"1.41\"", "docker_version = \"v1.41\"", "docker_socket_path = \"tcp://127.0.0.1:2375\""]
    {
        made(good).unwrap();
    }
    assert_eq!(fill_in("unix:///r%%/%d/p", 7), "unix:///r%/7/p");
}

#[tokio::test]
async fn matchers_find_what_we_would_not() {
    let rig = rig(|_| Act::Say(200, container(ID, 0)));
    let config = "container_id_cgroup_matchers = [\"/my.slice/*/<id>\"]\nuse_new_container_locator = false";
    let docker = Docker { docker: rig.docker.docker, ..made(config).unwrap() };
    let process = FakeProcess::in_cgroups("0::/my.slice/x/9bca8d63d5fa");
    assert!(attest(&docker, &process).await.unwrap().contains("label:team:pay"));
    assert_eq!(attest(&docker, &in_docker()).await, Ok(BTreeSet::new()));
    assert!(rig.asked.lock().unwrap().contains(&"/v1.41/containers/9bca8d63d5fa/json".to_owned()));
}
