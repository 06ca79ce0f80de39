//! Follows what others write into the same database, so that memory stays what the datastore holds.
//!
//! Once a second, and whenever somebody tells that there is something new, one statement looks at everything that may
//! have changed ([`Beat`]). Events are read in the order of their numbers, numbers that were skipped are watched until it
//! is certain what became of them ([`tracker`]), and what an event names is read again and set, whatever it was before.
//! So it does no harm to read an event twice, and none of the servers' clocks matters. See docs/adr/0006.

mod link;
mod memory;
pub mod tracker;

pub use link::Link;
pub use memory::Known;

use async_trait::async_trait;
use finial_core::{EntryId, SpiffeId};
use finial_runtime::Shutdown;
use finial_store::{Beat, Event, EventFeed, EventsSeen, Feed, Listener, Span, Standpoint, StoreError};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tracker::Tracker;

/// How often it is looked without being told.
const EVERY: Duration = Duration::from_secs(1);
/// How long to wait between two looks even when told: what comes meanwhile is read together.
const APART: Duration = Duration::from_millis(20);
/// How long a look may take before the datastore counts as away.
const LOOK_MAX: Duration = Duration::from_secs(10);
/// How many events are read at once.
const PAGE: u32 = 2000;
/// How many skipped spans are looked at in one statement.
const GAPS_A_LOOK: usize = 500;
/// With more gaps than this something is odd, and reading everything again is cheaper.
const GAPS_MAX: usize = 100_000;
/// After an outage of this length a table without events may have lost some that were never read.
const FORGETFUL: Duration = Duration::from_secs(60);
/// How long a caller waits for memory to be as new as its call.
const CATCH_UP_MAX: Duration = Duration::from_secs(5);

/// The database that is followed.
#[async_trait]
pub trait Source: Send + Sync {
    /// See [`Feed::beat`].
    async fn beat(&self, entries: &[Span], agents: &[Span]) -> Result<Beat, StoreError>;
    /// See [`Feed::events_after`].
    async fn events_after(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError>;
    /// See [`Feed::events_within`].
    async fn events_within(&self, feed: EventFeed, spans: &[Span]) -> Result<Vec<Event>, StoreError>;
    /// See [`Feed::mark`].
    async fn mark(&self) -> Result<u64, StoreError>;
    /// See [`Feed::standpoint`].
    async fn standpoint(&self, feed: EventFeed) -> Result<Standpoint, StoreError>;
    /// See [`Feed::listen`].
    async fn listen(&self) -> Result<Option<Listener>, StoreError>;
}

#[async_trait]
impl Source for Feed {
    async fn beat(&self, entries: &[Span], agents: &[Span]) -> Result<Beat, StoreError> {
        Feed::beat(self, entries, agents).await
    }
    async fn events_after(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        Feed::events_after(self, feed, after, limit).await
    }
    async fn events_within(&self, feed: EventFeed, spans: &[Span]) -> Result<Vec<Event>, StoreError> {
        Feed::events_within(self, feed, spans).await
    }
    async fn mark(&self) -> Result<u64, StoreError> {
        Feed::mark(self).await
    }
    async fn standpoint(&self, feed: EventFeed) -> Result<Standpoint, StoreError> {
        Feed::standpoint(self, feed).await
    }
    async fn listen(&self) -> Result<Option<Listener>, StoreError> {
        Feed::listen(self).await
    }
}

/// What is kept current.
#[async_trait]
pub trait Memory: Send + Sync {
    /// These entries are to be read again; some may be gone.
    async fn entries_changed(&self, ids: Vec<EntryId>) -> Result<(), StoreError>;
    /// These agents are to be read again; some may be gone.
    async fn agents_changed(&self, ids: Vec<SpiffeId>) -> Result<(), StoreError>;
    /// All bundles are to be read again.
    async fn bundles_changed(&self) -> Result<(), StoreError>;
    /// There are orders to rotate authorities.
    fn orders_changed(&self) {}
    /// All entries and agents are to be compared with the datastore; nothing that is known may count as newer than it.
    async fn compare_all(&self) -> Result<(), StoreError>;
    /// The datastore answers again: what waits for it can be written. Returns at once, as looks wait for this.
    fn datastore_is_back(&self);
}

/// How far the database was followed.
#[derive(Debug)]
pub struct State {
    history: String,
    entries: Tracker,
    agents: Tracker,
    bundles: String,
    federation: String,
    rotations: String,
    /// When the last look went well.
    last_look: Instant,
    /// Something was missed, or may have been: everything has to be compared.
    astray: bool,
}

impl State {
    /// Where the database stands. Whoever reads everything after this and goes on from it misses nothing.
    pub async fn now(source: &dyn Source) -> Result<Self, StoreError> {
        let beat = source.beat(&[], &[]).await?;
        let tracker = |at: Standpoint| Tracker::new(at.last, at.skipped);
        Ok(Self {
            entries: tracker(source.standpoint(EventFeed::Entries).await?),
            agents: tracker(source.standpoint(EventFeed::Nodes).await?),
            history: beat.history,
            bundles: beat.bundles,
            federation: beat.federation,
            rotations: beat.rotations,
            last_look: Instant::now(),
            astray: false,
        })
    }

