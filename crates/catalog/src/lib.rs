//! The plugins that exist, by kind and name: the only crate that sees all of them. A new plugin is one line in a table here.

use finial_config::{PluginConfig, PluginDataError, nearest};
use finial_core::{ErrorKind, Secret};
use finial_hcl::Value;
use finial_plugin::{
    AgentNodeAttestor, AgentPlugins, BundlePublisher, CredentialComposer, HostServices, KeyManager, Notifier,
    PluginContext, PluginError, ServerNodeAttestor, ServerPlugins, SvidStore, UpstreamAuthority, WorkloadAttestor,
};
use finial_plugins_base::bundle_publisher::File;
use finial_plugins_base::credential_composer::UniqueId;
use finial_plugins_base::key_manager::{Disk, Memory};
use finial_plugins_base::node_attestor::JoinTokenAgent;
use finial_plugins_base::node_attestor::x509pop::{self, X509PopAgent, X509PopServer};
use finial_plugins_base::workload_attestor::{Gvisor, Slurm, Systemd, Unix, fence};
use finial_plugins_base::{svid_store, upstream_authority};
use finial_plugins_cloud::{aws, azure, gcp};
use finial_plugins_containers::{Docker, K8s};
use finial_plugins_external::{
    ExternalAgentNodeAttestor, ExternalBundlePublisher, ExternalCredentialComposer, ExternalError, ExternalKeyManager,
    ExternalNotifier, ExternalServerNodeAttestor, ExternalSvidStore, ExternalUpstreamAuthority,
    ExternalWorkloadAttestor, Plugin, Service, Surroundings,
};
use finial_plugins_k8s::{CertManager, ConfigMap, K8sBundle};
use finial_plugins_vault::Vault;
use finial_runtime::Spawner;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Why the plugins of a configuration cannot be used. Texts follow SPIRE's.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A kind that this program does not know.
    #[error("unsupported plugin type {0:?}")]
    UnknownKind(String),
    /// No plugin of that kind and name is built in.
    #[error("no built-in plugin {name:?} for type {kind:?}{hint}")]
    Unknown {
        /// The kind, such as `NodeAttestor`.
        kind: String,
        /// The name.
        name: String,
        /// What there is instead.
        hint: String,
    },
    /// An external plugin that cannot be used.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// SPIRE refuses this as well.
    #[error("the built-in join_token node attestor cannot be overridden by an external plugin")]
    ExternalJoinToken,
    /// Too many or too few of a kind.
    #[error("plugin type {kind:?} constraint not satisfied: expected {expected} but got {got}")]
    Count {
        /// The kind.
        kind: &'static str,
        /// How many there must be, in words.
        expected: &'static str,
        /// How many are enabled.
        got: usize,
    },
    /// Its data file cannot be used.
    #[error("failed to configure plugin {name:?}: {source}")]
    Data {
        /// The plugin.
        name: String,
        /// Why.
        source: PluginDataError,
    },
    /// It does not accept its configuration.
    #[error("failed to configure plugin {name:?}: {source}")]
    Configure {
        /// The plugin.
        name: String,
        /// Why.
        source: PluginError,
    },
    /// The datastore is not a plugin any more.
    #[error("pluggability for the DataStore is deprecated; only the built-in \"sql\" plugin is supported")]
    DataStore,
}

/// All kinds that SPIRE's servers and agents have.
const KINDS: [&str; 9] = [
    "DataStore",
    "KeyManager",
    "NodeAttestor",
    "UpstreamAuthority",
    "Notifier",
    "BundlePublisher",
    "CredentialComposer",
    "WorkloadAttestor",
    "SVIDStore",
];

impl CatalogError {
    /// What to do about it, where the text does not tell.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKind(kind) => Some(match nearest(kind, KINDS) {
                Some(meant) if meant == kind => format!("{kind} is a plugin of the other program, agent or server"),
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("plugin types are {}", KINDS.join(", ")),
            }),
            Self::Count { kind, got: 0, .. } => Some(format!("add a {kind} to the plugins section")),
            Self::Count { kind, .. } => {
                Some(format!("remove the others, or disable them with enabled = false: {kind}"))
            }
            _ => None,
        }
    }
}

