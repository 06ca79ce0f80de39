//! `k8s_configmap`: the bundle in a ConfigMap of each of some clusters.

use crate::api::{APPLY, Api, segment};
use crate::kubeconfig::Place;
use async_trait::async_trait;
use finial_core::Bundle;
use finial_hcl::Value;
use finial_plugin::{BundlePublisher, PluginError, PublishedForm, Publishing, all_given, decode};
use futures::future::join_all;
use http::Method;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;

/// Whose fields they are, as the API server keeps account.
const MANAGER: &str = "spire-bundlepublisher-k8s_configmap";

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    clusters: BTreeMap<String, Keys>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Keys {
    format: String,
    namespace: String,
    configmap_name: String,
    configmap_key: String,
    kubeconfig_path: String,
    refresh_hint: String,
}

struct Cluster {
    id: String,
    place: Place,
    namespace: String,
    name: String,
    key: String,
    publishing: Publishing,
}

/// The `k8s_configmap` bundle publisher.
pub struct ConfigMap(Vec<Cluster>);

impl ConfigMap {
    /// The name in configuration.
    pub const NAME: &'static str = "k8s_configmap";

    /// Understands the configuration; clusters are asked when there is something to publish.
    ///
    /// # Errors
    /// What is missing or malformed, and of which cluster.
    pub fn new(data: &Value) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        if config.clusters.is_empty() {
            tracing::warn!("No clusters configured, bundle will not be published");
        }
        let clusters = config.clusters.into_iter().map(|(id, keys)| Cluster::new(id, keys));
        Ok(Self(clusters.collect::<Result<_, _>>()?))
    }
}

impl Cluster {
    fn new(id: String, keys: Keys) -> Result<Self, PluginError> {
        all_given(
            [
                (&keys.format, "bundle format"),
                (&keys.namespace, "namespace"),
                (&keys.configmap_name, "configmap name"),
                (&keys.configmap_key, "configmap key"),
            ],
            |what| format!("missing {what} in cluster {id:?}"),
        )?;
        let of = |what: &str, e: PluginError| {
            PluginError::invalid(format!("could not parse {what} from cluster {id:?}: {e}"))
        };
        PublishedForm::read(&keys.format, "").map_err(|e| of("bundle format", e))?;
        let form = PublishedForm::read(&keys.format, &keys.refresh_hint).map_err(|e| of("refresh_hint", e))?;
        Ok(Self {
            place: Place::of(&keys.kubeconfig_path),
            namespace: keys.namespace,
            name: keys.configmap_name,
            key: keys.configmap_key,
            publishing: Publishing::new(form),
            id,
        })
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let put = async |text: String| {
            let (namespace, name) = (segment(&self.namespace), segment(&self.name));
            let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}?fieldManager={MANAGER}");
            let applied = json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": self.name, "namespace": self.namespace},
                "data": {&self.key: text}
            });
            let done = match Api::open(&self.place).await {
                Ok(api) => api.call(Method::PATCH, &path, APPLY, Some(&applied)).await,
                Err(error) => Err(error),
            };
            done.map(drop).map_err(|e| e.during(&format!("failed to apply ConfigMap for cluster {:?}", self.id)))
        };
        self.publishing.publish(bundle, put).await
    }
}

#[async_trait]
impl BundlePublisher for ConfigMap {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// One cluster keeps no other waiting.
    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        let done = join_all(self.0.iter().map(|cluster| cluster.publish(bundle))).await;
        let failed: Vec<_> = done.into_iter().filter_map(Result::err).collect();
        let Some(first) = failed.first() else { return Ok(()) };
        let texts: Vec<_> = failed.iter().map(PluginError::to_string).collect();
        Err(PluginError::new(first.kind, texts.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_cluster() {
        let refused = |keys: &str| {
            let data = finial_hcl::parse(&format!("clusters = {{ \"one\" = {{ {keys} }} }}")).unwrap();
            ConfigMap::new(&data).err().unwrap().to_string()
        };
        let three = "format = \"pem\"\nnamespace = \"n\"\nconfigmap_name = \"m\"\n";
        let all = ["bundle format", "namespace", "configmap name", "configmap key"];
        let all = all.map(|what| format!("missing {what} in cluster \"one\"")).join("; ");
        assert_eq!(refused(""), all);
        assert_eq!(refused(three), "missing configmap key in cluster \"one\"");
        let format = refused(&format!("{three}configmap_key = \"k\"\n").replace("pem", "der"));
        assert_eq!(format, "could not parse bundle format from cluster \"one\": unknown bundle format: \"der\"");
        let hint = refused(&format!("{three}configmap_key = \"k\"\nrefresh_hint = \"soon\""));
        assert!(
            hint.starts_with("could not parse refresh_hint from cluster \"one\": could not parse refresh hint"),
            "{hint}"
        );
        ConfigMap::new(&finial_hcl::parse("").unwrap()).unwrap();
    }
}
