//! `join_token`: the agent shows a token that an operator made. The server's half is in the server core, as using up the
//! token and recording the agent are one transaction.

use async_trait::async_trait;
use finial_core::Secret;
use finial_plugin::{AgentNodeAttestor, AttestSession, PluginError};

/// The agent's half: the payload is the token.
pub struct JoinTokenAgent(Secret<String>);

impl JoinTokenAgent {
    /// The name of the attestor.
    pub const NAME: &str = "join_token";

    /// With the token of the configuration or of `-joinToken`; it may be empty as long as nobody attests.
    pub fn new(token: Secret<String>) -> Self {
        Self(token)
    }
}

#[async_trait]
impl AgentNodeAttestor for JoinTokenAgent {
    async fn begin(&self) -> Result<Box<dyn AttestSession>, PluginError> {
        if self.0.expose().is_empty() {
            return Err(PluginError::invalid("join token was not provided"));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_payload_is_the_token_and_there_are_no_challenges() {
        let agent = JoinTokenAgent::new(Secret::new("a-b-c".to_owned()));
        let mut session = agent.begin().await.expect("begins");
        assert_eq!(session.payload(), b"a-b-c");
        session.respond(b"x").await.expect_err("no challenges");
        assert!(JoinTokenAgent::new(Secret::default()).begin().await.is_err());
    }
}
