//! What the agent says of itself on its admin socket and to health checks.

use crate::svid::AgentSvid;
use finial_core::{EntryId, SpiffeId, UnixSeconds};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Refusals of the server that are remembered.
const REFUSALS_MAX: usize = 1_000;

/// Written by the sync loop, read by the admin API and the health checks.
#[derive(Default)]
pub(crate) struct AgentStatus {
    id: Mutex<Option<SpiffeId>>,
    chain: Mutex<Vec<Arc<[u8]>>>,
    last_sync: AtomicI64,
    started: AtomicBool,
    /// The server did not answer when it was asked last.
    away: AtomicBool,
    /// Why.
    away_because: Mutex<String>,
    /// Entries for which the server issued no SVID when it was asked last, and its words.
    refusals: Mutex<HashMap<EntryId, String>>,
    on_start: Notify,
}

impl AgentStatus {
    pub(crate) fn svid_changed(&self, svid: &AgentSvid) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = Some(svid.id.clone());
        *self.chain.lock().unwrap_or_else(PoisonError::into_inner) = svid.chain.clone();
    }

    /// The agent's ID, once it has an SVID.
    pub(crate) fn id(&self) -> Option<SpiffeId> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The agent's SVID, leaf first.
    pub(crate) fn chain(&self) -> Vec<Arc<[u8]>> {
        self.chain.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn synced(&self, now: UnixSeconds) {
        self.last_sync.store(now, Ordering::Relaxed);
        self.away.store(false, Ordering::Relaxed);
    }

    /// A sync failed; the last good one may have been in an earlier run.
    pub(crate) fn not_synced(&self, last_good: Option<UnixSeconds>) {
        if let Some(at) = last_good {
            self.last_sync.store(at, Ordering::Relaxed);
        }
        self.away.store(true, Ordering::Relaxed);
    }

    /// Why the server cannot be asked now.
    pub(crate) fn away_because(&self) -> Option<String> {
        let because = || self.away_because.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.is_away().then(because)
    }

    /// What went wrong with the server last.
    pub(crate) fn set_away_because(&self, error: String) {
        *self.away_because.lock().unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// The server answered for an entry: with an SVID, or why not.
    pub(crate) fn answered(&self, id: &EntryId, refusal: Option<String>) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        match refusal {
            None => drop(refusals.remove(id)),
            Some(text) => {
                if refusals.len() >= REFUSALS_MAX {
                    refusals.clear(); // those that matter come again
                }
                refusals.insert(id.clone(), text);
            }
        }
    }

    /// Why the server did not issue for this entry.
    pub(crate) fn refusal(&self, id: &EntryId) -> Option<String> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Whether workloads are served from what is known, without a server.
    pub(crate) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// When a sync succeeded last.
    pub(crate) fn last_sync(&self) -> UnixSeconds {
        self.last_sync.load(Ordering::Relaxed)
    }

    pub(crate) fn set_started(&self) {
        self.started.store(true, Ordering::Release);
        self.on_start.notify_one();
    }

    /// Whether the agent attested and its APIs listen.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Returns when the agent has started. For one waiter.
    pub(crate) async fn started(&self) {
        self.on_start.notified().await;
    }
}
