//! Renewed SVIDs: given out, stored, used; also while the datastore is away. See docs/adr/0008.

use super::node::{Node, Pending};
use super::{Nodes, Standing};
use finial_core::{SpiffeId, UnixSeconds};
use finial_store::StoreError;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long a call waits for the datastore to take note of a renewed SVID or of its first use, before it goes on without.
const NOTE_MAX: Duration = Duration::from_secs(3);

/// What became of a renewed SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It is stored, and can be given out.
    Stored,
    /// The datastore is away, fails, or does not answer in time. An SVID that says which ones it follows can be given out in
    /// its place: see [`Nodes::renew_without_datastore`].
    DatastoreAway,
    /// The same, but the datastore may have stored this one, or may do so yet: the SVID in its place follows it, too.
    Doubtful,
    /// The agent is another by now: evicted, banned, or attested again.
    Superseded,
}

/// How far a renewal is that somebody waits for.
#[derive(Default)]
struct Progress {
    /// Nobody waits any more, and what is not waited for is not stored. An SVID that is given out in its place is noted after
    /// this.
    given_up: AtomicBool,
    /// It may be stored from here on.
    begun: AtomicBool,
}

/// The caller waits, as long as this lives.
struct Waiting(Arc<Progress>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.given_up.store(true, Ordering::SeqCst);
    }
}

/// The first use of an agent's renewed SVID is being noted, as long as this lives.
struct Noting(Arc<Nodes>, SpiffeId);

impl Noting {
    /// `None` when somebody does so already.
    fn begin(nodes: &Arc<Nodes>, id: &SpiffeId) -> Option<Self> {
        let new = nodes.noting.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        new.then(|| Self(nodes.clone(), id.clone()))
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        self.0.noting.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// Whether the file fails so for every row. Damage may concern a few.
fn cannot_be_written(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Locked { .. } | StoreError::Busy(_) | StoreError::Full { .. } | StoreError::ReadOnly { .. }
    )
}

impl Nodes {
    /// The renewed SVID was used: makes it the current one. What the datastore cannot note now is noted the next time; the
    /// SVID is as good.
    ///
    /// # Errors
    /// None that comes from a datastore that is away.
    pub async fn promote(self: &Arc<Self>, id: &SpiffeId, serial: &str) -> Result<(), StoreError> {
        // Who comes while another call of the same agent waits goes on: so nobody fills the line with calls of one agent.
        let Some(noting) = Noting::begin(self, id) else { return Ok(()) };
        let (this, agent, serial) = (self.clone(), id.clone(), serial.to_owned());
        let work = async move {
            let _noting = noting;
            this.note_use(&agent, &serial).await
        };
        match tokio::time::timeout(NOTE_MAX, self.turn.take(work)).await {
            Ok(Err(error)) if error.is_outage() => {
                tracing::debug!(spiffe_id = %id, %error, "The use of a renewed SVID is noted later");
                Ok(())
            }
            Ok(result) => result,
            Err(_) => Ok(()),
        }
    }

    /// The same from within a turn. Nothing to do when another call of the same agent was first; or when it was banned,
    /// which the next call sees.
    async fn note_use(&self, id: &SpiffeId, serial: &str) -> Result<(), StoreError> {
        if self.standing(id, serial, &[]) == Standing::Renewed {
            self.put(&self.store.promote_serial(id, serial).await?);
        }
        Ok(())
    }

    /// Stores a renewed SVID that was not given out yet, for an agent that showed the one with the serial number `own`.
    pub async fn renew(
        self: &Arc<Self>,
        id: &SpiffeId,
        own: &str,
        serial: String,
        expires_at: UnixSeconds,
    ) -> Result<Renewal, StoreError> {
        let (this, id, own) = (self.clone(), id.clone(), own.to_owned());
        let progress = Arc::<Progress>::default();
        let (waiting, its) = (Waiting(progress.clone()), progress.clone());
        let work = async move {
            // Since it was let in, the agent may have been evicted and attested again, which is another one.
            if !this.serials(&id).is_some_and(|serials| serials.iter().any(|known| **known == *own)) {
                return Ok(Renewal::Superseded);
            }
            // Its first use may wait to be noted; the next number would take its place.
            this.note_use(&id, &own).await?;
            // What was given out before has to be there first: the agent may use it now.
            this.store_pending_of(&id).await?;
            this.note_use(&id, &own).await?;
            let Some(follows) = this.serials(&id) else { return Ok(Renewal::Superseded) };
            // Nobody gets this one any more. It must not take the place of one that was given out and is stored by now; one
            // that is given out from here on is stored later and takes the place of this.
            its.begun.store(true, Ordering::SeqCst);
            if its.given_up.load(Ordering::SeqCst) {
                return Ok(Renewal::DatastoreAway);
            }
            let record = this.store.renew_node(&id, &follows, &serial, expires_at).await?;
            this.put(&record);
            Ok(if record.new_serial_number == serial { Renewal::Stored } else { Renewal::Superseded })
        };
        let result = tokio::time::timeout(NOTE_MAX, self.turn.take(work)).await;
        drop(waiting);
        let leaves_doubt = match result {
            Ok(Err(error)) if error.is_outage() => {
                tracing::warn!(%error, "An agent's SVID is renewed without the datastore");
                error.leaves_doubt()
            }
            Ok(result) => return result,
            Err(_) => {
                let seconds = NOTE_MAX.as_secs();
                tracing::warn!(seconds, "The datastore is slow: an agent's SVID is renewed without it");
                true
            }
        };
        let doubtful = leaves_doubt && progress.begun.load(Ordering::SeqCst);
        Ok(if doubtful { Renewal::Doubtful } else { Renewal::DatastoreAway })
    }

