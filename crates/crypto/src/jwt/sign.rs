//! Signing JWT-SVIDs.

use crate::signer::{SignError, Signer};
use finial_core::{SpiffeId, UnixSeconds};
use std::sync::Arc;

/// The claims of a JWT-SVID as SPIRE issues it.
pub struct JwtSvidClaims<'a> {
    /// `sub`
    pub sub: &'a SpiffeId,
    /// `aud`: at least one, always written as an array. The caller drops empty ones.
    pub aud: &'a [String],
    /// `exp`
    pub exp: UnixSeconds,
    /// `iat`
    pub iat: UnixSeconds,
    /// `iss`
    pub iss: Option<&'a str>,
    /// `jti`
    pub jti: Option<&'a str>,
}

/// A JWT authority: a signer with its key ID and the header encoded once. Cheap to clone.
#[derive(Clone)]
pub struct JwtAuthoritySigner {
    signer: Arc<dyn Signer>,
    key_id: Arc<str>,
}

impl JwtAuthoritySigner {
    /// Takes a signer and the `kid` of its key.
    pub fn new(signer: Arc<dyn Signer>, key_id: &str) -> Self {
        Self { signer, key_id: key_id.into() }
    }

    /// The `kid`.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The signer.
    pub fn signer(&self) -> &Arc<dyn Signer> {
        &self.signer
    }

    /// Signs a JWT-SVID in compact serialization.
    pub async fn sign(&self, claims: &JwtSvidClaims<'_>) -> Result<String, SignError> {
        let _ = claims;
        todo!()
    }

    /// The same without awaiting; `None` when the key is not in this process.
    pub fn sign_now(&self, claims: &JwtSvidClaims<'_>) -> Option<Result<String, SignError>> {
        let _ = claims;
        todo!()
    }
}

/// Signs one JWT-SVID; where many are signed keep a [`JwtAuthoritySigner`].
pub async fn sign_jwt_svid(
    signer: Arc<dyn Signer>,
    key_id: &str,
    claims: &JwtSvidClaims<'_>,
) -> Result<String, SignError> {
    JwtAuthoritySigner::new(signer, key_id).sign(claims).await
}
