//! The kubelet's list of pods: what we read of it, how a container is found in it, and the selectors that it gives.

use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, BTreeSet, HashMap};

#[derive(Deserialize)]
struct Document {
    items: Option<Vec<Pod>>,
}

/// A pod; only what we need of it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pod {
    #[serde(deserialize_with = "or_null")]
    metadata: Metadata,
    #[serde(deserialize_with = "or_null")]
    spec: Spec,
    #[serde(deserialize_with = "or_null")]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    #[serde(deserialize_with = "or_null")]
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_null")]
    owner_references: Vec<Owner>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Owner {
    kind: String,
    name: String,
    uid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    service_account_name: String,
    node_name: String,
    #[serde(deserialize_with = "or_null")]
    containers: Vec<ContainerSpec>,
    #[serde(deserialize_with = "or_null")]
    init_containers: Vec<ContainerSpec>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerSpec {
    name: String,
    image: String,
}

/// A container as its runtime knows it, by the name that it has in its pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Observed {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) image: String,
    pub(super) image_id: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    #[serde(deserialize_with = "or_null")]
    container_statuses: Vec<ContainerStatus>,
    #[serde(deserialize_with = "or_null")]
    init_container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    image: String,
    #[serde(rename = "imageID")]
    image_id: String,
    /// `containerd://ID`.
    #[serde(rename = "containerID")]
    container_id: String,
}

/// Go writes `null` for what is empty.
fn or_null<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The pods of the node, by what the cgroup of a process says.
#[derive(Debug, Default)]
pub(super) struct PodList {
    pods: HashMap<String, Pod>,
    /// The UIDs of the pods that have the container: one, or somebody lies.
    holders: HashMap<String, Vec<String>>,
}

/// What is known of a process's container.
#[derive(Debug, PartialEq)]
pub(super) enum Found<'a> {
    /// Nothing yet.
    Nothing,
    /// The pod is there, its container is not yet.
    Pod(Attested<'a>),
    /// The container and its pod.
    Container(Attested<'a>),
    /// Several pods claim it.
    Several,
}

/// A pod, and the container of it that is asked about.
#[derive(Debug)]
pub(super) struct Attested<'a> {
    pod: &'a Pod,
    container: Option<&'a ContainerStatus>,
}

impl PartialEq for Attested<'_> {
    fn eq(&self, other: &Self) -> bool {
        let name = |of: &Self| of.container.map(|c| c.name.clone());
        self.pod.metadata.uid == other.pod.metadata.uid && name(self) == name(other)
    }
}

impl PodList {
    /// Reads what the kubelet answers on `/pods`.
    pub(super) fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let document: Document = serde_json::from_slice(json)?;
        let mut list = Self::default();
        for pod in document.items.unwrap_or_default() {
            if pod.metadata.uid.is_empty() {
                tracing::warn!(pod_name = pod.metadata.name, "Pod has no UID");
                continue;
            }
            list.add(pod);
        }
        Ok(list)
    }

    /// Adds a pod; its UID.
    pub(super) fn add(&mut self, pod: Pod) -> String {
        let uid = pod.metadata.uid.clone();
        for id in pod.containers().filter_map(ContainerStatus::id) {
            let holders = self.holders.entry(id.to_owned()).or_default();
            if !holders.contains(&uid) {
                holders.push(uid.clone());
            }
        }
        self.pods.insert(uid.clone(), pod);
        uid
    }

    /// The pod of that UID.
    pub(super) fn pod(&self, uid: &str) -> Option<Attested<'_>> {
        self.pods.get(uid).map(|pod| Attested { pod, container: None })
    }

    /// The pod of that name.
    pub(super) fn pod_named(&self, namespace: &str, name: &str) -> Option<Attested<'_>> {
        let is_it = |pod: &&Pod| pod.metadata.namespace == namespace && pod.metadata.name == name;
        self.pods.values().find(is_it).map(|pod| Attested { pod, container: None })
    }

    /// The container of that ID; only in the pod of that UID, if there is one.
    pub(super) fn find(&self, container_id: &str, pod_uid: Option<&str>) -> Found<'_> {
        let holders = self.holders.get(container_id).map(Vec::as_slice).unwrap_or_default();
        let uid = match (pod_uid, holders) {
            (Some(uid), _) => uid,
            (None, [uid]) => uid,
            (None, []) => return Found::Nothing,
            (None, _) => return Found::Several,
        };
        let Some(pod) = self.pods.get(uid) else { return Found::Nothing };
        match pod.containers().find(|container| container.id() == Some(container_id)) {
            Some(container) => Found::Container(Attested { pod, container: Some(container) }),
            None => Found::Pod(Attested { pod, container: None }),
        }
    }
}