/// How long an upstream authority may take to reach its CA before the server begins.
const PREPARE_TIME: Duration = Duration::from_secs(60);

type Make<T> = fn(&Value, &PluginContext) -> Result<T, PluginError>;
type Table<T> = &'static [(&'static str, Make<T>)];

/// A kind of plugins: those that are built in, and what stands for an external one.
struct Kind<T: 'static> {
    built_in: Table<T>,
    service: Service,
    external: fn(Plugin) -> T,
}

const SERVER_KEY_MANAGERS: Kind<Arc<dyn KeyManager>> = Kind {
    service: Service::ServerKeyManager,
    external: |plugin| Arc::new(ExternalKeyManager(plugin)),
    built_in: &[
        ("disk", |data, _| Ok(Arc::new(Disk::for_server(data)?))),
        ("memory", |_, _| Ok(Arc::new(Memory::default()))),
    ],
};

const AGENT_KEY_MANAGERS: Kind<Arc<dyn KeyManager>> = Kind {
    service: Service::AgentKeyManager,
    external: |plugin| Arc::new(ExternalKeyManager(plugin)),
    built_in: &[
        ("disk", |data, _| Ok(Arc::new(Disk::for_agent(data)?))),
        ("memory", |_, _| Ok(Arc::new(Memory::default()))),
    ],
};

/// Without `join_token`, which the server core handles.
const SERVER_NODE_ATTESTORS: Kind<Arc<dyn ServerNodeAttestor>> = Kind {
    service: Service::ServerNodeAttestor,
    external: |plugin| Arc::new(ExternalServerNodeAttestor(plugin)),
    built_in: &[(x509pop::NAME, |data, context| Ok(Arc::new(X509PopServer::new(data, context.clone())?)))],
};

const AGENT_NODE_ATTESTORS: Kind<Arc<dyn AgentNodeAttestor>> = Kind {
    service: Service::AgentNodeAttestor,
    external: |plugin| Arc::new(ExternalAgentNodeAttestor(plugin)),
    built_in: &[
        // Its token comes from elsewhere; this one stands for an agent that has attested before.
        (JoinTokenAgent::NAME, |_, _| Ok(Arc::new(JoinTokenAgent::new(Secret::default())))),
        (x509pop::NAME, |data, _| Ok(Arc::new(X509PopAgent::new(data)?))),
    ],
};

const WORKLOAD_ATTESTORS: Kind<Arc<dyn WorkloadAttestor>> = Kind {
    service: Service::WorkloadAttestor,
    external: |plugin| Arc::new(ExternalWorkloadAttestor(plugin)),
    built_in: &[
        (Docker::NAME, |data, context| Ok(Arc::new(Docker::new(data, context)?))),
        (Gvisor::NAME, |data, context| Ok(Arc::new(Gvisor::new(data, context)?))),
        (K8s::NAME, |data, context| Ok(Arc::new(K8s::new(data, context)?))),
        (Slurm::NAME, |_, _| Ok(Arc::new(Slurm))),
        (Systemd::NAME, |_, _| Ok(Arc::new(Systemd::default()))),
        (Unix::NAME, |data, context| Ok(Arc::new(Unix::new(data, context)?))),
    ],
};

const SVID_STORES: Kind<Arc<dyn SvidStore>> = Kind {
    service: Service::SvidStore,
    external: |plugin| Arc::new(ExternalSvidStore(plugin)),
    built_in: &[(svid_store::Disk::NAME, |data, _| Ok(Arc::new(svid_store::Disk::new(data)?)))],
};

