//! Workloads and proxies that came before their entry, where the configuration lets them wait for it: for so long, and so many.

use super::{Caller, WorkloadApi};
use crate::cache::{View, ViewState};
use finial_config::WaitForEntry;
use finial_runtime::{Place, Places};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// As log lines say it.
const SUBSYSTEM: &str = "endpoints";

/// Who waits now, on whatever API. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Waiting {
    pub(crate) longest: Duration,
    /// By user ID.
    places: Arc<Places<u32>>,
}

impl Waiting {
    pub(crate) fn new(settings: WaitForEntry) -> Self {
        let WaitForEntry { longest, waiters_max } = settings;
        // One user must not be able to take all places.
        Self { longest, places: Places::new(waiters_max, waiters_max.div_ceil(2)) }
    }

    /// A place for the caller, unless there are too many.
    pub(crate) fn enter(&self, caller: &Caller) -> Option<Place<u32>> {
        let (pid, uid) = (caller.peer.pid, caller.peer.uid);
        // The agent asks itself whether it is well.
        if caller.is_agent() {
            return None;
        }
        let place = self.places.take(uid);
        if place.is_some() {
            tracing::debug!(subsystem_name = SUBSYSTEM, pid, "The workload waits for an entry");
        } else {
            let message = "Too many workloads wait for their entries; this one is refused";
            tracing::warn!(subsystem_name = SUBSYSTEM, pid, uid, "{message}");
        }
        place
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
        let entered =
            self.0.settings.waiting.as_ref().and_then(|waiting| Some((waiting.longest, waiting.enter(caller)?)));
        let Some((longest, _place)) = entered else { return Err(self.denied(caller, &view.selectors)) };
        let until = Instant::now() + longest;
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
