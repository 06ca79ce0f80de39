//! A start with what an earlier run left: workloads are served although no server answers, and what it says later is done then.

use crate::Context;
use crate::attest::Attested;
use crate::cache::{BundleForms, Change};
use crate::error::{AgentError, Verdict};
use crate::sealed::Restored;
use crate::sync::Syncer;
use finial_core::{Bundle, SpiffeId};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// As log lines say it.
const SUBSYSTEM: &str = "manager";
/// A server that is there answers within this time, and what was deleted meanwhile is never served. Workloads wait for it.
const GRACE: Duration = Duration::from_millis(400);

/// What is kept for the agent that begins. Not for one that attested just now: its server is there, and tells everything.
pub(crate) async fn load(context: &Arc<Context>, attested: &mut Attested) -> Option<Restored> {
    if !attested.kept {
        return None;
    }
    match attested.restored.take() {
        Some(restored) => Some(restored),
        None => read(context, &attested.svid.id).await,
    }
}

/// The same for an agent whose own SVID has expired: none if all else has, too.
pub(crate) async fn load_valid(context: &Arc<Context>, id: &SpiffeId) -> Option<Restored> {
    let restored = read(context, id).await?;
    let serves = !restored.svids.is_empty() || !restored.jwts.is_empty() || !restored.wits.is_empty();
    serves.then_some(restored)
}

async fn read(context: &Arc<Context>, id: &SpiffeId) -> Option<Restored> {
    let (for_load, id) = (context.clone(), id.clone());
    let loaded = context.spawner.blocking(move || for_load.sealed.load(&id, for_load.clock.now())).await;
    loaded.ok().flatten()
}

/// The bundle to begin with: `kept` has all of it, but X.509 roots are stored elsewhere at once when they change.
pub(crate) fn own_bundle(stored: Bundle, kept: Option<&Restored>) -> Result<Arc<BundleForms>, AgentError> {
    let mut bundle = stored;
    if let Some(own) = kept.and_then(|kept| kept.own.as_ref()) {
        let ders = |bundle: &Bundle| bundle.x509_authorities.iter().map(|a| a.der.clone()).collect::<Vec<_>>();
        if ders(&own.bundle) == ders(&bundle) {
            return Ok(own.clone());
        }
        let mut all = own.bundle.clone();
        for authority in &mut bundle.x509_authorities {
            authority.tainted = all.x509_authorities.iter().any(|known| known.der == authority.der && known.tainted);
        }
        all.x509_authorities = bundle.x509_authorities;
        bundle = all;
    }
    let forms = BundleForms::new(bundle);
    forms.map(Arc::new).map_err(|e| AgentError::internal(format!("invalid trust domain bundle: {e}")))
}

impl Syncer {
    /// Begins with what was kept, and with what a server says that answers at once. `false` when the agent was asked to end.
    pub(crate) async fn resume(&mut self, kept: Restored) -> Result<bool, AgentError> {
        let last_sync = kept.last_sync;
        let served = kept.svids.len();
        self.begin_with_own();
        self.publish_kept(kept);
        self.store().await;
        let shutdown = self.context.shutdown.clone();
        let attempt = tokio::time::timeout(GRACE, self.first_attempt());
        let result = tokio::select! {
            result = attempt => result,
            () = shutdown.cancelled() => return Ok(false),
        };
        match result {
            Ok(Ok(_)) => return Ok(true),
            // The loop would do the same; but nobody is to be served before.
            Ok(Err(error)) if error.verdict() == Verdict::Retry => {
                tracing::warn!(subsystem_name = SUBSYSTEM, %error, svids = served, "The server does not answer: serving what was kept, until it does");
            }
            Ok(Err(error)) => self.heed_at_start(&error).await?,
            Err(_) => {
                tracing::warn!(
                    subsystem_name = SUBSYSTEM,
                    svids = served,
                    "The server did not answer in time: serving what was kept, until it does"
                );
                self.link.release();
            }
        }
        self.status.not_synced(Some(last_sync));
        self.posted = false;
        self.first_sync = Some(Instant::now());
        Ok(true)
    }

    fn publish_kept(&mut self, kept: Restored) {
        let bundles = kept.bundles();
        let own = self.cache().snapshot().bundles.own.clone();
        let before = kept.own.clone().unwrap_or_else(|| own.clone());
        self.tainted_jwt_done = own.tainted_jwt();
        let bundles = bundles.map(|mut bundles| {
            bundles.own = own.clone();
            bundles
        });
        let entries = Some(kept.entries.into_values().collect());
        self.writer.publish(Change { entries, bundles, svids: kept.svids, ..Change::default() });
        let snapshot = self.cache().snapshot();
        for (id, at_ms) in kept.used {
            if let Some(record) = snapshot.record(&id) {
                record.last_used_ms.store(at_ms, Ordering::Relaxed);
            }
        }
        for (key, svid, asked_ms) in kept.jwts {
            self.cache().jwt.put(key, svid, asked_ms);
        }
        if self.context.settings.wit_svids_enabled {
            self.cache().wit.put(kept.wits, usize::MAX); // no more than the limit were kept
        }
        // The roots are stored at once, all else a moment later: an authority may be gone that is still in what was kept.
        self.leave_gone(&before, &own);
    }
}
