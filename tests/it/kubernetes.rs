//! The `k8s` attestor against a real kubelet with containerd and an API server: what containers of a pod get, what SPIRE's
//! attestor says of the same process, a kubelet that hangs and restarts, and who tries to pass for a pod.

use crate::docker::{Impostor, said_by_spire};
use finial_core::{SpiffeId, SystemClock, TrustDomain};
use finial_plugin::{Peer, PluginContext, Reference, WorkloadAttestor};
use finial_plugins_containers::{ApiServer, K8s};
use finial_proto::broker::{
    KubernetesObjectKey, KubernetesObjectReference, KubernetesObjectType, WorkloadPidReference,
};
use prost::Message;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;
use testkit::kube::Kube;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};

/// What a container does: it asks until it gets an SVID, writes down what it got and for how long it ran before, and stays.
fn fetch_into(file: &str, then: &str) -> serde_json::Value {
    let fetch = "/bin/spire-agent api fetch x509 -socketPath /run/finial/api.sock -timeout 30s";
    let timed = format!(
        "cat /proc/uptime > /out/{file}.times; until {fetch} > /out/{file}.new; do true; done; cat /proc/uptime >> /out/{file}.times"
    );
    json!(["/bin/sh", "-c", format!("{timed}; mv /out/{file}.new /out/{file}; {then}")])
}

struct Node {
    kube: Kube,
    /// The attestor's keys.
    config: String,
    server: Server,
    agent: Agent,
    spire_server: Server,
    spire_agent: Agent,
    out: Workdir,
}

fn agent(flavor: Flavor, server: &Server, config: &str) -> Agent {
    let usual = AgentOptions::default();
    let k8s = format!("WorkloadAttestor \"k8s\" {{ plugin_data {{\n{config}\n}} }}");
    let options = AgentOptions { node_attestor: format!("{}\n    {k8s}", usual.node_attestor), ..usual };
    let agent = Agent::start(flavor, server, &options);
    eventually("the socket is there", || agent.socket().exists().then_some(()).ok_or_else(|| "not yet".into()));
    agent
}

impl Node {
    fn start() -> Option<Self> {
        let kube = Kube::start()?;
        let token = kube.kubelet_token();
        let config = format!(
            "kubelet_secure_port = {}\nkubelet_ca_path = \"{}\"\ntoken_path = \"{}\"",
            kube.secure_port,
            kube.dir.path().join("pki/ca.crt").display(),
            token.display()
        );
        for namespace in ["web", "other"] {
            let labels = json!({"name": namespace, "labels": {"tier": "front"}});
            kube.api("POST", "/api/v1/namespaces", Some(json!({"metadata": labels})));
        }
        let server = Server::start(Flavor::Finial, &ServerOptions::default());
        let spire_server = Server::start(Flavor::Spire, &ServerOptions::default());
        let runtime = kube.dir.path().join("containerd.sock");
        let with_runtime = format!("{config}\nexperimental {{ cri_socket_path = \"unix://{}\" }}", runtime.display());
        let ours = agent(Flavor::Finial, &server, &with_runtime);
        let theirs = agent(Flavor::Spire, &spire_server, &config);
        Some(Self { kube, config, server, agent: ours, spire_server, spire_agent: theirs, out: Workdir::new() })
    }

    fn entry(&self, path: &str, selectors: &[&str]) {
        let selectors: Vec<String> = selectors.iter().map(|s| format!("k8s:{s}")).collect();
        let flags: Vec<&str> = selectors.iter().flat_map(|s| ["-selector", s.as_str()]).collect();
        self.server.entry(path, &flags);
    }

    fn run(&self, namespace: &str, metadata: &serde_json::Value, spec: &serde_json::Value) {
        let (ours, theirs) = (self.agent.socket(), self.spire_agent.socket());
        let folders = [
            (ours.parent().unwrap(), "/run/finial"),
            (theirs.parent().unwrap(), "/run/spire"),
            (self.out.path(), "/out"),
        ];
        self.kube.run(namespace, metadata, spec, &folders);
    }

