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
}

impl Tracker {
    /// Everything up to `last` is known, but for these spans.
    pub fn new(last: i64, gaps: impl IntoIterator<Item = Span>) -> Self {
        let gaps = gaps.into_iter().map(|(from, to)| Gap { from, to, mark: None }).collect();
        Self { last, gaps }
    }

    /// The highest number that was read.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// The lowest gaps, at most `count`.
    pub fn gaps(&self, count: usize) -> Vec<Span> {
        self.gaps.iter().take(count).map(|gap| (gap.from, gap.to)).collect()
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

    /// The lowest gaps, at most `count`, were looked at and these numbers found in them, in order. The horizon is that of
    /// the look or of an earlier one.
    pub fn looked(&mut self, count: usize, found: &[i64], horizon: u64) {
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
            if nth < count && gap.mark.is_some_and(|mark| mark <= horizon) {
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
