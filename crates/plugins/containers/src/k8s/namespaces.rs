//! Labels of namespaces, which only the API server has (`enable_namespace_labels`).

use super::kubelet::{Access, Auth, Kubelet};
use crate::http::Limits;
use finial_core::ErrorKind;
use finial_plugin::PluginError;
use http::StatusCode;
use http::header::{ACCEPT, HeaderValue};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

const LIMITS: Limits = Limits { time: Duration::from_secs(4), body: 4 << 20 };
/// So many namespaces are remembered.
const NAMESPACES_MAX: usize = 1024;
/// What comes with a namespace besides its name and labels is not asked for.
const METADATA_ONLY: HeaderValue =
    HeaderValue::from_static("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json");

type Labels = Arc<BTreeMap<String, String>>;

#[derive(Deserialize)]
struct Namespace {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    labels: Option<BTreeMap<String, String>>,
}

/// Where the API server is, and who asks it.
pub struct ApiServer {
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// A file with its CA's certificates.
    pub ca: PathBuf,
    /// A file with a service account's token.
    pub token: PathBuf,
}

impl ApiServer {
    /// By what Kubernetes gives each container: two variables, and the service account in that folder.
    pub(super) fn of_this_pod(folder: &str) -> Option<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let port = variable("KUBERNETES_SERVICE_PORT")?.parse().ok()?;
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let file = |name: &str| PathBuf::from(folder).join(name);
        Some(Self { host, port, ca: file("ca.crt"), token: file("token") })
    }
}

pub(super) struct Namespaces {
    server: Option<Kubelet>,
    /// For how long labels are believed.
    fresh_for: Duration,
    /// Held by who asks, so that one question is asked once.
    known: Mutex<HashMap<String, (Instant, Labels)>>,
}

impl Namespaces {
    pub(super) fn new(place: Option<ApiServer>, reload_after: Duration, fresh_for: Duration) -> Self {
        let server = place.map(|place| {
            let (ca, auth) = (Some(place.ca), Auth::Token(place.token));
            Kubelet::new(Access::Secure { node_name: place.host, port: place.port, ca, auth, reload_after })
        });
        Self { server, fresh_for, known: Mutex::default() }
    }

    /// The labels of a namespace.
    pub(super) async fn labels(&self, namespace: &str) -> Result<Labels, PluginError> {
        let mut known = self.known.lock().await;
        if let Some((at, labels)) = known.get(namespace)
            && at.elapsed() < self.fresh_for
        {
            return Ok(labels.clone());
        }
        let began = Instant::now();
        let failed = |why| {
            let text = format!("unable to get namespace labels for {namespace:?}: {why}");
            PluginError::new(ErrorKind::Internal, text)
        };
        let labels = Arc::new(self.ask(namespace).await.map_err(failed)?);
        if known.len() >= NAMESPACES_MAX {
            known.clear();
        }
        known.insert(namespace.to_owned(), (began, labels.clone()));
        Ok(labels)
    }

    async fn ask(&self, namespace: &str) -> Result<BTreeMap<String, String>, String> {
        let outside =
            "unable to load Kubernetes client config: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set";
        let server = self.server.as_ref().ok_or(outside)?;
        let result = self.ask_at(server, namespace).await;
        if result.is_err() {
            server.doubt();
        }
        result.map_err(|why| format!("unable to get namespace {namespace:?}: {why}"))
    }

    async fn ask_at(&self, server: &Kubelet, namespace: &str) -> Result<BTreeMap<String, String>, String> {
        let (client, mut headers) = server.client()?;
        headers.insert(ACCEPT, METADATA_ONLY);
        let path = format!("/api/v1/namespaces/{}", utf8_percent_encode(namespace, NON_ALPHANUMERIC));
        let answer = client.get(&path, &headers, LIMITS).await.map_err(|e| e.to_string())?;
        if answer.status != StatusCode::OK {
            let said: String = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
            return Err(format!("{}: {said}", answer.status));
        }
        let namespace: Namespace = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
        Ok(namespace.metadata.labels.unwrap_or_default())
    }
}
