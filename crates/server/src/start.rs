//! Puts a server together and starts it.

use crate::api::{Api, InfoCache, Service};
use crate::authority::{Authorities, AuthorityError, AuthorityManager, AuthorityParts, AuthoritySettings};
use crate::authz::{Gate, GateSettings};
use crate::compose::Composers;
use crate::endpoints::{Admissible, Doors, Endpoints, ListenError};
use crate::entries::{Entries, Turn};
use crate::federation::{EndpointError, EndpointParts, Federation, Peers, Real, serve_bundle};
use crate::follow::{self, Follower, State};
use crate::issue::{Issuer, IssuerSettings, SigningQueue, ttl_warnings};
use crate::live::{Live, LiveSettings};
use crate::nodes::Nodes;
use crate::notify::{NotifyError, Told};
use crate::plugin_host::PluginHost;
use crate::prune::{PruneListener, PruneSettings, Pruner};
use crate::publish::BundleFeed;
use crate::rotation::Domain;
use crate::svid::{ServerSvid, ServerSvidError};
use crate::watch::Watchers;
use finial_config::{PluginConfig, ServerSettings};
use finial_core::{Clock, EntryId, SpiffeId, TrustDomain};
use finial_crypto::tls::KeyExchange;
use finial_crypto::tls::TlsIdentity;
use finial_net::proxy::{InvalidNetwork, TrustedProxies};
use finial_plugin::{KeyManager, ServerPlugins};
use finial_policy::{Policy, PolicyError};
use finial_runtime::health::Health;
use finial_runtime::log::LogHandle;
use finial_runtime::{BoxError, Metrics, Shutdown, Spawner};
use finial_store::{SqlConfig, Store, StoreError};
use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

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
    /// The datastore is another trust domain's.
    #[error(
        "a registration entry with trust domain '{found}' has been detected, which does not match the configured trust domain of \
         '{configured}'. If you want to change the trust domain, please delete all existing registration entries"
    )]
    OtherDomain {
        /// Of the entries.
        found: String,
        /// What the configuration says.
        configured: TrustDomain,
    },
    /// There is nothing to sign with.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The server has no SVID of its own.
    #[error("failed to make the server's SVID: {0}")]
    Svid(#[from] ServerSvidError),
    /// A door does not open.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The custom authorization policy cannot be used.
    #[error("unable to obtain authpolicy engine: {0}")]
    Policy(#[from] PolicyError),
    /// `proxy_protocol_trusted_cidrs` names no network.
    #[error("invalid proxy_protocol_trusted_cidrs: {0}")]
    Proxies(#[from] InvalidNetwork),
    /// The bundle endpoint cannot be served.
    #[error(transparent)]
    BundleEndpoint(#[from] EndpointError),
    /// A notifier would not have the server begin.
    #[error(transparent)]
    Notify(#[from] NotifyError),
    /// The health checks.
    #[error("health: {0}")]
    Health(BoxError),
}

/// A server that answers.
#[derive(Clone)]
pub struct Running {
    /// Where TCP listens.
    pub address: SocketAddr,
    /// Where the local socket is.
    pub socket_path: PathBuf,
    /// Where our bundle is served to others, if it is.
    pub bundle_endpoint: Option<SocketAddr>,
    /// The bundles that it knows, its own among them; gone when the server has ended, and its datastore with them.
    pub bundles: Weak<BundleFeed>,
    /// Its own SVID.
    pub identity: Arc<TlsIdentity>,
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

    fn agents_in_use(&self) -> HashSet<SpiffeId> {
        self.nodes.unstored()
    }
}

/// Says what is configured and does not work yet.
fn check_supported(settings: &ServerSettings) {
    let left_out = [("profiling_enabled", settings.profiling.enabled)];
    for (name, _) in left_out.iter().filter(|(_, configured)| *configured) {
        tracing::warn!("{name} is not supported yet and has no effect");
    }
    for warning in ttl_warnings(settings) {
        tracing::warn!("{warning}");
    }
}

/// What the server knows, in memory and in the datastore.
struct Known {
    store: Store,
    turn: Turn,
    entries: Arc<Entries>,
    nodes: Arc<Nodes>,
    bundles: Arc<BundleFeed>,
    /// Who fetched our bundle.
    peers: Arc<Peers>,
    /// Orders to the whole trust domain.
    domain: Arc<Domain>,
    /// Of a database that others write into, too.
    follower: Option<Arc<Follower>>,
}

impl Known {
    async fn load(settings: &ServerSettings, env: &Environment) -> Result<Self, StartError> {
        let store = open_store(&settings.plugins, env.clock.clone()).await?.with_metrics(env.metrics.clone());
        tracing::info!(subsystem_name = "catalog", reconfigurable = false, "Configured DataStore");
        let turn = Turn::new(env.spawner.clone());
        let trust_domain = settings.trust_domain.clone();
        // Where the database stands comes first: what is read after it, and followed from it, misses nothing.
        let feed = store.is_shared().then(|| Arc::new(store.feed(settings.events.event_timeout)));
        let standing = match &feed {
            Some(feed) => Some((feed.clone(), State::now(&**feed).await?)),
            None => None,
        };
        store.read_from_replica().await;
        let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await?;
        // Before anything is written: authorities would be made anew over those that are in use.
        if let Some(found) = entries.of_another_domain() {
            return Err(StartError::OtherDomain { found, configured: trust_domain });
        }
        let nodes = Nodes::load(store.clone(), turn.clone(), entries.clone()).await?;
        // It may be behind, and what comes now is compared with what memory knows.
        store.read_from_primary();
        let bundles = BundleFeed::open(Arc::new(store.clone()), trust_domain).await?;
        let peers: Arc<Peers> = Arc::default();
        let domain = Domain::new(peers.clone(), nodes.clone());
        let follower = standing.map(|(feed, state)| {
            let (entries, nodes, bundles) = (entries.clone(), nodes.clone(), bundles.clone());
            let memory = follow::Known { entries, nodes, bundles, domain: domain.clone() };
            Follower::new(feed, Arc::new(memory), turn.link().clone(), state)
        });
        Ok(Self { store, turn, entries, nodes, bundles, peers, domain, follower })
    }

    /// Serves our bundle to others, if that is configured.
    async fn serve_bundle(
        &self,
        settings: &ServerSettings,
        env: &Environment,
        svid: &ServerSvid,
        keys: Arc<dyn KeyManager>,
    ) -> Result<Option<SocketAddr>, EndpointError> {
        let Some(endpoint) = &settings.federation.bundle_endpoint else { return Ok(None) };
        let parts = EndpointParts {
            bundles: self.bundles.clone(),
            svid: svid.tls_identity(),
            exchange: KeyExchange::post_quantum(settings.require_pq_kem),
            clock: env.clock.clone(),
            peers: self.peers.clone(),
            keys,
            spawner: env.spawner.clone(),
        };
        serve_bundle(endpoint, parts).await.map(Some)
    }

    fn federation(&self, settings: &ServerSettings, env: &Environment, live: LiveSettings) -> Arc<Federation> {
        let ground = Real::new(
            self.store.clone(),
            self.turn.clone(),
            self.bundles.clone(),
            live,
            env.clock.clone(),
            env.spawner.clone(),
            KeyExchange::post_quantum(settings.require_pq_kem),
        );
        Federation::new(ground, env.metrics.clone())
    }

    fn plugin_host(&self, svid: Arc<ServerSvid>) -> Arc<PluginHost> {
        Arc::new(PluginHost { svid, nodes: self.nodes.clone(), bundles: self.bundles.clone() })
    }

    /// They hear of all that changes.
    fn watchers(&self) -> Arc<Watchers> {
        let watchers = Watchers::new(self.bundles.clone());
        self.entries.observe(watchers.clone());
        self.nodes.observe(watchers.clone());
        watchers
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
        let composers = Composers::new(plugins.credential_composers.clone());
        let parts = AuthorityParts {
            store: Arc::new(known.store.clone()),
            keys: finial_plugin::metered_for_server(plugins.key_manager.clone(), env.metrics.clone()),
            upstream: plugins.upstream_authority.clone(),
            feed: known.bundles.clone(),
            authorities: authorities.clone(),
            clock: env.clock.clone(),
            metrics: env.metrics.clone(),
            composers: composers.clone(),
            domain: known.domain.clone(),
        };
        let mut about = AuthoritySettings::of(settings);
        known.entries.read().iter().for_each(|entry| about.heed(&entry.to_proto()));
        let mut manager = AuthorityManager::load(about, parts).await?;
        manager.start().await?;
        let (clock, metrics) = (env.clock.clone(), env.metrics.clone());
        let issuer = Issuer::new(IssuerSettings::of(settings), authorities, clock.clone(), metrics.clone());
        let issuer = Arc::new(issuer.with_composers(composers));
        let svid = ServerSvid::new(
            issuer.clone(),
            known.bundles.clone(),
            settings.ca_key_type,
            clock,
            metrics,
            env.spawner.clone(),
        );
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
) -> Result<Endpoints, StartError> {
    let cidrs = &settings.proxy_protocol_trusted_cidrs;
    let proxies = TrustedProxies::parse(cidrs)?;
    if !cidrs.is_empty() {
        let trusted_cidrs = format!("[{}]", cidrs.join(" "));
        tracing::info!(subsystem_name = "endpoints", trusted_cidrs, "PROXY protocol enabled on TCP listener");
    }
    let endpoints = Endpoints::listen(Doors {
        address: settings.bind_address,
        socket_path: settings.socket_path.clone(),
        identity: svid.tls_identity(),
        admissible: Admissible { trust_domain: settings.trust_domain.clone(), live, bundles: known.bundles.clone() },
        // Policies know local callers by their programs, too.
        look_up_programs: settings.audit_log_enabled || settings.policy.is_some(),
        proxies,
        exchange: KeyExchange::post_quantum(settings.require_pq_kem),
        clock: env.clock.clone(),
        spawner: env.spawner.clone(),
    });
    Ok(endpoints?)
}

/// Starts a server. When this returns it answers on both doors, and goes on until the spawner's shutdown.
pub async fn start(settings: &ServerSettings, plugins: ServerPlugins, env: Environment) -> Result<Running, StartError> {
    let info = InfoCache::new(env.clock.now());
    check_supported(settings);
    let policy = settings.policy.as_ref().map(|p| Policy::load(&p.rego_path, p.data_path.as_deref())).transpose()?;
    let known = Known::load(settings, &env).await?;
    let _ = plugins.host.metrics.set(env.metrics.clone());
    let Signing { manager, issuer, svid } = Signing::start(settings, &plugins, &env, &known).await?;
    let _ = plugins.host.server.set(known.plugin_host(svid.clone()));
    let mut told = Told::new(&plugins, known.bundles.clone());
    told.begin().await?;
    let live = LiveSettings::new(Live::of(settings));
    let gate_settings = GateSettings { live: live.clone(), audit_log_enabled: settings.audit_log_enabled, policy };
    let (entries, nodes) = (known.entries.clone(), known.nodes.clone());
    let gate = Gate::new(gate_settings, entries, nodes, env.metrics.clone(), env.clock.clone());
    let endpoints = listen(settings, &env, &known, &svid, live.clone())?;
    let bundle_endpoint = known.serve_bundle(settings, &env, &svid, plugins.key_manager.clone()).await?;
    let (bundles, store) = (known.bundles.clone(), known.store.clone());
    let link = known.turn.link().clone();
    crate::health::register(&env.health, bundles.clone(), issuer.clone(), manager.health(), store.clone(), link)
        .map_err(StartError::Health)?;
    let pruner = known.pruner(settings, &env);
    let federation = known.federation(settings, &env, live.clone());
    let watchers = known.watchers();
    let watching = watchers.clone().run(env.clock.clone(), env.spawner.shutdown());
    let follower = known.follower;
    let service = Service(Arc::new(Api {
        trust_domain: settings.trust_domain.clone(),
        gate,
        store: known.store,
        turn: known.turn,
        entries: known.entries,
        nodes: known.nodes,
        follower: follower.clone(),
        issuer,
        authority: manager.control(),
        domain: known.domain,
        spawner: env.spawner.clone(),
        signing: SigningQueue::new(),
        watchers: watchers.clone(),
        svid: svid.clone(),
        bundles: known.bundles,
        federation: federation.clone(),
        plugins,
        clock: env.clock,
        log: env.log,
        disable_jwt_svids: settings.disable_jwt_svids,
        wit_svids_enabled: settings.wit_svids_enabled,
        shutdown: env.spawner.shutdown(),
        agent_spiffe_id_as_selector: settings.agent_spiffe_id_as_selector,
        info,
        unfit_names: Default::default(),
    }));
    let (nodes, bundles) = (service.nodes.clone(), service.bundles.clone());
    let (address, socket_path) = (endpoints.address(), settings.socket_path.clone());
    let identity = svid.tls_identity();
    let running = Running { address, socket_path, bundle_endpoint, bundles: Arc::downgrade(&bundles), identity, live };
    let shutdown = env.spawner.shutdown();
    background(&env.spawner, "authorities", manager.run(shutdown.clone()));
    background(&env.spawner, "server SVID", svid.run(shutdown.clone()));
    background(&env.spawner, "notifiers and publishers", told.run(shutdown.clone()));
    let federated = follower.as_ref().map(|follower| follower.federation_changes());
    background(&env.spawner, "federation", federation.run(federated, shutdown.clone()));
    background(&env.spawner, "bundle feed", bundles.run(shutdown.clone()));
    background(&env.spawner, "agents and entries", nodes.run(shutdown.clone()));
    if let Some(follower) = follower {
        background(&env.spawner, "changes of others", follower.run(shutdown.clone()));
    }
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
