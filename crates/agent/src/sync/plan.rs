//! Which X.509-SVIDs to ask for and which to forget: a pure function of the cache, of who watches, and of the time.

use crate::cache::{Record, WorkloadSvid};
use crate::sync::taints::Taints;
use finial_core::EntryId;
use std::cmp::Reverse;
use std::collections::HashSet;
use std::sync::atomic::Ordering;

/// What is known when planning.
pub(crate) struct Input<'a> {
    pub(crate) records: &'a [Record],
    /// Entries that a stream watches.
    pub(crate) in_use: &'a HashSet<EntryId>,
    /// Key IDs of tainted X.509 authorities.
    pub(crate) tainted: &'a Taints,
    /// How many SVIDs to hold, if those in use are not more.
    pub(crate) limit: usize,
    /// Milliseconds since the epoch.
    pub(crate) now_ms: i64,
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Ask for SVIDs of these, the most urgent first.
    pub(crate) request: Vec<EntryId>,
    /// Forget the SVIDs of these.
    pub(crate) evict: HashSet<EntryId>,
    /// How many are asked for because their time has come.
    pub(crate) due: usize,
    /// How many because their entry changed.
    pub(crate) outdated: usize,
    /// How many because their authority is tainted.
    pub(crate) tainted: usize,
}

/// How urgent a request is; smaller is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A workload waits and has nothing.
    Awaited,
    /// It ended.
    Ended,
    /// Its authority is tainted.
    Tainted,
    /// Its time has come.
    Due,
    /// Its entry changed.
    Outdated,
    /// It may be asked for later.
    Prefetch,
}

fn why_renew(record: &Record, svid: &WorkloadSvid, input: &Input<'_>) -> Option<Urgency> {
    let tainted = || input.tainted.concern(&svid.signed_by, svid.issued_in);
    if svid.not_after.saturating_mul(1000) <= input.now_ms {
        Some(Urgency::Ended)
    } else if tainted() {
        Some(Urgency::Tainted)
    } else if svid.rotate_at_ms <= input.now_ms {
        Some(Urgency::Due)
    } else if (svid.revision_number, svid.created_at) != (record.entry.revision_number, record.entry.created_at) {
        Some(Urgency::Outdated)
    } else {
        None
    }
}

/// Plans. What is for SVID stores is always wanted, and does not count against the limit.
pub(crate) fn plan(input: &Input<'_>) -> Plan {
    let last_used = |r: &Record| r.last_used_ms.load(Ordering::Relaxed);
    let used = |r: &Record| r.entry.store_svid || input.in_use.contains(&r.entry.id);

    let held = input.records.iter().filter(|r| r.svid.is_some() && !r.entry.store_svid).count();
    let surplus = held.saturating_sub(input.limit);
    let mut evict = HashSet::new();
    if surplus > 0 {
        let mut idle: Vec<&Record> = input.records.iter().filter(|r| r.svid.is_some() && !used(r)).collect();
        idle.sort_by_key(|r| last_used(r));
        evict.extend(idle.iter().take(surplus).map(|r| r.entry.id.clone()));
    }

    let mut wanted: Vec<(Urgency, i64, &EntryId)> = Vec::new();
    let mut missing = 0;
    for record in input.records {
        match &record.svid {
            Some(svid) if !evict.contains(&record.entry.id) => {
                wanted.extend(why_renew(record, svid, input).map(|why| (why, svid.rotate_at_ms, &record.entry.id)));
            }
            None if record.entry.store_svid => wanted.push((Urgency::Due, 0, &record.entry.id)),
            None if used(record) => {
                missing += 1;
                wanted.push((Urgency::Awaited, 0, &record.entry.id));
            }
            _ => {}
        }
    }
    let room = input.limit.saturating_sub(held - evict.len() + missing);
    if room > 0 {
        let may_prefetch = |r: &&Record| r.svid.is_none() && !used(r) && !r.entry.disable_x509_svid_prefetch;
        let mut more: Vec<&Record> = input.records.iter().filter(may_prefetch).collect();
        more.sort_by_key(|r| Reverse(last_used(r)));
        wanted.extend(more.iter().take(room).map(|r| (Urgency::Prefetch, 0, &r.entry.id)));
    }
    wanted.sort_by_key(|(why, due, _)| (*why, *due)); // stable: otherwise in order of IDs or of use
    let count = |those: &[Urgency]| wanted.iter().filter(|(why, _, _)| those.contains(why)).count();
    Plan {
        due: count(&[Urgency::Ended, Urgency::Due]),
        outdated: count(&[Urgency::Outdated]),
        tainted: count(&[Urgency::Tainted]),
        request: wanted.into_iter().map(|(_, _, id)| id.clone()).collect(),
        evict,
    }
}

