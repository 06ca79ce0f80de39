//! The stream by which a server tells what changes: when it is opened, and what comes of it.
//!
//! A server that has no such stream (SPIRE's) is asked again over the next connection, or now and then. A stream that was
//! lost is opened again after a wait that is spread, so that the agents of a server that went away come back one by one.

use crate::error::ServerError;
use finial_proto::sync::WatchResponse;
use finial_runtime::Backoff;
use futures::future::BoxFuture;
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

/// Waits before the stream is opened again: at first about this, spread by nine tenths, and at most.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A stream that lasted so long was a good one.
const LASTED: Duration = Duration::from_secs(10);
/// A server that has no such stream may be replaced by one that has.
const UNSUPPORTED: Duration = Duration::from_secs(5 * 60);
/// Messages in one answer; a server that sends more is broken.
const PAGES_MAX: usize = 10_000;

type Opened = Result<Streaming<WatchResponse>, ServerError>;

enum State {
    Waiting { until: Instant, unsupported: bool },
    Opening(BoxFuture<'static, Opened>),
    Open { stream: Box<Streaming<WatchResponse>>, since: Instant, pages: usize, answer: Box<WatchResponse> },
}

/// What happened.
pub(super) enum Event {
    /// It is time to open the stream.
    Due,
    /// It is open: from now on silence means that nothing changed.
    Opened,
    /// An answer, all of it.
    Answer(Box<WatchResponse>),
    /// It ended, or the server has none.
    Ended,
    /// It failed.
    Failed(ServerError),
}

/// The stream.
pub(super) struct Watch {
    state: State,
    backoff: Backoff,
    /// Of the connection.
    generation: u64,
}

impl Watch {
    /// To be opened at once.
    pub(super) fn new(generation: u64) -> Self {
        let state = State::Waiting { until: Instant::now(), unsupported: false };
        Self { state, backoff: Backoff::new(WAIT.0, WAIT.1).shape(2.0, 0.9), generation }
    }

    /// Whether the server would tell of a change.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// A new connection has a new stream: the old one was another SVID's.
    pub(super) fn follow(&mut self, generation: u64) {
        if self.generation != generation {
            self.generation = generation;
            if !matches!(self.state, State::Waiting { unsupported: false, .. }) {
                self.state = State::Waiting { until: Instant::now(), unsupported: false };
            }
        }
    }

    /// After [`Event::Due`].
    pub(super) fn open(&mut self, opening: BoxFuture<'static, Opened>) {
        self.state = State::Opening(opening);
    }

    /// Leaves the stream, and opens another after a wait.
    pub(super) fn lost(&mut self) {
        if let State::Open { since, .. } = &self.state
            && since.elapsed() >= LASTED
        {
            self.backoff.reset();
        }
        self.state = State::Waiting { until: Instant::now() + self.backoff.next_wait(), unsupported: false };
    }

    /// What happens next. Nothing is lost when this is dropped before.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            match &mut self.state {
                State::Waiting { until, .. } => {
                    tokio::time::sleep_until(*until).await;
                    return Event::Due;
                }
                State::Opening(opening) => match opening.await {
                    Ok(stream) => {
                        let (stream, answer) = (Box::new(stream), Box::default());
                        self.state = State::Open { stream, since: Instant::now(), pages: 0, answer };
                        return Event::Opened;
                    }
                    Err(error) if error.status.code() == Code::Unimplemented => {
                        self.state = State::Waiting { until: Instant::now() + UNSUPPORTED, unsupported: true };
                        return Event::Ended;
                    }
                    Err(error) => {
                        self.lost();
                        return Event::Failed(error);
                    }
                },
                State::Open { stream, pages, answer, .. } => match stream.message().await {
                    Ok(Some(page)) if *pages < PAGES_MAX => {
                        let more = page.more;
                        *pages += 1;
                        add(answer, page);
                        if !more {
                            *pages = 0;
                            return Event::Answer(std::mem::take(answer));
                        }
                    }
                    Ok(Some(_)) => {
                        self.lost();
                        return Event::Failed(failed(Status::internal("the server's answer does not end")));
                    }
                    Ok(None) => {
                        self.lost();
                        return Event::Ended;
                    }
                    Err(status) => {
                        self.lost();
                        return Event::Failed(failed(status));
                    }
                },
            }
        }
    }
}

fn failed(status: Status) -> ServerError {
    ServerError::new("failed to watch authorized entries", status)
}

/// Adds a page to those before it.
fn add(answer: &mut WatchResponse, page: WatchResponse) {
    answer.revision = page.revision;
    answer.entries.extend(page.entries);
    answer.removed_entry_ids.extend(page.removed_entry_ids);
    answer.bundles.extend(page.bundles);
    answer.removed_bundles.extend(page.removed_bundles);
    answer.bucket_count = answer.bucket_count.max(page.bucket_count);
    answer.buckets.extend(page.buckets);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_was_left_is_not_opened_again_at_once_whatever_the_connection() {
        let mut watch = Watch::new(0);
        let start = Instant::now();
        assert!(matches!(watch.next().await, Event::Due));
        assert_eq!(Instant::now(), start);
        watch.open(Box::pin(std::future::pending()));
        watch.lost();
        watch.follow(1);
        assert!(matches!(watch.next().await, Event::Due));
        assert!(Instant::now() > start);
    }
}
