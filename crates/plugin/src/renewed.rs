//! What is good for a while and then has to be fetched again, such as a token.

use finial_core::UnixSeconds;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Renewed when half of what is left, at most this, has passed.
const EARLY_SECONDS: i64 = 300;

/// The last one fetched, while it is good. Those who need it at once share one fetch.
pub struct Renewed<T>(Mutex<Option<Kept<T>>>);

struct Kept<T> {
    value: Arc<T>,
    until: UnixSeconds,
}

impl<T> Default for Renewed<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Renewed<T> {
    /// The value; if none is there that is good for some time to come, the one that `fetch` brings with the time when it ends.
    ///
    /// # Errors
    /// What `fetch` says.
    pub async fn get<E>(
        &self,
        now: UnixSeconds,
        fetch: impl Future<Output = Result<(T, UnixSeconds), E>>,
    ) -> Result<Arc<T>, E> {
        let mut kept = self.0.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| now < kept.until) {
            return Ok(kept.value.clone());
        }
        let (value, ends) = fetch.await?;
        let value = Arc::new(value);
        let left = ends.saturating_sub(now).max(0);
        *kept = Some(Kept { value: value.clone(), until: ends.saturating_sub((left / 2).min(EARLY_SECONDS)) });
        Ok(value)
    }

    /// The one that is kept was refused: the next is fetched.
    pub async fn forget(&self) {
        *self.0.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_fetched_again_shortly_before_its_end() {
        let renewed = Renewed::<i64>::default();
        let get = async |now: i64| *renewed.get(now, async { Ok::<_, ()>((now, now + 3600)) }).await.unwrap();
        for (now, want) in [(0, 0), (3299, 0), (3300, 3300), (3301, 3300)] {
            assert_eq!(get(now).await, want);
        }
        renewed.forget().await;
        assert_eq!(get(3302).await, 3302);
        let short = Renewed::<i64>::default();
        let get = async |now: i64| *short.get(now, async { Ok::<_, ()>((now, now + 100)) }).await.unwrap();
        for (now, want) in [(0, 0), (49, 0), (50, 50)] {
            assert_eq!(get(now).await, want);
        }
        short.get(999, async { Err("no") }).await.unwrap_err();
    }
}
