//! `spire.api.server.entry.v1.Entry`: registration entries.

use super::dns::check_dns_name;
use super::stream::Driven;
use super::{Api, IdRule, count32, id_from_proto, ok, page, selectors_field, selectors_from_proto, store_failed};
use crate::authz::{Call, Fields, Permit, method};
use crate::entries::Indexed;
use finial_core::{Entry, EntryId, ErrorKind, SelectorSet, SpiffeId, TrustDomain};
use finial_proto::convert::{entry_to_proto, mask_entry, match_behavior};
use finial_proto::encoded::{Encoded, GetAuthorizedEntriesResponse, SyncAuthorizedEntriesResponse};
use finial_proto::server::entry as pb;
use finial_proto::types;
use finial_store::{CreatedEntry, EntryFilter, EntryUpdate, StoreError};
use tonic::{Request, Response, Status, Streaming, async_trait};

/// Longest hint, in bytes.
const HINT_BYTES_MAX: usize = 1024;

/// Makes the store's filter from either of the two wire types, which have the same fields.
macro_rules! filter_from_proto {
    ($api:expr, $call:expr, $filter:expr) => {{
        let mut filter = EntryFilter::default();
        if let Some(wire) = $filter {
            note_filter!($call, wire);
            filter.hint = wire.by_hint.filter(|hint| !hint.is_empty());
            filter.downstream = wire.by_downstream;
            filter.parent_id =
                $api.filter_id($call, "malformed parent ID filter", wire.by_parent_id, IdRule::Member)?;
            filter.spiffe_id =
                $api.filter_id($call, "malformed SPIFFE ID filter", wire.by_spiffe_id, IdRule::Workload)?;
            filter.selectors = wire.by_selectors.map(|m| selector_filter($call, &m)).transpose()?;
            filter.federates_with = wire.by_federates_with.map(|m| federation_filter($call, &m)).transpose()?;
        }
        filter
    }};
}

