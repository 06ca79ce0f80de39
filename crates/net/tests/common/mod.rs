//! A health service that remembers who called.
// Each test file uses its part.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]

use finial_net::PeerInfo;
use finial_net::tls::TlsPeer;
use finial_proto::health::health_server::{Health, HealthServer};
use finial_proto::health::{HealthCheckRequest, HealthCheckResponse};
use futures::stream::BoxStream;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tonic::{Request, Response, Status};

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) unix: Vec<PeerInfo>,
    pub(crate) tls: Vec<TlsPeer>,
}

#[derive(Clone, Default)]
pub(crate) struct Recorder(pub(crate) Arc<Mutex<Seen>>);

#[tonic::async_trait]
impl Health for Recorder {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let mut seen = self.0.lock().unwrap();
        seen.unix.extend(request.extensions().get::<PeerInfo>().cloned());
        seen.tls.extend(request.extensions().get::<TlsPeer>().cloned());
        Ok(Response::new(HealthCheckResponse { status: 1 }))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

pub(crate) fn service(recorder: &Recorder) -> HealthServer<Recorder> {
    HealthServer::new(recorder.clone())
}

/// Nothing here takes long; what does is stuck.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("in time")
}
