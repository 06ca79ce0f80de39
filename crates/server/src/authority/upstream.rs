//! What is heard from, and told to, an upstream authority between signatures.

use super::manager::{AuthorityManager, within};
use super::store::TaintStep;
use super::{AuthorityError, AuthorityKind, SUBSYSTEM};
use finial_core::{Bundle, ErrorKind, JwtAuthority, X509Authority};
use finial_crypto::Certificate;
use finial_plugin::{PluginKind, UpstreamAuthority};
use std::collections::BTreeMap;
use std::time::Duration;

/// After an upstream authority could not say its roots, it is asked again this long after.
const PAUSE: Duration = Duration::from_secs(5);

/// Publishes a JWT key upstream. Returns what belongs into the bundle: all that is known above, or the key alone where
/// nothing above knows of such keys.
pub(crate) async fn published_upstream(
    upstream: &dyn UpstreamAuthority,
    key: JwtAuthority,
) -> Result<Vec<JwtAuthority>, AuthorityError> {
    let refused =
        |e: finial_plugin::PluginError| AuthorityError::Publish(e.of(PluginKind::UpstreamAuthority, upstream.name()));
    match within("the upstream authority", upstream.publish_jwt_key(&key), refused).await {
        Err(error) if error.kind() == ErrorKind::Unimplemented => Ok(vec![key]),
        Ok(mut keys) => {
            if keys.iter().all(|known| known.key_id != key.key_id) {
                keys.push(key);
            }
            Ok(keys)
        }
        Err(error) => Err(error),
    }
}

/// The next roots of an upstream authority; pauses after a failure, so that asking again right away does no harm.
pub(super) async fn next_roots(upstream: Option<&dyn UpstreamAuthority>) -> Vec<X509Authority> {
    let Some(upstream) = upstream else { return std::future::pending().await };
    loop {
        match upstream.next_roots().await {
            Ok(roots) => return roots,
            Err(error) => {
                let error = error.of(PluginKind::UpstreamAuthority, upstream.name());
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "The upstream authority does not say its roots; asking again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// By subject key ID, hex. What cannot be read has none.
fn by_key_id(authorities: &[X509Authority]) -> BTreeMap<String, bool> {
    let id = |a: &X509Authority| {
        let certificate = Certificate::parse(a.der.clone()).ok()?;
        Some((super::journal::hex(certificate.subject_key_id()?), a.tainted))
    };
    authorities.iter().filter_map(id).collect()
}

impl AuthorityManager {
    /// Takes over what the upstream authority said last of its roots; what fails is tried again with the next check.
    pub(super) async fn heed_upstream(&mut self) -> Result<(), AuthorityError> {
        let Some(roots) = self.told_roots.clone() else { return Ok(()) };
        let taken = self.take_roots(roots).await;
        match &taken {
            Ok(()) => self.told_roots = None,
            Err(error) => {
                tracing::error!(subsystem_name = SUBSYSTEM, %error, "Could not take over the roots of the upstream authority");
            }
        }
        taken
    }

    /// Takes over what the upstream authority says of its roots: new ones are added, tainted ones marked, and tainted ones
    /// that are gone removed. Moving off the tainted ones follows from the bundle.
    async fn take_roots(&mut self, roots: Vec<X509Authority>) -> Result<(), AuthorityError> {
        let trust_domain = self.settings.trust_domain.clone();
        let reading = self.parts.store.bundle(&trust_domain);
        let known = within("the datastore", reading, AuthorityError::Bundle).await?;
        let known = by_key_id(&known.map(|bundle| bundle.x509_authorities).unwrap_or_default());
        let told = by_key_id(&roots);
        let x509_authorities: Vec<_> = roots.into_iter().filter(|root| !root.tainted).collect();
        if !x509_authorities.is_empty() {
            let addition = Bundle { x509_authorities, ..Bundle::empty(trust_domain.clone()) };
            self.append(&addition, "").await?;
        }
        for (id, was_tainted) in known {
            let step = match told.get(&id) {
                Some(true) if !was_tainted => TaintStep::Taint,
                None if was_tainted => TaintStep::Revoke,
                _ => continue,
            };
            let marking = self.parts.store.mark_authority(&trust_domain, AuthorityKind::X509, step, &id);
            within("the datastore", marking, AuthorityError::Bundle).await?;
            let done = if step == TaintStep::Taint { "tainted" } else { "revoked" };
            tracing::info!(subsystem_name = SUBSYSTEM, subject_key_id = id, "X.509 authority {done}");
        }
        let reading = self.parts.feed.refresh(&trust_domain);
        within("the datastore", reading, AuthorityError::Bundle).await
    }
}