impl Pod {
    fn containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.status.container_statuses.iter().chain(&self.status.init_container_statuses)
    }
}

impl ContainerStatus {
    /// What the kubelet says of a container as soon as it has looked: what runs, or else what is to run.
    fn of(spec: &ContainerSpec, observed: &[Observed]) -> Self {
        let name = spec.name.clone();
        match observed.iter().find(|observed| observed.name == spec.name) {
            Some(Observed { id, image, image_id, .. }) => {
                Self { name, image: image.clone(), image_id: image_id.clone(), container_id: format!("runtime://{id}") }
            }
            None => Self { name, image: spec.image.clone(), ..Self::default() },
        }
    }

    fn id(&self) -> Option<&str> {
        let (_, id) = self.container_id.split_once("://")?;
        id.split(['/', '?', '#']).next().filter(|id| !id.is_empty())
    }
}

impl Attested<'_> {
    pub(super) fn namespace(&self) -> &str {
        &self.pod.metadata.namespace
    }

    pub(super) fn name(&self) -> &str {
        &self.pod.metadata.name
    }

    /// The UID of the pod.
    pub(super) fn uid(&self) -> &str {
        &self.pod.metadata.uid
    }

    /// A list of this pod alone, with the containers as the runtime knows them.
    pub(super) fn completed(&self, observed: &[Observed]) -> PodList {
        let Pod { metadata, spec, .. } = self.pod;
        let statuses = |specs: &[ContainerSpec]| specs.iter().map(|spec| ContainerStatus::of(spec, observed)).collect();
        let status = Status {
            container_statuses: statuses(&spec.containers),
            init_container_statuses: statuses(&spec.init_containers),
        };
        let mut list = PodList::default();
        list.add(Pod { metadata: metadata.clone(), spec: spec.clone(), status });
        list
    }

    /// What entries can name of the pod.
    pub(super) fn pod_values(&self) -> Vec<String> {
        let Pod { metadata, spec, status } = self.pod;
        let mut values = vec![
            format!("sa:{}", spec.service_account_name),
            format!("ns:{}", metadata.namespace),
            format!("node-name:{}", spec.node_name),
            format!("pod-uid:{}", metadata.uid),
            format!("pod-name:{}", metadata.name),
            format!("pod-image-count:{}", status.container_statuses.len()),
            format!("pod-init-image-count:{}", status.init_container_statuses.len()),
        ];
        values.extend(images(&status.container_statuses).map(|image| format!("pod-image:{image}")));
        values.extend(images(&status.init_container_statuses).map(|image| format!("pod-init-image:{image}")));
        values.extend(metadata.labels.iter().map(|(key, value)| format!("pod-label:{key}:{value}")));
        for Owner { kind, name, uid } in &metadata.owner_references {
            values.push(format!("pod-owner:{kind}:{name}"));
            values.push(format!("pod-owner-uid:{kind}:{uid}"));
        }
        values
    }

    /// What entries can name of the container.
    pub(super) fn container_values(&self) -> Vec<String> {
        let Some(container) = self.container else { return Vec::new() };
        let mut values = vec![format!("container-name:{}", container.name)];
        values.extend(images([container]).map(|image| format!("container-image:{image}")));
        values
    }
}

/// The images of containers, each by its name and by its digest, once.
fn images<'a>(containers: impl IntoIterator<Item = &'a ContainerStatus>) -> impl Iterator<Item = &'a str> {
    let both = |container: &'a ContainerStatus| [container.image_id.as_str(), container.image.as_str()];
    containers.into_iter().flat_map(both).collect::<BTreeSet<_>>().into_iter()
}

#[cfg(test)]
#[path = "pods_tests.rs"]
mod tests;