    /// Whether what happened since the last look can no longer be told from the events.
    fn lost_track(&self, beat: &Beat, was_away: bool) -> Option<&'static str> {
        let away_for = self.last_look.elapsed();
        let odd = |seen: &EventsSeen, tracker: &Tracker| {
            let last = tracker.last();
            if seen.last != 0 && seen.last < last {
                Some("events that were read are gone")
            } else if (last != 0 || away_for > FORGETFUL) && seen.first > last + 1 {
                Some("events were pruned before they were read")
            } else if last != 0 && seen.last == 0 && away_for > FORGETFUL {
                Some("events may have been pruned before they were read")
            } else if tracker.gap_count() > GAPS_MAX {
                Some("too many events are missing")
            } else {
                None
            }
        };
        if self.astray {
            Some("it was not finished the last time")
        } else if beat.history != self.history {
            Some("it is another database, or another history of the same")
        } else if was_away && beat.history.is_empty() {
            Some("the database was away, and does not tell whether it is still the same")
        } else {
            odd(&beat.entries, &self.entries).or_else(|| odd(&beat.agents, &self.agents))
        }
    }
}

/// Follows a database.
pub struct Follower {
    source: Arc<dyn Source>,
    memory: Arc<dyn Memory>,
    link: Arc<Link>,
    state: Mutex<State>,
    federation: watch::Sender<u64>,
}

impl Follower {
    /// Goes on from `state`, after which all that `memory` holds was read.
    pub fn new(source: Arc<dyn Source>, memory: Arc<dyn Memory>, link: Arc<Link>, state: State) -> Arc<Self> {
        link.set_followed();
        Arc::new(Self { source, memory, link, state: Mutex::new(state), federation: watch::Sender::new(0) })
    }

    /// Tells of each change of a federation relationship, whoever made it; the number only grows.
    pub fn federation_changes(&self) -> watch::Receiver<u64> {
        self.federation.subscribe()
    }

