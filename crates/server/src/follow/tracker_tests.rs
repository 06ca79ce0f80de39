//! The tracker against a small PostgreSQL: numbers from a sequence, commits and rollbacks in any order.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// What a transaction of the model holds.
struct Running {
    xid: u64,
    events: Vec<i64>,
}

#[derive(Default)]
struct Database {
    next_xid: u64,
    latest_completed: u64,
    next_event: i64,
    running: Vec<Running>,
    visible: BTreeSet<i64>,
}

impl Database {
    fn xid(&mut self) -> u64 {
        self.next_xid += 1;
        self.next_xid
    }

    /// Changes a row, which gives the transaction its ID.
    fn begin(&mut self) {
        let xid = self.xid();
        self.running.push(Running { xid, events: Vec::new() });
    }

    /// Takes a number for an event.
    fn event(&mut self, nth: usize) {
        let count = self.running.len();
        if count > 0 {
            self.next_event += 1;
            self.running[nth % count].events.push(self.next_event);
        }
    }

    fn end(&mut self, nth: usize, commit: bool) {
        if self.running.is_empty() {
            return;
        }
        let ended = self.running.remove(nth % self.running.len());
        self.latest_completed = self.latest_completed.max(ended.xid);
        if commit {
            self.visible.extend(ended.events);
        }
    }

    fn xmax(&self) -> u64 {
        self.latest_completed + 1
    }

    /// `pg_snapshot_xmin`: nothing below it runs. It is no higher than one above the highest that has ended.
    fn xmin(&self) -> u64 {
        self.running.iter().map(|r| r.xid).chain([self.xmax()]).min().unwrap()
    }

    /// `pg_current_xact_id()` in a transaction of its own.
    fn mark(&mut self) -> u64 {
        let xid = self.xid();
        self.latest_completed = self.latest_completed.max(xid);
        xid
    }

    fn within(&self, (from, to): Span) -> impl Iterator<Item = i64> {
        self.visible.range(from..=to).copied()
    }
}

/// How the reader gets a mark: as it should, or from its snapshot.
#[derive(Clone, Copy, PartialEq)]
enum Rule {
    OwnTransaction,
    SnapshotXmax,
}

struct Reader {
    tracker: Tracker,
    rule: Rule,
    seen: BTreeSet<i64>,
    gaps_a_look: usize,
    page: usize,
}

