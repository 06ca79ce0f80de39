//! `AttestAgent`: how a node becomes an agent.
//!
//! The CSR is checked before a join token is used up, and the token goes in the same transaction in which the agent's row
//! comes, so that neither a bad request nor a crash burns one.

use super::agent::{join_token_agent_id, svid_to_proto};
use super::stream::{Inlet, Outlet};
use super::{Api, IdRule, check_id, store_failed};
use crate::authz::{Call, Permit, method};
use crate::issue::IssuedX509;
use crate::nodes::Attested;
use bytes::Bytes;
use finial_core::{AgentRecord, ErrorKind, Selector, SelectorSet, SpiffeId};
use finial_crypto::PublicKey;
use finial_plugin::{AttestVerdict, Challenger, PluginError, PluginKind};
use finial_proto::server::agent::attest_agent_request::{Params, Step as Asked};
use finial_proto::server::agent::attest_agent_response::{Result as Outcome, Step as Told};
use finial_proto::server::agent::{AttestAgentRequest, AttestAgentResponse};
use std::net::IpAddr;
use std::time::Duration;
use tonic::Status;

/// How long an agent may take for its first message and for each answer to a challenge.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long a whole attestation may take, rate limit not counted.
const ATTEST_MAX: Duration = Duration::from_secs(60);
/// Largest evidence that attestors are given, in bytes.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 1024 * 1024;

/// Longest name of an attestor, in bytes: the column's width. Anybody may send one, and it is logged.
const KIND_BYTES_MAX: usize = 255;

const JOIN_TOKEN: &str = "join_token";

/// Passes an attestor's challenges to the agent.
struct AgentSide<'a> {
    call: &'a Call,
    inlet: &'a mut Inlet<AttestAgentRequest>,
    outlet: &'a Outlet<AttestAgentResponse>,
}

#[tonic::async_trait]
impl Challenger for AgentSide<'_> {
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, PluginError> {
        let step = Some(Told::Challenge(Bytes::from(challenge)));
        let sent = self.outlet.send(AttestAgentResponse { step }).await;
        sent.map_err(|e| PluginError::internal(format!("failed to send challenge to agent: {}", e.message())))?;
        let failed = |why: &str| PluginError::internal(format!("failed to receive challenge from agent: {why}"));
        let answer = self.inlet.next().await.map_err(|e| failed(e.message()))?;
        match answer.ok_or_else(|| failed("EOF"))?.step {
            Some(Asked::ChallengeResponse(answer)) => Ok(answer.into()),
            _ => Ok(Vec::new()),
        }
    }

    fn client_ip(&self) -> Option<IpAddr> {
        self.call.peer().ip()
    }
}

/// A first message with every part filled in.
struct Evidence {
    kind: String,
    payload: Bytes,
    csr: Bytes,
}

impl Evidence {
    fn of(params: Option<Params>) -> Result<Self, &'static str> {
        let params = params.ok_or("missing params")?;
        let data = params.data.ok_or("missing attestation data")?;
        let csr = params.params.ok_or("missing X509-SVID parameters")?.csr;
        match () {
            () if csr.is_empty() => Err("missing CSR"),
            () if data.r#type.is_empty() => Err("missing attestation data type"),
            () if data.r#type.len() > KIND_BYTES_MAX => Err("attestation data type is too long"),
            () if data.payload.is_empty() => Err("missing attestation data payload"),
            () if data.payload.len() > PAYLOAD_BYTES_MAX => Err("attestation data payload is too large"),
            () => Ok(Self { kind: data.r#type, payload: data.payload, csr }),
        }
    }
}

impl Api {
    pub(super) async fn attest_agent(
        &self,
        permit: Permit<method::AttestAgent>,
        inlet: Inlet<AttestAgentRequest>,
        outlet: Outlet<AttestAgentResponse>,
    ) -> Result<(), Status> {
        permit.limit(1, "rejecting request due to attest agent rate limiting").await?;
        match tokio::time::timeout(ATTEST_MAX, self.attest(&permit, inlet, &outlet)).await {
            Ok(Ok(())) => permit.audit(),
            Ok(Err(status)) => return Err(status),
            Err(_) => return Err(permit.fail(ErrorKind::Timeout, "attestation took too long")),
        }
        Ok(())
    }

