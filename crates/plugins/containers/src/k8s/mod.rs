//! `k8s`: what the kubelet says of the pod and the container that a process runs in.
//!
//! The kubelet is asked when a workload comes, at once, and again after short waits that double while it does not list the
//! container yet; one answer serves all who wait ([`lists`]). While no workload comes, nothing is asked. Where a key of ours
//! allows it, the container runtime is asked for a container that the kubelet does not list yet ([`cri`]).

mod api;
mod broker;
mod config;
mod cri;
mod kubelet;
mod lists;
mod namespaces;
mod pods;

use crate::cgroup::{self, Located};
use crate::process::{cgroups, locate_error, own_cgroups};
use api::Api;
pub use api::ApiServer;
use async_trait::async_trait;
use broker::Policy;
use config::{SERVICE_ACCOUNT, Settings};
use cri::Runtime;
use finial_core::{ErrorKind, Selector};
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, Reference, WorkloadAttestor, prefixed_selectors};
use kubelet::Kubelet;
use lists::{Failure, PodLists, Source};
use namespaces::Namespaces;
use pods::{Attested, Found, PodList};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The wait before the first further list; then twice that, and so on up to `poll_retry_interval`.
const FIRST_WAIT: Duration = Duration::from_millis(25);
/// How long a container is looked for at most: a little less than the agent gives each attestor, so that the message that
/// says what was missing is ours. The workload's client asks again.
const PATIENCE_MAX: Duration = Duration::from_secs(9);

#[async_trait]
impl Source for Kubelet {
    async fn pods(&self) -> Result<PodList, PluginError> {
        Kubelet::pods(self).await
    }
}

/// The attestor.
pub struct K8s {
    settings: Settings,
    lists: Option<PodLists>,
    api: Arc<Api>,
    namespaces: Option<Namespaces>,
    runtime: Option<Runtime>,
    policy: Option<Policy>,
}

/// What is known of a workload: its selectors, and which object of the cluster it is.
struct Known {
    values: Vec<String>,
    namespace: String,
    name: String,
    uid: String,
}

impl K8s {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "k8s";

    /// With SPIRE's keys. A token or certificate that is not there yet is told in the log and looked for again at each
    /// attestation: an agent may start before its node is complete.
    ///
    /// # Errors
    /// When keys are malformed or exclude each other, or ask for what is not there (`sigstore`).
    pub fn new(data: &Value, _: &PluginContext) -> Result<Self, PluginError> {
        Ok(Self::with(config::read(data)?, ApiServer::of_this_pod(SERVICE_ACCOUNT)))
    }

    /// As [`K8s::new`], for an agent that runs in no pod of the cluster: with its API server.
    ///
    /// # Errors
    /// As [`K8s::new`].
    pub fn outside(data: &Value, api_server: ApiServer) -> Result<Self, PluginError> {
        Ok(Self::with(config::read(data)?, Some(api_server)))
    }

    fn with(mut settings: Settings, api_server: Option<ApiServer>) -> Self {
        let kubelet = settings.access.take().map(Kubelet::new);
        if let Some(error) = kubelet.as_ref().and_then(|kubelet| kubelet.client().err()) {
            tracing::warn!(error, "Kubelet cannot be asked yet; will try again when a workload comes");
        }
        let source = kubelet.map(|kubelet| Box::new(kubelet) as Box<dyn Source>);
        Self::of(settings, source, api_server)
    }

    fn of(mut settings: Settings, source: Option<Box<dyn Source>>, api_server: Option<ApiServer>) -> Self {
        let lists = source.map(|source| PodLists::new(source, settings.poll_interval));
        let api = Arc::new(Api::new(api_server, settings.reload_after));
        let namespaces = settings.with_namespace_labels.then(|| Namespaces::new(api.clone(), settings.poll_interval));
        let runtime = settings.runtime.take().map(Runtime::new);
        let policy = settings.policy.take();
        Self { settings, lists, api, namespaces, runtime, policy }
    }

    fn lists(&self) -> Result<&PodLists, PluginError> {
        let disabled = || PluginError::new(ErrorKind::FailedPrecondition, "kubelet client is disabled");
        self.lists.as_ref().ok_or_else(disabled)
    }

    /// The list that a pod is looked for in by its name or UID.
    async fn list_for_reference(&self) -> Result<Arc<PodList>, PluginError> {
        let listed = self.lists()?.since(Instant::now()).await;
        listed.result.map_err(|Failure { kind, message }| PluginError::new(kind, message))
    }

