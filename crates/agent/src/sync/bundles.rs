//! Bundles, however they came: those that did not change stay the same value, and what a change of our own means is done.

use super::{SUBSYSTEM, Syncer};
use crate::Context;
use crate::cache::{BundleForms, Bundles};
use crate::entry::WorkloadEntry;
use crate::error::ServerError;
use finial_core::{Bundle, TrustDomain};
use finial_proto::convert::bundle_from_proto;
use finial_proto::sync::VersionedBundle;
use finial_proto::types;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Authorities that are gone and remembered.
const GONE_MAX: usize = 64;

impl Syncer {
    /// All bundles, if any of them changed: our own, and those of `domains`.
    pub(super) fn take_bundles(
        &mut self,
        new: Vec<VersionedBundle>,
        gone: &[String],
        domains: BTreeSet<TrustDomain>,
    ) -> Result<Option<Bundles>, ServerError> {
        let known = self.cache().snapshot().bundles.clone();
        let own_domain = known.own.bundle.trust_domain.clone();
        let mut fresh: BTreeMap<TrustDomain, (Arc<BundleForms>, u64)> = BTreeMap::new();
        for VersionedBundle { bundle, version } in new {
            let Some(wire) = bundle else { continue };
            let Ok(domain) = TrustDomain::parse(&wire.trust_domain) else { continue };
            let read = match domain == own_domain {
                true => read_own(&known.own, &wire),
                false => read_bundle(&domain, known.federated.get(&domain), &wire),
            };
            match read {
                Ok(bundle) => {
                    fresh.insert(domain, (bundle, version));
                }
                Err(error) if domain == own_domain => return Err(bad_own_bundle(&error)),
                Err(error) => warn_of_bundle(&domain, &error),
            }
        }
        let of = |domain: &TrustDomain| fresh.get(domain).map(|(bundle, _)| bundle);
        let mut bundles = Bundles { own: of(&own_domain).unwrap_or(&known.own).clone(), federated: BTreeMap::new() };
        let stays = |domain: &TrustDomain| !gone.iter().any(|name| name == domain.as_str());
        for domain in domains {
            let kept = known.federated.get(&domain).filter(|_| stays(&domain));
            let told = self.told.get(&domain).filter(|_| stays(&domain)).map(|(bundle, _)| bundle);
            if let Some(bundle) = of(&domain).or(kept).or(told).cloned() {
                bundles.federated.insert(domain, bundle);
            }
        }
        // Only now, as nothing can fail any more: what was told is not told again.
        self.told.extend(fresh);
        self.told.retain(|domain, _| stays(domain));
        Ok(self.changed_bundles(&known, bundles))
    }

    /// Of `new` entries, or else of those known, the trust domains that they federate with.
    pub(super) fn federated_domains(&self, new: Option<&[Arc<WorkloadEntry>]>) -> BTreeSet<TrustDomain> {
        match new {
            Some(new) => domains(new.iter()),
            None => domains(self.cache().snapshot().records.iter().map(|record| &record.entry)),
        }
    }

    /// What was signed by authorities that are tainted, or gone (nobody trusts it), is not to be used any more.
    pub(crate) fn leave_gone(&mut self, before: &BundleForms, own: &BundleForms) {
        let back = own.gone_in(before).x509;
        let gone = before.gone_in(own);
        self.gone.retain(|key| !back.contains(key));
        self.gone.extend(gone.x509);
        self.gone.drain(..self.gone.len().saturating_sub(GONE_MAX));
        self.tainted.set(own.tainted_x509().into_iter().chain(self.gone.iter().cloned()));
        self.cache().jwt.purge_tainted(&gone.jwt);
        self.cache().wit.purge(&gone.wit);
    }

    /// All bundles, if any of them changed: our own, and those of `domains`.
    pub(super) async fn fetch_bundles(
        &mut self,
        domains: BTreeSet<TrustDomain>,
    ) -> Result<Option<Bundles>, ServerError> {
        let known = self.cache().snapshot().bundles.clone();
        let own = read_own(&known.own, &self.link.bundle().await?).map_err(|e| bad_own_bundle(&e))?;
        let mut bundles = Bundles { own, federated: BTreeMap::new() };
        for (domain, bundle) in self.link.federated_bundles(domains.into_iter().collect()).await? {
            let Some(bundle) = bundle else { continue };
            let old = known.federated.get(&domain);
            let read = read_bundle(&domain, old, &bundle).inspect_err(|error| warn_of_bundle(&domain, error));
            if let Some(bundle) = read.ok().or_else(|| old.cloned()) {
                bundles.federated.insert(domain, bundle);
            }
        }
        Ok(self.changed_bundles(&known, bundles))
    }

