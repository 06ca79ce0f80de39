//! `spire.api.server.debug.v1.Debug`: what a running server says of itself, on the local socket only.

use super::{Api, Service, count32};
use crate::authz::{Permit, method};
use finial_core::{ErrorKind, UnixSeconds};
use finial_crypto::Certificate;
use finial_proto::convert::id_to_proto;
use finial_proto::server::debug as pb;
use finial_proto::server::debug::get_info_response::Cert;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Request, Response, Status, async_trait};

/// How long an answer is given again.
const KEPT: Duration = Duration::from_secs(5);

/// The last answer, and when the server began.
pub struct InfoCache {
    began: UnixSeconds,
    last: Mutex<Option<(Instant, pb::GetInfoResponse)>>,
}

impl InfoCache {
    /// For a server that began then.
    pub fn new(began: UnixSeconds) -> Self {
        Self { began, last: Mutex::default() }
    }
}

impl Api {
    async fn get_info(
        &self,
        permit: Permit<method::GetInfo>,
        _: pb::GetInfoRequest,
    ) -> Result<pb::GetInfoResponse, Status> {
        let now = Instant::now();
        let last = self.info.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, answer)) = last.filter(|(at, _)| now.duration_since(*at) < KEPT) {
            let _ = at;
            return Ok(answer);
        }
        let answer = pb::GetInfoResponse {
            svid_chain: self.svid_chain(&permit)?,
            uptime: count32(self.clock.now() - self.info.began),
            agents_count: count32(self.nodes.count()),
            entries_count: count32(self.entries.count()),
            federated_bundles_count: count32(self.bundles.all().len()),
        };
        *self.info.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, answer.clone()));
        Ok(answer)
    }

    /// The server's SVID, what it hangs from, and the root of the bundle that signed the last of it.
    fn svid_chain(&self, permit: &Permit<method::GetInfo>) -> Result<Vec<Cert>, Status> {
        let own = self.bundles.own();
        let own = own.ok_or_else(|| permit.fail(ErrorKind::NotFound, "trust domain bundle not found"))?;
        let chain = self.svid.state().map(|state| state.chain.clone()).unwrap_or_default();
        let parsed: Result<Vec<_>, _> = chain.into_iter().map(Certificate::parse).collect();
        let mut parsed = parsed.map_err(|e| permit.fail_with(ErrorKind::Internal, "failed to parse SVID", e))?;
        let roots = own.roots.as_ref().map(|roots| roots.certificates()).unwrap_or_default();
        let root = parsed.last().and_then(|last| {
            roots.iter().find(|root| {
                root.subject_der() == last.issuer_der()
                    && root.public_key().is_ok_and(|key| last.verify_signed_by(&key).is_ok())
            })
        });
        parsed.extend(root.cloned());
        Ok(parsed.iter().map(describe).collect())
    }
}

fn describe(certificate: &Certificate) -> Cert {
    Cert {
        id: certificate.spiffe_id().ok().map(|id| id_to_proto(&id)),
        expires_at: certificate.not_after(),
        subject: certificate.subject().map(|name| name.to_string()).unwrap_or_default(),
    }
}

#[async_trait]
impl pb::debug_server::Debug for Service {
    async fn get_info(&self, request: Request<pb::GetInfoRequest>) -> Result<Response<pb::GetInfoResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_info(permit, request)).await
    }
}
