//! What plugins may ask of us: metrics and, of a server, agents and its own identity.

use bytes::Bytes;
use finial_core::{Clock, Secret};
use finial_net::Limits;
use finial_net::unix::bind;
use finial_plugin::{HostServices, PluginError, ServerHost};
use finial_proto::convert::code_of;
use finial_proto::plugin::host_agent_store::agent_store_server::{AgentStore, AgentStoreServer};
use finial_proto::plugin::host_agent_store::{AgentInfo, GetAgentInfoRequest, GetAgentInfoResponse};
use finial_proto::plugin::host_identity_provider::identity_provider_server::{
    IdentityProvider, IdentityProviderServer,
};
use finial_proto::plugin::host_identity_provider::{FetchX509IdentityRequest, FetchX509IdentityResponse, X509Identity};
use finial_proto::plugin::host_metrics::metrics_server::{Metrics, MetricsServer};
use finial_proto::plugin::host_metrics::{
    AddSampleRequest, EmitKeyRequest, IncrCounterRequest, Label, MeasureSinceRequest, SetGaugeRequest,
};
use finial_proto::plugin::types::{Bundle, JwtKey, X509Certificate};
use finial_runtime::{Shutdown, Spawner};
use std::path::Path;
use std::sync::Arc;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

/// What is behind the services.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) services: Arc<HostServices>,
    pub(crate) clock: Arc<dyn Clock>,
    /// Plugins of agents are not told of what only servers have.
    pub(crate) of_server: bool,
}

impl Host {
    /// The services by name.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let mut names = vec![<MetricsServer<Self> as NamedService>::NAME];
        if self.of_server {
            names.push(<AgentStoreServer<Self> as NamedService>::NAME);
            names.push(<IdentityProviderServer<Self> as NamedService>::NAME);
        }
        names
    }

    /// Serves them on a socket until `stop`.
    pub(crate) fn serve(&self, socket: &Path, spawner: &Spawner, stop: Shutdown) -> Result<(), String> {
        let limits = Limits { connections: 16, connections_per_peer: 16, ..Limits::default() };
        let incoming = bind(socket, 0o600, 0o700, limits).map_err(|e| e.to_string())?;
        let mut router = tonic::transport::Server::builder().add_service(MetricsServer::new(self.clone()));
        if self.of_server {
            router = router.add_service(AgentStoreServer::new(self.clone()));
            router = router.add_service(IdentityProviderServer::new(self.clone()));
        }
        spawner.spawn("plugin host services", async move {
            // Not in order: the plugin, which is the only one to wait for, has ended.
            tokio::select! {
                served = router.serve_with_incoming(incoming) => {
                    if let Err(error) = served {
                        tracing::error!(%error, "Host services server failed");
                    }
                }
                () = stop.cancelled() => {}
            }
        });
        Ok(())
    }

    fn server(&self, service: &str) -> Result<&Arc<dyn ServerHost>, Status> {
        let absent = || Status::failed_precondition(format!("{service} host service has not been initialized"));
        self.services.server.get().ok_or_else(absent)
    }

    /// Hands a metric over, if there is anyone to take it.
    fn measure(
        &self,
        key: &[String],
        labels: &[Label],
        put: impl FnOnce(&finial_runtime::Metrics, &str, &[(&str, &str)]),
    ) -> Result<Response<()>, Status> {
        if let Some(metrics) = self.services.metrics.get() {
            let labels: Vec<_> = labels.iter().map(|l| (l.name.as_str(), l.value.as_str())).collect();
            put(metrics, &key.join("."), &labels);
        }
        Ok(Response::new(()))
    }
}

fn refused(error: &PluginError) -> Status {
    Status::new(code_of(error.kind), error.message.clone())
}

#[tonic::async_trait]
impl Metrics for Host {
    async fn set_gauge(&self, request: Request<SetGaugeRequest>) -> Result<Response<()>, Status> {
        let SetGaugeRequest { key, val, labels } = request.into_inner();
        self.measure(&key, &labels, |metrics, key, labels| metrics.gauge(key, val.into(), labels))
    }

    /// A key without a meaning; none of our sinks takes such.
    async fn emit_key(&self, _: Request<EmitKeyRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }

    async fn incr_counter(&self, request: Request<IncrCounterRequest>) -> Result<Response<()>, Status> {
        let IncrCounterRequest { key, val, labels } = request.into_inner();
        self.measure(&key, &labels, |metrics, key, labels| metrics.count(key, val.into(), labels))
    }

    async fn add_sample(&self, request: Request<AddSampleRequest>) -> Result<Response<()>, Status> {
        let AddSampleRequest { key, val, labels } = request.into_inner();
        self.measure(&key, &labels, |metrics, key, labels| metrics.sample(key, val.into(), labels))
    }

    async fn measure_since(&self, request: Request<MeasureSinceRequest>) -> Result<Response<()>, Status> {
        let MeasureSinceRequest { key, time, labels } = request.into_inner();
        let elapsed_ms = self.clock.now_ms() as f64 - time as f64 / 1e6;
        self.measure(&key, &labels, |metrics, key, labels| metrics.sample(key, elapsed_ms, labels))
    }
}

#[tonic::async_trait]
impl AgentStore for Host {
    async fn get_agent_info(
        &self,
        request: Request<GetAgentInfoRequest>,
    ) -> Result<Response<GetAgentInfoResponse>, Status> {
        let agent_id = request.into_inner().agent_id;
        if !self.server("AgentStore")?.has_agent(&agent_id).await.map_err(|e| refused(&e))? {
            return Err(Status::not_found("no such agent"));
        }
        Ok(Response::new(GetAgentInfoResponse { info: Some(AgentInfo { agent_id }) }))
    }
}

#[tonic::async_trait]
impl IdentityProvider for Host {
    async fn fetch_x509_identity(
        &self,
        _: Request<FetchX509IdentityRequest>,
    ) -> Result<Response<FetchX509IdentityResponse>, Status> {
        let identity = self.server("IdentityProvider")?.identity().await.map_err(|e| refused(&e))?;
        let bundle = bundle(&identity.bundle);
        let identity = X509Identity {
            cert_chain: identity.cert_chain.iter().map(|der| der.to_vec().into()).collect(),
            private_key: wiped(&identity.private_key),
        };
        Ok(Response::new(FetchX509IdentityResponse { identity: Some(identity), bundle: Some(bundle) }))
    }
}

/// A key for a message, wiped with it.
pub(crate) fn wiped(key: &Secret<Vec<u8>>) -> Bytes {
    Bytes::from_owner(Zeroizing::new(key.expose().clone()))
}

/// As plugins are told of it.
pub(crate) fn bundle(bundle: &finial_core::Bundle) -> Bundle {
    let certificate =
        |a: &finial_core::X509Authority| X509Certificate { asn1: a.der.to_vec().into(), tainted: a.tainted };
    Bundle {
        trust_domain: bundle.trust_domain.as_str().to_owned(),
        x509_authorities: bundle.x509_authorities.iter().map(certificate).collect(),
        jwt_authorities: bundle.jwt_authorities.iter().map(jwt_key).collect(),
        refresh_hint: bundle.refresh_hint,
        sequence_number: bundle.sequence_number,
        wit_authorities: Vec::new(),
    }
}

/// As plugins carry it.
pub(crate) fn jwt_key(key: &finial_core::JwtAuthority) -> JwtKey {
    JwtKey {
        public_key: key.public_key.to_vec().into(),
        key_id: key.key_id.clone(),
        expires_at: key.expires_at,
        tainted: key.tainted,
    }
}
