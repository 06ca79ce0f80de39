//! How long to wait before the next attempt.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// Waits that grow by a factor up to a limit, each spread by chance so that many clients do not come back together.
#[derive(Clone, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    factor: f64,
    spread: f64,
    current: Duration,
    state: u64,
}

impl Backoff {
    /// Starts at `initial`, grows by 1.5 up to `max`, spread by +-50 % (what SPIRE does).
    pub fn new(initial: Duration, max: Duration) -> Self {
        // RandomState is seeded by the system; jitter needs no more than that.
        let seed = std::collections::hash_map::RandomState::new().build_hasher().finish();
        Self::seeded(initial, max, seed)
    }

    /// The same with a given seed, for tests.
    pub fn seeded(initial: Duration, max: Duration, seed: u64) -> Self {
        Self { initial, max, factor: 1.5, spread: 0.5, current: initial, state: seed | 1 }
    }

    /// With another growth factor (at least 1) and spread (0 to 1).
    pub fn shape(mut self, factor: f64, spread: f64) -> Self {
        self.factor = factor.max(1.0);
        self.spread = spread.clamp(0.0, 1.0);
        self
    }

    /// The wait before the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let base = self.current.min(self.max);
        self.current = base.mul_f64(self.factor).min(self.max);
        let low = base.mul_f64(1.0 - self.spread);
        low + base.mul_f64(2.0 * self.spread * self.random())
    }

    /// After a success: back to the start.
    pub fn reset(&mut self) {
        self.current = self.initial;
    }

    /// A number in [0, 1): xorshift64*.
    fn random(&mut self) -> f64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let bits = self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40;
        bits as f64 / f64::from(1u32 << 24)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_within_their_spread_and_start_again() {
        for seed in 1..200 {
            let mut backoff = Backoff::seeded(Duration::from_secs(5), Duration::from_secs(60), seed);
            let mut base = 5.0f64;
            for _ in 0..12 {
                let wait = backoff.next_wait().as_secs_f64();
                assert!(wait >= base * 0.5 - 1e-6 && wait <= base * 1.5 + 1e-6, "{wait} around {base}");
                base = (base * 1.5).min(60.0);
            }
            backoff.reset();
            assert!(backoff.next_wait() <= Duration::from_millis(7500));
        }
    }

    #[test]
    fn without_spread_waits_are_exact() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(3)).shape(2.0, 0.0);
        let waits: Vec<_> = (0..4).map(|_| backoff.next_wait().as_secs()).collect();
        assert_eq!(waits, [1, 2, 3, 3]);
    }
}
