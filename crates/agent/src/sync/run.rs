//! The loop itself: what is due next, and what follows from how it went.

use super::pace::{Outcome, Pace};
use super::refused;
use super::watch::{Event, Watch};
use super::{SUBSYSTEM, Syncer};
use crate::cache::Cache;
use crate::error::{AgentError, ServerError, Verdict};
use crate::sync::client::ServerLink;
use finial_runtime::Backoff;
use std::time::Duration;
use tokio::time::Instant;

/// How often due renewals are looked for, also when syncs are rarer.
const TICK: Duration = Duration::from_secs(5);

/// What the loop wakes for.
enum Due {
    Sync,
    Tick,
    /// A workload waits for an SVID.
    Wanted,
    /// A workload's call was refused because of the agent's own SVID.
    Denied,
    /// Something of the stream.
    Told(Event),
}

/// When what is due.
struct Agenda {
    pace: Pace,
    svids: SvidPace,
    next_sync: Instant,
    next_tick: Instant,
    watch: Watch,
}

/// When SVIDs may be asked for: workloads that want some must not make us ask a server all the time that does not answer.
struct SvidPace {
    backoff: Backoff,
    /// After a failure: the next attempt.
    not_before: Option<Instant>,
}

impl SvidPace {
    fn new() -> Self {
        Self { backoff: refused::backoff(), not_before: None }
    }

    /// The server answered, or it failed to. To have asked nothing says nothing of it, and is not to come here.
    fn asked(&mut self, answered: bool) {
        if answered {
            self.backoff.reset();
        }
        self.not_before = (!answered).then(|| Instant::now() + self.backoff.next_wait());
    }

    /// `recent`: it was looked for them just now.
    fn is_due(&self, recent: bool) -> bool {
        self.not_before.map_or(!recent, |at| Instant::now() >= at)
    }
}

impl Agenda {
    /// Nothing is lost when this is dropped before.
    async fn next(&mut self, cache: &Cache, link: &ServerLink) -> Due {
        let not_before = self.svids.not_before;
        let wanted = async move {
            // A timer takes a millisecond even for what is over.
            if let Some(at) = not_before.filter(|at| Instant::now() < *at) {
                tokio::time::sleep_until(at).await;
            }
            cache.wanted().await;
        };
        tokio::select! {
            () = tokio::time::sleep_until(self.next_sync) => Due::Sync,
            () = tokio::time::sleep_until(self.next_tick) => Due::Tick,
            () = wanted => Due::Wanted,
            () = link.was_denied() => Due::Denied,
            event = self.watch.next() => Due::Told(event),
        }
    }

    /// The server is to be asked, as the stream does not tell.
    fn sync_soon(&mut self) {
        self.next_sync = self.next_sync.min(Instant::now() + self.pace.first());
    }

