//! Orders that reach every server of the trust domain: what is due for this one, step by step, and what it tells of itself.
//!
//! The order is a row of its own table, the journals are the progress; see `docs/adr/0016-an-order-for-a-whole-domain.md`.
//! [`due`] looks at the slots, at the bundle and at this server's note (what was there before, and what it tainted), which is written
//! before the step that it is about, so that whoever is killed between any two steps goes on.

use super::journal::hex;
use super::manager::{STEPS_MAX, within};
use super::plan::Status;
use super::store::{AuthorityStore, TaintStep};
use super::{AuthorityError, AuthorityKind, AuthorityManager, SUBSYSTEM, SlotStates};
use crate::rotation::{Domain, Note, all_are_there, last, too_early_alone};
use finial_core::{Bundle, UnixSeconds};
use finial_crypto::Certificate;
use finial_proto::rotation::{Goal, ServerNote};
use finial_store::{Rotation, RotationNote};
use prost::Message;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How often it is looked while an order is open.
const LOOK: Duration = Duration::from_secs(1);
/// How long after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// With nothing to do: who has news wakes us.
const IDLE: Duration = Duration::from_secs(3600);
/// How often a server shows that it is there, and looks who else is and whether all are through.
const BEAT: Duration = Duration::from_secs(5);
/// How often it writes its note with nothing new to say.
const TELL: Duration = Duration::from_secs(60);
/// A server that comes late takes the steps this long apart: two of the polls of SPIRE's agents.
const APART: Duration = Duration::from_secs(10);

/// Whether the bundle has an authority tainted, by its ID.
type Marks = BTreeMap<String, bool>;

/// What is looked at.
pub(super) struct View<'a> {
    pub(super) slots: &'a SlotStates,
    /// The authorities that were there when the order was first seen.
    pub(super) before: &'a [String],
    /// Those of them that were tainted for the order, and by nobody else.
    pub(super) tainted: &'a [String],
    /// `None` where authorities hang from an upstream one and are not in the bundle themselves.
    pub(super) marks: Option<&'a Marks>,
    pub(super) now: UnixSeconds,
}

/// What this server is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Make a successor.
    Prepare,
    /// Let the one in the next slot sign: the successor, or when the order is taken back the predecessor.
    Swap,
    /// Mark this one in the bundle.
    Taint(String),
    /// Take this one out of the bundle.
    Revoke(String),
    /// Take the order's marks away again.
    Untaint,
}

/// The next step towards a goal; `None` when it is reached, or nothing more can be done.
pub(super) fn due(goal: Goal, view: &View<'_>) -> Option<Due> {
    let (current, next) = (view.slots.current.as_ref()?, view.slots.next.as_ref());
    let is_before = |id: &String| view.before.contains(id);
    let marked = |among: &[String], wanted: bool| {
        let marks = view.marks?;
        among.iter().find(|id| marks.get(*id) == Some(&wanted)).cloned()
    };
    if goal == Goal::TakeBack {
        let may_sign = |id: &String| view.marks.is_none_or(|marks| marks.get(id) == Some(&false));
        let former = next.filter(|next| next.status == Status::Old && next.expires_at > view.now);
        let back = former.filter(|f| is_before(&f.authority_id) && may_sign(&f.authority_id));
        return match marked(view.tainted, true) {
            Some(_) => Some(Due::Untaint),
            None => back.filter(|_| !is_before(&current.authority_id)).map(|_| Due::Swap),
        };
    }
    if goal == Goal::Unspecified {
        return None;
    }
    if is_before(&current.authority_id) {
        let successor = next.filter(|next| next.status == Status::Prepared && !is_before(&next.authority_id));
        return match successor {
            None => Some(Due::Prepare),
            Some(_) => (goal > Goal::Prepare).then_some(Due::Swap),
        };
    }
    if goal < Goal::Taint {
        return None;
    }
    let revoke = || marked(view.before, true).filter(|_| goal == Goal::Revoke).map(Due::Revoke);
    marked(view.before, false).map(Due::Taint).or_else(revoke)
}

