//! The plugins that speak with an API server, against a real one: an authority that an issuer of cert-manager's signs (the
//! issuer is the test's, the kind of object cert-manager's own), and bundles in ConfigMaps, webhooks and API services.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use finial_core::{Clock, KeyType, SystemClock, TrustDomain};
use finial_crypto::{DistinguishedName, PrivateKey, X509Ca, create_ca_csr, pem};
use finial_plugin::conformance::{self, BundlePublisherFixture, NotifierFixture, UpstreamAuthorityFixture, ca};
use finial_plugin::{Notifier, PluginContext, UpstreamAuthority};
use finial_plugins_k8s::{CertManager, ConfigMap, K8sBundle};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use testkit::kube::Kube;
use testkit::{Flavor, Output, Server, ServerOptions, eventually};

const REQUESTS: &str = "/apis/cert-manager.io/v1/namespaces/sandbox/certificaterequests";
const WEBHOOKS: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
const API_SERVICES: &str = "/apis/apiregistration.k8s.io/v1/apiservices";

/// What the issuer does with a request.
#[derive(Clone, Copy, PartialEq)]
enum Does {
    Sign,
    Deny,
    Fail,
}

struct Issuer {
    does: Arc<Mutex<Does>>,
    root: Arc<[u8]>,
    /// The time by its clock, which stands still.
    now: i64,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn root() -> X509Ca {
    ca::authority(None, "ISSUER", SystemClock.now())
}

fn answer(request: &Value, does: Does, root: &X509Ca, now: i64) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| {
        let at = "2026-01-01T00:00:00Z";
        json!([{"type": kind, "status": status, "reason": reason, "message": "so it is", "lastTransitionTime": at}])
    };
    match does {
        Does::Deny => return json!({"conditions": condition("Denied", "True", "Policy")}),
        Does::Fail => return json!({"conditions": condition("Ready", "False", "Failed")}),
        Does::Sign => {}
    }
    let spec = &request["spec"];
    assert_eq!((&spec["isCA"], &spec["usages"]), (&json!(true), &json!(["cert sign", "crl sign"])));
    assert_eq!(spec["issuerRef"], json!({"name": "ca", "kind": "Issuer", "group": "cert-manager.io"}));
    let text = STANDARD.decode(spec["request"].as_str().unwrap()).unwrap();
    let seconds = spec["duration"].as_str().unwrap().strip_suffix('s').unwrap();
    let until = now + seconds.parse::<i64>().unwrap();
    let own = ca::sign(root, pem::blocks(&text).unwrap()[0].der.expose(), (now - 10, until));
    let base64 = |der: &[u8]| STANDARD.encode(pem::encode("CERTIFICATE", der));
    json!({
        "conditions": condition("Ready", "True", "Issued"),
        "certificate": base64(&own), "ca": base64(root.certificate())
    })
}

