//! One list of pods for all who wait for one. Nobody polls while nobody waits.

use super::pods::PodList;
use async_trait::async_trait;
use finial_core::ErrorKind;
use finial_plugin::PluginError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Shortest time from the end of one request to the next.
const GAP_MIN: Duration = Duration::from_millis(25);
/// The kubelet is left alone for so many times as long as its last answer took, so that we cost it a fifth of its time at most.
const GAP_FACTOR: u32 = 4;

/// Who has the pods: the kubelet, but for tests.
#[async_trait]
pub(super) trait Source: Send + Sync {
    /// The pods as they are now.
    async fn pods(&self) -> Result<PodList, PluginError>;
}

/// A failed request, for each who waited for it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) kind: ErrorKind,
    pub(super) message: String,
}

/// A list and when the request for it began: what had happened by then is in it.
#[derive(Clone)]
pub(super) struct Listed {
    pub(super) began: Instant,
    pub(super) result: Result<Arc<PodList>, Failure>,
}

pub(super) struct PodLists {
    source: Box<dyn Source>,
    gap_max: Duration,
    latest: Mutex<Option<Listed>>,
    /// Held by who asks, while the others wait for the same answer: the earliest time of the next request.
    turn: tokio::sync::Mutex<Option<Instant>>,
}

impl PodLists {
    pub(super) fn new(source: Box<dyn Source>, gap_max: Duration) -> Self {
        Self { source, gap_max, latest: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// A list whose request began at `when` or later.
    pub(super) async fn since(&self, when: Instant) -> Listed {
        if let Some(listed) = self.latest_since(when) {
            return listed;
        }
        // Who is cancelled while he asks leaves his turn to the next.
        let mut earliest = self.turn.lock().await;
        if let Some(listed) = self.latest_since(when) {
            return listed;
        }
        if let Some(earliest) = *earliest {
            tokio::time::sleep_until(earliest).await;
        }
        let began = Instant::now();
        *earliest = Some(began + GAP_MIN);
        let result = self.source.pods().await.map(Arc::new);
        let result = result.map_err(|error| {
            let cause = error.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
            Failure { kind: error.kind, message: format!("{}{cause}", error.message) }
        });
        let gap = (began.elapsed() * GAP_FACTOR).clamp(GAP_MIN, self.gap_max.max(GAP_MIN));
        *earliest = Some(Instant::now() + gap);
        let listed = Listed { began, result };
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(listed.clone());
        listed
    }

    fn latest_since(&self, when: Instant) -> Option<Listed> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.as_ref().filter(|listed| listed.began >= when).cloned()
    }
}

#[cfg(test)]
#[path = "lists_tests.rs"]
mod tests;
