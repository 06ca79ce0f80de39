//! `spire.api.server.localauthority.v1.LocalAuthority`: the authorities of this server, and their rotation by hand.
//!
//! What may be done when, and in which words it is refused, is in `authority/orders.rs`; here are permits, log and audit.

use super::{Api, Service};
use crate::authority::plan::Status as Standing;
use crate::authority::{AuthorityKind as Kind, AuthorityState, Order, SlotStates};
use crate::authz::{Call, Permit, method};
use finial_core::ErrorKind;
use finial_proto::server::localauthority as pb;
use tonic::{Request, Response, Status, async_trait};

fn to_proto(state: AuthorityState) -> pb::AuthorityState {
    pb::AuthorityState {
        authority_id: state.authority_id,
        expires_at: state.expires_at,
        upstream_authority_subject_key_id: state.upstream_authority_id,
    }
}

/// The slots as answers have them: active, prepared, old.
type Three = [Option<pb::AuthorityState>; 3];

impl Api {
    /// Refuses kinds that are off.
    pub(super) fn is_offered(&self, call: &Call, kind: Kind) -> Result<(), Status> {
        let words = match kind {
            Kind::Jwt if self.disable_jwt_svids => "JWT functionality is disabled",
            // SPIRE has no others yet.
            Kind::Wit if !self.wit_svids_enabled => "WIT-SVID functionality is not yet implemented",
            _ => return Ok(()),
        };
        Err(call.fail(ErrorKind::Unimplemented, words))
    }

    fn authority_state(&self, call: &Call, kind: Kind) -> Result<Three, Status> {
        self.is_offered(call, kind)?;
        let states = self.issuer.authorities().states();
        let SlotStates { current, next } = match kind {
            Kind::X509 => states.x509.clone(),
            Kind::Jwt => states.jwt.clone(),
            Kind::Wit => states.wit.clone(),
        };
        let Some(active) = current.filter(|current| current.status == Standing::Active) else {
            return Err(call.fail(ErrorKind::Unavailable, "server is initializing"));
        };
        let next_if = |status| next.clone().filter(|next| next.status == status).map(to_proto);
        let three = [Some(to_proto(active)), next_if(Standing::Prepared), next_if(Standing::Old)];
        call.audit();
        Ok(three)
    }

    async fn order(&self, call: &Call, order: Order) -> Result<pb::AuthorityState, Status> {
        let done = self.authority.order(order).await;
        let state = done.map_err(|e| match e.cause {
            Some(cause) => call.fail_with(e.kind, &e.message, cause),
            None => call.fail(e.kind, &e.message),
        })?;
        call.audit();
        Ok(to_proto(state))
    }

    async fn prepare_authority(&self, call: &Call, kind: Kind) -> Result<Option<pb::AuthorityState>, Status> {
        self.is_offered(call, kind)?;
        self.order(call, Order::Prepare(kind)).await.map(Some)
    }

    /// An order about an authority of which the request says the ID.
    async fn order_about(
        &self,
        call: &Call,
        kind: Kind,
        id: String,
        order: fn(Kind, String) -> Order,
        done: &str,
    ) -> Result<Option<pb::AuthorityState>, Status> {
        if !id.is_empty() {
            call.note("local_authority_id", &id);
            call.about("local_authority_id", &id);
        }
        self.is_offered(call, kind)?;
        let state = self.order(call, order(kind, id)).await?;
        if !done.is_empty() {
            call.log_info(&format!("{kind} authority {done} successfully"));
        }
        Ok(Some(state))
    }

    async fn order_about_upstream(
        &self,
        call: &Call,
        id: &str,
        order: fn(String) -> Order,
        done: &str,
    ) -> Result<String, Status> {
        if !id.is_empty() {
            call.note("subject_key_id", id);
            call.about("subject_key_id", id);
        }
        let state = self.order(call, order(id.to_lowercase())).await?;
        call.log_info(done);
        Ok(state.authority_id)
    }
}

