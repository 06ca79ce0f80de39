//! A stream of ready-made answers: one at once, and one after each change that the workload can see. No task and no timer.

use super::call::Call;
use crate::cache::{Subscription, ViewState};
use finial_proto::encoded::Encoded;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Code, Status};

/// What a method answers in a state.
pub(super) type Answer<T> = Box<dyn Fn(&ViewState) -> Result<Encoded<T>, Status> + Send + Sync>;

/// The stream of one call.
pub(crate) struct AnswerStream<T> {
    states: WatchStream<Arc<ViewState>>,
    answer: Answer<T>,
    last: Option<Encoded<T>>,
    /// Nothing was sent yet: wait until there is an SVID for each entry.
    waiting: bool,
    /// The agent is ending.
    closing: bool,
    ended: bool,
    call: Call,
    /// Keeps the view's SVIDs in the cache.
    _subscription: Subscription,
}

impl<T> AnswerStream<T> {
    pub(super) fn new(subscription: Subscription, answer: Answer<T>, call: Call) -> Self {
        Self {
            states: WatchStream::new(subscription.states()),
            answer,
            last: None,
            waiting: true,
            closing: false,
            ended: false,
            call,
            _subscription: subscription,
        }
    }
}

impl<T: 'static> Stream for AnswerStream<T> {
    type Item = Result<Encoded<T>, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while !this.ended {
            if this.closing {
                this.ended = true;
                this.call.finish(Code::Unavailable);
                return Poll::Ready(Some(Err(Status::unavailable("the agent is shutting down"))));
            }
            let Some(state) = std::task::ready!(Pin::new(&mut this.states).poll_next(cx)) else { break };
            this.closing = state.closed;
            // Who came just before the end still gets an answer: the next agent may have taken over.
            if (state.closed && !this.waiting) || (this.waiting && state.incomplete) {
                continue;
            }
            this.waiting = false;
            match (this.answer)(&state) {
                Ok(answer) if this.last.as_ref() == Some(&answer) => {}
                Ok(answer) => {
                    this.last = Some(answer.clone());
                    return Poll::Ready(Some(Ok(answer)));
                }
                // An SVID that is being issued may be the one, as for an entry that was given another ID.
                Err(_) if state.incomplete => {}
                Err(status) => {
                    this.ended = true;
                    this.call.finish(status.code());
                    return Poll::Ready(Some(Err(status)));
                }
            }
        }
        Poll::Ready(None)
    }
}
