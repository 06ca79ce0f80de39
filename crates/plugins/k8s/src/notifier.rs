//! `k8sbundle`: X.509 authorities in a ConfigMap, and in the CA bundles of labelled webhooks and API services.

use crate::api::{Api, ApiError, STRATEGIC, items, segment, text, to_base64};
use crate::kubeconfig::Place;
use async_trait::async_trait;
use finial_core::Bundle;
use finial_hcl::Value as Data;
use finial_plugin::{BundleFormat, HostServices, Notifier, PluginError, decode};
use futures::future::join_all;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// So often is a write tried that others get ahead of.
const ATTEMPTS: usize = 5;
/// How often labelled objects are looked for that have appeared, or that somebody changed.
const LOOK: Duration = Duration::from_secs(10);
/// How long a token is used before its file is read again, and a connection beside it; as long as by Kubernetes' own client.
const FILES: Duration = Duration::from_secs(60);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    namespace: String,
    config_map: String,
    config_map_key: String,
    webhook_label: String,
    api_service_label: String,
    kube_config_file_path: String,
    clusters: Vec<Keys>,
}

#[derive(Default, Deserialize, PartialEq)]
#[serde(default)]
struct Keys {
    namespace: String,
    config_map: String,
    config_map_key: String,
    webhook_label: String,
    api_service_label: String,
    kube_config_file_path: String,
}

struct Cluster {
    place: Place,
    /// Since when.
    api: Mutex<Option<(Api, Instant)>>,
    map: Target,
    labelled: Vec<Target>,
}

/// What is written to.
enum Target {
    ConfigMap {
        namespace: String,
        name: String,
        key: String,
    },
    /// The webhooks of a kind, with that label.
    Webhooks {
        kind: &'static str,
        label: String,
    },
    ApiServices {
        label: String,
    },
}

/// The `k8sbundle` notifier.
pub struct K8sBundle {
    clusters: Vec<Cluster>,
    host: OnceLock<Arc<HostServices>>,
}

impl K8sBundle {
    /// The name in configuration.
    pub const NAME: &'static str = "k8sbundle";

    /// Understands the configuration; clusters are asked when there is something to tell.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn new(data: &Data) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        let root = Keys {
            namespace: config.namespace,
            config_map: config.config_map,
            config_map_key: config.config_map_key,
            webhook_label: config.webhook_label,
            api_service_label: config.api_service_label,
            kube_config_file_path: config.kube_config_file_path,
        };
        let mut all = Vec::new();
        if config.clusters.is_empty() || root != Keys::default() {
            all.push(root);
        }
        for (index, keys) in config.clusters.into_iter().enumerate() {
            if keys.kube_config_file_path.is_empty() {
                let message = format!("cluster configuration is missing kube_config_file_path (clusters[{index}])");
                return Err(PluginError::invalid(message));
            }
            all.push(keys);
        }
        Ok(Self { clusters: all.into_iter().map(Cluster::new).collect(), host: OnceLock::new() })
    }

    /// The newest bundle that is known here, or else this one.
    async fn newest(&self, bundle: &Bundle) -> Bundle {
        match self.host.get() {
            Some(host) => host.newest_bundle(bundle).await,
            None => bundle.clone(),
        }
    }

    async fn tell(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let told = join_all(self.clusters.iter().map(|cluster| cluster.tell(self, bundle, true))).await;
        let failed: Vec<String> = told.into_iter().flatten().collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(PluginError::internal(format!("unable to update: {}", failed.join(", "))))
    }
}

impl Cluster {
    fn new(keys: Keys) -> Self {
        let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
        let mut labelled = Vec::new();
        if !keys.webhook_label.is_empty() {
            for kind in ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"] {
                labelled.push(Target::Webhooks { kind, label: keys.webhook_label.clone() });
            }
        }
        if !keys.api_service_label.is_empty() {
            labelled.push(Target::ApiServices { label: keys.api_service_label });
        }
        let map = Target::ConfigMap {
            namespace: or(keys.namespace, "spire"),
            name: or(keys.config_map, "spire-bundle"),
            key: or(keys.config_map_key, "bundle.crt"),
        };
        Self { place: Place::of(&keys.kube_config_file_path), api: Mutex::default(), map, labelled }
    }

    /// What failed. One object keeps no other from being written. The ConfigMap is only written when there is news of the bundle.
    async fn tell(&self, notifier: &K8sBundle, bundle: &Bundle, is_news: bool) -> Vec<String> {
        let mut kept = self.api.lock().await;
        let api = match kept.take().filter(|(_, since)| since.elapsed() < FILES) {
            Some(open) => open,
            None => match Api::open(&self.place).await {
                Ok(api) => (api, Instant::now()),
                Err(error) => return vec![error.text],
            },
        };
        let mut failed = Vec::new();
        for target in is_news.then_some(&self.map).into_iter().chain(&self.labelled) {
            failed.extend(target.tell(&api.0, notifier, bundle).await);
        }
        // What failed may be due to files that are others by now.
        *kept = Some(api).filter(|_| failed.is_empty());
        failed
    }
}

