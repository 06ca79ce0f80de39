//! `spire.api.server.trustdomain.v1.TrustDomain`: how the bundles of foreign trust domains are to be fetched.

use super::bundle::{Write, audit_fields, bundle_from_proto};
use super::{Api, Service, endpoint_url, ok, page, store_failed};
use crate::authz::{Call, Fields, Permit, method};
use crate::federation::Stored;
use finial_core::{Bundle, EndpointProfile, ErrorKind, SpiffeId, TrustDomain};
use finial_proto::convert::bundle_to_proto;
use finial_proto::server::trustdomain as pb;
use finial_proto::types::federation_relationship::BundleEndpointProfile as WireProfile;
use finial_proto::types::{self, FederationRelationship as Wire, FederationRelationshipMask as Mask};
use finial_store::{FederationMask, FederationRelationship, StoreError};
use std::sync::Arc;
use tonic::{Request, Response, Status, async_trait};

const ALL: Mask = Mask { bundle_endpoint_url: true, bundle_endpoint_profile: true, trust_domain_bundle: true };

/// Reads a relationship; the text of an error is SPIRE's.
fn from_proto(wire: &Wire) -> Result<FederationRelationship, String> {
    let trust_domain =
        TrustDomain::parse(&wire.trust_domain).map_err(|e| format!("failed to parse trust domain: {e}"))?;
    let bundle_endpoint_url = endpoint_url::check(&wire.bundle_endpoint_url)?;
    let profile = match &wire.bundle_endpoint_profile {
        None => return Err("unsupported bundle endpoint profile type: <nil>".into()),
        Some(WireProfile::HttpsWeb(_)) => EndpointProfile::HttpsWeb,
        Some(WireProfile::HttpsSpiffe(profile)) => {
            let endpoint_id = SpiffeId::parse(&profile.endpoint_spiffe_id)
                .map_err(|e| format!("failed to parse endpoint SPIFFE ID: {e}"))?;
            EndpointProfile::HttpsSpiffe { endpoint_id }
        }
    };
    let bundle = wire.trust_domain_bundle.as_ref().map(|wire| bundle_of(&trust_domain, wire)).transpose()?;
    Ok(FederationRelationship { trust_domain, bundle_endpoint_url, profile, bundle })
}

fn bundle_of(trust_domain: &TrustDomain, wire: &types::Bundle) -> Result<Bundle, String> {
    let whose = TrustDomain::parse(&wire.trust_domain)
        .map_err(|e| format!("failed to parse bundle: invalid trust domain: {e}"))?;
    let bundle = bundle_from_proto(whose, wire).map_err(|why| format!("failed to parse bundle: {why}"))?;
    if bundle.trust_domain == *trust_domain {
        return Ok(bundle);
    }
    Err(format!(
        "trust domain bundle ({:?}) must match the trust domain of the federation relationship ({:?})",
        wire.trust_domain,
        trust_domain.as_str()
    ))
}

fn to_proto(relationship: &FederationRelationship, mask: Option<Mask>) -> Wire {
    let mask = mask.unwrap_or(ALL);
    let profile = || match &relationship.profile {
        EndpointProfile::HttpsWeb => WireProfile::HttpsWeb(types::HttpsWebProfile {}),
        EndpointProfile::HttpsSpiffe { endpoint_id } => {
            WireProfile::HttpsSpiffe(types::HttpsspiffeProfile { endpoint_spiffe_id: endpoint_id.to_string() })
        }
    };
    let url = || relationship.bundle_endpoint_url.clone();
    let bundle = relationship.bundle.as_ref().filter(|_| mask.trust_domain_bundle);
    Wire {
        trust_domain: relationship.trust_domain.as_str().to_owned(),
        bundle_endpoint_url: if mask.bundle_endpoint_url { url() } else { String::new() },
        bundle_endpoint_profile: mask.bundle_endpoint_profile.then(profile),
        trust_domain_bundle: bundle.map(bundle_to_proto),
    }
}

