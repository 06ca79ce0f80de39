//! Upstream authorities.

use crate::PluginError;
use async_trait::async_trait;
use finial_core::{ErrorKind, JwtAuthority, X509Authority};
use std::sync::Arc;

/// An X.509 authority that an upstream authority signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MintedX509Ca {
    /// The new authority's certificate, then the intermediates between it and a root; DER each, without the root.
    pub chain: Vec<Arc<[u8]>>,
    /// The roots that verify the chain; DER each, at least one. They become the trust domain's X.509 authorities.
    pub roots: Vec<Arc<[u8]>>,
}

/// What is known above of the trust domain's authorities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamAuthorities {
    /// The roots.
    pub x509: Vec<X509Authority>,
    /// JWT keys; none where nothing above knows of such.
    pub jwt: Vec<JwtAuthority>,
    /// WIT keys; none where nothing above knows of such.
    pub wit: Vec<JwtAuthority>,
    /// This is older than what was told before, as a datastore was put back: what is missing was lost, not revoked.
    pub put_back: bool,
}

/// Signs the X.509 authorities of this trust domain. A server has at most one; without it, authorities are self-signed.
#[async_trait]
pub trait UpstreamAuthority: Send + Sync {
    /// Its configured name, such as `disk`.
    fn name(&self) -> &str;

    /// Asked once before the server begins: what cannot reach its CA, or may not use it, should end the start and not the
    /// first rotation. The caller gives it its deadline.
    async fn prepare(&self) -> Result<(), PluginError> {
        Ok(())
    }

    /// How long a signature may take; the caller waits so long.
    fn mint_seconds(&self) -> u64 {
        30
    }

    /// Signs the request (PKCS#10, DER; the trust domain's ID is its one URI SAN) as a CA that lives `ttl_seconds`, or
    /// shorter if it must. The caller verifies what comes back and gives the call its deadline.
    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError>;

    /// Makes a JWT key known above, and returns all that are known there, this one included. `Unimplemented` where nothing
    /// above knows of JWT keys: then they stay with this server's datastore.
    async fn publish_jwt_key(&self, _key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        Err(PluginError::new(ErrorKind::Unimplemented, "upstream authority does not support publishing JWT keys"))
    }

    /// The same for a WIT key.
    async fn publish_wit_key(&self, _key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        Err(PluginError::new(ErrorKind::Unimplemented, "upstream authority does not support publishing WIT keys"))
    }

    /// Waits until the authorities above are others than at the last call (or signature), and returns all of them; tainted
    /// ones are to be left. May be dropped while it waits without losing a change. Never returns where nothing is heard
    /// between signatures.
    async fn next_authorities(&self) -> Result<UpstreamAuthorities, PluginError> {
        std::future::pending().await
    }
}
