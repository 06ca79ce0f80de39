//! Token buckets, one per key, with a limit on how many keys are remembered.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The request was not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateLimited {
    /// It asks for more at once than can ever be granted.
    #[error("rate ({asked}) exceeds burst size ({burst})")]
    OverBurst {
        /// How many were asked for.
        asked: u32,
        /// How many can be had at once.
        burst: u32,
    },
    /// Its turn would come after its deadline, or too many are waiting.
    #[error("rate limit exceeded")]
    TooLate,
}

/// A bucket as "the time at which it will be empty of debt": its level follows from the distance to now.
type FullAt = Instant;

/// Grants `per_second` events per key on average and `burst` at once. Waits are fair per key: each reserves its place.
#[derive(Debug)]
pub struct RateLimiter<K> {
    interval: Duration,
    burst: u32,
    max_keys: usize,
    buckets: Mutex<HashMap<K, FullAt>>,
}

impl<K: Eq + Hash + Clone> RateLimiter<K> {
    /// `per_second` is also the burst, as SPIRE's limits are. Remembers up to `max_keys` keys; when there are more, the
    /// ones that are full anyway are forgotten first, and then none is let through at once.
    pub fn new(per_second: u32, max_keys: usize) -> Self {
        let per_second = per_second.max(1);
        Self {
            interval: Duration::from_secs(1) / per_second,
            burst: per_second,
            max_keys: max_keys.max(1),
            buckets: Mutex::default(),
        }
    }

    /// With a burst other than the rate.
    pub fn burst(mut self, burst: u32) -> Self {
        self.burst = burst.max(1);
        self
    }

    /// Takes `count` tokens for `key`, waiting for its turn, at most until `max_wait` from now.
    ///
    /// # Errors
    /// [`RateLimited::OverBurst`] at once; [`RateLimited::TooLate`] at once, without taking a place in the line.
    pub async fn acquire(&self, key: &K, count: u32, max_wait: Duration) -> Result<(), RateLimited> {
        let wait = self.reserve(key, count, max_wait)?;
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// Takes `count` tokens for `key` without waiting, or refuses.
    ///
    /// # Errors
    /// As [`RateLimiter::acquire`].
    pub fn try_acquire(&self, key: &K, count: u32) -> Result<(), RateLimited> {
        self.reserve(key, count, Duration::ZERO).map(|_| ())
    }

    /// How long to wait for the place just reserved.
    fn reserve(&self, key: &K, count: u32, max_wait: Duration) -> Result<Duration, RateLimited> {
        if count > self.burst {
            return Err(RateLimited::OverBurst { asked: count, burst: self.burst });
        }
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.contains_key(key) && buckets.len() >= self.max_keys {
            buckets.retain(|_, full_at| *full_at > now);
            if buckets.len() >= self.max_keys {
                return Err(RateLimited::TooLate);
            }
        }
        let full_at = buckets.get(key).copied().unwrap_or(now).max(now) + self.interval * count;
        let wait = (full_at - now).saturating_sub(self.interval * self.burst);
        if wait > max_wait {
            return Err(RateLimited::TooLate);
        }
        buckets.insert(key.clone(), full_at);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
        let limiter = RateLimiter::new(10, 8);
        let start = Instant::now();
        for _ in 0..10 {
            limiter.acquire(&"a", 1, LONG).await.expect("within the burst");
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        limiter.acquire(&"a", 5, LONG).await.expect("waits");
        assert_eq!(start.elapsed().as_millis() / 10, 50);
        limiter.acquire(&"b", 10, LONG).await.expect("another key has its own bucket");
        assert_eq!(start.elapsed().as_millis() / 10, 50);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_granted_is_refused_at_once() {
        let limiter = RateLimiter::new(1, 2);
        assert_eq!(limiter.acquire(&1, 2, LONG).await, Err(RateLimited::OverBurst { asked: 2, burst: 1 }));
        limiter.try_acquire(&1, 1).expect("the first");
        assert_eq!(limiter.try_acquire(&1, 1), Err(RateLimited::TooLate));
        assert_eq!(limiter.acquire(&1, 1, Duration::from_millis(900)).await, Err(RateLimited::TooLate));
        limiter.acquire(&1, 1, Duration::from_secs(1)).await.expect("refusals took no place in the line");
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_keys_is_limited() {
        let limiter = RateLimiter::new(1, 2);
        limiter.try_acquire(&1, 1).expect("first key");
        limiter.try_acquire(&2, 1).expect("second key");
        assert_eq!(limiter.try_acquire(&3, 1), Err(RateLimited::TooLate));
        tokio::time::advance(Duration::from_secs(2)).await;
        limiter.try_acquire(&3, 1).expect("full buckets were forgotten");
    }
}