const UPSTREAM_AUTHORITIES: Kind<Arc<dyn UpstreamAuthority>> = Kind {
    service: Service::UpstreamAuthority,
    external: |plugin| Arc::new(ExternalUpstreamAuthority::new(plugin)),
    built_in: &[
        (upstream_authority::Disk::NAME, |data, context| Ok(Arc::new(upstream_authority::Disk::new(data, context)?))),
        (aws::Pca::NAME, |data, context| Ok(Arc::new(aws::Pca::new(data, context)?))),
        (aws::Secrets::NAME, |data, context| Ok(Arc::new(aws::Secrets::new(data, context)?))),
        (gcp::Cas::NAME, |data, context| Ok(Arc::new(gcp::Cas::new(data, context)?))),
        (upstream_authority::Ejbca::NAME, |data, context| Ok(Arc::new(upstream_authority::Ejbca::new(data, context)?))),
        (CertManager::NAME, |data, context| Ok(Arc::new(CertManager::new(data, context)?))),
        (Vault::NAME, |data, context| Ok(Arc::new(Vault::new(data, context)?))),
        (upstream_authority::Spire::NAME, |data, context| Ok(Arc::new(upstream_authority::Spire::new(data, context)?))),
    ],
};

const CREDENTIAL_COMPOSERS: Kind<Arc<dyn CredentialComposer>> = Kind {
    service: Service::CredentialComposer,
    external: |plugin| Arc::new(ExternalCredentialComposer(plugin)),
    built_in: &[(UniqueId::NAME, |_, _| Ok(Arc::new(UniqueId::new()?)))],
};

const NOTIFIERS: Kind<Arc<dyn Notifier>> = Kind {
    service: Service::Notifier,
    external: |plugin| Arc::new(ExternalNotifier(plugin)),
    built_in: &[
        (gcp::GcsBundle::NAME, |data, context| Ok(Arc::new(gcp::GcsBundle::new(data, context)?))),
        (K8sBundle::NAME, |data, _| Ok(Arc::new(K8sBundle::new(data)?))),
    ],
};

const BUNDLE_PUBLISHERS: Kind<Arc<dyn BundlePublisher>> = Kind {
    service: Service::BundlePublisher,
    external: |plugin| Arc::new(ExternalBundlePublisher(plugin)),
    built_in: &[
        (aws::RolesAnywhere::NAME, |data, context| Ok(Arc::new(aws::RolesAnywhere::new(data, context)?))),
        (aws::S3::NAME, |data, context| Ok(Arc::new(aws::S3::new(data, context)?))),
        (azure::Blob::NAME, |data, context| Ok(Arc::new(azure::Blob::new(data, context)?))),
        (File::NAME, |data, _| Ok(Arc::new(File::new(data)?))),
        (ConfigMap::NAME, |data, _| Ok(Arc::new(ConfigMap::new(data)?))),
        (gcp::CloudStorage::NAME, |data, context| Ok(Arc::new(gcp::CloudStorage::new(data, context)?))),
    ],
};

