//! When the server is asked next. Pure, but for the spread.

use finial_runtime::Backoff;
use std::time::Duration;

/// Between two syncs while there is nothing to serve, whatever is configured.
const EAGER: Duration = Duration::from_secs(5);
/// A server that fails is asked again after at most this time, or 48 intervals if that is less.
const BACKOFF_MAX: Duration = Duration::from_secs(8 * 60);

/// Between two syncs while the server tells of changes by itself.
const TOLD: Duration = Duration::from_secs(10 * 60);

/// How a sync ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Well; `empty` when there is no SVID in the cache.
    Synced {
        /// Nothing can be served yet.
        empty: bool,
    },
    /// The server did not answer, or not well.
    Failed,
    /// The server is signed by someone unknown.
    UnknownAuthority,
}

/// Waits between syncs: the interval, longer after failures, each spread by a tenth.
pub(crate) struct Pace(Backoff);

impl Pace {
    pub(crate) fn new(interval: Duration) -> Self {
        Self(Backoff::new(interval, BACKOFF_MAX.min(interval.saturating_mul(48))).shape(1.5, 0.1))
    }

    /// After the sync at start.
    pub(crate) fn first(&mut self) -> Duration {
        self.0.next_wait().min(EAGER)
    }

    /// While the server tells of changes by itself: only in case it forgets something.
    pub(crate) fn told(&mut self) -> Duration {
        TOLD.max(self.0.next_wait())
    }

    pub(crate) fn after(&mut self, outcome: Outcome) -> Duration {
        if outcome != Outcome::Failed {
            self.0.reset();
        }
        let wait = self.0.next_wait();
        match outcome {
            Outcome::Synced { empty: true } | Outcome::UnknownAuthority => wait.min(EAGER),
            _ => wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn near(wait: Duration, expected: Duration) -> bool {
        wait >= expected.mul_f64(0.89) && wait <= expected.mul_f64(1.11)
    }

    #[test]
    fn an_empty_cache_is_filled_soon_however_long_the_interval() {
        let mut pace = Pace::new(10 * MINUTE);
        assert_eq!(pace.first(), EAGER);
        assert_eq!(pace.after(Outcome::Synced { empty: true }), EAGER);
        assert!(
            near(pace.after(Outcome::Synced { empty: false }), 8 * MINUTE),
            "never longer than the longest backoff"
        );
    }

    #[test]
    fn failures_wait_longer_up_to_a_limit_and_success_ends_that() {
        let mut pace = Pace::new(EAGER);
        assert!(near(pace.after(Outcome::Synced { empty: false }), EAGER));
        let waits: Vec<_> = (0..20).map(|_| pace.after(Outcome::Failed)).collect();
        assert!(near(waits[0], EAGER.mul_f64(1.5)), "{waits:?}");
        assert!(near(waits[19], EAGER * 48), "{waits:?}");
        assert!(near(pace.after(Outcome::Synced { empty: false }), EAGER));
        assert!(pace.after(Outcome::UnknownAuthority) <= EAGER);
    }
}
