//! The agent's half of `join_token`: the token is all the evidence there is.

use async_trait::async_trait;
use finial_core::Secret;
use finial_plugin::{AgentNodeAttestor, AttestSession, PluginError};

/// Attests with a token that serves once.
pub(crate) struct JoinTokenAttestor(Secret<String>);

impl JoinTokenAttestor {
    pub(crate) fn new(token: Secret<String>) -> Self {
        Self(token)
    }
}

#[async_trait]
impl AgentNodeAttestor for JoinTokenAttestor {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        Ok(Box::new(Session(self.0.clone())))
    }
}

struct Session(Secret<String>);

#[async_trait]
impl AttestSession for Session {
    fn payload(&self) -> &[u8] {
        self.0.expose().as_bytes()
    }

    async fn respond(&mut self, _challenge: &[u8]) -> Result<Vec<u8>, PluginError> {
        Err(PluginError::internal("server issued unexpected challenge"))
    }
}
