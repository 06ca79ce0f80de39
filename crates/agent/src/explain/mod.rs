//! Why a process gets the identities that it gets, or none: which entries fit, and which came nearest. Pure; `api` gathers what
//! it needs and puts it into words.

mod api;
mod state;
#[cfg(test)]
mod tests;
mod words;

pub(crate) use api::ExplainApi;

use crate::cache::Record;
use finial_core::{Selector, SelectorSet};
use std::cmp::Reverse;

/// Entries that came near, in one explanation.
const NEAREST_MAX: usize = 5;
/// Selectors of this kind name an agent, for which the server made the entry; no attestor of workloads states them.
const NAMES_AN_AGENT: &str = "spiffe_id";
/// Selectors that the process has instead of a missing one.
const FOUND_MAX: usize = 5;

/// What entries are to a process.
#[derive(Debug)]
pub(crate) struct Explanation<'a> {
    /// How many there are for workloads.
    pub(crate) all: usize,
    /// Those that fit: all their selectors are among the process's.
    pub(crate) fitting: Vec<&'a Record>,
    /// Some of the others: those that lack the fewest selectors, then those of which the most are there.
    pub(crate) nearest: Vec<Near<'a>>,
}

/// An entry that does not fit.
#[derive(Debug)]
pub(crate) struct Near<'a> {
    pub(crate) record: &'a Record,
    /// How many of its selectors the process has.
    pub(crate) present: usize,
    /// The others.
    pub(crate) missing: Vec<Missing<'a>>,
}

/// A selector that the process has not.
#[derive(Debug)]
pub(crate) struct Missing<'a> {
    pub(crate) wanted: Selector,
    /// What it has in its place: those that share most parts with it, counted from the front.
    pub(crate) found: Vec<&'a Selector>,
}

/// Compares a process with all entries.
pub(crate) fn explain<'a>(selectors: &'a SelectorSet, records: &'a [Record]) -> Explanation<'a> {
    let mut fitting = Vec::new();
    let mut ranked = Vec::new();
    let of_workload = |record: &&Record| record.entry.selectors.parts().all(|(kind, _)| kind != NAMES_AN_AGENT);
    for record in records.iter().filter(of_workload) {
        let wanted = &record.entry.selectors;
        let missing = || wanted.iter().filter(|s| !selectors.contains(s));
        match missing().count() {
            0 => fitting.push(record),
            number => {
                // What differs tells more than what is of another kind altogether.
                let comparable = missing().filter(|s| found(selectors, s).next().is_some()).count();
                let present = wanted.len() - number;
                ranked.push(((number, Reverse(present), Reverse(comparable), &record.entry.id), record));
            }
        }
    }
    let all = fitting.len() + ranked.len();
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    let near = |record: &'a Record| {
        let wanted = record.entry.selectors.iter().filter(|s| !selectors.contains(s));
        let missing = wanted.map(|wanted| Missing { found: instead(selectors, &wanted), wanted });
        let missing: Vec<_> = missing.collect();
        Near { record, present: record.entry.selectors.len() - missing.len(), missing }
    };
    let nearest = ranked.into_iter().take(NEAREST_MAX).map(|(_, record)| near(record)).collect();
    Explanation { all, fitting, nearest }
}

/// Selectors of the same attestor about the same thing.
fn found<'a, 'w>(
    selectors: &'a SelectorSet,
    wanted: &'w Selector,
) -> impl Iterator<Item = (usize, &'a Selector)> + use<'a, 'w> {
    let same_kind = selectors.iter().filter(move |s| s.kind == wanted.kind && *s != wanted);
    same_kind.map(move |s| (shared_parts(&s.value, &wanted.value), s)).filter(|(shared, _)| *shared > 0)
}

fn instead<'a>(selectors: &'a SelectorSet, wanted: &Selector) -> Vec<&'a Selector> {
    let most = found(selectors, wanted).map(|(shared, _)| shared).max().unwrap_or_default();
    found(selectors, wanted).filter(|(shared, _)| *shared == most).map(|(_, s)| s).take(FOUND_MAX).collect()
}

/// How many parts two values have in common, from the front; the last part is a value, not a name.
fn shared_parts(one: &str, other: &str) -> usize {
    const BETWEEN: [char; 2] = [':', '=']; // pod-label:NAME:VALUE, env:NAME=VALUE
    let names = |value: &str| value.matches(BETWEEN).count();
    let same = one.split(BETWEEN).zip(other.split(BETWEEN)).take_while(|(a, b)| a == b).count();
    same.min(names(one)).min(names(other))
}
