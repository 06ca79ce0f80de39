//! The agent's own X.509-SVID: where its key lives, and the identity that TLS presents.

use crate::error::AgentError;
use crate::rotation::{Jitter, RotationStrategy};
use crate::sync::taints::Taints;
use finial_core::{KeyType, SpiffeId, UnixSeconds};
use finial_crypto::tls::TlsIdentity;
use finial_crypto::{Certificate, Signer, create_csr};
use finial_plugin::{KeyManager, PluginKind};
use std::sync::Arc;

/// The two names under which the agent's keys live in turn.
const KEY_A: &str = "agent-svid-A";
const KEY_B: &str = "agent-svid-B";

/// The agent's SVID with its key.
#[derive(Clone)]
pub(crate) struct AgentSvid {
    pub(crate) id: SpiffeId,
    /// Leaf first, DER.
    pub(crate) chain: Vec<Arc<[u8]>>,
    pub(crate) key: AgentKey,
    /// Whether the server lets the agent attest again; otherwise it renews.
    pub(crate) reattestable: bool,
    pub(crate) not_after: UnixSeconds,
    /// From then on it is to be renewed. Milliseconds since the epoch.
    pub(crate) rotate_at_ms: i64,
    /// Key IDs of those who signed the certificates of the chain.
    signed_by: Vec<Vec<u8>>,
    /// The round of [`Taints`] in which it was issued.
    issued_in: u32,
}

/// A key of the agent, with the name under which the key manager holds it.
#[derive(Clone)]
pub(crate) struct AgentKey {
    name: String,
    signer: Arc<dyn Signer>,
}

impl AgentKey {
    /// Makes a key under the name that `current` does not have, so that a renewal that fails loses nothing.
    pub(crate) async fn generate(keys: &dyn KeyManager, current: Option<&AgentKey>) -> Result<Self, AgentError> {
        let name = if current.is_some_and(|key| key.name == KEY_A) { KEY_B } else { KEY_A };
        let signer = keys.generate_key(name, KeyType::EcP256).await.map_err(|e| e.of(PluginKind::KeyManager, ""));
        let signer =
            signer.map_err(|e| AgentError::internal(format!("unable to generate private key: {e}")).because(e))?;
        Ok(Self { name: name.to_owned(), signer })
    }

    /// The key that belongs to a certificate, and whether there are keys at all.
    pub(crate) async fn find(
        keys: &dyn KeyManager,
        leaf: Option<&Certificate>,
    ) -> Result<(Option<Self>, bool), AgentError> {
        let all = keys.keys().await;
        let all = all.map_err(|e| AgentError::internal(format!("unable to load private key: {e}")).because(e))?;
        let any = !all.is_empty();
        let public = leaf.and_then(|leaf| leaf.public_key().ok());
        let found = all.into_iter().find(|(_, signer)| public.as_ref() == Some(signer.public_key()));
        Ok((found.map(|(name, signer)| Self { name, signer }), any))
    }

    /// A request for a certificate, without any SAN: the server knows who asks.
    pub(crate) async fn csr(&self) -> Result<Vec<u8>, AgentError> {
        let csr = create_csr(self.signer.as_ref(), None, None, &[]).await;
        csr.map_err(|e| AgentError::internal(format!("failed to generate CSR for attestation: {e}")).because(e))
    }
}

impl AgentSvid {
    /// Checks what the server sent, or what was kept.
    pub(crate) fn new(
        chain: Vec<Arc<[u8]>>,
        key: AgentKey,
        reattestable: bool,
        strategy: RotationStrategy,
        jitter: &Jitter,
    ) -> Result<Self, AgentError> {
        let bad = |e: String| AgentError::internal(format!("invalid SVID cert chain: {e}"));
        let parsed: Result<Vec<_>, _> = chain.iter().map(|der| Certificate::parse(der.clone())).collect();
        let parsed = parsed.map_err(|e| bad(e.to_string()))?;
        let leaf = parsed.first().ok_or_else(|| AgentError::internal("empty SVID cert chain"))?;
        if leaf.public_key().ok().as_ref() != Some(key.signer.public_key()) {
            return Err(bad("certificate is not for our key".to_owned()));
        }
        let (from, to) = (leaf.not_before().saturating_mul(1000), leaf.not_after().saturating_mul(1000));
        Ok(Self {
            id: leaf.spiffe_id().map_err(|e| bad(e.to_string()))?,
            not_after: leaf.not_after(),
            rotate_at_ms: strategy.x509_rotate_at(from, to, jitter.draw()),
            signed_by: parsed.iter().filter_map(|c| c.authority_key_id().map(<[u8]>::to_vec)).collect(),
            issued_in: 0,
            chain,
            key,
            reattestable,
        })
    }

    /// Whether it ended; a second early, as clocks differ.
    pub(crate) fn is_expired(&self, now: UnixSeconds) -> bool {
        now + 1 >= self.not_after
    }

    /// It was issued although these authorities were tainted already: that is no reason to renew it again.
    pub(crate) fn accept_tainted(&mut self, tainted: &Taints) {
        self.issued_in = tainted.round();
    }

    /// Whether one of these authorities signed it, before it was tainted.
    pub(crate) fn is_tainted(&self, tainted: &Taints) -> bool {
        tainted.concern(&self.signed_by, self.issued_in)
    }

    /// Presents this SVID in TLS handshakes from now on.
    pub(crate) fn install(&self, identity: &TlsIdentity) -> Result<(), AgentError> {
        identity
            .set_signer(&self.chain, &self.key.signer)
            .map_err(|e| AgentError::internal(format!("unable to use the agent SVID: {e}")).because(e))
    }
}
