//! `grpc.health.v1.Health`, on the local socket only: the server serves while it has its bundle.

use super::{Api, Driven, Service};
use crate::authz::{Permit, method};
use finial_core::ErrorKind;
use finial_proto::health as pb;
use finial_proto::health::health_check_response::ServingStatus;
use tonic::{Request, Response, Status, async_trait};

impl Api {
    async fn check_health(
        &self,
        permit: Permit<method::Check>,
        request: pb::HealthCheckRequest,
    ) -> Result<pb::HealthCheckResponse, Status> {
        if !request.service.is_empty() {
            return Err(permit.fail(ErrorKind::InvalidArgument, "per-service health is not supported"));
        }
        let status = match self.bundles.own() {
            Some(_) => ServingStatus::Serving,
            None => {
                tracing::warn!(reason = "bundle is missing", "Health check failed");
                ServingStatus::NotServing
            }
        };
        Ok(pb::HealthCheckResponse { status: status.into() })
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
        self.gate
            .unary(request, |permit: Permit<method::Watch>, _| async move {
                Err(permit.fail(ErrorKind::Unimplemented, "method Watch not implemented"))
            })
            .await
    }
}