/// The goal after this one.
pub(crate) fn after(goal: Goal) -> Goal {
    match goal {
        Goal::Unspecified => Goal::Prepare,
        Goal::Prepare => Goal::Activate,
        Goal::Activate => Goal::Taint,
        Goal::Taint | Goal::Revoke => Goal::Revoke,
        Goal::TakeBack => Goal::TakeBack,
    }
}

/// An order that this server follows.
pub(super) struct Following {
    /// Its ID and when it began: a datastore that was restored gives IDs again.
    order: (i64, UnixSeconds),
    /// The datastore's history that the note is of.
    history: u64,
    note: ServerNote,
    /// The order had ended before this server, with authorities of its own time, came.
    unconcerned: bool,
    /// The others went on without this server, or may have: it looks itself whether a step can be taken.
    late: bool,
    /// The next step is not taken before.
    not_before: Instant,
    /// When it was looked last whether all are through.
    looked: Option<Instant>,
    /// What was told last, and when.
    told: Option<(ServerNote, Instant)>,
    /// The last try to tell it failed.
    mute: bool,
}

fn marks(kind: AuthorityKind, bundle: &Bundle) -> Marks {
    match kind.tokens() {
        Some(tokens) => tokens.of(bundle).iter().map(|key| (key.key_id.clone(), key.tainted)).collect(),
        None => {
            let id = |der| Some(hex(Certificate::parse(der).ok()?.subject_key_id()?));
            let known = bundle.x509_authorities.iter();
            known.filter_map(|a| Some((id(a.der.clone())?, a.tainted))).collect()
        }
    }
}

impl AuthorityKind {
    /// As orders are stored.
    pub(crate) fn number(self) -> i64 {
        match self {
            Self::X509 => 1,
            Self::Jwt => 2,
            Self::Wit => 3,
        }
    }

    /// The kind of this number.
    pub(crate) fn of_number(number: i64) -> Option<Self> {
        [Self::X509, Self::Jwt, Self::Wit].into_iter().find(|kind| kind.number() == number)
    }
}

/// As stored.
pub(crate) fn goal_of(order: &Rotation) -> Goal {
    i32::try_from(order.goal).ok().and_then(|goal| Goal::try_from(goal).ok()).unwrap_or_default()
}

impl AuthorityManager {
    /// Looks at the orders, does what is due, and says when to look again unless somebody wakes us before.
    pub(super) async fn heed_orders(&mut self) -> Duration {
        let reading = self.parts.store.newest_rotations();
        let orders = match within("the datastore", reading, AuthorityError::Order).await {
            Ok(orders) => orders,
            Err(error) => {
                tracing::debug!(subsystem_name = SUBSYSTEM, %error, "Orders to rotate cannot be read; trying again");
                return RETRY;
            }
        };
        let open: Vec<i64> = orders.iter().filter(|order| !order.done).map(|order| order.id).collect();
        self.parts.domain.beats.keep(&open);
        self.parts.domain.set_open(open, self.journal.row());
        let mut wait = IDLE;
        for order in orders {
            let kind = AuthorityKind::of_number(order.kind);
            let off = |kind: &AuthorityKind| kind.tokens().is_some_and(|tokens| self.key_type(tokens).is_none());
            let Some(kind) = kind.filter(|kind| !off(kind)) else { continue };
            match self.follow(kind, &order).await {
                Ok(true) if order.done => {}
                Ok(_) => wait = wait.min(LOOK),
                Err(error) => {
                    tracing::error!(
                        subsystem_name = SUBSYSTEM,
                        error,
                        "Unable to follow the order to rotate {kind} authorities; trying again"
                    );
                    if let Some(following) = self.following.get_mut(&order.kind) {
                        following.note.error = error;
                    }
                    wait = wait.min(RETRY);
                }
            }
            if !order.done {
                self.tell(&order).await;
                self.close(&order).await;
            }
        }
        wait
    }

