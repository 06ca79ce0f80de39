//! How far an order to the whole trust domain is: what agents and peers have told this server, and what all servers have told
//! each other. Who carries orders out is `authority::domain`.

mod agents;
mod beats;

use crate::authority::{AuthorityKind, after, goal_of};
use crate::federation::Peers;
use crate::issue::Rfc3339;
use crate::nodes::Nodes;
use agents::AgentsSeen;
use beats::Beats;
use finial_core::{SpiffeId, UnixSeconds};
use finial_proto::digest::of_bytes;
use finial_proto::journal::{Entries, Status};
use finial_proto::rotation::{Agents, Goal, Peer, RotationState, Server, ServerNote};
use finial_store::{CaJournal, Rotation, RotationNote, Store, StoreError};
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;
use tokio::time::Instant;

/// So many agents are named.
const LACKING_MAX: usize = 20;

/// What the server that carries orders out shares with those who give and hear them.
#[derive(Default)]
pub struct Domain {
    pub(crate) agents: AgentsSeen,
    pub(crate) beats: Beats,
    peers: Arc<Peers>,
    /// None where a test has none.
    nodes: Option<Arc<Nodes>>,
    wake: Notify,
    /// The open orders, of which this server, by its journal, shows that it is there.
    open: Mutex<(Vec<i64>, i64)>,
    /// What those who watch orders were told last, by the order's ID.
    pub(crate) seen: tokio::sync::Mutex<BTreeMap<i64, (Instant, Arc<RotationState>)>>,
    /// The bundles of another history of the datastore are to be read.
    pub(crate) anew: AtomicBool,
}

impl Domain {
    /// With those who fetch our bundle, and the agents that there are.
    pub(crate) fn new(peers: Arc<Peers>, nodes: Arc<Nodes>) -> Arc<Self> {
        Arc::new(Self { peers, nodes: Some(nodes), ..Self::default() })
    }

    /// Each agent that is not banned and has an SVID that has not ended.
    fn each_living(&self, now: UnixSeconds, each: impl FnMut(&SpiffeId)) {
        if let Some(nodes) = &self.nodes {
            nodes.each_living(now, each);
        }
    }

    /// Forgets agents that are not there any more.
    pub(crate) fn forget_agents(&self, now: UnixSeconds) {
        if let Some(nodes) = &self.nodes {
            self.agents.keep(nodes, now);
        }
    }

    /// These orders are open, for the server of this journal.
    pub(crate) fn set_open(&self, orders: Vec<i64>, journal: i64) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = (orders, journal);
    }

    /// The open orders, and the own journal.
    pub(crate) fn open(&self) -> (Vec<i64>, i64) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// There are new orders.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until there are.
    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }

    pub(crate) fn peers(&self, now: UnixSeconds) -> Vec<Peer> {
        let peer = |seen: crate::federation::PeerSeen| Peer {
            address: seen.address.to_string(),
            user_agent: seen.user_agent,
            sequence_number: seen.sequence_number,
            fetched_at: seen.seen_at,
        };
        self.peers.list(now).into_iter().map(peer).collect()
    }
}

/// What all servers tell.
#[derive(Clone)]
pub(crate) struct Told {
    pub(crate) journals: Vec<CaJournal>,
    pub(crate) notes: Vec<Note>,
}

impl Told {
    pub(crate) async fn read(store: &Store, order: &Rotation) -> Result<Self, StoreError> {
        let notes = store.rotation_notes(order.id).await?;
        Ok(Self { journals: store.list_ca_journals().await?, notes: notes.into_iter().map(Note::of).collect() })
    }

    /// The highest number of the own bundle that a server told of. Who has a lower one may be behind.
    pub(crate) fn sequence_number(&self) -> u64 {
        self.notes.iter().map(|note| note.says.sequence_number).max().unwrap_or_default()
    }
}

/// What one server tells.
#[derive(Clone)]
pub(crate) struct Note {
    journal: i64,
    wrote_at: UnixSeconds,
    pub(crate) says: ServerNote,
}

impl Note {
    pub(crate) fn of(note: RotationNote) -> Self {
        let says = ServerNote::decode(note.data.as_slice()).unwrap_or_default();
        Self { journal: note.journal_id, wrote_at: note.seen_at, says }
    }
}

/// The goal at which an order ends.
pub(crate) fn last(order: &Rotation) -> Goal {
    match goal_of(order) {
        Goal::TakeBack => Goal::TakeBack,
        _ if order.revoke => Goal::Revoke,
        _ => Goal::Activate,
    }
}

