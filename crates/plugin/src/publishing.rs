//! What publishers have in common that write one document to a place far away.

use crate::{PluginError, PublishedForm};
use finial_core::Bundle;
use tokio::sync::Mutex;

/// A bundle's way to one place: in its form, one at a time, so that the last is written last, and not again while it is the
/// same.
pub struct Publishing {
    form: PublishedForm,
    /// What was written last; none before that, and after a failure.
    last: Mutex<Option<Bundle>>,
}

impl Publishing {
    /// In that form; nothing is written yet.
    pub fn new(form: PublishedForm) -> Self {
        Self { form, last: Mutex::default() }
    }

    /// Has `put` write the bundle, unless it is what was written last. One that fails, or is dropped, is written again.
    ///
    /// # Errors
    /// What `put` says.
    pub async fn publish<F: Future<Output = Result<(), PluginError>>>(
        &self,
        bundle: &Bundle,
        put: impl FnOnce(String) -> F,
    ) -> Result<(), PluginError> {
        let mut last = self.last.lock().await;
        if last.as_ref() == Some(bundle) {
            return Ok(());
        }
        // Whether a failure wrote it nobody knows.
        *last = None;
        put(self.form.write(bundle)).await?;
        *last = Some(bundle.clone());
        tracing::debug!("Bundle published");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::TrustDomain;

    #[tokio::test]
    async fn an_equal_bundle_is_written_once_and_again_after_a_failure() {
        let publishing = Publishing::new(PublishedForm::read("spiffe", "").unwrap());
        let first = Bundle::empty(TrustDomain::parse("a.test").unwrap());
        let second = Bundle { sequence_number: 2, ..first.clone() };
        let written = Mutex::new(0);
        let count = |_| async {
            *written.lock().await += 1;
            Ok(())
        };
        for (bundle, times) in [(&first, 1), (&first, 1), (&second, 2), (&first, 3)] {
            publishing.publish(bundle, count).await.unwrap();
            assert_eq!(*written.lock().await, times);
        }
        publishing.publish(&second, |_| async { Err(PluginError::internal("no")) }).await.unwrap_err();
        publishing.publish(&first, count).await.unwrap();
        assert_eq!(*written.lock().await, 4, "nobody knows what a failure has written");
        let dropped = publishing.publish(&second, |_| std::future::pending());
        tokio::time::timeout(std::time::Duration::ZERO, dropped).await.unwrap_err();
        publishing.publish(&first, count).await.unwrap();
        assert_eq!(*written.lock().await, 5);
    }
}
