//! Labels of namespaces (`enable_namespace_labels`).

use super::api::{Api, Form, internal, segment};
use finial_plugin::PluginError;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
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

/// What was answered last.
struct Answered {
    began: Instant,
    ended: Instant,
    result: Result<Labels, String>,
}

/// One namespace.
#[derive(Default)]
struct Known {
    answered: Mutex<Option<Answered>>,
    /// Held by who asks, while the others wait for the same answer.
    turn: tokio::sync::Mutex<()>,
}

impl Known {
    /// The answer, for who came at `came`: labels are believed for a time, a failure counts for who waited for it.
    fn answer(&self, came: Instant, fresh_for: Duration) -> Option<Result<Labels, String>> {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let is_good = |answered: &&Answered| match &answered.result {
            Ok(_) => answered.began >= came || answered.began.elapsed() < fresh_for,
            Err(_) => answered.ended > came,
        };
        answered.as_ref().filter(is_good).map(|answered| answered.result.clone())
    }
}

pub(super) struct Namespaces {
    api: Arc<Api>,
    /// For how long labels are believed.
    fresh_for: Duration,
    known: Mutex<HashMap<String, Arc<Known>>>,
}

impl Namespaces {
    pub(super) fn new(api: Arc<Api>, fresh_for: Duration) -> Self {
        Self { api, fresh_for, known: Mutex::default() }
    }

    /// The labels of a namespace.
    pub(super) async fn labels(&self, namespace: &str) -> Result<Labels, PluginError> {
        let (came, known) = (Instant::now(), self.known(namespace));
        let labels = match known.answer(came, self.fresh_for) {
            Some(answer) => answer,
            None => {
                // Who is cancelled while he asks leaves his turn to the next.
                let _turn = known.turn.lock().await;
                match known.answer(came, self.fresh_for) {
                    Some(answer) => answer,
                    None => self.ask(namespace, &known).await,
                }
            }
        };
        labels.map_err(|why| {
            let cause = format!("unable to get namespace {namespace:?}: {why}");
            internal(format!("unable to get namespace labels for {namespace:?}: {cause}"))
        })
    }

    fn known(&self, namespace: &str) -> Arc<Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= NAMESPACES_MAX && !known.contains_key(namespace) {
            known.clear();
        }
        known.entry(namespace.to_owned()).or_default().clone()
    }

    async fn ask(&self, namespace: &str, known: &Known) -> Result<Labels, String> {
        let began = Instant::now();
        let path = format!("/api/v1/namespaces/{}", segment(namespace));
        let found = self.api.get::<Namespace>(&path, Form::Metadata).await;
        let found = found.and_then(|found| found.ok_or_else(|| "not found".to_owned()));
        let result = found.map(|found| Arc::new(found.metadata.labels.unwrap_or_default()));
        let answered = Answered { began, ended: Instant::now(), result: result.clone() };
        *known.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(answered);
        result
    }
}
