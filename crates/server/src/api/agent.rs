//! `spire.api.server.agent.v1.Agent`: management of agents, renewal and status. Attestation is in [`super::attest`].

use super::stream::Driven;
use super::{
    Api, IdRule, Service, count32, der_chain, id_from_proto, page, selectors_field, selectors_from_proto, store_failed,
};
use crate::authz::{Call, Identity, Peer, Permit, method};
use crate::issue::IssuedX509;
use crate::nodes::Renewal;
use finial_core::{AgentRecord, Entry, ErrorKind, JoinToken, Selector, SelectorSet, SpiffeId, UnixSeconds};
use finial_crypto::{Csr, PublicKey, sha256_hex};
use finial_proto::convert::{agent_to_proto, id_to_proto, mask_agent, match_behavior, permission_denied};
use finial_proto::server::agent as pb;
use finial_proto::types;
use finial_proto::types::permission_denied_details::Reason;
use finial_store::{AgentFilter, AgentUpdate, StoreError};
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tonic::{Request, Response, Status, Streaming, async_trait};

/// Longest version text of an agent, in bytes.
const VERSION_BYTES_MAX: usize = 255;
/// Longest join token, in bytes: the column's width, and it becomes a part of the agent's path.
const TOKEN_BYTES_MAX: usize = 255;
/// `2006-01-02 15:04:05 -0700 -07`, in Go's notation.
const EXPIRES_BEFORE: &[BorrowedFormatItem<'_>] = format_description!(
    "[year]-[month]-[day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute] [offset_hour sign:mandatory]"
);

/// Makes the store's filter from either of the two wire types, which have the same fields.
macro_rules! filter_from_proto {
    ($call:expr, $filter:expr) => {{
        let mut filter = AgentFilter::default();
        if let Some(wire) = $filter {
            filter.banned = wire.by_banned;
            filter.can_reattest = wire.by_can_reattest;
            filter.attestation_type = Some(wire.by_attestation_type).filter(|name| !name.is_empty());
            filter.expires_before = expires_before($call, &wire.by_expires_before)?;
            filter.selectors = wire.by_selector_match.map(|m| selector_filter($call, &m)).transpose()?;
            filter.banned.iter().for_each(|banned| $call.note("by_banned", banned));
            filter.can_reattest.iter().for_each(|can| $call.note("by_can_reattest", can));
            filter.attestation_type.iter().for_each(|name| $call.note("node_attestor_type", name));
        }
        filter
    }};
}

