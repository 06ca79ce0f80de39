//! When authorities are prepared, activated and retired: a pure function of what there is and of the time.
//!
//! An authority lives from `issued_at` to `not_after`. Its successor is prepared when less than half of that life (at
//! most 30 days) is left, so that everyone has it in the bundle long before it signs, and takes over when less than a
//! sixth (at most 7 days) is left, so that what the old one signed last can live out its time. These are SPIRE's
//! thresholds. Four cases are our own: an authority that was issued in the future (the clock went back) is replaced at
//! once, as nobody could verify what it signs; a successor that could only be made late, as the server was away, does not
//! sign in the moment in which it comes into the bundle, while the old one lasts; and a prepared successor that has expired,
//! or that ends with its predecessor as all below an upstream authority does, is made anew, not activated.

use finial_core::UnixSeconds;

const SECOND_MS: i64 = 1000;
const DAY_SECONDS: i64 = 24 * 60 * 60;
/// The successor is prepared at most this long before the end.
const PREPARE_CAP_SECONDS: i64 = 30 * DAY_SECONDS;
const PREPARE_DIVISOR: i64 = 2;
/// The successor takes over at most this long before the end.
const ACTIVATE_CAP_SECONDS: i64 = 7 * DAY_SECONDS;
const ACTIVATE_DIVISOR: i64 = 6;
/// A successor that comes late waits at most this long before it signs, while its predecessor lasts: others hear of the bundle
/// when they ask for it.
const SETTLE_SECONDS: i64 = 5 * 60;
/// Certificates are valid from this long before they are issued, for verifiers whose clocks run late.
pub const BACKDATE_SECONDS: i64 = 10;

/// How often the plan is looked at, in milliseconds, when nothing is due before.
pub const CHECK_INTERVAL_MS: i64 = 10 * SECOND_MS;

/// The longest SVID life that is never cut short, however long authorities live.
pub const MAX_SVID_TTL_SECONDS: i64 = ACTIVATE_CAP_SECONDS;

/// The longest SVID life, in seconds, that authorities with this life never cut short.
pub fn max_svid_ttl(ca_ttl_seconds: i64) -> i64 {
    (ca_ttl_seconds / ACTIVATE_DIVISOR).min(ACTIVATE_CAP_SECONDS)
}

/// The shortest authority life, in seconds, that never cuts SVIDs of this life short.
pub fn min_ca_ttl(svid_ttl_seconds: i64) -> i64 {
    svid_ttl_seconds.saturating_mul(ACTIVATE_DIVISOR)
}

/// What an authority is for, as the journal says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// In the bundle, waiting for its turn.
    Prepared,
    /// It signs.
    Active,
    /// It signed, and stays in the bundle until it expires.
    Old,
}

/// What the plan must know of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// Its status.
    pub status: Status,
    /// When it was made.
    pub issued_at: UnixSeconds,
    /// When it ends.
    pub not_after: UnixSeconds,
}

impl Tenure {
    fn life_left_ms(&self, divisor: i64, cap_seconds: i64) -> i64 {
        let life_ms = self.not_after.saturating_sub(self.issued_at).saturating_mul(SECOND_MS);
        (life_ms / divisor).min(cap_seconds * SECOND_MS)
    }

    fn end_ms(&self) -> i64 {
        self.not_after.saturating_mul(SECOND_MS)
    }

    /// The moment (milliseconds since the epoch) after which a successor must be prepared.
    pub fn prepare_after_ms(&self) -> i64 {
        self.end_ms().saturating_sub(self.life_left_ms(PREPARE_DIVISOR, PREPARE_CAP_SECONDS))
    }

    /// The moment (milliseconds since the epoch) after which a successor takes over.
    pub fn activate_after_ms(&self) -> i64 {
        self.end_ms().saturating_sub(self.life_left_ms(ACTIVATE_DIVISOR, ACTIVATE_CAP_SECONDS))
    }

    /// The moment (milliseconds since the epoch) from which all may be taken to know it, half of what `current` has left at most.
    fn settled_at_ms(&self, current: &Self) -> i64 {
        let left = current.not_after.saturating_sub(self.issued_at).max(0);
        self.issued_at.saturating_add((left / 2).min(SETTLE_SECONDS)).saturating_mul(SECOND_MS)
    }

    /// Whether it was made later than now, by more than certificates are backdated.
    fn is_from_the_future(&self, now_ms: i64) -> bool {
        self.issued_at.saturating_sub(BACKDATE_SECONDS).saturating_mul(SECOND_MS) > now_ms
    }

    /// Whether it was made before its turn, and ends with its predecessor: what is above them both had no more time left. By now
    /// there is another above, and a successor that lives.
    fn is_no_better_than(&self, current: &Self, now_ms: i64) -> bool {
        let made_by_ms = self.issued_at.saturating_add(1).saturating_mul(SECOND_MS);
        self.not_after <= current.not_after
            && made_by_ms <= current.activate_after_ms()
            && !current.is_from_the_future(now_ms)
    }

    /// Whether what it signs can be verified now.
    pub fn is_usable(&self, now_ms: i64) -> bool {
        now_ms <= self.end_ms() && !self.is_from_the_future(now_ms)
    }
}

/// The two slots of one kind of authority; `None` is a slot that was never used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// The one that signs, if any does.
    pub current: Option<Tenure>,
    /// Its successor, or its predecessor.
    pub next: Option<Tenure>,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make an authority in the current slot: nothing signs yet.
    PrepareCurrent,
    /// Let the current slot sign.
    ActivateCurrent,
    /// Make an authority in the next slot, over whatever it holds.
    PrepareNext,
    /// Swap the slots: the successor signs, the former one is old.
    Rotate,
}

/// The step that is due now, if one is. Ask again after each step, until none is.
pub fn next_step(slots: &Slots, now_ms: i64) -> Option<Step> {
    let Some(current) = slots.current.filter(|c| c.status != Status::Old) else {
        return Some(Step::PrepareCurrent);
    };
    if current.status == Status::Prepared {
        let usable = current.is_usable(now_ms);
        return Some(if usable { Step::ActivateCurrent } else { Step::PrepareCurrent });
    }
    let replace = current.is_from_the_future(now_ms) || now_ms > current.activate_after_ms();
    let ready = slots.next.filter(|n| n.status == Status::Prepared && n.is_usable(now_ms));
    if let Some(next) = ready {
        if next.is_no_better_than(&current, now_ms) {
            return replace.then_some(Step::PrepareNext);
        }
        let waits = current.is_usable(now_ms) && now_ms < next.settled_at_ms(&current);
        return (replace && !waits).then_some(Step::Rotate);
    }
    (replace || now_ms > current.prepare_after_ms()).then_some(Step::PrepareNext)
}

/// How long to wait, in milliseconds, before the plan is looked at again: the check interval, or less when something is
/// due before. Never less than 100 ms.
pub fn wait_ms(slots: &Slots, now_ms: i64) -> i64 {
    let due = slots.current.map_or(now_ms, |c| match slots.next {
        Some(n) if n.status == Status::Prepared => c.activate_after_ms().max(n.settled_at_ms(&c)),
        _ => c.prepare_after_ms(),
    });
    due.saturating_sub(now_ms).saturating_add(1).clamp(100, CHECK_INTERVAL_MS)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