fn relationship_fields(wire: &Wire, mask: Option<Mask>) -> Fields {
    let mask = mask.unwrap_or(ALL);
    let mut fields = Fields::new();
    if !wire.trust_domain.is_empty() {
        fields.push(("trust_domain_id".into(), wire.trust_domain.clone()));
    }
    if mask.bundle_endpoint_url {
        fields.push(("bundle_endpoint_url".into(), wire.bundle_endpoint_url.clone()));
    }
    match wire.bundle_endpoint_profile.as_ref().filter(|_| mask.bundle_endpoint_profile) {
        None => {}
        Some(WireProfile::HttpsWeb(_)) => fields.push(("bundle_endpoint_profile".into(), "https_web".into())),
        Some(WireProfile::HttpsSpiffe(profile)) => {
            fields.push(("bundle_endpoint_profile".into(), "https_spiffe".into()));
            fields.push(("endpoint_spiffe_id".into(), profile.endpoint_spiffe_id.clone()));
        }
    }
    if let Some(bundle) = wire.trust_domain_bundle.as_ref().filter(|_| mask.trust_domain_bundle) {
        let of_bundle = audit_fields(bundle, Write::Set).into_iter();
        fields.extend(of_bundle.map(|(name, value)| (format!("bundle_{name}").into(), value)));
    }
    fields
}

impl Api {
    /// Where the datastore is away, what it had; without the bundles.
    fn relationships_of_memory(&self) -> Option<Arc<Stored>> {
        self.datastore_is_away().then(|| self.federation.stored()).flatten()
    }

    fn add_bundle(&self, relationship: &mut FederationRelationship) {
        let known = self.bundles.bundle(relationship.trust_domain.as_str());
        relationship.bundle = known.map(|known| known.bundle.clone());
    }

    async fn list_federation_relationships(
        &self,
        permit: Permit<method::ListFederationRelationships>,
        request: pb::ListFederationRelationshipsRequest,
    ) -> Result<pb::ListFederationRelationshipsResponse, Status> {
        let page = page(request.page_size, &request.page_token);
        let listed = match self.relationships_of_memory() {
            Some(stored) => stored.list(page.as_ref()).map(|mut listed| {
                listed.items.iter_mut().for_each(|found| self.add_bundle(found));
                listed
            }),
            None => self.store.list_federation_relationships(page.as_ref()).await,
        };
        let listed = listed.map_err(|e| store_failed(&permit, "failed to list federation relationships", &e))?;
        permit.audit();
        Ok(pb::ListFederationRelationshipsResponse {
            federation_relationships: listed.items.iter().map(|r| to_proto(r, request.output_mask)).collect(),
            next_page_token: listed.next_page_token,
        })
    }

