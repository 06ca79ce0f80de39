//! The sockets: Workload API, SDS and health on the public one; debug, logger and
//! delegated identity on the admin one; `/live` and `/ready` on TCP.

use crate::Context;
use crate::admin::{DebugApi, LoggerApi};
use crate::broker;
use crate::cache::Cache;
use crate::delegated::DelegatedApi;
use crate::error::AgentError;
use crate::explain::ExplainApi;
use crate::health::{AgentCheck, HealthApi};
use crate::reflection;
use crate::sds::SdsApi;
use crate::status::AgentStatus;
use crate::sync::client::ServerLink;
use crate::sync::jwt::JwtFetcher;
use crate::sync::wit::WitFetcher;
use crate::workload_api::{Attestation, CallerConnection, Settings, Waiting, WorkloadApi};
use finial_config::AgentSettings;
use finial_crypto::tls::TlsIdentity;
use finial_net::Limits;
use finial_net::unix::{self, BindError, UnixIncoming};
use finial_proto::agent::debug::debug_server::DebugServer;
use finial_proto::agent::delegatedidentity::delegated_identity_server::DelegatedIdentityServer;
use finial_proto::agent::explain::explain_server::ExplainServer;
use finial_proto::agent::logger::logger_server::LoggerServer;
use finial_proto::envoy::secret::server::SecretDiscoveryServiceServer;
use finial_proto::health::health_server::HealthServer;
use finial_proto::workload::server::SpiffeWorkloadApiServer;
use finial_runtime::health::{Health, Settings as HealthSettings};
use finial_runtime::log::LogHandle;
use futures::StreamExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::Router;

/// As log lines say it.
pub(crate) const SUBSYSTEM: &str = "endpoints";

/// The health listener starts when the agent is ready, at the latest after this time.
const HEALTH_LISTENS_AFTER: Duration = Duration::from_secs(8);
/// How long open calls may take to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Between two looks at a port that is not free yet.
const PORT_POLL: Duration = Duration::from_millis(50);
/// Streams on one connection.
const STREAMS_MAX: u32 = 1_000;
/// Headers of one request, bytes.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// A request to the agent, bytes: the largest is a token to validate.
pub(crate) const REQUEST_BYTES_MAX: usize = 256 << 10;

/// Listeners at work.
pub(crate) struct Servers(Vec<JoinHandle<()>>);

impl Servers {
    /// Waits for them to end, for a while.
    pub(crate) async fn ended(self) {
        let all = futures::future::join_all(self.0);
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            tracing::debug!(subsystem_name = SUBSYSTEM, "Some calls did not end in time");
        }
    }
}

pub(crate) fn server() -> Server {
    Server::builder().max_concurrent_streams(STREAMS_MAX).http2_max_header_list_size(HEADERS_BYTES_MAX)
}

/// What the APIs have in common.
pub(crate) struct Shared {
    pub(crate) cache: Arc<Cache>,
    pub(crate) attestation: Arc<Attestation>,
    pub(crate) jwt: Arc<JwtFetcher>,
    wit: Option<Arc<WitFetcher>>,
}

impl Shared {
    fn new(context: &Context, cache: Arc<Cache>, link: Arc<ServerLink>) -> Self {
        let attestation = Attestation {
            attestors: context.plugins.workload_attestors.clone(),
            cache: cache.clone(),
            metrics: context.metrics.clone(),
        };
        let enabled = context.settings.wit_svids_enabled;
        let wit = enabled.then(|| Arc::new(WitFetcher::new(context, cache.clone(), link.clone())));
        let jwt = JwtFetcher {
            cache: cache.clone(),
            link,
            clock: context.clock.clone(),
            rotation: context.rotation,
            jitter: context.jitter.clone(),
            cache_hit_timeout: context.settings.jwt_svid_cache_hit_timeout,
        };
        Self { cache, attestation: Arc::new(attestation), jwt: Arc::new(jwt), wit }
    }
}

