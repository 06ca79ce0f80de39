//! A real Kubernetes node of a test's own: etcd, API server, containerd and kubelet, in a folder and on ports of its own.
//! Pods share the machine's network. One such node runs at a time: kubelets clean up each other's cgroups.

use crate::docker::{client_mounts, find, may_skip, unmount_below};
use crate::process::{Output, Process, Workdir, cache, eventually, free_port};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version that `tests/real-kube/build.sh` builds.
const VERSION: &str = "1.34.4";
/// The image that there is.
pub const IMAGE: &str = "docker.io/local/busybox:1";
/// What the kubelet writes into the machine's settings: put back in the end.
const SETTINGS: [&str; 4] =
    ["kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory", "kernel/keys/root_maxbytes"];

/// The node, ended with all its pods when dropped.
pub struct Kube {
    kubelet: Option<Process>,
    containerd: Option<Process>,
    api_server: Option<Process>,
    etcd: Option<Process>,
    /// Where its files lie.
    pub dir: Workdir,
    /// The API server's port.
    pub api_port: u16,
    /// The kubelet's secure port.
    pub secure_port: u16,
    /// The kubelet's read-only port.
    pub read_only_port: u16,
    settings: Vec<(PathBuf, String)>,
    _alone: Option<File>,
}

fn binaries() -> PathBuf {
    cache().join(format!("kube-{VERSION}"))
}

impl Kube {
    /// Starts one, or `None` where its parts are not installed.
    pub fn start() -> Option<Self> {
        let parts = ["etcd", "containerd", "ctr", "runc", "curl", "openssl"];
        let there = parts.iter().all(|part| find(part).is_some()) && Path::new("/bin/busybox").exists();
        let install = "apt-get install etcd-server containerd runc busybox-static curl, and tests/real-kube/build.sh";
        if !(there && binaries().join("kube").exists()) && may_skip("Kubernetes", install) {
            return None;
        }
        // Not where others can put a link for us to follow.
        let alone = File::create(cache().join("kube.lock")).expect("a lock file");
        flock(&alone, FlockOperation::LockExclusive).expect("waits for other nodes to end");
        let mut kube = Self::prepare(Some(alone));
        kube.settings = SETTINGS.iter().filter_map(|name| setting(name)).collect();
        kube.begin_control_plane();
        kube.begin_containerd();
        kube.write_kubelet_config();
        kube.begin_kubelet();
        Some(kube)
    }

    /// Starts etcd and the API server alone, or nothing where they are not installed. Any number may run at a time.
    pub fn start_api() -> Option<Self> {
        let there = ["etcd", "curl", "openssl"].iter().all(|part| find(part).is_some());
        let install = "apt-get install etcd-server busybox-static curl, and tests/real-kube/build.sh";
        let built = binaries().join("kube").exists() && Path::new("/bin/busybox").exists();
        if !(there && built) && may_skip("the API server of Kubernetes", install) {
            return None;
        }
        let mut kube = Self::prepare(None);
        kube.begin_control_plane();
        Some(kube)
    }

