//! How long a new workload waits for its first SVID, and what an agent with all attestors needs while nothing happens: the real
//! SPIRE's agent and ours, each below a server of its own kind, beside a real dockerd and a real kubelet, and a bus of D-Bus
//! with a stand-in for systemd's manager. For `bench/agent.sh`, which says where the binaries are:
//!
//!     FINIAL_BIN=finial cargo run -p testkit --example attestation -- LOAD FINIAL-AGENT SPIRE-AGENT [TIMES, 100] [PODS, 40]
//!
//! LOAD is `bench/spireload`, linked statically: it is the workload, also in containers. Prints the rows of `spireload goals`.
//! Ends all that it started when its standard input ends.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::docker::Dockerd;
use testkit::kube::Kube;
use testkit::systemd::SystemBus;
use testkit::{Flavor, Output, Process, Server, ServerOptions, Workdir, eventually};

/// Workloads that are not counted: until then the entry may not have arrived.
const WARM_UP: usize = 5;
/// Before memory is looked at.
const SETTLE: Duration = Duration::from_secs(20);
/// While nothing happens.
const IDLE: Duration = Duration::from_secs(30);
const FLAVORS: [Flavor; 2] = [Flavor::Spire, Flavor::Finial];

static STOPPED: AtomicBool = AtomicBool::new(false);

/// Ends this program in an orderly way, with all that it started.
fn go_on() {
    assert!(!STOPPED.load(Ordering::SeqCst), "stopped");
}

struct Bench {
    load: PathBuf,
    agents: [PathBuf; 2],
    times: usize,
    pods: usize,
    /// One of each flavor.
    servers: Vec<Server>,
    bus: SystemBus,
    dockerd: Dockerd,
    kube: Kube,
    /// What lets an agent ask the kubelet.
    kubelet: String,
    out: Workdir,
}

fn main() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        STOPPED.store(true, Ordering::SeqCst);
    });
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [load, finial, spire, counts @ ..] = words.as_slice() else {
        panic!("LOAD FINIAL-AGENT SPIRE-AGENT [TIMES] [PODS]")
    };
    let number = |at: usize, usual| counts.get(at).map_or(usual, |n: &String| n.parse().expect("a number"));
    let servers = FLAVORS.map(|flavor| Server::start(flavor, &ServerOptions::default())).into();
    let kube = Kube::start().expect("Kubernetes");
    let kubelet = format!(
        "kubelet_secure_port = {}\nkubelet_ca_path = \"{}\"\ntoken_path = \"{}\"",
        kube.secure_port,
        kube.dir.path().join("pki/ca.crt").display(),
        kube.kubelet_token().display()
    );
    kube.api("POST", "/api/v1/namespaces", Some(json!({"metadata": {"name": "bench"}})));
    let bench = Bench {
        load: load.into(),
        agents: [spire.into(), finial.into()],
        times: number(0, 100),
        pods: number(1, 40),
        servers,
        bus: SystemBus::start("good").expect("D-Bus"),
        dockerd: Dockerd::start().expect("Docker"),
        kube,
        kubelet,
        out: Workdir::new(),
    };
    bench.idle();
    bench.processes();
    bench.containers();
    bench.pods();
}

fn label(flavor: Flavor) -> &'static str {
    match flavor {
        Flavor::Spire => "spire",
        Flavor::Finial => "finial",
    }
}

fn plugin(name: &str, data: &str) -> String {
    format!("WorkloadAttestor \"{name}\" {{ plugin_data {{\n{data}\n}} }}\n")
}

/// An agent as people run it, and where it listens.
struct Running {
    flavor: Flavor,
    op: &'static str,
    process: Process,
    dir: Workdir,
    waits_ms: Vec<f64>,
}

impl Running {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("public/api.sock")
    }

    /// What the kernel says of it, such as `RssAnon`, in MiB.
    fn mib(&self, field: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib: f64 = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).expect("a field");
        kib / 1024.0
    }

    /// Clock ticks of CPU so far; the kernel's unit is a hundredth of a second.
    fn cpu_ticks(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.pid())).expect("it runs");
        let times = stat.rsplit_once(") ").expect("a name").1.split(' ').skip(11).take(2);
        times.map(|n| n.parse::<f64>().expect("a number")).sum()
    }

    fn note(&mut self, number: usize, answer: &str, path: &str) {
        let row: Value =
            serde_json::from_str(answer).unwrap_or_else(|e| panic!("{e}: {answer}\n{}", self.process.log()));
        assert!(row["id"].as_str().is_some_and(|id| id.ends_with(path)), "{answer}\n{}", self.process.log());
        if number >= WARM_UP {
            self.waits_ms.push(row["ms"].as_f64().expect("a time"));
        }
    }

    fn report(mut self) {
        self.waits_ms.sort_by(f64::total_cmp);
        let waits = &self.waits_ms;
        let at = |share: f64| waits[((waits.len() as f64 * share) as usize).min(waits.len() - 1)];
        let row = json!({"op": self.op, "label": label(self.flavor), "n": waits.len(), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0)});
        println!("{row}");
    }
}