/// Opens the sockets and serves them until shutdown.
pub(crate) fn start(
    context: &Arc<Context>,
    cache: Arc<Cache>,
    (link, identity): (Arc<ServerLink>, Arc<TlsIdentity>),
    status: Arc<AgentStatus>,
    log: Option<LogHandle>,
    started: Instant,
) -> Result<Servers, AgentError> {
    let mut servers = Vec::new();
    let shared = Shared::new(context, cache, link);
    context.spawner.spawn("jwt-renewals", shared.jwt.clone().renew_ahead(context.shutdown.clone()));
    match &context.settings.socket_path {
        Some(path) => servers.push(start_public(context, &shared, path)?),
        None => {
            tracing::info!(
                subsystem_name = SUBSYSTEM,
                apis = "Workload and SDS APIs",
                "Skipping agent APIs because public endpoint is disabled"
            )
        }
    }
    if let Some(path) = &context.settings.admin_socket_path {
        servers.push(start_admin(context, &shared, status, log, started, path)?);
    }
    if let Some(settings) = &context.settings.broker {
        servers.extend(broker::start(context, &shared, &identity, settings)?);
    }
    context.inherited.sockets.close_unused();
    Ok(Servers(servers))
}

pub(crate) fn bind(
    context: &Context,
    path: &Path,
    mode: u32,
    dir_mode: u32,
    all: Limits,
) -> Result<UnixIncoming, AgentError> {
    // One user must not be able to take all places.
    let limits = Limits { connections_per_peer: all.connections / 2, ..all };
    let sockets = &context.inherited.sockets;
    let bound = match sockets.take(path).map(|socket| unix::adopt(socket, path, mode, limits)) {
        Some(Ok(adopted)) => Ok(adopted),
        Some(Err(error @ BindError::TooOpen { .. })) => Err(error),
        Some(Err(error)) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Opening the socket anew");
            unix::bind(path, mode, dir_mode, limits)
        }
        None => unix::bind(path, mode, dir_mode, limits),
    };
    let mut bound = bound.map_err(|e| AgentError::internal(format!("create UDS listener: {e}")).because(e))?;
    sockets.add(bound.listening());
    Ok(bound)
}

/// Waits until the agent that ran before has let go of its TCP ports, for a while.
pub(crate) async fn wait_for_ports(settings: &AgentSettings) {
    let until = Instant::now() + DRAIN;
    let metrics = settings.telemetry.prometheus.as_ref().map(|p| (p.host.as_str(), p.port));
    let health = &settings.health;
    let health = health.listener_enabled.then_some((health.bind_address.as_str(), health.bind_port));
    let broker = settings.broker.as_ref().and_then(|broker| broker.bind_address);
    let broker = broker.map(|address| (address.ip().to_string(), address.port()));
    let broker = broker.as_ref().map(|(ip, port)| (ip.as_str(), *port));
    for address in metrics.into_iter().chain(health).chain(broker) {
        while tokio::net::TcpListener::bind(address).await.is_err() && Instant::now() < until {
            tokio::time::sleep(PORT_POLL).await;
        }
    }
}

fn start_public(context: &Arc<Context>, shared: &Shared, path: &Path) -> Result<JoinHandle<()>, AgentError> {
    let settings = &context.settings;
    let incoming = bind(context, path, 0o777, 0o755, Limits::default())?;
    let Shared { cache, attestation, jwt, wit } = shared;
    let waiting = settings.wait_for_entry.map(Waiting::new);
    let (sds, limits) = (settings.sds.clone(), settings.rate_limits);
    let sds = SdsApi::new(sds, limits, waiting.clone(), cache.clone(), attestation.clone());
    let api = WorkloadApi::new(
        Settings {
            trust_domain: settings.trust_domain.clone(),
            allow_unauthenticated_verifiers: settings.allow_unauthenticated_verifiers,
            allowed_foreign_jwt_claims: settings.allowed_foreign_jwt_claims.iter().cloned().collect(),
            log_selectors: settings.log_selectors.clone(),
            rate_limits: settings.rate_limits,
            waiting,
        },
        cache.clone(),
        attestation.clone(),
        jwt.clone(),
        wit.clone(),
        context.clock.clone(),
    );
    let (on, sds_on) = (!settings.disable_workload_api, !settings.disable_sds_api);
    let health = HealthApi { socket: on.then(|| path.to_owned()) };
    let mut router = server().add_service(HealthServer::new(health).max_decoding_message_size(REQUEST_BYTES_MAX));
    let mut offered = vec![HealthServer::<HealthApi>::NAME];
    if on {
        offered.push(SpiffeWorkloadApiServer::<WorkloadApi>::NAME);
        router = router.add_service(SpiffeWorkloadApiServer::new(api).max_decoding_message_size(REQUEST_BYTES_MAX));
    }
    if sds_on {
        offered.push(SecretDiscoveryServiceServer::<SdsApi>::NAME);
        router =
            router.add_service(SecretDiscoveryServiceServer::new(sds).max_decoding_message_size(REQUEST_BYTES_MAX));
    }
    // As in SPIRE: without the header that the Workload API asks for.
    let router = reflection::add(router, &offered, Ok);
    let apis = match (on, sds_on) {
        (true, true) => "Workload and SDS APIs",
        (true, false) => "Workload API",
        (false, true) => "SDS API",
        (false, false) => "no APIs",
    };
    tracing::info!(subsystem_name = SUBSYSTEM, network = "unix", address = %path.display(), apis, "Starting agent APIs");
    let incoming = incoming.map(|connection| connection.map(CallerConnection::new));
    let shutdown = context.shutdown.clone();
    Ok(context.spawner.spawn("workload-api", async move {
        serve(router.serve_with_incoming_shutdown(incoming, async move { shutdown.cancelled().await })).await;
        tracing::info!(subsystem_name = SUBSYSTEM, apis, "Stopping agent APIs");
    }))
}