/// Builds and configures the plugins of a server, in the order of the configuration.
///
/// # Errors
/// The first plugin that does not exist or does not accept its configuration, or a kind with too many or too few.
pub async fn build_server_plugins(
    configs: &[PluginConfig],
    context: &PluginContext,
    spawner: &Spawner,
) -> Result<ServerPlugins, CatalogError> {
    let around = surroundings(context, spawner);
    let mut key_managers = Vec::new();
    let mut node_attestors = BTreeMap::new();
    let mut upstream_authorities = Vec::new();
    let (mut credential_composers, mut notifiers, mut bundle_publishers) = (Vec::new(), Vec::new(), Vec::new());
    let (mut join_token, mut datastores) = (false, Vec::new());
    for config in configs.iter().filter(|c| c.enabled) {
        match (config.kind.as_str(), config.name.as_str()) {
            ("DataStore", "sql") if config.command.is_none() => datastores.push(()),
            ("DataStore", _) => return Err(CatalogError::DataStore),
            ("KeyManager", _) => key_managers.push(make(&SERVER_KEY_MANAGERS, config, &around).await?),
            ("NodeAttestor", JoinTokenAgent::NAME) if config.command.is_none() => {
                configured(config);
                loaded(config);
                join_token = true;
            }
            ("NodeAttestor", name) => {
                node_attestors.insert(name.to_owned(), make(&SERVER_NODE_ATTESTORS, config, &around).await?);
            }
            ("UpstreamAuthority", _) => {
                upstream_authorities.push(prepared(make(&UPSTREAM_AUTHORITIES, config, &around).await?, config).await?);
            }
            ("CredentialComposer", _) => credential_composers.push(make(&CREDENTIAL_COMPOSERS, config, &around).await?),
            ("Notifier", _) => {
                let notifier = make(&NOTIFIERS, config, &around).await?;
                notifier.use_host(around.host.clone());
                notifiers.push(notifier);
            }
            ("BundlePublisher", _) => bundle_publishers.push(make(&BUNDLE_PUBLISHERS, config, &around).await?),
            (kind, _) => return Err(CatalogError::UnknownKind(kind.to_owned())),
        }
    }
    exactly_one("DataStore", datastores)?;
    let key_manager = exactly_one("KeyManager", key_managers)?;
    let upstream_authority = at_most_one("UpstreamAuthority", upstream_authorities)?;
    Ok(ServerPlugins {
        key_manager,
        node_attestors,
        join_token,
        upstream_authority,
        credential_composers,
        notifiers,
        bundle_publishers,
        host: around.host,
    })
}

/// Builds and configures the plugins of an agent. A join token takes the place of the configured node attestor, as in SPIRE.
///
/// # Errors
/// As [`build_server_plugins`].
pub async fn build_agent_plugins(
    configs: &[PluginConfig],
    join_token: Option<Secret<String>>,
    context: &PluginContext,
    spawner: &Spawner,
) -> Result<AgentPlugins, CatalogError> {
    let around = surroundings(context, spawner);
    let (mut key_managers, mut node_attestors) = (Vec::new(), Vec::new());
    let (mut workload_attestors, mut svid_stores) = (Vec::new(), Vec::new());
    for config in configs.iter().filter(|c| c.enabled) {
        let name = || config.name.clone();
        match config.kind.as_str() {
            "KeyManager" => key_managers.push((name(), make(&AGENT_KEY_MANAGERS, config, &around).await?)),
            "NodeAttestor" => node_attestors.push((name(), make(&AGENT_NODE_ATTESTORS, config, &around).await?)),
            "WorkloadAttestor" => workload_attestors.push(make(&WORKLOAD_ATTESTORS, config, &around).await?),
            "SVIDStore" => svid_stores.push(make(&SVID_STORES, config, &around).await?),
            kind => return Err(CatalogError::UnknownKind(kind.to_owned())),
        }
    }
    let (key_manager_name, key_manager) = exactly_one("KeyManager", key_managers)?;
    let configured = exactly_one("NodeAttestor", node_attestors)?;
    let node_attestor = match join_token {
        Some(token) => (JoinTokenAgent::NAME.to_owned(), Arc::new(JoinTokenAgent::new(token)) as Arc<_>),
        None => configured,
    };
    at_least_one("WorkloadAttestor", &workload_attestors)?;
    Ok(AgentPlugins {
        key_manager,
        keys_are_volatile: key_manager_name == "memory",
        node_attestor,
        workload_attestors: fence(workload_attestors),
        svid_stores,
        host: around.host,
    })
}

