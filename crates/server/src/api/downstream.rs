//! What downstream servers ask for: authorities of their own below ours, and keys of theirs in our bundle.

use super::bundle::{jwt_from_proto, key_fields, wit_from_proto};
use super::{Api, der_chain, store_failed};
use crate::authority::{AuthorityKind, published_upstream, with_new};
use crate::authz::{Call, Permit, method};
use crate::publish::Name;
use finial_core::{Bundle, ErrorKind};
use finial_crypto::{Csr, sha256_hex};
use finial_proto::convert::{jwt_key_to_proto, wit_key_to_proto};
use finial_proto::server::bundle as bundles;
use finial_proto::server::svid as svids;
use tonic::Status;

impl Api {
    pub(super) async fn new_downstream_x509ca(
        &self,
        permit: Permit<method::NewDownstreamX509CA>,
        request: svids::NewDownstreamX509caRequest,
    ) -> Result<svids::NewDownstreamX509caResponse, Status> {
        if permit.audited() {
            permit.note("csr", sha256_hex(&request.csr));
            permit.note("trust_domain_id", self.trust_domain.id_string());
        }
        permit.limit(1, "rejecting request due to downstream CA signing rate limit").await?;
        let caller = permit.caller_id()?;
        let csr = Csr::parse(&request.csr);
        let csr = csr.map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "malformed CSR", e))?;
        csr.verify_proof_of_possession()
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "invalid CSR signature", e))?;
        let made = self.issuer.downstream_ca(caller, csr.public_key(), i64::from(request.preferred_ttl)).await;
        let made = made.map_err(|e| permit.fail_with(ErrorKind::Internal, "failed to sign downstream X.509 CA", e))?;
        let own = self.bundles.own().ok_or_else(|| permit.fail(ErrorKind::NotFound, "bundle not found"))?;
        let roots: Vec<_> = own.bundle.x509_authorities.iter().map(|authority| authority.der.clone()).collect();
        permit.note("expires_at", made.not_after);
        permit.audit();
        Ok(svids::NewDownstreamX509caResponse {
            ca_cert_chain: der_chain(&made.chain),
            x509_authorities: der_chain(&roots),
        })
    }

    pub(super) async fn publish_jwt_authority(
        &self,
        permit: Permit<method::PublishJWTAuthority>,
        request: bundles::PublishJwtAuthorityRequest,
    ) -> Result<bundles::PublishJwtAuthorityResponse, Status> {
        if let Some(key) = &request.jwt_authority {
            key_fields("jwt", "", key).into_iter().for_each(|(name, value)| permit.note(name, value));
        }
        permit.limit(1, "rejecting request due to key publishing rate limiting").await?;
        let missing = || permit.fail(ErrorKind::InvalidArgument, "missing JWT authority");
        let key = request.jwt_authority.ok_or_else(missing)?;
        let mut jwt_authorities = jwt_from_proto(&[key])
            .map_err(|why| permit.fail_with(ErrorKind::InvalidArgument, "invalid JWT authority", why))?;
        if let (Some(upstream), Some(key)) = (&self.plugins.upstream_authority, jwt_authorities.first()) {
            let published = published_upstream(upstream.as_ref(), AuthorityKind::Jwt, key).await;
            let above = published.map_err(|e| permit.fail_with(e.kind(), "failed to publish JWT key", e.bare()))?;
            jwt_authorities = with_new(key.clone(), above, &self.bundles.heard(), Name::jwt);
        }
        let more = Bundle { jwt_authorities, ..Bundle::empty(self.trust_domain.clone()) };
        let bundle = self.publish(&permit, more, "failed to publish JWT key").await?;
        permit.audit();
        let jwt_authorities = bundle.jwt_authorities.iter().map(jwt_key_to_proto).collect();
        Ok(bundles::PublishJwtAuthorityResponse { jwt_authorities })
    }

    pub(super) async fn publish_wit_authority(
        &self,
        permit: Permit<method::PublishWITAuthority>,
        request: bundles::PublishWitAuthorityRequest,
    ) -> Result<bundles::PublishWitAuthorityResponse, Status> {
        if !self.wit_svids_enabled {
            // SPIRE's words, whether it is enabled or not.
            return Err(permit.fail(ErrorKind::Unimplemented, "WIT-SVID functionality is not yet implemented"));
        }
        let key = request.wit_authority.as_ref();
        if let Some(key) = key {
            let key = super::bundle::as_jwt_key(key);
            key_fields("wit", "", &key).into_iter().for_each(|(name, value)| permit.note(name, value));
        }
        permit.limit(1, "rejecting request due to key publishing rate limiting").await?;
        let key = key.ok_or_else(|| permit.fail(ErrorKind::InvalidArgument, "missing WIT authority"))?;
        let mut wit_authorities = wit_from_proto(std::slice::from_ref(key))
            .map_err(|why| permit.fail_with(ErrorKind::InvalidArgument, "invalid WIT authority", why))?;
        if let (Some(upstream), Some(key)) = (&self.plugins.upstream_authority, wit_authorities.first()) {
            let published = published_upstream(upstream.as_ref(), AuthorityKind::Wit, key).await;
            let above = published.map_err(|e| permit.fail_with(e.kind(), "failed to publish WIT key", e.bare()))?;
            wit_authorities = with_new(key.clone(), above, &self.bundles.heard(), Name::wit);
        }
        let more = Bundle { wit_authorities, ..Bundle::empty(self.trust_domain.clone()) };
        let bundle = self.publish(&permit, more, "failed to publish WIT key").await?;
        permit.audit();
        let wit_authorities = bundle.wit_authorities.iter().map(wit_key_to_proto).collect();
        Ok(bundles::PublishWitAuthorityResponse { wit_authorities })
    }

    async fn publish(&self, call: &Call, more: Bundle, failed: &str) -> Result<Bundle, Status> {
        self.append_own(more).await.map_err(|e| store_failed(call, failed, &e))
    }
}
