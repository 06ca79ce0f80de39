//! A stream to who acts for others: what it asked for, at once and after each change, for as long as it may have it. No task, no
//! timer.

use crate::cache::{Subscription, ViewState};
use crate::workload_api::Call;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::Status;

/// Whether the stream may go on in a state of the view that is watched for this.
pub(crate) type Check = Box<dyn Fn(&ViewState) -> Result<(), Status> + Send + Sync>;
/// What is answered in a state, if anything.
pub(crate) type Answer<S, T> = Box<dyn FnMut(&S) -> Result<Option<T>, Status> + Send>;

/// The stream of one call.
pub(crate) struct Updates<S, T> {
    /// None: it has ended.
    guard: Option<WatchStream<Arc<ViewState>>>,
    check: Check,
    states: WatchStream<S>,
    answer: Answer<S, T>,
    last: Option<T>,
    call: Call,
    /// They keep the views' SVIDs in the cache.
    _holds: Vec<Subscription>,
}

impl<S: Clone + Send + Sync + 'static, T> Updates<S, T> {
    /// The first of `holds` is of the view that `check` looks at.
    pub(crate) fn new(
        holds: Vec<Subscription>,
        check: Check,
        states: watch::Receiver<S>,
        answer: Answer<S, T>,
        call: Call,
    ) -> Self {
        let guard = holds.first().map(|hold| WatchStream::new(hold.states()));
        Self { guard, check, states: WatchStream::new(states), answer, last: None, call, _holds: holds }
    }

    fn end(&mut self, status: Status) -> Poll<Option<Result<T, Status>>> {
        self.guard = None;
        self.call.take().finish(status.code());
        Poll::Ready(Some(Err(status)))
    }
}

fn shutting_down() -> Status {
    Status::unavailable("the agent is shutting down")
}

impl<S, T> Stream for Updates<S, T>
where
    S: Clone + Send + Sync + Unpin + 'static,
    T: Clone + PartialEq + Unpin,
{
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(guard) = &mut this.guard else { return Poll::Ready(None) };
        while let Poll::Ready(state) = Pin::new(&mut *guard).poll_next(cx) {
            let refused = match &state {
                Some(state) if !state.closed => (this.check)(state).err(),
                _ => Some(shutting_down()),
            };
            if let Some(status) = refused {
                return this.end(status);
            }
        }
        while let Some(state) = std::task::ready!(Pin::new(&mut this.states).poll_next(cx)) {
            match (this.answer)(&state) {
                Ok(Some(answer)) if this.last.as_ref() != Some(&answer) => {
                    this.last = Some(answer.clone());
                    return Poll::Ready(Some(Ok(answer)));
                }
                Ok(_) => {}
                Err(status) => return this.end(status),
            }
        }
        this.end(shutting_down())
    }
}