fn selector_filter(
    call: &Call,
    wire: &types::SelectorMatch,
) -> Result<(finial_core::MatchBehavior, Vec<Selector>), Status> {
    let bad = |why: String| call.fail_with(ErrorKind::InvalidArgument, "failed to parse selectors", why);
    call.note("by_selector_match", wire.r#match().as_str_name());
    call.note("by_selectors", selectors_field(&wire.selectors));
    let selectors = selectors_from_proto(&wire.selectors).map_err(|e| bad(e.to_string()))?;
    if selectors.is_empty() {
        return Err(bad("empty selector set".into()));
    }
    let behavior = match_behavior(wire.r#match).ok_or_else(|| bad(format!("unhandled match {}", wire.r#match)))?;
    Ok((behavior, selectors))
}

/// SPIRE ignores a text that it cannot read and then lists everything, which a purge would delete; we refuse it.
fn expires_before(call: &Call, text: &str) -> Result<Option<UnixSeconds>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    match time::OffsetDateTime::parse(text, &EXPIRES_BEFORE) {
        Ok(moment) => Ok(Some(moment.unix_timestamp())),
        Err(e) => Err(call.fail_with(ErrorKind::InvalidArgument, "failed to parse expires before filter", e)),
    }
}

fn masked(record: &AgentRecord, mask: Option<&types::AgentMask>) -> types::Agent {
    let mut agent = agent_to_proto(record);
    if let Some(mask) = mask {
        mask_agent(&mut agent, mask);
    }
    agent
}

impl Api {
    fn agent_id(&self, call: &Call, id: Option<&types::Spiffeid>) -> Result<SpiffeId, Status> {
        let id = id_from_proto(&self.trust_domain, id, IdRule::Agent)
            .map_err(|e| call.fail_with(ErrorKind::InvalidArgument, "invalid agent ID", e))?;
        call.note("spiffe_id", &id);
        call.about("spiffe_id", &id);
        Ok(id)
    }

    async fn count_agents(
        &self,
        permit: Permit<method::CountAgents>,
        request: pb::CountAgentsRequest,
    ) -> Result<pb::CountAgentsResponse, Status> {
        let filter = filter_from_proto!(&permit, request.filter);
        let count = if self.datastore_is_away() {
            u64::try_from(self.nodes.count_matching(&filter)).unwrap_or(u64::MAX)
        } else {
            let count = self.store.count_nodes(&filter).await;
            count.map_err(|e| store_failed(&permit, "failed to count agents", &e))?
        };
        permit.audit();
        Ok(pb::CountAgentsResponse { count: count32(count) })
    }

    async fn list_agents(
        &self,
        permit: Permit<method::ListAgents>,
        request: pb::ListAgentsRequest,
    ) -> Result<pb::ListAgentsResponse, Status> {
        let filter = filter_from_proto!(&permit, request.filter);
        let page = page(request.page_size, &request.page_token);
        let listed = match self.datastore_is_away() {
            true => self.nodes.list(&filter, page.as_ref()),
            false => self.store.list_nodes(&filter, page.as_ref()).await,
        };
        let listed = listed.map_err(|e| store_failed(&permit, "failed to list agents", &e))?;
        let agents = listed.items.iter().map(|agent| masked(agent, request.output_mask.as_ref())).collect();
        permit.audit();
        Ok(pb::ListAgentsResponse { agents, next_page_token: listed.next_page_token })
    }

    async fn get_agent(
        &self,
        permit: Permit<method::GetAgent>,
        request: pb::GetAgentRequest,
    ) -> Result<types::Agent, Status> {
        let id = self.agent_id(&permit, request.id.as_ref())?;
        let found = match self.datastore_is_away() {
            true => Ok(self.nodes.record(&id)),
            false => self.store.fetch_node(&id).await,
        };
        let found = found.map_err(|e| store_failed(&permit, "failed to fetch agent", &e))?;
        let agent = found.ok_or_else(|| permit.fail(ErrorKind::NotFound, "agent not found"))?;
        permit.audit();
        Ok(masked(&agent, request.output_mask.as_ref()))
    }

    async fn delete_agent(
        &self,
        permit: Permit<method::DeleteAgent>,
        request: pb::DeleteAgentRequest,
    ) -> Result<(), Status> {
        let id = self.agent_id(&permit, request.id.as_ref())?;
        let deleted = self.nodes.delete(id).await;
        self.changed(&permit, deleted, "failed to remove agent")?;
        permit.log_info("Agent deleted");
        permit.audit();
        Ok(())
    }

    async fn ban_agent(&self, permit: Permit<method::BanAgent>, request: pb::BanAgentRequest) -> Result<(), Status> {
        let id = self.agent_id(&permit, request.id.as_ref())?;
        let banned = self.nodes.ban(id).await;
        self.changed(&permit, banned, "failed to ban agent")?;
        permit.log_info("Agent banned");
        permit.audit();
        Ok(())
    }

    fn changed(&self, call: &Call, result: Result<(), StoreError>, message: &str) -> Result<(), Status> {
        result.map_err(|error| match error {
            StoreError::NotFound => call.fail(ErrorKind::NotFound, "agent not found"),
            error => store_failed(call, message, &error),
        })
    }

    /// While the datastore is away, an SVID is given out that says itself which ones it follows: those of the agent, and one
    /// that may be stored although the agent does not get it.
    async fn renew_without_datastore(
        &self,
        call: &Call,
        id: &SpiffeId,
        own: &str,
        doubtful: Option<IssuedX509>,
        key: &PublicKey,
    ) -> Result<Option<IssuedX509>, Status> {
        let Some(known) = self.nodes.serials(id) else { return Ok(None) };
        let follows: Box<[_]> = known.into_iter().chain(doubtful.map(|svid| svid.serial.to_string().into())).collect();
        let signed = self.issuer.agent_x509_svid_following(id, key, &follows).await;
        let svid = signed.map_err(|e| call.fail_with(ErrorKind::Internal, "failed to sign X509 SVID", e))?;
        let noted = self.nodes.renew_without_datastore(id, own, follows, &svid.serial.to_string(), svid.not_after);
        Ok(noted.then_some(svid))
    }

    /// The key of an agent's CSR. SPIRE only parses such CSRs; we verify the signature too, as agents of SPIRE do sign them.
    pub(super) fn agent_key(&self, call: &Call, csr: &[u8]) -> Result<PublicKey, Status> {
        let invalid = |e: &dyn std::fmt::Display| call.fail_with(ErrorKind::InvalidArgument, "failed to parse CSR", e);
        let csr = Csr::parse(csr).map_err(|e| invalid(&e))?;
        csr.verify_proof_of_possession().map_err(|e| invalid(&e))?;
        Ok(csr.public_key().clone())
    }

    pub(super) async fn sign_agent(&self, call: &Call, id: &SpiffeId, key: &PublicKey) -> Result<IssuedX509, Status> {
        let signed = self.issuer.agent_x509_svid(id, key).await;
        signed.map_err(|e| call.fail_with(ErrorKind::Internal, "failed to sign X509 SVID", e))
    }

    async fn renew_agent(
        &self,
        permit: Permit<method::RenewAgent>,
        request: pb::RenewAgentRequest,
    ) -> Result<pb::RenewAgentResponse, Status> {
        let csr = request.params.as_ref().map(|params| &params.csr);
        if let Some(csr) = csr.filter(|csr| permit.audited() && !csr.is_empty()) {
            permit.note("csr", sha256_hex(csr));
        }
        permit.limit(1, "rejecting request due to renew agent rate limiting").await?;
        let id = permit.caller_id()?;
        match self.nodes.can_reattest(id) {
            None => return Err(permit.fail(ErrorKind::NotFound, "agent not found")),
            Some(true) => {
                return Err(permission_denied("agent must reattest instead of renew", Reason::AgentMustReattest));
            }
            Some(false) => {}
        }
        permit.log_info("Renewing agent SVID");
        let csr = csr.ok_or_else(|| permit.fail(ErrorKind::InvalidArgument, "params cannot be nil"))?;
        if csr.is_empty() {
            return Err(permit.fail(ErrorKind::InvalidArgument, "missing CSR"));
        }
        let key = self.agent_key(&permit, csr)?;
        let svid = self.sign_agent(&permit, id, &key).await?;
        let own = match permit.peer() {
            Peer::Remote { identity: Identity::Svid { serial, .. }, .. } => serial.as_str(),
            _ => "",
        };
        let svid = match self.nodes.renew(id, own, svid.serial.to_string(), svid.not_after).await {
            Ok(Renewal::Stored) => Some(svid),
            Ok(Renewal::Superseded) => None,
            Ok(Renewal::DatastoreAway) => self.renew_without_datastore(&permit, id, own, None, &key).await?,
            Ok(Renewal::Doubtful) => self.renew_without_datastore(&permit, id, own, Some(svid), &key).await?,
            // Evicted at another server a moment ago.
            Err(StoreError::NotFound) => None,
            Err(error) => return Err(store_failed(&permit, "failed to update agent", &error)),
        };
        let svid = svid.ok_or_else(|| permit.fail(ErrorKind::NotFound, "agent not found"))?;
        permit.audit();
        Ok(pb::RenewAgentResponse { svid: Some(svid_to_proto(id, &svid)) })
    }

    async fn post_status(
        &self,
        permit: Permit<method::PostStatus>,
        request: pb::PostStatusRequest,
    ) -> Result<pb::PostStatusResponse, Status> {
        permit.limit(1, "rejecting request due to post status rate limiting").await?;
        let id = permit.caller_id()?;
        permit.note("spiffe_id", id);
        permit.about("spiffe_id", id);
        if !request.agent_version.is_empty() {
            if request.agent_version.len() > VERSION_BYTES_MAX {
                let message = "agent version is too long (max 255 characters)";
                return Err(permit.fail(ErrorKind::InvalidArgument, message));
            }
            permit.note("agent_version", &request.agent_version);
            let version = request.agent_version;
            let update = AgentUpdate { agent_version: Some(version.clone()), ..AgentUpdate::default() };
            let updated = self.nodes.update(id.clone(), update).await;
            self.changed(&permit, updated, "failed to update agent")?;
            permit.about("agent_version", version);
            permit.log_debug("Agent status updated");
        }
        permit.audit();
        Ok(pb::PostStatusResponse {})
    }

    async fn create_join_token(
        &self,
        permit: Permit<method::CreateJoinToken>,
        request: pb::CreateJoinTokenRequest,
    ) -> Result<types::JoinToken, Status> {
        if request.ttl < 1 {
            return Err(permit.fail(ErrorKind::InvalidArgument, "ttl is required, you must provide one"));
        }
        permit.note("ttl", request.ttl);
        let alias_id = match &request.agent_id {
            None => None,
            Some(id) => {
                let id = id_from_proto(&self.trust_domain, Some(id), IdRule::Workload)
                    .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "invalid agent ID", e))?;
                permit.note("spiffe_id", &id);
                Some(id)
            }
        };
        let token = match request.token {
            token if token.is_empty() => uuid::Uuid::new_v4().to_string(),
            token => token,
        };
        // A token that cannot be part of an ID could never be used.
        let agent_id = join_token_agent_id(&self.trust_domain, &token)
            .map_err(|e| permit.fail_with(ErrorKind::InvalidArgument, "invalid join token", e))?;
        let alias = alias_id.map(|id| alias_entry(id, agent_id)).transpose();
        let alias = alias.map_err(|e| permit.fail_with(ErrorKind::Internal, "failed to create token", e))?;
        let token = JoinToken { token, expires_at: self.clock.now() + i64::from(request.ttl) };
        let created = self.entries.create_join_token(token.clone(), alias).await;
        created.map_err(|e| {
            let kind = match e.kind() {
                kind @ (ErrorKind::AlreadyExists | ErrorKind::Unavailable) => kind,
                _ => ErrorKind::Internal,
            };
            permit.fail_with(kind, "failed to create token", e)
        })?;
        permit.audit();
        Ok(types::JoinToken { value: token.token, expires_at: token.expires_at })
    }
}

