//! The loop itself: what is due next, and what follows from how it went.

use super::pace::{Outcome, Pace};
use super::watch::{Event, Watch};
use super::{SUBSYSTEM, Syncer};
use crate::cache::Cache;
use crate::error::{AgentError, ServerError, Verdict};
use finial_runtime::Backoff;
use std::time::Duration;
use tokio::time::Instant;

/// After failing to get SVIDs, at first and at most.
const SVID_BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4 * 60));
/// How often due renewals are looked for, also when syncs are rarer.
const TICK: Duration = Duration::from_secs(5);

/// What the loop wakes for.
enum Due {
    Sync,
    Tick,
    /// A workload waits for an SVID.
    Wanted,
    /// Something of the stream.
    Told(Event),
}

/// When what is due.
struct Agenda {
    pace: Pace,
    svid_backoff: Backoff,
    next_sync: Instant,
    next_tick: Instant,
    svids_not_before: Instant,
    watch: Watch,
}

impl Agenda {
    /// Nothing is lost when this is dropped before.
    async fn next(&mut self, cache: &Cache) -> Due {
        let svids_not_before = self.svids_not_before;
        let wanted = async move {
            // A timer takes a millisecond even for what is over.
            if Instant::now() < svids_not_before {
                tokio::time::sleep_until(svids_not_before).await;
            }
            cache.wanted().await;
        };
        tokio::select! {
            () = tokio::time::sleep_until(self.next_sync) => Due::Sync,
            () = tokio::time::sleep_until(self.next_tick) => Due::Tick,
            () = wanted => Due::Wanted,
            event = self.watch.next() => Due::Told(event),
        }
    }

    /// The server is to be asked, as the stream does not tell.
    fn sync_soon(&mut self) {
        self.next_sync = self.next_sync.min(Instant::now() + self.pace.first());
    }

    /// The server would not give some: workloads that ask for them must not make us ask all the time.
    fn svids_later(&mut self) {
        self.svids_not_before = Instant::now() + self.svid_backoff.next_wait();
        self.next_tick = self.next_tick.min(self.svids_not_before);
    }
}

impl Syncer {
    /// Runs until it fails or is dropped.
    pub(crate) async fn run(mut self) -> Result<(), AgentError> {
        let mut pace = Pace::new(self.context.settings.sync_interval);
        let now = Instant::now();
        let mut agenda = Agenda {
            next_sync: self.first_sync.unwrap_or_else(|| now + pace.first()),
            pace,
            svid_backoff: Backoff::new(SVID_BACKOFF.0, SVID_BACKOFF.1).shape(1.5, 0.1),
            next_tick: now,
            svids_not_before: now,
            watch: Watch::new(self.link.generation()),
        };
        let cache = self.cache().clone();
        loop {
            agenda.watch.follow(self.link.generation());
            let result = match agenda.next(&cache).await {
                Due::Sync => self.sync(&mut agenda).await,
                Due::Tick => self.tick(&mut agenda).await?,
                Due::Wanted => self.update_svids().await,
                Due::Told(event) => match self.told(event, &mut agenda).await {
                    Some(result) => result,
                    None => continue,
                },
            };
            match &result {
                Ok(true) => {
                    agenda.svid_backoff.reset();
                    agenda.svids_not_before = Instant::now();
                }
                Ok(false) => agenda.svids_later(),
                Err(error) => {
                    self.status.set_away_because(error.to_string());
                    // Whatever is wrong with the connection, the next call has a new one.
                    self.link.release();
                    agenda.svids_later();
                    self.heed(error).await?;
                }
            }
        }
    }

    async fn sync(&mut self, agenda: &mut Agenda) -> Result<bool, ServerError> {
        let result = self.synchronize().await;
        let wait = agenda.pace.after(self.outcome(&result));
        let told = agenda.watch.is_open() && result.is_ok();
        agenda.next_sync = Instant::now() + if told { agenda.pace.told() } else { wait };
        self.renew_if_tainted(agenda);
        result.inspect_err(log_failed)
    }

    /// The agent's own SVID, and those of workloads whose time has come.
    async fn tick(&mut self, agenda: &mut Agenda) -> Result<Result<bool, ServerError>, AgentError> {
        let own = self.rotate_own().await;
        agenda.next_tick = Instant::now() + TICK;
        own?;
        if agenda.watch.is_open() {
            self.status.synced(self.context.clock.now());
        }
        self.cache().forget_idle_views();
        let recent = self.svids_updated.is_some_and(|at| at.elapsed() < TICK.mul_f64(0.9));
        let early = recent || Instant::now() < agenda.svids_not_before;
        Ok(if early { Ok(true) } else { self.update_svids().await })
    }

    /// What came of the stream's event; `None` if there was nothing to do.
    async fn told(&mut self, event: Event, agenda: &mut Agenda) -> Option<Result<bool, ServerError>> {
        match event {
            Event::Due => agenda.watch.open(self.link.watch(self.what_we_have())),
            Event::Opened => {
                tracing::debug!(subsystem_name = SUBSYSTEM, "The server tells of changes by itself");
                agenda.next_sync = Instant::now() + agenda.pace.told();
            }
            Event::Answer(answer) => {
                let result = self.take_answer(*answer).await;
                if result.is_err() {
                    // Another stream tells it again, and would fail again at once.
                    agenda.watch.lost();
                    agenda.sync_soon();
                }
                self.renew_if_tainted(agenda);
                return Some(result.inspect_err(log_failed));
            }
            Event::Ended => agenda.sync_soon(),
            Event::Failed(error) => {
                agenda.sync_soon();
                if !matches!(error.verdict(), Verdict::Retry | Verdict::UnknownAuthority) {
                    return Some(Err(error));
                }
                tracing::info!(subsystem_name = SUBSYSTEM, %error, "The server does not tell of changes now; asking for them meanwhile");
            }
        }
        None
    }

    fn renew_if_tainted(&self, agenda: &mut Agenda) {
        if self.svid.is_tainted(&self.tainted) || self.own_is_due() {
            agenda.next_tick = Instant::now();
        }
    }

    fn outcome(&self, result: &Result<bool, ServerError>) -> Outcome {
        match result {
            Ok(_) => Outcome::Synced { empty: self.cache().snapshot().svid_count() == 0 },
            Err(error) if error.verdict() == Verdict::UnknownAuthority => Outcome::UnknownAuthority,
            Err(_) => Outcome::Failed,
        }
    }
}

fn log_failed(error: &ServerError) {
    tracing::error!(subsystem_name = SUBSYSTEM, %error, "Synchronize failed");
}
