//! Where brokers connect: mTLS, the agent's own X.509-SVID against theirs.

use super::{BrokerApi, SECURITY_HEADER, SUBSYSTEM};
use crate::Context;
use crate::cache::Cache;
use crate::endpoints::{REQUEST_BYTES_MAX, Shared, bind, serve, server};
use crate::error::AgentError;
use crate::reflection;
use crate::workload_api::check_header;
use finial_config::BrokerSettings;
use finial_crypto::TrustRoots;
use finial_crypto::tls::{BundleSource, ClientAuth, PeerPolicy, TlsIdentity, server_config_with};
use finial_net::{Handshakes, Limits, tls, unix_tls};
use finial_proto::broker::api_server::ApiServer;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic::server::NamedService;
use tonic::{Request, Status};

/// When a connection is cut off: a broker proves with the next one that it still is who it was.
pub(crate) const LIFETIME: Duration = Duration::from_secs(60 * 60);
/// When it is asked to begin no more calls on a connection.
const ASKED_TO_END: Duration = Duration::from_secs(50 * 60);

/// Brokers may be of any trust domain whose bundle the agent has.
struct KnownDomains(Arc<Cache>);

impl BundleSource for KnownDomains {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        let snapshot = self.0.snapshot();
        let mut all = snapshot.bundles.all();
        all.find(|b| b.bundle.trust_domain.as_str() == trust_domain).map(|b| b.roots.clone())
    }
}

fn with_header(request: Request<()>) -> Result<Request<()>, Status> {
    check_header(&request, SECURITY_HEADER)?;
    Ok(request)
}

fn never(_: Request<()>) -> Result<Request<()>, Status> {
    Err(Status::permission_denied("server reflection is only available over Unix sockets"))
}

/// Listens where it was told to, until shutdown.
pub(crate) fn start(
    context: &Arc<Context>,
    shared: &Shared,
    identity: &Arc<TlsIdentity>,
    settings: &BrokerSettings,
) -> Result<Vec<JoinHandle<()>>, AgentError> {
    if settings.brokers.is_empty() {
        return Err(AgentError::internal("at least one broker is required"));
    }
    let ids = settings.brokers.iter().map(|broker| broker.id.clone()).collect();
    let clients = ClientAuth {
        bundles: Arc::new(KnownDomains(shared.cache.clone())),
        policy: PeerPolicy::AnyOf(ids),
        required: true,
    };
    let config = server_config_with(context.key_exchange(), identity.clone(), Some(clients), context.clock.clone());
    let failed = |e: &dyn std::fmt::Display| AgentError::internal(format!("failed to create broker endpoints: {e}"));
    let config = Arc::new(config.map_err(|e| failed(&e))?);
    let handshakes = Handshakes::new(config, identity.signs_elsewhere(), &context.spawner);
    let Shared { cache, attestation, jwt, .. } = shared;
    let clock = context.clock.clone();
    let api = BrokerApi::new(&settings.brokers, cache.clone(), attestation.clone(), jwt.clone(), clock);
    let router = |reflection: reflection::Check| {
        let service = ApiServer::new(api.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        let router = server().max_connection_age(ASKED_TO_END).add_service(service);
        reflection::add(router, &[ApiServer::<BrokerApi>::NAME], reflection)
    };
    let limits = Limits { lifetime: Some(LIFETIME), ..Limits::default() };
    let stopping = || {
        let shutdown = context.shutdown.clone();
        async move { shutdown.cancelled().await }
    };
    let mut servers = Vec::new();
    if let Some(path) = &settings.socket_path {
        let incoming = bind(context, path, 0o770, 0o755, limits)?;
        let incoming = unix_tls::secured(incoming, handshakes.clone(), limits.silence);
        tracing::info!(subsystem_name = SUBSYSTEM, network = "unix", address = %path.display(), "Starting SPIFFE Broker Endpoint");
        let serving = router(with_header).serve_with_incoming_shutdown(incoming, stopping());
        servers.push(context.spawner.spawn("broker-api", serve(serving)));
    }
    if let Some(address) = settings.bind_address {
        let listen = |e: std::io::Error| {
            AgentError::internal(format!("failed to listen on broker address \"{address}\": {e}")).because(e)
        };
        let listener = context.inherited.sockets.tcp(address).map_err(listen)?;
        let spawner = context.spawner.clone();
        let incoming = tls::TlsIncoming::new(listener, handshakes, limits, spawner).map_err(listen)?;
        tracing::info!(subsystem_name = SUBSYSTEM, network = "tcp", address = %incoming.local_addr(), "Starting SPIFFE Broker Endpoint");
        let serving = router(never).serve_with_incoming_shutdown(incoming, stopping());
        servers.push(context.spawner.spawn("broker-api-tcp", serve(serving)));
    }
    Ok(servers)
}