impl Bench {
    fn agent(&self, flavor: Flavor, op: &'static str, attestors: &str) -> Running {
        let (server, dir) = (&self.servers[flavor as usize ^ 1], Workdir::new());
        let data = dir.sub("data");
        let config = format!(
            "agent {{\n data_dir = \"{data}\"\n log_level = \"INFO\"\n server_address = \"127.0.0.1\"\n server_port = \"{}\"\n \
             socket_path = \"{}\"\n trust_bundle_path = \"{}\"\n trust_domain = \"{}\"\n join_token = \"{}\"\n}}\nplugins {{\n \
             NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n \
             KeyManager \"disk\" {{ plugin_data {{ directory = \"{data}\" }} }}\n{}{attestors}}}\n",
            server.port,
            dir.path().join("public/api.sock").display(),
            server.bundle_file().display(),
            server.trust_domain,
            server.join_token(),
            plugin("unix", ""),
            data = data.display(),
        );
        let config = dir.write("agent.conf", &config);
        let mut command = Command::new(&self.agents[flavor as usize ^ 1]);
        command.arg("run").arg("-config").arg(config).env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address());
        let process = Process::start("agent", dir.path().join("agent.log"), &mut command);
        let running = Running { flavor, op, process, dir, waits_ms: Vec::new() };
        let socket = running.socket();
        eventually("the socket is there", || socket.exists().then_some(()).ok_or_else(|| running.process.log()));
        running
    }

    fn entries(&self, path: &str, selectors: &[&str]) {
        let flags: Vec<&str> = selectors.iter().flat_map(|s| ["-selector", s]).collect();
        self.servers.iter().for_each(|server| {
            server.entry(path, &flags);
        });
    }

    fn docker_plugin(&self) -> String {
        plugin("docker", &format!("docker_socket_path = \"{}\"", self.dockerd.host()))
    }

    /// The two in turn, as often as told.
    fn in_turn(times: usize, agents: &mut [Running], mut once: impl FnMut(usize, &mut Running)) {
        for number in 0..times + WARM_UP {
            for running in agents.iter_mut() {
                go_on();
                once(number, running);
            }
        }
    }

    fn idle(&self) {
        let attestors = [plugin("systemd", ""), self.docker_plugin(), plugin("k8s", &self.kubelet)].concat();
        let agents = FLAVORS.map(|flavor| self.agent(flavor, "idle, all attestors", &attestors));
        wait(SETTLE);
        let ticks = agents.each_ref().map(Running::cpu_ticks);
        wait(IDLE);
        for (running, before) in agents.iter().zip(ticks) {
            let cpu_percent = (running.cpu_ticks() - before) / IDLE.as_secs_f64();
            let row = json!({"op": running.op, "label": label(running.flavor), "anon_agent": running.mib("RssAnon"), "rss_agent": running.mib("VmRSS"),
                "hwm_agent": running.mib("VmHWM"), "idle_cpu_pct_agent": cpu_percent});
            println!("{row}");
        }
    }

    /// Processes of this machine.
    fn processes(&self) {
        let program = self.load.file_name().and_then(|name| name.to_str()).expect("a name");
        for (op, path, selector, attestor) in [
            ("attest unix", "/process", format!("unix:uid:{}", testkit::uid()), String::new()),
            ("attest systemd", "/unit", format!("systemd:id:{program}.service"), plugin("systemd", "")),
        ] {
            self.entries(path, &[&selector, &format!("unix:gid:{}", rustix::process::getgid().as_raw())]);
            let mut agents = FLAVORS.map(|flavor| self.agent(flavor, op, &attestor));
            Self::in_turn(self.times, &mut agents, |number, running| {
                let out = Output::of(Command::new(&self.load).arg("wl-first").arg("-wl").arg(running.socket())).ok();
                running.note(number, &out.stdout, path);
            });
            agents.into_iter().for_each(Running::report);
            self.servers.iter().for_each(|server| remove_entries(server, path));
        }
    }

    fn containers(&self) {
        self.entries("/container", &["docker:label:role:bench"]);
        let mut agents = FLAVORS.map(|flavor| self.agent(flavor, "attest docker", &self.docker_plugin()));
        Self::in_turn(self.times, &mut agents, |number, running| {
            let mounts = [(self.load.parent(), "/bench"), (Some(&running.dir.path().join("public")), "/run/spire")]
                .map(|(from, to)| format!("{}:{to}", from.unwrap_or(Path::new("/")).display()));
            let [bench, socket] = mounts.each_ref().map(String::as_str);
            let program = format!("/bench/{}", self.load.file_name().and_then(|name| name.to_str()).expect("a name"));
            let args = [
                "run",
                "--rm",
                "--network",
                "none",
                "--label",
                "role=bench",
                "-v",
                bench,
                "-v",
                socket,
                testkit::docker::IMAGE,
            ];
            let out =
                self.dockerd.docker(&[&args[..], &[&program, "wl-first", "-wl", "/run/spire/api.sock"]].concat()).ok();
            running.note(number, &out.stdout, "/container");
        });
        agents.into_iter().for_each(Running::report);
    }

    fn pods(&self) {
        self.entries(
            "/pod",
            &["k8s:ns:bench", "k8s:sa:default", "k8s:pod-label:role:bench", "k8s:container-name:main"],
        );
        let runtime = self.kube.dir.path().join("containerd.sock");
        let with_runtime =
            format!("{}\nexperimental {{ cri_socket_path = \"unix://{}\" }}", self.kubelet, runtime.display());
        let mut agents = [
            self.agent(Flavor::Spire, "attest k8s", &plugin("k8s", &self.kubelet)),
            self.agent(Flavor::Finial, "attest k8s", &plugin("k8s", &self.kubelet)),
            self.agent(Flavor::Finial, "attest k8s cri", &plugin("k8s", &with_runtime)),
        ];
        let program = format!("/bench/{}", self.load.file_name().and_then(|name| name.to_str()).expect("a name"));
        let mut pod = 0;
        Self::in_turn(self.pods, &mut agents, |number, running| {
            pod += 1;
            let (name, socket) = (format!("pod-{pod}"), running.dir.path().join("public"));
            let command = json!([program, "wl-first", "-wl", "/run/spire/api.sock", format!("/out/{name}")]);
            let spec = json!({"restartPolicy": "Never", "serviceAccountName": "default", "automountServiceAccountToken": false, "containers": [{"name": "main", "command": command}]});
            let load = self.load.parent().unwrap_or(Path::new("/"));
            let folders = [(load, "/bench"), (socket.as_path(), "/run/spire"), (self.out.path(), "/out")];
            self.kube.run("bench", &json!({"name": name, "labels": {"role": "bench"}}), &spec, &folders);
            let file = self.out.path().join(&name);
            let answer =
                eventually("the pod is served", || std::fs::read_to_string(&file).map_err(|_| running.process.log()));
            running.note(number, &answer, "/pod");
            self.kube.api("DELETE", &format!("/api/v1/namespaces/bench/pods/{name}"), None);
            eventually("the pod is gone", || self.is_gone(&name));
        });
        agents.into_iter().for_each(Running::report);
    }

    /// So that the next one does not have to share the machine with what ends this one.
    fn is_gone(&self, pod: &str) -> Result<(), String> {
        let list = self.kube.api("GET", "/api/v1/namespaces/bench/pods", None);
        let there = list["items"].as_array().is_some_and(|all| all.iter().any(|item| item["metadata"]["name"] == pod));
        if there { Err(format!("{pod} is still there")) } else { Ok(()) }
    }
}

fn remove_entries(server: &Server, path: &str) {
    let id = format!("spiffe://{}{path}", server.trust_domain);
    let shown = server.command(&["entry", "show", "-spiffeID", &id]).ok().stdout;
    for entry in shown.lines().filter_map(|line| line.strip_prefix("Entry ID")) {
        server.command(&["entry", "delete", "-entryID", entry.trim_start_matches([' ', ':']).trim()]).ok();
    }
}

/// Nothing is done for so long, which is what is measured.
fn wait(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        go_on();
        std::thread::sleep(Duration::from_millis(100));
    }
}
