//! When SVIDs are renewed: pure rules over times in milliseconds since the epoch.
//!
//! The moment is drawn once for each SVID, so that renewals really spread over +-10 % of the half-life. (SPIRE draws again
//! at each check, which gathers them at the early edge.)

use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An availability target needs this much lifetime beside it, or the default rule applies. Milliseconds.
const GRACE_MS: i64 = 12 * 60 * 60 * 1000;
/// An availability target is extended by up to this much, at random. Milliseconds.
const TARGET_SPREAD_MS: f64 = 10.0 * 60.0 * 1000.0;
/// A half-life is moved by up to this fraction either way.
const HALF_LIFE_SPREAD: f64 = 0.1;

/// Random numbers for spreading load; nothing secret depends on them.
#[derive(Debug)]
pub(crate) struct Jitter(AtomicU64);

impl Jitter {
    /// Seeded by the system.
    pub(crate) fn new() -> Self {
        Self::seeded(std::hash::RandomState::new().build_hasher().finish())
    }

    /// Always the same numbers, for tests.
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// A number in [0, 1) (splitmix64).
    pub(crate) fn draw(&self) -> f64 {
        let step = 0x9E37_79B9_7F4A_7C15u64;
        let mut z = self.0.fetch_add(step, Ordering::Relaxed).wrapping_add(step);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How early SVIDs are renewed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RotationStrategy {
    availability_target_ms: Option<i64>,
}

impl RotationStrategy {
    pub(crate) fn new(availability_target: Option<Duration>) -> Self {
        let ms = availability_target.filter(|t| !t.is_zero()).map(|t| i64::try_from(t.as_millis()).unwrap_or(i64::MAX));
        Self { availability_target_ms: ms }
    }

    /// Whether an availability target is set that SVIDs of this lifetime cannot keep, so that the default rule applies.
    pub(crate) fn falls_back(&self, lifetime_ms: i64) -> bool {
        self.availability_target_ms.is_some_and(|target| lifetime_ms.saturating_sub(target) <= GRACE_MS)
    }

    /// From when on an X509-SVID is to be renewed. `draw` is in [0, 1).
    pub(crate) fn x509_rotate_at(&self, not_before_ms: i64, not_after_ms: i64, draw: f64) -> i64 {
        let lifetime = not_after_ms.saturating_sub(not_before_ms).max(0);
        match self.availability_target_ms {
            Some(target) if !self.falls_back(lifetime) => {
                let left = target.saturating_add((TARGET_SPREAD_MS * draw) as i64);
                not_after_ms.saturating_sub(left).min(half_life(not_after_ms, lifetime, 1.0 - draw)).max(not_before_ms)
            }
            _ => half_life(not_after_ms, lifetime, draw),
        }
    }

    /// From when on a cached JWT-SVID is to be renewed: its half-life.
    pub(crate) fn jwt_rotate_at(&self, issued_at_ms: i64, expires_at_ms: i64, draw: f64) -> i64 {
        half_life(expires_at_ms, expires_at_ms.saturating_sub(issued_at_ms).max(0), draw)
    }
}

fn half_life(end_ms: i64, lifetime_ms: i64, draw: f64) -> i64 {
    let left = lifetime_ms as f64 / 2.0 * (1.0 - HALF_LIFE_SPREAD + 2.0 * HALF_LIFE_SPREAD * draw);
    end_ms.saturating_sub(left as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = 3_600_000;

    #[test]
    fn by_default_the_half_life_decides() {
        let rule = RotationStrategy::default();
        assert_eq!(rule.x509_rotate_at(0, HOUR, 0.5), HOUR / 2);
        assert_eq!(rule.x509_rotate_at(0, HOUR, 0.0), HOUR / 2 + HOUR / 20);
        assert_eq!(rule.jwt_rotate_at(0, 300_000, 0.5), 150_000);
    }

    #[test]
    fn an_availability_target_renews_earlier_when_the_lifetime_allows() {
        let rule = RotationStrategy::new(Some(Duration::from_secs(24 * 3600)));
        // 48 h of life: 24 h must be left, up to 10 minutes more.
        assert_eq!(rule.x509_rotate_at(0, 48 * HOUR, 0.0), (24 * HOUR).min(48 * HOUR - (24 * HOUR) * 11 / 10));
        assert!(!rule.falls_back(36 * HOUR + 1));
        // exactly 12 h of grace is not enough
        assert!(rule.falls_back(36 * HOUR));
        assert_eq!(rule.x509_rotate_at(0, 36 * HOUR, 0.5), 18 * HOUR);
    }

    proptest! {
        #[test]
        fn renewal_lies_within_the_lifetime(start in 0i64..4_000_000_000_000, life in 1i64..(400 * 24 * HOUR), draw in 0.0f64..1.0,
                                            target in proptest::option::of(1u64..(200 * 24 * 3600))) {
            let rule = RotationStrategy::new(target.map(Duration::from_secs));
            let at = rule.x509_rotate_at(start, start + life, draw);
            prop_assert!(at >= start, "{at} before {start}");
            prop_assert!(at <= start + life);
            // never later than the default rule's latest moment
            prop_assert!(at <= start + life - (life as f64 * 0.45) as i64 + 1);
        }

        #[test]
        fn draws_are_in_range(seed: u64) {
            let jitter = Jitter::seeded(seed);
            for _ in 0..20 {
                let x = jitter.draw();
                prop_assert!((0.0..1.0).contains(&x));
            }
        }
    }
}
