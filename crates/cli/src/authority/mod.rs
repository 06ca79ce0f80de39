//! `finial authority rotate`, `status`, `take-back`: one order that replaces the authorities of a whole trust domain.

mod follow;
mod show;

#[cfg(test)]
mod tests;

use crate::app::{Advised, Command};
use crate::context::Context;
use crate::goflag::{FlagSet, Flags};
use crate::json;
use crate::rpc::{RpcError, RpcExt};
use anyhow::{Context as _, bail, ensure};
use finial_proto::rotation::rotation_client::RotationClient;
use finial_proto::rotation::{self as pb, Goal, Kind, RotationState};
use std::future::Future;
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

pub(crate) fn commands() -> Vec<Command> {
    vec![
        Command::server("rotate", "Replaces the authorities of all servers of the trust domain", rotate_flags, |cx| {
            Box::pin(rotate(cx))
        })
        .usage("authority rotate"),
        Command::server("status", "Shows how far the orders to rotate are", status_flags, |cx| Box::pin(status(cx)))
            .usage("authority status"),
        Command::server(
            "take-back",
            "Takes an order to rotate back: every server signs again with what it had before",
            status_flags,
            |cx| Box::pin(take_back(cx)),
        )
        .usage("authority take-back"),
    ]
}

/// How long each step is waited for, unless told otherwise.
const STEP: Duration = Duration::from_secs(600);
/// How long one call may take.
const CALL: Duration = Duration::from_secs(30);

fn kind_flags(f: &mut FlagSet) {
    f.bool("x509", "X.509 authorities");
    f.bool("jwt", "JWT authorities");
    f.bool("wit", "WIT authorities");
    f.output();
}

fn status_flags(f: &mut FlagSet) {
    kind_flags(f);
}

fn rotate_flags(f: &mut FlagSet) {
    kind_flags(f);
    f.bool("wait", "Stay, show how far it is, and order each next step once it may be done");
    f.bool(
        "force",
        "Activate although agents lack the new bundle; with -wait, revoke after -timeout although some have not moved",
    );
    f.bool("revoke", "In the end, taint and revoke what signed before");
    f.int("order", 0, "Go on with the open order of this `number` instead of beginning one");
    f.duration_value("timeout", STEP, "With -wait: how long to wait for each step");
}

/// The kind that was named, if one was.
fn named_kind(flags: &Flags) -> anyhow::Result<Option<Kind>> {
    let kinds = [("x509", Kind::X509), ("jwt", Kind::Jwt), ("wit", Kind::Wit)];
    let named: Vec<Kind> = kinds.into_iter().filter(|(name, _)| flags.bool(name)).map(|(_, kind)| kind).collect();
    ensure!(named.len() < 2, "-x509, -jwt and -wit are one order each: name one of them");
    Ok(named.first().copied())
}

fn client(cx: &Context) -> anyhow::Result<RotationClient<Channel>> {
    Ok(RotationClient::new(cx.server()?).max_decoding_message_size(crate::server::api::ANSWER_BYTES_MAX))
}

/// A call's answer, within its time.
async fn within<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> anyhow::Result<Result<T, RpcError>> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => Ok(answer.rpc()),
        Err(_) => bail!("the server did not answer within {}", finial_config::format_go_duration(CALL)),
    }
}

fn advised(error: RpcError) -> anyhow::Error {
    // A kind that is off there is no matter of whose server it is.
    if error.code() != Code::Unimplemented || error.message().contains("functionality is") {
        return error.into();
    }
    let hint = "that server is SPIRE's, or an older one: give the order to each server by itself, with \
                `spire-server localauthority x509 prepare`, `activate`, `taint`, `revoke`"
        .to_owned();
    Advised::new(error.into(), hint).into()
}

fn print_state(cx: &Context, state: &RotationState, pretty: impl FnOnce() -> String) -> anyhow::Result<()> {
    if cx.json() {
        cx.print(json::lines(vec![json::message("finial.server.rotation.v1.RotationState", state)?]));
    } else {
        cx.print(pretty());
    }
    Ok(())
}

/// The newest orders, of one kind or of all.
async fn newest(client: &mut RotationClient<Channel>, kind: Option<Kind>) -> anyhow::Result<Vec<RotationState>> {
    let request = pb::GetRotationRequest { kind: kind.unwrap_or_default().into() };
    let answer = within(client.get_rotation(request)).await?.map_err(advised);
    Ok(answer.context("could not ask how far the rotation is")?.rotations)
}

async fn status(cx: Context) -> anyhow::Result<()> {
    let kind = named_kind(&cx.flags)?;
    let rotations = newest(&mut client(&cx)?, kind).await?;
    if cx.json() {
        let response = pb::GetRotationResponse { rotations };
        cx.print(json::lines(vec![json::message("finial.server.rotation.v1.GetRotationResponse", &response)?]));
        return Ok(());
    }
    if rotations.is_empty() {
        cx.println("No order to rotate was ever given.");
    }
    for (number, state) in rotations.iter().enumerate() {
        if number > 0 {
            cx.println("");
        }
        cx.print(show::whole(state));
    }
    Ok(())
}

