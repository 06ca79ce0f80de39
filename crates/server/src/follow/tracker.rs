//! Which events of a table were read, when numbers are given out before transactions commit.
//!
//! A number that is skipped belongs to a transaction that still runs, or to one that was rolled back. It is kept as a gap
//! until that is known. The database gives two numbers for it: a *mark*, taken after the gap was seen, which is above
//! every transaction that can fill it; and with each look a *horizon*, below which no transaction runs any more. A gap
//! that a look does not fill although its horizon has reached the mark will never be filled. On PostgreSQL both are
//! transaction IDs, so that nothing is ever guessed; elsewhere they are moments, with a bound in between.

/// Numbers that were skipped: from the first to the last, both included.
pub type Span = (i64, i64);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Gap {
    from: i64,
    to: i64,
    /// Empty until there is one.
    mark: Option<u64>,
}

/// What was read of one table of events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracker {
    last: i64,
    /// In order, and apart from each other.
    gaps: Vec<Gap>,
    /// Where the next look at the older gaps goes on.
    next: i64,
}

/// Which gaps are looked at: a window of the older ones, going round, and all newer ones.
struct Chosen {
    /// How many are older.
    old: usize,
    /// Where among them the window begins.
    begin: usize,
    /// How many it shows.
    length: usize,
}

impl Chosen {
    fn has(&self, nth: usize) -> bool {
        nth >= self.old || (nth + if nth < self.begin { self.old } else { 0 }) - self.begin < self.length
    }

    /// The last one in the window.
    fn last(&self) -> usize {
        (self.begin + self.length).saturating_sub(1) % self.old.max(1)
    }
}

impl Tracker {
    /// Everything up to `last` is known, but for these spans.
    pub fn new(last: i64, gaps: impl IntoIterator<Item = Span>) -> Self {
        let gaps = gaps.into_iter().map(|(from, to)| Gap { from, to, mark: None }).collect();
        Self { last, gaps, next: 0 }
    }

    /// The highest number that was read.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// The gaps to look at, at most `count`, in order: always the newest, which are filled soonest, and the others in turn.
    pub fn gaps(&self, count: usize) -> Vec<Span> {
        let chosen = self.chosen(count);
        self.gaps.iter().enumerate().filter(|(nth, _)| chosen.has(*nth)).map(|(_, gap)| (gap.from, gap.to)).collect()
    }

    fn chosen(&self, count: usize) -> Chosen {
        let old = if count < self.gaps.len() { self.gaps.len() - count / 2 } else { 0 };
        let begin = self.gaps.iter().take(old).take_while(|gap| gap.from < self.next).count();
        Chosen { old, begin: if begin < old { begin } else { 0 }, length: count - count / 2 }
    }

    /// How many gaps there are.
    pub fn gap_count(&self) -> usize {
        self.gaps.len()
    }

    /// Whether there is a gap that needs a mark.
    pub fn wants_mark(&self) -> bool {
        self.gaps.iter().any(|gap| gap.mark.is_none())
    }

    /// A mark for all gaps without one; it was taken after they were seen.
    pub fn mark(&mut self, mark: u64) {
        self.gaps.iter_mut().for_each(|gap| gap.mark = gap.mark.or(Some(mark)));
    }

    /// What [`Tracker::gaps`] tells for `count` was looked at and these numbers found there, in order. The horizon is that
    /// of the look or of an earlier one.
    pub fn looked(&mut self, count: usize, found: &[i64], horizon: u64) {
        let chosen = self.chosen(count);
        if chosen.old > 0 {
            self.next = self.gaps.get(chosen.last()).map_or(0, |gap| gap.to.saturating_add(1));
        }
        let mut found = found.iter().copied().peekable();
        let mut gaps = Vec::with_capacity(self.gaps.len());
        for (nth, gap) in self.gaps.drain(..).enumerate() {
            let mut from = gap.from;
            while let Some(id) = found.next_if(|id| *id <= gap.to) {
                if id > from {
                    gaps.push(Gap { from, to: id - 1, mark: gap.mark });
                }
                from = from.max(id.saturating_add(1));
            }
            if from <= gap.to {
                gaps.push(Gap { from, ..gap.clone() });
            }
            if chosen.has(nth) && gap.mark.is_some_and(|mark| mark <= horizon) {
                while gaps.last().is_some_and(|rest| rest.from >= gap.from) {
                    gaps.pop();
                }
            }
        }
        self.gaps = gaps;
    }

    /// These numbers come next, in order; all that is skipped before the last of them is a gap.
    pub fn read(&mut self, ids: &[i64]) {
        for id in ids.iter().copied().filter(|id| *id > 0) {
            if id <= self.last {
                continue;
            }
            if id > self.last + 1 {
                self.gaps.push(Gap { from: self.last + 1, to: id - 1, mark: None });
            }
            self.last = id;
        }
    }
}

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;
