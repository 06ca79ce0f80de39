//! Answers that are a stream, made by a handler that runs inside the stream itself: no task is spawned, and when the client
//! goes away handler and stream end together.

use crate::authz::{Call, Gate, Method, Permit, code_name};
use finial_runtime::telemetry::CallTimer;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};

type Work = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// The messages that a handler sends, and its error at the end.
pub struct Driven<T> {
    work: Option<Work>,
    sent: mpsc::Receiver<T>,
}

/// Where a handler sends its messages; waits until the message before was taken.
pub(crate) struct Outlet<T>(mpsc::Sender<T>);

impl<T> Outlet<T> {
    /// Sends one; an error means that the client is gone. The handler runs only while the client reads: it may stand still
    /// in this call and at any wait after it for as long as the client likes, and its own deadlines with it. So nothing that
    /// others wait for (a lock, a permit, a connection to the datastore) may be held across a send, or taken after one.
    pub(crate) async fn send(&self, message: T) -> Result<(), Status> {
        self.0.send(message).await.map_err(|_| Status::cancelled("the client is gone"))
    }
}

impl<T> Stream for Driven<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(Some(message)) = self.sent.poll_recv(cx) {
            return Poll::Ready(Some(Ok(message)));
        }
        let Some(work) = self.work.as_mut() else { return Poll::Ready(None) };
        let done = work.as_mut().poll(cx);
        // While it was polled the handler may have sent something, which goes first.
        let sent = self.sent.poll_recv(cx);
        match (done, sent) {
            (Poll::Pending, Poll::Ready(Some(message))) => Poll::Ready(Some(Ok(message))),
            (Poll::Pending, _) => Poll::Pending,
            (Poll::Ready(result), Poll::Ready(Some(message))) => {
                self.work = result.err().map(|status| Box::pin(std::future::ready(Err(status))) as Work);
                Poll::Ready(Some(Ok(message)))
            }
            (Poll::Ready(result), _) => {
                self.work = None;
                Poll::Ready(result.err().map(Err))
            }
        }
    }
}

/// What a client sends, with a limit on how long it may take for each message.
pub(crate) struct Inlet<T> {
    stream: Streaming<T>,
    wait_max: Duration,
}

impl<T> Inlet<T> {
    /// The next message; `None` when the client has closed its side.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, Status> {
        match tokio::time::timeout(self.wait_max, self.stream.message()).await {
            Ok(Err(status)) if status.code() == Code::OutOfRange => {
                Err(Status::resource_exhausted(status.message().to_owned()))
            }
            Ok(result) => result,
            Err(_) => Err(Status::deadline_exceeded(format!("nothing received for {} s", self.wait_max.as_secs()))),
        }
    }
}

impl Gate {
    /// Runs a handler with streams on both sides.
    pub(crate) async fn stream<M: Method, Req, Res, Fut>(
        self: &Arc<Self>,
        request: Request<Streaming<Req>>,
        wait_max: Duration,
        handler: impl FnOnce(Permit<M>, Inlet<Req>, Outlet<Res>) -> Fut,
    ) -> Result<Response<Driven<Res>>, Status>
    where
        Fut: Future<Output = Result<(), Status>> + Send + 'static,
    {
        self.answer_stream(request, |permit, stream, outlet| handler(permit, Inlet { stream, wait_max }, outlet)).await
    }

    /// Runs a handler that answers a request with a stream if the caller may call `M`, and counts and audits what comes of it.
    pub(crate) async fn answer_stream<M: Method, Req, Res, Fut>(
        self: &Arc<Self>,
        request: Request<Req>,
        handler: impl FnOnce(Permit<M>, Req, Outlet<Res>) -> Fut,
    ) -> Result<Response<Driven<Res>>, Status>
    where
        Fut: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let timer = self.timer(M::ROW);
        let permit = match self.check::<M, _>(&request).await {
            Ok(permit) => permit,
            Err(status) => {
                timer.finish(code_name(status.code()));
                return Err(status);
            }
        };
        let (outlet, sent) = mpsc::channel(1);
        let call = permit.call();
        let handling = handler(permit, request.into_inner(), Outlet(outlet));
        Ok(driven(call, timer, handling, sent))
    }
}

/// The answer of a handler, counted and audited at its end.
fn driven<Res>(
    call: Arc<Call>,
    timer: CallTimer,
    handling: impl Future<Output = Result<(), Status>> + Send + 'static,
    sent: mpsc::Receiver<Res>,
) -> Response<Driven<Res>> {
    let work = async move {
        let result = handling.await;
        if let Err(status) = &result {
            call.audit_error(status);
        }
        timer.finish(code_name(result.as_ref().err().map_or(Code::Ok, Status::code)));
        result
    };
    Response::new(Driven { work: Some(Box::pin(work)), sent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    fn counting(count: u32, result: Result<(), Status>) -> Driven<u32> {
        let (outlet, sent) = mpsc::channel(1);
        let outlet = Outlet(outlet);
        let work = async move {
            for n in 0..count {
                outlet.send(n).await?;
                if n % 2 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            result
        };
        Driven { work: Some(Box::pin(work)), sent }
    }

    #[tokio::test]
    async fn all_messages_come_in_order_and_then_the_end() {
        for count in 0..6 {
            let got: Vec<_> = counting(count, Ok(())).map(Result::unwrap).collect().await;
            assert_eq!(got, (0..count).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn an_error_comes_after_the_messages_before_it() {
        for count in 0..6 {
            let mut got: Vec<_> = counting(count, Err(Status::internal("x"))).collect().await;
            assert_eq!(got.pop().unwrap().unwrap_err().code(), Code::Internal);
            assert_eq!(got.len(), count as usize);
        }
    }
}
