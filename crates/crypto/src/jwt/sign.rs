//! Signing JWT-SVIDs.

use crate::key::SignatureAlgorithm;
use crate::signer::{SignError, Signer, ecdsa_der_to_raw};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::{SpiffeId, UnixSeconds};
use serde::Serialize;
use std::sync::Arc;

/// The claims of a JWT-SVID as SPIRE issues it. Declared in the order of their names, in which Go writes them.
#[derive(Serialize)]
pub struct JwtSvidClaims<'a> {
    /// At least one, always written as an array. The caller drops empty ones.
    pub aud: &'a [String],
    /// When it ends.
    pub exp: UnixSeconds,
    /// When it was issued.
    pub iat: UnixSeconds,
    /// Who issued it, as an URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iss: Option<&'a str>,
    /// An ID of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<&'a str>,
    /// Whom it identifies.
    #[serde(serialize_with = "as_text")]
    pub sub: &'a SpiffeId,
}

fn as_text<S: serde::Serializer>(id: &SpiffeId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id.as_str())
}

/// The header in the order in which go-jose writes it.
#[derive(Serialize)]
struct Header<'a> {
    alg: &'static str,
    kid: &'a str,
    typ: &'static str,
}

/// A key that signs tokens of one type, with their header encoded once. Cheap to clone.
#[derive(Clone)]
pub(super) struct JwsSigner {
    signer: Arc<dyn Signer>,
    key_id: Arc<str>,
    algorithm: SignatureAlgorithm,
    /// The header in base64url, with the dot that follows it.
    header: Arc<str>,
}

impl JwsSigner {
    pub(super) fn new(signer: Arc<dyn Signer>, key_id: &str, typ: &'static str) -> Self {
        let algorithm = signer.public_key().default_algorithm();
        let header = Header { alg: algorithm.jwa(), kid: key_id, typ };
        // Strings and nothing else: they always serialize.
        let header = serde_json::to_vec(&header).unwrap_or_default();
        let header = format!("{}.", BASE64URL.encode(header));
        Self { signer, key_id: key_id.into(), algorithm, header: header.into() }
    }

    pub(super) fn key_id(&self) -> &str {
        &self.key_id
    }

    pub(super) fn signer(&self) -> &Arc<dyn Signer> {
        &self.signer
    }

    pub(super) async fn sign(&self, claims: &impl Serialize) -> Result<String, SignError> {
        // Encoded before the await, so that the claims need not be shared between threads.
        let input = self.signing_input(claims)?;
        let signature = match self.signer.local() {
            Some(key) => key.sign_now(self.algorithm, input.as_bytes())?,
            None => self.signer.sign(self.algorithm, input.as_bytes()).await?,
        };
        self.compact(input, signature)
    }

    pub(super) fn sign_now(&self, claims: &impl Serialize) -> Option<Result<String, SignError>> {
        let key = self.signer.local()?;
        Some(self.signing_input(claims).and_then(|input| {
            let signature = key.sign_now(self.algorithm, input.as_bytes())?;
            self.compact(input, signature)
        }))
    }

    fn signing_input(&self, claims: &impl Serialize) -> Result<String, SignError> {
        let claims = serde_json::to_vec(claims).map_err(|_| SignError::Failed)?;
        // Room for the signature of P-256 too.
        let mut input = String::with_capacity(self.header.len() + claims.len() * 4 / 3 + 96);
        input.push_str(&self.header);
        BASE64URL.encode_string(claims, &mut input);
        Ok(input)
    }

    fn compact(&self, mut input: String, signature: Vec<u8>) -> Result<String, SignError> {
        let signature = match self.algorithm.ecdsa_scalar_len() {
            Some(len) => ecdsa_der_to_raw(&signature, len).ok_or(SignError::Failed)?,
            None => signature,
        };
        input.push('.');
        BASE64URL.encode_string(signature, &mut input);
        Ok(input)
    }
}

/// A JWT authority: a signer with its key ID and the header encoded once. Cheap to clone.
#[derive(Clone)]
pub struct JwtAuthoritySigner(JwsSigner);

impl JwtAuthoritySigner {
    /// Takes a signer and the `kid` of its key.
    pub fn new(signer: Arc<dyn Signer>, key_id: &str) -> Self {
        Self(JwsSigner::new(signer, key_id, "JWT"))
    }

    /// The `kid`.
    pub fn key_id(&self) -> &str {
        self.0.key_id()
    }

    /// The signer.
    pub fn signer(&self) -> &Arc<dyn Signer> {
        self.0.signer()
    }

    /// Signs a JWT-SVID in compact serialization.
    pub async fn sign(&self, claims: &JwtSvidClaims<'_>) -> Result<String, SignError> {
        self.0.sign(claims).await
    }

    /// Signs a JWT-SVID of which somebody else had a say; whether it still is one, the caller finds out.
    pub async fn sign_claims(&self, claims: &serde_json::Map<String, serde_json::Value>) -> Result<String, SignError> {
        self.0.sign(claims).await
    }

    /// The same without awaiting; `None` when the key is not in this process.
    pub fn sign_now(&self, claims: &JwtSvidClaims<'_>) -> Option<Result<String, SignError>> {
        self.0.sign_now(claims)
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
