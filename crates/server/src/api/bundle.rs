//! `spire.api.server.bundle.v1.Bundle`: the own bundle and those of federated trust domains.

use super::{Api, Service, count32, ok, page, store_failed};
use crate::authz::{Call, Fields, Permit, method};
use finial_core::{Bundle, ErrorKind, JwtAuthority, TrustDomain, X509Authority};
use finial_crypto::{Certificate, PublicKey, sha256_hex};
use finial_proto::convert::{bundle_to_proto, mask_bundle};
use finial_proto::server::bundle as pb;
use finial_proto::server::bundle::batch_delete_federated_bundle_request::Mode;
use finial_proto::types;
use finial_store::{BundleMask, DeleteMode, StoreError};
use tonic::{Request, Response, Status, async_trait};

/// Why a bundle on the wire cannot be stored.
type Refused = String;

/// Reads X.509 authorities; each must be one certificate. SPIRE drops the tainted mark here, as only it may set one.
fn x509_from_proto(wire: &[types::X509Certificate]) -> Result<Vec<X509Authority>, Refused> {
    let read = |c: &types::X509Certificate| match Certificate::parse(&*c.asn1) {
        Ok(certificate) => Ok(X509Authority { der: certificate.der().clone(), tainted: false }),
        Err(error) => Err(error.to_string()),
    };
    wire.iter().map(read).collect()
}

/// Reads JWT authorities.
pub(super) fn jwt_from_proto(wire: &[types::JwtKey]) -> Result<Vec<JwtAuthority>, Refused> {
    let read = |key: &types::JwtKey| {
        PublicKey::from_spki(&key.public_key).map_err(|e| e.to_string())?;
        if key.key_id.is_empty() {
            return Err("missing key ID".into());
        }
        Ok(JwtAuthority {
            key_id: key.key_id.clone(),
            public_key: (&*key.public_key).into(),
            expires_at: key.expires_at,
            tainted: false,
        })
    };
    wire.iter().map(read).collect()
}

/// WIT keys have the form of JWT keys.
pub(super) fn as_jwt_key(key: &types::WitKey) -> types::JwtKey {
    types::JwtKey {
        public_key: key.public_key.clone(),
        key_id: key.key_id.clone(),
        expires_at: key.expires_at,
        tainted: key.tainted,
    }
}

/// Reads WIT authorities.
pub(super) fn wit_from_proto(wire: &[types::WitKey]) -> Result<Vec<JwtAuthority>, Refused> {
    jwt_from_proto(&wire.iter().map(as_jwt_key).collect::<Vec<_>>())
}

pub(super) fn bundle_from_proto(trust_domain: TrustDomain, wire: &types::Bundle) -> Result<Bundle, Refused> {
    let x509 = x509_from_proto(&wire.x509_authorities);
    let jwt = jwt_from_proto(&wire.jwt_authorities);
    // SPIRE drops these.
    let wit = wit_from_proto(&wire.wit_authorities);
    Ok(Bundle {
        trust_domain,
        x509_authorities: x509.map_err(|e| format!("unable to parse X.509 authority: {e}"))?,
        jwt_authorities: jwt.map_err(|e| format!("unable to parse JWT authority: {e}"))?,
        wit_authorities: wit.map_err(|e| format!("unable to parse WIT authority: {e}"))?,
        refresh_hint: wire.refresh_hint,
        sequence_number: wire.sequence_number,
    })
}

fn masked(bundle: &Bundle, mask: Option<&types::BundleMask>) -> types::Bundle {
    let mut wire = bundle_to_proto(bundle);
    if let Some(mask) = mask {
        mask_bundle(&mut wire, mask);
    }
    wire
}

fn store_mask(mask: Option<&types::BundleMask>) -> BundleMask {
    mask.map_or(BundleMask::ALL, |mask| BundleMask {
        x509_authorities: mask.x509_authorities,
        jwt_authorities: mask.jwt_authorities,
        wit_authorities: mask.wit_authorities,
        refresh_hint: mask.refresh_hint,
        sequence_number: mask.sequence_number,
    })
}