    /// The bundles if they are others than those known.
    fn changed_bundles(&mut self, known: &Bundles, bundles: Bundles) -> Option<Bundles> {
        self.context.metrics.gauge("sync_bundles_total", bundles.federated.len() as f64 + 1.0, &[]);
        let same_federated = known.federated.len() == bundles.federated.len()
            && known.federated.iter().zip(&bundles.federated).all(|((a, x), (b, y))| a == b && Arc::ptr_eq(x, y));
        if Arc::ptr_eq(&known.own, &bundles.own) && same_federated {
            return None;
        }
        if !Arc::ptr_eq(&known.own, &bundles.own) {
            self.own_bundle_changed(&known.own, &bundles.own);
        }
        Some(bundles)
    }

    /// It is stored once it is published: what a disk that hangs would delay is the end of a root that is gone.
    fn own_bundle_changed(&mut self, before: &BundleForms, own: &BundleForms) {
        self.unstored = true;
        self.leave_gone(before, own);
        let tainted_jwt = own.tainted_jwt();
        if tainted_jwt.iter().any(|id| !self.tainted_jwt_done.contains(id)) {
            let removed = self.cache().jwt.purge_tainted(&tainted_jwt);
            self.context.metrics.sample("cache_manager.tainted_jwt_svids.workload", removed as f64, &[]);
            tracing::info!(subsystem_name = SUBSYSTEM, jwt_authority_key_ids = %tainted_jwt.join(","), tainted_jwt_svids = removed,
                "JWT-SVIDs were removed from the JWT cache because they were issued by a tainted authority"
            );
        }
        self.tainted_jwt_done = tainted_jwt;
    }
}

fn domains<'a>(entries: impl Iterator<Item = &'a Arc<WorkloadEntry>>) -> BTreeSet<TrustDomain> {
    entries.flat_map(|entry| &entry.federates_with).cloned().collect()
}

pub(super) fn roots(own: &BundleForms) -> Vec<Arc<[u8]>> {
    own.bundle.x509_authorities.iter().map(|a| a.der.clone()).collect()
}

pub(super) async fn store(context: &Context, own: &BundleForms) {
    if let Err(error) = context.storage.store_bundle(&roots(own)).await {
        tracing::error!(subsystem_name = SUBSYSTEM, %error, "Could not store bundle");
    }
}

fn bad_own_bundle(error: &str) -> ServerError {
    ServerError::bare(tonic::Status::internal(format!("failed to parse trust domain bundle: {error}")))
}

fn warn_of_bundle(domain: &TrustDomain, error: &str) {
    tracing::warn!(subsystem_name = SUBSYSTEM, %error, trust_domain_id = %domain,
        "Received malformed bundle from SPIRE server; are the server and agent versions compatible?"
    );
}

/// Without any authority nothing of the trust domain could be believed any more, the server least of all: the agent would be
/// lost, and what it would keep is worth nothing.
fn read_own(known: &Arc<BundleForms>, wire: &types::Bundle) -> Result<Arc<BundleForms>, String> {
    let own = read_bundle(&known.bundle.trust_domain, Some(known), wire)?;
    if own.bundle.x509_authorities.is_empty() {
        return Err("the server's bundle has no X.509 authorities; the last one that had some is kept".to_owned());
    }
    Ok(own)
}

fn read_bundle(
    domain: &TrustDomain,
    known: Option<&Arc<BundleForms>>,
    wire: &types::Bundle,
) -> Result<Arc<BundleForms>, String> {
    bundle_from_proto(wire).map_err(|e| e.to_string()).and_then(|bundle| renew(domain, known, bundle))
}

/// The forms of the bundle of `domain`: the known ones if it did not change. One that calls itself otherwise would be handed
/// to workloads under a name for which nobody asked.
fn renew(domain: &TrustDomain, known: Option<&Arc<BundleForms>>, bundle: Bundle) -> Result<Arc<BundleForms>, String> {
    if bundle.trust_domain != *domain {
        return Err(format!(
            "bundle of trust domain {:?} instead of {:?}",
            bundle.trust_domain.as_str(),
            domain.as_str()
        ));
    }
    match known.filter(|k| k.bundle == bundle) {
        Some(known) => Ok(known.clone()),
        None => BundleForms::new(bundle).map(Arc::new).map_err(|e| e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_taken_under_the_name_that_was_asked_for_only() {
        let bundle = |name: &str| Bundle::empty(TrustDomain::parse(name).unwrap());
        let own = renew(&TrustDomain::parse("td").unwrap(), None, bundle("td")).unwrap();
        let again = renew(&TrustDomain::parse("td").unwrap(), Some(&own), bundle("td")).unwrap();
        assert!(Arc::ptr_eq(&own, &again));
        let error = renew(&TrustDomain::parse("other").unwrap(), None, bundle("td")).unwrap_err();
        assert_eq!(error, r#"bundle of trust domain "td" instead of "other""#);
    }
}
