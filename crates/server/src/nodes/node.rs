//! One agent as it lies in memory.

use finial_core::{AgentRecord, SelectorSet, SpiffeId, UnixSeconds};
use std::sync::Arc;

/// What the server thinks of an agent that shows an SVID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is the agent's current SVID, or one that was given out while the datastore was away.
    Current,
    /// It is the renewed one, used for the first time: [`super::Nodes::promote`] it.
    Renewed,
    /// Another server gave it out while the datastore was away, to the agent that is known here: [`super::Nodes::adopt`]
    /// it.
    Ahead,
    /// There is no such agent.
    Unknown,
    /// The agent is banned.
    Banned,
    /// The agent has another SVID by now.
    Superseded,
}

/// An SVID that was given out and is not in the datastore yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) serial: Box<str>,
    pub(super) expires_at: UnixSeconds,
    /// The serial numbers of the agent to whom it was given.
    pub(super) follows: Box<[Box<str>]>,
    /// The one of them that the agent showed for it. `None` when it has shown this one since, at another server than gave it
    /// out.
    pub(super) own: Option<Box<str>>,
}

/// The agent may still use the one before the last, if it never got the last.
const PENDING_MAX: usize = 2;
/// How many of an outage's SVIDs an SVID says it follows, beside the recorded ones. Servers that each know a part of them
/// record theirs in any order, so it takes two of each server that the agent was at.
const FOLLOWED_MAX: usize = 16;

/// An agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// Row ID, by which lists are ordered; 0 while it is not known.
    pub(super) row: i64,
    pub(super) serial: Box<str>,
    pub(super) new_serial: Box<str>,
    /// The one before `serial`, if memory knows: a failover may bring it back.
    pub(super) before: Box<str>,
    pub(super) expires_at: UnixSeconds,
    pub(super) new_expires_at: UnixSeconds,
    pub(super) can_reattest: bool,
    pub(super) kind: Box<str>,
    pub(super) version: Box<str>,
    pub(super) selectors: Arc<SelectorSet>,
    /// Oldest first, at most [`PENDING_MAX`], and as many that a failover took.
    pub(super) pending: Vec<Pending>,
}

impl Node {
    pub(super) fn of(record: &AgentRecord, row: i64) -> Self {
        Self {
            row,
            serial: record.serial_number.as_str().into(),
            new_serial: record.new_serial_number.as_str().into(),
            before: Box::default(),
            expires_at: record.expires_at,
            new_expires_at: record.new_expires_at,
            can_reattest: record.can_reattest,
            kind: record.attestation_type.as_str().into(),
            version: record.agent_version.as_str().into(),
            selectors: Arc::new(record.selectors.clone()),
            pending: Vec::new(),
        }
    }

    pub(super) fn to_record(&self, id: &SpiffeId) -> AgentRecord {
        AgentRecord {
            id: id.clone(),
            attestation_type: self.kind.to_string(),
            serial_number: self.serial.to_string(),
            expires_at: self.expires_at,
            new_serial_number: self.new_serial.to_string(),
            new_expires_at: self.new_expires_at,
            can_reattest: self.can_reattest,
            agent_version: self.version.to_string(),
            selectors: SelectorSet::clone(&self.selectors),
        }
    }

    pub(super) fn is_banned(&self) -> bool {
        self.serial.is_empty()
    }

    /// Whether this is the agent that is known as banned: only eviction undoes a ban, and who attests after it has another
    /// row and another serial number.
    pub(super) fn lost_ban(&self, known: &Self) -> bool {
        let same_row = self.row != 0 && self.row == known.row;
        known.is_banned() && !self.is_banned() && (same_row || self.serial == known.before)
    }