/// Answers in three fields.
macro_rules! state {
    ($service:expr, $request:expr, $method:ident, $kind:expr, $response:ident) => {{
        let answer = |permit: Permit<method::$method>, _| async move {
            let [active, prepared, old] = $service.authority_state(&permit, $kind)?;
            Ok(pb::$response { active, prepared, old })
        };
        $service.gate.unary($request, answer).await
    }};
}

/// Prepares.
macro_rules! prepare {
    ($service:expr, $request:expr, $method:ident, $kind:expr, $response:ident) => {{
        let answer = |permit: Permit<method::$method>, _| async move {
            Ok(pb::$response { prepared_authority: $service.prepare_authority(&permit, $kind).await? })
        };
        $service.gate.unary($request, answer).await
    }};
}

/// Carries out an order about the authority that the request names.
macro_rules! about {
    ($service:expr, $request:expr, $message:ident, $method:ident, $kind:expr, $order:ident, $done:literal, $response:ident, $field:ident) => {{
        let answer = |permit: Permit<method::$method>, request: pb::$message| async move {
            let id = request.authority_id;
            Ok(pb::$response { $field: $service.order_about(&permit, $kind, id, Order::$order, $done).await? })
        };
        $service.gate.unary($request, answer).await
    }};
}

#[rustfmt::skip] // one line each, to be read as a table
#[async_trait]
impl pb::local_authority_server::LocalAuthority for Service {
    async fn get_x509_authority_state(&self, r: Request<pb::GetX509AuthorityStateRequest>) -> Result<Response<pb::GetX509AuthorityStateResponse>, Status> {
        state!(self, r, GetX509AuthorityState, Kind::X509, GetX509AuthorityStateResponse)
    }
    async fn get_jwt_authority_state(&self, r: Request<pb::GetJwtAuthorityStateRequest>) -> Result<Response<pb::GetJwtAuthorityStateResponse>, Status> {
        state!(self, r, GetJWTAuthorityState, Kind::Jwt, GetJwtAuthorityStateResponse)
    }
    async fn get_wit_authority_state(&self, r: Request<pb::GetWitAuthorityStateRequest>) -> Result<Response<pb::GetWitAuthorityStateResponse>, Status> {
        state!(self, r, GetWITAuthorityState, Kind::Wit, GetWitAuthorityStateResponse)
    }

    async fn prepare_x509_authority(&self, r: Request<pb::PrepareX509AuthorityRequest>) -> Result<Response<pb::PrepareX509AuthorityResponse>, Status> {
        prepare!(self, r, PrepareX509Authority, Kind::X509, PrepareX509AuthorityResponse)
    }
    async fn prepare_jwt_authority(&self, r: Request<pb::PrepareJwtAuthorityRequest>) -> Result<Response<pb::PrepareJwtAuthorityResponse>, Status> {
        prepare!(self, r, PrepareJWTAuthority, Kind::Jwt, PrepareJwtAuthorityResponse)
    }
    async fn prepare_wit_authority(&self, r: Request<pb::PrepareWitAuthorityRequest>) -> Result<Response<pb::PrepareWitAuthorityResponse>, Status> {
        prepare!(self, r, PrepareWITAuthority, Kind::Wit, PrepareWitAuthorityResponse)
    }

    async fn activate_x509_authority(&self, r: Request<pb::ActivateX509AuthorityRequest>) -> Result<Response<pb::ActivateX509AuthorityResponse>, Status> {
        about!(self, r, ActivateX509AuthorityRequest, ActivateX509Authority, Kind::X509, Activate, "", ActivateX509AuthorityResponse, activated_authority)
    }
    async fn activate_jwt_authority(&self, r: Request<pb::ActivateJwtAuthorityRequest>) -> Result<Response<pb::ActivateJwtAuthorityResponse>, Status> {
        about!(self, r, ActivateJwtAuthorityRequest, ActivateJWTAuthority, Kind::Jwt, Activate, "", ActivateJwtAuthorityResponse, activated_authority)
    }
    async fn activate_wit_authority(&self, r: Request<pb::ActivateWitAuthorityRequest>) -> Result<Response<pb::ActivateWitAuthorityResponse>, Status> {
        about!(self, r, ActivateWitAuthorityRequest, ActivateWITAuthority, Kind::Wit, Activate, "", ActivateWitAuthorityResponse, activated_authority)
    }