    /// Whether the goal is reached.
    async fn follow(&mut self, kind: AuthorityKind, order: &Rotation) -> Result<bool, String> {
        if self.journal.row() == 0 {
            return Ok(false); // nothing to be known by yet
        }
        let (id, history) = ((order.id, order.created_at), self.parts.feed.history());
        let known = self.following.get(&order.kind);
        if known.is_none_or(|following| (following.order, following.history) != (id, history)) {
            let seen = self.first_sight(kind, order, history).await.map_err(|e| e.to_string())?;
            self.following.insert(order.kind, seen);
        }
        let goal = goal_of(order);
        while let Some(following) = self.following.get(&order.kind) {
            let reached = following.note.reached();
            if following.unconcerned || reached > goal || (reached == goal && !self.is_undone(kind, goal, following)) {
                return Ok(true);
            }
            if goal == Goal::TakeBack || reached == goal {
                self.reach(kind, order, goal).await?;
                continue;
            }
            let step = after(reached);
            if order.done {
                // Who else is there tells again of its agents, and people see what is still to be done.
                self.write(order.id, &following.note).await.map_err(|e| e.to_string())?;
                if let Some(following) = self.following.get_mut(&order.kind) {
                    following.told = None; // the note has none of its agents now
                }
                let opening = self.parts.store.reopen_rotation(order);
                within("the datastore", opening, AuthorityError::Order).await.map_err(|e| e.to_string())?;
                return Ok(false);
            }
            if following.not_before > Instant::now() || self.is_too_early(kind, order, step).await? {
                return Ok(false);
            }
            self.reach(kind, order, step).await?;
        }
        Ok(false)
    }

    /// Whether a server that comes late is to wait with a step, for what the others waited for.
    async fn is_too_early(&mut self, kind: AuthorityKind, order: &Rotation, step: Goal) -> Result<bool, String> {
        let Some(following) = self.following.get_mut(&order.kind) else { return Ok(true) };
        following.late |= step < goal_of(order);
        if !following.late || order.forced {
            return Ok(false);
        }
        let reading = self.parts.store.rotation_notes(order.id);
        let notes = within("the datastore", reading, AuthorityError::Order).await.map_err(|e| e.to_string())?;
        let notes = notes.into_iter().map(Note::of).collect();
        let (domain, now) = (&*self.parts.domain, self.parts.clock.now());
        let why = too_early_alone(kind, step, (&following.note, notes), (domain, now));
        following.note.error = match why.is_empty() {
            true => String::new(),
            false => format!("it is too early to {}: {}", step.verb(), why.join("; ")),
        };
        Ok(!why.is_empty())
    }

    /// What is due for a goal, as far as is known here.
    fn due_for(&self, kind: AuthorityKind, goal: Goal, note: &ServerNote, own: &Bundle) -> Option<Due> {
        let hangs = kind == AuthorityKind::X509 && self.parts.upstream.is_some();
        let known = (!hangs).then(|| marks(kind, own));
        let (slots, now) = (self.slots(kind), self.parts.clock.now());
        due(goal, &View { slots: &slots, before: &note.before, tainted: &note.tainted, marks: known.as_ref(), now })
    }

    /// Whether something is due again for a goal that was reached: the datastore lost it. What was taken back is left as it is: what
    /// comes after that is others' to order.
    fn is_undone(&self, kind: AuthorityKind, goal: Goal, following: &Following) -> bool {
        let Some(own) = self.parts.feed.own().filter(|_| goal != Goal::TakeBack) else { return false };
        self.due_for(kind, goal, &following.note, own.stored()).is_some()
    }

