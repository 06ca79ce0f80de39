//! `k8s`: what the kubelet says of the pod and the container that a process runs in.
//!
//! The kubelet is asked when a workload comes, at once, and again after short waits that double while it does not list the
//! container yet; one answer serves all who wait ([`lists`]). While no workload comes, nothing is asked. Where a key of ours
//! allows it, the container runtime is asked for a container that the kubelet does not list yet ([`cri`]).

mod config;
mod cri;
mod kubelet;
mod lists;
mod namespaces;
mod pods;
mod verify;

use crate::cgroup::{self, Located};
use crate::process::{cgroups, container_paths, locate_error, own_cgroups};
use async_trait::async_trait;
use config::{SERVICE_ACCOUNT, Settings};
use cri::Runtime;
use finial_core::{ErrorKind, Selector};
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, WorkloadAttestor, prefixed_selectors};
use kubelet::Kubelet;
use lists::{Failure, PodLists, Source};
pub use namespaces::ApiServer;
use namespaces::Namespaces;
use pods::{Attested, Found, PodList};
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
    namespaces: Option<Namespaces>,
    runtime: Option<Runtime>,
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
        let namespaces = settings
            .with_namespace_labels
            .then(|| Namespaces::new(api_server, settings.reload_after, settings.poll_interval));
        let runtime = settings.runtime.take().map(Runtime::new);
        Self { settings, lists, namespaces, runtime }
    }

    /// The selectors of what runs there.
    async fn values(&self, place: &Located) -> Result<Vec<String>, PluginError> {
        let disabled = || PluginError::new(ErrorKind::FailedPrecondition, "kubelet client is disabled");
        let lists = self.lists.as_ref().ok_or_else(disabled)?;
        let asked = Instant::now();
        let end = asked + self.settings.patience.min(PATIENCE_MAX);
        // A list that another has just got will do, if the container is in it.
        let mut when = asked.checked_sub(self.settings.poll_interval).unwrap_or(asked);
        let (mut wait, mut failure) = (FIRST_WAIT, None);
        loop {
            let Ok(listed) = tokio::time::timeout_at(end, lists.since(when)).await else {
                return Err(gave_up(place, failure));
            };
            failure = match &listed.result {
                Ok(list) => match self.values_in(list, place).await? {
                    Some(values) => return Ok(values),
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

    /// The selectors by that list, if it says enough; what it does not know of the pod's containers, the runtime may.
    async fn values_in(&self, list: &PodList, place: &Located) -> Result<Option<Vec<String>>, PluginError> {
        match list.find(&place.container_id, place.pod_uid.as_deref()) {
            Found::Container(found) => self.values_of(&found).await.map(Some),
            Found::Pod(found) if !self.settings.with_container => self.values_of(&found).await.map(Some),
            Found::Pod(found) => self.values_by_runtime(&found, place).await,
            Found::Nothing => Ok(None),
            Found::Several => Err(PluginError::internal("two pods found with same container Id")),
        }
    }

    async fn values_by_runtime(&self, pod: &Attested<'_>, place: &Located) -> Result<Option<Vec<String>>, PluginError> {
        let Some(runtime) = &self.runtime else { return Ok(None) };
        let completed = match runtime.containers_of(pod.uid()).await {
            Ok(observed) => pod.completed(&observed),
            Err(error) => {
                tracing::warn!(%error, "The kubelet is waited for instead");
                return Ok(None);
            }
        };
        match completed.find(&place.container_id, Some(pod.uid())) {
            Found::Container(found) => self.values_of(&found).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn values_of(&self, found: &Attested<'_>) -> Result<Vec<String>, PluginError> {
        let mut values = found.pod_values();
        if self.settings.with_container {
            values.extend(found.container_values());
        }
        if let Some(namespaces) = &self.namespaces {
            let labels = namespaces.labels(found.namespace()).await?;
            values.extend(labels.iter().map(|(key, value)| format!("ns-label:{key}:{value}")));
        }
        Ok(values)
    }
}

#[async_trait]
impl WorkloadAttestor for K8s {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let cgroups = cgroups(peer)?;
        if self.settings.is_verbose {
            tracing::debug!(pid = peer.pid, cgroups, "PID cgroups enumerated");
        }
        let paths = container_paths(&cgroups)?;
        let place = cgroup::pod(paths.iter().map(String::as_str), &own_cgroups()).map_err(locate_error)?;
        let Some(place) = place else { return Ok(Vec::new()) };
        Ok(prefixed_selectors(Self::NAME, self.values(&place).await?))
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
