//! Renewed SVIDs: given out, stored, used; also while the datastore is away. See docs/adr/0008.

use super::node::{Node, Pending};
use super::{Nodes, Standing};
use finial_core::{ErrorKind, SpiffeId, UnixSeconds};
use finial_store::StoreError;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long a call waits for the datastore to note that a renewed SVID is in use, before it goes on without.
const NOTE_MAX: Duration = Duration::from_secs(3);

/// What became of a renewed SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It is stored, and can be given out.
    Stored,
    /// The datastore is away. An SVID that says which ones it follows can be given out in its place: see
    /// [`Nodes::renew_without_datastore`].
    DatastoreAway,
    /// The agent is another by now: evicted, banned, or attested again.
    Superseded,
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
            if this.standing(&agent, &serial, &[]) != Standing::Renewed {
                return Ok(()); // another call of the same agent was first; or it was banned, which the next call sees
            }
            let record = this.store.promote_serial(&agent, &serial).await?;
            this.put(&record);
            Ok(())
        };
        match tokio::time::timeout(NOTE_MAX, self.turn.take(work)).await {
            Ok(Err(error)) if error.kind() == ErrorKind::Unavailable => {
                tracing::debug!(spiffe_id = %id, %error, "The use of a renewed SVID is noted later");
                Ok(())
            }
            Ok(result) => result,
            Err(_) => Ok(()),
        }
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
        let work = async move {
            // Since it was let in, the agent may have been evicted and attested again, which is another one.
            if !this.serials(&id).is_some_and(|serials| serials.iter().any(|known| **known == *own)) {
                return Ok(Renewal::Superseded);
            }
            // Its first use may wait to be noted; the next number would take its place.
            if this.standing(&id, &own, &[]) == Standing::Renewed {
                this.put(&this.store.promote_serial(&id, &own).await?);
            }
            // What was given out before has to be there first: the agent uses it now.
            this.store_pending_of(&id).await?;
            let Some(follows) = this.serials(&id) else { return Ok(Renewal::Superseded) };
            let record = this.store.renew_node(&id, &follows, &serial, expires_at).await?;
            this.put(&record);
            Ok(if record.new_serial_number == serial { Renewal::Stored } else { Renewal::Superseded })
        };
        match self.turn.take(work).await {
            Err(error) if error.kind() == ErrorKind::Unavailable && self.turn.link().is_followed() => {
                tracing::warn!(%error, "An agent's SVID is renewed without the datastore");
                Ok(Renewal::DatastoreAway)
            }
            result => result,
        }
    }

    /// The serial numbers of a renewable agent that is not banned, which its next SVID follows.
    pub fn serials(&self, id: &SpiffeId) -> Option<Box<[Box<str>]>> {
        self.with(id, |node| node.filter(|node| !node.is_banned()).map(Node::serials))
    }

    /// Takes note of an SVID that is given out while the datastore is away; it is stored when that is back. `false` when
    /// the agent is another by now.
    pub fn renew_without_datastore(
        &self,
        id: &SpiffeId,
        follows: Box<[Box<str>]>,
        serial: &str,
        expires_at: UnixSeconds,
    ) -> bool {
        self.change(|map| match map.get_mut(id) {
            Some(node) if !node.is_banned() && follows.contains(&node.serial) => {
                node.add_pending(Pending { serial: serial.into(), expires_at, follows });
                self.some_wait.store(true, Ordering::SeqCst);
                true
            }
            _ => false,
        })
    }

    /// Another server gave this SVID out while the datastore was away: it is as good as if it had been given out here, and
    /// is stored from here if the other has not done so.
    pub async fn adopt(self: &Arc<Self>, id: &SpiffeId, serial: &str, expires_at: UnixSeconds, follows: &[Box<str>]) {
        if !self.renew_without_datastore(id, follows.into(), serial, expires_at) || self.turn.link().is_away() {
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
        let waiting: Vec<SpiffeId> = {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            map.iter().filter(|(_, node)| !node.pending.is_empty()).map(|(id, _)| id.clone()).collect()
        };
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
                failure = Some((id, error));
                if self.turn.link().is_away() {
                    break;
                }
            }
        }
        if let Some((spiffe_id, error)) = failure {
            tracing::error!(%spiffe_id, %error, "Failed to store renewed SVIDs of agents; trying again");
        }
    }

    /// The same for one agent, from within a turn.
    async fn store_pending_of(&self, id: &SpiffeId) -> Result<(), StoreError> {
        while let Some(pending) = self.with(id, |node| node.and_then(|node| node.pending.first().cloned())) {
            // Of several, each but the last was used already.
            if let Some(used) = self.with(id, |node| node.map(|node| node.new_serial.clone()))
                && !used.is_empty()
                && pending.follows.contains(&used)
            {
                let record = self.store.promote_serial(id, &used).await?;
                self.put(&record);
            }
            match self.store.renew_node(id, &pending.follows, &pending.serial, pending.expires_at).await {
                Ok(record) => self.put(&record),
                Err(StoreError::NotFound) => self.forget(std::slice::from_ref(id)),
                Err(error) => return Err(error),
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
}