    /// Not later than `at`. What is over had its tick, and if nothing came of that it is nobody's any more.
    fn tick_by(&mut self, at: Option<Instant>) {
        let at = at.filter(|at| *at > Instant::now());
        self.next_tick = at.map_or(self.next_tick, |at| at.min(self.next_tick));
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
            svids: SvidPace::new(),
            next_tick: now,
            watch: Watch::new(self.link.generation()),
        };
        let (cache, link) = (self.cache().clone(), self.link.clone());
        let confirm = super::seen::confirm(self.link.clone(), self.seen.subscribe(), self.context.shutdown.clone());
        self.context.spawner.spawn("bundle-seen", confirm);
        loop {
            agenda.watch.follow(self.link.generation());
            let result = match agenda.next(&cache, &link).await {
                Due::Sync => self.sync(&mut agenda).await,
                Due::Tick => self.tick(&mut agenda).await?,
                Due::Wanted => {
                    let updated = self.update_svids().await;
                    if updated.is_ok() {
                        self.confirm();
                    }
                    updated
                }
                Due::Denied => {
                    match self.hasten_own() {
                        Some(at) => agenda.next_tick = agenda.next_tick.min(at),
                        None => agenda.sync_soon(),
                    }
                    continue;
                }
                Due::Told(event) => match self.told(event, &mut agenda).await {
                    Some(result) => result,
                    None => continue,
                },
            };
            match &result {
                Ok(true) => agenda.svids.asked(true),
                Ok(false) => {} // not tried
                Err(error) => {
                    self.status.set_away_because(error.to_string());
                    // Whatever is wrong with the connection, the next call has a new one.
                    self.link.release();
                    agenda.svids.asked(false);
                    self.heed(error).await?;
                }
            }
            agenda.tick_by(agenda.svids.not_before);
            agenda.tick_by(self.refused.again());
            agenda.tick_by(self.svids_due);
            agenda.tick_by(self.own_due());
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

    /// The agent's own SVID, and those of workloads whose time has come. Whether the server was asked for the latter.
    async fn tick(&mut self, agenda: &mut Agenda) -> Result<Result<bool, ServerError>, AgentError> {
        let (before, had_ended) = (self.svid.chain.first().cloned(), self.ended.is_some());
        let own = self.rotate_own().await;
        agenda.next_tick = Instant::now() + TICK;
        own?;
        if self.svid.chain.first() != before.as_ref() || (had_ended && self.ended.is_none()) {
            agenda.svids.not_before = None; // whatever failed before, it answers now
        }
        if agenda.watch.is_open() && self.own_is_valid().is_ok() {
            self.status.synced(self.context.clock.now());
        }
        self.cache().forget_idle_views();
        let recent = self.svids_updated.is_some_and(|at| at.elapsed() < TICK.mul_f64(0.9));
        let again = [self.refused.again(), self.svids_due].into_iter().flatten().any(|at| Instant::now() >= at);
        let due = agenda.svids.is_due(recent && !again);
        if !due {
            return Ok(Ok(false));
        }
        let updated = self.update_svids().await;
        if updated.is_ok() {
            self.confirm();
        }
        Ok(updated)
    }

    /// What came of the stream's event: whether the server answered; `None` if there was nothing to do.
    async fn told(&mut self, event: Event, agenda: &mut Agenda) -> Option<Result<bool, ServerError>> {
        match event {
            Event::Due => agenda.watch.open(self.link.watch(self.what_we_have())),
            Event::Opened => {
                tracing::debug!(subsystem_name = SUBSYSTEM, "The server tells of changes by itself");
                agenda.next_sync = Instant::now() + agenda.pace.told();
                if agenda.svids.not_before.is_some() {
                    // It is back.
                    agenda.svids.not_before = Some(Instant::now());
                    agenda.next_tick = Instant::now();
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// A server that is away for an hour, and workloads that want SVIDs all the time.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_fails_is_asked_ever_later_however_often_nothing_is_tried() {
        let mut svids = SvidPace::new();
        let (mut asked, begin) = (0, Instant::now());
        let mut last = begin;
        while begin.elapsed() < Duration::from_secs(3600) {
            if svids.is_due(last.elapsed() < TICK) {
                svids.asked(false);
                (asked, last) = (asked + 1, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        assert!((20..40).contains(&asked), "{asked}");
        svids.asked(true);
        assert!(svids.is_due(false) && !svids.is_due(true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_that_is_over_makes_no_tick_after_tick() {
        let (now, pace) = (Instant::now(), Pace::new(TICK));
        let (svids, watch) = (SvidPace::new(), Watch::new(0));
        let mut agenda = Agenda { pace, svids, next_sync: now, next_tick: now + TICK, watch };
        agenda.tick_by(Some(now));
        agenda.tick_by(None);
        assert_eq!(agenda.next_tick, now + TICK);
        agenda.tick_by(Some(now + TICK / 2));
        assert_eq!(agenda.next_tick, now + TICK / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_loop_wakes_at_its_next_look_or_when_the_first_svid_is_due_if_that_is_earlier() {
        let bundle = crate::cache::testing::bundle("td", &[]);
        let clock = Arc::new(finial_core::ManualClock::at(0));
        let (cache, _writer) = Cache::new(bundle, 1, clock);
        let link = ServerLink::new(|| tonic::transport::Channel::from_static("http://nobody").connect_lazy());
        for (due, look) in [(3_000, 5_000), (700, 200), (200, 5_000), (9_000, 5_000)] {
            let now = Instant::now();
            let after = |ms| now + Duration::from_millis(ms);
            let (pace, svids, mut watch) = (Pace::new(TICK), SvidPace::new(), Watch::new(0));
            watch.open(Box::pin(std::future::pending()));
            let mut agenda = Agenda { pace, svids, next_sync: after(60_000), next_tick: after(look), watch };
            agenda.tick_by(Some(after(due + 50)));
            agenda.tick_by(Some(after(due)));
            assert!(matches!(agenda.next(&cache, &link).await, Due::Tick));
            assert_eq!(Instant::now(), after(due.min(look)));
        }
    }
}
