//! Labels of namespaces (`enable_namespace_labels`).

use super::api::{Api, Form, internal, segment};
use finial_plugin::PluginError;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// So many namespaces are remembered.
const NAMESPACES_MAX: usize = 1024;

type Labels = Arc<BTreeMap<String, String>>;

#[derive(Deserialize)]
struct Namespace {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    labels: Option<BTreeMap<String, String>>,
}

pub(super) struct Namespaces {
    api: Arc<Api>,
    /// For how long labels are believed.
    fresh_for: Duration,
    /// Held by who asks, so that one question is asked once.
    known: Mutex<HashMap<String, (Instant, Labels)>>,
}

impl Namespaces {
    pub(super) fn new(api: Arc<Api>, fresh_for: Duration) -> Self {
        Self { api, fresh_for, known: Mutex::default() }
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
        let path = format!("/api/v1/namespaces/{}", segment(namespace));
        let found = self.api.get::<Namespace>(&path, Form::Metadata).await;
        let found = found.and_then(|found| found.ok_or_else(|| "not found".to_owned()));
        let failed = |why| {
            let cause = format!("unable to get namespace {namespace:?}: {why}");
            internal(format!("unable to get namespace labels for {namespace:?}: {cause}"))
        };
        let labels = Arc::new(found.map_err(failed)?.metadata.labels.unwrap_or_default());
        if known.len() >= NAMESPACES_MAX {
            known.clear();
        }
        known.insert(namespace.to_owned(), (began, labels.clone()));
        Ok(labels)
    }
}