/// What would keep [`build_server_plugins`] from working, all of it, with the plugin it is about.
pub fn check_server_plugins<'a>(
    configs: &'a [PluginConfig],
    context: &PluginContext,
) -> Vec<(Option<&'a PluginConfig>, CatalogError)> {
    let enabled = || configs.iter().filter(|c| c.enabled);
    let check = |config: &PluginConfig| match (config.kind.as_str(), config.name.as_str()) {
        ("DataStore", "sql") if config.command.is_none() => load(config).map(drop),
        ("DataStore", _) => Err(CatalogError::DataStore),
        ("KeyManager", _) => check(&SERVER_KEY_MANAGERS, config, context),
        ("NodeAttestor", JoinTokenAgent::NAME) if config.command.is_none() => load(config).map(drop),
        ("NodeAttestor", _) => check(&SERVER_NODE_ATTESTORS, config, context),
        ("UpstreamAuthority", _) => check(&UPSTREAM_AUTHORITIES, config, context),
        ("CredentialComposer", _) => check(&CREDENTIAL_COMPOSERS, config, context),
        ("Notifier", _) => check(&NOTIFIERS, config, context),
        ("BundlePublisher", _) => check(&BUNDLE_PUBLISHERS, config, context),
        (kind, _) => Err(CatalogError::UnknownKind(kind.to_owned())),
    };
    let of_kind = |kind: &str| enabled().filter(|c| c.kind == kind).collect::<Vec<_>>();
    let mut problems: Vec<_> = enabled().filter_map(|c| Some((Some(c), check(c).err()?))).collect();
    let counts = [
        exactly_one("DataStore", of_kind("DataStore")).err(),
        exactly_one("KeyManager", of_kind("KeyManager")).err(),
        at_most_one("UpstreamAuthority", of_kind("UpstreamAuthority")).err(),
    ];
    problems.extend(counts.into_iter().flatten().map(|error| (None, error)));
    problems
}

/// What would keep [`build_agent_plugins`] from working, all of it, with the plugin it is about. Key managers are looked
/// up only: the one on disk makes its folder.
pub fn check_agent_plugins<'a>(
    configs: &'a [PluginConfig],
    context: &PluginContext,
) -> Vec<(Option<&'a PluginConfig>, CatalogError)> {
    let enabled = || configs.iter().filter(|c| c.enabled);
    let check = |config: &PluginConfig| match config.kind.as_str() {
        "KeyManager" if config.command.is_some() => check(&AGENT_KEY_MANAGERS, config, context),
        "KeyManager" => find(&AGENT_KEY_MANAGERS, config).and_then(|_| load(config)).map(drop),
        "NodeAttestor" => check(&AGENT_NODE_ATTESTORS, config, context),
        "WorkloadAttestor" => check(&WORKLOAD_ATTESTORS, config, context),
        "SVIDStore" => check(&SVID_STORES, config, context),
        kind => Err(CatalogError::UnknownKind(kind.to_owned())),
    };
    let of_kind = |kind: &str| enabled().filter(|c| c.kind == kind).collect::<Vec<_>>();
    let mut problems: Vec<_> = enabled().filter_map(|c| Some((Some(c), check(c).err()?))).collect();
    let counts = [
        exactly_one("KeyManager", of_kind("KeyManager")).err(),
        exactly_one("NodeAttestor", of_kind("NodeAttestor")).err(),
        at_least_one("WorkloadAttestor", &of_kind("WorkloadAttestor")).err(),
    ];
    problems.extend(counts.into_iter().flatten().map(|error| (None, error)));
    problems
}

fn surroundings(context: &PluginContext, spawner: &Spawner) -> Surroundings {
    Surroundings { context: context.clone(), host: Arc::<HostServices>::default(), spawner: spawner.clone() }
}

async fn make<T>(kind: &Kind<T>, config: &PluginConfig, around: &Surroundings) -> Result<T, CatalogError> {
    let plugin = if is_external(config)? {
        (kind.external)(Plugin::launch(config, kind.service, around).await?)
    } else {
        construct(kind, config, &around.context)?
    };
    configured(config);
    loaded(config);
    Ok(plugin)
}

/// What cannot reach its CA ends the start.
async fn prepared(
    upstream: Arc<dyn UpstreamAuthority>,
    config: &PluginConfig,
) -> Result<Arc<dyn UpstreamAuthority>, CatalogError> {
    let late = || {
        let what = format!("its CA did not answer within {} s", PREPARE_TIME.as_secs());
        Err(PluginError::new(ErrorKind::Unavailable, what))
    };
    let done = tokio::time::timeout(PREPARE_TIME, upstream.prepare()).await.unwrap_or_else(|_| late());
    done.map_err(|source| CatalogError::Configure { name: config.name.clone(), source })?;
    Ok(upstream)
}