/// What the audit log says of a key; `tail` is its place in a list, such as `.0`.
pub(super) fn key_fields(kind: &str, tail: &str, key: &types::JwtKey) -> Fields {
    vec![
        (format!("{kind}_authority_expires_at{tail}").into(), key.expires_at.to_string()),
        (format!("{kind}_authority_key_id{tail}").into(), key.key_id.clone()),
        (format!("{kind}_authority_public_key_sha256{tail}").into(), sha256_hex(&key.public_key)),
    ]
}

fn authority_fields(x509: &[types::X509Certificate], jwt: &[types::JwtKey], wit: &[types::WitKey]) -> Fields {
    let x509 = x509.iter().enumerate();
    let mut fields: Fields =
        x509.map(|(n, a)| (format!("x509_authorities_asn1_sha256.{n}").into(), sha256_hex(&a.asn1))).collect();
    fields.extend(jwt.iter().enumerate().flat_map(|(n, key)| key_fields("jwt", &format!(".{n}"), key)));
    fields.extend(wit.iter().enumerate().flat_map(|(n, key)| key_fields("wit", &format!(".{n}"), &as_jwt_key(key))));
    fields
}

pub(super) fn audit_fields(wire: &types::Bundle, write: Write) -> Fields {
    let mask = match write {
        Write::Update(mask) => mask,
        Write::Create | Write::Set => BundleMask::ALL,
    };
    let mut fields: Fields = vec![("trust_domain_id".into(), wire.trust_domain.clone())];
    if mask.refresh_hint {
        fields.push(("refresh_hint".into(), wire.refresh_hint.to_string()));
    }
    if mask.sequence_number {
        fields.push(("sequence_number".into(), wire.sequence_number.to_string()));
    }
    let x509 = if mask.x509_authorities { &*wire.x509_authorities } else { &[] };
    let jwt = if mask.jwt_authorities { &*wire.jwt_authorities } else { &[] };
    let wit = if mask.wit_authorities { &*wire.wit_authorities } else { &[] };
    fields.extend(authority_fields(x509, jwt, wit));
    fields
}

fn mode_name(mode: DeleteMode) -> &'static str {
    match mode {
        DeleteMode::Restrict => "RESTRICT",
        DeleteMode::Dissociate => "DISSOCIATE",
        DeleteMode::Delete => "DELETE",
    }
}

/// What is done with a federated bundle.
#[derive(Clone, Copy)]
pub(super) enum Write {
    Create,
    Update(BundleMask),
    Set,
}

impl Api {
    async fn count_bundles(
        &self,
        permit: Permit<method::CountBundles>,
        _: pb::CountBundlesRequest,
    ) -> Result<pb::CountBundlesResponse, Status> {
        self.be_current().await;
        let count = self.bundles.all().len();
        permit.audit();
        Ok(pb::CountBundlesResponse { count: count32(count) })
    }

    async fn get_bundle(
        &self,
        permit: Permit<method::GetBundle>,
        request: pb::GetBundleRequest,
    ) -> Result<types::Bundle, Status> {
        permit.note("trust_domain_id", &self.trust_domain);
        let own = self.bundles.own().ok_or_else(|| permit.fail(ErrorKind::NotFound, "bundle not found"))?;
        if let Some((agent, issuer)) = permit.peer().agent() {
            let entries = || self.entries.read().authorized(agent, &self.nodes.selectors(agent)).len();
            self.domain.agents.answered(agent, issuer, own.bundle.sequence_number, entries);
        }
        permit.audit();
        Ok(masked(&own.bundle, request.output_mask.as_ref()))
    }

