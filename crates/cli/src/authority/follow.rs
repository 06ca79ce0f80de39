//! `-wait`: follows an order to its end, and orders each next step once it may be done.

use super::{advance, advised, print_state, show, within};
use crate::app::{Advised, Exit};
use crate::context::Context;
use finial_config::format_go_duration;
use finial_proto::rotation::rotation_client::RotationClient;
use finial_proto::rotation::{Goal, RotationState, WatchRotationRequest};
use finial_runtime::Backoff;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

/// Between two attempts to hear from the server, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// As programs end that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Who waits, and what was said already.
struct Waiter<'a> {
    cx: &'a Context,
    client: RotationClient<Channel>,
    state: RotationState,
    said: String,
    complained: Vec<String>,
    /// When the present step has taken too long.
    deadline: Instant,
    patience: Duration,
    force: bool,
    /// It was said that the server does not answer.
    away: bool,
}

/// What happens next.
enum Event {
    State(Box<RotationState>),
    /// The stream ended: OK, or with an error.
    Ended(Option<tonic::Status>),
    Late,
    Interrupted,
}

pub(super) async fn to_the_end(
    cx: &Context,
    client: RotationClient<Channel>,
    state: RotationState,
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let patience = cx.flags.duration("timeout");
    let mut waiter = Waiter {
        cx,
        client,
        state,
        said: String::new(),
        complained: Vec::new(),
        deadline: Instant::now() + patience,
        patience,
        force: cx.flags.bool("force"),
        away: false,
    };
    let mut interrupted = std::pin::pin!(interrupted);
    let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
    loop {
        let failed = match waiter.listen(interrupted.as_mut(), &mut backoff).await? {
            Heard::End => return Ok(()),
            Heard::Lost(failed) => failed,
        };
        if let Some(status) = failed {
            if !matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal) {
                return Err(advised(status.into()).context("could not follow the order"));
            }
            if !std::mem::replace(&mut waiter.away, true) {
                cx.eprintln(format!("The server does not answer ({}); trying again", status.message()));
            }
        }
        let pause = Instant::now() + backoff.next_wait();
        let over = tokio::select! {
            () = tokio::time::sleep_until(pause.min(waiter.deadline)) => Instant::now() >= waiter.deadline,
            () = interrupted.as_mut() => return Err(waiter.interrupted()),
        };
        if over {
            waiter.late().await?;
        }
    }
}

/// What came of one stream.
enum Heard {
    End,
    Lost(Option<tonic::Status>),
}

impl Waiter<'_> {
    /// Follows one stream until it ends.
    async fn listen(
        &mut self,
        mut interrupted: std::pin::Pin<&mut impl Future<Output = ()>>,
        backoff: &mut Backoff,
    ) -> anyhow::Result<Heard> {
        let mut stream = None;
        let mut client = self.client.clone();
        let id = self.state.id;
        loop {
            let event = tokio::select! {
                event = next(&mut client, &mut stream, id) => event,
                () = tokio::time::sleep_until(self.deadline) => Event::Late,
                () = interrupted.as_mut() => Event::Interrupted,
            };
            match event {
                Event::State(state) => {
                    backoff.reset();
                    self.away = false;
                    if self.take(*state).await? {
                        return Ok(Heard::End);
                    }
                }
                Event::Late => self.late().await?,
                Event::Ended(status) => return Ok(Heard::Lost(status)),
                Event::Interrupted => return Err(self.interrupted()),
            }
        }
    }

    /// The order stands like this now. Whether that is its end.
    async fn take(&mut self, state: RotationState) -> anyhow::Result<bool> {
        if state.goal != self.state.goal {
            self.deadline = Instant::now() + self.patience;
        }
        self.state = state;
        self.say()?;
        if self.state.done {
            let taken_back = self.state.goal() == Goal::TakeBack;
            if !self.cx.json() {
                self.cx.print(show::done(&self.state));
            }
            return if taken_back { Err(Exit(1).into()) } else { Ok(true) };
        }
        let next = self.state.next();
        let hurry = self.force && next == Goal::Activate;
        if next != Goal::Unspecified && (self.state.obstacles.is_empty() || hurry) {
            if self.state.obstacles.is_empty() {
                self.complain(show::left_behind(&self.state));
            }
            self.advance(next, hurry && !self.state.obstacles.is_empty()).await?;
        }
        Ok(false)
    }

    /// Orders the next step. What changed meanwhile comes by the stream, and it is tried again then.
    async fn advance(&mut self, next: Goal, force: bool) -> anyhow::Result<()> {
        let mut client = self.client.clone();
        match within(advance(&mut client, &self.state, next, force)).await? {
            Ok(state) => {
                self.deadline = Instant::now() + self.patience;
                self.state = state;
                self.say()
            }
            Err(error) if matches!(error.code(), Code::FailedPrecondition | Code::Unavailable | Code::Aborted) => {
                Ok(())
            }
            Err(error) => Err(anyhow::Error::from(error).context(format!("could not go on to {}", next.verb()))),
        }
    }

    /// The step took too long: is the next one forced, or is this the end?
    async fn late(&mut self) -> anyhow::Result<()> {
        let next = show::left(&self.state, self.force);
        if self.force && next != Goal::Unspecified {
            self.cx.eprintln(format!(
                "Going on to {} although it took too long:\n{}",
                next.verb(),
                show::in_vain(&self.state).trim_end()
            ));
            let before = (self.state.goal, self.state.forced);
            self.advance(next, true).await?;
            if (self.state.goal, self.state.forced) != before {
                return Ok(());
            }
        }
        self.cx.io.err(&show::in_vain(&self.state));
        let after = format_go_duration(self.patience);
        let error = anyhow::anyhow!(
            "order {} did not get from {} to {} within {after}: {}",
            self.state.id,
            self.state.goal().verb(),
            next.verb(),
            show::lacks(&self.state)
        );
        Err(Advised::new(error, format!("the order stays in force; {}", show::hint_open(&self.state))).into())
    }

    fn interrupted(&self) -> anyhow::Error {
        self.cx.eprintln(format!(
            "Interrupted. Order {} stays in force: servers stay at {}, and those that come late get there too.\nhint: {}",
            self.state.id,
            self.state.goal().verb(),
            show::hint_open(&self.state)
        ));
        Exit(INTERRUPTED).into()
    }

    /// Says what differs from what was said before.
    fn say(&mut self) -> anyhow::Result<()> {
        let line = show::line(&self.state);
        let new = if self.cx.json() { format!("{:?}", self.state) } else { line.clone() };
        if new != self.said {
            self.said = new;
            print_state(self.cx, &self.state, || format!("{line}\n"))?;
        }
        self.complain(show::failures(&self.state));
        Ok(())
    }

    /// Each only once.
    fn complain(&mut self, lines: Vec<String>) {
        for line in lines {
            if !self.complained.contains(&line) {
                self.cx.eprintln(&line);
                self.complained.push(line);
            }
        }
    }
}

/// Opens the stream if there is none, and waits for what it tells.
async fn next(client: &mut RotationClient<Channel>, stream: &mut Option<Streaming<RotationState>>, id: i64) -> Event {
    let open = match stream {
        Some(open) => open,
        None => match client.watch_rotation(WatchRotationRequest { id }).await {
            Ok(answer) => stream.insert(answer.into_inner()),
            Err(status) => return Event::Ended(Some(status)),
        },
    };
    match open.message().await {
        Ok(Some(state)) => Event::State(Box::new(state)),
        Ok(None) => Event::Ended(None),
        Err(status) => Event::Ended(Some(status)),
    }
}