    /// The serial numbers of a renewable agent that is not banned, which its next SVID follows.
    pub fn serials(&self, id: &SpiffeId) -> Option<Box<[Box<str>]>> {
        self.with(id, |node| node.filter(|node| !node.is_banned()).map(Node::serials))
    }

    /// Takes note of an SVID that is given out while the datastore is away, to an agent that showed the one with the serial
    /// number `own`; it is stored when that is back. `false` when the agent is another by now.
    pub fn renew_without_datastore(
        &self,
        id: &SpiffeId,
        own: &str,
        follows: Box<[Box<str>]>,
        serial: &str,
        expires_at: UnixSeconds,
    ) -> bool {
        // What the agent showed is none of its serial numbers any more, if it was evicted and attested again since.
        follows.iter().any(|known| **known == *own)
            && self.add_pending(id, Pending { serial: serial.into(), expires_at, follows, own: Some(own.into()) })
    }

    fn add_pending(&self, id: &SpiffeId, pending: Pending) -> bool {
        self.change(|map| match map.get_mut(id) {
            Some(node) if node.is_followed_by(&pending.follows) => {
                node.add_pending(pending);
                self.some_wait.store(true, Ordering::SeqCst);
                true
            }
            _ => false,
        })
    }

    /// Another server gave this SVID out while the datastore was away: it is as good as if it had been given out here, and
    /// is stored from here if the other has not done so.
    pub async fn adopt(self: &Arc<Self>, id: &SpiffeId, serial: &str, expires_at: UnixSeconds, follows: &[Box<str>]) {
        let shown = Pending { serial: serial.into(), expires_at, follows: follows.into(), own: None };
        if !self.add_pending(id, shown) || self.turn.link().is_away() {
            return;
        }
        let (this, agent) = (self.clone(), id.clone());
        let work = async move { this.store_pending_of(&agent).await };
        if let Ok(Err(error)) = tokio::time::timeout(NOTE_MAX, self.turn.take(work)).await {
            tracing::debug!(spiffe_id = %id, %error, "A renewed SVID is stored later");
        }
    }

    /// The datastore answers again: what was given out meanwhile is stored soon, by [`Nodes::run`].
    pub(crate) fn store_pending_soon(&self) {
        self.store_now.notify_one();
    }

    /// Stores what was given out while the datastore was away. What cannot be stored now waits for the next time.
    pub(crate) async fn store_pending(self: &Arc<Self>) {
        if self.turn.link().is_away() || !self.some_wait.swap(false, Ordering::SeqCst) {
            return;
        }
        let waiting = self.unstored();
        if waiting.is_empty() {
            return;
        }
        tracing::info!(agents = waiting.len(), "Storing SVIDs of agents that were renewed without the datastore");
        let mut failure = None;
        for id in waiting {
            let (this, agent) = (self.clone(), id.clone());
            let work = async move { this.store_pending_of(&agent).await };
            if let Err(error) = self.turn.take(work).await {
                self.some_wait.store(true, Ordering::SeqCst);
                // Others would fare no better, and each would hold up all who write.
                let hopeless = self.turn.link().is_away() || cannot_be_written(&error);
                failure = Some((id, error));
                if hopeless {
                    break;
                }
            }
        }
        if let Some((spiffe_id, error)) = failure {
            tracing::error!(%spiffe_id, %error, "Failed to store renewed SVIDs of agents; trying again");
        }
    }

    /// The agents to whom SVIDs were given out that are not stored yet.
    pub(crate) fn unstored(&self) -> HashSet<SpiffeId> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.iter().filter(|(_, node)| !node.pending.is_empty()).map(|(id, _)| id.clone()).collect()
    }

    /// Stores what was given out to one agent, from within a turn.
    async fn store_pending_of(&self, id: &SpiffeId) -> Result<(), StoreError> {
        let first = || self.with(id, |node| node.and_then(|node| node.pending.first().cloned()));
        if first().is_some() {
            // What another server stored meanwhile.
            let found = self.store.agent_rows(std::slice::from_ref(id)).await?;
            self.put_found(&found).await;
            if found.is_empty() {
                self.forget(std::slice::from_ref(id));
            }
        }
        while let Some(pending) = first() {
            if let Some(own) = &pending.own {
                self.note_use(id, own).await?;
            }
            if self.gives_way(id, &pending) {
                tracing::debug!(spiffe_id = %id, "A renewed SVID is stored when it is used: the agent got another one elsewhere");
            } else {
                match self.store.renew_node(id, &pending.follows, &pending.serial, pending.expires_at).await {
                    Ok(record) => self.put(&record),
                    Err(StoreError::NotFound) => self.forget(std::slice::from_ref(id)),
                    Err(error) => return Err(error),
                }
            }
            // Also where the agent is another by now.
            self.change(|map| {
                if let Some(node) = map.get_mut(id) {
                    node.pending.retain(|known| known.serial != pending.serial);
                }
            });
        }
        Ok(())
    }

    /// Whether the datastore has one that was given out beside this one, at another server, and may be what the agent holds:
    /// that one would be worth nothing with this in its place, while this one, if the agent shows it, says whom it follows.
    fn gives_way(&self, id: &SpiffeId, pending: &Pending) -> bool {
        let beside = |node: &Node| !node.new_serial.is_empty() && !pending.follows.contains(&node.new_serial);
        pending.own.is_some() && self.with(id, |node| node.is_some_and(beside))
    }
}