    async fn append_bundle(
        &self,
        permit: Permit<method::AppendBundle>,
        request: pb::AppendBundleRequest,
    ) -> Result<types::Bundle, Status> {
        if permit.audited() {
            let wit = &request.wit_authorities;
            let fields = authority_fields(&request.x509_authorities, &request.jwt_authorities, wit);
            fields.into_iter().for_each(|(name, value)| permit.note(name, value));
        }
        let keyless = request.jwt_authorities.is_empty() && request.wit_authorities.is_empty();
        if keyless && request.x509_authorities.is_empty() {
            return Err(permit.fail(ErrorKind::InvalidArgument, "no authorities to append"));
        }
        permit.about("trust_domain_id", &self.trust_domain);
        let invalid = |what, why: String| permit.fail_with(ErrorKind::InvalidArgument, what, why);
        let jwt = jwt_from_proto(&request.jwt_authorities);
        let x509 = x509_from_proto(&request.x509_authorities);
        let wit = wit_from_proto(&request.wit_authorities);
        let more = Bundle {
            jwt_authorities: jwt.map_err(|why| invalid("failed to convert JWT authority", why))?,
            x509_authorities: x509.map_err(|why| invalid("failed to convert X.509 authority", why))?,
            wit_authorities: wit.map_err(|why| invalid("failed to convert WIT authority", why))?,
            ..Bundle::empty(self.trust_domain.clone())
        };
        let bundle = self.append_own(more).await;
        let bundle = bundle.map_err(|e| store_failed(&permit, "failed to append bundle", &e))?;
        permit.audit();
        Ok(masked(&bundle, request.output_mask.as_ref()))
    }

    /// Adds to the own bundle what is not there yet and lets the feed know, to the end even if the caller goes away.
    pub(super) async fn append_own(&self, more: Bundle) -> Result<Bundle, StoreError> {
        let (store, feed) = (self.store.clone(), self.bundles.clone());
        let append = async move {
            let begun = feed.history();
            let bundle = store.append_bundle(&more).await?;
            feed.publish_since(begun, bundle.clone());
            Ok(bundle)
        };
        self.turn.take(append).await
    }

    async fn list_federated_bundles(
        &self,
        permit: Permit<method::ListFederatedBundles>,
        request: pb::ListFederatedBundlesRequest,
    ) -> Result<pb::ListFederatedBundlesResponse, Status> {
        let page = page(request.page_size, &request.page_token);
        self.be_current().await;
        let listed = self.bundles.list(page.as_ref(), self.datastore_is_away()).await;
        let listed = listed.map_err(|e| store_failed(&permit, "failed to list bundles", &e))?;
        let foreign = listed.items.iter().map(|listed| &listed.bundle);
        let foreign = foreign.filter(|bundle| bundle.trust_domain != self.trust_domain);
        let bundles = foreign.map(|bundle| masked(bundle, request.output_mask.as_ref())).collect();
        permit.audit();
        Ok(pb::ListFederatedBundlesResponse { bundles, next_page_token: listed.next_page_token })
    }

