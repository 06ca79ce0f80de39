//! What is removed when its time has passed: entries, join tokens, agents, events, authorities in the bundle, journals.

use crate::entries::Turn;
use crate::publish::BundleFeed;
use finial_core::{Clock, EntryId, ErrorKind, SpiffeId, UnixSeconds};
use finial_runtime::{Metrics, Shutdown};
use finial_store::{Store, StoreError};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 24 * HOUR_SECONDS;

/// Authorities stay in the bundle this long after they expired.
const BUNDLE_GRACE_SECONDS: i64 = DAY_SECONDS;
/// Journals stay this long after their last authority expired.
const JOURNAL_GRACE_SECONDS: i64 = 14 * DAY_SECONDS;
/// Join tokens stay this long after they expired, so that who comes late is told that.
const TOKEN_GRACE_SECONDS: i64 = DAY_SECONDS;
/// How long one job may take.
const JOB_DEADLINE: Duration = Duration::from_secs(120);
/// Wall clock and elapsed time may differ this much between two looks; more means that the clock was set.
const CLOCK_JUMP_MAX_MS: i64 = 10 * 60 * 1000;

/// How long after the datastore was away no agents are removed: nobody could store their renewals meanwhile, and a server
/// that holds some that are not stored may be another one, or have died, so that the agent has to call first.
const AGENTS_GRACE: Duration = Duration::from_secs(10 * 60);

/// Who must hear what was removed, so that nothing in memory outlives it.
pub trait PruneListener: Send + Sync {
    /// These entries are gone; perhaps none.
    fn entries_pruned(&self, ids: &[EntryId]);
    /// These agents are gone; perhaps none.
    fn agents_pruned(&self, ids: &[SpiffeId]);
    /// Agents that must stay, whatever the datastore says of their SVIDs: it does not know of all.
    fn agents_in_use(&self) -> HashSet<SpiffeId>;
}

/// What is removed and when. Durations are seconds.
#[derive(Clone, Debug)]
pub struct PruneSettings {
    /// Events older than this go; looked at twice in that time.
    pub events_older_than_seconds: i64,
    /// Agents, if at all.
    pub agents: Option<finial_config::PruneAgentsSettings>,
}