/// The IDs of the active and the prepared authority, and when the active one ends.
fn of_journal(kind: AuthorityKind, data: &[u8]) -> Option<(String, String, UnixSeconds)> {
    let entries = Entries::decode(data).ok()?;
    let all: Vec<_> = match kind {
        AuthorityKind::X509 => entries
            .x509_c_as
            .into_iter()
            .map(|e| (e.status(), e.slot_id.clone(), e.authority_id, e.not_after))
            .collect(),
        AuthorityKind::Jwt => {
            let keys = entries.jwt_keys.into_iter();
            keys.map(|e| (e.status(), e.slot_id.clone(), e.authority_id, e.not_after)).collect()
        }
        AuthorityKind::Wit => {
            let keys = entries.wit_keys.into_iter();
            keys.map(|e| (e.status(), e.slot_id.clone(), e.authority_id, e.not_after)).collect()
        }
    };
    let (_, _, active, ends) = all.iter().rev().find(|(status, ..)| *status == Status::Active).cloned()?;
    // One that was prepared for an order that was taken back is gone when another is made in its slot.
    let slots = all.iter().rev().map(|(_, slot, ..)| slot);
    let is_last = |nth: usize, slot: &String| !slots.clone().take(nth).any(|later| later == slot);
    let mut newest = all.iter().rev().enumerate();
    let prepared = newest.find(|(nth, (status, slot, ..))| *status == Status::Prepared && is_last(*nth, slot));
    Some((active, prepared.map(|(_, (_, _, id, _))| id.clone()).unwrap_or_default(), ends))
}

/// A server, and whether it is to be waited for.
struct Seen {
    server: Server,
    awaited: bool,
}

fn servers(kind: AuthorityKind, order: &Rotation, told: &Told, (beats, now): (&Beats, UnixSeconds)) -> Vec<Seen> {
    let notes: BTreeMap<i64, &Note> = told.notes.iter().map(|note| (note.journal, note)).collect();
    let is_new = beats.is_new(order.id, order.created_at);
    let seen = told.journals.iter().filter_map(|journal| {
        let (active_authority_id, prepared_authority_id, ends) = of_journal(kind, &journal.data)?;
        let note = notes.get(&journal.id);
        if note.is_none() && ends < now {
            return None; // it has not run for long
        }
        let says = note.map(|note| &note.says);
        let awaited = note.map_or(is_new, |note| beats.is_there(order.id, note.journal, note.wrote_at));
        let server = Server {
            journal_id: journal.id,
            follows: note.is_some(),
            seen_at: note.map_or(0, |note| note.wrote_at),
            reached: says.map_or(0, |says| says.reached),
            active_authority_id,
            prepared_authority_id,
            former_authority_id: says.and_then(|says| says.before.first().cloned()).unwrap_or_default(),
            error: says.map_or_else(String::new, |says| says.error.clone()),
        };
        Some(Seen { server, awaited })
    });
    seen.collect()
}

/// Whether an order whose goal is its last is at its end, as far as those know who follow it.
pub(crate) fn all_are_there(order: &Rotation, notes: &[Note], beats: &Beats) -> bool {
    let lags = |note: &Note| note.says.reached() < goal_of(order);
    let is_waited_for = |note: &&Note| beats.is_there(order.id, note.journal, note.wrote_at);
    !beats.is_new(order.id, order.created_at) && !notes.iter().filter(is_waited_for).any(lags)
}

/// What is known of an agent, by whoever has seen it.
#[derive(Default)]
struct Known {
    confirmed: bool,
    /// Its workloads follow, too.
    settled: bool,
    /// Its own SVID hangs from something new.
    hangs_anew: bool,
    /// It has said something of itself.
    speaks: bool,
}

/// What is known of agents, at any server: who has the bundle of the number that is needed.
fn agents(
    kind: AuthorityKind,
    next: Goal,
    notes: &[ServerNote],
    domain: &Domain,
    (needed, now): (u64, UnixSeconds),
) -> Agents {
    let before: HashSet<u64> = notes.iter().flat_map(|note| &note.before).map(|id| of_bytes(id.as_bytes())).collect();
    let mut all: HashMap<u64, Known> = HashMap::new();
    domain.agents.each(notes.iter().flat_map(|note| &note.agents), |key, had| {
        let known = all.entry(key).or_default();
        known.confirmed |= had.sequence >= needed;
        known.settled |= had.settled >= needed;
        known.hangs_anew |= had.issuer != 0 && !before.contains(&had.issuer);
        known.speaks |= !had.silent;
    });
    let mut agents = Agents::default();
    let unseen = Known::default();
    domain.each_living(now, |id| {
        let seen = all.get(&of_bytes(id.path().as_bytes()));
        let known = seen.unwrap_or(&unseen);
        // What is tainted must be known as well, and the workloads be off it. At the end there is nothing more to know: who has
        // moved stays so.
        let knows = known.settled || next == Goal::Unspecified;
        let moved = knows && (known.hangs_anew || kind != AuthorityKind::X509);
        agents.count += 1;
        agents.confirmed += u64::from(known.confirmed);
        agents.moved += u64::from(moved);
        agents.silent += u64::from(seen.is_some_and(|known| !known.speaks));
        let lacks = match next {
            Goal::Unspecified => false,
            Goal::Revoke => !moved,
            _ => !known.confirmed,
        };
        if lacks && agents.lacking.len() < LACKING_MAX {
            agents.lacking.push(id.to_string());
        }
    });
    agents.lacking.sort_unstable();
    agents
}

