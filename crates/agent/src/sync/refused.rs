//! SVIDs that the server would not give: asked for again together and ever later, and keeping no other one waiting.

use crate::entry::WorkloadEntry;
use finial_core::EntryId;
use finial_runtime::Backoff;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// After failing to get SVIDs, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4 * 60));

/// How long to wait before SVIDs are asked for again.
pub(super) fn backoff() -> Backoff {
    Backoff::new(BACKOFF.0, BACKOFF.1).shape(1.5, 0.1)
}

/// The entries whose SVIDs were refused at the last time, each as it was then: one that changed is another matter.
pub(super) struct Refused {
    entries: HashMap<EntryId, (i64, i64)>,
    backoff: Backoff,
    again: Instant,
}

fn version(entry: &WorkloadEntry) -> (i64, i64) {
    (entry.revision_number, entry.created_at)
}

impl Refused {
    pub(super) fn new() -> Self {
        Self { entries: HashMap::new(), backoff: backoff(), again: Instant::now() }
    }

    /// Forgets entries that changed or are gone.
    pub(super) fn retain<'a>(&mut self, now: impl Fn(&EntryId) -> Option<&'a WorkloadEntry>) {
        self.entries.retain(|id, then| now(id).is_some_and(|entry| version(entry) == *then));
    }

    /// When they are to be asked for again, if there are any.
    pub(super) fn again(&self) -> Option<Instant> {
        (!self.entries.is_empty()).then_some(self.again)
    }

    /// Whether this one was refused at the last time.
    pub(super) fn has(&self, id: &EntryId) -> bool {
        self.entries.contains_key(id)
    }

    /// Whether it is too early to ask for this one.
    pub(super) fn waits(&self, id: &EntryId) -> bool {
        self.has(id) && Instant::now() < self.again
    }

    /// The server was asked for SVIDs of `asked`, and gave those of `issued`.
    pub(super) fn answered<'a>(&mut self, asked: impl Iterator<Item = &'a WorkloadEntry>, issued: &HashSet<&EntryId>) {
        let (mut some, mut new) = (false, false);
        for entry in asked {
            if issued.contains(&entry.id) {
                self.entries.remove(&entry.id);
            } else {
                some = true;
                new |= self.entries.insert(entry.id.clone(), version(entry)) != Some(version(entry));
            }
        }
        if new {
            self.backoff.reset(); // it may be a matter of a moment
        }
        // The next batch of the same round does not make it later still.
        if some && (new || Instant::now() >= self.again) {
            self.again = Instant::now() + self.backoff.next_wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::entry;

    fn ask(refused: &mut Refused, asked: &[&WorkloadEntry], issued: &[&WorkloadEntry]) {
        refused.answered(asked.iter().copied(), &issued.iter().map(|e| &e.id).collect());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_asked_for_ever_later_unless_it_changes() {
        let (one, two) = (entry("a", "spiffe://td/1", &["unix:uid:1"]), entry("b", "spiffe://td/2", &["unix:uid:2"]));
        let mut refused = Refused::new();
        ask(&mut refused, &[&one, &two], &[&two]);
        let mut times = 0;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3600) {
            assert!(refused.waits(&one.id) && !refused.waits(&two.id));
            tokio::time::sleep_until(refused.again().unwrap()).await;
            assert!(!refused.waits(&one.id));
            ask(&mut refused, &[&one], &[]);
            times += 1;
        }
        assert!((20..40).contains(&times), "{times}");
        assert!(refused.again().unwrap() - Instant::now() > BACKOFF.1 / 2);
        // Another one has not been refused for long: it is tried soon.
        ask(&mut refused, &[&two], &[]);
        assert!(refused.again().unwrap() - Instant::now() < Duration::from_secs(1));
        let changed = WorkloadEntry { revision_number: one.revision_number + 1, ..one.clone() };
        refused.retain(|id| [&changed, &two].into_iter().find(|entry| entry.id == *id));
        assert!(!refused.waits(&one.id) && refused.waits(&two.id));
        ask(&mut refused, &[&two], &[&two]);
        assert!(refused.again().is_none());
    }
}