    fn got(&self, file: &str) -> String {
        let path = self.out.path().join(file);
        eventually(&format!("a container writes {file}"), || std::fs::read_to_string(&path).map_err(|e| e.to_string()))
    }

    /// An attestor that may ask the API server.
    fn with_api_server(&self, more: &str) -> K8s {
        let data = finial_hcl::parse(&format!("{}\n{more}", self.config)).unwrap();
        let file = |name: &str| self.kube.dir.path().join(name);
        let (ca, token) = (file("pki/ca.crt"), file("agent.token"));
        let api_server = ApiServer { host: "127.0.0.1".into(), port: self.kube.api_port, ca, token };
        K8s::outside(&data, api_server).unwrap()
    }

    fn attestor(&self, more: &str) -> K8s {
        let config = finial_hcl::parse(&format!("{}\n{more}", self.config)).unwrap();
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        K8s::new(&config, &PluginContext { trust_domain, clock: Arc::new(SystemClock) }).unwrap()
    }
}

fn attest(k8s: &K8s, pid: i32) -> Result<BTreeSet<String>, String> {
    let folder = File::open(format!("/proc/{pid}")).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let selectors = runtime.block_on(k8s.attest(&Peer { pid, proc_dir: folder.as_fd() }));
    Ok(selectors.map_err(|e| e.to_string())?.into_iter().map(|s| format!("{}:{}", s.kind, s.value)).collect())
}

#[test]
fn pods_of_a_real_node() {
    let Some(mut node) = Node::start() else { return };
    let blog = containers_of_a_pod_get_their_own_identities(&node);
    our_selectors_are_those_of_spire(&node, &blog);
    a_new_pod_is_found_soon(&node, &blog);
    labels_of_the_namespace_come_from_the_api_server(&node, &blog);
    brokers_refer_to_what_they_may(&node, &blog);
    nobody_passes_for_a_pod(&node, &blog);
    a_kubelet_that_hangs_or_restarts_is_told_and_found_again(&mut node, &blog);
}

/// The container of the pod that goes on.
fn containers_of_a_pod_get_their_own_identities(node: &Node) -> String {
    node.entry("/prepare", &["ns:web", "container-name:prepare"]);
    node.entry("/main", &["ns:web", "sa:writer", "pod-name:blog", "pod-label:app:blog", "container-name:main"]);
    node.entry("/side", &["node-name:node1", "pod-owner:ReplicaSet:blog-1", "container-name:side"]);
    node.entry("/elsewhere", &["ns:other", "container-name:main"]);
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "blog-1", "uid": "4a8e0c52-0000-4000-8000-000000000001"});
    let metadata = json!({"name": "blog", "labels": {"app": "blog", "tier/x": "a"}, "ownerReferences": [owner]});
    let spec = json!({
        "serviceAccountName": "writer", "automountServiceAccountToken": false,
        "initContainers": [{"name": "prepare", "command": fetch_into("prepare", "true")}],
        "containers": [
            {"name": "main", "command": fetch_into("main", "sleep 1000000")},
            {"name": "side", "command": fetch_into("side", "sleep 1000000")}
        ]
    });
    node.run("web", &metadata, &spec);
    for name in ["prepare", "main", "side"] {
        let got = node.got(name);
        let ids: Vec<_> = got.lines().filter(|l| l.starts_with("SPIFFE ID:")).collect();
        assert_eq!(ids.len(), 1, "{name}: {got}");
        assert!(ids[0].ends_with(&format!("/{name}")), "{name}: {got}");
    }
    node.kube.container("web", "blog", "main")
}

