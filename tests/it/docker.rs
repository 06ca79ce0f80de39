//! The `docker` attestor against a real Docker daemon: what a container gets, what SPIRE's attestor says of the same
//! process, and who tries to pass for it.

use finial_core::{SystemClock, TrustDomain};
use finial_plugin::{Peer, PluginContext, WorkloadAttestor};
use finial_plugins_containers::Docker;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::docker::{Dockerd, Podman};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};

fn options(dockerd: &Dockerd) -> AgentOptions {
    let usual = AgentOptions::default();
    let docker =
        format!("WorkloadAttestor \"docker\" {{ plugin_data {{ docker_socket_path = \"{}\" }} }}", dockerd.host());
    AgentOptions { node_attestor: format!("{}\n    {docker}", usual.node_attestor), ..usual }
}

fn attestor(dockerd: &Dockerd) -> Docker {
    let config = finial_hcl::parse(&format!("docker_socket_path = \"{}\"", dockerd.host())).unwrap();
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    Docker::new(&config, &PluginContext { trust_domain, clock: Arc::new(SystemClock) }).unwrap()
}

fn attest(docker: &Docker, pid: i32) -> Result<BTreeSet<String>, String> {
    let folder = File::open(format!("/proc/{pid}")).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let selectors = runtime.block_on(docker.attest(&Peer { pid, proc_dir: folder.as_fd() }));
    Ok(selectors.map_err(|e| e.to_string())?.into_iter().map(|s| format!("{}:{}", s.kind, s.value)).collect())
}

/// An entry for `path` below the agent, with these selectors of docker.
fn entry(server: &Server, path: &str, selectors: &[&str]) {
    let selectors: Vec<&str> = selectors.iter().flat_map(|s| ["-selector", s]).collect();
    server.entry(path, &selectors);
}

const LABELS: [&str; 8] =
    ["--label", "team=pay", "--label", "org.example/a:b=c=d", "--env", "ROLE=api", "--env", "EMPTY="];

