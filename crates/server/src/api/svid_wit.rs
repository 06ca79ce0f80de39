//! WIT-SVIDs: minted, and by entries. Only with the feature flag `wit-svid`.

use super::{Api, IdRule, id_from_proto, ok};
use crate::authz::{Call, Permit, method};
use crate::entries::Indexed;
use crate::issue::{IssuedJwt, WitRequest};
use finial_core::{ErrorKind, SpiffeId};
use finial_crypto::{KeyError, PublicKey, SignatureAlgorithm, wit_key_algorithm};
use finial_proto::convert::id_to_proto;
use finial_proto::server::svid as pb;
use finial_proto::server::svid::batch_new_witsvid_response::Result as NewWitResult;
use finial_proto::types;
use tonic::Status;

/// Why a key cannot be in a WIT-SVID: the words before the cause, and the cause.
struct BadKey(&'static str, String);

/// Reads the workload's key and the algorithm that it will sign with. `malformed` is what SPIRE says of garbage.
fn key_of(der: &[u8], algorithm: &str, malformed: &'static str) -> Result<(PublicKey, SignatureAlgorithm), BadKey> {
    const UNSUPPORTED: &str = "invalid signing algorithm or key type";
    let key = PublicKey::from_spki(der).map_err(|error| match error {
        KeyError::UnsupportedAlgorithm(_) | KeyError::UnsupportedCurve(_) => BadKey(UNSUPPORTED, error.to_string()),
        error => BadKey(malformed, error.to_string()),
    })?;
    let algorithm = wit_key_algorithm(&key, algorithm).map_err(|error| BadKey(UNSUPPORTED, error.to_string()))?;
    Ok((key, algorithm))
}

fn to_proto(id: &SpiffeId, svid: IssuedJwt) -> types::Witsvid {
    types::Witsvid {
        token: svid.token,
        id: Some(id_to_proto(id)),
        expires_at: svid.expires_at,
        issued_at: svid.issued_at,
        ..Default::default()
    }
}

impl Api {
    pub(super) async fn mint_witsvid(
        &self,
        permit: Permit<method::MintWITSVID>,
        request: pb::MintWitsvidRequest,
    ) -> Result<pb::MintWitsvidResponse, Status> {
        if !self.wit_svids_enabled {
            return Err(permit.fail(ErrorKind::Unimplemented, "WIT functionality is disabled"));
        }
        permit.note("ttl", request.ttl);
        let invalid = |message, why: &dyn std::fmt::Display| permit.fail_with(ErrorKind::InvalidArgument, message, why);
        let id = id_from_proto(&self.trust_domain, request.id.as_ref(), IdRule::Workload)
            .map_err(|e| invalid("invalid SPIFFE ID", &e))?;
        permit.note("spiffe_id", &id);
        permit.about("spiffe_id", &id);
        let (key, key_algorithm) = key_of(&request.public_key, &request.signing_algorithm, "invalid public key")
            .map_err(|BadKey(message, why)| invalid(message, &why))?;
        let wanted = WitRequest { id: &id, key: &key, key_algorithm, ttl_seconds: i64::from(request.ttl) };
        let svid = self.issuer.wit_svid(&wanted).await;
        let svid = svid.map_err(|e| permit.fail_with(ErrorKind::Internal, "failed to sign WIT-SVID", e))?;
        permit.audit();
        Ok(pb::MintWitsvidResponse { svid: Some(to_proto(&id, svid)) })
    }

    pub(super) async fn batch_new_witsvid(
        &self,
        permit: Permit<method::BatchNewWITSVID>,
        request: pb::BatchNewWitsvidRequest,
    ) -> Result<pb::BatchNewWitsvidResponse, Status> {
        let count = request.params.len();
        if count == 0 {
            return Err(permit.fail(ErrorKind::InvalidArgument, "missing parameters"));
        }
        permit.limit(count, "rejecting request due to certificate signing rate limiting").await?;
        if !self.wit_svids_enabled {
            return Err(permit.fail(ErrorKind::Unimplemented, "WIT functionality is disabled"));
        }
        let (agent, selectors) = permit.agent()?;
        let ids = request.params.iter().map(|params| params.entry_id.as_str());
        let entries = self.entries.authorized_among(agent, &selectors, ids);
        let mut results = Vec::with_capacity(count);
        for (params, entry) in request.params.iter().zip(entries) {
            // Each is a signature; the other tasks of the thread get their turn.
            tokio::task::consume_budget().await;
            let result = match self.new_wit_svid(&permit, params, entry).await {
                Ok(svid) => NewWitResult { status: ok(), svid: Some(svid) },
                Err(status) => NewWitResult { status: Some(status), svid: None },
            };
            permit.audit_item(result.status.as_ref(), || {
                let svid = result.svid.as_ref();
                let id = svid.and_then(|svid| svid.id.as_ref());
                let id = id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default();
                let mut fields = vec![("entry_id".into(), params.entry_id.clone()), ("spiffe_id".into(), id)];
                fields.extend(svid.map(|svid| ("expires_at".into(), svid.expires_at.to_string())));
                fields
            });
            results.push(result);
        }
        Ok(pb::BatchNewWitsvidResponse { results })
    }

    async fn new_wit_svid(
        &self,
        call: &Call,
        params: &pb::NewWitsvidParams,
        entry: Option<Indexed>,
    ) -> Result<types::Witsvid, types::Status> {
        call.about_nothing();
        if params.entry_id.is_empty() {
            return Err(call.item(ErrorKind::InvalidArgument, "missing entry ID"));
        }
        if params.public_key.is_empty() {
            return Err(call.item(ErrorKind::InvalidArgument, "missing public key"));
        }
        call.about("entry_id", &params.entry_id);
        let entry = entry.ok_or_else(|| call.item(ErrorKind::NotFound, "entry not found or not authorized"))?;
        let (key, key_algorithm) = key_of(&params.public_key, &params.signing_algorithm, "malformed public key")
            .map_err(|BadKey(message, why)| call.item_with(ErrorKind::InvalidArgument, message, why))?;
        let id = SpiffeId::new(&self.trust_domain, entry.path())
            .map_err(|e| call.item_with(ErrorKind::Internal, "entry has malformed SPIFFE ID", e))?;
        call.about("spiffe_id", &id);
        // As SPIRE does: there is no TTL of its own for WIT-SVIDs in an entry.
        let ttl_seconds = i64::from(entry.to_proto().x509_svid_ttl);
        let svid = self.issuer.wit_svid(&WitRequest { id: &id, key: &key, key_algorithm, ttl_seconds }).await;
        let svid = svid.map_err(|e| call.item_with(ErrorKind::Internal, "failed to sign WIT-SVID", e))?;
        Ok(to_proto(&id, svid))
    }
}
