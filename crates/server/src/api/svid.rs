//! `spire.api.server.svid.v1.SVID`: issuing.

use super::agent::svid_to_proto;
use super::dns::{check_dns_name, wildcard_overlap};
use super::{Api, IdRule, Service, check_id, id_from_proto, ok};
use crate::authz::{Call, Identity, Peer, Permit, method};
use crate::entries::Indexed;
use crate::issue::{IssueError, JwtRequest, X509Request};
use finial_core::{ErrorKind, SpiffeId, UnixSeconds};
use finial_crypto::{Csr, sha256_hex};
use finial_proto::convert::id_to_proto;
use finial_proto::server::svid as pb;
use finial_proto::server::svid::batch_new_x509svid_response::Result as NewX509Result;
use finial_proto::types;
use tonic::{Request, Response, Status, async_trait};

/// Longest audience list, in bytes over all of it.
const AUDIENCE_BYTES_MAX: usize = 16 * 1024;
/// After so many signatures in a row the other tasks of the thread get a turn (about a millisecond).
const SIGN_IN_A_ROW: usize = 16;

/// By which time an agent needs its signatures: when the first SVID that they replace ends, as it said. No claim takes an
/// agent further to the front than one whose SVIDs end now (0: there is none yet), nor behind the end of its own. SPIRE's
/// agents say nothing; what they renew ends about when their own does.
fn urgency(said: Option<UnixSeconds>, now: UnixSeconds, own: UnixSeconds) -> UnixSeconds {
    said.unwrap_or(own).min(own).max(now)
}

impl Api {
    async fn mint_x509svid(
        &self,
        permit: Permit<method::MintX509SVID>,
        request: pb::MintX509svidRequest,
    ) -> Result<pb::MintX509svidResponse, Status> {
        let invalid = |message| permit.fail(ErrorKind::InvalidArgument, message);
        let invalid_with =
            |message, e: &dyn std::fmt::Display| permit.fail_with(ErrorKind::InvalidArgument, message, e);
        if permit.audited() {
            permit.note("csr", sha256_hex(&request.csr));
            permit.note("ttl", request.ttl);
        }
        if request.csr.is_empty() {
            return Err(invalid("missing CSR"));
        }
        let csr = Csr::parse(&request.csr).map_err(|e| invalid_with("malformed CSR", &e))?;
        csr.verify_proof_of_possession().map_err(|e| invalid_with("failed to verify CSR signature", &e))?;
        let uri = match csr.uri_sans() {
            [] => return Err(invalid("CSR URI SAN is required")),
            [uri] => uri,
            _ => return Err(invalid("only one URI SAN is expected")),
        };
        let id = SpiffeId::parse(uri).map_err(|e| invalid_with("CSR URI SAN is invalid", &e))?;
        check_id(&self.trust_domain, &id, IdRule::Workload).map_err(|e| invalid_with("CSR URI SAN is invalid", &e))?;
        let names: Vec<&str> = csr.dns_names().iter().map(|name| &**name).collect();
        for name in &names {
            check_dns_name(name).map_err(|e| invalid_with("CSR DNS name is invalid", &e))?;
        }
        if let Some(name) = wildcard_overlap(&names) {
            let why = format!("name {name:?} overlaps with an existing wildcard name in the list: wildcard overlap");
            return Err(invalid_with("CSR DNS name contains a wildcard that covers another non-wildcard name", &why));
        }
        let subject = csr.subject().map_err(|e| invalid_with("malformed CSR", &e))?;
        let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        let wanted = X509Request {
            id: &id,
            public_key: csr.public_key(),
            dns_names: &names,
            ttl_seconds: i64::from(request.ttl),
            subject: Some(&subject),
        };
        let svid = self.issuer.workload_x509_svid(&wanted).await;
        let svid = svid.map_err(|e| permit.fail_with(ErrorKind::Internal, "failed to sign X509-SVID", e))?;
        if permit.audited() {
            permit.note("expires_at", crate::issue::Rfc3339(svid.not_after));
            permit.note("spiffe_id", &id);
            permit.note("dns_name", names.join(","));
            permit.note("subject", subject);
            permit.audit();
        }
        Ok(pb::MintX509svidResponse { svid: Some(svid_to_proto(&id, &svid)) })
    }

