//! A real Docker daemon, or podman, of a test's own, on a socket and in a folder of its own, with one image made from busybox.

use crate::process::{Output, Process, Workdir, eventually, finial};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The image that there is; its only purpose is to sleep.
pub const IMAGE: &str = "local/busybox:1";
/// What of busybox the image has.
const APPLETS: [&str; 5] = ["sh", "sleep", "cat", "ls", "id"];

/// A daemon, ended with all its containers when dropped.
pub struct Dockerd {
    process: Option<Process>,
    dir: Workdir,
}

/// Whether a real part may be missing: not where it is promised. Says loudly what is skipped.
pub fn may_skip(what: &str, install: &str) -> bool {
    let promised = std::env::var_os("FINIAL_REAL_SPIRE").is_some() || std::env::var_os("CI").is_some();
    assert!(!promised, "{what} is missing: {install}");
    eprintln!("SKIPPED: {what} is missing: {install}");
    true
}

/// Where a program is, in the places where daemons lie as well.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A root file system with a static busybox, in `folder`.
pub fn busybox_root(folder: &Path) {
    for sub in ["bin", "tmp", "lib", "lib64", "run/spire"] {
        std::fs::create_dir_all(folder.join(sub)).expect("a folder");
    }
    std::fs::copy("/bin/busybox", folder.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", folder.join("bin").join(applet)).expect("a link");
    }
}

/// What a container needs of this machine to run our commands: the program under its name and the C library.
pub fn client_mounts() -> Vec<(PathBuf, String)> {
    let machine = std::env::consts::ARCH;
    let mut mounts = vec![(finial(), "/bin/spire-agent".to_owned())];
    let libraries = PathBuf::from(format!("/lib/{machine}-linux-gnu"));
    mounts.push((libraries.clone(), libraries.display().to_string()));
    let loader = match machine {
        "x86_64" => "/lib64/ld-linux-x86-64.so.2",
        _ => "/lib/ld-linux-aarch64.so.1",
    };
    mounts.push((PathBuf::from(loader), loader.to_owned()));
    mounts
}

