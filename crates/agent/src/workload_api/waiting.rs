//! Workloads that came before their entry, where the configuration lets them wait for it: for so long, and so many.

use super::{Caller, WorkloadApi};
use crate::cache::{View, ViewState};
use finial_config::WaitForEntry;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;
use tonic::Status;

/// As log lines say it.
const SUBSYSTEM: &str = "endpoints";

/// Who waits now.
pub(super) struct Waiting {
    settings: WaitForEntry,
    /// By user ID: one user must not be able to take all places.
    taken: Mutex<HashMap<u32, usize>>,
}

/// A place among those who wait; given back on drop.
struct Place<'a> {
    waiting: &'a Waiting,
    uid: u32,
}

impl Waiting {
    pub(super) fn new(settings: WaitForEntry) -> Self {
        Self { settings, taken: Mutex::default() }
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, uid: u32) -> Option<Place<'_>> {
        let mut taken = self.taken();
        let (all, own) = (taken.values().sum::<usize>(), taken.get(&uid).copied().unwrap_or_default());
        let places = self.settings.waiters_max;
        if all >= places || own >= places.div_ceil(2) {
            return None;
        }
        taken.insert(uid, own + 1);
        Some(Place { waiting: self, uid })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.waiting.taken();
        if let Some(count) = taken.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.uid);
            }
        }
    }
}

impl WorkloadApi {
    /// The caller's view as soon as there is `enough` in it; refused at once where nobody may wait.
    pub(super) async fn entitled(
        &self,
        caller: &Caller,
        mut view: Arc<View>,
        enough: impl Fn(&ViewState) -> bool,
    ) -> Result<Arc<View>, Status> {
        if enough(&view.now()) {
            return Ok(view);
        }
        // The agent asks itself whether it is well.
        let Some(waiting) = self.0.waiting.as_ref().filter(|_| !caller.is_agent()) else {
            return Err(self.denied(caller, &view.selectors));
        };
        let Some(_place) = waiting.enter(caller.peer.uid) else {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                pid = caller.peer.pid,
                uid = caller.peer.uid,
                "Too many workloads wait for their entries; this one is refused"
            );
            return Err(self.denied(caller, &view.selectors));
        };
        tracing::debug!(subsystem_name = SUBSYSTEM, pid = caller.peer.pid, "The workload waits for an entry");
        let until = Instant::now() + waiting.settings.longest;
        loop {
            let mut states = view.subscribe_states();
            let came = states.wait_for(|state| state.closed || enough(state));
            let Ok(came) = tokio::time::timeout_at(until, came).await else {
                return Err(self.denied(caller, &view.selectors));
            };
            if came.map_or(true, |state| state.closed) {
                return Err(Status::unavailable("the agent is shutting down"));
            }
            // Much may have happened to the process meanwhile.
            view = self.0.attestation.view(caller).await?;
            if enough(&view.now()) {
                return Ok(view);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn no_user_can_take_all_places_and_places_are_given_back() {
        let waiting = Waiting::new(WaitForEntry { longest: Duration::from_secs(1), waiters_max: 4 });
        let first = [waiting.enter(1).unwrap(), waiting.enter(1).unwrap()];
        assert!(waiting.enter(1).is_none(), "half of them");
        let second = [waiting.enter(2).unwrap(), waiting.enter(3).unwrap()];
        assert!(waiting.enter(4).is_none(), "full");
        drop(first);
        assert!(waiting.enter(4).is_some());
        drop(second);
        assert!(waiting.taken().is_empty());
        let one = Waiting::new(WaitForEntry { longest: Duration::from_secs(1), waiters_max: 1 });
        assert!(one.enter(1).is_some());
    }
}