    async fn taint_x509_authority(&self, r: Request<pb::TaintX509AuthorityRequest>) -> Result<Response<pb::TaintX509AuthorityResponse>, Status> {
        about!(self, r, TaintX509AuthorityRequest, TaintX509Authority, Kind::X509, Taint, "tainted", TaintX509AuthorityResponse, tainted_authority)
    }
    async fn taint_jwt_authority(&self, r: Request<pb::TaintJwtAuthorityRequest>) -> Result<Response<pb::TaintJwtAuthorityResponse>, Status> {
        about!(self, r, TaintJwtAuthorityRequest, TaintJWTAuthority, Kind::Jwt, Taint, "tainted", TaintJwtAuthorityResponse, tainted_authority)
    }
    async fn taint_wit_authority(&self, r: Request<pb::TaintWitAuthorityRequest>) -> Result<Response<pb::TaintWitAuthorityResponse>, Status> {
        about!(self, r, TaintWitAuthorityRequest, TaintWITAuthority, Kind::Wit, Taint, "tainted", TaintWitAuthorityResponse, tainted_authority)
    }

    async fn revoke_x509_authority(&self, r: Request<pb::RevokeX509AuthorityRequest>) -> Result<Response<pb::RevokeX509AuthorityResponse>, Status> {
        about!(self, r, RevokeX509AuthorityRequest, RevokeX509Authority, Kind::X509, Revoke, "revoked", RevokeX509AuthorityResponse, revoked_authority)
    }
    async fn revoke_jwt_authority(&self, r: Request<pb::RevokeJwtAuthorityRequest>) -> Result<Response<pb::RevokeJwtAuthorityResponse>, Status> {
        about!(self, r, RevokeJwtAuthorityRequest, RevokeJWTAuthority, Kind::Jwt, Revoke, "revoked", RevokeJwtAuthorityResponse, revoked_authority)
    }
    async fn revoke_wit_authority(&self, r: Request<pb::RevokeWitAuthorityRequest>) -> Result<Response<pb::RevokeWitAuthorityResponse>, Status> {
        about!(self, r, RevokeWitAuthorityRequest, RevokeWITAuthority, Kind::Wit, Revoke, "revoked", RevokeWitAuthorityResponse, revoked_authority)
    }

    async fn taint_x509_upstream_authority(&self, r: Request<pb::TaintX509UpstreamAuthorityRequest>) -> Result<Response<pb::TaintX509UpstreamAuthorityResponse>, Status> {
        let answer = |permit: Permit<method::TaintX509UpstreamAuthority>, request: pb::TaintX509UpstreamAuthorityRequest| async move {
            let done = "X.509 upstream authority tainted successfully";
            let id = self.order_about_upstream(&permit, &request.subject_key_id, Order::TaintUpstream, done).await?;
            Ok(pb::TaintX509UpstreamAuthorityResponse { upstream_authority_subject_key_id: id })
        };
        self.gate.unary(r, answer).await
    }
    async fn revoke_x509_upstream_authority(&self, r: Request<pb::RevokeX509UpstreamAuthorityRequest>) -> Result<Response<pb::RevokeX509UpstreamAuthorityResponse>, Status> {
        let answer = |permit: Permit<method::RevokeX509UpstreamAuthority>, request: pb::RevokeX509UpstreamAuthorityRequest| async move {
            let done = "X.509 upstream authority successfully revoked";
            let id = self.order_about_upstream(&permit, &request.subject_key_id, Order::RevokeUpstream, done).await?;
            Ok(pb::RevokeX509UpstreamAuthorityResponse { upstream_authority_subject_key_id: id })
        };
        self.gate.unary(r, answer).await
    }
}