fn servers_behind(goal: Goal, servers: &[Seen]) -> Vec<String> {
    let behind = servers.iter().filter(|seen| seen.awaited && seen.server.reached() < goal);
    let words = behind.map(|seen| {
        let (id, authority) = (seen.server.journal_id, &seen.server.active_authority_id);
        let why = match (&*seen.server.error, seen.server.follows) {
            ("", true) => "has not come to the present goal yet".to_owned(),
            ("", false) => "has not taken the order up yet".to_owned(),
            (error, _) => format!("has not come to the present goal: {error}"),
        };
        format!("the server of journal {id} (active authority {authority}) {why}")
    });
    words.collect()
}

/// What besides servers stands against this goal.
fn too_early(next: Goal, notes: &[ServerNote], agents: &Agents, now: UnixSeconds) -> Vec<String> {
    let mut found = Vec::new();
    let (lacking, what) = match next {
        Goal::Activate => (agents.count - agents.confirmed, "have not confirmed the new bundle"),
        Goal::Revoke => (agents.count - agents.moved, "have not moved off what is to be revoked"),
        _ => (0, ""),
    };
    if lacking > 0 {
        let more = if usize::try_from(lacking).is_ok_and(|n| n <= agents.lacking.len()) { "" } else { ", ..." };
        found.push(format!("{lacking} of {} agents {what}: {}{more}", agents.count, agents.lacking.join(", ")));
    }
    // Whoever holds one, or was shown one, cannot replace it.
    let longest = notes.iter().max_by_key(|note| note.tokens_end).filter(|note| note.tokens_end > now);
    if let Some(note) = longest.filter(|_| next == Goal::Revoke) {
        let signer = note.before.first().map(String::as_str).unwrap_or_default();
        found.push(format!("tokens signed by {signer} live until {}", Rfc3339(note.tokens_end)));
    }
    found
}

/// Why a server that comes late, with this own note, is not to come to this goal yet, when nobody else waits for it any more.
pub(crate) fn too_early_alone(
    kind: AuthorityKind,
    goal: Goal,
    (own, others): (&ServerNote, Vec<Note>),
    (domain, now): (&Domain, UnixSeconds),
) -> Vec<String> {
    let needed = own.sequence_number;
    let notes: Vec<_> = others.into_iter().map(|note| note.says).chain([own.clone()]).collect();
    too_early(goal, &notes, &agents(kind, goal, &notes, domain, (needed, now)), now)
}

/// The order as it stands. `own` is the number of the own bundle.
pub(crate) fn state(order: &Rotation, told: Told, domain: &Domain, (own, now): (u64, UnixSeconds)) -> RotationState {
    let kind = AuthorityKind::of_number(order.kind).unwrap_or(AuthorityKind::X509);
    let goal = goal_of(order);
    let servers = servers(kind, order, &told, (&domain.beats, now));
    let notes: Vec<ServerNote> = told.notes.into_iter().map(|note| note.says).collect();
    let there = notes.iter().filter(|note| note.reached() >= goal);
    // The own bundle was read after what was told; a datastore that was restored may have lower numbers again.
    let needed = there.map(|note| note.sequence_number).max().unwrap_or(own).min(own);
    let next = if order.done || goal == last(order) { Goal::Unspecified } else { after(goal) };
    let agents = agents(kind, next, &notes, domain, (needed, now));
    let mut obstacles = servers_behind(goal, &servers);
    obstacles.extend(too_early(next, &notes, &agents, now));
    let mut peers: Vec<Peer> = notes.into_iter().flat_map(|note| note.peers).collect();
    peers.extend(domain.peers(now));
    peers.sort_by(|a, b| (&a.address, &a.user_agent, b.fetched_at).cmp(&(&b.address, &b.user_agent, a.fetched_at)));
    peers.dedup_by(|a, b| (&a.address, &a.user_agent) == (&b.address, &b.user_agent));
    RotationState {
        id: order.id,
        kind: i32::try_from(order.kind).unwrap_or_default(),
        revoke: order.revoke,
        goal: goal.into(),
        forced: order.forced,
        asked_by: order.asked_by.clone(),
        began_at: order.created_at,
        done: order.done,
        next: next.into(),
        obstacles,
        agents: Some(agents),
        peers,
        sequence_number: needed,
        servers: servers.into_iter().map(|seen| seen.server).collect(),
    }
}

/// Whether an open order has come to its end.
pub(crate) fn is_over(order: &Rotation, state: &RotationState) -> bool {
    !order.done && goal_of(order) == last(order) && state.obstacles.is_empty()
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
pub(crate) mod tests;