/// `spiffe://TD/spire/agent/join_token/TOKEN`; a token is one path segment of at most 255 bytes.
pub(super) fn join_token_agent_id(
    trust_domain: &finial_core::TrustDomain,
    token: &str,
) -> Result<SpiffeId, finial_core::SpiffeIdError> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(finial_core::SpiffeIdError::TooLong);
    }
    if token.contains('/') {
        return Err(finial_core::SpiffeIdError::BadPathSegmentChar);
    }
    trust_domain.agent_id(&format!("join_token/{token}"))
}

/// The entry by which an agent that joins with the token also gets a name of the operator's choice. The datastore deletes
/// it with the agent, which it knows by this shape.
fn alias_entry(id: SpiffeId, agent_id: SpiffeId) -> Result<Entry, finial_core::EntryIdError> {
    let selector = Selector { kind: "spiffe_id".into(), value: agent_id.as_str().into() };
    Ok(Entry::new(super::entry::new_entry_id()?, id, agent_id, SelectorSet::new(vec![selector])))
}

/// An issued SVID as answers carry it.
pub(super) fn svid_to_proto(id: &SpiffeId, svid: &IssuedX509) -> types::X509svid {
    types::X509svid {
        cert_chain: der_chain(&svid.chain),
        id: Some(id_to_proto(id)),
        expires_at: svid.not_after,
        hint: String::new(),
    }
}

