//! Health: over gRPC on the public socket, and for the HTTP listener. Both really call the Workload API.

use crate::status::AgentStatus;
use finial_net::client::uds_channel;
use finial_proto::health::health_check_response::ServingStatus;
use finial_proto::health::health_server::Health;
use finial_proto::health::{HealthCheckRequest, HealthCheckResponse};
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{X509BundlesRequest, X509svidRequest};
use finial_runtime::health::{Check, State};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "endpoints";

/// How long our own answer may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// gRPC health on the public socket.
pub(crate) struct HealthApi {
    /// The public socket; none = the Workload API is off, and all is well.
    pub(crate) socket: Option<PathBuf>,
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    request
}

/// Connects anew, as a workload would, and makes one call.
async fn probe<F>(socket: &PathBuf, call: impl FnOnce(SpiffeWorkloadApiClient<Channel>) -> F) -> Result<(), Status>
where
    F: Future<Output = Result<(), Status>>,
{
    let client = SpiffeWorkloadApiClient::new(uds_channel(socket));
    match tokio::time::timeout(PROBE_TIMEOUT, call(client)).await {
        Ok(result) => result,
        Err(_) => Err(Status::unavailable("workload api is unavailable")),
    }
}

#[tonic::async_trait]
impl Health for HealthApi {
    async fn check(&self, asked: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !asked.get_ref().service.is_empty() {
            return Err(Status::invalid_argument("per-service health is not supported"));
        }
        let mut status = ServingStatus::Serving;
        if let Some(socket) = &self.socket {
            let probed = probe(socket, |mut client| async move {
                client.fetch_x509svid(request(X509svidRequest {})).await?.into_inner().message().await.map(drop)
            });
            // Most likely no entry is meant for the agent: that is well, too.
            if let Err(error) = probed.await
                && error.code() != Code::PermissionDenied
            {
                tracing::warn!(subsystem_name = SUBSYSTEM, reason = "unable to fetch X.509 context from Workload API", %error, "Health check failed");
                status = ServingStatus::NotServing;
            }
        }
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = tokio_stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("method Watch not implemented"))
    }
}

/// The agent's part in `/live` and `/ready`.
pub(crate) struct AgentCheck {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) status: Arc<AgentStatus>,
}

#[async_trait::async_trait]
impl Check for AgentCheck {
    async fn check(&self) -> State {
        let started = self.status.is_started();
        let Some(socket) = &self.socket else {
            return State { started: Some(started), ready: started, live: true, ..State::well() };
        };
        let probed = probe(socket, |mut client| async move {
            client.fetch_x509_bundles(request(X509BundlesRequest {})).await?.into_inner().message().await.map(drop)
        });
        let away = matches!(probed.await, Err(status) if status.code() == Code::Unavailable);
        let details = |away: bool| {
            if away {
                serde_json::json!({ "make_new_x509_err": "workload api is unavailable" })
            } else {
                serde_json::json!({})
            }
        };
        let mut ready_details = details(away);
        // Served is served: a node is not to be drained because its server is away.
        if self.status.is_away()
            && let Some(map) = ready_details.as_object_mut()
        {
            map.insert("degraded".to_owned(), "the server does not answer; serving from the cache".into());
            map.insert("reason".to_owned(), self.status.away_because().into());
            map.insert("last_sync_success".to_owned(), self.status.last_sync().into());
        }
        State {
            started: Some(started),
            ready: !away,
            live: !started || !away,
            ready_details,
            live_details: details(started && away),
        }
    }
}