fn start_admin(
    context: &Arc<Context>,
    shared: &Shared,
    status: Arc<AgentStatus>,
    log: Option<LogHandle>,
    started: Instant,
    path: &Path,
) -> Result<JoinHandle<()>, AgentError> {
    let incoming = bind(context, path, 0o770, 0o750, Limits::default())?;
    let Shared { cache, attestation, jwt, .. } = shared;
    let waits = context.settings.wait_for_entry.map(|wait| wait.longest);
    let explain = ExplainApi::new(cache.clone(), attestation.clone(), status.clone(), context.clock.clone(), waits);
    let debug = DebugApi::new(cache.clone(), status, context.clock.clone(), started, context.metrics.clone());
    let delegates = &context.settings.authorized_delegates;
    let delegated = DelegatedApi::new(delegates, cache.clone(), attestation.clone(), jwt.clone());
    let delegated = DelegatedIdentityServer::new(delegated).max_decoding_message_size(REQUEST_BYTES_MAX);
    let mut router: Router = server()
        .add_service(DebugServer::new(debug).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(ExplainServer::new(explain).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(delegated);
    if let Some(log) = log {
        router = router.add_service(
            LoggerServer::new(LoggerApi::new(log, context.metrics.clone()))
                .max_decoding_message_size(REQUEST_BYTES_MAX),
        );
    }
    tracing::info!(subsystem_name = SUBSYSTEM, network = "unix", address = %path.display(), "Starting Admin APIs");
    let incoming = incoming.map(|connection| connection.map(CallerConnection::new));
    let shutdown = context.shutdown.clone();
    Ok(context.spawner.spawn("admin-api", async move {
        serve(router.serve_with_incoming_shutdown(incoming, async move { shutdown.cancelled().await })).await;
        tracing::info!(subsystem_name = SUBSYSTEM, "Admin APIs have stopped");
    }))
}

pub(crate) async fn serve(serving: impl Future<Output = Result<(), tonic::transport::Error>>) {
    if let Err(error) = serving.await {
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "An API ended");
    }
}

/// Starts the HTTP health listener, soon.
pub(crate) fn start_health(context: &Arc<Context>, status: Arc<AgentStatus>) {
    let settings = &context.settings;
    if !settings.health.listener_enabled {
        return;
    }
    let health = Health::default();
    let check = AgentCheck { socket: settings.socket_path.clone(), status: status.clone() };
    if let Err(error) = health.add("agent", Arc::new(check)) {
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "failed adding healthcheck");
        return;
    }
    let (host, port) = (&settings.health.bind_address, settings.health.bind_port);
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let listen = HealthSettings {
        address: Some(address),
        live_path: settings.health.live_path.clone(),
        ready_path: settings.health.ready_path.clone(),
    };
    let (spawner, shutdown) = (context.spawner.clone(), context.shutdown.clone());
    context.spawner.spawn("health-start", async move {
        tokio::select! {
            () = status.started() => {}
            () = tokio::time::sleep(HEALTH_LISTENS_AFTER) => {}
            () = shutdown.cancelled() => return,
        }
        let _ = health.start(&listen, &spawner).await; // it logs what fails, and goes on without
    });
}
