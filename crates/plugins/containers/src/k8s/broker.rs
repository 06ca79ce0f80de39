//! What brokers of the SPIFFE Broker API refer to: pods, other objects of the cluster, and processes; and whether they may.

use super::api::{Api, Form, internal, segment};
use super::pods::{Attested, Pod, PodList};
use super::{K8s, Known};
use finial_core::{ErrorKind, SpiffeId};
use finial_plugin::{Peer, PluginError, Reference};
use finial_proto::broker::{KubernetesObjectReference, KubernetesObjectType, WorkloadPidReference};
use prost::Message;
use serde::Deserialize;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;

const PID: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
const OBJECT: &str = "type.googleapis.com/spiffe.broker.KubernetesObjectReference";
/// What Kubernetes must allow a broker to do with an object.
const VERB: &str = "impersonate-via-spire";
/// Objects that one page of a list has, and pages that are read in search of a UID.
const PAGE: usize = 500;
const PAGES_MAX: usize = 400;

/// `experimental.broker`.
pub(super) struct Policy {
    /// Whether Kubernetes is asked for each object.
    pub(super) is_enforced: bool,
    /// Those who may ask, and where their pods may be.
    pub(super) brokers: HashMap<String, Scope>,
}

/// Where the pods are to which a broker may refer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    AgentNode,
    Cluster,
}