    async fn get_federated_bundle(
        &self,
        permit: Permit<method::GetFederatedBundle>,
        request: pb::GetFederatedBundleRequest,
    ) -> Result<types::Bundle, Status> {
        permit.note("trust_domain_id", &request.trust_domain);
        permit.about("trust_domain_id", &request.trust_domain);
        let trust_domain = TrustDomain::parse(&request.trust_domain)
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "trust domain argument is not valid", e))?;
        if trust_domain == self.trust_domain {
            let message = "getting a federated bundle for the server's own trust domain is not allowed";
            return Err(permit.fail(ErrorKind::InvalidArgument, message));
        }
        let found = self.bundles.bundle(trust_domain.as_str());
        let found = found.ok_or_else(|| permit.fail(ErrorKind::NotFound, "bundle not found"))?;
        permit.audit();
        Ok(masked(&found.bundle, request.output_mask.as_ref()))
    }

    /// Writes one federated bundle and lets the feed know, to the end even if the caller goes away.
    async fn write_federated(&self, call: &Call, wire: &types::Bundle, write: Write) -> Result<Bundle, types::Status> {
        call.about("trust_domain_id", &wire.trust_domain);
        let invalid = |what: &str, why: String| call.item_with(ErrorKind::InvalidArgument, what, why);
        let trust_domain = TrustDomain::parse(&wire.trust_domain)
            .map_err(|e| invalid("trust domain argument is not valid", e.to_string()))?;
        if trust_domain == self.trust_domain {
            let doing = match write {
                Write::Create => "creating",
                Write::Update(_) => "updating",
                Write::Set => "setting",
            };
            let message = format!("{doing} a federated bundle for the server's own trust domain is not allowed");
            return Err(call.item(ErrorKind::InvalidArgument, &message));
        }
        let bundle = bundle_from_proto(trust_domain, wire).map_err(|why| invalid("failed to convert bundle", why))?;
        let (store, feed) = (self.store.clone(), self.bundles.clone());
        let change = async move {
            let written = match write {
                Write::Create => store.create_bundle(&bundle).await?,
                Write::Update(mask) => store.update_bundle(&bundle, mask).await?,
                Write::Set => store.set_bundle(&bundle).await?,
            };
            feed.refresh_or_later(&written.trust_domain).await;
            Ok(written)
        };
        let written = self.turn.take(change).await.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => call.item(ErrorKind::AlreadyExists, "bundle already exists"),
            ErrorKind::NotFound => call.item(ErrorKind::NotFound, "bundle not found"),
            kind => {
                let kind = if kind == ErrorKind::Unavailable { kind } else { ErrorKind::Internal };
                let message = match write {
                    Write::Create => "unable to create bundle",
                    Write::Update(_) => "failed to update bundle",
                    Write::Set => "failed to set bundle",
                };
                call.item_with(kind, message, error)
            }
        })?;
        match write {
            Write::Create => call.log_debug("Federated bundle created"),
            Write::Update(_) => call.log_debug("Federated bundle updated"),
            Write::Set => call.log_info("Bundle set successfully"),
        }
        Ok(written)
    }

    async fn delete_federated(&self, call: &Call, trust_domain: &str, mode: DeleteMode) -> Result<(), types::Status> {
        call.about("delete_federated_bundle_mode", mode_name(mode));
        call.about("trust_domain_id", trust_domain);
        let trust_domain = TrustDomain::parse(trust_domain)
            .map_err(|e| call.item_with(ErrorKind::InvalidArgument, "trust domain argument is not valid", e))?;
        if trust_domain == self.trust_domain {
            let message = "removing the bundle for the server trust domain is not allowed";
            return Err(call.item(ErrorKind::InvalidArgument, message));
        }
        let deleted = self.entries.delete_bundle(trust_domain, mode, self.bundles.clone()).await;
        deleted.map_err(|error| match error {
            StoreError::NotFound => call.item(ErrorKind::NotFound, "bundle not found"),
            error => call.item_with(error.kind(), "failed to delete federated bundle", error),
        })
    }

    async fn batch_delete(
        &self,
        permit: Permit<method::BatchDeleteFederatedBundle>,
        request: pb::BatchDeleteFederatedBundleRequest,
    ) -> Result<pb::BatchDeleteFederatedBundleResponse, Status> {
        let mode = match Mode::try_from(request.mode) {
            Ok(Mode::Restrict) => DeleteMode::Restrict,
            Ok(Mode::Dissociate) => DeleteMode::Dissociate,
            Ok(Mode::Delete) => DeleteMode::Delete,
            Err(_) => {
                let why = format!("unhandled delete mode \"{}\"", request.mode);
                return Err(permit.fail_with(ErrorKind::InvalidArgument, "failed to parse deletion mode", why));
            }
        };
        let mut results = Vec::with_capacity(request.trust_domains.len());
        for trust_domain in request.trust_domains {
            let status = match self.delete_federated(&permit, &trust_domain, mode).await {
                Ok(()) => ok(),
                Err(status) => Some(status),
            };
            permit.audit_item(status.as_ref(), || {
                vec![("trust_domain_id".into(), trust_domain.clone()), ("mode".into(), mode_name(mode).into())]
            });
            results.push(pb::batch_delete_federated_bundle_response::Result { status, trust_domain });
        }
        Ok(pb::BatchDeleteFederatedBundleResponse { results })
    }
}