async fn take_back(cx: Context) -> anyhow::Result<()> {
    let kind = named_kind(&cx.flags)?;
    let mut client = client(&cx)?;
    let mut orders = newest(&mut client, kind).await?;
    // One that was done without a revocation can be taken back, too.
    let is_open = orders.iter().any(|state| !state.done);
    orders.retain(|state| if is_open { !state.done } else { !matches!(state.goal(), Goal::Revoke | Goal::TakeBack) });
    let state = match (orders.pop(), orders.is_empty()) {
        (Some(state), true) => state,
        (None, _) => bail!("there is no order to take back"),
        (Some(_), false) => bail!("there are orders of several kinds: name one with -x509, -jwt or -wit"),
    };
    let answer = within(client.take_back_rotation(pb::TakeBackRotationRequest { id: state.id })).await?;
    let state = answer.context("could not take the order back")?;
    print_state(&cx, &state, || {
        format!(
            "Order {} is being taken back: every server is to sign again with the {} authority that it had before.\n{}",
            state.id,
            show::kind(&state),
            show::hint_status(&state)
        )
    })
}

async fn rotate(cx: Context) -> anyhow::Result<()> {
    let interrupted = async {
        // Without a handler, the signal ends the program in its own way.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    rotate_until(cx, interrupted).await
}

async fn rotate_until(cx: Context, interrupted: impl Future<Output = ()>) -> anyhow::Result<()> {
    let kind = named_kind(&cx.flags)?;
    let order = cx.flags.int("order");
    ensure!(order != 0 || kind.is_some(), "name what is to be replaced: -x509, -jwt or -wit");
    ensure!(!cx.flags.duration("timeout").is_zero(), "-timeout must be more than 0");
    let mut client = client(&cx)?;
    let state =
        if order == 0 { begin(&cx, &mut client, kind).await? } else { opened(&mut client, kind, order).await? };
    if cx.flags.bool("wait") {
        return follow::to_the_end(&cx, client, state, interrupted).await;
    }
    let wanted = order != 0 || (cx.flags.bool("force") && state.goal() == Goal::Prepare);
    let state = if wanted { step(&cx, &mut client, state).await? } else { state };
    print_state(&cx, &state, || show::ordered(&state))
}

async fn begin(
    cx: &Context,
    client: &mut RotationClient<Channel>,
    kind: Option<Kind>,
) -> anyhow::Result<RotationState> {
    let kind = kind.unwrap_or(Kind::X509);
    let request = pb::BeginRotationRequest { kind: kind.into(), revoke: cx.flags.bool("revoke") };
    let error = match within(client.begin_rotation(request)).await? {
        Ok(state) => return Ok(state),
        Err(error) => error,
    };
    let is_refusal = error.code() == Code::FailedPrecondition;
    let error = advised(error).context("could not begin to rotate");
    let Some(open) =
        newest(client, Some(kind)).await.ok().and_then(|mut newest| newest.pop()).filter(|open| !open.done)
    else {
        return Err(error);
    };
    if !is_refusal {
        return Err(error);
    }
    Err(Advised::new(error, show::hint_open(&open)).into())
}

/// The open order of this number.
async fn opened(client: &mut RotationClient<Channel>, kind: Option<Kind>, order: i64) -> anyhow::Result<RotationState> {
    let found = newest(client, kind).await?.into_iter().find(|state| state.id == order);
    let state =
        found.with_context(|| format!("there is no order {order}; `finial authority status` shows those that are"))?;
    ensure!(!state.done, "order {order} is done");
    Ok(state)
}

/// Orders the next step.
async fn step(
    cx: &Context,
    client: &mut RotationClient<Channel>,
    state: RotationState,
) -> anyhow::Result<RotationState> {
    let force = cx.flags.bool("force");
    let next = show::left(&state, force);
    ensure!(next != Goal::Unspecified, "nothing is left to order: {}", show::line(&state));
    match within(advance(client, &state, next, force)).await? {
        Ok(state) => Ok(state),
        Err(error) if error.code() == Code::FailedPrecondition => {
            let error = anyhow::Error::from(error).context(format!("could not go on to {}", next.verb()));
            Err(Advised::new(error, show::hint_refused(&state, next)).into())
        }
        Err(error) => Err(error).with_context(|| format!("could not go on to {}", next.verb())),
    }
}

async fn advance(
    client: &mut RotationClient<Channel>,
    state: &RotationState,
    goal: Goal,
    force: bool,
) -> Result<tonic::Response<RotationState>, tonic::Status> {
    client.advance_rotation(pb::AdvanceRotationRequest { id: state.id, goal: goal.into(), force }).await
}
