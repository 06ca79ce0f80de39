//! Puts a server together and starts it.

use crate::api::{Api, InfoCache, Service};
use crate::authority::{Authorities, AuthorityError, AuthorityManager, AuthorityParts, AuthoritySettings};
use crate::authz::{Gate, GateSettings};
use crate::endpoints::{Admissible, Doors, Endpoints, ListenError};
use crate::entries::{Entries, Turn};
use crate::issue::{Issuer, IssuerSettings, ttl_warnings};
use crate::live::{Live, LiveSettings};
use crate::nodes::Nodes;
use crate::prune::{PruneListener, PruneSettings, Pruner};
use crate::publish::BundleFeed;
use crate::svid::{ServerSvid, ServerSvidError};
use crate::watch::Watchers;
use finial_config::{PluginConfig, ServerSettings};
use finial_core::{Clock, EntryId, SpiffeId};
use finial_plugin::ServerPlugins;
use finial_runtime::health::Health;
use finial_runtime::log::LogHandle;
use finial_runtime::{BoxError, Metrics, Shutdown, Spawner};
use finial_store::{SqlConfig, Store, StoreError};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// What the program that holds the server gives it.
#[derive(Clone)]
pub struct Environment {
    /// Time of day.
    pub clock: Arc<dyn Clock>,
    /// Runs the server's tasks; its shutdown ends them.
    pub spawner: Spawner,
    /// Counts and times.
    pub metrics: Metrics,
    /// Where the server's checks are added; the program starts the listener.
    pub health: Health,
    /// The log whose level the Logger API changes.
    pub log: Option<LogHandle>,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Not exactly one datastore is configured, or not one that we have.
    #[error("{0}")]
    DataStore(String),
    /// The datastore does not open or cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is nothing to sign with.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The server has no SVID of its own.
    #[error("failed to make the server's SVID: {0}")]
    Svid(#[from] ServerSvidError),
    /// A door does not open.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Configured, and not there yet.
    #[error("{0} is not supported yet: remove it from the configuration to start without it")]
    Unsupported(&'static str),
    /// The health checks.
    #[error("health: {0}")]
    Health(BoxError),
}

/// A server that answers.
#[derive(Clone, Debug)]
pub struct Running {
    /// Where TCP listens.
    pub address: SocketAddr,
    /// Where the local socket is.
    pub socket_path: PathBuf,
    /// What can be changed while it runs.
    pub live: LiveSettings,
}

/// Opens the datastore that the configuration names.
pub async fn open_store(plugins: &[PluginConfig], clock: Arc<dyn Clock>) -> Result<Store, StartError> {
    let mut stores = plugins.iter().filter(|plugin| plugin.kind == "DataStore" && plugin.enabled);
    let (Some(plugin), None) = (stores.next(), stores.next()) else {
        let message = "exactly one DataStore plugin must be configured: add `DataStore \"sql\" { ... }` to `plugins`";
        return Err(StartError::DataStore(message.into()));
    };
    if plugin.name != "sql" {
        return Err(StartError::DataStore(format!("unknown DataStore {:?}: only \"sql\" exists", plugin.name)));
    }
    let data = plugin.load_data().map_err(|e| StartError::DataStore(e.to_string()))?;
    let config: SqlConfig = finial_plugin::decode(&data).map_err(|e| StartError::DataStore(e.message))?;
    Ok(Store::open(config.resolve()?, clock).await?)
}

/// Forgets in memory what was pruned in the datastore.
struct Forget {
    entries: Arc<Entries>,
    nodes: Arc<Nodes>,
}

impl PruneListener for Forget {
    fn entries_pruned(&self, ids: &[EntryId]) {
        self.entries.forget(ids);
    }

    fn agents_pruned(&self, ids: &[SpiffeId]) {
        self.nodes.forget(ids);
    }
}

/// What is configured and does not work yet: refused where leaving it out would be less than what was asked for in safety,
/// and else said.
fn check_supported(settings: &ServerSettings) -> Result<(), StartError> {
    if settings.require_pq_kem {
        return Err(StartError::Unsupported("require_pq_kem"));
    }
    if !settings.proxy_protocol_trusted_cidrs.is_empty() {
        return Err(StartError::Unsupported("proxy_protocol_trusted_cidrs"));
    }
    let federation = &settings.federation;
    let left_out = [
        ("federation.bundle_endpoint", federation.bundle_endpoint.is_some()),
        ("federation.federates_with", !federation.federates_with.is_empty()),
        ("profiling_enabled", settings.profiling.enabled),
    ];
    for (name, _) in left_out.iter().filter(|(_, configured)| *configured) {
        tracing::warn!("{name} is not supported yet and has no effect");
    }
    for warning in ttl_warnings(settings) {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// What the server knows, in memory and in the datastore.
struct Known {
    store: Store,
    turn: Turn,
    entries: Arc<Entries>,
    nodes: Arc<Nodes>,
    bundles: Arc<BundleFeed>,
}

impl Known {
    async fn load(settings: &ServerSettings, env: &Environment) -> Result<Self, StartError> {
        let store = open_store(&settings.plugins, env.clock.clone()).await?.with_metrics(env.metrics.clone());
        tracing::info!(subsystem_name = "catalog", reconfigurable = false, "Configured DataStore");
        let turn = Turn::new(env.spawner.clone());
        let trust_domain = settings.trust_domain.clone();
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await?;
        let nodes = Nodes::load(store.clone(), turn.clone(), entries.clone()).await?;
        let bundles = BundleFeed::open(Arc::new(store.clone()), trust_domain).await?;
        Ok(Self { store, turn, entries, nodes, bundles })
    }

    fn pruner(&self, settings: &ServerSettings, env: &Environment) -> Pruner {
        Pruner::new(
            PruneSettings::of(settings),
            self.store.clone(),
            self.turn.clone(),
            self.bundles.clone(),
            env.clock.clone(),
            env.metrics.clone(),
            Arc::new(Forget { entries: self.entries.clone(), nodes: self.nodes.clone() }),
        )
    }
}

/// What signs, with an authority and an SVID of the server's own ready.
struct Signing {
    manager: AuthorityManager,
    issuer: Arc<Issuer>,
    svid: Arc<ServerSvid>,
}

impl Signing {
    async fn start(
        settings: &ServerSettings,
        plugins: &ServerPlugins,
        env: &Environment,
        known: &Known,
    ) -> Result<Self, StartError> {
        let authorities = Authorities::new();
        let parts = AuthorityParts {
            store: Arc::new(known.store.clone()),
            keys: finial_plugin::metered_for_server(plugins.key_manager.clone(), env.metrics.clone()),
            upstream: plugins.upstream_authority.clone(),
            feed: known.bundles.clone(),
            authorities: authorities.clone(),
            clock: env.clock.clone(),
            metrics: env.metrics.clone(),
        };
        let mut manager = AuthorityManager::load(AuthoritySettings::of(settings), parts).await?;
        manager.start().await?;
        let (clock, metrics) = (env.clock.clone(), env.metrics.clone());
        let issuer = Issuer::new(IssuerSettings::of(settings), authorities, clock.clone(), metrics.clone());
        let issuer = Arc::new(issuer);
        let svid = ServerSvid::new(issuer.clone(), settings.ca_key_type, clock, metrics, env.spawner.clone());
        svid.rotate().await?;
        Ok(Self { manager, issuer, svid })
    }
}

fn listen(
    settings: &ServerSettings,
    env: &Environment,
    known: &Known,
    svid: &ServerSvid,
    live: LiveSettings,
) -> Result<Endpoints, ListenError> {
    Endpoints::listen(Doors {
        address: settings.bind_address,
        socket_path: settings.socket_path.clone(),
        identity: svid.tls_identity(),
        admissible: Admissible { trust_domain: settings.trust_domain.clone(), live, bundles: known.bundles.clone() },
        audit: settings.audit_log_enabled,
        clock: env.clock.clone(),
        spawner: env.spawner.clone(),
    })
}

/// Starts a server. When this returns it answers on both doors, and goes on until the spawner's shutdown.
pub async fn start(settings: &ServerSettings, plugins: ServerPlugins, env: Environment) -> Result<Running, StartError> {
    let info = InfoCache::new(env.clock.now());
    check_supported(settings)?;
    let known = Known::load(settings, &env).await?;
    let Signing { manager, issuer, svid } = Signing::start(settings, &plugins, &env, &known).await?;
    let live = LiveSettings::new(Live::of(settings));
    let gate_settings = GateSettings { live: live.clone(), audit_log_enabled: settings.audit_log_enabled };
    let (entries, nodes) = (known.entries.clone(), known.nodes.clone());
    let gate = Gate::new(gate_settings, entries, nodes, env.metrics.clone(), env.clock.clone());
    let endpoints = listen(settings, &env, &known, &svid, live.clone())?;
    let (bundles, store) = (known.bundles.clone(), known.store.clone());
    crate::health::register(&env.health, bundles.clone(), issuer.clone(), manager.health(), store.clone())
        .map_err(StartError::Health)?;
    let pruner = known.pruner(settings, &env);
    let watchers = Watchers::new(bundles.clone());
    known.entries.observe(watchers.clone());
    let watching = watchers.clone().run(env.clock.clone(), env.spawner.shutdown());
    let service = Service(Arc::new(Api {
        trust_domain: settings.trust_domain.clone(),
        gate,
        store: known.store,
        turn: known.turn,
        entries: known.entries,
        nodes: known.nodes,
        issuer,
        watchers: watchers.clone(),
        svid: svid.clone(),
        bundles: known.bundles,
        plugins,
        clock: env.clock,
        log: env.log,
        disable_jwt_svids: settings.disable_jwt_svids,
        wit_svids_enabled: settings.wit_svids_enabled,
        agent_spiffe_id_as_selector: settings.agent_spiffe_id_as_selector,
        info,
    }));
    let nodes = service.nodes.clone();
    let running = Running { address: endpoints.address(), socket_path: settings.socket_path.clone(), live };
    let shutdown = env.spawner.shutdown();
    background(&env.spawner, "authorities", manager.run(shutdown.clone()));
    background(&env.spawner, "server SVID", svid.run(shutdown.clone()));
    background(&env.spawner, "bundle feed", bundles.run(shutdown.clone()));
    background(&env.spawner, "agents and entries", nodes.run(shutdown.clone()));
    background(&env.spawner, "agents' streams", watching);
    background(&env.spawner, "pruning", pruner.run(shutdown.clone()));
    env.spawner.service("endpoints", serve(endpoints, service, store, shutdown));
    Ok(running)
}

fn background(spawner: &Spawner, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    spawner.service(name, async move {
        task.await;
        Ok::<(), Infallible>(())
    });
}

/// Answers until shutdown; the datastore is closed last.
async fn serve(
    endpoints: Endpoints,
    service: Service,
    store: Store,
    shutdown: Shutdown,
) -> Result<(), tonic::transport::Error> {
    let served = endpoints.serve(service, shutdown).await;
    store.close().await;
    served
}
