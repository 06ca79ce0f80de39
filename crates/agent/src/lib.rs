//! The agent of a node: attests to the server, keeps SVIDs and bundles at hand, and serves them to workloads.
//!
//! Follow a call through `workload_api` (who calls, what may they see; `sds` is its other door, for proxies) and `cache`
//! (ready-made answers); follow the data through `sync` (the only one who asks the server) into `cache`. `attest` and `svid`
//! are the agent's own identity, `storage` what is left of it after a restart, `admin` and `health` what it says of itself.
//!
//! Start at [`run`].

mod admin;
mod attest;
mod broker;
mod cache;
mod delegated;
mod endpoints;
mod entry;
mod error;
mod explain;
mod handover;
mod health;
mod join_token;
mod reflection;
mod restart;
mod rotation;
mod sds;
mod sealed;
mod status;
mod storage;
mod svid;
mod svid_store;
mod sync;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod updates;
mod workload_api;

pub use error::AgentError;

use finial_config::{AgentSettings, RebootstrapMode};
use finial_core::Clock;
use finial_crypto::tls::{KeyExchange, PeerPolicy, ServerAuth, TlsIdentity, client_config_with};
use finial_net::Handshakes;
use finial_net::client::tls_channel;
use finial_net::prometheus::{self, MetricsTls};
use finial_net::serving_cert::CertFiles;
use finial_plugin::{AgentNodeAttestor, AgentPlugins};
use finial_runtime::log::LogHandle;
use finial_runtime::{Metrics, Shutdown, Spawner, listen_text, telemetry};
use handover::Inherited;
use join_token::JoinTokenAttestor;
use rotation::{Jitter, RotationStrategy};
use sealed::SealedCache;
use status::AgentStatus;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;
use storage::Storage;
use sync::Syncer;
use sync::client::ServerLink;
use tokio::time::Instant;

/// How long the last write to disk may take at the end.
const LAST_WRITE: Duration = Duration::from_secs(10);

/// An agent that can be run.
pub struct Agent {
    /// What it is told.
    pub settings: AgentSettings,
    /// Its plugins.
    pub plugins: AgentPlugins,
    /// Starts its tasks; the agent ends when its shutdown triggers.
    pub spawner: Spawner,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Takes what is measured; where it is sent and served stands in the settings.
    pub metrics: Metrics,
    /// The process's log, for the Logger API on the admin socket; none = no such API.
    pub log: Option<LogHandle>,
    /// The version that it tells the server.
    pub version: String,
}

/// What all parts of a running agent share.
pub(crate) struct Context {
    pub(crate) settings: AgentSettings,
    pub(crate) plugins: AgentPlugins,
    /// With its name.
    pub(crate) node_attestor: (String, Arc<dyn AgentNodeAttestor>),
    pub(crate) spawner: Spawner,
    pub(crate) shutdown: Shutdown,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Metrics,
    pub(crate) storage: Storage,
    pub(crate) sealed: SealedCache,
    pub(crate) rotation: RotationStrategy,
    pub(crate) jitter: Arc<Jitter>,
    pub(crate) version: String,
    /// From the agent that ran before, and for the next one.
    pub(crate) inherited: Inherited,
    /// Held while the agent's own SVID is renewed, or may not be.
    pub(crate) renewal: tokio::sync::Mutex<()>,
}

