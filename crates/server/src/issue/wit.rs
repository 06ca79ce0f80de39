//! WIT-SVIDs: tokens bound to a key of the workload.

use super::{IssueError, Issued, IssuedJwt, Issuer, Purpose, deadline};
use finial_core::SpiffeId;
use finial_crypto::{PublicKey, SignatureAlgorithm, WitSvidClaims};

/// How long WIT-SVIDs live, in seconds, unless a request says otherwise; SPIRE has no setting for it either.
pub(crate) const WIT_TTL_SECONDS: i64 = 3600;

/// A WIT-SVID that is wanted.
pub struct WitRequest<'a> {
    /// Whose.
    pub id: &'a SpiffeId,
    /// The workload's key; whoever shows the token must prove that it has it.
    pub key: &'a PublicKey,
    /// With which it proves that; checked against the key by the caller.
    pub key_algorithm: SignatureAlgorithm,
    /// Lifetime in seconds; 0 or less = one hour.
    pub ttl_seconds: i64,
}

impl Issuer {
    /// A WIT-SVID for a workload.
    pub async fn wit_svid(&self, request: &WitRequest<'_>) -> Result<IssuedJwt, IssueError> {
        let result = self.sign_wit(request).await;
        self.record(Purpose::Workload, request.id, result.as_ref().map(Issued::Wit));
        result
    }

    async fn sign_wit(&self, request: &WitRequest<'_>) -> Result<IssuedJwt, IssueError> {
        let authority = self.authorities.wit().ok_or(IssueError::NoWitAuthority)?;
        self.check_member("WIT-SVID", request.id)?;
        let (issued_at, expires_at) =
            self.lifetime("WIT-SVID", request.ttl_seconds, WIT_TTL_SECONDS, authority.not_after)?;
        self.authorities.signs_wit(expires_at);
        let claims = WitSvidClaims {
            key: request.key,
            key_algorithm: request.key_algorithm,
            exp: expires_at,
            iat: issued_at,
            iss: self.settings.wit_issuer.as_deref(),
            sub: request.id,
        };
        let token = match authority.signer.sign_now(&claims) {
            Some(result) => result?,
            None => deadline(authority.signer.sign(&claims)).await??,
        };
        Ok(IssuedJwt { token, issued_at, expires_at })
    }
}