/// A kind of objects.
struct Mapping {
    version: String,
    kind: String,
    is_namespaced: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    preferred_version: Version,
    #[serde(default)]
    versions: Vec<Version>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

#[derive(Deserialize)]
struct Resources {
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Resource {
    name: String,
    kind: String,
    namespaced: bool,
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Objects {
    #[serde(default)]
    metadata: Page,
    items: Vec<Object>,
}

#[derive(Default, Deserialize)]
struct Page {
    #[serde(default, rename = "continue")]
    next: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    uid: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    owner_references: Vec<Owner>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Owner {
    api_version: String,
    kind: String,
    name: String,
    uid: String,
    #[serde(default)]
    controller: bool,
}

#[derive(Deserialize)]
struct Review {
    #[serde(default)]
    status: ReviewStatus,
}

#[derive(Default, Deserialize)]
struct ReviewStatus {
    #[serde(default)]
    allowed: bool,
}

/// A reference that has been checked.
struct Asked<'a> {
    kind: &'a KubernetesObjectType,
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

fn invalid(text: impl Into<String>) -> PluginError {
    PluginError::invalid(text)
}

fn not_found(text: String) -> PluginError {
    PluginError::new(ErrorKind::NotFound, text)
}

impl K8s {
    /// The selectors of what a broker refers to.
    pub(super) async fn referred(&self, reference: &Reference<'_>) -> Result<Option<Vec<String>>, PluginError> {
        let policy = self.policy.as_ref().ok_or_else(|| internal("broker configuration missing".into()))?;
        let broker = reference.broker.to_string();
        let not_listed = || PluginError::denied(format!("broker {broker:?} is not configured"));
        let scope = *policy.brokers.get(&broker).ok_or_else(not_listed)?;
        if reference.type_url != PID && reference.type_url != OBJECT {
            let text = format!("unsupported reference type: {}", reference.type_url);
            return Err(invalid(text));
        }
        let (kind, known) = if reference.type_url == PID {
            let pods = KubernetesObjectType { plural: "pods".into(), group: "core".into() };
            (pods, self.process(reference.value).await?)
        } else {
            let malformed = |e| invalid(format!("unable to unmarshal object reference: {e}"));
            let object = KubernetesObjectReference::decode(reference.value).map_err(malformed)?;
            let asked = check(&object)?;
            let known = match (asked.kind.plural.as_str(), asked.kind.group.as_str()) {
                ("pods", "core") => self.pod(&asked, scope).await?,
                _ => self.object(&asked).await?,
            };
            (asked.kind.clone(), Some(known))
        };
        let Some(known) = known else { return Ok(Some(Vec::new())) };
        if policy.is_enforced {
            self.may(reference.broker, &kind, &known).await?;
        }
        Ok(Some(known.values))
    }

    /// A process, by its number. Who asks us holds the process and checks afterwards that it has not ended, so that it is the
    /// one meant.
    async fn process(&self, value: &[u8]) -> Result<Option<Known>, PluginError> {
        let malformed = |e| invalid(format!("unable to unmarshal PID reference: {e}"));
        let WorkloadPidReference { pid } = WorkloadPidReference::decode(value).map_err(malformed)?;
        let gone = |e| not_found(format!("there is no process {pid}: {e}"));
        let folder = std::fs::File::open(format!("/proc/{pid}")).map_err(gone)?;
        self.known(&Peer { pid, proc_dir: folder.as_fd() }).await
    }

    async fn pod(&self, asked: &Asked<'_>, scope: Scope) -> Result<Known, PluginError> {
        if !asked.name.is_empty() && asked.namespace.is_empty() {
            return Err(namespace_required());
        }
        let known = match self.pod_of_node(asked, scope).await? {
            Some(known) => known,
            None => {
                let pod = pod_of_cluster(&self.api, asked).await?;
                let mut list = PodList::default();
                let uid = list.add(pod);
                let pod = list.pod(&uid).ok_or_else(|| internal("the pod has no UID".into()))?;
                self.known_pod(&pod).await?
            }
        };
        if !asked.uid.is_empty() && known.uid != asked.uid {
            let Known { namespace, name, uid, .. } = known;
            return Err(not_found(format!("pod {namespace}/{name} has UID {uid}, expected {}", asked.uid)));
        }
        Ok(known)
    }

    /// `None`: not here, and it may be elsewhere.
    async fn pod_of_node(&self, asked: &Asked<'_>, scope: Scope) -> Result<Option<Known>, PluginError> {
        let list = match (self.list_for_reference().await, scope) {
            (Ok(list), _) => list,
            (Err(error), Scope::AgentNode) => return Err(error),
            (Err(error), Scope::Cluster) => {
                tracing::debug!(%error, "Unable to query kubelet for pod reference; falling back to Kubernetes API");
                return Ok(None);
            }
        };
        let found = match asked.name {
            "" => list.pod(asked.uid),
            name => list.pod_named(asked.namespace, name),
        };
        match (found, scope) {
            (Some(pod), _) => self.known_pod(&pod).await.map(Some),
            (None, Scope::Cluster) => Ok(None),
            (None, Scope::AgentNode) if asked.name.is_empty() => {
                Err(not_found(format!("pod with UID {} not found on agent node", asked.uid)))
            }
            (None, Scope::AgentNode) => {
                Err(not_found(format!("pod {}/{} not found on agent node", asked.namespace, asked.name)))
            }
        }
    }

    /// What entries can name of a pod without a container.
    async fn known_pod(&self, pod: &Attested<'_>) -> Result<Known, PluginError> {
        let labels = self.namespace_values(pod.namespace()).await?;
        Ok(Known::of(pod, [pod.pod_values(), labels].concat()))
    }

    async fn object(&self, asked: &Asked<'_>) -> Result<Known, PluginError> {
        let mapping = mapping(&self.api, asked.kind).await?;
        match mapping.is_namespaced {
            true if !asked.name.is_empty() && asked.namespace.is_empty() => return Err(namespace_required()),
            false if !asked.namespace.is_empty() => {
                return Err(invalid("namespace must be empty for cluster-scoped resource"));
            }
            _ => {}
        }
        let metadata = find(&self.api, asked, &mapping).await?;
        if !asked.uid.is_empty() && metadata.uid != asked.uid {
            let (KubernetesObjectType { plural, group }, Metadata { name, namespace, uid, .. }) =
                (asked.kind, &metadata);
            return Err(not_found(format!(
                "{plural}.{group} {namespace}/{name} has UID {uid}, expected {}",
                asked.uid
            )));
        }
        let mut values = object_values(asked.kind, &mapping, &metadata);
        if !metadata.namespace.is_empty() {
            values.extend(self.namespace_values(&metadata.namespace).await?);
        }
        let Metadata { name, namespace, uid, .. } = metadata;
        Ok(Known { values, namespace, name, uid })
    }

    /// Whether Kubernetes lets the broker have that object's identity.
    async fn may(&self, broker: &SpiffeId, kind: &KubernetesObjectType, object: &Known) -> Result<(), PluginError> {
        let attributes = json!({
            "group": api_group(kind), "resource": kind.plural, "namespace": object.namespace, "name": object.name, "verb": VERB
        });
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": broker.to_string(), "resourceAttributes": attributes}
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let answer = self.api.create::<Review>(path, &review).await;
        let failed = |why| internal(format!("unable to check Kubernetes authorization for broker: {why}"));
        if answer.map_err(failed)?.status.allowed {
            return Ok(());
        }
        let text =
            "Kubernetes authorizer does not allow the broker to use impersonate-via-spire for the referenced object";
        Err(PluginError::denied(text))
    }
}

impl Known {
    pub(super) fn of(pod: &Attested<'_>, values: Vec<String>) -> Self {
        let (namespace, name, uid) = (pod.namespace().to_owned(), pod.name().to_owned(), pod.uid().to_owned());
        Self { values, namespace, name, uid }
    }
}

fn namespace_required() -> PluginError {
    invalid("namespace is required when name is set for a namespaced resource")
}

/// The core group has no name in Kubernetes.
fn api_group(kind: &KubernetesObjectType) -> &str {
    if kind.group == "core" { "" } else { &kind.group }
}

fn check(object: &KubernetesObjectReference) -> Result<Asked<'_>, PluginError> {
    let kind = object.r#type.as_ref().ok_or_else(|| invalid("object reference is missing type"))?;
    let (key, uid) = (object.key.as_ref(), object.uid.as_str());
    let wrong = match key {
        _ if kind.plural.is_empty() => "object reference type is missing plural",
        _ if kind.group.is_empty() => "object reference type is missing group",
        None if uid.is_empty() => "object reference is missing key and UID",
        Some(key) if key.name.is_empty() => "object reference key is missing name",
        _ => "",
    };
    if !wrong.is_empty() {
        return Err(invalid(wrong));
    }
    let (namespace, name) = key.map_or(("", ""), |key| (key.namespace.as_str(), key.name.as_str()));
    Ok(Asked { kind, namespace, name, uid })
}

/// The group's folder of one version.
fn folder(kind: &KubernetesObjectType, version: &str) -> String {
    match api_group(kind) {
        "" => format!("/api/{}", segment(version)),
        group => format!("/apis/{}/{}", segment(group), segment(version)),
    }
}

/// Finds out of which kind and version the objects are that the reference calls by their plural.
async fn mapping(api: &Api, kind: &KubernetesObjectType) -> Result<Mapping, PluginError> {
    let KubernetesObjectType { plural, group } = kind;
    let failed = |why| internal(format!("no REST mapping for {plural}.{group}: {why}"));
    let unknown = || invalid(format!("unknown Kubernetes resource {plural}.{group}: no matches"));
    let versions = match api_group(kind) {
        "" => vec!["v1".to_owned()],
        name => {
            let found = api.get::<Group>(&format!("/apis/{}", segment(name)), Form::Whole).await.map_err(failed)?;
            let Group { preferred_version, versions } = found.ok_or_else(unknown)?;
            [preferred_version].into_iter().chain(versions).map(|version| version.version).collect()
        }
    };
    for version in versions {
        let found = api.get::<Resources>(&folder(kind, &version), Form::Whole).await.map_err(failed)?;
        // Parts of objects (`pods/log`) are no objects.
        let mut resources = found.into_iter().flat_map(|found| found.resources).filter(|r| !r.name.contains('/'));
        if let Some(Resource { kind, namespaced, .. }) = resources.find(|resource| resource.name == *plural) {
            return Ok(Mapping { version, kind, is_namespaced: namespaced });
        }
    }
    Err(unknown())
}

/// The object that is asked for. The API server finds objects by name, not by UID: then all of the kind are looked through.
async fn find(api: &Api, asked: &Asked<'_>, mapping: &Mapping) -> Result<Metadata, PluginError> {
    let Mapping { version, kind, .. } = mapping;
    let (folder, plural) = (folder(asked.kind, version), segment(&asked.kind.plural));
    if !asked.name.is_empty() {
        let namespace = match asked.namespace {
            "" => String::new(),
            namespace => format!("namespaces/{}/", segment(namespace)),
        };
        let path = format!("{folder}/{namespace}{plural}/{}", segment(asked.name));
        let found = api.get::<Object>(&path, Form::Metadata).await;
        let found = found.map_err(|why| internal(format!("unable to get {kind}: {why}")))?;
        let missing = || not_found(format!("{kind} {}/{} not found", asked.namespace, asked.name));
        return found.map(|object| object.metadata).ok_or_else(missing);
    }
    let mut next = String::new();
    for _ in 0..PAGES_MAX {
        let path = format!("{folder}/{plural}?limit={PAGE}&continue={}", segment(&next));
        let page = api.get::<Objects>(&path, Form::MetadataList).await;
        let page = page.map_err(|why| internal(format!("unable to list {kind}: {why}")))?;
        let Some(Objects { metadata, items }) = page else { break };
        if let Some(found) = items.into_iter().map(|object| object.metadata).find(|object| object.uid == asked.uid) {
            return Ok(found);
        }
        next = metadata.next;
        if next.is_empty() {
            break;
        }
    }
    Err(not_found(format!("{kind} with UID {} not found", asked.uid)))
}

async fn pod_of_cluster(api: &Api, asked: &Asked<'_>) -> Result<Pod, PluginError> {
    let (namespace, name) = if asked.name.is_empty() {
        let mapping = Mapping { version: "v1".into(), kind: "Pod".into(), is_namespaced: true };
        let found = find(api, asked, &mapping).await?;
        (found.namespace, found.name)
    } else {
        (asked.namespace.to_owned(), asked.name.to_owned())
    };
    let path = format!("/api/v1/namespaces/{}/pods/{}", segment(&namespace), segment(&name));
    let found = api.get::<Pod>(&path, Form::Whole).await;
    let found = found.map_err(|why| internal(format!("unable to get pod from Kubernetes API: {why}")))?;
    found.ok_or_else(|| not_found(format!("pod {namespace}/{name} not found")))
}

/// What entries can name of any object.
fn object_values(kind: &KubernetesObjectType, mapping: &Mapping, object: &Metadata) -> Vec<String> {
    let KubernetesObjectType { plural, group } = kind;
    let api_version = match api_group(kind) {
        "" => mapping.version.clone(),
        group => format!("{group}/{}", mapping.version),
    };
    let Metadata { name, namespace, uid, .. } = object;
    let mut values = vec![
        format!("uid:{uid}"),
        format!("resource:{plural}.{group}"),
        format!("plural:{plural}"),
        format!("group:{group}"),
        format!("version:{}", mapping.version),
        format!("apiVersion:{api_version}"),
        format!("kind:{}", mapping.kind),
        format!("name:{name}"),
    ];
    if namespace.is_empty() {
        values.push(format!("key:{name}"));
    } else {
        values.extend([format!("namespace:{namespace}"), format!("key:{namespace}/{name}")]);
    }
    values.extend(object.labels.iter().map(|(key, value)| format!("label:{key}:{value}")));
    for owner in &object.owner_references {
        let owner_group = owner.api_version.split_once('/').map_or("core", |(group, _)| group);
        let begin = format!("{owner_group}/{}", owner.kind);
        let (key, uid) = (format!("{begin}/{}", owner.name), format!("{begin}/{}", owner.uid));
        if owner.controller {
            values.extend([format!("controller-key:{key}"), format!("controller-uid:{uid}")]);
        }
        values.extend([format!("owner-key:{key}"), format!("owner-uid:{uid}")]);
    }
    values
}