impl Context {
    /// `host:port`, with brackets where they are needed.
    pub(crate) fn server_address(&self) -> String {
        let (host, port) = (&self.settings.server_address, self.settings.server_port);
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// What TLS to the server may agree on.
    pub(crate) fn key_exchange(&self) -> KeyExchange {
        KeyExchange::post_quantum(self.settings.require_pq_kem)
    }

    fn new(
        agent: Agent,
        shutdown: Shutdown,
        inherited: Inherited,
    ) -> Result<(Arc<Self>, Option<LogHandle>), AgentError> {
        let Agent { settings, mut plugins, spawner, clock, metrics, log, version } = agent;
        plugins.key_manager = finial_plugin::metered_for_agent(plugins.key_manager, metrics.clone());
        let _ = plugins.host.metrics.set(metrics.clone());
        let failed = |e: std::io::Error| {
            AgentError::internal(format!("failed to create data directory {}: {e}", settings.data_dir.display()))
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&settings.data_dir).map_err(failed)?;
        let storage = Storage::open(&settings.data_dir, spawner.clone())
            .map_err(|e| AgentError::internal(format!("failed to open storage: {e}")).because(e))?;
        // A join token given beside an attestor goes first, as with SPIRE.
        let node_attestor = match &settings.join_token {
            Some(token) => ("join_token".to_owned(), Arc::new(JoinTokenAttestor::new(token.clone())) as Arc<_>),
            None => plugins.node_attestor.clone(),
        };
        let context = Self {
            rotation: RotationStrategy::new(settings.availability_target),
            jitter: Arc::new(Jitter::new()),
            sealed: SealedCache::open(&settings),
            settings,
            plugins,
            node_attestor,
            spawner,
            shutdown,
            clock,
            metrics,
            storage,
            version,
            inherited,
            renewal: tokio::sync::Mutex::default(),
        };
        Ok((Arc::new(context), log))
    }
}

/// Runs an agent until its spawner's shutdown triggers, which is no failure.
///
/// # Errors
/// When the agent cannot start, is banned, or cannot go on; the text says why.
pub async fn run(agent: Agent) -> Result<(), AgentError> {
    // Ends our tasks also when we end by ourselves.
    let shutdown = agent.spawner.shutdown().child();
    let ended = run_until(agent, shutdown.clone()).await;
    shutdown.trigger();
    ended
}

async fn run_until(agent: Agent, shutdown: Shutdown) -> Result<(), AgentError> {
    let started = Instant::now();
    tracing::info!(data_dir = %agent.settings.data_dir.display(), version = %agent.version, "Starting agent");
    // Before anything is read that the agent that runs may still write.
    let inherited = handover::ask(&agent.settings).await;
    let (context, log) = Context::new(agent, shutdown, inherited)?;
    let settings = &context.settings;
    let status = Arc::new(AgentStatus::default());
    // Before attestation, which may take long: so that its failures can be seen.
    if !context.inherited.is_from_agent() {
        listen_on_tcp(&context, &status).await;
    }
    let pushed =
        context.metrics.push_to_all(&settings.telemetry.statsd, &settings.telemetry.dogstatsd, &context.spawner);
    pushed.await.map_err(AgentError::internal)?;
    if settings.telemetry.in_mem {
        let listens = context.metrics.log_on_sigusr1(&context.spawner);
        listens.map_err(|e| AgentError::internal("cannot listen for SIGUSR1").because(e))?;
    }
    context.metrics.started(&context.version, settings.trust_domain.as_str());

    let Some(attested) = attest::attest(&context).await? else { return Ok(()) };
    if !attested.svid.reattestable && context.plugins.keys_are_volatile {
        tracing::warn!(
            "Node attestation is not reattestable and the 'memory' key manager is in use; if the agent process is \
             restarted, it will be unable to obtain a new SVID and will need to be manually evicted to be able to re-attest."
        );
    }
    check_rebootstrap(settings.rebootstrap_mode, attested.svid.reattestable)?;
    let Some(Begun { syncer, cache, link, identity }) = begin(&context, &status, attested).await? else {
        return Ok(());
    };
    let keeper = context.spawner.spawn("sealed-cache", sealed::keep(context.clone(), cache.clone(), status.clone()));
    let servers = endpoints::start(&context, cache.clone(), (link, identity.clone()), status.clone(), log, started)?;
    if !context.inherited.is_from_agent() {
        metrics_over_tls(&context, cache.clone(), identity.clone()).await;
    }
    context.metrics.gauge("bootstrapped", 1.0, &[]);
    let stores = svid_store::StoreService::new(&context, cache.clone());
    context.spawner.spawn("svid stores", stores.run(context.shutdown.clone()));
    status.set_started();
    // A call to a server that hangs is not waited for.
    let stop = context.shutdown.clone();
    let sync = async move {
        tokio::select! {
            result = syncer.run() => result,
            () = stop.cancelled() => Ok(()),
        }
    };
    let sync = context.spawner.spawn("sync", sync);
    let handover = context.spawner.spawn("handover", hand_on(context.clone(), cache.clone(), identity, status));
    let ended = sync.await;
    tracing::info!(subsystem_name = "manager", "Cache manager stopped");
    context.shutdown.trigger();
    context.inherited.sockets.close();
    cache.close();
    servers.ended().await;
    if tokio::time::timeout(LAST_WRITE, keeper).await.is_err() {
        tracing::warn!("The disk does not answer; what changed last is not kept");
    }
    // The next agent, if there is one, hears now that this one has ended.
    let handed = handover.await.map(|handed| handed.map(drop));
    match ended {
        Ok(result) => result.and(handed.unwrap_or(Ok(()))),
        Err(_) => Err(AgentError::internal("the sync loop panicked; the log has the place")),
    }
}

/// An agent that has something to serve.
struct Begun {
    syncer: Syncer,
    cache: Arc<cache::Cache>,
    link: Arc<ServerLink>,
    identity: Arc<TlsIdentity>,
}

/// What was kept or the server tells, ready to be served; none if the agent was asked to end first.
async fn begin(
    context: &Arc<Context>,
    status: &Arc<AgentStatus>,
    mut attested: attest::Attested,
) -> Result<Option<Begun>, AgentError> {
    let kept = restart::load(context, &mut attested).await;
    let own = restart::own_bundle(attested.bundle, kept.as_ref())?;
    let limit = context.settings.jwt_svid_cache_max_size;
    let (cache, writer) = cache::Cache::new(own, limit, context.clock.clone());
    let identity = Arc::new(TlsIdentity::empty());
    attested.svid.install(&identity)?;
    let link = Arc::new(server_link(context, cache.clone(), identity.clone())?);
    let mut syncer =
        Syncer::new(context.clone(), writer, link.clone(), identity.clone(), status.clone(), attested.svid);
    let begun = match kept {
        Some(kept) => syncer.resume(kept).await?,
        None => syncer.initialize().await?,
    };
    Ok(begun.then_some(Begun { syncer, cache, link, identity }))
}

/// Workloads are served all the same.
fn could_not_serve_metrics(error: &dyn std::fmt::Display) {
    tracing::warn!(subsystem_name = "telemetry", %error, "Could not serve metrics");
}

/// Metrics for Prometheus over TLS, where that is configured: with our SVID, or for clients with an SVID that ours verifies.
async fn metrics_over_tls(context: &Context, cache: Arc<cache::Cache>, own: Arc<TlsIdentity>) {
    let settings = &context.settings;
    let Some(prometheus) = &settings.telemetry.prometheus else { return };
    let Some(tls) = &prometheus.tls else { return };
    let tls = MetricsTls {
        files: tls.files.clone().map(|(certificate, key)| CertFiles { certificate, key }),
        own,
        client_ca: tls.client_ca_file.clone(),
        authorized: tls.authorized_spiffe_ids.clone(),
        bundles: cache,
        exchange: KeyExchange::post_quantum(settings.require_pq_kem),
    };
    let address = format!("{}:{}", prometheus.host, prometheus.port);
    let (metrics, clock) = (context.metrics.clone(), context.clock.clone());
    if let Err(error) = prometheus::serve(metrics, &address, tls, clock, &context.spawner).await {
        could_not_serve_metrics(&error);
    }
}

/// Metrics and health checks.
async fn listen_on_tcp(context: &Arc<Context>, status: &Arc<AgentStatus>) {
    if let Some(prometheus) = context.settings.telemetry.prometheus.as_ref().filter(|p| p.tls.is_none()) {
        let address = format!("{}:{}", prometheus.host, prometheus.port);
        let served = telemetry::serve_prometheus(context.metrics.clone(), &address, &context.spawner).await;
        if let Err(error) = served {
            could_not_serve_metrics(&listen_text(&address, &error));
        }
    }
    endpoints::start_health(context, status.clone());
}

/// Lets the agent that ran before go, and waits for the next one; gives the connection to it.
async fn hand_on(
    context: Arc<Context>,
    cache: Arc<cache::Cache>,
    identity: Arc<TlsIdentity>,
    status: Arc<AgentStatus>,
) -> Result<Option<finial_net::handover::Channel>, AgentError> {
    if context.inherited.is_from_agent() {
        if let Err(error) = context.inherited.ready().await {
            context.shutdown.trigger();
            return Err(error);
        }
        endpoints::wait_for_ports(&context.settings).await;
        listen_on_tcp(&context, &status).await;
        metrics_over_tls(&context, cache.clone(), identity).await;
    }
    Ok(handover::offer(&context, &cache, &status).await)
}

/// To bootstrap again is to attest again, which not every attestor allows.
fn check_rebootstrap(mode: RebootstrapMode, reattestable: bool) -> Result<(), AgentError> {
    const REFUSED: &str = "you have requested rebootstrap support but the NodeAttestor plugin or the spire server \
                           configuration is not allowing it";
    match mode {
        RebootstrapMode::Always if !reattestable => Err(AgentError::internal(REFUSED)),
        RebootstrapMode::Auto if !reattestable => {
            tracing::warn!("{REFUSED}. Disabling");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The connection to the server, as ourselves. It trusts what the cache says at the time of each handshake.
fn server_link(
    context: &Context,
    cache: Arc<cache::Cache>,
    identity: Arc<TlsIdentity>,
) -> Result<ServerLink, AgentError> {
    let policy = PeerPolicy::Exact(context.settings.trust_domain.server_id());
    let config = client_config_with(
        context.key_exchange(),
        Some(identity.clone()),
        ServerAuth::Spiffe { bundles: cache, policy },
        context.clock.clone(),
    );
    let config = Arc::new(config.map_err(|e| AgentError::internal(format!("create server client: {e}")).because(e))?);
    let handshakes = Handshakes::new(config, identity.signs_elsewhere(), &context.spawner);
    let address = context.server_address();
    Ok(ServerLink::new(move || tls_channel(&address, handshakes.clone())))
}
