use super::*;
use proptest::prelude::*;

const START: i64 = 1_700_000_000;

fn tenure(status: Status, issued_at: i64, ttl: i64) -> Tenure {
    Tenure { status, issued_at, not_after: issued_at + ttl }
}

#[test]
fn a_day_long_authority_is_prepared_at_12_hours_and_replaced_at_20() {
    let current = Some(tenure(Status::Active, START, 24 * 3600));
    let at = |seconds: i64, ms: i64| (START + seconds) * 1000 + ms;
    let empty = Slots { current, next: None };
    assert_eq!(next_step(&empty, at(12 * 3600, 0)), None);
    assert_eq!(next_step(&empty, at(12 * 3600, 1)), Some(Step::PrepareNext));
    let ready = Slots { current, next: Some(tenure(Status::Prepared, START + 12 * 3600, 24 * 3600)) };
    assert_eq!(next_step(&ready, at(20 * 3600, 0)), None);
    assert_eq!(next_step(&ready, at(20 * 3600, 1)), Some(Step::Rotate));
    let old = Slots { current, next: Some(tenure(Status::Old, START - 3600, 24 * 3600)) };
    assert_eq!(next_step(&old, at(12 * 3600, 1)), Some(Step::PrepareNext));
}

#[test]
fn a_year_long_authority_is_prepared_30_days_and_replaced_7_days_before_its_end() {
    let year = 365 * DAY_SECONDS;
    let current = tenure(Status::Active, START, year);
    assert_eq!(current.prepare_after_ms(), (START + year - 30 * DAY_SECONDS) * 1000);
    assert_eq!(current.activate_after_ms(), (START + year - 7 * DAY_SECONDS) * 1000);
    assert_eq!(max_svid_ttl(year), 7 * DAY_SECONDS);
    assert_eq!(max_svid_ttl(24 * 3600), 4 * 3600);
    assert_eq!(min_ca_ttl(3600), 6 * 3600);
}

#[test]
fn nothing_signs_until_something_was_made() {
    let now = START * 1000;
    assert_eq!(next_step(&Slots::default(), now), Some(Step::PrepareCurrent));
    let prepared = Slots { current: Some(tenure(Status::Prepared, START, 60)), next: None };
    assert_eq!(next_step(&prepared, now), Some(Step::ActivateCurrent));
    assert_eq!(next_step(&prepared, now + 61_000), Some(Step::PrepareCurrent), "expired while it waited");
    let old = Slots { current: Some(tenure(Status::Old, START, 3600)), next: None };
    assert_eq!(next_step(&old, now), Some(Step::PrepareCurrent));
}

#[test]
fn a_clock_that_went_back_replaces_the_authority_from_the_future() {
    let current = Some(tenure(Status::Active, START, 24 * 3600));
    let next = Some(tenure(Status::Prepared, START + 12 * 3600, 24 * 3600));
    let slots = Slots { current, next };
    assert_eq!(next_step(&slots, (START - 10) * 1000), None, "within what certificates are backdated");
    assert_eq!(next_step(&slots, (START - 11) * 1000), Some(Step::PrepareNext));
    let remade = Slots { current, next: Some(tenure(Status::Prepared, START - 11, 24 * 3600)) };
    assert_eq!(next_step(&remade, (START - 11) * 1000), Some(Step::Rotate));
}

#[test]
fn a_successor_that_ends_with_its_predecessor_is_made_again_when_its_turn_comes() {
    let current = Some(tenure(Status::Active, START, 60));
    let with_next =
        |issued_at: i64| Slots { current, next: Some(tenure(Status::Prepared, issued_at, START + 60 - issued_at)) };
    let early = with_next(START + 30);
    assert_eq!(next_step(&early, (START + 50) * 1000), None);
    assert_eq!(next_step(&early, (START + 50) * 1000 + 1), Some(Step::PrepareNext));
    assert_eq!(next_step(&with_next(START + 50), (START + 55) * 1000), Some(Step::Rotate), "no better, but no other");
    let better = Slots { current, next: Some(tenure(Status::Prepared, START + 30, 31)) };
    assert_eq!(next_step(&better, (START + 50) * 1000 + 1), Some(Step::Rotate));
}

#[test]
fn a_successor_that_comes_late_does_not_sign_before_others_can_know_it_unless_nothing_else_can() {
    let current = Some(tenure(Status::Active, START, 24 * 3600));
    for (issued_at, settled_at) in [(START + 22 * 3600, START + 22 * 3600 + 300), (START + 86_300, START + 86_350)] {
        let slots = Slots { current, next: Some(tenure(Status::Prepared, issued_at, 24 * 3600)) };
        assert_eq!(next_step(&slots, issued_at * 1000), None);
        assert_eq!(next_step(&slots, settled_at * 1000 - 1), None);
        assert!(wait_ms(&slots, settled_at * 1000 - 200) <= 201);
        assert_eq!(next_step(&slots, settled_at * 1000), Some(Step::Rotate));
        let ended = Slots { current: Some(tenure(Status::Active, START, 1)), ..slots };
        assert_eq!(next_step(&ended, issued_at * 1000), Some(Step::Rotate));
    }
}

