//! How far an order to the whole trust domain is: what agents and peers have told this server, and what all servers have told
//! each other. Who carries orders out is `authority::domain`.

use crate::authority::{AuthorityKind, after, goal_of};
use crate::federation::Peers;
use crate::nodes::Nodes;
use finial_core::{SpiffeId, UnixSeconds};
use finial_proto::digest::of_bytes;
use finial_proto::journal::{Entries, Status};
use finial_proto::rotation::{Agents, Goal, Peer, RotationState, Server, ServerNote};
use finial_store::{CaJournal, Rotation, RotationNote, Store, StoreError};
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Of more agents nothing is noted; they count as not having confirmed.
const AGENTS_MAX: usize = 500_000;
/// So many agents are named.
const LACKING_MAX: usize = 20;
/// Within so many seconds every server of ours that runs has taken an order up. (One of SPIRE's never does.)
const TAKE_UP_SECONDS: i64 = 15;
/// A server that has not told of itself for so many seconds is not waited for.
const SILENT_SECONDS: i64 = 30;

/// What an agent has.
#[derive(Clone, Copy, Default)]
struct Had {
    /// The number of the bundle that it has.
    sequence: u64,
    /// Of the one that it was answered last: it has that when it asks again.
    answered: u64,
    /// The digest of the ID of the authority that signed its SVID.
    issuer: u64,
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
            let had = seen.entry(key).or_default();
            had.issuer = issuer;
            note(had);
        }
    }

    /// It has the bundle of this number; 0 where it does not say.
    pub(crate) fn has(&self, agent: &SpiffeId, issuer: u64, sequence: u64) {
        self.with(agent, issuer, |had| had.sequence = had.sequence.max(sequence));
    }

    /// It is answered the bundle of this number.
    pub(crate) fn answered(&self, agent: &SpiffeId, issuer: u64, sequence: u64) {
        self.with(agent, issuer, |had| {
            had.sequence = had.sequence.max(had.answered);
            had.answered = sequence;
        });
    }

    /// The datastore has another history now, in which this is the number of the own bundle: who has one of a higher number has
    /// it from the one before, and gets another.
    pub(crate) fn start_anew(&self, own: u64) {
        for had in self.lock().values_mut() {
            for number in [&mut had.sequence, &mut had.answered] {
                *number = if *number > own { 0 } else { *number };
            }
        }
    }

    /// As [`ServerNote::agents`] has it.
    pub(crate) fn told(&self) -> Vec<u8> {
        let mut all: Vec<_> = self.lock().iter().map(|(key, had)| [*key, had.sequence, had.issuer]).collect();
        all.sort_unstable();
        all.iter().flatten().flat_map(|number| number.to_be_bytes()).collect()
    }

    /// Forgets those that are not there any more.
    pub(crate) fn keep(&self, nodes: &Nodes, now: UnixSeconds) {
        let mut living = HashSet::new();
        nodes.each_living(now, |id| {
            living.insert(of_bytes(id.path().as_bytes()));
        });
        self.lock().retain(|key, _| living.contains(key));
    }
}

/// What the server that carries orders out shares with those who give and hear them.
#[derive(Default)]
pub struct Domain {
    pub(crate) agents: AgentsSeen,
    peers: Option<Arc<Peers>>,
    nodes: Option<Arc<Nodes>>,
    wake: Notify,
    /// The bundles of another history of the datastore are to be read.
    pub(crate) anew: AtomicBool,
}

impl Domain {
    /// With those who fetch our bundle, and the agents that there are.
    pub(crate) fn new(peers: Arc<Peers>, nodes: Arc<Nodes>) -> Arc<Self> {
        Arc::new(Self { peers: Some(peers), nodes: Some(nodes), ..Self::default() })
    }

    /// Forgets agents that are not there any more.
    pub(crate) fn forget_agents(&self, now: UnixSeconds) {
        if let Some(nodes) = &self.nodes {
            self.agents.keep(nodes, now);
        }
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
        let seen = self.peers.as_ref().map(|peers| peers.list(now)).unwrap_or_default();
        let peer = |seen: crate::federation::PeerSeen| Peer {
            address: seen.address.to_string(),
            user_agent: seen.user_agent,
            sequence_number: seen.sequence_number,
            fetched_at: seen.seen_at,
        };
        seen.into_iter().map(peer).collect()
    }
}

/// What all servers tell.
pub(crate) struct Told {
    pub(crate) journals: Vec<CaJournal>,
    pub(crate) notes: Vec<RotationNote>,
}

impl Told {
    pub(crate) async fn read(store: &Store, order: &Rotation) -> Result<Self, StoreError> {
        Ok(Self { journals: store.list_ca_journals().await?, notes: store.rotation_notes(order.id).await? })
    }

    /// The highest number of the own bundle that a server told of. Who has a lower one may be behind.
    pub(crate) fn sequence_number(&self) -> u64 {
        let notes = self.notes.iter().filter_map(|note| ServerNote::decode(note.data.as_slice()).ok());
        notes.map(|note| note.sequence_number).max().unwrap_or_default()
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
        AuthorityKind::X509 => {
            entries.x509_c_as.into_iter().map(|e| (e.status(), e.authority_id, e.not_after)).collect()
        }
        AuthorityKind::Jwt => entries.jwt_keys.into_iter().map(|e| (e.status(), e.authority_id, e.not_after)).collect(),
        AuthorityKind::Wit => entries.wit_keys.into_iter().map(|e| (e.status(), e.authority_id, e.not_after)).collect(),
    };
    let newest = |status| all.iter().rev().find(|(known, ..)| *known == status).cloned();
    let (_, active, ends) = newest(Status::Active)?;
    Some((active, newest(Status::Prepared).map(|(_, id, _)| id).unwrap_or_default(), ends))
}