    /// What is known of a process; `None` if it runs in no container.
    async fn known(&self, peer: &Peer<'_>) -> Result<Option<Known>, PluginError> {
        let cgroups = cgroups(peer)?;
        if self.settings.is_verbose {
            tracing::debug!(pid = peer.pid, cgroups, "PID cgroups enumerated");
        }
        let paths = cgroup::paths(&cgroups).map_err(locate_error)?;
        let place = cgroup::pod(paths, &own_cgroups()).map_err(locate_error)?;
        let Some(place) = place else { return Ok(None) };
        self.wait_for(&place).await.map(Some)
    }

    /// What runs there, as soon as that is known.
    async fn wait_for(&self, place: &Located) -> Result<Known, PluginError> {
        let lists = self.lists()?;
        let asked = Instant::now();
        let end = asked + self.settings.patience.min(PATIENCE_MAX);
        // A list that another has just got will do, if the container is in it.
        let mut when = asked.checked_sub(self.settings.poll_interval).unwrap_or(asked);
        let (mut wait, mut failure) = (FIRST_WAIT, None);
        loop {
            let Ok(listed) = tokio::time::timeout_at(end, lists.since(when)).await else {
                let silent =
                    || Failure { kind: ErrorKind::Timeout, message: "no answer from the kubelet in time".into() };
                return Err(gave_up(place, failure.or_else(|| Some(silent()))));
            };
            failure = match &listed.result {
                Ok(list) => match self.known_in(list, place).await? {
                    Some(known) => return Ok(known),
                    None => None,
                },
                Err(failure) => Some(failure.clone()),
            };
            when = asked;
            if listed.began >= asked {
                when = listed.began + wait;
                wait = (wait * 2).min(self.settings.poll_interval.max(FIRST_WAIT));
            }
            if when >= end {
                return Err(gave_up(place, failure));
            }
            tracing::debug!(
                container_id = place.container_id,
                pod_uid = place.pod_uid,
                "Container id not found; will retry"
            );
            tokio::time::sleep_until(when).await;
        }
    }

    /// What is known by that list, if it says enough; what it does not know of the pod's containers, the runtime may.
    async fn known_in(&self, list: &PodList, place: &Located) -> Result<Option<Known>, PluginError> {
        match list.find(&place.container_id, place.pod_uid.as_deref()) {
            Found::Container(found) => self.known_of(&found).await.map(Some),
            Found::Pod(found) if !self.settings.with_container => self.known_of(&found).await.map(Some),
            Found::Pod(found) => self.known_by_runtime(&found, place).await,
            Found::Nothing => Ok(None),
            Found::Several => Err(PluginError::internal("two pods found with same container Id")),
        }
    }

    async fn known_by_runtime(&self, pod: &Attested<'_>, place: &Located) -> Result<Option<Known>, PluginError> {
        let Some(runtime) = &self.runtime else { return Ok(None) };
        let completed = match runtime.containers_of(pod.uid()).await {
            Ok(observed) => pod.completed(&observed),
            Err(error) => {
                tracing::warn!(%error, "The kubelet is waited for instead");
                return Ok(None);
            }
        };
        match completed.find(&place.container_id, Some(pod.uid())) {
            Found::Container(found) => self.known_of(&found).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn known_of(&self, found: &Attested<'_>) -> Result<Known, PluginError> {
        let mut values = found.pod_values();
        if self.settings.with_container {
            values.extend(found.container_values());
        }
        values.extend(self.namespace_values(found.namespace()).await?);
        Ok(Known::of(found, values))
    }

    /// What entries can name of a namespace, where that is wanted.
    async fn namespace_values(&self, namespace: &str) -> Result<Vec<String>, PluginError> {
        let Some(namespaces) = &self.namespaces else { return Ok(Vec::new()) };
        let labels = namespaces.labels(namespace).await?;
        Ok(labels.iter().map(|(key, value)| format!("ns-label:{key}:{value}")).collect())
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let known = self.known(peer).await?;
        Ok(prefixed_selectors(Self::NAME, known.into_iter().flat_map(|known| known.values)))
    }

    async fn attest_reference(&self, reference: &Reference<'_>) -> Result<Option<Vec<Selector>>, PluginError> {
        let values = self.referred(reference).await?;
        Ok(values.map(|values| prefixed_selectors(Self::NAME, values)))
    }
}

fn gave_up(place: &Located, failure: Option<Failure>) -> PluginError {
    let Located { container_id, pod_uid } = place;
    match (failure, pod_uid) {
        (Some(Failure { kind, message }), _) => PluginError::new(kind, message),
        (None, Some(pod_uid)) => late(format!("the kubelet lists no container {container_id} in pod {pod_uid}")),
        (None, None) => late(format!("the kubelet lists no container {container_id}")),
    }
}

fn late(why: String) -> PluginError {
    PluginError::new(ErrorKind::Timeout, format!("no selectors found after max poll attempts: {why}"))
}

#[cfg(test)]
mod tests;