    /// Takes over from what was known before what the datastore does not tell.
    pub(super) fn inherit(&mut self, known: &Self) {
        if self.row == 0 {
            self.row = known.row;
        }
        if known.selectors == self.selectors {
            self.selectors = known.selectors.clone();
        }
        if self.serial == known.serial {
            self.before = known.before.clone();
        } else if self.serial == known.new_serial || known.pending.iter().any(|given| given.serial == self.serial) {
            self.before = known.serial.clone();
        }
        self.pending = self.lost(known);
        // What followed an agent that is another by now is void; so is what followed that.
        for pending in &known.pending {
            let is_recorded = pending.serial == self.serial || pending.serial == self.new_serial;
            if !is_recorded && self.is_followed_by(&pending.follows) {
                self.pending.push(pending.clone());
            }
        }
    }

    /// What was stored and is there no more although it is the same agent: a datastore that was a little behind took over.
    /// The agent may have nothing else. It is as good as if it had been given out in an outage.
    fn lost(&self, known: &Self) -> Vec<Pending> {
        let (mut lost, goes_back) = (Vec::new(), self.serial == known.before);
        let given = |serial: &str, expires_at, own: &str| {
            // The agent used another instead of what waits there: it never got that.
            let void = Some(&self.new_serial).filter(|new| goes_back && !new.is_empty());
            let follows = [&*self.serial, own].map(Box::from).into_iter().chain(void.cloned()).collect();
            Pending { serial: serial.into(), expires_at, follows, own: Some(own.into()) }
        };
        if self.is_banned() || known.is_banned() {
            return lost;
        }
        if goes_back && self.new_serial != known.serial {
            lost.push(given(&known.serial, known.expires_at, &self.serial));
        }
        let misses_new = goes_back || self.serial == known.serial && self.new_serial.is_empty();
        if misses_new && !known.new_serial.is_empty() {
            lost.push(given(&known.new_serial, known.new_expires_at, &known.serial));
        }
        lost
    }

    /// Whether an SVID that names these serial numbers was given to this agent. Another server may have recorded one of them
    /// that was never here.
    pub(super) fn is_followed_by(&self, follows: &[Box<str>]) -> bool {
        let mut known = self.recorded().chain(self.pending.iter().map(|pending| &pending.serial));
        !self.is_banned() && known.any(|serial| follows.contains(serial))
    }

    fn recorded(&self) -> impl Iterator<Item = &Box<str>> {
        [&self.serial, &self.new_serial].into_iter().filter(|serial| !serial.is_empty())
    }

    /// Whether callers can tell the two apart.
    pub(super) fn differs(&self, other: &Self) -> bool {
        let shown = |node: &Self| Self { row: 0, before: Box::default(), pending: Vec::new(), ..node.clone() };
        shown(self) != shown(other)
    }

    /// The serial numbers that are this agent's: the recorded ones, and the last ones of an outage, whoever gave them out.
    pub(super) fn serials(&self) -> Box<[Box<str>]> {
        let mut last: Vec<&Box<str>> = Vec::new();
        for serial in self.pending.iter().flat_map(|pending| pending.follows.iter().chain([&pending.serial])) {
            if !self.recorded().chain(last.iter().copied()).any(|known| known == serial) {
                last.push(serial);
            }
        }
        let last = last.split_off(last.len().saturating_sub(FOLLOWED_MAX));
        self.recorded().chain(last).cloned().collect()
    }

    pub(super) fn standing(&self, serial: &str, follows: &[Box<str>]) -> Standing {
        if self.is_banned() {
            Standing::Banned
        } else if *self.serial == *serial || self.pending.iter().any(|pending| *pending.serial == *serial) {
            Standing::Current
        } else if *self.new_serial == *serial {
            Standing::Renewed
        } else if self.is_followed_by(follows) {
            Standing::Ahead
        } else {
            Standing::Superseded
        }
    }

    pub(super) fn add_pending(&mut self, pending: Pending) {
        if self.pending.iter().any(|known| known.serial == pending.serial) {
            return;
        }
        if self.pending.len() >= PENDING_MAX {
            self.pending.remove(0);
        }
        self.pending.push(pending);
    }
}
