//! `spire.api.agent.debug.v1.Debug`.

use crate::cache::Cache;
use crate::status::AgentStatus;
use crate::workload_api::{ApiNames, Calls};
use finial_core::Clock;
use finial_crypto::{Certificate, verify_x509_svid};
use finial_proto::agent::debug::debug_server::Debug;
use finial_proto::agent::debug::get_info_response::Cert;
use finial_proto::agent::debug::{GetInfoRequest, GetInfoResponse};
use finial_proto::convert::id_to_proto;
use finial_runtime::Metrics;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

/// As log lines say it.
const SUBSYSTEM: &str = "debug_api";

/// For how long an answer is given again.
const ANSWER_KEPT: Duration = Duration::from_secs(5);

/// What a running agent says of itself.
pub(crate) struct DebugApi {
    cache: Arc<Cache>,
    status: Arc<AgentStatus>,
    clock: Arc<dyn Clock>,
    started: Instant,
    answer: Mutex<Option<(Instant, GetInfoResponse)>>,
    calls: Calls,
}

impl DebugApi {
    pub(crate) fn new(
        cache: Arc<Cache>,
        status: Arc<AgentStatus>,
        clock: Arc<dyn Clock>,
        started: Instant,
        metrics: Metrics,
    ) -> Self {
        let calls = Calls::new(metrics, ApiNames::DEBUG);
        Self { cache, status, clock, started, answer: Mutex::new(None), calls }
    }

    fn kept_or_new(&self) -> Result<GetInfoResponse, Status> {
        let kept = self.answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, answer)) = kept.filter(|(at, _)| at.elapsed() < ANSWER_KEPT) {
            return Ok(answer);
        }
        let answer = self.info()?;
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), answer.clone()));
        Ok(answer)
    }

    #[allow(deprecated)] // older tools read `svids_count`
    fn info(&self) -> Result<GetInfoResponse, Status> {
        let snapshot = self.cache.snapshot();
        let x509 = i32::try_from(snapshot.svid_count()).unwrap_or(i32::MAX);
        Ok(GetInfoResponse {
            svid_chain: self.chain()?,
            uptime: i32::try_from(self.started.elapsed().as_secs()).unwrap_or(i32::MAX),
            svids_count: x509,
            last_sync_success: self.status.last_sync(),
            cached_x509_svids_count: x509,
            cached_jwt_svids_count: i32::try_from(self.cache.jwt.len()).unwrap_or(i32::MAX),
            cached_svidstore_x509_svids_count: i32::try_from(snapshot.for_stores().count()).unwrap_or(i32::MAX),
        })
    }

    /// The agent's SVID up to its root.
    fn chain(&self) -> Result<Vec<Cert>, Status> {
        let failed = |e: String| {
            tracing::error!(subsystem_name = SUBSYSTEM, error = %e, "Failed to verify agent SVID");
            Status::internal(format!("failed to verify agent SVID: {e}"))
        };
        let chain = self.status.chain();
        let roots = self.cache.snapshot().bundles.own.roots.clone();
        verify_x509_svid(&chain, &roots, self.clock.now()).map_err(|e| failed(e.to_string()))?;
        let parsed: Result<Vec<_>, _> = chain.iter().map(|der| Certificate::parse(der.clone())).collect();
        let mut parsed = parsed.map_err(|e| failed(e.to_string()))?;
        let top = parsed.last().map(|c| c.authority_key_id().map(<[u8]>::to_vec));
        parsed.extend(
            roots
                .certificates()
                .iter()
                .find(|r| top.as_ref().is_some_and(|k| k.as_deref() == r.subject_key_id()))
                .cloned(),
        );
        Ok(parsed.iter().map(cert).collect())
    }
}

fn cert(certificate: &Certificate) -> Cert {
    Cert {
        id: certificate.spiffe_id().ok().as_ref().map(id_to_proto),
        expires_at: certificate.not_after(),
        subject: certificate.subject().map(|s| s.to_string()).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl Debug for DebugApi {
    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        let mut call = self.calls.begin("rpc.debug.get_info", false);
        let answer = self.kept_or_new();
        call.finish_with(&answer);
        answer.map(Response::new)
    }
}
