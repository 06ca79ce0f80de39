//! A health service that remembers who called.
#![allow(dead_code, missing_docs)] // each test file uses its part

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
pub struct Seen {
    pub unix: Vec<PeerInfo>,
    pub tls: Vec<TlsPeer>,
}

#[derive(Clone, Default)]
pub struct Recorder(pub Arc<Mutex<Seen>>);

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

pub fn service(recorder: &Recorder) -> HealthServer<Recorder> {
    HealthServer::new(recorder.clone())
}

/// Nothing here takes long; what does is stuck.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("in time")
}