impl Reader {
    fn step(&mut self, database: &mut Database, between: &mut dyn FnMut(&mut Database)) {
        let horizon = database.xmin();
        between(database);
        let gaps = self.tracker.gaps(self.gaps_a_look);
        let filled: Vec<i64> = gaps.iter().flat_map(|gap| database.within(*gap)).collect();
        let next: Vec<i64> = database.within((self.tracker.last() + 1, i64::MAX)).take(self.page).collect();
        let xmax = database.xmax();
        self.tracker.looked(self.gaps_a_look, &filled, horizon);
        self.tracker.read(&next);
        for id in filled.into_iter().chain(next) {
            assert!(self.seen.insert(id), "{id} twice");
        }
        if self.tracker.wants_mark() {
            between(database);
            let mark = if self.rule == Rule::OwnTransaction { database.mark() } else { xmax };
            self.tracker.mark(mark);
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Begin,
    Event(usize),
    Commit(usize),
    Rollback(usize),
    Look,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => Just(Act::Begin),
        4 => (0..8usize).prop_map(Act::Event),
        2 => (0..8usize).prop_map(Act::Commit),
        1 => (0..8usize).prop_map(Act::Rollback),
        2 => Just(Act::Look),
    ]
}

fn apply(database: &mut Database, act: &Act) {
    match act {
        Act::Begin => database.begin(),
        Act::Event(nth) => database.event(*nth),
        Act::Commit(nth) => database.end(*nth, true),
        Act::Rollback(nth) => database.end(*nth, false),
        Act::Look => {}
    }
}

/// What was missed, and how many gaps are left, when all has ended and the reader has looked often enough.
fn missed(acts: &[Act], rule: Rule, gaps_a_look: usize, page: usize) -> (Vec<i64>, usize) {
    let mut database = Database::default();
    let mut reader = Reader { tracker: Tracker::default(), rule, seen: BTreeSet::new(), gaps_a_look, page };
    let mut acts = acts.iter();
    while let Some(act) = acts.next() {
        if matches!(act, Act::Look) {
            // Up to two acts happen between the statements of one look.
            reader.step(&mut database, &mut |database| acts.next().into_iter().for_each(|act| apply(database, act)));
        } else {
            apply(&mut database, act);
        }
    }
    while !database.running.is_empty() {
        database.end(0, true);
    }
    for _ in 0..2 * database.next_event + 8 {
        reader.step(&mut database, &mut |_| {});
    }
    (database.visible.difference(&reader.seen).copied().collect(), reader.tracker.gap_count())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn no_committed_event_is_missed_or_read_twice_and_no_gap_stays(
        acts in proptest::collection::vec(act(), 0..80),
        gaps_a_look in 1..5usize,
        page in 1..6usize,
    ) {
        prop_assert_eq!(missed(&acts, Rule::OwnTransaction, gaps_a_look, page), (vec![], 0));
    }

    #[test]
    fn a_start_in_the_middle_misses_nothing_either(
        before in proptest::collection::vec(act(), 0..40),
        after in proptest::collection::vec(act(), 0..40),
    ) {
        let mut database = Database::default();
        before.iter().for_each(|act| apply(&mut database, act));
        let known = database.visible.clone();
        let mut from = 1;
        let mut gaps = Vec::new();
        for id in &known {
            if *id > from {
                gaps.push((from, id - 1));
            }
            from = id + 1;
        }
        let tracker = Tracker::new(known.last().copied().unwrap_or(0), gaps);
        let rule = Rule::OwnTransaction;
        let mut reader = Reader { tracker, rule, seen: BTreeSet::new(), gaps_a_look: 100, page: 100 };
        for act in &after {
            if matches!(act, Act::Look) {
                reader.step(&mut database, &mut |_| {});
            }
            apply(&mut database, act);
        }
        while !database.running.is_empty() {
            database.end(0, true);
        }
        (0..4).for_each(|_| reader.step(&mut database, &mut |_| {}));
        prop_assert_eq!(reader.seen, database.visible.difference(&known).copied().collect());
    }
}

/// Two transactions change a row each; the second takes its number first and commits. The first is not below the
/// snapshot's xmax, so a mark from there gives its event up while it still runs.
#[test]
fn the_end_of_a_snapshot_is_no_mark() {
    let acts = [Act::Begin, Act::Begin, Act::Event(1), Act::Event(0), Act::Commit(0)];
    let acts: Vec<Act> = acts.into_iter().chain([Act::Look, Act::Look, Act::Look, Act::Look]).collect();
    assert_eq!(missed(&acts, Rule::SnapshotXmax, 9, 9).0, [1]);
    assert_eq!(missed(&acts, Rule::OwnTransaction, 9, 9), (vec![], 0));
}

#[test]
fn gaps_split_where_they_are_filled() {
    let mut tracker = Tracker::default();
    tracker.read(&[3, 10]);
    assert_eq!((tracker.gaps(9), tracker.last()), (vec![(1, 2), (4, 9)], 10));
    assert!(tracker.wants_mark());
    tracker.mark(7);
    tracker.looked(9, &[1, 6], 6);
    assert_eq!(tracker.gaps(9), [(2, 2), (4, 5), (7, 9)]);
    // Only the newest and one of the others are looked at.
    assert_eq!(tracker.gaps(2), [(2, 2), (7, 9)]);
    tracker.looked(2, &[], 7);
    assert_eq!(tracker.gaps(9), [(4, 5)]);
    tracker.looked(9, &[], 7);
    tracker.read(&[12]);
    tracker.looked(9, &[], 99);
    assert_eq!(tracker.gaps(9), [(11, 11)], "a gap without a mark stays");
}

/// The lowest are not in the way of the others, however long they stay.
#[test]
fn all_gaps_have_their_turn_and_the_newest_always() {
    let mut tracker = Tracker::default();
    tracker.read(&[2, 4, 6, 8, 10, 12, 14]);
    let mut look = || {
        let gaps: Vec<i64> = tracker.gaps(4).into_iter().map(|(from, _)| from).collect();
        tracker.looked(4, &[], 0);
        gaps
    };
    assert_eq!(look(), [1, 3, 11, 13]);
    assert_eq!(look(), [5, 7, 11, 13]);
    assert_eq!(look(), [1, 9, 11, 13]);
    assert_eq!(look(), [3, 5, 11, 13]);
}