    /// Its folder and ports.
    fn prepare(alone: Option<File>) -> Self {
        let kube = Self {
            kubelet: None,
            containerd: None,
            api_server: None,
            etcd: None,
            dir: Workdir::new(),
            api_port: free_port(),
            secure_port: free_port(),
            read_only_port: free_port(),
            settings: Vec::new(),
            _alone: alone,
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/real-kube/prepare.sh");
        Output::of(Command::new(script).arg(kube.dir.path()).arg(kube.api_port.to_string())).ok();
        kube
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn spawn(&self, name: &str, command: &mut Command) -> Option<Process> {
        Some(Process::start(name, self.dir.path().join(format!("{name}.log")), command))
    }

    fn begin_control_plane(&mut self) {
        let (client, peer) = (free_port(), free_port());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let mut etcd = Command::new(find("etcd").expect("etcd"));
        etcd.arg("--data-dir").arg(self.file("etcd")).arg("--unsafe-no-fsync");
        etcd.arg("--listen-client-urls").arg(url(client)).arg("--advertise-client-urls").arg(url(client));
        etcd.arg("--listen-peer-urls").arg(url(peer)).arg("--initial-advertise-peer-urls").arg(url(peer));
        etcd.arg("--initial-cluster").arg(format!("default={}", url(peer)));
        self.etcd = self.spawn("etcd", &mut etcd);
        let mut api = Command::new(binaries().join("kube-apiserver"));
        api.arg(format!("--etcd-servers={}", url(client))).arg(format!("--secure-port={}", self.api_port));
        api.arg("--bind-address=127.0.0.1").arg(format!("--cert-dir={}", self.file("pki")));
        for (flag, file) in [
            ("tls-cert-file", "apiserver.crt"),
            ("tls-private-key-file", "apiserver.key"),
            ("client-ca-file", "ca.crt"),
            ("service-account-key-file", "sa.pub"),
            ("service-account-signing-key-file", "sa.key"),
        ] {
            api.arg(format!("--{flag}={}", self.file(&format!("pki/{file}"))));
        }
        api.args(["--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=Node,RBAC"]);
        api.args(["--api-audiences=https://kubernetes.default.svc", "--service-cluster-ip-range=10.0.0.0/24"]);
        api.arg("--disable-admission-plugins=ServiceAccount");
        self.api_server = self.spawn("kube-apiserver", &mut api);
        eventually("the API server is ready", || {
            let out = self.curl("GET", "/readyz", None);
            if out.stdout == "ok" { Ok(()) } else { Err(format!("{}{}", out.stdout, out.stderr)) }
        });
    }

    fn begin_containerd(&mut self) {
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\n[grpc]\n  address = \"{}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"docker.io/local/pause:1\"\n  \
             restrict_oom_score_adj = true\n  disable_apparmor = true\n",
            self.file("containerd/root"),
            self.file("containerd/state"),
            self.file("containerd.sock"),
        );
        let config = self.dir.write("containerd.toml", &config);
        let mut containerd = Command::new(find("containerd").expect("containerd"));
        self.containerd = self.spawn("containerd", containerd.arg("-c").arg(config));
        eventually("containerd answers", || {
            let out = self.ctr(&["version"]);
            if out.code == 0 { Ok(()) } else { Err(out.stderr) }
        });
        let image = self.file("image.tar");
        self.ctr(&["images", "import", &image]).ok();
    }

    fn write_kubelet_config(&self) {
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": "127.0.0.1", "port": self.secure_port, "readOnlyPort": self.read_only_port, "healthzPort": 0,
            "authentication": {
                "anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": self.file("pki/ca.crt")}
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": self.file("pki/kubelet.crt"), "tlsPrivateKeyFile": self.file("pki/kubelet.key"),
            "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": [], "failSwapOn": false, "failCgroupV1": false,
            "containerRuntimeEndpoint": format!("unix://{}", self.file("containerd.sock")),
            "podLogsDir": self.file("podlogs"), "volumePluginDir": self.file("volumes"),
            "makeIPTablesUtilChains": false, "localStorageCapacityIsolation": false,
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"}
        });
        self.dir.write("kubelet.yaml", &config.to_string());
    }

    /// Starts the kubelet (again), and waits until it answers.
    pub fn begin_kubelet(&mut self) {
        let mut kubelet = Command::new(binaries().join("kubelet"));
        for (flag, file) in [
            ("config", "kubelet.yaml"),
            ("kubeconfig", "kubelet.conf"),
            ("root-dir", "kubelet"),
            ("cert-dir", "kubelet-pki"),
        ] {
            kubelet.arg(format!("--{flag}={}", self.file(file)));
        }
        self.kubelet = self.spawn("kubelet", kubelet.arg("--hostname-override=node1"));
        let url = format!("http://127.0.0.1:{}/pods", self.read_only_port);
        eventually("the kubelet answers", || {
            if let Some(code) = self.kubelet.as_mut().and_then(Process::ended) {
                panic!("the kubelet ended with {code}");
            }
            let out = Output::of(Command::new("curl").args(["-sf", &url]));
            if out.code == 0 { Ok(()) } else { Err(format!("curl: {}", out.code)) }
        });
    }

    /// The kubelet's process.
    pub fn kubelet(&mut self) -> &mut Process {
        self.kubelet.as_mut().expect("is running")
    }

    fn curl(&self, method: &str, path: &str, body: Option<&Value>) -> Output {
        let mut curl = Command::new("curl");
        curl.args(["-s", "--max-time", "30", "-X", method]);
        for (flag, file) in [("--cacert", "ca.crt"), ("--cert", "admin.crt"), ("--key", "admin.key")] {
            curl.arg(flag).arg(self.file(&format!("pki/{file}")));
        }
        if let Some(body) = body {
            curl.args(["-H", "Content-Type: application/json", "-d", &body.to_string()]);
        }
        Output::of(curl.arg(format!("https://127.0.0.1:{}{path}", self.api_port)))
    }

    /// Asks the API server as its admin; panics when it refuses.
    #[track_caller]
    pub fn api(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let out = self.curl(method, path, body.as_ref());
        let answer: Value =
            serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{method} {path}: {e}: {out:?}"));
        let failed = answer["kind"] == "Status" && answer["status"] == "Failure";
        assert!(!failed, "{method} {path}: {answer}");
        answer
    }

    /// A file with the token of a new service account that may ask the kubelet for its pods.
    pub fn kubelet_token(&self) -> PathBuf {
        let account = "/api/v1/namespaces/default/serviceaccounts";
        self.api("POST", account, Some(json!({"metadata": {"name": "agent"}})));
        self.allow("nodes/proxy");
        let token = self.api("POST", &format!("{account}/agent/token"), Some(json!({"spec": {}})));
        self.dir.write("agent.token", token["status"]["token"].as_str().expect("a token"))
    }

    /// Lets that account get those resources, such as `namespaces`.
    pub fn allow(&self, resource: &str) {
        let agent = json!({"kind": "ServiceAccount", "name": "agent", "namespace": "default"});
        self.bind(&agent, &["get"], "", resource);
    }

    /// Lets someone do that with resources of a group.
    pub fn bind(&self, subject: &Value, verbs: &[&str], group: &str, resource: &str) {
        let path = "/apis/rbac.authorization.k8s.io/v1";
        let name = format!("{}-{}", resource.replace('/', "-"), free_port());
        let rules = json!([{"apiGroups": [group], "resources": [resource], "verbs": verbs}]);
        self.api("POST", &format!("{path}/clusterroles"), Some(json!({"metadata": {"name": name}, "rules": rules})));
        let mut subject = subject.clone();
        if subject["kind"] == "User" {
            subject["apiGroup"] = "rbac.authorization.k8s.io".into();
        }
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [subject]
        });
        self.api("POST", &format!("{path}/clusterrolebindings"), Some(binding));
    }

    /// Runs a pod on the node: `metadata` and `spec` as they are, with what every pod needs here, these folders of the
    /// machine mounted in each container, and our commands as `/bin/spire-agent`.
    pub fn run(&self, namespace: &str, metadata: &Value, spec: &Value, folders: &[(&Path, &str)]) -> Value {
        let own = folders.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned()));
        let mounts: Vec<(PathBuf, String)> = client_mounts().into_iter().chain(own).collect();
        let indexed = || mounts.iter().enumerate();
        let volumes: Vec<_> =
            indexed().map(|(i, (from, _))| json!({"name": format!("v{i}"), "hostPath": {"path": from}})).collect();
        let targets: Vec<_> = indexed().map(|(i, (_, to))| json!({"name": format!("v{i}"), "mountPath": to})).collect();
        let mut spec = spec.clone();
        for kind in ["containers", "initContainers"] {
            for container in spec[kind].as_array_mut().into_iter().flatten() {
                container["image"] = IMAGE.into();
                container["imagePullPolicy"] = "Never".into();
                container["volumeMounts"] = targets.clone().into();
            }
        }
        spec["nodeName"] = "node1".into();
        spec["hostNetwork"] = true.into();
        spec["terminationGracePeriodSeconds"] = 0.into();
        spec["volumes"] = volumes.into();
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        self.api("POST", &path, Some(json!({"metadata": metadata, "spec": spec})))
    }

    /// The ID of a running container of a pod.
    pub fn container(&self, namespace: &str, pod: &str, container: &str) -> String {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        eventually(&format!("{namespace}/{pod}/{container} runs"), || {
            let pod = self.api("GET", &path, None);
            let mut status = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
            let status = status.find(|s| s["name"] == container && s["state"]["running"].is_object());
            let id = status.and_then(|s| s["containerID"].as_str()?.split("://").nth(1).map(str::to_owned));
            id.ok_or_else(|| pod["status"].to_string())
        })
    }

    /// Runs a containerd command.
    pub fn ctr(&self, args: &[&str]) -> Output {
        Output::of(Command::new("ctr").arg("-a").arg(self.file("containerd.sock")).args(["-n", "k8s.io"]).args(args))
    }

    /// The number of a container's first process.
    pub fn pid(&self, container: &str) -> i32 {
        let out = self.ctr(&["tasks", "ls"]).ok().stdout;
        let line =
            out.lines().find(|line| line.starts_with(container)).unwrap_or_else(|| panic!("no {container}: {out}"));
        line.split_whitespace().nth(1).and_then(|pid| pid.parse().ok()).expect("a number")
    }

    /// What a workload in the container gets of the Workload API.
    pub fn fetch(&self, container: &str, args: &[&str]) -> Output {
        let exec = format!("fetch-{}", free_port());
        let command = ["tasks", "exec", "--exec-id", &exec, container, "/bin/spire-agent", "api", "fetch"];
        self.ctr(&[&command, args, &["-socketPath", "/run/spire/api.sock"]].concat())
    }

    fn remove_containers(&self) {
        for task in self.ctr(&["tasks", "ls", "-q"]).stdout.split_whitespace() {
            self.ctr(&["tasks", "rm", "-f", task]);
        }
        for container in self.ctr(&["containers", "ls", "-q"]).stdout.split_whitespace() {
            self.ctr(&["containers", "rm", container]);
        }
    }
}

/// A setting of the machine and its value.
fn setting(name: &str) -> Option<(PathBuf, String)> {
    let path = Path::new("/proc/sys").join(name);
    let value = std::fs::read_to_string(&path).ok()?;
    Some((path, value))
}

fn remove_cgroups(folder: &Path) {
    for sub in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if sub.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&sub.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
}

impl Drop for Kube {
    fn drop(&mut self) {
        if let Some(kubelet) = &self.kubelet {
            kubelet.signal(rustix::process::Signal::CONT);
        }
        drop(self.kubelet.take());
        if self.containerd.is_some() {
            self.remove_containers();
        }
        drop((self.containerd.take(), self.api_server.take(), self.etcd.take()));
        unmount_below(self.dir.path());
        // Without a kubelet of ours they are another node's.
        let hierarchies = self._alone.iter().flat_map(|_| std::fs::read_dir("/sys/fs/cgroup")).flatten();
        for hierarchy in hierarchies.flatten() {
            remove_cgroups(&hierarchy.path().join("kubepods"));
        }
        for (path, value) in &self.settings {
            let _ = std::fs::write(path, value);
        }
    }
}