    async fn attest(
        &self,
        call: &Call,
        mut inlet: Inlet<AttestAgentRequest>,
        outlet: &Outlet<AttestAgentResponse>,
    ) -> Result<(), Status> {
        let unread =
            |why: &str| call.fail_with(ErrorKind::InvalidArgument, "failed to receive request from stream", why);
        let first = match inlet.next().await {
            Ok(Some(first)) => first,
            Ok(None) => return Err(unread("EOF")),
            Err(status) if status.code() == tonic::Code::ResourceExhausted => return Err(status),
            Err(status) => return Err(unread(status.message())),
        };
        let params = match first.step {
            Some(Asked::Params(params)) => Some(params),
            _ => None,
        };
        let evidence =
            Evidence::of(params).map_err(|why| call.fail_with(ErrorKind::InvalidArgument, "malformed param", why))?;
        call.note("node_attestor_type", &evidence.kind);
        call.about("node_attestor_type", &evidence.kind);
        let key = self.agent_key(call, &evidence.csr)?;
        let (id, svid, can_reattest) = if evidence.kind == JOIN_TOKEN {
            self.attest_by_token(call, &evidence, &key).await?
        } else {
            let mut agent = AgentSide { call, inlet: &mut inlet, outlet };
            self.attest_by_plugin(call, &evidence, &key, &mut agent).await?
        };
        call.note("agent_id", &id);
        call.about("agent_id", &id);
        call.about("address", call.peer_address().unwrap_or_default());
        call.log_info("Agent attestation request completed");
        let outcome = Outcome { svid: Some(svid_to_proto(&id, &svid)), reattestable: can_reattest };
        outlet.send(AttestAgentResponse { step: Some(Told::Result(outcome)) }).await
    }

    /// Works whether or not the attestor is configured, as in SPIRE: that there is a token is the permission.
    async fn attest_by_token(
        &self,
        call: &Call,
        evidence: &Evidence,
        key: &PublicKey,
    ) -> Result<(SpiffeId, IssuedX509, bool), Status> {
        const USED: &str = "failed to attest: join token does not exist or has already been used";
        let used = || call.fail(ErrorKind::InvalidArgument, USED);
        let token = std::str::from_utf8(&evidence.payload).map_err(|_| used())?;
        let id = join_token_agent_id(&self.trust_domain, token).map_err(|_| used())?;
        // A look before signing, so that guessing tokens costs us no signatures.
        let known = self.entries.has_join_token(token).await;
        if !known.map_err(|e| store_failed(call, "failed to fetch join token", &e))? {
            return Err(used());
        }
        let svid = self.sign_agent(call, &id, key).await?;
        let record = self.record(&id, JOIN_TOKEN, &svid, false, Vec::new());
        let attested = self.nodes.attest_by_join_token(token.to_owned(), record, self.clock.now()).await;
        match attested.map_err(|e| store_failed(call, "failed to create attested agent", &e))? {
            Attested::Stored => Ok((id, svid, false)),
            Attested::NoToken => Err(used()),
            Attested::Expired => Err(call.fail(ErrorKind::InvalidArgument, "join token expired")),
            Attested::Banned => Err(self.banned(call)),
        }
    }

    async fn attest_by_plugin(
        &self,
        call: &Call,
        evidence: &Evidence,
        key: &PublicKey,
        agent: &mut AgentSide<'_>,
    ) -> Result<(SpiffeId, IssuedX509, bool), Status> {
        let kind = evidence.kind.as_str();
        let attestor = self.plugins.node_attestors.get(kind).ok_or_else(|| self.no_attestor(call, kind))?;
        let verdict = attestor.attest(&evidence.payload, agent).await.map_err(|error| {
            let error = error.of(PluginKind::NodeAttestor, kind);
            call.fail(error.kind, &error.message)
        })?;
        let AttestVerdict { agent_id: id, selectors, can_reattest } = verdict;
        if id.is_server() {
            return Err(call.fail(ErrorKind::Internal, "agent ID cannot collide with the server ID"));
        }
        if let Err(error) = check_id(&self.trust_domain, &id, IdRule::Member) {
            return Err(call.fail_with(ErrorKind::Internal, "invalid agent ID", error));
        }
        if !id.path().strip_prefix("/spire/agent/").is_some_and(|rest| rest.starts_with(&format!("{kind}/"))) {
            tracing::warn!(
                agent_id = id.as_str(),
                node_attestor_type = kind,
                "The node attestor produced an agent ID outside of its own namespace"
            );
        }
        if self.nodes.is_banned(&id) {
            return Err(self.banned(call));
        }
        let svid = self.sign_agent(call, &id, key).await?;
        let record = self.record(&id, kind, &svid, can_reattest, selectors);
        let attested = self.nodes.attest(record).await;
        match attested.map_err(|e| store_failed(call, "failed to create attested agent", &e))? {
            Attested::Banned => Err(self.banned(call)),
            _ => Ok((id, svid, can_reattest)),
        }
    }

    fn banned(&self, call: &Call) -> Status {
        call.fail(ErrorKind::Denied, "failed to attest: agent is banned")
    }

    fn no_attestor(&self, call: &Call, kind: &str) -> Status {
        let why = format!("could not find node attestor type {kind:?}");
        call.fail_with(ErrorKind::FailedPrecondition, "error getting node attestor", why)
    }

    fn record(
        &self,
        id: &SpiffeId,
        kind: &str,
        svid: &IssuedX509,
        can_reattest: bool,
        mut selectors: Vec<Selector>,
    ) -> AgentRecord {
        if self.agent_spiffe_id_as_selector {
            selectors.push(Selector { kind: "spiffe_id".into(), value: id.as_str().into() });
        }
        AgentRecord {
            id: id.clone(),
            attestation_type: kind.into(),
            serial_number: svid.serial.to_string(),
            expires_at: svid.not_after,
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest,
            agent_version: String::new(),
            selectors: SelectorSet::new(selectors),
        }
    }
}