/// How many SVIDs to ask for in one call: halves when a call fails, doubles when one succeeds.
#[derive(Debug)]
pub(crate) struct BatchSize(usize);

/// What SPIRE's server takes from one agent in one call.
const BATCH_MAX: usize = 500;

impl BatchSize {
    pub(crate) fn new() -> Self {
        Self(BATCH_MAX)
    }

    pub(crate) fn get(&self) -> usize {
        self.0
    }

    pub(crate) fn succeeded(&mut self) {
        self.0 = (self.0 * 2).min(BATCH_MAX);
    }

    /// `sent` were too many.
    pub(crate) fn failed(&mut self, sent: usize) {
        self.0 = (self.0.min(sent) / 2).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::testing::{entry, svid};
    use proptest::prelude::*;
    use std::sync::Arc;

    const NOW: i64 = 500_000;

    fn record(id: &str, with_svid: bool, used: i64) -> Record {
        let entry = entry(id, "spiffe://td/x", &["unix:uid:1"]);
        let svid = with_svid.then(|| Arc::new(svid(&entry, 1)));
        let record = Record { svid, ..Record::new(Arc::new(entry)) };
        record.last_used_ms.store(used, Ordering::Relaxed);
        record
    }

    fn run(
        records: &[Record],
        in_use: &[&str],
        limit: usize,
        now_ms: i64,
        tainted: &[Vec<u8>],
    ) -> (Vec<String>, Vec<String>) {
        let in_use = in_use.iter().map(|id| EntryId::parse(id).unwrap()).collect();
        let mut taints = Taints::default();
        taints.set(tainted.to_vec());
        let plan = plan(&Input { records, in_use: &in_use, tainted: &taints, limit, now_ms });
        let mut evict: Vec<_> = plan.evict.iter().map(|i| i.as_str().to_owned()).collect();
        evict.sort();
        (plan.request.iter().map(|i| i.as_str().to_owned()).collect(), evict)
    }

    fn edit(record: &Record, change: impl FnOnce(&mut WorkloadSvid)) -> Record {
        let mut fresh = svid(&record.entry, 1);
        change(&mut fresh);
        Record { svid: Some(Arc::new(fresh)), ..record.clone() }
    }

    #[test]
    fn a_fresh_svid_is_left_alone_and_missing_ones_are_fetched() {
        let records = [record("a", true, 0), record("b", false, 0)];
        assert_eq!(run(&records, &[], 10, NOW, &[]), (vec!["b".into()], vec![]));
    }

    #[test]
    fn the_most_urgent_come_first() {
        let base = record("x", true, 0);
        let with = |id: &str, change: &dyn Fn(&mut WorkloadSvid)| {
            edit(&Record { entry: Arc::new(entry(id, "spiffe://td/x", &["unix:uid:1"])), ..base.clone() }, change)
        };
        let records = [
            record("a", false, 0),
            with("b", &|s| s.revision_number = 7),
            with("c", &|s| s.rotate_at_ms = NOW),
            with("d", &|s| s.not_after = NOW / 1000),
            with("e", &|s| s.signed_by = vec![vec![9].into()]),
            record("f", false, 0),
            with("g", &|s| s.created_at = 77),
            with("h", &|s| s.rotate_at_ms = NOW - 5),
        ];
        let (request, evict) = run(&records, &["f"], 100, NOW, &[vec![9]]);
        assert_eq!(request, ["f", "d", "e", "h", "c", "b", "g", "a"]);
        assert!(evict.is_empty());
    }

    #[test]
    fn entries_that_are_not_to_be_prefetched_wait_until_they_are_asked_for() {
        let mut lazy = entry("a", "spiffe://td/x", &["unix:uid:1"]);
        lazy.disable_x509_svid_prefetch = true;
        let records = [Record::new(Arc::new(lazy))];
        assert_eq!(run(&records, &[], 10, NOW, &[]).0, Vec::<String>::new());
        assert_eq!(run(&records, &["a"], 10, NOW, &[]).0, ["a"]);
    }

    #[test]
    fn what_is_for_a_store_is_wanted_whatever_the_limit_and_comes_after_workloads_that_wait() {
        let for_store = |id: &str, with_svid| {
            let mut record = record(id, with_svid, 0);
            let mut entry = (*record.entry).clone();
            (entry.store_svid, entry.disable_x509_svid_prefetch) = (true, true);
            record.entry = Arc::new(entry);
            record
        };
        let records = [for_store("a", false), for_store("b", true), record("c", true, 1), record("d", false, 1)];
        assert_eq!(run(&records, &["d"], 1, NOW, &[]), (vec!["d".into(), "a".into()], vec![]));
        assert_eq!(run(&records, &[], 0, NOW, &[]), (vec!["a".into()], vec!["c".into()]));
    }

    #[test]
    fn above_the_limit_the_least_recently_used_go_and_those_in_use_stay() {
        let records = [record("a", true, 5), record("b", true, 1), record("c", true, 3), record("d", true, 2)];
        assert_eq!(run(&records, &["b"], 2, NOW, &[]), (vec![], vec!["c".into(), "d".into()]));
        assert_eq!(run(&records, &["a", "b", "c", "d"], 2, NOW, &[]), (vec![], vec![]));
    }

    #[test]
    fn batches_halve_and_double_within_bounds() {
        let mut size = BatchSize::new();
        assert_eq!(size.get(), 500);
        size.succeeded();
        assert_eq!(size.get(), 500);
        size.failed(61);
        assert_eq!(size.get(), 30, "what was sent counts, not what might have been");
        (0..12).for_each(|_| size.failed(500));
        assert_eq!(size.get(), 1);
        size.succeeded();
        assert_eq!(size.get(), 2);
    }

    proptest! {
        #[test]
        fn plans_keep_their_promises(
            spec in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), 0i64..5, any::<bool>()), 0..40),
            limit in 0usize..30,
        ) {
            let records: Vec<Record> = spec.iter().enumerate().map(|(i, (held, lazy, _, used, due))| {
                let mut record = record(&format!("e{i:02}"), *held, *used);
                let mut entry = (*record.entry).clone();
                entry.disable_x509_svid_prefetch = *lazy;
                record.entry = Arc::new(entry);
                if *held && *due { record = edit(&record, |s| s.rotate_at_ms = 0); }
                record
            }).collect();
            let in_use: HashSet<EntryId> = spec.iter().zip(&records).filter(|(s, _)| s.2).map(|(_, r)| r.entry.id.clone()).collect();
            let plan = plan(&Input { records: &records, in_use: &in_use, tainted: &Taints::default(), limit, now_ms: NOW });

            let unique: HashSet<_> = plan.request.iter().collect();
            prop_assert_eq!(unique.len(), plan.request.len(), "asked twice");
            for record in &records {
                let id = &record.entry.id;
                let asked = unique.contains(id);
                prop_assert!(!(asked && plan.evict.contains(id)), "asked for and forgotten");
                if in_use.contains(id) {
                    prop_assert!(!plan.evict.contains(id), "evicted while in use");
                    prop_assert!(record.svid.is_some() || asked, "a workload waits");
                }
                if record.svid.as_ref().is_some_and(|s| s.rotate_at_ms <= NOW) && !plan.evict.contains(id) {
                    prop_assert!(asked, "due");
                }
            }
            let kept = records.iter().filter(|r| r.svid.is_some() && !plan.evict.contains(&r.entry.id)).count();
            let kept_in_use = records.iter().filter(|r| r.svid.is_some() && in_use.contains(&r.entry.id)).count();
            prop_assert!(kept <= limit.max(kept_in_use), "more than the limit without being in use");
            let prefetched = records.iter().filter(|r| r.svid.is_none() && unique.contains(&r.entry.id) && !in_use.contains(&r.entry.id));
            prop_assert!(prefetched.clone().all(|r| !r.entry.disable_x509_svid_prefetch));
            let asked_anew = records.iter().filter(|r| r.svid.is_none() && unique.contains(&r.entry.id)).count();
            prop_assert!(prefetched.count() == 0 || kept + asked_anew <= limit, "prefetched beyond the limit");
        }
    }
}
