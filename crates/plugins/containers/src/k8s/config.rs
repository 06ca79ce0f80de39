//! The keys of `k8s`, SPIRE's.

use super::broker::{Policy, Scope};
use super::kubelet::{Access, Auth};
use crate::docker::sigstore_is_missing;
use finial_config::parse_go_duration;
use finial_core::SpiffeId;
use finial_hcl::Value;
use finial_plugin::{PluginError, decode};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

/// Where Kubernetes puts a pod's service account.
pub(super) const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const SECURE_PORT: i64 = 10250;
const POLL_ATTEMPTS: u32 = 60;
const POLL_INTERVAL: Duration = Duration::from_millis(500);
const RELOAD_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Keys {
    kubelet_read_only_port: i64,
    kubelet_secure_port: i64,
    disable_kubelet_client: bool,
    max_poll_attempts: i64,
    poll_retry_interval: String,
    kubelet_ca_path: String,
    skip_kubelet_verification: bool,
    token_path: String,
    certificate_path: String,
    private_key_path: String,
    use_anonymous_authentication: bool,
    node_name_env: String,
    node_name: String,
    reload_interval: String,
    disable_container_selectors: bool,
    use_new_container_locator: Option<bool>,
    verbose_container_locator_logs: bool,
    enable_namespace_labels: bool,
    sigstore: Option<IgnoredAny>,
    experimental: Option<Experimental>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Experimental {
    broker: Option<BrokerKeys>,
    /// Ours: where the container runtime listens, for containers that the kubelet does not list yet.
    cri_socket_path: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BrokerKeys {
    access_policy: String,
    brokers: Vec<BrokerEntry>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BrokerEntry {
    id: String,
    pod_reference_scope: String,
}

/// The keys, understood.
pub(super) struct Settings {
    /// `None`: `disable_kubelet_client`.
    pub(super) access: Option<Access>,
    /// How long a container is looked for.
    pub(super) patience: Duration,
    pub(super) poll_interval: Duration,
    pub(super) reload_after: Duration,
    pub(super) with_container: bool,
    pub(super) with_namespace_labels: bool,
    pub(super) is_verbose: bool,
    /// The container runtime's socket, if it may be asked.
    pub(super) runtime: Option<PathBuf>,
    /// Brokers that may refer to something, if any.
    pub(super) policy: Option<Policy>,
}

pub(super) fn read(data: &Value) -> Result<Settings, PluginError> {
    let keys: Keys = decode(data)?;
    refuse_what_is_missing(&keys)?;
    if keys.use_new_container_locator == Some(false) {
        tracing::warn!("There is no legacy container locator; the new container locator is used");
    }
    let poll_interval = duration(&keys.poll_retry_interval, "poll retry interval", POLL_INTERVAL)?;
    let reload_after = duration(&keys.reload_interval, "reload interval", RELOAD_INTERVAL)?;
    let attempts = u32::try_from(keys.max_poll_attempts).ok().filter(|n| *n > 0).unwrap_or(POLL_ATTEMPTS);
    Ok(Settings {
        access: if keys.disable_kubelet_client { None } else { Some(access(&keys, reload_after)?) },
        patience: poll_interval.saturating_mul(attempts),
        poll_interval,
        reload_after,
        with_container: !keys.disable_container_selectors,
        with_namespace_labels: keys.enable_namespace_labels,
        is_verbose: keys.verbose_container_locator_logs,
        runtime: runtime_socket(&keys)?,
        policy: policy(&keys)?,
    })
}

fn refuse_what_is_missing(keys: &Keys) -> Result<(), PluginError> {
    if keys.sigstore.is_some() {
        return Err(sigstore_is_missing());
    }
    if !keys.disable_kubelet_client {
        return Ok(());
    }
    let conflicts = [
        ("kubelet_read_only_port", keys.kubelet_read_only_port > 0),
        ("kubelet_secure_port", keys.kubelet_secure_port > 0),
        ("kubelet_ca_path", !keys.kubelet_ca_path.is_empty()),
        ("skip_kubelet_verification", keys.skip_kubelet_verification),
        ("token_path", !keys.token_path.is_empty()),
        ("certificate_path", !keys.certificate_path.is_empty()),
        ("private_key_path", !keys.private_key_path.is_empty()),
        ("use_anonymous_authentication", keys.use_anonymous_authentication),
        ("node_name_env", !keys.node_name_env.is_empty()),
        ("node_name", !keys.node_name.is_empty()),
        ("reload_interval", !keys.reload_interval.is_empty()),
    ];
    match conflicts.iter().find(|(_, is_set)| *is_set) {
        Some((name, _)) => Err(PluginError::invalid(format!("disable_kubelet_client cannot be used with {name}"))),
        None => Ok(()),
    }
}

fn access(keys: &Keys, reload_after: Duration) -> Result<Access, PluginError> {
    let port = |port: i64| {
        u16::try_from(port).map_err(|_| PluginError::invalid(format!("kubelet port {port} is not a TCP port")))
    };
    if keys.kubelet_secure_port > 0 && keys.kubelet_read_only_port > 0 {
        return Err(PluginError::invalid("cannot use both the read-only and secure port"));
    }
    if keys.kubelet_read_only_port > 0 {
        return Ok(Access::Plain { port: port(keys.kubelet_read_only_port)? });
    }
    let file = |path: &str, name: &str| match path {
        "" => PathBuf::from(SERVICE_ACCOUNT).join(name),
        path => PathBuf::from(path),
    };
    let auth = match (keys.certificate_path.as_str(), keys.private_key_path.as_str()) {
        _ if keys.use_anonymous_authentication => Auth::Anonymous,
        ("", "") => Auth::Token(file(&keys.token_path, "token")),
        (_, "") => return Err(PluginError::invalid("the private key path is required with the certificate path")),
        ("", _) => return Err(PluginError::invalid("the certificate path is required with the private key path")),
        (certificate, key) => Auth::Certificate { certificate: certificate.into(), key: key.into() },
    };
    Ok(Access::Secure {
        server: "kubelet",
        node_name: node_name(keys),
        port: port(if keys.kubelet_secure_port > 0 { keys.kubelet_secure_port } else { SECURE_PORT })?,
        ca: (!keys.skip_kubelet_verification).then(|| file(&keys.kubelet_ca_path, "ca.crt")),
        auth,
        reload_after,
    })
}

fn policy(keys: &Keys) -> Result<Option<Policy>, PluginError> {
    const WHERE: &str = "experimental.broker";
    let Some(broker) = keys.experimental.as_ref().and_then(|experimental| experimental.broker.as_ref()) else {
        return Ok(None);
    };
    let refuse = |text: String| Err(PluginError::invalid(format!("{WHERE}.{text}")));
    let is_enforced = match broker.access_policy.as_str() {
        "enforced" => true,
        "permissive" => false,
        "" => return refuse("access_policy: must be specified as one of [permissive, enforced]".into()),
        other => {
            return refuse(format!(
                "access_policy: unsupported value {other:?}; must be one of [permissive, enforced]"
            ));
        }
    };
    if broker.brokers.is_empty() {
        return refuse("brokers: at least one broker is required".into());
    }
    let mut brokers = HashMap::new();
    for (index, BrokerEntry { id, pod_reference_scope }) in broker.brokers.iter().enumerate() {
        if id.is_empty() {
            return refuse(format!("brokers[{index}].id: must be specified"));
        }
        if let Err(error) = SpiffeId::parse(id) {
            return refuse(format!("brokers[{id}].id: {error}"));
        }
        let scope = match pod_reference_scope.as_str() {
            "agent_node" | "" if keys.disable_kubelet_client => {
                let text = "pod_reference_scope must be \"cluster\" when disable_kubelet_client is true";
                return refuse(format!("brokers[{id}].{text}"));
            }
            "agent_node" | "" => Scope::AgentNode,
            "cluster" => Scope::Cluster,
            other => {
                let text = format!("unsupported value {other:?}; must be one of [agent_node, cluster]");
                return refuse(format!("brokers[{id}].pod_reference_scope: {text}"));
            }
        };
        if brokers.insert(id.clone(), scope).is_some() {
            return refuse(format!("brokers[{id}].id: duplicate broker id"));
        }
    }
    Ok(Some(Policy { is_enforced, brokers }))
}

fn runtime_socket(keys: &Keys) -> Result<Option<PathBuf>, PluginError> {
    match keys.experimental.as_ref().map_or("", |experimental| &experimental.cri_socket_path) {
        "" => Ok(None),
        path => {
            let path = path.strip_prefix("unix://").unwrap_or(path);
            let bad = || PluginError::invalid(format!("experimental.cri_socket_path {path:?} is not an absolute path"));
            Ok(Some(path.starts_with('/').then(|| path.into()).ok_or_else(bad)?))
        }
    }
}

fn node_name(keys: &Keys) -> String {
    let variable = if keys.node_name_env.is_empty() { "MY_NODE_NAME" } else { &keys.node_name_env };
    match keys.node_name.as_str() {
        "" => std::env::var(variable).unwrap_or_default(),
        name => name.to_owned(),
    }
}

/// As SPIRE: what is not positive is the default.
fn duration(text: &str, what: &str, default: Duration) -> Result<Duration, PluginError> {
    if text.is_empty() {
        return Ok(default);
    }
    let nanos = parse_go_duration(text).map_err(|e| PluginError::invalid(format!("unable to parse {what}: {e}")))?;
    Ok(u64::try_from(nanos).ok().filter(|n| *n > 0).map_or(default, Duration::from_nanos))
}