impl Issuer {
    fn start(kube: &Arc<Kube>) -> Self {
        let (does, stop, root) = (Arc::new(Mutex::new(Does::Sign)), Arc::new(AtomicBool::new(false)), root());
        let der = root.certificate().clone();
        let (kube, says, stopped, now) = (kube.clone(), does.clone(), stop.clone(), SystemClock.now());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for mut request in kube.api("GET", REQUESTS, None)["items"].as_array().cloned().unwrap_or_default() {
                    if request["status"]["conditions"].is_null() {
                        request["status"] = answer(&request, *says.lock().unwrap(), &root, now);
                        let name = request["metadata"]["name"].as_str().unwrap().to_owned();
                        kube.api("PUT", &format!("{REQUESTS}/{name}/status"), Some(request));
                    }
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Self { does, root: der, now, stop, thread: Some(thread) }
    }

    fn pem(&self) -> String {
        pem::encode("CERTIFICATE", &self.root)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The API server with what the plugins need there; `None` where it is not installed.
fn cluster() -> Option<Arc<Kube>> {
    let kube = Arc::new(Kube::start_api()?);
    for name in ["spire", "sandbox"] {
        kube.api("POST", "/api/v1/namespaces", Some(json!({"metadata": {"name": name}})));
    }
    let map = json!({"metadata": {"name": "spire-bundle"}});
    kube.api("POST", "/api/v1/namespaces/spire/configmaps", Some(map));
    kubeconfig(&kube, "{client-certificate: pki/admin.crt, client-key: pki/admin.key}");
    let crd = testkit::cache().join("cert-manager-1.18.2/certificaterequests.yaml");
    let pki = |name: &str| kube.dir.path().join("pki").join(name);
    let url = format!("https://127.0.0.1:{}/apis/apiextensions.k8s.io/v1/customresourcedefinitions", kube.api_port);
    let mut curl = Command::new("curl");
    curl.args(["-sf", "-H", "Content-Type: application/yaml", "--data-binary"]).arg(format!("@{}", crd.display()));
    curl.arg("--cacert").arg(pki("ca.crt")).arg("--cert").arg(pki("admin.crt")).arg("--key").arg(pki("admin.key"));
    Output::of(curl.arg(url)).ok();
    let kind = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/certificaterequests.cert-manager.io";
    eventually("the kind of object is there", || {
        let there = kube.api("GET", kind, None);
        let is = there["status"]["conditions"].to_string().contains("\"type\":\"Established\"");
        if is { Ok(()) } else { Err(there.to_string()) }
    });
    Some(kube)
}

fn kubeconfig(kube: &Kube, user: &str) -> PathBuf {
    let text = format!(
        "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:{}\", \
         certificate-authority: pki/ca.crt}}}}]\nusers:\n- name: me\n  user: {user}\n\
         contexts: [{{name: x, context: {{cluster: c, user: me}}}}]\ncurrent-context: x\n",
        kube.api_port
    );
    kube.dir.write("kubeconfig", &text)
}

fn configmap(kube: &Kube, namespace: &str, name: &str, key: &str) -> Option<String> {
    let list = kube.api("GET", &format!("/api/v1/namespaces/{namespace}/configmaps"), None);
    let map = list["items"].as_array()?.iter().find(|map| map["metadata"]["name"] == name)?;
    map["data"][key].as_str().map(str::to_owned)
}

fn webhook(name: &str) -> Value {
    let hook = |name: &str| {
        json!({
            "name": name, "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Ignore",
            "clientConfig": {"url": "https://127.0.0.1:1/validate"},
            "rules": [{"apiGroups": ["none.test"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["x"]}]
        })
    };
    let metadata = json!({"name": name, "labels": {"spiffe.io/webhook": "true"}});
    json!({"metadata": metadata, "webhooks": [hook("a.hook.test"), hook("b.hook.test")]})
}

/// The CA bundle of each webhook of a configuration.
fn hooks(kube: &Kube, name: &str) -> Vec<String> {
    let there = kube.api("GET", &format!("{WEBHOOKS}/{name}"), None);
    let hooks = there["webhooks"].as_array().unwrap().iter();
    assert!(hooks.clone().all(|hook| hook["clientConfig"]["url"] == "https://127.0.0.1:1/validate"), "{there}");
    hooks.map(|hook| hook["clientConfig"]["caBundle"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_server_below_an_issuer_tells_clusters_of_its_bundle() {
    let Some(kube) = cluster() else { return };
    let issuer = Issuer::start(&kube);
    kube.api("POST", WEBHOOKS, Some(webhook("early")));
    let service = json!({
        "metadata": {"name": "v1.none.test", "labels": {"spiffe.io/api": "true"}},
        "spec": {
            "group": "none.test", "version": "v1", "groupPriorityMinimum": 10, "versionPriority": 11,
            "service": {"namespace": "spire", "name": "nobody"}
        }
    });
    kube.api("POST", API_SERVICES, Some(service));
    let config = kube.dir.path().join("kubeconfig").display().to_string();
    let plugins = format!(
        r#"
    UpstreamAuthority "cert-manager" {{ plugin_data {{
        issuer_name = "ca" namespace = "sandbox" kube_config_file = "{config}"
    }} }}
    Notifier "k8sbundle" {{ plugin_data {{
        kube_config_file_path = "{config}" webhook_label = "spiffe.io/webhook" api_service_label = "spiffe.io/api"
    }} }}
    BundlePublisher "k8s_configmap" {{ plugin_data {{ clusters = {{
        "one" = {{
            configmap_name = "example.org" configmap_key = "bundle" namespace = "sandbox"
            kubeconfig_path = "{config}" format = "spiffe" refresh_hint = "5m"
        }}
    }} }} }}"#
    );
    let server = Server::start(Flavor::Finial, &ServerOptions { plugins, ..ServerOptions::default() });
    let (pem, bundle) = (issuer.pem(), STANDARD.encode(issuer.pem()));
    assert_eq!(server.command(&["bundle", "show"]).ok().stdout, pem, "the issuer's root is the trust domain's");
    // It said so before it began.
    assert_eq!(configmap(&kube, "spire", "spire-bundle", "bundle.crt"), Some(pem));
    assert_eq!(hooks(&kube, "early"), [bundle.clone(), bundle.clone()]);
    let service = kube.api("GET", &format!("{API_SERVICES}/v1.none.test"), None);
    assert_eq!((&service["spec"]["caBundle"], &service["spec"]["versionPriority"]), (&json!(bundle), &json!(11)));
    let published = eventually("the bundle is published", || {
        configmap(&kube, "sandbox", "example.org", "bundle").ok_or_else(|| "not yet".into())
    });
    let published: Value = serde_json::from_str(&published).unwrap();
    assert_eq!(published["spiffe_refresh_hint"], 300);
    assert_eq!(published["keys"][0]["x5c"][0], STANDARD.encode(&issuer.root));
    // One that appears later is seen to as well.
    kube.api("POST", WEBHOOKS, Some(webhook("late")));
    eventually("a new webhook has the bundle", || {
        let hooks = hooks(&kube, "late");
        if hooks == [bundle.clone(), bundle.clone()] { Ok(()) } else { Err(format!("{hooks:?}")) }
    });
    let left = kube.api("GET", REQUESTS, None);
    assert_eq!(left["items"], json!([]), "requests that are answered are gone");
}

fn cert_manager(kube: &Kube) -> CertManager {
    let config = kube.dir.path().join("kubeconfig").display().to_string();
    let data = format!("issuer_name = \"ca\"\nnamespace = \"sandbox\"\nkube_config_file = \"{config}\"");
    let context = PluginContext { trust_domain: trust_domain(), clock: Arc::new(SystemClock) };
    CertManager::new(&finial_hcl::parse(&data).unwrap(), &context).unwrap()
}

#[test]
fn cert_manager_does_what_upstream_authorities_do() {
    let Some(kube) = cluster() else { return };
    let issuer = Issuer::start(&kube);
    let fixture = || UpstreamAuthorityFixture {
        upstream: Arc::new(cert_manager(&kube)),
        trust_domain: trust_domain(),
        now: issuer.now,
    };
    conformance::run(async {
        conformance::mints_authorities(fixture()).await;
        conformance::bad_csrs_are_refused(fixture()).await;
    });
    let refused = || {
        conformance::run(async {
            let key = PrivateKey::generate(KeyType::EcP256).unwrap();
            let csr = create_ca_csr(&key, &DistinguishedName::ca_default(), &trust_domain()).await.unwrap();
            cert_manager(&kube).mint_x509_ca(&csr, 600).await.unwrap_err().to_string()
        })
    };
    for (does, want) in [
        (Does::Deny, "request has been denied: CertificateRequest sandbox/spiffe-ca-"),
        (Does::Fail, "request has failed: CertificateRequest sandbox/spiffe-ca-"),
    ] {
        *issuer.does.lock().unwrap() = does;
        let error = refused();
        assert!(error.starts_with(want) && error.ends_with(": so it is"), "{error}");
    }
    assert_eq!(kube.api("GET", REQUESTS, None)["items"], json!([]));
    // Who may not, hears it from the API server.
    kube.api("POST", "/api/v1/namespaces/default/serviceaccounts", Some(json!({"metadata": {"name": "nobody"}})));
    let token = "/api/v1/namespaces/default/serviceaccounts/nobody/token";
    let token = kube.api("POST", token, Some(json!({"spec": {}})))["status"]["token"].as_str().unwrap().to_owned();
    kubeconfig(&kube, &format!("{{token: {token}}}"));
    let error = refused();
    assert!(
        error.starts_with("failed to create object: certificaterequests.cert-manager.io is forbidden: "),
        "{error}"
    );
    kubeconfig(&kube, "{token: not-one}");
    assert_eq!(refused(), "failed to create object: Unauthorized");
}

#[test]
fn configmaps_hold_the_last_bundle() {
    let Some(kube) = cluster() else { return };
    let config = kube.dir.path().join("kubeconfig").display().to_string();
    let data = format!(
        "clusters = {{ \"one\" = {{ configmap_name = \"m\" configmap_key = \"k\" namespace = \"sandbox\" \
         kubeconfig_path = \"{config}\" format = \"pem\" }} }}"
    );
    let read = |kube: &Arc<Kube>, namespace: &'static str, name: &'static str, key: &'static str| {
        let kube = kube.clone();
        move || pem::certificates(configmap(&kube, namespace, name, key)?.as_bytes()).ok()
    };
    conformance::run(conformance::publishes_the_last_bundle(BundlePublisherFixture {
        publisher: Arc::new(ConfigMap::new(&finial_hcl::parse(&data).unwrap()).unwrap()),
        published: Box::new(read(&kube, "sandbox", "m", "k")),
        spoil: None,
    }));
    let notifier = || {
        let data = format!("kube_config_file_path = \"{config}\"");
        Arc::new(K8sBundle::new(&finial_hcl::parse(&data).unwrap()).unwrap())
    };
    conformance::run(conformance::tells_of_the_bundle(NotifierFixture {
        notifier: notifier(),
        told: Box::new(read(&kube, "spire", "spire-bundle", "bundle.crt")),
    }));
    // Servers beside each other get in each other's way, and both go on.
    let bundle = |roots: usize| {
        let authority = |_| finial_core::X509Authority { der: root().certificate().clone(), tainted: false };
        let x509_authorities = (0..roots).map(authority).collect();
        finial_core::Bundle { x509_authorities, ..finial_core::Bundle::empty(trust_domain()) }
    };
    conformance::run(async {
        let (one, other) = (notifier(), notifier());
        for round in 1..4 {
            let (ours, theirs) = (bundle(round), bundle(round + 1));
            let both = tokio::join!(one.bundle_updated(&ours), other.bundle_updated(&theirs));
            both.0.and(both.1).unwrap();
        }
    });
    kube.api("DELETE", "/api/v1/namespaces/spire/configmaps/spire-bundle", None);
    let error = conformance::run(async { notifier().bundle_loaded(&bundle(1)).await.unwrap_err().to_string() });
    assert_eq!(error, "unable to update: spire/spire-bundle: configmaps \"spire-bundle\" not found");
}
