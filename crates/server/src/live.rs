//! What can change while the server runs: the settings that a reload replaces.

use finial_config::{FederatesWith, RateLimitSettings, ServerSettings};
use finial_core::{SpiffeId, TrustDomain};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// The settings of a server that a reload may change; all others need a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// `admin_ids`.
    pub admin_ids: Vec<SpiffeId>,
    /// `ratelimit`.
    pub rate_limit: RateLimitSettings,
    /// `federation { federates_with }`.
    pub federates_with: BTreeMap<TrustDomain, FederatesWith>,
}

impl Live {
    /// What of these settings may change later.
    pub fn of(settings: &ServerSettings) -> Self {
        Self {
            admin_ids: settings.admin_ids.clone(),
            rate_limit: settings.rate_limit,
            federates_with: settings.federation.federates_with.clone(),
        }
    }
}

/// The live settings in force, shared by those who read them and the one who reloads them.
#[derive(Clone, Debug)]
pub struct LiveSettings(Arc<watch::Sender<Arc<Live>>>);

impl LiveSettings {
    /// Beginning with these.
    pub fn new(live: Live) -> Self {
        Self(Arc::new(watch::Sender::new(Arc::new(live))))
    }

    /// Those in force now.
    pub fn now(&self) -> Arc<Live> {
        self.0.borrow().clone()
    }

    /// For a task that acts on changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Live>> {
        self.0.subscribe()
    }

    /// Puts other settings in force, for every call from now on. Returns whether anything is different.
    pub fn set(&self, live: Live) -> bool {
        self.0.send_if_modified(|now| {
            let differs = **now != live;
            if differs {
                *now = Arc::new(live);
            }
            differs
        })
    }
}