    async fn get_federation_relationship(
        &self,
        permit: Permit<method::GetFederationRelationship>,
        request: pb::GetFederationRelationshipRequest,
    ) -> Result<Wire, Status> {
        permit.note("trust_domain_id", &request.trust_domain);
        let trust_domain = TrustDomain::parse(&request.trust_domain)
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "failed to parse trust domain", e))?;
        let found = match self.relationships_of_memory() {
            Some(stored) => Ok(stored.get(&trust_domain).map(|mut found| {
                self.add_bundle(&mut found);
                found
            })),
            None => self.store.fetch_federation_relationship(&trust_domain).await,
        };
        let found = found.map_err(|e| store_failed(&permit, "failed to fetch federation relationship", &e))?;
        let missing = || permit.fail(ErrorKind::NotFound, "federation relationship does not exist");
        let found = found.ok_or_else(missing)?;
        permit.audit();
        Ok(to_proto(&found, request.output_mask))
    }

    /// Writes one relationship, with its bundle if it brings one, and lets the feed know, to the end even if the caller
    /// goes away. `mask`: what of it is written; `None` = it is new.
    async fn write_relationship(
        &self,
        call: &Call,
        wire: &Wire,
        mask: Option<Mask>,
    ) -> Result<FederationRelationship, types::Status> {
        call.about("trust_domain_id", &wire.trust_domain);
        let invalid =
            |why| call.item_with(ErrorKind::InvalidArgument, "failed to convert federation relationship", why);
        let relationship = from_proto(wire).map_err(invalid)?;
        if mask.is_none() && relationship.trust_domain == self.trust_domain {
            let message = "unable to create federation relationship for server trust domain";
            return Err(call.item(ErrorKind::InvalidArgument, message));
        }
        if relationship.bundle.is_some() && relationship.trust_domain == self.trust_domain {
            // SPIRE lets an update overwrite the server's own bundle so.
            let message = "setting a federated bundle for the server's own trust domain is not allowed";
            return Err(call.item(ErrorKind::InvalidArgument, message));
        }
        let (store, feed) = (self.store.clone(), self.bundles.clone());
        let change = async move {
            let written = match mask {
                None => store.create_federation_relationship(&relationship).await.map(|_| relationship)?,
                Some(mask) => {
                    let mask = FederationMask {
                        bundle_endpoint_url: mask.bundle_endpoint_url,
                        bundle_endpoint_profile: mask.bundle_endpoint_profile,
                        trust_domain_bundle: mask.trust_domain_bundle,
                    };
                    store.update_federation_relationship(&relationship, mask).await?
                }
            };
            if written.bundle.is_some() {
                feed.refresh_or_later(&written.trust_domain).await;
            }
            Ok(written)
        };
        let written = self.turn.take(change).await.map_err(|error| write_failed(call, mask.is_none(), &error))?;
        if let (None, EndpointProfile::HttpsSpiffe { endpoint_id }) = (&written.bundle, &written.profile)
            && self.bundles.bundle(endpoint_id.trust_domain_name()).is_none()
        {
            tracing::warn!(
                trust_domain_id = %written.trust_domain,
                endpoint_spiffe_id = %endpoint_id,
                "bundle not found for the endpoint SPIFFE ID trust domain"
            );
        }
        self.federation.reload();
        call.log_debug(if mask.is_none() {
            "Federation relationship created"
        } else {
            "Federation relationship updated"
        });
        Ok(written)
    }

    async fn delete_relationship(&self, call: &Call, name: &str) -> Result<(), types::Status> {
        call.about_nothing();
        if name.is_empty() {
            return Err(call.item(ErrorKind::InvalidArgument, "missing trust domain"));
        }
        call.about("trust_domain_id", name);
        let trust_domain = TrustDomain::parse(name)
            .map_err(|e| call.item_with(ErrorKind::InvalidArgument, "failed to parse trust domain", e))?;
        let store = self.store.clone();
        let deleted = self.turn.take(async move { store.delete_federation_relationship(&trust_domain).await }).await;
        deleted.map_err(|error| match error {
            StoreError::NotFound => call.item(ErrorKind::NotFound, "federation relationship not found"),
            error => call.item_with(error.kind(), "failed to delete federation relationship", error),
        })?;
        self.federation.reload();
        call.log_debug("Federation relationship deleted");
        Ok(())
    }

    async fn batch_delete_relationship(
        &self,
        permit: Permit<method::BatchDeleteFederationRelationship>,
        request: pb::BatchDeleteFederationRelationshipRequest,
    ) -> Result<pb::BatchDeleteFederationRelationshipResponse, Status> {
        let mut results = Vec::with_capacity(request.trust_domains.len());
        for trust_domain in request.trust_domains {
            let deleted = self.delete_relationship(&permit, &trust_domain).await;
            let status = deleted.err().or_else(ok);
            permit.audit_item(status.as_ref(), || vec![("trust_domain_id".into(), trust_domain.clone())]);
            let name = TrustDomain::parse(&trust_domain).map_or(trust_domain, |td| td.as_str().to_owned());
            results.push(pb::batch_delete_federation_relationship_response::Result { status, trust_domain: name });
        }
        Ok(pb::BatchDeleteFederationRelationshipResponse { results })
    }

    async fn refresh_bundle(
        &self,
        permit: Permit<method::RefreshBundle>,
        request: pb::RefreshBundleRequest,
    ) -> Result<(), Status> {
        let trust_domain = TrustDomain::parse(&request.trust_domain)
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "failed to parse trust domain", e))?;
        permit.about("trust_domain_id", &trust_domain);
        permit.note("trust_domain_id", &request.trust_domain);
        let refreshed = self.federation.refresh(&trust_domain).await;
        let known = refreshed.map_err(|e| permit.fail_with(e.kind(), "failed to refresh bundle", e))?;
        if !known {
            let message = format!("no relationship with trust domain {:?}", trust_domain.as_str());
            return Err(permit.fail(ErrorKind::NotFound, &message));
        }
        permit.log_debug("Bundle refreshed");
        permit.audit();
        Ok(())
    }
}