/// A server, with whether it is to be waited for and all that it had before.
struct Seen {
    server: Server,
    awaited: bool,
    note: ServerNote,
}

fn servers(kind: AuthorityKind, order: &Rotation, told: &Told, now: UnixSeconds) -> Vec<Seen> {
    let notes: BTreeMap<i64, &RotationNote> = told.notes.iter().map(|note| (note.journal_id, note)).collect();
    let seen = told.journals.iter().filter_map(|journal| {
        let (active_authority_id, prepared_authority_id, ends) = of_journal(kind, &journal.data)?;
        let note = notes.get(&journal.id);
        if note.is_none() && ends < now {
            return None; // it has not run for long
        }
        let data = note.and_then(|note| ServerNote::decode(note.data.as_slice()).ok()).unwrap_or_default();
        let awaited = match note {
            Some(note) => now.saturating_sub(note.seen_at) < SILENT_SECONDS,
            None => now.saturating_sub(order.created_at) < TAKE_UP_SECONDS,
        };
        let server = Server {
            journal_id: journal.id,
            follows: note.is_some(),
            seen_at: note.map_or(0, |note| note.seen_at),
            reached: data.reached,
            active_authority_id,
            prepared_authority_id,
            former_authority_id: data.before.first().cloned().unwrap_or_default(),
            error: data.error.clone(),
        };
        Some(Seen { server, awaited, note: data })
    });
    seen.collect()
}

/// What is known of agents, at any server.
fn agents(
    kind: AuthorityKind,
    next: Goal,
    (servers, own): (&[Seen], &AgentsSeen),
    nodes: &Nodes,
    (needed, now): (u64, UnixSeconds),
) -> Agents {
    let before: HashSet<u64> = servers.iter().flat_map(|s| &s.note.before).map(|id| of_bytes(id.as_bytes())).collect();
    let mut known: HashMap<u64, (bool, bool)> = HashMap::new();
    let own = own.told();
    for all in servers.iter().map(|s| &*s.note.agents).chain([&*own]) {
        for agent in all.as_chunks::<24>().0 {
            let number = |at: usize| {
                agent.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).unwrap_or_default()
            };
            let (sequence, issuer) = (number(8), number(16));
            let (confirmed, moved) = known.entry(number(0)).or_default();
            *confirmed |= sequence >= needed;
            *moved |= issuer != 0 && !before.contains(&issuer);
        }
    }
    let mut agents = Agents::default();
    nodes.each_living(now, |id| {
        let (confirmed, moved) = known.get(&of_bytes(id.path().as_bytes())).copied().unwrap_or_default();
        // What is tainted must be known as well: who confirms that has new SVIDs for its workloads, too.
        // At the end there is nothing more to know: who has moved stays so.
        let knows = confirmed || next == Goal::Unspecified;
        let moved = knows && (moved || kind != AuthorityKind::X509);
        agents.count += 1;
        agents.confirmed += u64::from(confirmed);
        agents.moved += u64::from(moved);
        let lacks = if next == Goal::Revoke { !moved } else { !confirmed };
        if lacks && agents.lacking.len() < LACKING_MAX {
            agents.lacking.push(id.to_string());
        }
    });
    agents.lacking.sort_unstable();
    agents
}

fn obstacles(next: Goal, goal: Goal, servers: &[Seen], agents: &Agents) -> Vec<String> {
    let mut found = Vec::new();
    for seen in servers.iter().filter(|seen| seen.awaited && seen.server.reached() < goal) {
        let (id, authority) = (seen.server.journal_id, &seen.server.active_authority_id);
        let why = match (&*seen.server.error, seen.server.follows) {
            ("", true) => "has not come to the present goal yet".to_owned(),
            ("", false) => "has not taken the order up yet".to_owned(),
            (error, _) => format!("has not come to the present goal: {error}"),
        };
        found.push(format!("the server of journal {id} (active authority {authority}) {why}"));
    }
    let (lacking, what) = match next {
        Goal::Activate => (agents.count - agents.confirmed, "have not confirmed the new bundle"),
        Goal::Revoke => (agents.count - agents.moved, "have not moved off what is to be revoked"),
        _ => (0, ""),
    };
    if lacking > 0 {
        let more = if usize::try_from(lacking).is_ok_and(|n| n <= agents.lacking.len()) { "" } else { ", ..." };
        found.push(format!("{lacking} of {} agents {what}: {}{more}", agents.count, agents.lacking.join(", ")));
    }
    found
}

/// The order as it stands. `own` is the number of the own bundle.
pub(crate) fn state(
    order: &Rotation,
    told: &Told,
    (domain, nodes): (&Domain, &Nodes),
    (own, now): (u64, UnixSeconds),
) -> RotationState {
    let kind = AuthorityKind::of_number(order.kind).unwrap_or(AuthorityKind::X509);
    let goal = goal_of(order);
    let servers = servers(kind, order, told, now);
    let there = servers.iter().filter(|seen| seen.server.reached() >= goal);
    // The own bundle was read after what was told; a datastore that was restored may have lower numbers again.
    let needed = there.map(|seen| seen.note.sequence_number).max().unwrap_or(own).min(own);
    let next = if order.done || goal == last(order) { Goal::Unspecified } else { after(goal) };
    let agents = agents(kind, next, (&servers, &domain.agents), nodes, (needed, now));
    let obstacles = obstacles(next, goal, &servers, &agents);
    let mut peers: Vec<Peer> = servers.iter().flat_map(|seen| seen.note.peers.iter().cloned()).collect();
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