impl Dockerd {
    /// Starts one, or `None` where Docker is not installed.
    pub fn start() -> Option<Self> {
        let there = find("dockerd").is_some() && find("docker").is_some() && Path::new("/bin/busybox").exists();
        if !there && may_skip("Docker", "apt-get install docker.io busybox-static") {
            return None;
        }
        let mut dockerd = Self { process: None, dir: Workdir::new() };
        dockerd.begin();
        let root = dockerd.dir.sub("rootfs");
        busybox_root(&root);
        let tar = dockerd.dir.path().join("root.tar");
        Output::of(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".")).ok();
        let file = tar.display().to_string();
        dockerd.docker(&["import", "-c", "CMD [\"/bin/sleep\",\"600\"]", &file, IMAGE]).ok();
        Some(dockerd)
    }

    /// Starts the daemon (again) and waits until it answers.
    pub fn begin(&mut self) {
        let program = find("dockerd").expect("dockerd");
        let mut command = Command::new(program);
        command.arg("--data-root").arg(self.dir.sub("data")).arg("--exec-root").arg(self.dir.sub("exec"));
        command.arg("-H").arg(self.host()).arg("--pidfile").arg(self.dir.path().join("docker.pid"));
        command.args(["--storage-driver=overlay2", "--live-restore", "--bridge=none"]);
        command.args(["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]);
        let process = Process::start("dockerd", self.dir.path().join("dockerd.log"), &mut command);
        let process = self.process.insert(process);
        let pid = process.pid();
        eventually("dockerd answers", || {
            if let Some(code) = self.process.as_mut().and_then(Process::ended) {
                let log = self.process.as_ref().map(Process::log).unwrap_or_default();
                panic!("dockerd {pid} ended with {code}:\n{log}");
            }
            let out = self.docker(&["version"]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
    }

    /// The daemon's process.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("is running")
    }

    /// `unix://…`, as clients are told.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("docker.sock").display())
    }

    /// Runs a docker command.
    pub fn docker(&self, args: &[&str]) -> Output {
        let program = find("docker").expect("docker");
        Output::of(Command::new(program).env_remove("DOCKER_HOST").arg("-H").arg(self.host()).args(args))
    }

    /// Runs a container of that name with the Workload API's socket at `/run/spire/api.sock`; its ID.
    pub fn run(&self, name: &str, socket: &Path, more: &[&str]) -> String {
        let mut args: Vec<String> = ["run", "-d", "--network", "none", "--name", name].map(str::to_owned).into();
        let folder = socket.parent().unwrap_or(Path::new("/"));
        let mounts = client_mounts().into_iter().chain([(folder.to_owned(), "/run/spire".to_owned())]);
        for (from, to) in mounts {
            args.extend(["-v".to_owned(), format!("{}:{to}", from.display())]);
        }
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args.push(IMAGE.to_owned());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.docker(&args).ok().stdout.trim().to_owned()
    }

    /// What a workload in the container gets of the Workload API.
    pub fn fetch(&self, container: &str, args: &[&str]) -> Output {
        let command = ["exec", container, "/bin/spire-agent", "api", "fetch"];
        self.docker(&[&command, args, &["-socketPath", "/run/spire/api.sock"]].concat())
    }

    /// The number of the container's first process.
    pub fn pid(&self, container: &str) -> i32 {
        let out = self.docker(&["inspect", "-f", "{{.State.Pid}}", container]).ok();
        out.stdout.trim().parse().expect("a number")
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // Containers outlive the daemon (`--live-restore`), so they go first. A daemon that a test has stopped goes on.
        if let Some(process) = &self.process {
            process.signal(rustix::process::Signal::CONT);
            let all = self.docker(&["ps", "-aq"]).stdout;
            let mut args = vec!["rm", "-f"];
            args.extend(all.split_whitespace());
            if args.len() > 2 {
                self.docker(&args);
            }
        }
        drop(self.process.take());
        unmount_below(self.dir.path());
    }
}

/// A real podman with a socket of its own, ended with all its containers when dropped.
pub struct Podman {
    service: Option<Process>,
    dir: Workdir,
}

impl Podman {
    /// Starts one, or `None` where it is not installed.
    pub fn start() -> Option<Self> {
        let there = ["podman", "conmon", "runc"].iter().all(|part| find(part).is_some());
        let there = there && Path::new("/bin/busybox").exists();
        if !there && may_skip("podman", "apt-get install podman conmon runc busybox-static") {
            return None;
        }
        let mut podman = Self { service: None, dir: Workdir::new() };
        let root = podman.dir.sub("rootfs");
        busybox_root(&root);
        let tar = podman.dir.path().join("root.tar").display().to_string();
        Output::of(Command::new("tar").arg("-C").arg(&root).args(["-cf", &tar, "."])).ok();
        podman.podman(&["import", "-c", "CMD [\"/bin/sleep\",\"600\"]", &tar, IMAGE]).ok();
        let host = podman.host();
        let mut service = podman.command(&["system", "service", "--time=0", &host]);
        podman.service = Some(Process::start("podman", podman.dir.path().join("podman.log"), &mut service));
        let socket = podman.dir.path().join("podman.sock");
        eventually("podman's socket is there", || socket.exists().then_some(()).ok_or_else(|| "not yet".into()));
        Some(podman)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(find("podman").expect("podman"));
        for (flag, sub) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(flag).arg(self.dir.sub(sub));
        }
        command.args([
            "--cgroup-manager=cgroupfs",
            "--runtime=runc",
            "--events-backend=file",
            "--storage-driver=overlay",
        ]);
        command.args(args);
        command
    }

    /// Runs a podman command.
    pub fn podman(&self, args: &[&str]) -> Output {
        Output::of(&mut self.command(args))
    }

    /// `unix://…`, as clients are told.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("podman.sock").display())
    }

    /// Runs a container of that name; the number of its first process.
    pub fn run(&self, name: &str, more: &[&str]) -> i32 {
        // Default limits are above what a machine without CAP_SYS_RESOURCE may set.
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
        let args = [&["run", "-d", "--network", "none", "--name", name], &limits[..], more, &[IMAGE]].concat();
        self.podman(&args).ok();
        let out = self.podman(&["inspect", "-f", "{{.State.Pid}}", name]).ok();
        out.stdout.trim().parse().expect("a number")
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.podman(&["rm", "-f", "-a", "-t", "0"]);
        drop(self.service.take());
        unmount_below(self.dir.path());
    }
}

/// What is still mounted would keep the folder.
pub(crate) fn unmount_below(folder: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let own = folder.display().to_string();
    for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|t| t.starts_with(&own)) {
        let _ = Command::new("umount").arg("-l").arg(target).output();
    }
}