    /// Comes to one goal, whatever is due for it, and notes that.
    async fn reach(&mut self, kind: AuthorityKind, order: &Rotation, goal: Goal) -> Result<(), String> {
        for _ in 0..STEPS_MAX {
            let Some(note) = self.following.get(&order.kind).map(|following| following.note.clone()) else {
                return Ok(());
            };
            // After a failure the feed may be behind, and who reads it would move off what is tainted no more.
            let reading = self.parts.feed.refresh(&self.settings.trust_domain);
            within("the datastore", reading, AuthorityError::Bundle).await.map_err(|e| e.to_string())?;
            let own = self.parts.feed.own().ok_or("there is no bundle")?;
            let Some(step) = self.due_for(kind, goal, &note, own.stored()) else {
                // A restart must find what is told.
                self.flush_journal().await.map_err(|e| e.to_string())?;
                let tokens_end = kind.tokens().map_or(0, |tokens| self.parts.authorities.tokens_end(tokens));
                let is_old =
                    self.slots(kind).current.is_some_and(|current| note.before.contains(&current.authority_id));
                let Some(following) = self.following.get_mut(&order.kind) else { return Ok(()) };
                following.note.set_reached(goal);
                if goal == Goal::Activate {
                    following.note.tokens_end = tokens_end;
                }
                following.note.sequence_number = own.bundle.sequence_number;
                following.note.error = match goal {
                    Goal::TakeBack if !is_old => {
                        "the authority from before is not there any more, or is tainted".into()
                    }
                    _ => String::new(),
                };
                following.not_before = Instant::now() + if goal == goal_of(order) { Duration::ZERO } else { APART };
                tracing::info!(
                    subsystem_name = SUBSYSTEM,
                    order = order.id,
                    goal = goal.as_str_name(),
                    "Order to rotate {kind} authorities carried out"
                );
                return Ok(());
            };
            if matches!(&step, Due::Taint(id) if !note.tainted.contains(id)) {
                let known = marks(kind, own.stored());
                self.claim(order, note.clone(), &known).await.map_err(|e| e.to_string())?;
            }
            self.carry_out(kind, step, &note.tainted).await?;
        }
        Err(AuthorityError::Restless.to_string())
    }

    /// Notes what is tainted for the order, before it is: what others tainted stays tainted if it is taken back.
    async fn claim(&mut self, order: &Rotation, mut note: ServerNote, known: &Marks) -> Result<(), AuthorityError> {
        note.tainted.extend(note.before.iter().filter(|id| known.get(*id) == Some(&false)).cloned());
        note.tainted.sort_unstable();
        note.tainted.dedup();
        self.write(order.id, &note).await?;
        if let Some(following) = self.following.get_mut(&order.kind) {
            following.note = note;
            following.told = None;
        }
        Ok(())
    }

    async fn carry_out(&mut self, kind: AuthorityKind, step: Due, tainted: &[String]) -> Result<(), String> {
        match step {
            Due::Prepare => self.prepare(kind).await.map_err(|e| e.to_string()),
            Due::Swap => {
                self.rotate(kind).await;
                Ok(())
            }
            Due::Taint(id) => {
                self.mark(kind, TaintStep::Taint, &id, "failed to taint authority").await.map_err(|e| e.to_string())
            }
            Due::Revoke(id) => {
                self.mark(kind, TaintStep::Revoke, &id, "failed to revoke authority").await.map_err(|e| e.to_string())
            }
            Due::Untaint => {
                let trust_domain = &self.settings.trust_domain;
                let untainting = self.parts.store.untaint_authorities(trust_domain, tainted);
                within("the datastore", untainting, AuthorityError::Bundle).await.map_err(|e| e.to_string())
            }
        }
    }

    /// What there is before anything is done for the order, kept in the datastore before it is.
    async fn first_sight(
        &self,
        kind: AuthorityKind,
        order: &Rotation,
        history: u64,
    ) -> Result<Following, AuthorityError> {
        let id = (order.id, order.created_at);
        // In another history of the datastore our note may be lost, but not what we know to be old.
        let followed = self.following.get(&order.kind).filter(|followed| followed.order == id);
        let reading = self.parts.store.rotation_notes(order.id);
        let notes = within("the datastore", reading, AuthorityError::Order).await?;
        let known = notes.iter().find(|note| note.journal_id == self.journal.row());
        let known = known.and_then(|note| ServerNote::decode(note.data.as_slice()).ok());
        let entries = self.journal.issued(kind);
        let active = self.slots(kind).current.map(|current| current.authority_id).unwrap_or_default();
        let made_at = entries.iter().find(|(id, _)| *id == active).map_or(UnixSeconds::MIN, |(_, at)| *at);
        let unconcerned = match followed {
            Some(followed) => followed.unconcerned,
            None => order.done && made_at >= order.created_at,
        };
        let mut following = Following {
            order: id,
            history,
            unconcerned: known.is_none() && unconcerned,
            late: goal_of(order) > Goal::Prepare,
            not_before: Instant::now(),
            looked: None,
            told: None,
            mute: false,
            note: known.clone().unwrap_or_default(),
        };
        if known.is_none() && !following.unconcerned {
            let others = entries.into_iter().map(|(id, _)| id).filter(|id| *id != active);
            following.note.before = std::iter::once(active.clone()).chain(others).collect();
            if let Some(followed) = followed {
                following.note.before.clone_from(&followed.note.before);
                following.note.tainted.clone_from(&followed.note.tainted);
            }
            let note = following.note.clone();
            self.write(order.id, &note).await?;
            following.told = Some((note, Instant::now()));
        }
        Ok(following)
    }

