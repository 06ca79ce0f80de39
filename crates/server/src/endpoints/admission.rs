//! Whose certificates open the TCP door: members of the own trust domain, and the admins that the configuration names.

use crate::authz::{Connection, Peer};
use crate::live::LiveSettings;
use finial_core::{Clock, SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::TrustRoots;
use finial_crypto::tls::BundleSource;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Who may come in.
pub struct Admissible {
    /// All members of this trust domain.
    pub trust_domain: TrustDomain,
    /// And the `admin_ids` of these, of any trust domain.
    pub live: LiveSettings,
    /// The roots to verify them with.
    pub bundles: Arc<dyn BundleSource>,
}

/// A missing bundle of a foreign admin is logged at most once in so many seconds.
const WARN_EVERY_SECONDS: i64 = 60;

pub(super) struct Doorkeeper {
    admissible: Admissible,
    clock: Arc<dyn Clock>,
    warned_at: AtomicI64,
}

impl Doorkeeper {
    pub(super) fn new(admissible: Admissible, clock: Arc<dyn Clock>) -> Self {
        Self { admissible, clock, warned_at: AtomicI64::new(UnixSeconds::MIN) }
    }

    /// The peer for its calls, or nothing for a foreigner whom the configuration does not name.
    pub(super) fn admit(&self, peer: Peer) -> Option<Connection> {
        let known = |id: &SpiffeId| {
            id.is_member_of(&self.admissible.trust_domain) || self.admissible.live.now().admin_ids.contains(id)
        };
        match peer.id() {
            Some(id) if !known(id) => {
                tracing::debug!(spiffe_id = id.as_str(), "unexpected trust domain in ID {:?}", id.as_str());
                None
            }
            _ => Some(Arc::new(peer)),
        }
    }
}

impl BundleSource for Doorkeeper {
    fn x509_roots(&self, trust_domain: &str) -> Option<Arc<TrustRoots>> {
        let own = trust_domain == self.admissible.trust_domain.as_str();
        if !own && !self.admissible.live.now().admin_ids.iter().any(|id| id.trust_domain_name() == trust_domain) {
            return None;
        }
        let roots = self.admissible.bundles.x509_roots(trust_domain);
        if roots.is_none() && !own {
            let now = self.clock.now();
            let last = self.warned_at.load(Ordering::Relaxed);
            if now.saturating_sub(last) >= WARN_EVERY_SECONDS {
                self.warned_at.store(now, Ordering::Relaxed);
                tracing::warn!(
                    subsystem_name = "endpoints",
                    trust_domain,
                    "No bundle found for foreign admin trust domain; admins from this trust domain will not be able to \
                     connect. Make sure this trust domain is correctly federated."
                );
            }
        }
        roots
    }
}