impl Target {
    /// Where all of them are.
    fn list(&self) -> String {
        let selector = |label: &str| segment(&format!("{label}=true"));
        match self {
            Self::ConfigMap { namespace, .. } => format!("/api/v1/namespaces/{}/configmaps", segment(namespace)),
            Self::Webhooks { kind, label } => {
                format!("/apis/admissionregistration.k8s.io/v1/{kind}?labelSelector={}", selector(label))
            }
            Self::ApiServices { label } => {
                format!("/apis/apiregistration.k8s.io/v1/apiservices?labelSelector={}", selector(label))
            }
        }
    }

    async fn tell(&self, api: &Api, notifier: &K8sBundle, bundle: &Bundle) -> Vec<String> {
        let list = self.list();
        let folder = list.split('?').next().unwrap_or_default();
        let path = |name: &str| format!("{folder}/{}", segment(name));
        let found = match self {
            Self::ConfigMap { namespace, name, .. } => match api.get(&path(name)).await {
                Ok(map) => vec![map],
                Err(error) => return vec![format!("{namespace}/{name}: {}", error.text)],
            },
            _ => match api.get(&list).await {
                Ok(found) => items(&found).cloned().collect(),
                Err(error) => return vec![format!("unable to get list: {}", error.text)],
            },
        };
        let mut failed = Vec::new();
        for object in found {
            let name = text(&object, "/metadata/name").to_owned();
            if let Err(error) = self.write(api, notifier, &path(&name), object, bundle).await {
                failed.push(match self {
                    Self::ConfigMap { namespace, .. } => format!("{namespace}/{name}: {}", error.text),
                    _ => format!("{name}: {}", error.text),
                });
            }
        }
        failed
    }

    /// Changes an object as it was read, and writes; again when others wrote meanwhile.
    async fn write(
        &self,
        api: &Api,
        notifier: &K8sBundle,
        path: &str,
        mut object: Value,
        bundle: &Bundle,
    ) -> Result<(), ApiError> {
        let mut attempt = 1;
        loop {
            // Asked for after the object: who wrote it last then had no newer one than we.
            let newest = notifier.newest(bundle).await;
            let pem = BundleFormat::Pem.write(&newest);
            let Some(patch) = self.patch(&object, &pem) else { return Ok(()) };
            match api.call(Method::PATCH, path, STRATEGIC, Some(&patch)).await {
                Err(error) if error.status == Some(StatusCode::CONFLICT) && attempt < ATTEMPTS => attempt += 1,
                done => return done.map(drop),
            }
            object = api.get(path).await?;
        }
    }

    /// What is to be changed, if anything is; of this version of the object only.
    fn patch(&self, object: &Value, pem: &str) -> Option<Value> {
        let metadata = json!({"resourceVersion": text(object, "/metadata/resourceVersion")});
        let base64 = to_base64(pem.as_bytes());
        match self {
            Self::ConfigMap { key, .. } => {
                let there = object.get("data").and_then(|data| data.get(key)).and_then(Value::as_str);
                (there != Some(pem)).then(|| json!({"metadata": metadata, "data": {key: pem}}))
            }
            Self::Webhooks { .. } => {
                let hooks = object.get("webhooks").and_then(Value::as_array)?;
                if hooks.iter().all(|hook| text(hook, "/clientConfig/caBundle") == base64) {
                    return None;
                }
                let with_ours = |hook: &Value| {
                    json!({
                        "name": hook.get("name"), "clientConfig": {"caBundle": base64},
                        "admissionReviewVersions": hook.get("admissionReviewVersions"),
                        "sideEffects": hook.get("sideEffects")
                    })
                };
                let hooks: Vec<_> = hooks.iter().map(with_ours).collect();
                Some(json!({"metadata": metadata, "webhooks": hooks}))
            }
            Self::ApiServices { .. } => {
                let spec = object.get("spec")?;
                (text(spec, "/caBundle") != base64).then(|| {
                    json!({
                        "metadata": metadata,
                        "spec": {
                            "caBundle": base64, "groupPriorityMinimum": spec.get("groupPriorityMinimum"),
                            "versionPriority": spec.get("versionPriority")
                        }
                    })
                })
            }
        }
    }
}

#[async_trait]
impl Notifier for K8sBundle {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn use_host(&self, host: Arc<HostServices>) {
        let _ = self.host.set(host);
    }

    async fn bundle_loaded(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.tell(bundle).await
    }

    async fn bundle_updated(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.tell(bundle).await
    }

