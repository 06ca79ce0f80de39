//! What is made of a bundle that an endpoint served: whether it is taken, and when it is asked for again.

use super::fetch::FederationError;
use finial_core::{Bundle, SpiffeId, TrustDomain};
use finial_crypto::Certificate;
use std::time::Duration;
use tokio::time::Instant;

/// A bundle is fetched so often within its refresh hint.
const ATTEMPTS_PER_HINT: u32 = 4;
/// No hint is taken to be shorter; without any bundle it is tried as often as this.
const HINT_MIN: Duration = Duration::from_secs(60);
/// No hint is taken to be longer.
pub(super) const HINT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often a bundle without a hint is fetched.
const UNHINTED_EVERY: Duration = Duration::from_secs(300);
/// An older bundle is taken when it came so often in a row, and for so long: then it is no server or cache behind the
/// others, but a trust domain that was set up anew.
const OLDER_TIMES: u32 = 3;
const OLDER_FOR: Duration = Duration::from_secs(3600);

/// What came before.
#[derive(Default)]
pub(super) struct Seen {
    /// `None`: nothing since this server started; the stored bundle tells.
    sequence_number: Option<u64>,
    /// How often something older came in a row, and since when.
    older: Option<(u32, Instant)>,
}

impl Seen {
    /// Nothing came before that would count.
    pub(super) fn anew() -> Self {
        Self { sequence_number: Some(0), older: None }
    }

    /// Whether what came is taken. `insist`: an operator wants it.
    pub(super) fn judge(
        &mut self,
        url: &str,
        known: Option<&Bundle>,
        fetched: &Bundle,
        insist: bool,
    ) -> Result<(), FederationError> {
        if let Some(other) = of_another(known, fetched) {
            let wanted = fetched.trust_domain.as_str().to_owned();
            return Err(FederationError::OtherDomain { url: url.to_owned(), found: other.as_str().to_owned(), wanted });
        }
        let found = fetched.sequence_number;
        let last = self.sequence_number.unwrap_or_else(|| known.map_or(0, |known| known.sequence_number));
        if found < last && found != 0 && !insist {
            let (times, since) = self.older.unwrap_or((0, Instant::now()));
            self.older = Some((times.saturating_add(1), since));
            if times.saturating_add(1) < OLDER_TIMES || since.elapsed() < OLDER_FOR {
                return Err(FederationError::Older { url: url.to_owned(), found, known: last });
            }
            tracing::warn!(
                subsystem_name = super::SUBSYSTEM,
                trust_domain = %fetched.trust_domain,
                sequence_number = found,
                "The sequence number of the endpoint's bundle stays lower than before: it is taken to begin anew"
            );
        }
        self.take(fetched);
        Ok(())
    }

    /// From now on older than this counts as older.
    pub(super) fn take(&mut self, fetched: &Bundle) {
        *self = Self { sequence_number: Some(fetched.sequence_number), older: None };
    }
}

/// The trust domain that all roots are named after, if it is another one. The standard lets a root of another trust domain
/// sign (X509-SVID section 4.1), so that those that an operator has set are no surprise.
fn of_another(known: Option<&Bundle>, fetched: &Bundle) -> Option<TrustDomain> {
    let mut other = None;
    for root in &fetched.x509_authorities {
        let named = named_after(&root.der)?;
        let expected = known.is_some_and(|known| known.x509_authorities.iter().any(|a| a.der == root.der));
        if named == fetched.trust_domain || expected {
            return None;
        }
        other = Some(named);
    }
    other
}

fn named_after(der: &[u8]) -> Option<TrustDomain> {
    let certificate = Certificate::parse(der).ok()?;
    let id = certificate.uri_sans().iter().find_map(|uri| SpiffeId::parse(uri).ok())?;
    TrustDomain::parse(id.trust_domain_name()).ok()
}

/// How long until a bundle is fetched again: by its hint, but ten times within the shortest life among its roots at least, or
/// a rotation could be missed.
pub(super) fn refresh_after(bundle: Option<&Bundle>) -> Duration {
    let Some(bundle) = bundle else { return HINT_MIN };
    let by_hint = match u64::try_from(bundle.refresh_hint) {
        Ok(0) | Err(_) => UNHINTED_EVERY,
        Ok(seconds) => Duration::from_secs(seconds).clamp(HINT_MIN, HINT_MAX) / ATTEMPTS_PER_HINT,
    };
    by_hint.min(lifetime_share(bundle).unwrap_or(by_hint).max(HINT_MIN / ATTEMPTS_PER_HINT))
}

/// A tenth of the shortest life among the roots.
fn lifetime_share(bundle: &Bundle) -> Option<Duration> {
    let lives = bundle.x509_authorities.iter().filter_map(|authority| {
        let root = Certificate::parse(authority.der.clone()).ok()?;
        u64::try_from(root.not_after().saturating_sub(root.not_before())).ok()
    });
    lives.min().map(|seconds| Duration::from_secs(seconds) / 10)
}

/// Whether a fetched bundle says the same as the stored one. Sequence numbers do not count: SPIRE's servers, which may
/// share the datastore, store none.
pub(super) fn same(known: &Bundle, fetched: &Bundle) -> bool {
    let keys = |list: &[finial_core::JwtAuthority]| {
        let mut keys: Vec<_> = list.iter().map(|a| (a.key_id.clone(), a.public_key.clone())).collect();
        keys.sort();
        keys
    };
    let roots = |bundle: &Bundle| {
        let mut roots: Vec<_> = bundle.x509_authorities.iter().map(|a| a.der.clone()).collect();
        roots.sort();
        roots
    };
    known.refresh_hint == fetched.refresh_hint
        && roots(known) == roots(fetched)
        && keys(&known.jwt_authorities) == keys(&fetched.jwt_authorities)
        && keys(&known.wit_authorities) == keys(&fetched.wit_authorities)
}
