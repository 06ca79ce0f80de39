use super::config::Settings;
use super::*;
use crate::fake::{Act, Asked, FakeProcess, Pki, tcp};
use finial_core::{SystemClock, TrustDomain};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
const UID: &str = "2c48913c-b29f-11e7-9350-020968147796";

fn settings(config: &str) -> Result<Settings, String> {
    config::read(&finial_hcl::parse(config).unwrap()).map_err(|e| e.to_string())
}

fn made(config: &str) -> K8s {
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    K8s::new(&finial_hcl::parse(config).unwrap(), &PluginContext { trust_domain, clock: Arc::new(SystemClock) })
        .unwrap()
}

fn in_pod() -> FakeProcess {
    FakeProcess::in_cgroups(&format!(
        "9:pids:/kubepods/burstable/pod{UID}/{ID}\n0::/kubepods/burstable/pod{UID}/{ID}\n"
    ))
}

fn pods(containers: &str) -> String {
    format!(
        r#"{{"items":[{{"metadata":{{"name":"blog","namespace":"web","uid":"{UID}"}},
            "spec":{{"serviceAccountName":"writer","nodeName":"node1"}},"status":{{"containerStatuses":[{containers}]}}}}]}}"#
    )
}

fn running() -> String {
    pods(&format!(r#"{{"name":"main","image":"i","imageID":"d","containerID":"containerd://{ID}"}}"#))
}

async fn attest(k8s: &K8s) -> Result<BTreeSet<String>, String> {
    let selectors = k8s.attest(&in_pod().peer()).await.map_err(|e| e.to_string())?;
    assert!(selectors.iter().all(|s| s.kind == "k8s"));
    Ok(selectors.into_iter().map(|s| s.value).collect())
}

fn is_attested(found: &Result<BTreeSet<String>, String>) -> bool {
    found.as_ref().is_ok_and(|values| values.contains("sa:writer") && values.contains("container-name:main"))
}

/// A kubelet that lists the container from its `n`-th answer on, and counts.
#[derive(Clone)]
struct Script {
    from: usize,
    asked: Arc<AtomicUsize>,
    fails: Option<&'static str>,
    hangs: bool,
}

#[async_trait]
impl Source for Script {
    async fn pods(&self) -> Result<PodList, PluginError> {
        let count = self.asked.fetch_add(1, Ordering::SeqCst);
        if self.hangs {
            std::future::pending::<()>().await;
        }
        match self.fails {
            Some(why) if count < self.from => Err(PluginError::new(ErrorKind::Unavailable, why)),
            _ => Ok(PodList::parse(if count < self.from { pods("") } else { running() }.as_bytes()).unwrap()),
        }
    }
}

fn scripted(from: usize, fails: Option<&'static str>, hangs: bool, config: &str) -> (K8s, Arc<AtomicUsize>) {
    let script = Script { from, asked: Arc::default(), fails, hangs };
    let asked = script.asked.clone();
    (K8s::of(settings(config).unwrap(), Some(Box::new(script)), None), asked)
}

#[tokio::test(start_paused = true)]
async fn a_list_of_a_moment_ago_will_do_and_a_new_pod_gets_a_new_one_at_once() {
    let (k8s, asked) = scripted(0, None, false, "");
    let began = Instant::now();
    for _ in 0..10 {
        assert!(is_attested(&attest(&k8s).await));
    }
    assert_eq!((asked.load(Ordering::SeqCst), began.elapsed()), (1, Duration::ZERO));
    tokio::time::advance(Duration::from_millis(501)).await;
    assert!(is_attested(&attest(&k8s).await));
    assert_eq!(asked.load(Ordering::SeqCst), 2, "older than poll_retry_interval");
    // Another pod, which that list does not have.
    let other = FakeProcess::in_cgroups(&format!("0::/kubepods/pod{}/{}", UID.replace('2', "3"), ID.replace('9', "8")));
    let at = Instant::now();
    let peer = other.peer();
    let lookup = tokio::time::timeout(Duration::from_millis(30), k8s.attest(&peer));
    assert!(lookup.await.is_err());
    assert!(
        asked.load(Ordering::SeqCst) >= 3 && at.elapsed() <= Duration::from_millis(31),
        "asked again within the gap"
    );
}

#[tokio::test(start_paused = true)]
async fn a_container_that_the_kubelet_lists_later_is_found_soon_after() {
    let (k8s, asked) = scripted(3, None, false, "");
    let began = Instant::now();
    assert!(is_attested(&attest(&k8s).await));
    // At 0, 25, 75 and 175 ms.
    assert_eq!((asked.load(Ordering::SeqCst), began.elapsed()), (4, Duration::from_millis(175)));
}

#[tokio::test(start_paused = true)]
async fn the_waits_are_bounded_and_who_gives_up_says_what_is_missing() {
    let (k8s, asked) = scripted(usize::MAX, None, false, "max_poll_attempts = 4\npoll_retry_interval = \"1s\"");
    let began = Instant::now();
    let error = attest(&k8s).await.unwrap_err();
    let expected =
        format!("no selectors found after max poll attempts: the kubelet lists no container {ID} in pod {UID}");
    assert_eq!(error, expected);
    assert!(began.elapsed() <= Duration::from_secs(4));
    // 0, 25, 75, 175, 375, 775, 1575, 2575, 3575 ms
    assert_eq!(asked.load(Ordering::SeqCst), 9);
    let (k8s, _) = scripted(usize::MAX, Some("unable to perform request"), false, "");
    let began = Instant::now();
    assert_eq!(attest(&k8s).await.unwrap_err(), "unable to perform request");
    assert!(began.elapsed() <= PATIENCE_MAX);
    let (k8s, _) = scripted(0, None, true, "");
    assert_eq!(attest(&k8s).await.unwrap_err(), "no answer from the kubelet in time");
    let (k8s, _) = scripted(2, Some("restarting"), false, "");
    assert!(is_attested(&attest(&k8s).await), "a kubelet that restarts");
}

#[tokio::test(start_paused = true)]
async fn a_hundred_workloads_of_a_missing_pod_ask_as_often_as_one() {
    let (k8s, asked) = scripted(usize::MAX, None, false, "max_poll_attempts = 2\npoll_retry_interval = \"1s\"");
    let process = in_pod();
    let peer = process.peer();
    let results = futures::future::join_all((0..100).map(|_| k8s.attest(&peer))).await;
    assert!(results.iter().all(Result::is_err));
    assert!(asked.load(Ordering::SeqCst) <= 8, "asked {} times", asked.load(Ordering::SeqCst));
}

#[tokio::test(start_paused = true)]
async fn a_pod_alone_will_do_where_container_selectors_are_off() {
    let (k8s, _) = scripted(usize::MAX, None, false, "disable_container_selectors = true");
    let found = attest(&k8s).await.unwrap();
    assert!(found.contains("pod-name:blog") && !found.iter().any(|value| value.starts_with("container-")), "{found:?}");
    let (k8s, _) = scripted(0, None, false, "disable_container_selectors = true");
    assert!(!attest(&k8s).await.unwrap().contains("container-name:main"));
}

#[tokio::test]
async fn what_is_in_no_container_asks_nobody() {
    let (k8s, asked) = scripted(0, None, false, "");
    let process = FakeProcess::in_cgroups("0::/system.slice/sshd.service\n");
    assert_eq!(k8s.attest(&process.peer()).await.unwrap(), []);
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    let disabled = made("disable_kubelet_client = true");
    assert_eq!(disabled.attest(&process.peer()).await.unwrap(), []);
    assert_eq!(attest(&disabled).await.unwrap_err(), "kubelet client is disabled");
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_hangs_or_is_gone_leaves_it_to_the_kubelet() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cri.sock");
    let config = format!("experimental {{ cri_socket_path = \"unix://{}\" }}", socket.display());
    let (k8s, _) = scripted(2, None, false, &config);
    assert!(is_attested(&attest(&k8s).await), "gone");
    crate::fake::unix(&socket, |_| Act::Hang);
    let (k8s, _) = scripted(2, None, false, &config);
    assert!(is_attested(&attest(&k8s).await), "hangs");
}

/// Whether it is attested in the end: the little time that these tests give a kubelet to fail in may be too little for a busy
/// machine to succeed in.
async fn is_attested_by(config: &str) -> bool {
    let k8s = made(config);
    for _ in 0..25 {
        if is_attested(&attest(&k8s).await) {
            return true;
        }
    }
    false
}

/// A kubelet on HTTPS that wants that token.
fn secure(pki: &Pki, certificate: &str, token: &Arc<Mutex<String>>) -> u16 {
    let token = token.clone();
    tcp(Some(pki.server(certificate, false)), move |asked: &Asked| {
        assert_eq!(asked.path, "/pods");
        let wanted = format!("authorization: Bearer {}\r\n", token.lock().unwrap());
        if asked.head.contains(&wanted) { Act::Say(200, running()) } else { Act::Say(401, "Unauthorized".into()) }
    })
}

fn pki() -> Pki {
    let pki = Pki::new();
    pki.issue("node", "subjectAltName=DNS:node1,DNS:localhost\nextendedKeyUsage=serverAuth");
    pki.issue("agent", "extendedKeyUsage=clientAuth");
    std::fs::write(pki.path("token"), "first\n").unwrap();
    pki
}

fn secure_config(pki: &Pki, port: u16, more: &str) -> String {
    let (ca, token) = (pki.path("ca.crt"), pki.path("token"));
    let short = "max_poll_attempts = 1\npoll_retry_interval = \"400ms\"";
    let node = if more.contains("node_name") { "" } else { "node_name_env = \"NO_SUCH_VARIABLE\"" };
    format!(
        "kubelet_secure_port = {port}\nkubelet_ca_path = \"{ca}\"\ntoken_path = \"{token}\"\n{short}\n{node}\n{more}"
    )
}

#[tokio::test]
async fn the_kubelet_is_judged_by_its_ca_and_its_name() {
    let pki = pki();
    let port = secure(&pki, "node", &Arc::new(Mutex::new("first".into())));
    let with = async |more: &str| attest(&made(&secure_config(&pki, port, more))).await;
    assert!(is_attested_by(&secure_config(&pki, port, "")).await, "without a node name, the CA alone decides");
    assert!(is_attested_by(&secure_config(&pki, port, "node_name = \"localhost\"")).await);
    let error = with("node_name = \"127.0.0.1\"").await.unwrap_err();
    assert!(error.contains("unable to perform request") && error.contains("not valid for name"), "{error}");
    let stranger = Pki::new();
    let strange = format!(
        "kubelet_secure_port = {port}\nkubelet_ca_path = \"{}\"\ntoken_path = \"{}\"\nmax_poll_attempts = 1\n",
        stranger.path("ca.crt"),
        pki.path("token")
    );
    for name in ["", "node_name = \"localhost\""] {
        let error = attest(&made(&format!("{strange}{name}"))).await.unwrap_err();
        assert!(error.contains("UnknownIssuer"), "{error}");
        let skipped = format!("{strange}{name}\nskip_kubelet_verification = true");
        assert!(is_attested_by(&skipped).await);
    }
}

#[tokio::test]
async fn who_we_are_is_shown_by_token_or_certificate() {
    let pki = pki();
    let token = Arc::new(Mutex::new("first".to_owned()));
    let port = secure(&pki, "node", &token);
    let config = secure_config(&pki, port, "").replace("attempts = 1", "attempts = 5000").replace("400ms", "1ms");
    let k8s = made(&config);
    assert!(is_attested(&attest(&k8s).await));
    // The token has been replaced: the file is read again when the old one fails.
    "second".clone_into(&mut token.lock().unwrap());
    std::fs::write(pki.path("token"), "second\n").unwrap();
    let since = Instant::now();
    assert!(k8s.lists.as_ref().unwrap().since(since).await.result.is_err(), "the kubelet no longer takes the first");
    assert!(k8s.lists.as_ref().unwrap().since(Instant::now()).await.result.is_ok());
    let error = attest(&made(&secure_config(&pki, port, "use_anonymous_authentication = true"))).await.unwrap_err();
    assert_eq!(error, "unexpected status code on pods response: 401 Unauthorized");
    std::fs::remove_file(pki.path("token")).unwrap();
    let error = attest(&made(&secure_config(&pki, port, ""))).await.unwrap_err();
    assert_eq!(error, format!("unable to load token: open {}: no such file or directory", pki.path("token")));
    let mutual = tcp(Some(pki.server("node", true)), |asked: &Asked| {
        assert!(!asked.head.contains("authorization"), "a certificate is enough");
        Act::Say(200, running())
    });
    let both =
        format!("certificate_path = \"{}\"\nprivate_key_path = \"{}\"", pki.path("agent.crt"), pki.path("agent.key"));
    assert!(is_attested_by(&secure_config(&pki, mutual, &both)).await);
    let swapped =
        format!("certificate_path = \"{}\"\nprivate_key_path = \"{}\"", pki.path("agent.crt"), pki.path("node.key"));
    let error = attest(&made(&secure_config(&pki, mutual, &swapped))).await.unwrap_err();
    assert!(error.starts_with("unable to load keypair: "), "{error}");
}

#[tokio::test]
async fn the_read_only_port_is_plain_and_bad_answers_are_refused() {
    let config = |act: fn() -> Act| {
        let port = tcp(None, move |_| act());
        format!("kubelet_read_only_port = {port}\nmax_poll_attempts = 1\npoll_retry_interval = \"300ms\"")
    };
    assert!(is_attested_by(&config(|| Act::Say(200, running()))).await);
    for (act, text) in [
        ((|| Act::Say(500, "boom".into())) as fn() -> Act, "unexpected status code on pods response: 500 boom"),
        (|| Act::Say(200, "{".into()), "unable to decode pod info from kubelet response"),
        (|| Act::Say(200, running().replace("\"items\"", "\"x\"")), "no selectors found after max poll attempts"),
        (|| Act::Close, "unable to perform request: Get \"http://127.0.0.1:"),
        (|| Act::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{".to_vec()), "unable to perform request"),
        (|| Act::Say(302, String::new()), "unexpected status code on pods response: 302"),
        (|| Act::Hang, "no answer"),
    ] {
        let error = attest(&made(&config(act))).await.unwrap_err();
        assert!(error.contains(text), "{text}: {error}");
    }
}

#[tokio::test]
async fn labels_of_the_namespace_come_from_the_api_server() {
    let pki = pki();
    pki.issue("api", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let port = tcp(Some(pki.server("api", false)), move |asked: &Asked| {
        count.fetch_add(1, Ordering::SeqCst);
        assert!(
            asked.head.contains("as=PartialObjectMetadata") && asked.head.contains("Bearer first\r\n"),
            "{}",
            asked.head
        );
        match asked.path.as_str() {
            "/api/v1/namespaces/web" => Act::Say(200, r#"{"metadata":{"name":"web","labels":{"team":"pay"}}}"#.into()),
            _ => Act::Say(403, "forbidden".into()),
        }
    });
    let place = || {
        let (ca, token) = (PathBuf::from(pki.path("ca.crt")), PathBuf::from(pki.path("token")));
        Some(ApiServer { host: "127.0.0.1".into(), port, ca, token })
    };
    let with = |place| {
        let script = Script { from: 0, asked: Arc::default(), fails: None, hangs: false };
        K8s::of(
            settings("enable_namespace_labels = true\npoll_retry_interval = \"60s\"").unwrap(),
            Some(Box::new(script)),
            place,
        )
    };
    let k8s = with(place());
    for _ in 0..5 {
        assert!(attest(&k8s).await.unwrap().contains("ns-label:team:pay"));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1, "who comes together asks once");
    let error = attest(&with(None)).await.unwrap_err();
    assert!(
        error.starts_with("unable to get namespace labels for \"web\": unable to get namespace \"web\": unable to load Kubernetes client config"),
        "{error}"
    );
    let error = k8s.namespaces.as_ref().unwrap().labels("a/b").await.unwrap_err().to_string();
    assert_eq!(
        error,
        "unable to get namespace labels for \"a/b\": unable to get namespace \"a/b\": 403 Forbidden: forbidden"
    );
}

/// One namespace's slow answer is not another's, and one failure is enough for all who wait for it.
#[tokio::test]
async fn a_namespace_waits_for_its_own_answer_only() {
    let pki = pki();
    pki.issue("api", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth");
    let refused = Arc::new(AtomicUsize::new(0));
    let count = refused.clone();
    let port = tcp(Some(pki.server("api", false)), move |asked: &Asked| match asked.path.as_str() {
        "/api/v1/namespaces/slow" => Act::Hang,
        "/api/v1/namespaces/bad" => Act::Say(403, count.fetch_add(1, Ordering::SeqCst).to_string()),
        _ => Act::Say(200, r#"{"metadata":{"labels":{"team":"pay"}}}"#.into()),
    });
    let (ca, token) = (PathBuf::from(pki.path("ca.crt")), PathBuf::from(pki.path("token")));
    let place = ApiServer { host: "127.0.0.1".into(), port, ca, token };
    let api = Arc::new(Api::new(Some(place), Duration::from_secs(60)));
    let namespaces = Namespaces::new(api, Duration::from_secs(60));
    namespaces.labels("web").await.unwrap();
    tokio::select! {
        biased;
        slow = namespaces.labels("slow") => panic!("the others had to wait: {slow:?}"),
        others = async { (namespaces.labels("web").await, namespaces.labels("new").await) } => {
            assert!(others.0.is_ok() && others.1.is_ok());
        }
    }
    let failures = futures::future::join_all((0..20).map(|_| namespaces.labels("bad"))).await;
    assert!(
        failures.iter().all(|failure| failure.as_ref().is_err_and(|e| e.to_string().ends_with("403 Forbidden: 0")))
    );
    assert_eq!(refused.load(Ordering::SeqCst), 1);
    assert!(namespaces.labels("bad").await.unwrap_err().to_string().ends_with("403 Forbidden: 1"), "it is asked again");
}

#[tokio::test]
async fn a_bad_ca_of_the_api_server_is_called_so() {
    let pki = pki();
    let file = |name: &str| PathBuf::from(pki.path(name));
    for (ca, text) in [
        ("none", format!("unable to load API server CA: open {}: no such file or directory", pki.path("none"))),
        ("token", "unable to parse API server CA: no PEM blocks".to_owned()),
    ] {
        let place = ApiServer { host: "127.0.0.1".into(), port: 1, ca: file(ca), token: file("token") };
        let api = Arc::new(Api::new(Some(place), Duration::from_secs(60)));
        let error = Namespaces::new(api, Duration::ZERO).labels("web").await.unwrap_err().to_string();
        assert!(error.ends_with(&text), "{error}");
    }
}

#[test]
fn configurations_are_read_as_spire_reads_them() {
    let usual = settings("").unwrap();
    assert_eq!((usual.poll_interval, usual.patience), (Duration::from_millis(500), Duration::from_secs(30)));
    assert!(usual.with_container && !usual.with_namespace_labels);
    let longer = settings(
        "poll_retry_interval = \"1s\"\nmax_poll_attempts = \"3\"\nexperimental { api_server { cache { enabled = true } } }",
    );
    assert_eq!(longer.unwrap().patience, Duration::from_secs(3));
    assert_eq!(settings("poll_retry_interval = \"-1s\"").unwrap().poll_interval, Duration::from_millis(500));
    for (config, text) in [
        ("kubelet_secure_port = 1\nkubelet_read_only_port = 2", "cannot use both the read-only and secure port"),
        ("kubelet_secure_port = 70000", "kubelet port 70000 is not a TCP port"),
        ("certificate_path = \"x\"", "the private key path is required with the certificate path"),
        ("private_key_path = \"x\"", "the certificate path is required with the private key path"),
        ("poll_retry_interval = \"x\"", "unable to parse poll retry interval: time: invalid duration \"x\""),
        ("reload_interval = \"5\"", "unable to parse reload interval: time: missing unit"),
        ("sigstore { ignore_sct = true }", "sigstore is not supported yet"),
        (
            "experimental { broker {} }",
            "experimental.broker.access_policy: must be specified as one of [permissive, enforced]",
        ),
        (
            "experimental { broker { access_policy = \"x\" } }",
            "experimental.broker.access_policy: unsupported value \"x\"",
        ),
        (
            "experimental { broker { access_policy = \"enforced\" } }",
            "experimental.broker.brokers: at least one broker is required",
        ),
        ("experimental { cri_socket_path = \"x\" }", "experimental.cri_socket_path \"x\" is not an absolute path"),
        ("disable_kubelet_client = true\nnode_name = \"x\"", "disable_kubelet_client cannot be used with node_name"),
        ("disable_kubelet_client = true\nreload_interval = \"1s\"", "cannot be used with reload_interval"),
        ("max_poll_attempts = \"many\"", "unable to decode configuration"),
    ] {
        let error = settings(config).err().unwrap_or_else(|| panic!("{config} is taken"));
        assert!(error.contains(text), "{config}: {error}");
    }
}