/// What the world does to the model.
#[derive(Clone, Debug)]
enum Event {
    /// Time passes, or jumps.
    Advance(i64),
    /// The next so many steps fail (key manager or datastore away).
    Fail(u8),
    /// The process ends and starts again; slots come back from the journal as they were.
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (1i64..=10_000).prop_map(Event::Advance),
        2 => (1i64..=100 * DAY_SECONDS * 1000).prop_map(Event::Advance),
        2 => (-100 * DAY_SECONDS * 1000..0i64).prop_map(Event::Advance),
        2 => (1u8..5).prop_map(Event::Fail),
        1 => Just(Event::Restart),
    ]
}

struct Model {
    slots: Slots,
    now_ms: i64,
    ttl: i64,
    failing: u8,
}

impl Model {
    fn make(&self) -> Tenure {
        tenure(Status::Prepared, self.now_ms.div_euclid(1000), self.ttl)
    }

    /// Runs the plan to its end, or to the first failure. Returns whether it came to its end.
    fn round(&mut self) -> Result<bool, TestCaseError> {
        for _ in 0..8 {
            let Some(step) = next_step(&self.slots, self.now_ms) else { return Ok(true) };
            let makes = matches!(step, Step::PrepareCurrent | Step::PrepareNext);
            if makes && self.failing > 0 {
                self.failing -= 1;
                return Ok(false);
            }
            match step {
                Step::PrepareCurrent => {
                    prop_assert!(self.active().is_none(), "an active authority would be overwritten");
                    self.slots.current = Some(self.make());
                }
                Step::ActivateCurrent => self.set_current(Status::Active),
                Step::PrepareNext => self.slots.next = Some(self.make()),
                Step::Rotate => {
                    self.set_current(Status::Old);
                    std::mem::swap(&mut self.slots.current, &mut self.slots.next);
                    self.set_current(Status::Active);
                }
            }
            prop_assert!(self.count_active() <= 1, "two authorities are active");
        }
        Err(TestCaseError::fail("the plan does not come to rest"))
    }

    fn set_current(&mut self, status: Status) {
        if let Some(current) = self.slots.current.as_mut() {
            current.status = status;
        }
    }

    fn count_active(&self) -> usize {
        [self.slots.current, self.slots.next].iter().flatten().filter(|t| t.status == Status::Active).count()
    }

    fn active(&self) -> Option<Tenure> {
        self.slots.current.filter(|c| c.status == Status::Active)
    }
}

proptest! {
    #[test]
    fn there_is_always_exactly_one_usable_active_authority(
        ttl in prop_oneof![60i64..600, 3600i64..200 * DAY_SECONDS],
        events in proptest::collection::vec(event(), 1..60),
    ) {
        let mut model = Model { slots: Slots::default(), now_ms: START * 1000, ttl, failing: 0 };
        prop_assert!(model.round()?);
        for event in events {
            match event {
                Event::Advance(by) => model.now_ms += by,
                Event::Fail(times) => model.failing = times,
                Event::Restart => {}
            }
            let done = model.round()?;
            // However much failed, the one that was active stays until another is.
            prop_assert_eq!(model.count_active(), 1);
            if !done {
                continue;
            }
            let active = model.active().ok_or_else(|| TestCaseError::fail("none is active"))?;
            prop_assert!(active.is_usable(model.now_ms), "{active:?} at {}", model.now_ms);
            let next = model.slots.next.filter(|n| n.status == Status::Prepared);
            let settles = next.is_some_and(|n| model.now_ms < n.settled_at_ms(&active));
            prop_assert!(settles || model.now_ms <= active.activate_after_ms());
            let ready = next.is_some();
            prop_assert!(ready || model.now_ms <= active.prepare_after_ms(), "no successor in time");
            let wait = wait_ms(&model.slots, model.now_ms);
            prop_assert!((100..=CHECK_INTERVAL_MS).contains(&wait));
        }
    }

    #[test]
    fn any_times_are_taken_without_overflow(
        issued_at: i64, not_after: i64, now_ms: i64, next_issued: i64, next_after: i64, status in 0..3u8
    ) {
        let status = [Status::Prepared, Status::Active, Status::Old][usize::from(status)];
        let current = Some(Tenure { status, issued_at, not_after });
        let next = Some(Tenure { status: Status::Prepared, issued_at: next_issued, not_after: next_after });
        let slots = Slots { current, next };
        let _ = (next_step(&slots, now_ms), wait_ms(&slots, now_ms));
    }
}