#[async_trait]
impl pb::agent_server::Agent for Service {
    async fn count_agents(
        &self,
        request: Request<pb::CountAgentsRequest>,
    ) -> Result<Response<pb::CountAgentsResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.count_agents(permit, request)).await
    }

    async fn list_agents(
        &self,
        request: Request<pb::ListAgentsRequest>,
    ) -> Result<Response<pb::ListAgentsResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.list_agents(permit, request)).await
    }

    async fn get_agent(&self, request: Request<pb::GetAgentRequest>) -> Result<Response<types::Agent>, Status> {
        self.gate.unary(request, |permit, request| self.0.get_agent(permit, request)).await
    }

    async fn delete_agent(&self, request: Request<pb::DeleteAgentRequest>) -> Result<Response<()>, Status> {
        self.gate.unary(request, |permit, request| self.0.delete_agent(permit, request)).await
    }

    async fn ban_agent(&self, request: Request<pb::BanAgentRequest>) -> Result<Response<()>, Status> {
        self.gate.unary(request, |permit, request| self.0.ban_agent(permit, request)).await
    }

    type AttestAgentStream = Driven<pb::AttestAgentResponse>;

    async fn attest_agent(
        &self,
        request: Request<Streaming<pb::AttestAgentRequest>>,
    ) -> Result<Response<Self::AttestAgentStream>, Status> {
        let api = self.0.clone();
        let run = |permit, inlet, outlet| async move { api.attest_agent(permit, inlet, outlet).await };
        self.gate.stream(request, super::attest::ANSWER_MAX, run).await
    }

    async fn renew_agent(
        &self,
        request: Request<pb::RenewAgentRequest>,
    ) -> Result<Response<pb::RenewAgentResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.renew_agent(permit, request)).await
    }

    async fn create_join_token(
        &self,
        request: Request<pb::CreateJoinTokenRequest>,
    ) -> Result<Response<types::JoinToken>, Status> {
        self.gate.unary(request, |permit, request| self.0.create_join_token(permit, request)).await
    }

    async fn post_status(
        &self,
        request: Request<pb::PostStatusRequest>,
    ) -> Result<Response<pb::PostStatusResponse>, Status> {
        self.gate.unary(request, |permit, request| self.0.post_status(permit, request)).await
    }
}