fn our_selectors_are_those_of_spire(node: &Node, container: &str) {
    let _ = &node.spire_server;
    let theirs = eventually("SPIRE's agent attests a process of the container", || {
        let exec = format!("theirs-{}", testkit::free_port());
        let command = ["/bin/spire-agent", "api", "fetch", "x509", "-socketPath", "/run/spire/api.sock"];
        let out = node.kube.ctr(&[&["tasks", "exec", "--exec-id", &exec, container][..], &command].concat());
        said_by_spire(&node.spire_agent, "k8s").ok_or_else(|| format!("{}{}", out.stdout, out.stderr))
    });
    let ours = attest(&node.attestor(""), node.kube.pid(container)).unwrap();
    assert_eq!(ours, theirs);
    for selector in
        ["k8s:sa:writer", "k8s:pod-image-count:2", "k8s:pod-init-image-count:1", "k8s:pod-owner:ReplicaSet:blog-1"]
    {
        assert!(ours.contains(selector), "{selector}: {ours:?}");
    }
    assert!(ours.iter().any(|s| s.starts_with("k8s:container-image:") && s.contains("sha256:")), "{ours:?}");
    // Without certificates, by the read-only port: the same.
    let plain = finial_hcl::parse(&format!("kubelet_read_only_port = {}", node.kube.read_only_port)).unwrap();
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let plain = K8s::new(&plain, &PluginContext { trust_domain, clock: Arc::new(SystemClock) }).unwrap();
    assert_eq!(attest(&plain, node.kube.pid(container)), Ok(ours));
}

/// How soon is told, not asserted. All that the entry names is known before the kubelet has looked at the container.
fn a_new_pod_is_found_soon(node: &Node, blog: &str) {
    let known = attest(&node.attestor(""), node.kube.pid(blog)).unwrap();
    let image = known.iter().find_map(|s| s.strip_prefix("k8s:").filter(|s| s.starts_with("container-image:sha256:")));
    let image = image.expect("an image by its digest");
    let also = image.replace("container-image", "pod-image");
    node.entry("/quick", &["pod-label:app:quick", "container-name:main", image, &also, "pod-image-count:1"]);
    let k8s = node.attestor("");
    for number in 0..5 {
        let name = format!("quick-{number}");
        let spec = json!({"containers": [{"name": "main", "command": fetch_into(&name, "sleep 1000000")}]});
        node.run("web", &json!({"name": name, "labels": {"app": "quick"}}), &spec);
        assert!(node.got(&name).contains("/quick"));
        let times = node.got(&format!("{name}.times"));
        let times: Vec<f64> = times.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
        let pid = node.kube.pid(&node.kube.container("web", &name, "main"));
        let began = Instant::now();
        assert!(attest(&k8s, pid).is_ok());
        let known = began.elapsed();
        eprintln!("pod {number}: served {:.2} s after it began; attested again in {known:?}", times[1] - times[0]);
    }
}

fn labels_of_the_namespace_come_from_the_api_server(node: &Node, container: &str) {
    let k8s = node.with_api_server("enable_namespace_labels = true");
    let pid = node.kube.pid(container);
    let error = attest(&k8s, pid).unwrap_err();
    assert!(error.contains("unable to get namespace \"web\": 403 Forbidden"), "{error}");
    node.kube.allow("namespaces");
    let found = eventually("the API server lets the account", || attest(&k8s, pid));
    for label in ["k8s:ns-label:tier:front", "k8s:ns-label:kubernetes.io/metadata.name:web"] {
        assert!(found.contains(label), "{label}: {found:?}");
    }
}

const BROKER: &str = "spiffe://example.org/broker";