impl PruneSettings {
    /// From the server's settings.
    pub fn of(settings: &finial_config::ServerSettings) -> Self {
        let events = settings.events.prune_events_older_than.as_secs();
        Self {
            events_older_than_seconds: i64::try_from(events).unwrap_or(i64::MAX),
            agents: settings.prune_agents.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Entries,
    JoinTokens,
    Agents,
    Events,
    Bundle,
    Journals,
}

impl Job {
    const ALL: [Self; 6] = [Self::Entries, Self::JoinTokens, Self::Agents, Self::Events, Self::Bundle, Self::Journals];
}

/// When each job is due.
struct Agenda {
    due: Vec<(Instant, Job)>,
    /// Elapsed time and wall clock (milliseconds) at the last look.
    seen: (Instant, i64),
}

impl Agenda {
    fn new(interval: impl Fn(Job) -> Duration, now: Instant, wall_ms: i64) -> Self {
        let due = Job::ALL.into_iter().map(|job| (now + interval(job), job)).collect();
        Self { due, seen: (now, wall_ms) }
    }

    /// What is to be done now. A round right after the wall clock was set is left out: a clock that was wrong for a minute
    /// must not cost what is still in use. `away` is when the datastore was that last.
    fn next(
        &mut self,
        interval: impl Fn(Job) -> Duration,
        now: Instant,
        wall_ms: i64,
        away: Option<Instant>,
    ) -> Vec<Job> {
        let jumped = self.clock_jumped(now, wall_ms);
        let agents_not_before = away.map_or(now, |away| away + AGENTS_GRACE);
        let mut jobs = Vec::new();
        for (at, job) in self.due.iter_mut().filter(|(at, _)| *at <= now) {
            if *job == Job::Agents && agents_not_before > now {
                *at = agents_not_before;
                continue;
            }
            *at = now + interval(*job);
            if jumped {
                tracing::warn!(job = ?job, "The clock was set; pruning is left out this time");
                continue;
            }
            jobs.push(*job);
        }
        jobs
    }

    /// Whether the wall clock went another way than elapsed time since the last look.
    fn clock_jumped(&mut self, now: Instant, wall_ms: i64) -> bool {
        let elapsed_ms = i64::try_from(now.duration_since(self.seen.0).as_millis()).unwrap_or(i64::MAX);
        let drift = wall_ms.saturating_sub(self.seen.1).saturating_sub(elapsed_ms);
        self.seen = (now, wall_ms);
        drift.saturating_abs() > CLOCK_JUMP_MAX_MS
    }
}

/// Removes what has expired.
pub struct Pruner {
    settings: PruneSettings,
    store: Store,
    turn: Turn,
    feed: Arc<BundleFeed>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    listener: Arc<dyn PruneListener>,
    agents_every: Duration,
}

impl Pruner {
    /// Works on `store`, in turn with all who change entries and agents; the feed and the listener hear of what goes.
    pub fn new(
        settings: PruneSettings,
        store: Store,
        turn: Turn,
        feed: Arc<BundleFeed>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        listener: Arc<dyn PruneListener>,
    ) -> Self {
        // An hour, give or take a quarter, so that servers on one database do not prune together.
        let jitter = u64::from(u16::from_le_bytes(finial_crypto::random_bytes::<2>())) % (30 * 60);
        let agents_every = Duration::from_secs(45 * 60 + jitter);
        Self { settings, store, turn, feed, clock, metrics, listener, agents_every }
    }

    fn interval(&self, job: Job) -> Duration {
        match job {
            Job::Entries | Job::JoinTokens => 5 * MINUTE,
            Job::Agents => self.agents_every,
            Job::Events => {
                let seconds = u64::try_from(self.settings.events_older_than_seconds / 2).unwrap_or_default();
                Duration::from_secs(seconds.max(1))
            }
            Job::Bundle => 6 * 60 * MINUTE,
            Job::Journals => 8 * 60 * MINUTE,
        }
    }

    /// Runs every job at its interval until shutdown.
    pub async fn run(self, shutdown: Shutdown) {
        let interval = |job| self.interval(job);
        let mut agenda = Agenda::new(interval, Instant::now(), self.clock.now_ms());
        let mut tick = tokio::time::interval(MINUTE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tick.tick() => {}
            }
            let away = self.turn.link().last_away();
            for job in agenda.next(interval, Instant::now(), self.clock.now_ms(), away) {
                self.run_job(job).await;
            }
        }
    }

    async fn run_job(&self, job: Job) {
        let now = self.clock.now();
        match tokio::time::timeout(JOB_DEADLINE, self.job(job, now)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => match job {
                Job::Entries => tracing::error!(%error, "Failed pruning registration entries"),
                Job::Agents => tracing::error!(%error, "Failed pruning expired attested nodes"),
                Job::Bundle => tracing::error!(%error, "Could not prune CA certificates"),
                Job::Journals => tracing::error!(%error, "Could not prune CA journals"),
                Job::Events => tracing::error!(%error, "Failed to prune events"),
                Job::JoinTokens => tracing::error!(%error, "Failed to prune join tokens"),
            },
            Err(_) => tracing::error!(job = ?job, seconds = JOB_DEADLINE.as_secs(), "Pruning took too long"),
        }
    }

    async fn job(&self, job: Job, now: UnixSeconds) -> Result<(), StoreError> {
        match job {
            Job::Entries => self.measured("registration_entry.manager.prune", self.entries(now)).await,
            Job::JoinTokens => self.store.prune_join_tokens(now - TOKEN_GRACE_SECONDS).await.map(drop),
            Job::Agents => self.measured("node.manager.prune", self.agents(now)).await,
            Job::Events => self.store.prune_events(now - self.settings.events_older_than_seconds).await.map(drop),
            Job::Bundle => self.measured("ca.manager.bundle.prune", self.bundle(now)).await,
            Job::Journals => self.store.prune_ca_journals(now - JOURNAL_GRACE_SECONDS).await.map(drop),
        }
    }

    async fn measured(
        &self,
        key: &'static str,
        job: impl Future<Output = Result<(), StoreError>>,
    ) -> Result<(), StoreError> {
        let call = self.metrics.call(key);
        let result = job.await;
        call.finish_with(&result, |e: &StoreError| -> ErrorKind { e.kind() });
        result
    }

    /// Removal and the news of it are one turn: an entry that comes back under the same ID comes after both.
    async fn entries(&self, now: UnixSeconds) -> Result<(), StoreError> {
        let (store, listener) = (self.store.clone(), self.listener.clone());
        let work = async move {
            let gone = store.prune_entries(now).await?;
            listener.entries_pruned(&gone);
            Ok(())
        };
        self.turn.take(work).await
    }

    async fn agents(&self, now: UnixSeconds) -> Result<(), StoreError> {
        let Some(agents) = self.settings.agents.clone() else { return Ok(()) };
        let expired_for = i64::try_from(agents.expired_for.as_secs()).unwrap_or(i64::MAX);
        let before = now.saturating_sub(expired_for);
        let (store, listener) = (self.store.clone(), self.listener.clone());
        let work = async move {
            let keep = listener.agents_in_use();
            let (gone, aliases) = store.prune_nodes(before, agents.non_reattestable, agents.batch_size, &keep).await?;
            listener.agents_pruned(&gone);
            listener.entries_pruned(&aliases);
            Ok(())
        };
        self.turn.take(work).await
    }

    async fn bundle(&self, now: UnixSeconds) -> Result<(), StoreError> {
        let before = now - BUNDLE_GRACE_SECONDS;
        let begun = self.feed.history();
        if let Some(bundle) = self.store.prune_bundle(self.feed.trust_domain(), before).await? {
            self.metrics.count("ca.manager.bundle.pruned", 1.0, &[]);
            tracing::debug!("Expired certificates were successfully pruned from bundle");
            self.feed.publish_since(begun, bundle);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "prune_tests.rs"]
mod tests;