    async fn write(&self, rotation_id: i64, note: &ServerNote) -> Result<(), AuthorityError> {
        let (journal_id, data) = (self.journal.row(), note.encode_to_vec());
        let note = RotationNote { rotation_id, journal_id, data, seen_at: 0 };
        within("the datastore", self.parts.store.set_rotation_note(&note), AuthorityError::Order).await
    }

    /// Tells the others how far this server is, and which of its agents and peers know what.
    async fn tell(&mut self, order: &Rotation) {
        let Some(following) = self.following.get(&order.kind).filter(|following| !following.unconcerned) else {
            return;
        };
        let domain: &Domain = &self.parts.domain;
        if following.told.as_ref().is_none_or(|(_, at)| at.elapsed() >= TELL) {
            domain.forget_agents(self.parts.clock.now());
        }
        let mut note = following.note.clone();
        note.agents = domain.agents.told();
        note.peers = domain.peers(self.parts.clock.now());
        let is_new = |(told, at): &(ServerNote, Instant)| *told != note || at.elapsed() >= TELL;
        if following.told.as_ref().is_some_and(|told| !is_new(told)) {
            return;
        }
        let written = self.write(order.id, &note).await;
        let Some(following) = self.following.get_mut(&order.kind) else { return };
        let was_mute = std::mem::replace(&mut following.mute, written.is_err());
        match written {
            Ok(()) => following.told = Some((note, Instant::now())),
            // The others see that we are there, and nothing else.
            Err(error) if !was_mute => tracing::warn!(
                subsystem_name = SUBSYSTEM,
                %error,
                bytes = note.encoded_len(),
                "Other servers cannot be told how far the order to rotate authorities is here, and wait for it; trying again"
            ),
            Err(_) => {}
        }
    }

    /// Closes an order that all are through with: nobody may ask for it any more.
    async fn close(&mut self, order: &Rotation) {
        let goal = goal_of(order);
        let Some(following) = self.following.get_mut(&order.kind) else { return };
        let is_through = goal == last(order) && following.note.reached() == goal;
        if !is_through || following.looked.is_some_and(|at| at.elapsed() < BEAT) {
            return;
        }
        following.looked = Some(Instant::now());
        let (store, beats) = (&self.parts.store, &self.parts.domain.beats);
        let closing = async {
            let notes: Vec<Note> = store.rotation_notes(order.id).await?.into_iter().map(Note::of).collect();
            if all_are_there(order, &notes, beats) {
                store.close_rotation(order).await?;
            }
            Ok(())
        };
        if let Err(error) = within("the datastore", closing, AuthorityError::Order).await {
            tracing::debug!(subsystem_name = SUBSYSTEM, %error, "The order to rotate authorities stays open for now");
        }
    }
}

/// Shows that this server is there, and sees who else is, however long a step takes.
pub(super) async fn beat(store: &dyn AuthorityStore, domain: &Domain) {
    loop {
        tokio::time::sleep(BEAT).await;
        let (orders, journal) = domain.open();
        for order in orders {
            let beating = async {
                store.touch_rotation_note(order, journal).await?;
                store.rotation_beats(order).await
            };
            // What fails is tried again with the next.
            let seen = within("the datastore", beating, AuthorityError::Order).await.unwrap_or_default();
            for (journal, wrote_at) in seen {
                domain.beats.is_there(order, journal, wrote_at);
            }
        }
    }
}

#[cfg(test)]
#[path = "domain_tests.rs"]
mod tests;