/// A batch RPC that writes federated bundles: one result per bundle, in order.
macro_rules! batch {
    ($self:expr, $request:expr, $method:ident, $module:ident, $response:ident, |$wire:ident: &$type:ty| $write:expr) => {
        $self
            .gate
            .unary($request, |permit: Permit<method::$method>, $wire: $type| async move {
                let request = &$wire;
                let mask = request.output_mask;
                let mut results = Vec::with_capacity(request.bundle.len());
                let write = $write;
                for bundle in &request.bundle {
                    let result = match $self.0.write_federated(&permit, bundle, write).await {
                        Ok(written) => {
                            pb::$module::Result { status: ok(), bundle: Some(masked(&written, mask.as_ref())) }
                        }
                        Err(status) => pb::$module::Result { status: Some(status), bundle: None },
                    };
                    permit.audit_item(result.status.as_ref(), || audit_fields(bundle, write));
                    results.push(result);
                }
                Ok(pb::$response { results })
            })
            .await
    };
}

#[async_trait]
impl pb::bundle_server::Bundle for Service {
    async fn count_bundles(
        &self,
        request: Request<pb::CountBundlesRequest>,
    ) -> Result<Response<pb::CountBundlesResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.count_bundles(permit, request)).await
    }

    async fn get_bundle(&self, request: Request<pb::GetBundleRequest>) -> Result<Response<types::Bundle>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_bundle(permit, request)).await
    }

    async fn append_bundle(
        &self,
        request: Request<pb::AppendBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        self.gate.unary(request, |permit, request| self.0.append_bundle(permit, request)).await
    }

    async fn publish_jwt_authority(
        &self,
        request: Request<pb::PublishJwtAuthorityRequest>,
    ) -> Result<Response<pb::PublishJwtAuthorityResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.publish_jwt_authority(permit, request)).await
    }

    async fn publish_wit_authority(
        &self,
        request: Request<pb::PublishWitAuthorityRequest>,
    ) -> Result<Response<pb::PublishWitAuthorityResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.publish_wit_authority(permit, request)).await
    }

    async fn list_federated_bundles(
        &self,
        request: Request<pb::ListFederatedBundlesRequest>,
    ) -> Result<Response<pb::ListFederatedBundlesResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.list_federated_bundles(permit, request)).await
    }

    async fn get_federated_bundle(
        &self,
        request: Request<pb::GetFederatedBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_federated_bundle(permit, request)).await
    }

    async fn batch_create_federated_bundle(
        &self,
        request: Request<pb::BatchCreateFederatedBundleRequest>,
    ) -> Result<Response<pb::BatchCreateFederatedBundleResponse>, Status> {
        batch!(
            self,
            request,
            BatchCreateFederatedBundle,
            batch_create_federated_bundle_response,
            BatchCreateFederatedBundleResponse,
            |request: &pb::BatchCreateFederatedBundleRequest| Write::Create
        )
    }

    async fn batch_update_federated_bundle(
        &self,
        request: Request<pb::BatchUpdateFederatedBundleRequest>,
    ) -> Result<Response<pb::BatchUpdateFederatedBundleResponse>, Status> {
        batch!(
            self,
            request,
            BatchUpdateFederatedBundle,
            batch_update_federated_bundle_response,
            BatchUpdateFederatedBundleResponse,
            |request: &pb::BatchUpdateFederatedBundleRequest| Write::Update(store_mask(request.input_mask.as_ref()))
        )
    }

    async fn batch_set_federated_bundle(
        &self,
        request: Request<pb::BatchSetFederatedBundleRequest>,
    ) -> Result<Response<pb::BatchSetFederatedBundleResponse>, Status> {
        batch!(
            self,
            request,
            BatchSetFederatedBundle,
            batch_set_federated_bundle_response,
            BatchSetFederatedBundleResponse,
            |request: &pb::BatchSetFederatedBundleRequest| Write::Set
        )
    }

    async fn batch_delete_federated_bundle(
        &self,
        request: Request<pb::BatchDeleteFederatedBundleRequest>,
    ) -> Result<Response<pb::BatchDeleteFederatedBundleResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_delete(permit, request)).await
    }
}