macro_rules! note_filter {
    ($call:expr, $wire:expr) => {
        if $call.audited() {
            let id = |id: &types::Spiffeid| format!("spiffe://{}{}", id.trust_domain, id.path);
            $wire.by_hint.iter().for_each(|hint| $call.note("hint", hint));
            $wire.by_parent_id.iter().for_each(|parent| $call.note("parent_id", id(parent)));
            $wire.by_spiffe_id.iter().for_each(|wanted| $call.note("spiffe_id", id(wanted)));
            if let Some(m) = &$wire.by_selectors {
                $call.note("by_selector_match", m.r#match().as_str_name());
                $call.note("by_selectors", selectors_field(&m.selectors));
            }
            if let Some(m) = &$wire.by_federates_with {
                $call.note("federates_with_match", m.r#match().as_str_name());
                $call.note("federates_with", m.trust_domains.join(","));
            }
            $wire.by_downstream.iter().for_each(|downstream| $call.note("downstream", downstream));
        }
    };
}

fn selector_filter(
    call: &Call,
    wire: &types::SelectorMatch,
) -> Result<(finial_core::MatchBehavior, Vec<finial_core::Selector>), Status> {
    const WHAT: &str = "malformed selectors filter";
    let bad = |why: String| call.fail_with(ErrorKind::InvalidArgument, WHAT, why);
    let selectors = selectors_from_proto(&wire.selectors).map_err(|e| bad(e.to_string()))?;
    if selectors.is_empty() {
        return Err(bad("empty selector set".into()));
    }
    let behavior = match_behavior(wire.r#match).ok_or_else(|| bad(format!("unhandled match {}", wire.r#match)))?;
    Ok((behavior, selectors))
}

fn federation_filter(
    call: &Call,
    wire: &types::FederatesWithMatch,
) -> Result<(finial_core::MatchBehavior, Vec<TrustDomain>), Status> {
    const WHAT: &str = "malformed federates with filter";
    let bad = |why: String| call.fail_with(ErrorKind::InvalidArgument, WHAT, why);
    let domains: Result<Vec<_>, _> = wire.trust_domains.iter().map(|td| TrustDomain::parse(td)).collect();
    let domains = domains.map_err(|e| bad(e.to_string()))?;
    if domains.is_empty() {
        return Err(bad("empty trust domain set".into()));
    }
    let behavior = match_behavior(wire.r#match).ok_or_else(|| bad(format!("unhandled match {}", wire.r#match)))?;
    Ok((behavior, domains))
}

/// Why an entry on the wire cannot be stored, in SPIRE's words.
type Refused = String;

/// Reads the parts of an entry that `mask` names (all, without one) as a change. Parent, SPIFFE ID and selectors must be
/// good if they are named; everything else may be empty.
fn update_from_proto(
    trust_domain: &TrustDomain,
    wire: &types::Entry,
    mask: Option<&types::EntryMask>,
) -> Result<EntryUpdate, Refused> {
    let wants = |part: fn(&types::EntryMask) -> bool| mask.is_none_or(part);
    let mut update = EntryUpdate::default();
    if wants(|m| m.parent_id) {
        let id = id_from_proto(trust_domain, wire.parent_id.as_ref(), IdRule::Member);
        update.parent_id = Some(id.map_err(|e| format!("invalid parent ID: {e}"))?);
    }
    if wants(|m| m.spiffe_id) {
        let id = id_from_proto(trust_domain, wire.spiffe_id.as_ref(), IdRule::Workload);
        update.spiffe_id = Some(id.map_err(|e| format!("invalid spiffe ID: {e}"))?);
    }
    if wants(|m| m.dns_names) {
        for name in &wire.dns_names {
            check_dns_name(name).map_err(|e| format!("invalid DNS name: {e}"))?;
        }
        update.dns_names = Some(wire.dns_names.clone());
    }
    if wants(|m| m.federates_with) {
        let domains: Result<Vec<_>, _> = wire.federates_with.iter().map(|td| TrustDomain::parse(td)).collect();
        update.federates_with = Some(domains.map_err(|e| format!("invalid federated trust domain: {e}"))?);
    }
    if wants(|m| m.selectors) {
        if wire.selectors.is_empty() {
            return Err("selector list is empty".into());
        }
        let selectors = selectors_from_proto(&wire.selectors).map_err(|e| e.to_string())?;
        update.selectors = Some(SelectorSet::new(selectors));
    }
    if wants(|m| m.hint) {
        if wire.hint.len() > HINT_BYTES_MAX {
            return Err(format!("hint is too long, max length is {HINT_BYTES_MAX} characters"));
        }
        update.hint = Some(wire.hint.clone());
    }
    update.admin = wants(|m| m.admin).then_some(wire.admin);
    update.downstream = wants(|m| m.downstream).then_some(wire.downstream);
    update.expires_at = wants(|m| m.expires_at).then_some(wire.expires_at);
    update.store_svid = wants(|m| m.store_svid).then_some(wire.store_svid);
    update.x509_svid_ttl = wants(|m| m.x509_svid_ttl).then_some(wire.x509_svid_ttl);
    update.jwt_svid_ttl = wants(|m| m.jwt_svid_ttl).then_some(wire.jwt_svid_ttl);
    if wants(|m| m.additional_attributes) {
        let attributes = wire.additional_attributes.unwrap_or_default();
        update.disable_x509_svid_prefetch = Some(attributes.disable_x509_svid_prefetch);
        update.jwt_svid_include_jti = Some(attributes.jwt_svid_include_jti);
    }
    Ok(update)
}

/// Reads a whole new entry. Its ID is made here unless the request brings one.
fn entry_from_proto(trust_domain: &TrustDomain, wire: &types::Entry) -> Result<Entry, (&'static str, Refused)> {
    let convert = |why: String| ("failed to convert entry", why);
    let parts = update_from_proto(trust_domain, wire, None).map_err(convert)?;
    let id = if wire.id.is_empty() { new_entry_id() } else { EntryId::parse(&wire.id) };
    let id = id.map_err(|e| ("failed to create entry", format!("datastore-validation: {e}")))?;
    let missing = || convert("selector list is empty".into());
    Ok(Entry {
        id,
        spiffe_id: parts.spiffe_id.ok_or_else(missing)?,
        parent_id: parts.parent_id.ok_or_else(missing)?,
        selectors: parts.selectors.ok_or_else(missing)?,
        x509_svid_ttl: wire.x509_svid_ttl,
        jwt_svid_ttl: wire.jwt_svid_ttl,
        federates_with: parts.federates_with.unwrap_or_default(),
        admin: wire.admin,
        downstream: wire.downstream,
        expires_at: wire.expires_at,
        dns_names: parts.dns_names.unwrap_or_default(),
        revision_number: 0,
        store_svid: wire.store_svid,
        hint: parts.hint.unwrap_or_default(),
        created_at: 0,
        disable_x509_svid_prefetch: parts.disable_x509_svid_prefetch.unwrap_or_default(),
        jwt_svid_include_jti: parts.jwt_svid_include_jti.unwrap_or_default(),
    })
}

/// A random UUID.
pub(super) fn new_entry_id() -> Result<EntryId, finial_core::EntryIdError> {
    EntryId::parse(&uuid::Uuid::new_v4().to_string())
}

/// Blanks what the mask does not name. The ID stays.
pub(super) fn masked(mut entry: types::Entry, mask: Option<&types::EntryMask>) -> types::Entry {
    if let Some(mask) = mask {
        mask_entry(&mut entry, mask);
    }
    entry
}

fn audit_fields(wire: &types::Entry, mask: Option<&types::EntryMask>) -> Fields {
    let wants = |part: fn(&types::EntryMask) -> bool| mask.is_none_or(part);
    let id = |id: &types::Spiffeid| format!("spiffe://{}{}", id.trust_domain, id.path);
    let texts = [
        ("entry_id", true, wire.id.clone()),
        ("spiffe_id", wants(|m| m.spiffe_id), wire.spiffe_id.as_ref().map(id).unwrap_or_default()),
        ("parent_id", wants(|m| m.parent_id), wire.parent_id.as_ref().map(id).unwrap_or_default()),
        ("selectors", wants(|m| m.selectors), selectors_field(&wire.selectors)),
        ("federates_with", wants(|m| m.federates_with), wire.federates_with.join(",")),
        ("dns_name", wants(|m| m.dns_names), wire.dns_names.join(",")),
    ];
    let values = [
        ("x509_svid_ttl", wants(|m| m.x509_svid_ttl), wire.x509_svid_ttl.to_string()),
        ("jwt_svid_ttl", wants(|m| m.jwt_svid_ttl), wire.jwt_svid_ttl.to_string()),
        ("admin", wants(|m| m.admin), wire.admin.to_string()),
        ("downstream", wants(|m| m.downstream), wire.downstream.to_string()),
        ("expires_at", wants(|m| m.expires_at), wire.expires_at.to_string()),
        ("revision_number", wants(|m| m.revision_number), wire.revision_number.to_string()),
        ("store_svid", wants(|m| m.store_svid), wire.store_svid.to_string()),
        ("hint", wants(|m| m.hint), wire.hint.clone()),
        ("created_at", wants(|m| m.created_at), wire.created_at.to_string()),
    ];
    let texts = texts.into_iter().filter(|(_, wanted, text)| *wanted && !text.is_empty());
    let values = values.into_iter().filter(|(_, wanted, _)| *wanted);
    texts.chain(values).map(|(name, _, value)| (name.into(), value)).collect()
}

fn update_failed(call: &Call, error: &StoreError) -> types::Status {
    call.item_with(error.kind(), "failed to update entry", error)
}

impl Api {
    fn filter_id(
        &self,
        call: &Call,
        message: &str,
        id: Option<types::Spiffeid>,
        rule: IdRule,
    ) -> Result<Option<SpiffeId>, Status> {
        let read = |id| id_from_proto(&self.trust_domain, Some(&id), rule);
        id.map(read).transpose().map_err(|e| call.fail_with(ErrorKind::InvalidArgument, message, e))
    }

    async fn count_entries(
        &self,
        permit: Permit<method::CountEntries>,
        request: pb::CountEntriesRequest,
    ) -> Result<pb::CountEntriesResponse, Status> {
        let filter = filter_from_proto!(self, &permit, request.filter);
        self.be_current().await;
        let count = u64::try_from(self.entries.count_matching(&filter).await).unwrap_or(u64::MAX);
        permit.audit();
        Ok(pb::CountEntriesResponse { count: count32(count) })
    }

    async fn list_entries(
        &self,
        permit: Permit<method::ListEntries>,
        request: pb::ListEntriesRequest,
    ) -> Result<pb::ListEntriesResponse, Status> {
        let filter = filter_from_proto!(self, &permit, request.filter);
        let page = page(request.page_size, &request.page_token);
        self.be_current().await;
        let listed = self.entries.list(&filter, page.as_ref()).await;
        let listed = listed.map_err(|e| store_failed(&permit, "failed to list entries", &e))?;
        let mask = request.output_mask.as_ref();
        let entries = listed.items.into_iter().map(|entry| masked(entry, mask)).collect();
        permit.audit();
        Ok(pb::ListEntriesResponse { entries, next_page_token: listed.next_page_token })
    }

    async fn get_entry(
        &self,
        permit: Permit<method::GetEntry>,
        request: pb::GetEntryRequest,
    ) -> Result<types::Entry, Status> {
        if request.id.is_empty() {
            return Err(permit.fail(ErrorKind::InvalidArgument, "missing ID"));
        }
        permit.note("entry_id", &request.id);
        permit.about("entry_id", &request.id);
        self.be_current().await;
        let entry = self.entries.get(&request.id).ok_or_else(|| permit.fail(ErrorKind::NotFound, "entry not found"))?;
        permit.audit();
        Ok(masked(entry.to_proto(), request.output_mask.as_ref()))
    }

    async fn batch_create_entry(
        &self,
        permit: Permit<method::BatchCreateEntry>,
        request: pb::BatchCreateEntryRequest,
    ) -> Result<pb::BatchCreateEntryResponse, Status> {
        let mask = request.output_mask.as_ref();
        let read = |wire: &types::Entry| {
            let entry = entry_from_proto(&self.trust_domain, wire);
            entry.map_err(|(what, why)| permit.item_with(ErrorKind::InvalidArgument, what, why))
        };
        let parsed: Vec<_> = request.entries.iter().map(read).collect();
        let good: Vec<Entry> = parsed.iter().flatten().cloned().collect();
        let created = if good.is_empty() { Ok(Vec::new()) } else { self.entries.create(good).await };
        let created = created.map_err(|e| store_failed(&permit, "failed to create entry", &e))?;
        let mut created = created.into_iter();
        let results = parsed.into_iter().map(|parsed| match parsed {
            Err(status) => (Some(status), None),
            Ok(entry) => match created.next() {
                Some(Ok(CreatedEntry { entry, existing: false, .. })) => (ok(), Some(entry)),
                Some(Ok(CreatedEntry { entry, existing: true, .. })) => {
                    let message = "similar entry already exists".into();
                    (Some(types::Status { code: tonic::Code::AlreadyExists as i32, message }), Some(entry))
                }
                Some(Err(error)) => {
                    permit.about("spiffe_id", &entry.spiffe_id);
                    (Some(permit.item_with(error.kind(), "failed to create entry", error)), None)
                }
                None => (Some(permit.item(ErrorKind::Internal, "failed to create entry")), None),
            },
        });
        let to_result = |(status, entry): (_, Option<Entry>)| pb::batch_create_entry_response::Result {
            status,
            entry: entry.map(|entry| masked(entry_to_proto(&entry), mask)),
        };
        let results: Vec<_> = results.map(to_result).collect();
        for (result, wire) in results.iter().zip(&request.entries) {
            permit.audit_item(result.status.as_ref(), || audit_fields(wire, None));
        }
        Ok(pb::BatchCreateEntryResponse { results })
    }

    async fn batch_update_entry(
        &self,
        permit: Permit<method::BatchUpdateEntry>,
        request: pb::BatchUpdateEntryRequest,
    ) -> Result<pb::BatchUpdateEntryResponse, Status> {
        let mask = request.input_mask.as_ref();
        let mut updates = Vec::with_capacity(request.entries.len());
        let read = |wire: &types::Entry| {
            permit.about("entry_id", &wire.id);
            let update = update_from_proto(&self.trust_domain, wire, mask);
            let update =
                update.map_err(|why| permit.item_with(ErrorKind::InvalidArgument, "failed to convert entry", why))?;
            let id = EntryId::parse(&wire.id).map_err(|_| update_failed(&permit, &StoreError::NotFound))?;
            updates.push((id, update));
            Ok(())
        };
        let parsed: Vec<Result<(), types::Status>> = request.entries.iter().map(read).collect();
        let mut updated = if updates.is_empty() { Ok(Vec::new()) } else { self.entries.update(updates).await }
            .map(IntoIterator::into_iter);
        let mut results = Vec::with_capacity(parsed.len());
        for (wire, parsed) in request.entries.iter().zip(parsed) {
            permit.about("entry_id", &wire.id);
            let result = parsed.and_then(|()| match updated.as_mut().map(Iterator::next) {
                Ok(Some(Ok(entry))) => Ok(entry),
                Ok(Some(Err(error))) => Err(update_failed(&permit, &error)),
                Ok(None) => Err(permit.item(ErrorKind::Internal, "failed to update entry")),
                Err(error) => Err(update_failed(&permit, error)),
            });
            let (status, entry) = match result {
                Ok(entry) => (ok(), Some(masked(entry_to_proto(&entry), request.output_mask.as_ref()))),
                Err(status) => (Some(status), None),
            };
            permit.audit_item(status.as_ref(), || audit_fields(wire, mask));
            results.push(pb::batch_update_entry_response::Result { status, entry });
        }
        Ok(pb::BatchUpdateEntryResponse { results })
    }

    async fn batch_delete_entry(
        &self,
        permit: Permit<method::BatchDeleteEntry>,
        request: pb::BatchDeleteEntryRequest,
    ) -> Result<pb::BatchDeleteEntryResponse, Status> {
        let parsed: Vec<_> = request.ids.iter().map(|id| EntryId::parse(id)).collect();
        let deleted = self.entries.delete(parsed.iter().flatten().cloned().collect()).await;
        let mut deleted = deleted.map_err(|e| store_failed(&permit, "failed to delete entry", &e))?.into_iter();
        let mut results = Vec::with_capacity(parsed.len());
        for (id, parsed) in request.ids.into_iter().zip(parsed) {
            permit.about("entry_id", &id);
            let status = match parsed {
                Err(_) if id.is_empty() => Some(permit.item(ErrorKind::InvalidArgument, "missing entry ID")),
                Err(_) => Some(permit.item(ErrorKind::NotFound, "entry not found")),
                Ok(_) => match deleted.next() {
                    Some(Ok(())) => ok(),
                    Some(Err(StoreError::NotFound)) => Some(permit.item(ErrorKind::NotFound, "entry not found")),
                    Some(Err(e)) => Some(permit.item_with(e.kind(), "failed to delete entry", e)),
                    None => Some(permit.item(ErrorKind::Internal, "failed to delete entry")),
                },
            };
            permit.audit_item(status.as_ref(), || vec![("entry_id".into(), id.clone())]);
            results.push(pb::batch_delete_entry_response::Result { id, status });
        }
        Ok(pb::BatchDeleteEntryResponse { results })
    }

    async fn get_authorized_entries(
        &self,
        permit: Permit<method::GetAuthorizedEntries>,
        request: pb::GetAuthorizedEntriesRequest,
    ) -> Result<GetAuthorizedEntriesResponse, Status> {
        let (agent, selectors) = permit.agent()?;
        let found = self.entries.authorized(agent, &selectors);
        permit.audit();
        let (head, mask) = (pb::GetAuthorizedEntriesResponse::default(), request.output_mask.as_ref());
        Ok(Encoded::with_entries(&head, mask, found.iter().map(Indexed::encoded)))
    }
}

#[async_trait]
impl pb::encoded::Entry for super::Service {
    async fn count_entries(
        &self,
        request: Request<pb::CountEntriesRequest>,
    ) -> Result<Response<pb::CountEntriesResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.count_entries(permit, request)).await
    }

    async fn list_entries(
        &self,
        request: Request<pb::ListEntriesRequest>,
    ) -> Result<Response<pb::ListEntriesResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.list_entries(permit, request)).await
    }

    async fn get_entry(&self, request: Request<pb::GetEntryRequest>) -> Result<Response<types::Entry>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_entry(permit, request)).await
    }

    async fn batch_create_entry(
        &self,
        request: Request<pb::BatchCreateEntryRequest>,
    ) -> Result<Response<pb::BatchCreateEntryResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_create_entry(permit, request)).await
    }

    async fn batch_update_entry(
        &self,
        request: Request<pb::BatchUpdateEntryRequest>,
    ) -> Result<Response<pb::BatchUpdateEntryResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_update_entry(permit, request)).await
    }

    async fn batch_delete_entry(
        &self,
        request: Request<pb::BatchDeleteEntryRequest>,
    ) -> Result<Response<pb::BatchDeleteEntryResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.batch_delete_entry(permit, request)).await
    }

    async fn get_authorized_entries(
        &self,
        request: Request<pb::GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_authorized_entries(permit, request)).await
    }

    type SyncAuthorizedEntriesStream = Driven<SyncAuthorizedEntriesResponse>;

    async fn sync_authorized_entries(
        &self,
        request: Request<Streaming<pb::SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        let api = self.0.clone();
        let run = |permit, inlet, outlet| async move { api.sync_entries(permit, inlet, outlet).await };
        self.gate.stream(request, super::sync::IDLE_MAX, run).await
    }
}