    async fn attend(&self) {
        let watched: Vec<_> = self.clusters.iter().filter(|cluster| !cluster.labelled.is_empty()).collect();
        loop {
            tokio::time::sleep(LOOK).await;
            if watched.is_empty() {
                std::future::pending::<()>().await;
            }
            let Some(server) = self.host.get().and_then(|host| host.server.get()) else { continue };
            let Ok(bundle) = server.bundle().await else { continue };
            let told = join_all(watched.iter().map(|cluster| cluster.tell(self, &bundle, false))).await;
            let failed: Vec<String> = told.into_iter().flatten().collect();
            if !failed.is_empty() {
                tracing::error!(error = failed.join(", "), "Unable to set bundle for objects");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::fake::{Act, Pki, connect_proxy, tcp};

    fn of(data: &str) -> Result<K8sBundle, String> {
        K8sBundle::new(&finial_hcl::parse(data).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_cluster_around_it_is_told_unless_only_others_are_named() {
        let places =
            |data: &str| of(data).unwrap().clusters.into_iter().map(|cluster| cluster.place).collect::<Vec<_>>();
        let other = "clusters = [{ kube_config_file_path = \"/x\" }]\n";
        assert_eq!(places(""), [Place::Pod]);
        assert_eq!(places(other), [Place::of("/x")]);
        assert_eq!(places(&format!("namespace = \"spire\"\n{other}")), [Place::Pod, Place::of("/x")]);
        assert_eq!(places("kube_config_file_path = \"/y\""), [Place::of("/y")]);
        let error = of("clusters = [{ namespace = \"n\" }]").err().unwrap();
        assert_eq!(error, "cluster configuration is missing kube_config_file_path (clusters[0])");
        let one = of(other).unwrap();
        let Target::ConfigMap { namespace, name, key } = &one.clusters[0].map else { panic!("another") };
        assert_eq!((namespace.as_str(), name.as_str(), key.as_str()), ("spire", "spire-bundle", "bundle.crt"));
        assert!(one.clusters[0].labelled.is_empty());
    }

    #[test]
    fn what_is_up_to_date_is_left_alone() {
        let map = Target::ConfigMap { namespace: "n".into(), name: "m".into(), key: "k".into() };
        let object = json!({"metadata": {"resourceVersion": "7"}, "data": {"other": "x"}});
        let patch = map.patch(&object, "pem").unwrap();
        assert_eq!(patch, json!({"metadata": {"resourceVersion": "7"}, "data": {"k": "pem"}}));
        assert_eq!(map.patch(&patch, "pem"), None);
        let hooks = Target::Webhooks { kind: "x", label: "l".into() };
        let object = json!({"webhooks": [{"name": "a", "clientConfig": {"url": "u"}, "sideEffects": "None"}]});
        let patch = hooks.patch(&object, "pem").unwrap();
        assert_eq!(patch["webhooks"][0]["clientConfig"], json!({"caBundle": to_base64(b"pem")}));
        assert_eq!(hooks.patch(&patch, "pem"), None);
        assert_eq!(hooks.patch(&json!({"webhooks": []}), "pem"), None);
    }

    /// Objects that are as they should be cost one request for each kind, over one connection.
    #[tokio::test]
    async fn looking_costs_a_list_of_each_kind_over_a_connection_that_is_kept() {
        let pki = Pki::new();
        pki.issue("server", "subjectAltName=DNS:api.test");
        let calls = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = calls.clone();
        let objects: Vec<_> = ["a", "b", "c"].map(|name| json!({"metadata": {"name": name}, "webhooks": []})).into();
        let list = json!({"items": objects}).to_string();
        let port = tcp(Some(pki.server("server", false)), move |asked| {
            seen.lock().unwrap().push(format!("{} {}", asked.method, asked.path.split('?').next().unwrap()));
            Act::Say(200, list.clone())
        });
        let proxy = connect_proxy(|_| None);
        let config = format!(
            "clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:{port}\", certificate-authority: ca.crt, \
             tls-server-name: api.test, \
             proxy-url: \"http://127.0.0.1:{}\"}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
            proxy.port
        );
        std::fs::write(pki.path("config"), config).unwrap();
        let notifier =
            of(&format!("kube_config_file_path = \"{}\"\nwebhook_label = \"l\"", pki.path("config"))).unwrap();
        let bundle = Bundle::empty(finial_core::TrustDomain::parse("example.org").unwrap());
        for _ in 0..2 {
            assert_eq!(notifier.clusters[0].tell(&notifier, &bundle, false).await, Vec::<String>::new());
            let kind = |kind: &str| format!("GET /apis/admissionregistration.k8s.io/v1/{kind}webhookconfigurations");
            assert_eq!(std::mem::take(&mut *calls.lock().unwrap()), [kind("mutating"), kind("validating")]);
        }
        assert_eq!(proxy.heads().len(), 1, "one connection");
    }
}
