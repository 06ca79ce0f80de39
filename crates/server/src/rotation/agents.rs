//! What agents have: ours say so, of SPIRE's it follows from what they ask and when.

use crate::nodes::Nodes;
use finial_core::{SpiffeId, UnixSeconds};
use finial_proto::digest::of_bytes;
use finial_proto::rotation::AgentsAlike;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Of more agents nothing is noted; they count as not having confirmed.
const AGENTS_MAX: usize = 500_000;
/// SPIRE's agents drop so many SVIDs of tainted authorities at once, and others after each pause of this length.
const DROPPED_AT_ONCE: usize = 100;
const DROP_PAUSE: Duration = Duration::from_secs(5);

/// What an agent has.
#[derive(Clone, Copy)]
pub(crate) struct Had {
    /// The number of the bundle that it has.
    pub(super) sequence: u64,
    /// Of the one with which the SVIDs of its workloads agree.
    pub(super) settled: u64,
    /// The digest of the ID of the authority that signed its SVID.
    pub(super) issuer: u64,
    /// It says nothing of itself.
    pub(super) silent: bool,
    /// The number of the bundle that it was answered last: it has that when it asks again.
    answered: u64,
    /// When it came to have what it has.
    since: Instant,
    /// It asked for something once what is tainted was dropped, and so has that now when it asks again.
    renews: bool,
}

impl Had {
    fn nothing() -> Self {
        Self { sequence: 0, settled: 0, issuer: 0, silent: true, answered: 0, since: Instant::now(), renews: false }
    }

    fn of(told: &AgentsAlike) -> Self {
        let AgentsAlike { sequence, settled, issuer, silent, .. } = *told;
        Self { sequence, settled, issuer, silent, ..Self::nothing() }
    }
}

/// What agents have, as this server has seen them.
#[derive(Default)]
pub(crate) struct AgentsSeen(Mutex<HashMap<u64, Had>>);

impl AgentsSeen {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Had>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, agent: &SpiffeId, issuer: u64, note: impl FnOnce(&mut Had)) {
        let (mut seen, key) = (self.lock(), of_bytes(agent.path().as_bytes()));
        if seen.len() < AGENTS_MAX || seen.contains_key(&key) {
            let had = seen.entry(key).or_insert_with(Had::nothing);
            had.issuer = issuer;
            note(had);
        }
    }

    /// It says that it has the bundle of this number, and its workloads what follows from that; 0 where it does not say.
    pub(crate) fn has(&self, agent: &SpiffeId, issuer: u64, sequence: u64) {
        self.with(agent, issuer, |had| {
            had.sequence = had.sequence.max(sequence);
            had.settled = had.settled.max(sequence);
            had.silent = false;
        });
    }

    /// It is answered the bundle of this number, and has so many entries. One of SPIRE's has that bundle when it asks again, asks
    /// for new SVIDs then, and has these when it asks once more, unless it has so many that it takes some time to drop them.
    pub(crate) fn answered(&self, agent: &SpiffeId, issuer: u64, sequence: u64, entries: impl FnOnce() -> usize) {
        self.with(agent, issuer, |had| {
            if std::mem::take(&mut had.renews) {
                had.settled = had.sequence;
            }
            if had.answered > had.sequence {
                (had.sequence, had.since) = (had.answered, Instant::now());
            }
            had.answered = sequence;
            if had.silent && had.settled < had.sequence {
                let pauses = u32::try_from(entries() / DROPPED_AT_ONCE).unwrap_or(u32::MAX);
                had.renews = had.since.elapsed() >= DROP_PAUSE.saturating_mul(pauses);
            }
        });
    }

    /// The datastore has another history now, in which this is the number of the own bundle: who has one of a higher number has
    /// it from the one before, and gets another.
    pub(crate) fn start_anew(&self, own: u64) {
        for had in self.lock().values_mut() {
            for number in [&mut had.sequence, &mut had.settled, &mut had.answered] {
                *number = if *number > own { 0 } else { *number };
            }
        }
    }

    /// As [`finial_proto::rotation::ServerNote::agents`] has it.
    pub(crate) fn told(&self) -> Vec<AgentsAlike> {
        let mut alike: BTreeMap<_, Vec<u64>> = BTreeMap::new();
        for (key, had) in self.lock().iter() {
            alike.entry((had.sequence, had.settled, had.issuer, had.silent)).or_default().push(*key);
        }
        let told = alike.into_iter().map(|((sequence, settled, issuer, silent), mut keys)| {
            keys.sort_unstable();
            let agents: Vec<u8> = keys.into_iter().flat_map(u64::to_be_bytes).collect();
            AgentsAlike { sequence, settled, issuer, silent, agents: agents.into() }
        });
        told.collect()
    }

    /// Each of these, by the digest of its ID's path, and of those that other servers told of: one may come more than once.
    pub(super) fn each<'a>(&self, told: impl Iterator<Item = &'a AgentsAlike>, mut each: impl FnMut(u64, &Had)) {
        self.lock().iter().for_each(|(key, had)| each(*key, had));
        for alike in told {
            let had = Had::of(alike);
            alike.agents.as_chunks().0.iter().for_each(|key| each(u64::from_be_bytes(*key), &had));
        }
    }

    /// Forgets those that are not there any more.
    pub(crate) fn keep(&self, nodes: &Nodes, now: UnixSeconds) {
        let mut living = HashSet::new();
        nodes.each_living(now, |id| {
            living.insert(of_bytes(id.path().as_bytes()));
        });
        self.lock().retain(|key, _| living.contains(key));
    }

    #[cfg(test)]
    pub(super) fn of(&self, agent: &SpiffeId) -> (u64, u64) {
        let had = self.lock()[&of_bytes(agent.path().as_bytes())];
        (had.sequence, had.settled)
    }
}
