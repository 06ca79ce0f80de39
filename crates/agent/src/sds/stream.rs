//! The two halves of a discovery stream together: what the proxy asks, and what changes for it. No task; one timer, until the
//! proxy has asked for something, and one while it waits for an entry.

use super::{Begun, SUBSYSTEM};
use crate::cache::{Subscription, ViewState};
use crate::workload_api::{Call, Caller, Waiting};
use finial_runtime::Place;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Sleep;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Code, Status, Streaming};

/// A proxy that opens a stream asks at once.
const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(60);
/// Requests handled in one go, so that one who floods us does not keep the others waiting.
const REQUESTS_IN_A_ROW: usize = 32;

/// Requests in a row that need no answer: there is one such, an ACK, for each answer, and perhaps a few that crossed it.
const UNANSWERED_MAX: usize = 1_000;

/// One of the two ways to ask. It knows what the proxy wants and what it has been told.
pub(crate) trait Protocol: Send + Unpin + 'static {
    /// What the proxy says.
    type Request: Send + 'static;
    /// What it is answered.
    type Answer;

    /// Takes in what the proxy says.
    fn receive(&mut self, request: Self::Request) -> Result<(), Status>;

    /// Whether a request is still to be answered.
    fn owes(&self) -> bool;

    /// Whether a proxy that was never answered may get what it wants later, when [`Protocol::answer`] refuses it like this.
    fn may_wait(&self, refusal: &Status) -> bool;

    /// What is to be said now, if anything; `news` = the state is another than at the last call.
    fn answer(&mut self, state: &ViewState, news: bool) -> Result<Option<Self::Answer>, Status>;
}

/// A proxy that came before its entry.
enum Patience {
    /// It has not asked for what is not there, or may not wait.
    Unused(Option<Waiting>),
    /// It has a place until then.
    Waits(Pin<Box<Sleep>>, #[allow(dead_code)] Place<u32>),
    Over,
}

impl Patience {
    /// Whether to wait on.
    fn poll(&mut self, cx: &mut Context<'_>, caller: &Caller) -> bool {
        if let Self::Unused(waiting) = self {
            let entered = waiting.take().and_then(|waiting| Some((waiting.longest, waiting.enter(caller)?)));
            let waits = |(longest, place)| Self::Waits(Box::pin(tokio::time::sleep(longest)), place);
            *self = entered.map_or(Self::Over, waits);
        }
        match self {
            Self::Waits(until, _) => until.as_mut().poll(cx).is_pending(),
            _ => false,
        }
    }
}

/// The stream of one call.
pub(crate) struct SecretStream<P: Protocol> {
    protocol: P,
    caller: Arc<Caller>,
    requests: Option<Streaming<P::Request>>,
    states: WatchStream<Arc<ViewState>>,
    /// The last one; none before there was an SVID for each entry.
    state: Option<Arc<ViewState>>,
    news: bool,
    /// Requests since the last answer.
    unanswered: usize,
    first_request: Option<Pin<Box<Sleep>>>,
    patience: Patience,
    ended: bool,
    call: Call,
    /// Keeps the view's SVIDs in the cache.
    _subscription: Subscription,
}

impl<P: Protocol> SecretStream<P> {
    pub(super) fn new(protocol: P, begun: Begun<P::Request>, waiting: Option<Waiting>) -> Self {
        Self {
            protocol,
            caller: begun.caller,
            requests: Some(begun.requests),
            states: WatchStream::new(begun.subscription.states()),
            state: None,
            news: false,
            unanswered: 0,
            first_request: Some(Box::pin(tokio::time::sleep(FIRST_REQUEST_WITHIN))),
            patience: Patience::Unused(waiting),
            ended: false,
            call: begun.call,
            _subscription: begun.subscription,
        }
    }

    fn end(&mut self, status: Option<Status>) -> Option<Status> {
        self.ended = true;
        self.requests = None;
        self.call.finish(status.as_ref().map_or(Code::Ok, Status::code));
        status
    }

    /// Takes in what has changed. Ready when the stream is to end.
    fn poll_states(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        while let Some(state) = std::task::ready!(Pin::new(&mut self.states).poll_next(cx)) {
            if state.closed {
                break;
            }
            if self.state.is_some() || !state.incomplete {
                self.state = Some(state);
                self.news = true;
            }
        }
        Poll::Ready(Status::unavailable("the agent is shutting down"))
    }

    /// Takes in what the proxy says. Ready with `None` when it has said one thing.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<Status>> {
        if let Some(requests) = &mut self.requests {
            match Pin::new(requests).poll_next(cx) {
                Poll::Ready(Some(Ok(request))) => {
                    self.first_request = None;
                    self.unanswered += 1;
                    if self.unanswered > UNANSWERED_MAX {
                        let message = "too many requests that need no answer";
                        return Poll::Ready(Some(Status::resource_exhausted(message)));
                    }
                    return Poll::Ready(self.protocol.receive(request).err());
                }
                Poll::Ready(Some(Err(status))) => {
                    if status.code() != Code::Cancelled {
                        let (pid, error) = (self.caller.peer.pid, status.message());
                        tracing::error!(
                            subsystem_name = SUBSYSTEM,
                            pid,
                            error,
                            "Received error from stream secrets server"
                        );
                    }
                    return Poll::Ready(Some(status));
                }
                Poll::Ready(None) => {
                    self.requests = None;
                    self.first_request = None;
                }
                Poll::Pending => {}
            }
        }
        if let Some(sleep) = &mut self.first_request
            && sleep.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Status::deadline_exceeded("nothing was asked for")));
        }
        Poll::Pending
    }

    fn answer(&mut self, cx: &mut Context<'_>) -> Result<Option<P::Answer>, Status> {
        let Some(state) = &self.state else { return Ok(None) };
        match self.protocol.answer(state, std::mem::take(&mut self.news)) {
            Ok(Some(answer)) => {
                self.patience = Patience::Over;
                Ok(Some(answer))
            }
            Err(refusal) if self.protocol.may_wait(&refusal) && self.patience.poll(cx, &self.caller) => Ok(None),
            result => result,
        }
    }
}

impl<P: Protocol> Stream for SecretStream<P> {
    type Item = Result<P::Answer, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(status) = this.poll_states(cx) {
            return Poll::Ready(this.end(Some(status)).map(Err));
        }
        for _ in 0..REQUESTS_IN_A_ROW {
            // Before the next request: each sees what the one before it was answered.
            match this.answer(cx) {
                Ok(Some(answer)) => {
                    this.unanswered = 0;
                    return Poll::Ready(Some(Ok(answer)));
                }
                Ok(None) => {}
                Err(status) => {
                    let (pid, error) = (this.caller.peer.pid, status.message());
                    tracing::error!(subsystem_name = SUBSYSTEM, pid, error, "Error building stream secrets response");
                    let refused = this.caller.refused(status);
                    return Poll::Ready(this.end(Some(refused)).map(Err));
                }
            }
            match this.poll_request(cx) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(status)) => return Poll::Ready(this.end(Some(status)).map(Err)),
                // The proxy asks for nothing more, and has all that it asked for.
                Poll::Pending if this.requests.is_none() && !this.protocol.owes() => {
                    return Poll::Ready(this.end(None).map(Err));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
