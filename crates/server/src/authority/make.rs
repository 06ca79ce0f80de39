//! A new X.509 authority: self-signed, or signed by the upstream authority. Tried out before anyone hears of it.

use super::AuthorityError;
use super::journal::hex;
use super::manager::{AuthoritySettings, within, within_seconds};
use super::plan::BACKDATE_SECONDS;
use crate::compose::{Composers, check_ca};
use crate::issue::Rfc3339;
use finial_core::{Clock, UnixSeconds};
use finial_crypto::{
    CaTemplate, Certificate, DistinguishedName, Extension, IssueError, SerialNumber, Signer, SvidTemplate, TrustRoots,
    X509Ca, create_ca_csr_with, verify_x509_svid,
};
use finial_plugin::{PluginKind, UpstreamAuthority, X509CaAttributes};
use std::sync::Arc;

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
    composers: &Composers,
    upstream: Option<&dyn UpstreamAuthority>,
    signer: Arc<dyn Signer>,
    clock: &dyn Clock,
) -> Result<Made, AuthorityError> {
    let now = clock.now();
    let (ca, roots) = match upstream {
        None => {
            let ca = self_sign(settings, composers, signer, now).await?;
            let root = ca.certificate().clone();
            (ca, vec![root])
        }
        Some(upstream) => mint(settings, composers, upstream, signer).await?,
    };
    // Signing takes its time, and not every upstream authority backdates what it signs.
    try_out(settings, &ca, &roots, clock.now()).await.map_err(|error| match upstream {
        Some(upstream) if matches!(error, AuthorityError::Invalid(_)) => invalid(upstream, error),
        _ => error,
    })?;
    let upstream_authority_id = hex(parsed(&ca)?.authority_key_id().unwrap_or_default());
    let not_after = ca.not_after();
    Ok(Made { ca, roots, upstream_authority_id, issued_at: now, not_after })
}

fn parsed(ca: &X509Ca) -> Result<Certificate, AuthorityError> {
    Ok(Certificate::parse(ca.certificate().clone()).map_err(IssueError::from)?)
}

/// What the authority is to say, with the say of composers.
async fn composed(
    settings: &AuthoritySettings,
    composers: &Composers,
    serial: SerialNumber,
) -> Result<X509CaAttributes, AuthorityError> {
    let subject = match settings.ca_subject.parts().serial_number.is_empty() {
        true => settings.ca_subject.with_serial_number(&serial.to_string()),
        false => settings.ca_subject.clone(),
    };
    let attributes = X509CaAttributes { subject: subject.parts().clone(), ..X509CaAttributes::default() };
    composers.x509_ca(attributes).await.map_err(AuthorityError::Compose)
}

async fn self_sign(
    settings: &AuthoritySettings,
    composers: &Composers,
    signer: Arc<dyn Signer>,
    now: UnixSeconds,
) -> Result<X509Ca, AuthorityError> {
    let serial = SerialNumber::random();
    let attributes = composed(settings, composers, serial).await?;
    let template = CaTemplate {
        subject: &DistinguishedName::new(attributes.subject),
        trust_domain: &settings.trust_domain,
        not_before: now - BACKDATE_SECONDS,
        not_after: now.saturating_add(settings.ca_ttl_seconds),
        serial,
    };
    let added = Extension::of_ca(&attributes.policies, attributes.extra_extensions);
    let signing = X509Ca::self_sign_with(signer, &template, &added);
    let ca = within("the key manager", signing, AuthorityError::Sign).await?;
    check_ca(&parsed(&ca)?, &settings.trust_domain).map_err(AuthorityError::BadCa)?;
    Ok(ca)
}

/// Has the upstream authority sign it, and holds what comes back against SPIRE's rules.
async fn mint(
    settings: &AuthoritySettings,
    composers: &Composers,
    upstream: &dyn UpstreamAuthority,
    signer: Arc<dyn Signer>,
) -> Result<(X509Ca, Vec<Arc<[u8]>>), AuthorityError> {
    let attributes = composed(settings, composers, SerialNumber::random()).await?;
    let subject = DistinguishedName::new(attributes.subject);
    // As in SPIRE without the policies, which are the upstream authority's to give.
    let csr = create_ca_csr_with(signer.as_ref(), &subject, &settings.trust_domain, &attributes.extra_extensions);
    let csr = within("the key manager", csr, |e| AuthorityError::Sign(e.into())).await?;
    let minting = upstream.mint_x509_ca(&csr, settings.ca_ttl_seconds);
    let refused =
        |e: finial_plugin::PluginError| AuthorityError::Mint(e.of(PluginKind::UpstreamAuthority, upstream.name()));
    let minted = within_seconds(upstream.mint_seconds(), "the upstream authority", minting, refused).await?;
    let bad = |why: &dyn std::fmt::Display| {
        invalid(upstream, format!("invalid upstream-signed X509 CA: invalid X509 CA: {why}"))
    };
    let first = minted.chain.first().cloned().ok_or_else(|| bad(&"empty chain"))?;
    let ca = X509Ca::new(signer, first, minted.chain).map_err(|e| bad(&e))?;
    check_ca(&parsed(&ca)?, &settings.trust_domain).map_err(|e| bad(&e))?;
    let ca = ending_with(ca, &minted.roots, upstream.name());
    Ok((ca, minted.roots))
}

/// What the upstream authority signed is no good: it is at fault.
fn invalid(upstream: &dyn UpstreamAuthority, why: impl ToString) -> AuthorityError {
    AuthorityError::BadUpstream(upstream.name().to_owned(), why.to_string())
}

/// An authority does not sign for longer than what it hangs from lives: nobody could verify it.
fn ending_with(ca: X509Ca, roots: &[Arc<[u8]>], upstream: &str) -> X509Ca {
    let says = ca.parsed().not_after();
    let last = ca.upstream_chain().last().and_then(|der| Certificate::parse(der.clone()).ok());
    let root = last.as_ref().and_then(|last| last.authority_key_id());
    let roots = roots.iter().filter_map(|der| Certificate::parse(der.clone()).ok());
    let end = roots.filter(|r| root.is_some() && r.subject_key_id() == root).map(|root| root.not_after()).max();
    let ca = ca.ending(end.unwrap_or(UnixSeconds::MAX));
    if ca.not_after() < says {
        tracing::error!(
            subsystem_name = super::SUBSYSTEM,
            upstream_authority = upstream,
            expiration = %Rfc3339(says),
            used_until = %Rfc3339(ca.not_after()),
            "The upstream authority signed an X509 CA that outlives what it hangs from; it is used until that ends"
        );
    }
    ca
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
