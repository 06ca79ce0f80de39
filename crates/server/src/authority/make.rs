//! A new X.509 authority: self-signed, or signed by the upstream authority. Tried out before anyone hears of it.

use super::AuthorityError;
use super::journal::hex;
use super::manager::{AuthoritySettings, within};
use super::plan::BACKDATE_SECONDS;
use finial_core::UnixSeconds;
use finial_crypto::{
    CaTemplate, Certificate, DistinguishedName, IssueError, KeyUsage, SerialNumber, Signer, SvidTemplate, TrustRoots,
    X509Ca, create_ca_csr, verify_x509_svid,
};
use finial_plugin::{PluginKind, UpstreamAuthority};
use std::sync::Arc;

/// What may be set besides the right to sign certificates.
const CA_USAGES: u16 = KeyUsage::CERT_SIGN.0 | KeyUsage::CRL_SIGN.0 | KeyUsage::DIGITAL_SIGNATURE.0;

/// A new X.509 authority and the roots from which it hangs.
pub(super) struct Made {
    pub(super) ca: X509Ca,
    pub(super) roots: Vec<Arc<[u8]>>,
    /// The subject key ID of what signed it, hex.
    pub(super) upstream_authority_id: String,
    pub(super) issued_at: UnixSeconds,
    pub(super) not_after: UnixSeconds,
}

/// Makes an authority with this key.
pub(super) async fn make(
    settings: &AuthoritySettings,
    upstream: Option<&dyn UpstreamAuthority>,
    signer: Arc<dyn Signer>,
    now: UnixSeconds,
) -> Result<Made, AuthorityError> {
    let (ca, roots) = match upstream {
        None => {
            let ca = self_sign(settings, signer, now).await?;
            let root = ca.certificate().clone();
            (ca, vec![root])
        }
        Some(upstream) => mint(settings, upstream, signer).await?,
    };
    try_out(settings, &ca, &roots, now).await?;
    let upstream_authority_id = hex(parsed(&ca)?.authority_key_id().unwrap_or_default());
    let not_after = ca.not_after();
    Ok(Made { ca, roots, upstream_authority_id, issued_at: now, not_after })
}

fn parsed(ca: &X509Ca) -> Result<Certificate, AuthorityError> {
    Ok(Certificate::parse(ca.certificate().clone()).map_err(IssueError::from)?)
}

async fn self_sign(
    settings: &AuthoritySettings,
    signer: Arc<dyn Signer>,
    now: UnixSeconds,
) -> Result<X509Ca, AuthorityError> {
    let template = CaTemplate {
        subject: &settings.ca_subject,
        trust_domain: &settings.trust_domain,
        not_before: now - BACKDATE_SECONDS,
        not_after: now.saturating_add(settings.ca_ttl_seconds),
        serial: SerialNumber::random(),
    };
    within("the key manager", X509Ca::self_sign(signer, &template), AuthorityError::Sign).await
}

/// Has the upstream authority sign it, and holds what comes back against SPIRE's rules.
async fn mint(
    settings: &AuthoritySettings,
    upstream: &dyn UpstreamAuthority,
    signer: Arc<dyn Signer>,
) -> Result<(X509Ca, Vec<Arc<[u8]>>), AuthorityError> {
    let subject = match settings.ca_subject.parts().serial_number.is_empty() {
        true => settings.ca_subject.with_serial_number(&SerialNumber::random().to_string()),
        false => settings.ca_subject.clone(),
    };
    let csr = create_ca_csr(signer.as_ref(), &subject, &settings.trust_domain);
    let csr = within("the key manager", csr, |e| AuthorityError::Sign(e.into())).await?;
    let minting = upstream.mint_x509_ca(&csr, settings.ca_ttl_seconds);
    let refused =
        |e: finial_plugin::PluginError| AuthorityError::Mint(e.of(PluginKind::UpstreamAuthority, upstream.name()));
    let minted = within("the upstream authority", minting, refused).await?;
    let first = minted.chain.first().cloned().ok_or(AuthorityError::BadUpstream("empty chain"))?;
    let ca = X509Ca::new(signer, first, minted.chain)?;
    let certificate = parsed(&ca)?;
    if certificate.key_usage().is_some_and(|usage| usage.0 & !CA_USAGES != 0) {
        return Err(AuthorityError::BadUpstream("only keyCertSign, cRLSign, or digitalSignature key usage can be set"));
    }
    // A signing certificate should be an SVID itself, but need not.
    match certificate.uri_sans() {
        [] => {}
        [uri] if **uri == *settings.trust_domain.id_string() => {}
        _ => return Err(AuthorityError::BadUpstream("its URI SAN is not the ID of the trust domain")),
    }
    Ok((ca, minted.roots))
}

/// Sees that what it signs verifies, by signing something that is thrown away.
async fn try_out(
    settings: &AuthoritySettings,
    ca: &X509Ca,
    roots: &[Arc<[u8]>],
    now: UnixSeconds,
) -> Result<(), AuthorityError> {
    let trial = SvidTemplate {
        id: &settings.trust_domain.server_id(),
        public_key: ca.signer().public_key(),
        subject: &DistinguishedName::svid_default(),
        dns_names: &[],
        not_before: now - BACKDATE_SECONDS,
        not_after: ca.not_after(),
        serial: SerialNumber::new(1),
    };
    let svid = within("the key manager", ca.issue_svid(&trial), AuthorityError::Sign).await?;
    let roots = TrustRoots::new(roots).map_err(IssueError::from)?;
    verify_x509_svid(&ca.chain_of(svid), &roots, now)?;
    Ok(())
}
