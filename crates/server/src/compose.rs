//! Credential composers: plugins that have a say in what credentials say. Between the template and the signature, `issue` and
//! `authority` ask them here, one after the other; what was signed then is held against the standards here, too.

use crate::plugin_host;
use finial_core::{SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::{Certificate, KeyUsage};
use finial_plugin::{CredentialComposer, Holder, PluginError, PluginKind, X509CaAttributes, X509SvidAttributes};
use serde_json::{Map, Value};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// How long one composer may take for one credential.
const DEADLINE: Duration = Duration::from_secs(30);

/// What may be set of an authority besides the right to sign certificates.
const CA_USAGES: u16 = KeyUsage::CERT_SIGN.0 | KeyUsage::CRL_SIGN.0 | KeyUsage::DIGITAL_SIGNATURE.0;
/// What may be set of an SVID besides the right to sign.
const SVID_USAGES: u16 = KeyUsage::DIGITAL_SIGNATURE.0 | KeyUsage::KEY_ENCIPHERMENT.0 | KeyUsage::KEY_AGREEMENT.0;

/// Whose X.509-SVID it is to be.
#[derive(Clone, Copy)]
pub(crate) enum Whose<'a> {
    Server,
    Agent(Holder<'a>),
    Workload(Holder<'a>),
}

/// The composers, in the order of the configuration. Cheap to clone.
#[derive(Clone)]
pub struct Composers(Arc<[Arc<dyn CredentialComposer>]>);

impl Default for Composers {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Composers {
    /// With these, in this order.
    pub fn new(composers: Vec<Arc<dyn CredentialComposer>>) -> Self {
        Self(composers.into())
    }

    /// Whether nobody has a say.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) async fn x509_ca(&self, mut attributes: X509CaAttributes) -> Result<X509CaAttributes, PluginError> {
        for composer in self.0.iter() {
            attributes = within(&**composer, composer.server_x509_ca(attributes)).await?;
            let twice = |(at, id)| attributes.policies.iter().take(at).any(|other| other == id);
            if attributes.policies.iter().enumerate().any(twice) {
                // Go refuses such a certificate, and with it all below it.
                let error = PluginError::internal("a certificate policy is there twice");
                return Err(error.of(PluginKind::CredentialComposer, composer.name()));
            }
        }
        Ok(attributes)
    }

    pub(crate) async fn x509_svid(
        &self,
        whose: Whose<'_>,
        mut attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        for composer in self.0.iter() {
            let composing = match whose {
                Whose::Server => composer.server_x509_svid(attributes),
                Whose::Agent(holder) => composer.agent_x509_svid(holder, attributes),
                Whose::Workload(holder) => composer.workload_x509_svid(holder, attributes),
            };
            attributes = within(&**composer, composing).await?;
        }
        Ok(attributes)
    }

    pub(crate) async fn jwt_svid(
        &self,
        id: &SpiffeId,
        mut claims: Map<String, Value>,
    ) -> Result<Map<String, Value>, PluginError> {
        for composer in self.0.iter() {
            claims = within(&**composer, composer.workload_jwt_svid(id, claims)).await?;
        }
        // Times with fractions, of which verifiers know nothing.
        for name in ["iat", "exp"] {
            if let Some(claim) = claims.get_mut(name)
                && let Some(fraction) = claim.as_f64().filter(|_| claim.as_i64().is_none())
            {
                *claim = (fraction as i64).into();
            }
        }
        Ok(claims)
    }
}

async fn within<T>(
    composer: &dyn CredentialComposer,
    composing: impl Future<Output = Result<T, PluginError>>,
) -> Result<T, PluginError> {
    plugin_host::within(DEADLINE, (PluginKind::CredentialComposer, composer.name()), composing).await
}

/// Whether a certificate can be an authority of the trust domain; says why not.
pub(crate) fn check_ca(certificate: &Certificate, trust_domain: &TrustDomain) -> Result<(), &'static str> {
    let usage = certificate.key_usage().unwrap_or(KeyUsage(0));
    if !certificate.is_ca() {
        return Err("cA constraint is not set");
    }
    if !usage.contains(KeyUsage::CERT_SIGN) {
        return Err("keyCertSign key usage must be set");
    }
    if usage.0 & !CA_USAGES != 0 {
        return Err("only keyCertSign, cRLSign, or digitalSignature key usage can be set");
    }
    // A signing certificate should be an SVID itself, but need not.
    match certificate.uri_sans() {
        [] => Ok(()),
        [uri] if **uri == *trust_domain.id_string() => Ok(()),
        _ => Err("its URI SAN is not the ID of the trust domain"),
    }
}

/// Whether a certificate is an X.509-SVID of that ID; says why not.
pub(crate) fn check_svid(certificate: &Certificate, id: &SpiffeId) -> Result<(), String> {
    let usage = certificate.key_usage().unwrap_or(KeyUsage(0));
    if !certificate.has_basic_constraints() {
        return Err("basic constraints are not valid".into());
    }
    if certificate.is_ca() {
        return Err("cA constraint must not be set".into());
    }
    if !usage.contains(KeyUsage::DIGITAL_SIGNATURE) {
        return Err("digitalSignature key usage must be set".into());
    }
    if usage.0 & !SVID_USAGES != 0 {
        return Err("only digitalSignature, keyEncipherment, and keyAgreement key usage can be set".into());
    }
    let extended = certificate.extended_key_usage();
    match (extended.server_auth, extended.client_auth) {
        _ if !extended.present => {}
        (true, true) => {}
        (false, true) => return Err("missing serverAuth extended key usage".into()),
        (true, false) => return Err("missing clientAuth extended key usage".into()),
        (false, false) => return Err("missing both serverAuth and clientAuth extended key usage".into()),
    }
    match certificate.uri_sans() {
        [] => Err("missing URI SAN".into()),
        [uri] if **uri == *id.as_str() => Ok(()),
        [uri] => Err(format!("expected URI SAN {:?} but got {uri:?}", id.as_str())),
        others => Err(format!("expected URI SAN {:?} but got {others:?}", id.as_str())),
    }
}

/// The times of claims that make a JWT-SVID of that ID; or why they do not.
pub(crate) fn check_claims(
    claims: &Map<String, Value>,
    id: &SpiffeId,
    now: UnixSeconds,
) -> Result<(UnixSeconds, UnixSeconds), String> {
    use crate::issue::Rfc3339;
    let time = |name: &str| match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(claim) => {
            let seconds = claim.as_i64().or_else(|| claim.as_f64().map(|fraction| fraction as i64));
            seconds.map(Some).ok_or_else(|| format!("{name:?} claim: not a number"))
        }
    };
    let (issued_at, expires_at, not_before) = (time("iat")?, time("exp")?, time("nbf")?);
    match claims.get("sub").and_then(Value::as_str).unwrap_or_default() {
        sub if sub == id.as_str() => {}
        sub => return Err(format!("\"sub\" claim: expected {:?} but got {sub:?}", id.as_str())),
    }
    let expires_at = expires_at.ok_or("\"exp\" claim: required but missing")?;
    if expires_at <= now {
        return Err(format!("\"exp\" claim: already expired as of {}", Rfc3339(expires_at)));
    }
    if let Some(not_before) = not_before.filter(|nbf| *nbf > now) {
        return Err(format!("\"nbf\" claim: not yet valid until {}", Rfc3339(not_before)));
    }
    let audience = match claims.get("aud") {
        Some(Value::Array(all)) => all.iter().map(Value::as_str).collect::<Option<Vec<_>>>().unwrap_or_default(),
        Some(Value::String(one)) => vec![one.as_str()],
        _ => Vec::new(),
    };
    if audience.is_empty() {
        return Err("\"aud\" claim: required but missing".into());
    }
    if audience.contains(&"") {
        return Err("\"aud\" claim: contains empty value".into());
    }
    Ok((issued_at.ok_or("\"iat\" claim: required but missing")?, expires_at))
}