/// SPIRE calls all of these faults of its own, and so do we, as clients know the codes.
fn write_failed(call: &Call, creating: bool, error: &StoreError) -> types::Status {
    let message =
        if creating { "failed to create federation relationship" } else { "failed to update federation relationship" };
    match error.kind() {
        ErrorKind::AlreadyExists => call.item_with(ErrorKind::Internal, message, error),
        ErrorKind::NotFound => {
            let cause = "unable to fetch federation relationship: record not found";
            call.item_with(ErrorKind::Internal, message, cause)
        }
        kind => call.item_with(kind, message, error),
    }
}

/// A batch RPC that writes relationships: one result per relationship, in order.
macro_rules! batch {
    ($self:expr, $request:expr, $method:ident, $module:ident, $response:ident, $input_mask:expr) => {
        $self
            .gate
            .unary($request, |permit: Permit<method::$method>, request| async move {
                let (input_mask, output_mask) = ($input_mask(&request), request.output_mask);
                let mut results = Vec::with_capacity(request.federation_relationships.len());
                for wire in &request.federation_relationships {
                    let result = match $self.0.write_relationship(&permit, wire, input_mask).await {
                        Ok(written) => pb::$module::Result {
                            status: ok(),
                            federation_relationship: Some(to_proto(&written, output_mask)),
                        },
                        Err(status) => pb::$module::Result { status: Some(status), federation_relationship: None },
                    };
                    permit.audit_item(result.status.as_ref(), || relationship_fields(wire, input_mask));
                    results.push(result);
                }
                Ok(pb::$response { results })
            })
            .await
    };
}

#[async_trait]
impl pb::trust_domain_server::TrustDomain for Service {
    async fn list_federation_relationships(
        &self,
        request: Request<pb::ListFederationRelationshipsRequest>,
    ) -> Result<Response<pb::ListFederationRelationshipsResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.list_federation_relationships(permit, request)).await
    }

    async fn get_federation_relationship(
        &self,
        request: Request<pb::GetFederationRelationshipRequest>,
    ) -> Result<Response<Wire>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_federation_relationship(permit, request)).await
    }

    async fn batch_create_federation_relationship(
        &self,
        request: Request<pb::BatchCreateFederationRelationshipRequest>,
    ) -> Result<Response<pb::BatchCreateFederationRelationshipResponse>, Status> {
        batch!(
            self,
            request,
            BatchCreateFederationRelationship,
            batch_create_federation_relationship_response,
            BatchCreateFederationRelationshipResponse,
            |_: &pb::BatchCreateFederationRelationshipRequest| None
        )
    }

    async fn batch_update_federation_relationship(
        &self,
        request: Request<pb::BatchUpdateFederationRelationshipRequest>,
    ) -> Result<Response<pb::BatchUpdateFederationRelationshipResponse>, Status> {
        batch!(
            self,
            request,
            BatchUpdateFederationRelationship,
            batch_update_federation_relationship_response,
            BatchUpdateFederationRelationshipResponse,
            |request: &pb::BatchUpdateFederationRelationshipRequest| Some(request.input_mask.unwrap_or(ALL))
        )
    }

    async fn batch_delete_federation_relationship(
        &self,
        request: Request<pb::BatchDeleteFederationRelationshipRequest>,
    ) -> Result<Response<pb::BatchDeleteFederationRelationshipResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_delete_relationship(permit, request)).await
    }

    async fn refresh_bundle(&self, request: Request<pb::RefreshBundleRequest>) -> Result<Response<()>, Status> {
        self.gate.unary(request, |permit, request| self.0.refresh_bundle(permit, request)).await
    }
}