/// What the attestor says of an object: `plural.group`, its namespace and name, its UID.
fn refer(
    k8s: &K8s,
    broker: &str,
    (plural, group): (&str, &str),
    key: Option<(&str, &str)>,
    uid: &str,
) -> Result<BTreeSet<String>, String> {
    let kind = KubernetesObjectType { plural: plural.into(), group: group.into() };
    let key = key.map(|(namespace, name)| KubernetesObjectKey { namespace: namespace.into(), name: name.into() });
    let object = KubernetesObjectReference { r#type: Some(kind), key, uid: uid.into() };
    ask(k8s, broker, "KubernetesObjectReference", &object.encode_to_vec())
}

fn ask(k8s: &K8s, broker: &str, kind: &str, value: &[u8]) -> Result<BTreeSet<String>, String> {
    let broker = SpiffeId::parse(broker).unwrap();
    let type_url = format!("type.googleapis.com/spiffe.broker.{kind}");
    let reference = Reference { type_url: &type_url, value, broker: &broker };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let said = runtime.block_on(k8s.attest_reference(&reference)).map_err(|e| e.to_string())?;
    Ok(said.unwrap().into_iter().map(|s| format!("{}:{}", s.kind, s.value)).collect())
}

fn brokers_refer_to_what_they_may(node: &Node, container: &str) {
    let policy = |policy: &str, scope: &str| {
        let brokers = format!("brokers = [{{ id = \"{BROKER}\", pod_reference_scope = \"{scope}\" }}]");
        node.with_api_server(&format!("experimental {{ broker {{ access_policy = \"{policy}\"\n{brokers} }} }}"))
    };
    let (kube, agent) = (&node.kube, json!({"kind": "ServiceAccount", "name": "agent", "namespace": "default"}));
    let config_map = kube.api(
        "POST",
        "/api/v1/namespaces/web/configmaps",
        Some(json!({"metadata": {"name": "settings", "labels": {"a": "b"}}})),
    );
    let uid = config_map["metadata"]["uid"].as_str().unwrap();
    let elsewhere = json!({"metadata": {"name": "far"}, "spec": {"nodeName": "node2", "containers": [{"name": "c", "image": "i"}]}});
    kube.api("POST", "/api/v1/namespaces/other/pods", Some(elsewhere));
    for resource in ["pods", "configmaps", "nodes"] {
        kube.bind(&agent, &["get", "list"], "", resource);
    }
    let (pods, maps) = (("pods", "core"), ("configmaps", "core"));
    let near = policy("permissive", "agent_node");
    let blog = refer(&near, BROKER, pods, Some(("web", "blog")), "").unwrap();
    let pod_uid = blog.iter().find_map(|s| s.strip_prefix("k8s:pod-uid:")).unwrap();
    assert!(blog.contains("k8s:sa:writer") && !blog.iter().any(|s| s.contains("container-name")), "{blog:?}");
    assert_eq!(refer(&near, BROKER, pods, None, pod_uid), Ok(blog.clone()));
    let far = policy("permissive", "cluster");
    let found = eventually("the API server lets the account", || refer(&far, BROKER, pods, Some(("other", "far")), ""));
    assert!(found.contains("k8s:node-name:node2"), "{found:?}");
    let settings = refer(&far, BROKER, maps, Some(("web", "settings")), "").unwrap();
    let expected = [
        &format!("uid:{uid}"),
        "resource:configmaps.core",
        "plural:configmaps",
        "group:core",
        "version:v1",
        "apiVersion:v1",
        "kind:ConfigMap",
        "name:settings",
        "namespace:web",
        "key:web/settings",
        "label:a:b",
    ];
    assert_eq!(settings, expected.iter().map(|s| format!("k8s:{s}")).collect());
    assert_eq!(refer(&far, BROKER, maps, None, uid), Ok(settings));
    let cluster = refer(&far, BROKER, ("nodes", "core"), Some(("", "node1")), "").unwrap();
    assert!(cluster.contains("k8s:key:node1") && cluster.contains("k8s:kind:Node"), "{cluster:?}");
    for (k8s, broker, kind, key, uid, text) in [
        (&near, "spiffe://example.org/stranger", pods, Some(("web", "blog")), "", "is not configured"),
        (&near, BROKER, pods, Some(("other", "far")), "", "pod other/far not found on agent node"),
        (&far, BROKER, pods, Some(("other", "none")), "", "pod other/none not found"),
        (&far, BROKER, pods, Some(("", "blog")), "", "namespace is required"),
        (&far, BROKER, pods, Some(("web", "blog")), uid, "has UID"),
        (&far, BROKER, maps, Some(("web", "none")), "", "ConfigMap web/none not found"),
        (&far, BROKER, maps, None, pod_uid, "not found"),
        (&far, BROKER, ("nodes", "core"), Some(("web", "node1")), "", "namespace must be empty"),
        (&far, BROKER, ("pods/log", "core"), Some(("web", "blog")), "", "unknown Kubernetes resource"),
        (
            &far,
            BROKER,
            ("widgets", "example.com"),
            Some(("web", "x")),
            "",
            "unknown Kubernetes resource widgets.example.com",
        ),
        (&far, BROKER, ("", "core"), Some(("web", "x")), "", "missing plural"),
        (&far, BROKER, maps, None, "", "missing key and UID"),
    ] {
        let error = refer(k8s, broker, kind, key, uid).expect_err(text);
        assert!(error.contains(text), "{text}: {error}");
    }
    // Where Kubernetes is to decide, it does.
    let enforced = policy("enforced", "agent_node");
    let process = WorkloadPidReference { pid: kube.pid(container) }.encode_to_vec();
    let by_process = || ask(&enforced, BROKER, "WorkloadPIDReference", &process);
    assert!(by_process().unwrap_err().contains("unable to check Kubernetes authorization"), "the account may not ask");
    kube.bind(&agent, &["create"], "authorization.k8s.io", "subjectaccessreviews");
    let denied = |error: String| if error.contains("does not allow the broker") { Ok(()) } else { Err(error) };
    eventually("Kubernetes refuses", || denied(by_process().unwrap_err()));
    kube.bind(&json!({"kind": "User", "name": BROKER}), &["impersonate-via-spire"], "", "pods");
    let found = eventually("Kubernetes lets the broker", by_process);
    assert!(found.contains("k8s:container-name:main"), "{found:?}");
    assert_eq!(refer(&enforced, BROKER, pods, Some(("web", "blog")), ""), Ok(blog));
    denied(refer(&enforced, BROKER, maps, Some(("web", "settings")), "").unwrap_err()).unwrap();
}

fn nobody_passes_for_a_pod(node: &Node, container: &str) {
    let k8s = node.attestor("max_poll_attempts = 1");
    let found = attest(&node.attestor(""), node.kube.pid(container)).unwrap();
    let uid = found.iter().find_map(|s| s.strip_prefix("k8s:pod-uid:")).unwrap().to_owned();
    assert_eq!(attest(&k8s, i32::try_from(std::process::id()).unwrap()), Ok(BTreeSet::new()));
    assert_eq!(attest(&k8s, Impostor::in_cgroup("plain-pod").pid()), Ok(BTreeSet::new()));
    assert_eq!(attest(&k8s, Impostor::in_cgroup(&format!("half/pod{uid}")).pid()), Ok(BTreeSet::new()));
    let other = "0".repeat(64);
    for (name, why) in [
        // A container with its cgroups writable, and a user with a systemd of his own.
        (format!("g/{other}/kubepods/pod{uid}/{container}"), "names a pod inside container"),
        (format!("h/user@1000.service/pod{uid}/{container}"), "below a user's own cgroups"),
        // Another pod's container, and a pod's container that is none.
        (format!("i/pod{}/{container}", uid.replace(['1', '2', '3'], "4")), "no selectors found"),
        (format!("j/pod{uid}/{other}"), "no selectors found"),
    ] {
        let impostor = Impostor::in_cgroup(&name);
        let error = attest(&k8s, impostor.pid()).expect_err(&name);
        assert!(error.contains(why), "{name}: {error}");
    }
}

fn a_kubelet_that_hangs_or_restarts_is_told_and_found_again(node: &mut Node, container: &str) {
    let k8s = node.attestor("max_poll_attempts = 2\nnode_name = \"localhost\"");
    let pid = node.kube.pid(container);
    eventually("the kubelet answers", || attest(&k8s, pid));
    let kubelet = node.kube.kubelet();
    kubelet.signal(rustix::process::Signal::STOP);
    // The list of a moment ago is too old by then.
    let error = eventually("a kubelet that hangs is told", || attest(&k8s, pid).err().ok_or_else(|| "served".into()));
    assert!(error.contains("no answer"), "{error}");
    kubelet.signal(rustix::process::Signal::CONT);
    eventually("it is found again", || attest(&k8s, pid));
    node.kube.kubelet().terminate();
    let error = eventually("a kubelet that is gone is told", || attest(&k8s, pid).err().ok_or_else(|| "served".into()));
    assert!(error.contains("connection refused"), "{error}");
    node.kube.begin_kubelet();
    let again = eventually("the pod is found again", || attest(&k8s, pid));
    assert!(again.contains("k8s:container-name:main"), "{again:?}");
}