    async fn batch_new_x509svid(
        &self,
        permit: Permit<method::BatchNewX509SVID>,
        request: pb::BatchNewX509svidRequest,
        expiry: Option<UnixSeconds>,
    ) -> Result<pb::BatchNewX509svidResponse, Status> {
        let count = request.params.len();
        if count == 0 {
            return Err(permit.fail(ErrorKind::InvalidArgument, "missing parameters"));
        }
        permit.limit(count, "rejecting request due to certificate signing rate limiting").await?;
        let own = |peer: &Peer| {
            if let Peer::Remote { identity: Identity::Svid { not_after, .. }, .. } = peer { *not_after } else { 0 }
        };
        let urgency = urgency(expiry, self.clock.now(), own(permit.peer()));
        let turn = self.signing.turn(permit.caller_id()?.path(), urgency).await;
        let _turn = turn.map_err(|error| permit.fail(ErrorKind::Exhausted, &error.to_string()))?;
        permit.after_waiting()?;
        let (agent, selectors) = permit.agent()?;
        let ids = request.params.iter().map(|params| params.entry_id.as_str());
        let entries = self.entries.authorized_among(agent, &selectors, ids);
        let mut results = Vec::with_capacity(count);
        for (at, (params, entry)) in request.params.iter().zip(entries).enumerate() {
            if at % SIGN_IN_A_ROW == SIGN_IN_A_ROW - 1 {
                tokio::task::yield_now().await;
            }
            let result = match self.new_x509_svid(&permit, params, entry).await {
                Ok(svid) => NewX509Result { status: ok(), svid: Some(svid) },
                Err(status) => NewX509Result { status: Some(status), svid: None },
            };
            permit.audit_item(result.status.as_ref(), || {
                let id = result.svid.as_ref().and_then(|svid| svid.id.as_ref());
                let id = id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path));
                let mut fields = vec![
                    ("csr".into(), sha256_hex(&params.csr)),
                    ("entry_id".into(), params.entry_id.clone()),
                    ("spiffe_id".into(), id.unwrap_or_default()),
                ];
                fields.extend(result.svid.as_ref().map(|svid| ("expires_at".into(), svid.expires_at.to_string())));
                fields
            });
            results.push(result);
        }
        Ok(pb::BatchNewX509svidResponse { results })
    }

    async fn new_x509_svid(
        &self,
        call: &Call,
        params: &pb::NewX509svidParams,
        entry: Option<Indexed>,
    ) -> Result<types::X509svid, types::Status> {
        call.about_nothing();
        let invalid = |message| call.item(ErrorKind::InvalidArgument, message);
        if params.entry_id.is_empty() {
            return Err(invalid("missing entry ID"));
        }
        if params.csr.is_empty() {
            return Err(invalid("missing CSR"));
        }
        let about = || call.about("entry_id", &params.entry_id);
        let entry = entry.ok_or_else(|| {
            about();
            call.item(ErrorKind::NotFound, "entry not found or not authorized")
        })?;
        let bad_csr = |message, error: &dyn std::fmt::Display| {
            about();
            call.item_with(ErrorKind::InvalidArgument, message, error)
        };
        let csr = Csr::parse(&params.csr).map_err(|e| bad_csr("malformed CSR", &e))?;
        csr.verify_proof_of_possession().map_err(|e| bad_csr("invalid CSR signature", &e))?;
        let id = SpiffeId::new(&self.trust_domain, entry.path())
            .map_err(|e| call.item_with(ErrorKind::Internal, "entry has malformed SPIFFE ID", e))?;
        let mut entry = entry.to_proto();
        self.unfit_names.leave_out(&id, &mut entry);
        let wanted = X509Request {
            id: &id,
            public_key: csr.public_key(),
            dns_names: &entry.dns_names,
            ttl_seconds: i64::from(entry.x509_svid_ttl),
            subject: None,
        };
        let svid = self.issuer.workload_x509_svid(&wanted).await;
        let svid = svid.map_err(|e| call.item_with(ErrorKind::Internal, "failed to sign X509-SVID", e))?;
        Ok(svid_to_proto(&id, &svid))
    }

    async fn mint_jwtsvid(
        &self,
        permit: Permit<method::MintJWTSVID>,
        request: pb::MintJwtsvidRequest,
    ) -> Result<pb::MintJwtsvidResponse, Status> {
        self.check_jwt_enabled(&permit)?;
        if permit.audited() {
            permit.note("ttl", request.ttl);
            if !request.audience.is_empty() {
                permit.note("audience", request.audience.join(","));
            }
        }
        let id = id_from_proto(&self.trust_domain, request.id.as_ref(), IdRule::Workload)
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "invalid SPIFFE ID", e))?;
        let svid = self.jwt_svid(&permit, &id, &request.audience, request.ttl, false).await?;
        permit.audit();
        Ok(pb::MintJwtsvidResponse { svid: Some(svid) })
    }

    async fn new_jwtsvid(
        &self,
        permit: Permit<method::NewJWTSVID>,
        request: pb::NewJwtsvidRequest,
    ) -> Result<pb::NewJwtsvidResponse, Status> {
        if permit.audited() {
            permit.note("entry_id", &request.entry_id);
            permit.note("audience", request.audience.join(","));
        }
        permit.limit(1, "rejecting request due to JWT signing request rate limiting").await?;
        self.check_jwt_enabled(&permit)?;
        let (agent, selectors) = permit.agent()?;
        let found = self.entries.authorized_among(agent, &selectors, std::iter::once(request.entry_id.as_str()));
        let entry = found.into_iter().flatten().next();
        let entry = entry.ok_or_else(|| permit.fail(ErrorKind::NotFound, "entry not found or not authorized"))?;
        let id = SpiffeId::new(&self.trust_domain, entry.path())
            .map_err(|e| permit.fail_with(ErrorKind::Internal, "entry has malformed SPIFFE ID", e))?;
        let entry = entry.to_proto();
        let include_jti = entry.additional_attributes.is_some_and(|attributes| attributes.jwt_svid_include_jti);
        let svid = self.jwt_svid(&permit, &id, &request.audience, entry.jwt_svid_ttl, include_jti).await?;
        permit.note("ttl", entry.jwt_svid_ttl);
        permit.audit();
        Ok(pb::NewJwtsvidResponse { svid: Some(svid) })
    }

    fn check_jwt_enabled(&self, call: &Call) -> Result<(), Status> {
        if self.disable_jwt_svids {
            return Err(call.fail(ErrorKind::Unimplemented, "JWT functionality is disabled"));
        }
        Ok(())
    }

    async fn jwt_svid(
        &self,
        call: &Call,
        id: &SpiffeId,
        audience: &[String],
        ttl: i32,
        include_jti: bool,
    ) -> Result<types::Jwtsvid, Status> {
        call.note("spiffe_id", id);
        // Also of entries, as SPIRE does: a token in the name of a server or agent is nobody's to have.
        check_id(&self.trust_domain, id, IdRule::Workload)
            .map_err(|e| call.fail_with(ErrorKind::InvalidArgument, "invalid SPIFFE ID", e))?;
        if audience.is_empty() {
            return Err(call.fail(ErrorKind::InvalidArgument, "at least one audience is required"));
        }
        if audience.iter().map(String::len).sum::<usize>() > AUDIENCE_BYTES_MAX {
            let message = format!("audience is too long (max {AUDIENCE_BYTES_MAX} bytes)");
            return Err(call.fail(ErrorKind::InvalidArgument, &message));
        }
        let wanted = JwtRequest { id, audience, ttl_seconds: i64::from(ttl), include_jti };
        let svid = self.issuer.jwt_svid(&wanted).await.map_err(|error| {
            let kind = match error {
                IssueError::NoAudience => ErrorKind::InvalidArgument,
                _ => ErrorKind::Internal,
            };
            call.fail_with(kind, "failed to sign JWT-SVID", error)
        })?;
        Ok(types::Jwtsvid {
            token: svid.token,
            id: Some(id_to_proto(id)),
            expires_at: svid.expires_at,
            issued_at: svid.issued_at,
            hint: String::new(),
        })
    }
}