#[test]
fn a_container_gets_its_identity_through_a_mounted_socket() {
    let Some(dockerd) = Dockerd::start() else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    entry(&server, "/pay", &["docker:label:team:pay", "docker:env:ROLE=api", "docker:image_id:local/busybox:1"]);
    entry(&server, "/other", &["docker:label:team:other"]);
    let agent = Agent::start(Flavor::Finial, &server, &options(&dockerd));
    eventually("the socket is there", || agent.socket().exists().then_some(()).ok_or_else(|| "not yet".into()));
    dockerd.run("w1", &agent.socket(), &LABELS);
    let svid = eventually("the container is served", || {
        let out = dockerd.fetch("w1", &["x509"]);
        if out.code == 0 { Ok(out.stdout) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
    });
    assert!(svid.contains("/pay") && !svid.contains("/other"), "{svid}");
    tell_how_soon(&dockerd);
    // A container of another label gets nothing of it, nor does a process of this machine.
    dockerd.run("w2", &agent.socket(), &["--label", "team=other"]);
    let other = dockerd.fetch("w2", &["x509"]).ok().stdout;
    assert!(other.contains("/other") && !other.contains("/pay"), "{other}");
    let none = agent.command(&["api", "fetch", "x509"]);
    assert!(none.code != 0 && none.stderr.contains("no identity issued"), "{none:?}");
}

/// How long the attestation of a container takes that is new to the attestor; told, not asserted.
fn tell_how_soon(dockerd: &Dockerd) {
    let pid = dockerd.pid("w1");
    let time = |_| {
        let docker = attestor(dockerd);
        let began = Instant::now();
        attest(&docker, pid).unwrap();
        began.elapsed()
    };
    let mut times: Vec<_> = (0..100).map(time).collect();
    times.sort_unstable();
    eprintln!("docker: a first attestation takes {:?}, the slowest of 100 {:?}", times[50], times[99]);
}

/// What SPIRE's attestor of that kind said of the last process that it knew something of: from the log of its agent, which
/// lists `type:"k8s" value:"ns:web"`, escaped as Go does.
pub(crate) fn said_by_spire(agent: &Agent, kind: &str) -> Option<BTreeSet<String>> {
    let log = agent.process.log().replace("\\\"", "\"");
    let begin = format!("type:\"{kind}\"");
    let line = log.lines().rev().find(|l| l.contains("PID attested to have selectors") && l.contains(&begin))?;
    let value = |rest: &str| Some(rest.trim_start().strip_prefix("value:\"")?.split_once('"')?.0.to_owned());
    Some(line.split(&begin).skip(1).filter_map(value).map(|value| format!("{kind}:{value}")).collect())
}

/// As on most nodes: the agent runs in a container too, in a cgroup namespace of its own, from which the kernel shows it
/// other containers as `/../ID`.
#[test]
fn an_agent_in_a_container_knows_its_neighbours() {
    let Some(dockerd) = Dockerd::start() else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    entry(&server, "/pay", &["docker:label:team:pay"]);
    let mut agent = Agent::start(Flavor::Finial, &server, &options(&dockerd));
    eventually("it has attested", || agent.socket().exists().then_some(()).ok_or_else(|| "not yet".into()));
    assert_eq!(agent.process.terminate(), 0);
    let mut args: Vec<String> =
        ["run", "-d", "--name", "agent", "--pid", "host", "--network", "host", "--cgroupns", "private"]
            .map(str::to_owned)
            .into();
    let host = dockerd.host().trim_start_matches("unix://").to_owned();
    let own = [agent.dir.path(), server.dir.path(), Path::new(&host).parent().unwrap()];
    let own = own.map(|folder| (folder.to_owned(), folder.display().to_string()));
    for (from, to) in testkit::docker::client_mounts().into_iter().chain(own) {
        args.extend(["-v".to_owned(), format!("{}:{to}", from.display())]);
    }
    let config = agent.dir.path().join("agent.conf").display().to_string();
    args.extend([testkit::docker::IMAGE, "/bin/spire-agent", "run", "-config", &config].map(str::to_owned));
    dockerd.docker(&args.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    dockerd.run("w1", &agent.socket(), &["--label", "team=pay"]);
    let svid = eventually("the container is served", || {
        let out = dockerd.fetch("w1", &["x509"]);
        if out.code == 0 {
            Ok(out.stdout)
        } else {
            Err(format!("{}{}", out.stderr, dockerd.docker(&["logs", "agent"]).stdout))
        }
    });
    assert!(svid.contains("/pay"), "{svid}");
    let seen =
        dockerd.docker(&["exec", "agent", "/bin/cat", &format!("/proc/{}/cgroup", dockerd.pid("w1"))]).ok().stdout;
    assert!(seen.contains(":/../"), "the agent is in a cgroup namespace of its own: {seen}");
}

#[test]
fn our_selectors_are_those_of_spire() {
    let Some(dockerd) = Dockerd::start() else { return };
    let server = Server::start(Flavor::Spire, &ServerOptions::default());
    let agent = Agent::start(Flavor::Spire, &server, &options(&dockerd));
    eventually("the socket is there", || agent.socket().exists().then_some(()).ok_or_else(|| "not yet".into()));
    let id = dockerd.run("w1", &agent.socket(), &LABELS);
    // SPIRE's agent logs what it found of the caller; ours is asked about the same container's first process.
    let theirs = eventually("SPIRE's agent attests a process of the container", || {
        let out = dockerd.fetch("w1", &["x509"]);
        said_by_spire(&agent, "docker").ok_or_else(|| format!("{}{}", out.stdout, out.stderr))
    });
    let ours = attest(&attestor(&dockerd), dockerd.pid(&id)).unwrap();
    assert_eq!(ours, theirs);
    assert!(ours.iter().any(|s| s.starts_with("docker:image_config_digest:sha256:")), "{ours:?}");
}

#[test]
fn containers_of_podman_are_asked_for_at_podman() {
    let Some(podman) = Podman::start() else { return };
    // Without Docker: its socket leads nowhere.
    let config = format!("docker_socket_path = \"unix:///nowhere\"\npodman_socket_path = \"{}\"", podman.host());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let context = PluginContext { trust_domain, clock: Arc::new(SystemClock) };
    let docker = Docker::new(&finial_hcl::parse(&config).unwrap(), &context).unwrap();
    let found = attest(&docker, podman.run("w1", &["--label", "team=pay", "--env", "ROLE=api"])).unwrap();
    for selector in ["docker:label:team:pay", "docker:env:ROLE=api", "docker:image_id:localhost/local/busybox:1"] {
        assert!(found.contains(selector), "{selector}: {found:?}");
    }
    let image = podman.podman(&["inspect", "-f", "{{.Image}}", "w1"]).ok().stdout;
    let digest = format!("docker:image_config_digest:sha256:{}", image.trim());
    assert!(found.contains(&digest), "{digest}: {found:?}");
}

/// A process of this machine in cgroups of the test's own, which go with it.
pub(crate) struct Impostor {
    child: Child,
    folders: Vec<PathBuf>,
}

/// The folder of a process's cgroup, of the first hierarchy that has one.
fn cgroup_folder(pid: i32) -> PathBuf {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let folder = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let places = [format!("/sys/fs/cgroup/{controllers}{path}"), format!("/sys/fs/cgroup/unified{path}")];
        places.into_iter().map(PathBuf::from).find(|place| place.join("cgroup.procs").exists())
    };
    cgroups.lines().find_map(folder).expect("a cgroup file system is mounted")
}

impl Impostor {
    /// In no cgroup of its own, but with a mount of that one.
    fn with_mount_of_cgroup(folder: &Path) -> Self {
        let script = format!("mount --bind {} /mnt && exec sleep 600", folder.display());
        let child = Command::new("unshare").args(["--mount", "sh", "-c", &script]).spawn().unwrap();
        let impostor = Self { child, folders: Vec::new() };
        let id = folder.file_name().unwrap().to_string_lossy();
        eventually("the mount is there", || {
            let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", impostor.pid())).unwrap_or_default();
            let is_there = mounts.lines().any(|line| line.contains(&*id) && line.contains(" /mnt "));
            if is_there { Ok(()) } else { Err(mounts) }
        });
        impostor
    }

    /// In a cgroup of that name, below one that other runs do not have.
    pub(crate) fn in_cgroup(name: &str) -> Self {
        let path = &format!("finial-test-{}-{name}", std::process::id());
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let root = hierarchies.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists()).unwrap();
        let mut folders = Vec::new();
        for part in Path::new(path).ancestors().collect::<Vec<_>>().into_iter().rev().filter(|p| *p != Path::new("")) {
            let folder = root.join(part);
            if std::fs::create_dir(&folder).is_ok() {
                folders.push(folder);
            }
        }
        let moved = std::fs::write(root.join(path).join("cgroup.procs"), child.id().to_string());
        if moved.is_err() {
            let _ = child.kill();
        }
        let impostor = Self { child, folders };
        moved.unwrap();
        impostor
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for folder in self.folders.iter().rev() {
            let end = Instant::now() + Duration::from_secs(2);
            while std::fs::remove_dir(folder).is_err() && folder.exists() && Instant::now() < end {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn nobody_passes_for_a_container() {
    let Some(dockerd) = Dockerd::start() else { return };
    let (docker, nothing) = (attestor(&dockerd), Workdir::new());
    let id = dockerd.run("w1", &nothing.path().join("api.sock"), &["--label", "team=pay"]);
    let inside = attest(&docker, dockerd.pid("w1")).unwrap();
    assert!(inside.contains("docker:label:team:pay"), "{inside:?}");
    // A process of the machine, and one in a cgroup of no container.
    assert_eq!(attest(&docker, i32::try_from(std::process::id()).unwrap()), Ok(BTreeSet::new()));
    assert_eq!(attest(&docker, Impostor::in_cgroup("plain").pid()), Ok(BTreeSet::new()));
    // Processes in cgroups that are named after the container.
    let forged = [
        id.clone(),
        format!("a/{id}"),
        format!("b/docker/{id}"),
        format!("c/docker-{id}.scope"),
        format!("d/kubepods/pod2c48913c-b29f-11e7-9350-020968147796/{id}"),
    ];
    for name in forged {
        let impostor = Impostor::in_cgroup(&name);
        let got = attest(&docker, impostor.pid());
        let refused = got.as_ref().err().is_some_and(|e| e.contains("but is not that container's"));
        assert!(refused, "{name}: {got:?}");
    }
    // A process with a mount of the container's cgroup, from which SPIRE would take it for one of the container.
    let mounted = Impostor::with_mount_of_cgroup(&cgroup_folder(dockerd.pid("w1")));
    assert_eq!(attest(&docker, mounted.pid()), Ok(BTreeSet::new()));
    // One that names a container which is not, or no longer, there.
    let unknown = Impostor::in_cgroup(&format!("e/{}", "0".repeat(64)));
    let error = attest(&docker, unknown.pid()).unwrap_err();
    assert!(error.contains("No such container"), "{error}");
    dockerd.docker(&["stop", "-t", "0", "w1"]).ok();
    let dead = Impostor::in_cgroup(&format!("f/docker/{id}"));
    let error = attest(&docker, dead.pid()).unwrap_err();
    assert!(error.contains("is not running"), "{error}");
    // Another image under the old name: what runs is still what it was made from.
    let before: Vec<_> = inside.iter().filter(|s| s.contains("image_config_digest")).collect();
    dockerd.docker(&["start", "w1"]).ok();
    dockerd.docker(&["commit", "-c", "LABEL x=y", "w1", testkit::docker::IMAGE]).ok();
    let after = attest(&docker, dockerd.pid("w1")).unwrap();
    assert!(before.iter().all(|digest| after.contains(*digest)), "{before:?} {after:?}");
}

#[test]
fn a_daemon_that_stops_or_restarts_is_told_and_found_again() {
    let Some(mut dockerd) = Dockerd::start() else { return };
    let (docker, nothing) = (attestor(&dockerd), Workdir::new());
    dockerd.run("w1", &nothing.path().join("api.sock"), &["--label", "team=pay"]);
    let pid = dockerd.pid("w1");
    assert!(attest(&docker, pid).is_ok());
    dockerd.process().signal(rustix::process::Signal::STOP);
    let error = attest(&docker, pid).unwrap_err();
    assert!(error.contains("no answer within"), "{error}");
    dockerd.process().signal(rustix::process::Signal::CONT);
    assert!(attest(&docker, pid).is_ok());
    assert_eq!(dockerd.process().terminate(), 0);
    let error = attest(&docker, pid).unwrap_err();
    assert!(error.contains("check if the path is correct and if the daemon is running"), "{error}");
    dockerd.begin();
    assert!(attest(&docker, pid).unwrap().contains("docker:label:team:pay"), "the container has lived on");
}