    /// Follows until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.look_for_ever() => {}
            () = self.listen_for_ever() => {}
        }
    }

    async fn look_for_ever(&self) {
        loop {
            tokio::time::sleep(APART).await;
            let _ = tokio::time::timeout(EVERY - APART, self.link.woken()).await;
            let mut state = self.state.lock().await;
            self.look(&mut state).await;
        }
    }

    /// Wakes the follower when somebody has written. A connection that died is made again after each outage.
    async fn listen_for_ever(&self) {
        loop {
            match self.source.listen().await {
                Ok(None) => return std::future::pending().await,
                Ok(Some(mut listener)) => {
                    self.link.wake(); // for what was told before
                    tokio::select! {
                        _ = self.link.lost() => {}
                        () = async { while listener.heard().await { self.link.wake() } } => {}
                    }
                }
                Err(error) => tracing::debug!(%error, "Cannot listen for changes; looking once a second"),
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    /// Makes sure that memory knows all that was committed when this was called. `false` when the datastore does not
    /// tell, and then memory is as good as it gets.
    pub async fn catch_up(&self) -> bool {
        if self.link.is_away() {
            return false;
        }
        let begun = self.link.looks_begun();
        let work = async {
            let mut state = self.state.lock().await;
            // One that began after the call is as good as one of its own.
            self.link.last_well() > begun || self.look(&mut state).await
        };
        tokio::time::timeout(CATCH_UP_MAX, work).await.unwrap_or(false)
    }

    /// Looks once, and says whether that went well.
    async fn look(&self, state: &mut State) -> bool {
        let nth = self.link.begin_look();
        let beat = match self.beat(state).await {
            Ok(beat) => beat,
            // A connection that was cut is no outage yet.
            Err(_) if !self.link.is_away() => match self.beat(state).await {
                Ok(beat) => beat,
                Err(error) => return self.away(&error),
            },
            Err(error) => return self.away(&error),
        };
        // Before a comparison of all begins the state anew.
        let (was_away, last_look) = (self.link.is_away(), state.last_look);
        if let Err(error) = self.follow(state, beat, was_away).await {
            if error.leaves_doubt() {
                return self.away(&error);
            }
            tracing::error!(%error, "Failed to follow the changes in the datastore; trying again");
            return false;
        }
        if self.link.set_back() {
            let seconds = last_look.elapsed().as_secs();
            tracing::info!(seconds, "The datastore answers again");
            self.memory.datastore_is_back();
        }
        state.last_look = Instant::now();
        self.link.went_well(nth);
        true
    }

    fn away(&self, error: &StoreError) -> bool {
        if self.link.set_away(error) {
            tracing::error!(%error, "The datastore cannot be reached: answering and signing from memory, writes are refused");
        } else {
            tracing::debug!(%error, "The datastore still cannot be reached");
        }
        false
    }

    async fn beat(&self, state: &State) -> Result<Beat, StoreError> {
        let (entries, agents) = (state.entries.gaps(GAPS_A_LOOK), state.agents.gaps(GAPS_A_LOOK));
        match tokio::time::timeout(LOOK_MAX, self.source.beat(&entries, &agents)).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Unavailable {
                what: "the database".into(),
                detail: format!("does not answer within {} s", LOOK_MAX.as_secs()),
                advice: "check its load, its locks and the network to it",
            }),
        }
    }

    async fn follow(&self, state: &mut State, beat: Beat, was_away: bool) -> Result<(), StoreError> {
        if let Some(reason) = state.lost_track(&beat, was_away) {
            tracing::warn!(reason, "Comparing all entries, agents and bundles with the datastore");
            state.astray = true;
            let now = State::now(&*self.source).await?;
            self.memory.compare_all().await?;
            self.memory.bundles_changed().await?;
            self.federation.send_modify(|n| *n += 1);
            self.memory.orders_changed();
            *state = now;
            return Ok(());
        }
        self.events(EventFeed::Nodes, &mut state.agents, beat.agents, beat.horizon).await?;
        self.events(EventFeed::Entries, &mut state.entries, beat.entries, beat.horizon).await?;
        if beat.bundles != state.bundles {
            self.memory.bundles_changed().await?;
            state.bundles = beat.bundles;
        }
        if beat.federation != state.federation {
            self.federation.send_modify(|n| *n += 1);
            state.federation = beat.federation;
        }
        if beat.rotations != state.rotations {
            self.memory.orders_changed();
            state.rotations = beat.rotations;
        }
        Ok(())
    }

    /// What is read is applied before the tracker hears of it, so that a failure in between costs nothing.
    async fn events(
        &self,
        feed: EventFeed,
        tracker: &mut Tracker,
        seen: EventsSeen,
        horizon: u64,
    ) -> Result<(), StoreError> {
        if tracker.gap_count() > 0 {
            let gaps = tracker.gaps(GAPS_A_LOOK);
            let late = if seen.within > 0 { self.source.events_within(feed, &gaps).await? } else { Vec::new() };
            self.apply(feed, &late).await?;
            tracker.looked(GAPS_A_LOOK, &numbers(&late), horizon);
        }
        let mut more = seen.last > tracker.last();
        while more {
            let next = self.source.events_after(feed, tracker.last(), PAGE).await?;
            self.apply(feed, &next).await?;
            tracker.read(&numbers(&next));
            more = u32::try_from(next.len()).is_ok_and(|count| count >= PAGE);
        }
        if tracker.wants_mark() {
            // Without one (a database that is read-only) the gaps are watched on.
            match self.source.mark().await {
                Ok(mark) => tracker.mark(mark),
                Err(error) => tracing::debug!(%error, "Skipped events are watched on"),
            }
        }
        Ok(())
    }

    async fn apply(&self, feed: EventFeed, events: &[Event]) -> Result<(), StoreError> {
        let subjects: BTreeSet<&str> = events.iter().map(|event| event.subject.as_str()).collect();
        if subjects.is_empty() {
            return Ok(());
        }
        // What cannot be an ID names nothing that memory could hold.
        match feed {
            EventFeed::Entries => {
                let ids = subjects.into_iter().filter_map(|id| EntryId::parse(id).ok());
                self.memory.entries_changed(ids.collect()).await
            }
            EventFeed::Nodes => {
                let ids = subjects.into_iter().filter_map(|id| SpiffeId::parse(id).ok());
                self.memory.agents_changed(ids.collect()).await
            }
        }
    }
}

fn numbers(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.id).collect()
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
