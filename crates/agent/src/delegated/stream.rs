//! A stream to a delegate: what it asked for, at once and after each change, for as long as it is a delegate. No task, no timer.

use super::DelegatedApi;
use crate::cache::{Subscription, ViewState};
use crate::workload_api::Call;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Code, Status};

/// What is answered in a state, if anything.
pub(super) type Answer<S, T> = Box<dyn FnMut(&S) -> Option<T> + Send>;

/// The stream of one call.
pub(crate) struct DelegateStream<S, T> {
    api: DelegatedApi,
    /// What the delegate itself may see: whether it still is one.
    own: Option<WatchStream<Arc<ViewState>>>,
    states: WatchStream<S>,
    answer: Answer<S, T>,
    last: Option<T>,
    call: Option<Call>,
    /// The delegate's view first: they keep the views' SVIDs in the cache.
    _holds: Vec<Subscription>,
}

impl<S: Clone + Send + Sync + 'static, T> DelegateStream<S, T> {
    /// `holds` begins with the delegate's own.
    pub(super) fn new(
        api: DelegatedApi,
        holds: Vec<Subscription>,
        states: watch::Receiver<S>,
        answer: Answer<S, T>,
        call: Option<Call>,
    ) -> Self {
        let own = holds.first().map(|hold| WatchStream::new(hold.states()));
        Self { api, own, states: WatchStream::new(states), answer, last: None, call, _holds: holds }
    }

    fn end(&mut self, status: Status) -> Poll<Option<Result<T, Status>>> {
        self.own = None;
        if let Some(mut call) = self.call.take() {
            call.finish(status.code());
        }
        Poll::Ready(Some(Err(status)))
    }
}

impl<S, T> Stream for DelegateStream<S, T>
where
    S: Clone + Send + Sync + Unpin + 'static,
    T: Clone + PartialEq + Unpin,
{
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(own) = &mut this.own else { return Poll::Ready(None) };
        while let Poll::Ready(state) = Pin::new(&mut *own).poll_next(cx) {
            let refused = match &state {
                Some(state) if !state.closed => this.api.check(state).err(),
                _ => Some(Status::new(Code::Unavailable, "the agent is shutting down")),
            };
            if let Some(status) = refused {
                return this.end(status);
            }
        }
        while let Some(state) = std::task::ready!(Pin::new(&mut this.states).poll_next(cx)) {
            let Some(answer) = (this.answer)(&state).filter(|answer| this.last.as_ref() != Some(answer)) else {
                continue;
            };
            this.last = Some(answer.clone());
            return Poll::Ready(Some(Ok(answer)));
        }
        this.end(Status::unavailable("the agent is shutting down"))
    }
}
