//! Node attestors, both halves.

use crate::Plugin;
use async_trait::async_trait;
use finial_core::SpiffeId;
use finial_plugin::{
    AgentNodeAttestor, AttestSession, AttestVerdict, Challenger, PluginError, ServerNodeAttestor, prefixed_selectors,
};
use finial_proto::plugin::agent_node_attestor::payload_or_challenge_response::Data;
use finial_proto::plugin::agent_node_attestor::{Challenge, PayloadOrChallengeResponse};
use finial_proto::plugin::server_node_attestor::attest_request::Request;
use finial_proto::plugin::server_node_attestor::attest_response::Response;
use finial_proto::plugin::server_node_attestor::{AttestRequest, AttestResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::metadata::{MetadataMap, MetadataValue};

/// Where the agent connects from, for plugins that want to know.
const CLIENT_IP: &str = "x-forwarded-client-ip";

/// The server's half of a node attestor that is an external plugin.
pub struct ExternalServerNodeAttestor(pub Plugin);

#[async_trait]
impl ServerNodeAttestor for ExternalServerNodeAttestor {
    async fn attest(&self, payload: &[u8], challenger: &mut dyn Challenger) -> Result<AttestVerdict, PluginError> {
        if payload.is_empty() {
            return Err(PluginError::invalid("payload cannot be empty"));
        }
        let mut metadata = MetadataMap::new();
        let address = challenger.client_ip().map(|ip| ip.to_string()).unwrap_or_default();
        if let Ok(address) = MetadataValue::try_from(address) {
            metadata.insert(CLIENT_IP, address);
        }
        let (questions, asked) = mpsc::channel(1);
        let say = |request: Request| questions.try_send(AttestRequest { request: Some(request) }).map_err(|_| closed());
        say(Request::Payload(payload.to_vec().into()))?;
        let answers = self.0.stream("Attest", ReceiverStream::new(asked), metadata).await;
        let mut answers: Streaming<AttestResponse> = answers?;
        loop {
            let answer = answers.message().await.map_err(|status| self.0.error(status))?.ok_or_else(closed)?;
            match answer.response {
                Some(Response::Challenge(challenge)) => {
                    let response = challenger.challenge(challenge.into()).await?;
                    say(Request::ChallengeResponse(response.into()))?;
                }
                Some(Response::AgentAttributes(found)) => {
                    let agent_id = SpiffeId::parse(&found.spiffe_id).map_err(|e| {
                        PluginError::internal(format!(
                            "plugin response has invalid agent ID {:?}: {e}",
                            found.spiffe_id
                        ))
                    })?;
                    let selectors = prefixed_selectors(self.0.name(), found.selector_values);
                    return Ok(AttestVerdict { agent_id, selectors, can_reattest: found.can_reattest });
                }
                None => return Err(PluginError::internal("plugin response missing challenge or agent attributes")),
            }
        }
    }
}

/// The agent's half of a node attestor that is an external plugin.
pub struct ExternalAgentNodeAttestor(pub Plugin);

#[async_trait]
impl AgentNodeAttestor for ExternalAgentNodeAttestor {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        let (questions, asked) = mpsc::channel(1);
        let answers = self.0.stream("AidAttestation", ReceiverStream::new(asked), MetadataMap::new()).await?;
        let mut session = Session { plugin: self.0.clone(), questions, answers, payload: Vec::new() };
        match session.next().await? {
            Some(Data::Payload(payload)) if !payload.is_empty() => session.payload = payload.into(),
            _ => return Err(PluginError::internal("plugin response missing attestation payload")),
        }
        Ok(Box::new(session))
    }
}

struct Session {
    plugin: Plugin,
    questions: mpsc::Sender<Challenge>,
    answers: Streaming<PayloadOrChallengeResponse>,
    payload: Vec<u8>,
}

impl Session {
    async fn next(&mut self) -> Result<Option<Data>, PluginError> {
        let answer = self.answers.message().await.map_err(|status| self.plugin.error(status))?;
        Ok(answer.ok_or_else(closed)?.data)
    }
}

#[async_trait]
impl AttestSession for Session {
    fn payload(&self) -> &[u8] {
        &self.payload
    }

    async fn respond(&mut self, challenge: &[u8]) -> Result<Vec<u8>, PluginError> {
        let sent = self.questions.send(Challenge { challenge: challenge.to_vec().into() }).await;
        if sent.is_err() {
            // It says why.
            self.next().await?;
            return Err(closed());
        }
        match self.next().await? {
            Some(Data::ChallengeResponse(response)) if !response.is_empty() => Ok(response.into()),
            _ => Err(PluginError::internal("plugin response missing challenge response")),
        }
    }
}

fn closed() -> PluginError {
    PluginError::internal("plugin closed stream unexpectedly")
}