/// Makes nothing. What is external is started, asked and ended, as SPIRE's server does.
fn check<T>(kind: &Kind<T>, config: &PluginConfig, context: &PluginContext) -> Result<(), CatalogError> {
    if is_external(config)? {
        let notes = finial_plugins_external::validate(config, kind.service, context)?;
        if notes.is_empty() {
            return Ok(());
        }
        let source = PluginError::invalid(notes.join("; "));
        return Err(CatalogError::Configure { name: config.name.clone(), source });
    }
    construct(kind, config, context).map(drop)
}

fn is_external(config: &PluginConfig) -> Result<bool, CatalogError> {
    let join_token = config.kind == "NodeAttestor" && config.name == JoinTokenAgent::NAME;
    match config.command {
        Some(_) if join_token => Err(CatalogError::ExternalJoinToken),
        Some(_) => Ok(true),
        None => Ok(false),
    }
}

fn construct<T>(kind: &Kind<T>, config: &PluginConfig, context: &PluginContext) -> Result<T, CatalogError> {
    let make = find(kind, config)?;
    make(&load(config)?, context).map_err(|source| CatalogError::Configure { name: config.name.clone(), source })
}

fn load(config: &PluginConfig) -> Result<Value, CatalogError> {
    config.load_data().map_err(|source| CatalogError::Data { name: config.name.clone(), source })
}

fn find<T>(kind: &Kind<T>, config: &PluginConfig) -> Result<Make<T>, CatalogError> {
    let table = kind.built_in;
    let row = table.iter().find(|(name, _)| *name == config.name);
    let names = || {
        // The server's core is one more, which no table has.
        let core = (config.kind == "NodeAttestor").then_some(JoinTokenAgent::NAME);
        let mut names: Vec<_> = table.iter().map(|(name, _)| *name).chain(core).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let (_, make) = row.ok_or_else(|| unknown(config, &names()))?;
    Ok(*make)
}

fn configured(config: &PluginConfig) {
    tracing::info!(
        subsystem_name = "catalog",
        external = config.command.is_some(),
        plugin_name = config.name,
        plugin_type = config.kind,
        reconfigurable = false,
        "Configured plugin"
    );
}

fn loaded(config: &PluginConfig) {
    tracing::info!(
        subsystem_name = "catalog",
        external = config.command.is_some(),
        plugin_name = config.name,
        plugin_type = config.kind,
        "Plugin loaded"
    );
}

fn unknown(config: &PluginConfig, known: &[&str]) -> CatalogError {
    let meant = nearest(&config.name, known.iter().copied());
    let meant = meant.map(|meant| format!("did you mean {meant:?}? ")).unwrap_or_default();
    let hint = match known {
        [] => " (none of this type yet; see docs/compatibility.md)".to_owned(),
        known => format!(" ({meant}there is {}; see docs/compatibility.md for others)", known.join(", ")),
    };
    CatalogError::Unknown { kind: config.kind.clone(), name: config.name.clone(), hint }
}

fn exactly_one<T>(kind: &'static str, mut plugins: Vec<T>) -> Result<T, CatalogError> {
    let got = plugins.len();
    plugins.pop().filter(|_| got == 1).ok_or(CatalogError::Count { kind, expected: "exactly 1", got })
}

fn at_least_one<T>(kind: &'static str, plugins: &[T]) -> Result<(), CatalogError> {
    if plugins.is_empty() {
        return Err(CatalogError::Count { kind, expected: "at least 1", got: 0 });
    }
    Ok(())
}

fn at_most_one<T>(kind: &'static str, mut plugins: Vec<T>) -> Result<Option<T>, CatalogError> {
    let got = plugins.len();
    if got > 1 {
        return Err(CatalogError::Count { kind, expected: "at most 1", got });
    }
    Ok(plugins.pop())
}

#[cfg(test)]
mod tests;