#[async_trait]
impl pb::svid_server::Svid for Service {
    async fn mint_x509svid(
        &self,
        request: Request<pb::MintX509svidRequest>,
    ) -> Result<Response<pb::MintX509svidResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.mint_x509svid(permit, request)).await
    }

    async fn mint_jwtsvid(
        &self,
        request: Request<pb::MintJwtsvidRequest>,
    ) -> Result<Response<pb::MintJwtsvidResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.mint_jwtsvid(permit, request)).await
    }

    async fn mint_witsvid(
        &self,
        request: Request<pb::MintWitsvidRequest>,
    ) -> Result<Response<pb::MintWitsvidResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.mint_witsvid(permit, request)).await
    }

    async fn batch_new_x509svid(
        &self,
        request: Request<pb::BatchNewX509svidRequest>,
    ) -> Result<Response<pb::BatchNewX509svidResponse>, Status> {
        let said = request.metadata().get(finial_proto::SVID_EXPIRY);
        let expiry = said.and_then(|text| text.to_str().ok()?.parse().ok());
        self.gate.unary(request, |permit, request| self.0.batch_new_x509svid(permit, request, expiry)).await
    }

    async fn new_jwtsvid(
        &self,
        request: Request<pb::NewJwtsvidRequest>,
    ) -> Result<Response<pb::NewJwtsvidResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.new_jwtsvid(permit, request)).await
    }

    async fn batch_new_witsvid(
        &self,
        request: Request<pb::BatchNewWitsvidRequest>,
    ) -> Result<Response<pb::BatchNewWitsvidResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_new_witsvid(permit, request)).await
    }

    async fn new_downstream_x509ca(
        &self,
        request: Request<pb::NewDownstreamX509caRequest>,
    ) -> Result<Response<pb::NewDownstreamX509caResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.new_downstream_x509ca(permit, request)).await
    }
}

#[cfg(test)]
mod tests {
    use super::urgency;

    #[test]
    fn no_claim_takes_an_agent_to_the_front_of_all() {
        let (now, own) = (1000, 5000);
        for (said, want) in
            [(None, own), (Some(3000), 3000), (Some(0), now), (Some(-1), now), (Some(i64::MIN), now), (Some(9000), own)]
        {
            assert_eq!(urgency(said, now, own), want, "{said:?}");
        }
        assert_eq!(urgency(None, now, 0), now, "without an SVID");
    }
}
