//! When the loop is to look for renewals before its next look, as an SVID would not live to see that.

use super::Syncer;
use crate::cache::Record;
use finial_core::UnixSeconds;
use std::time::Duration;
use tokio::time::Instant;

/// An SVID that hardly lives makes no look after look.
const LEAST: Duration = Duration::from_millis(200);

/// How long an SVID can wait to be renewed: from its time on for a tenth of what it then has left, so that most of them wait
/// for the next look and share a call. One whose time came before (it was issued for less than the server's tolerance of clocks, or
/// could not be renewed) for half of what it has left now. None when it has ended: the next look is soon enough.
fn wait(now_ms: i64, rotate_at_ms: i64, not_after: UnixSeconds) -> Option<Duration> {
    let end_ms = not_after.saturating_mul(1000);
    if end_ms <= now_ms {
        return None;
    }
    let wait_ms = if rotate_at_ms > now_ms {
        (rotate_at_ms - now_ms).saturating_add(end_ms.saturating_sub(rotate_at_ms).max(0) / 10)
    } else {
        (end_ms - now_ms) / 2
    };
    Some(Duration::from_millis(wait_ms.unsigned_abs()).max(LEAST))
}

impl Syncer {
    /// For the first of these SVIDs to be renewed; those that the server would not renew have a time of their own.
    pub(super) fn next_due(&self, records: &[Record]) -> Option<Instant> {
        let now_ms = self.context.clock.now_ms();
        let held = records.iter().filter_map(|record| Some((&record.entry.id, record.svid.as_ref()?)));
        let waits = held.filter(|(id, _)| !self.refused.has(id));
        let first = waits.filter_map(|(_, svid)| wait(now_ms, svid.rotate_at_ms, svid.not_after)).min();
        first.and_then(|wait| Instant::now().checked_add(wait))
    }

    /// For the agent's own.
    pub(super) fn own_due(&self) -> Option<Instant> {
        let wait = wait(self.context.clock.now_ms(), self.svid.rotate_at_ms, self.svid.not_after);
        wait.and_then(|wait| Instant::now().checked_add(wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(wait: Option<Duration>) -> Option<u128> {
        wait.map(|wait| wait.as_millis())
    }

    #[test]
    fn an_svid_waits_for_its_time_and_no_longer_than_it_lives() {
        let now = 1_000_000;
        assert_eq!(ms(wait(now, now + 1_000, 1_012)), Some(2_100), "of eleven seconds one");
        assert_eq!(ms(wait(now, now + 1_800_000, 4_600)), Some(1_980_000), "any look finds it");
        assert_eq!(ms(wait(now, now - 3_000, 1_004)), Some(2_000), "half of four seconds");
        assert_eq!(ms(wait(now, now + 10, 1_000)), None);
        assert_eq!(ms(wait(now, now - 1, 999)), None);
        assert_eq!(ms(wait(now + 900, now, 1_001)), Some(200));
        assert_eq!(ms(wait(now, i64::MAX, i64::MAX)), Some((i64::MAX - now) as u128));
    }

    proptest! {
        #[test]
        fn what_is_looked_for_then_is_due_and_lives(now in 0i64..4_000_000_000_000, rotate in -100_000i64..100_000, life in 1i64..200) {
            let (rotate_at, end) = (now + rotate, now / 1000 + life);
            prop_assume!(rotate_at <= end * 1000 && end * 1000 > now);
            let wait = wait(now, rotate_at, end).unwrap();
            prop_assert!(wait >= LEAST);
            let at = now + i64::try_from(wait.as_millis()).unwrap();
            prop_assert!(at >= rotate_at, "it would not be asked for");
            prop_assert!(wait == LEAST || at < end * 1000, "it would have ended");
        }
    }
}
