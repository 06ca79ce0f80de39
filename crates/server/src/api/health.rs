//! `grpc.health.v1.Health`, on the local socket only: the server serves while it has its bundle.

use super::stream::Outlet;
use super::{Api, Driven, Service};
use crate::authz::{Call, Permit, method};
use finial_core::ErrorKind;
use finial_proto::health as pb;
use finial_proto::health::health_check_response::ServingStatus;
use tonic::{Request, Response, Status, async_trait};

impl Api {
    fn check_service(call: &Call, request: &pb::HealthCheckRequest) -> Result<(), Status> {
        if request.service.is_empty() {
            return Ok(());
        }
        Err(call.fail(ErrorKind::InvalidArgument, "per-service health is not supported"))
    }

    fn serving(&self) -> ServingStatus {
        match self.bundles.own() {
            Some(_) => ServingStatus::Serving,
            None => {
                tracing::warn!(reason = "bundle is missing", "Health check failed");
                ServingStatus::NotServing
            }
        }
    }

    async fn check_health(
        &self,
        permit: Permit<method::Check>,
        request: pb::HealthCheckRequest,
    ) -> Result<pb::HealthCheckResponse, Status> {
        Self::check_service(&permit, &request)?;
        Ok(pb::HealthCheckResponse { status: self.serving().into() })
    }

    /// Says how it is now, and then at each change. SPIRE does not implement this.
    async fn watch_health(
        &self,
        permit: Permit<method::Watch>,
        request: pb::HealthCheckRequest,
        outlet: Outlet<pb::HealthCheckResponse>,
    ) -> Result<(), Status> {
        Self::check_service(&permit, &request)?;
        let mut changes = self.bundles.changes();
        let mut told = None;
        loop {
            let status = self.serving();
            if told.replace(status) != Some(status) {
                outlet.send(pb::HealthCheckResponse { status: status.into() }).await?;
            }
            let changed = tokio::select! {
                changed = changes.changed() => changed.is_ok(),
                () = self.shutdown.cancelled() => false,
            };
            if !changed {
                return Err(Status::unavailable("the server is shutting down"));
            }
        }
    }
}

#[async_trait]
impl pb::health_server::Health for Service {
    async fn check(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<pb::HealthCheckResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.check_health(permit, request)).await
    }

    type WatchStream = Driven<pb::HealthCheckResponse>;

    async fn watch(&self, request: Request<pb::HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let service = self.clone();
        self.gate
            .answer_stream(request, |permit, request, outlet| async move {
                service.watch_health(permit, request, outlet).await
            })
            .await
    }
}
