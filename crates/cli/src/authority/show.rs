//! An order to rotate in words.

use crate::agent::go_time;
use crate::server::api::plural;
use finial_proto::rotation::{Goal, Kind, RotationState, Server};
use std::fmt::Write as _;

/// Agents that are named when a step was waited for in vain.
const NAMED_MAX: usize = 20;

pub(super) fn kind(state: &RotationState) -> &'static str {
    match state.kind() {
        Kind::X509 => "X.509",
        Kind::Jwt => "JWT",
        Kind::Wit => "WIT",
        Kind::Unspecified => "unknown",
    }
}

fn flag(state: &RotationState) -> &'static str {
    match state.kind() {
        Kind::Jwt => "-jwt",
        Kind::Wit => "-wit",
        Kind::X509 | Kind::Unspecified => "-x509",
    }
}

fn participle(goal: Goal) -> &'static str {
    match goal {
        Goal::Prepare => "prepared",
        Goal::Activate => "activated",
        Goal::Taint => "tainted",
        Goal::Revoke => "revoked",
        Goal::TakeBack => "taken back",
        Goal::Unspecified => "nothing done yet",
    }
}

/// What a server, an agent or a peer said of itself cannot draw on a terminal, nor pretend to be another line.
fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

fn there(state: &RotationState, server: &Server) -> bool {
    server.follows && server.reached >= state.goal
}

/// How many of a list are so: `2 of 3`.
fn of<T>(all: &[T], is: impl Fn(&T) -> bool) -> String {
    format!("{} of {}", all.iter().filter(|one| is(one)).count(), all.len())
}

fn peers(state: &RotationState) -> String {
    of(&state.peers, |peer| state.sequence_number > 0 && peer.sequence_number >= state.sequence_number)
}

fn agents(state: &RotationState) -> String {
    let agents = state.agents.clone().unwrap_or_default();
    match state.goal() {
        Goal::Unspecified | Goal::Prepare => {
            format!("{} of {} agents have the new bundle", agents.confirmed, agents.count)
        }
        Goal::TakeBack => format!("{} agents", agents.count),
        _ => format!("{} of {} agents have moved", agents.moved, agents.count),
    }
}

/// How far it is, in a line.
pub(super) fn line(state: &RotationState) -> String {
    let (servers, agents) = (of(&state.servers, |server| there(state, server)), agents(state));
    let mut text = format!("{}: {servers} servers {}, {agents}", kind(state), participle(state.goal()));
    if !state.peers.is_empty() {
        let _ = write!(text, ", {} peers fetched it", peers(state));
    }
    text
}

/// What failed at servers, a line each.
pub(super) fn failures(state: &RotationState) -> Vec<String> {
    let failed = state.servers.iter().filter(|server| !server.error.is_empty());
    failed.map(|one| format!("server {} {}", one.journal_id, failure(one))).collect()
}

/// What has come to its goal is not tried again.
fn failure(server: &Server) -> String {
    let then = match server.reached() {
        Goal::TakeBack => "could not",
        // It comes late, and looks itself whether a step can be taken.
        _ if server.error.starts_with("it is too early") => "waits",
        _ => "failed and tries again",
    };
    format!("{then}: {}", one_line(&server.error))
}

/// Servers that are left behind by going on now, a line each.
pub(super) fn left_behind(state: &RotationState) -> Vec<String> {
    let left = state.servers.iter().filter(|server| !there(state, server));
    let line = |server: &Server| match server.follows {
        true => format!(
            "server {} is not waited for: it was last heard of at {}, and does all steps when it comes back",
            server.journal_id,
            go_time(server.seen_at)
        ),
        false => format!("server {} is not waited for: {NOT_FOLLOWING}", server.journal_id),
    };
    left.map(line).collect()
}

const NOT_FOLLOWING: &str = "it is SPIRE's (order it there, with `spire-server localauthority`), or does not run (it does all steps when it comes back)";

const SILENT: &str = "say nothing of themselves (SPIRE's): what they have follows from what they asked and when, and whether each of their workloads has moved is not known";

/// Everything of an order.
pub(super) fn whole(state: &RotationState) -> String {
    let by = if state.asked_by.is_empty() { String::new() } else { format!(" by {}", one_line(&state.asked_by)) };
    let mut out = format!("{} order {}, begun {}{by}\n", kind(state), state.id, go_time(state.began_at));
    let forced = if state.forced { " (forced)" } else { "" };
    let _ = writeln!(out, "  Goal: {}{forced}", if state.done { "done" } else { state.goal().verb() });
    if state.next() != Goal::Unspecified && !state.done {
        let _ = writeln!(out, "  Next: {}", state.next().verb());
        for obstacle in &state.obstacles {
            let _ = writeln!(out, "    not yet: {}", one_line(obstacle));
        }
    }
    let _ =
        writeln!(out, "  Servers: {} {}", of(&state.servers, |server| there(state, server)), participle(state.goal()));
    for one in &state.servers {
        server(&mut out, one);
    }
    let _ = writeln!(out, "  Agents: {}", agents(state));
    let silent = state.agents.as_ref().map_or(0, |agents| agents.silent);
    if silent > 0 {
        let _ = writeln!(out, "    {silent} of these {SILENT}");
    }
    lacking(&mut out, state);
    if !state.peers.is_empty() {
        let _ = writeln!(out, "  Peers: {} fetched the new bundle", peers(state));
    }
    for peer in &state.peers {
        let (address, program) = (one_line(&peer.address), one_line(&peer.user_agent));
        let program = if program.is_empty() { program } else { format!(" ({program})") };
        let (number, at) = (peer.sequence_number, go_time(peer.fetched_at));
        let _ = writeln!(out, "    {address}{program}: number {number} ({} is new), at {at}", state.sequence_number);
    }
    if !state.done {
        let _ = write!(out, "{}", hint_open_line(state));
    }
    out
}

fn server(out: &mut String, server: &Server) {
    let _ = write!(
        out,
        "    {}: {}",
        server.journal_id,
        if server.follows { participle(server.reached()) } else { "does not follow" }
    );
    for (what, id) in [
        ("signs with", &server.active_authority_id),
        ("next is", &server.prepared_authority_id),
        ("before it was", &server.former_authority_id),
    ] {
        if !id.is_empty() {
            let _ = write!(out, ", {what} {}", one_line(id));
        }
    }
    let _ = writeln!(out);
    if !server.follows {
        let _ = writeln!(out, "      if it stays so, {NOT_FOLLOWING}");
    } else if !server.error.is_empty() {
        let _ = writeln!(out, "      {}", failure(server));
    }
}

/// How many agents lack what the next step needs.
fn behind(state: &RotationState) -> u64 {
    let agents = state.agents.clone().unwrap_or_default();
    match state.next() {
        Goal::Unspecified => 0,
        Goal::Revoke => agents.count.saturating_sub(agents.moved),
        _ => agents.count.saturating_sub(agents.confirmed),
    }
}

/// Who that is.
fn lacking(out: &mut String, state: &RotationState) {
    let agents = state.agents.clone().unwrap_or_default();
    for id in agents.lacking.iter().take(NAMED_MAX) {
        let _ = writeln!(out, "    lacks it: {}", one_line(id));
    }
    let left = behind(state).saturating_sub(agents.lacking.len().min(NAMED_MAX) as u64);
    if left > 0 && !agents.lacking.is_empty() {
        let _ = writeln!(out, "    and {left} more");
    }
}

/// What can be ordered: by force also, at the end, that servers which come late wait for nobody.
pub(super) fn left(state: &RotationState, force: bool) -> Goal {
    match state.next() {
        Goal::Unspecified if force && !state.forced && !state.obstacles.is_empty() => state.goal(),
        next => next,
    }
}

/// After an order without `-wait`.
pub(super) fn ordered(state: &RotationState) -> String {
    let goal = state.goal().verb();
    format!(
        "Order {}: every server is to {goal} its {} authority.\n{}{}",
        state.id,
        kind(state),
        line_end(state),
        hint_open_line(state)
    )
}

fn line_end(state: &RotationState) -> String {
    format!("{}\n", line(state))
}

fn hint_open_line(state: &RotationState) -> String {
    format!("hint: {}\n", hint_open(state))
}

pub(super) fn hint_status(state: &RotationState) -> String {
    format!("hint: `finial authority status {}` shows how far it is\n", flag(state))
}

/// How to go on with an order, and how to take it back.
pub(super) fn hint_open(state: &RotationState) -> String {
    let (id, flag) = (state.id, flag(state));
    match state.goal() {
        Goal::TakeBack => format!("it is being taken back; `finial authority status {flag}` shows how far it is"),
        Goal::Revoke => format!(
            "`finial authority rotate {flag} -order {id} -wait` stays until it is done; it cannot be taken back any more"
        ),
        _ => format!(
            "`finial authority rotate {flag} -order {id} -wait` goes on with it, `finial authority take-back {flag}` takes it back"
        ),
    }
}

pub(super) fn hint_refused(state: &RotationState, next: Goal) -> String {
    let (id, flag, then) = (
        state.id,
        flag(state),
        match next {
            Goal::Revoke => {
                "who has not moved by then must attest anew, and its workloads are not trusted until they have"
            }
            _ => "who lacks the new bundle by then does not trust what is signed until it has it",
        },
    );
    format!(
        "`finial authority status {flag}` shows who lacks it; `finial authority rotate {flag} -order {id} -force` goes on nevertheless: {then}"
    )
}

/// The last words of an order that came to its end.
pub(super) fn done(state: &RotationState) -> String {
    let (id, kind) = (state.id, kind(state));
    let carried_out = state.servers.iter().all(|server| there(state, server) && server.error.is_empty());
    match (state.goal(), state.revoke) {
        (goal, _) if !carried_out => {
            let (servers, left) = (of(&state.servers, |server| there(state, server)), left_behind(state).join("\n"));
            let what = if goal == Goal::TakeBack { "was taken back" } else { "is done" };
            let failed = failures(state).join("\n");
            let lines = [left, failed].into_iter().filter(|lines| !lines.is_empty()).map(|lines| lines + "\n");
            let trusted = "`spire-server bundle show` shows what is trusted";
            format!("Order {id} {what} at {servers} servers; {trusted}.\n{}", lines.collect::<String>())
        }
        (Goal::TakeBack, _) => {
            format!("Order {id} was taken back: every server signs with the {kind} authority that it had before.\n")
        }
        (_, true) => format!(
            "Order {id} is done: every server signs with a new {kind} authority, and nobody trusts the former ones any more.\n"
        ),
        (_, false) => format!(
            "Order {id} is done: every server signs with a new {kind} authority. What the former ones signed is good until it ends.\n"
        ),
    }
}

/// Why a step was waited for in vain: who lacks what.
pub(super) fn in_vain(state: &RotationState) -> String {
    let mut out = line_end(state);
    for obstacle in &state.obstacles {
        let _ = writeln!(out, "  {}", one_line(obstacle));
    }
    let late = state.servers.iter().filter(|server| server.follows && !there(state, server));
    for server in late {
        let _ = writeln!(
            out,
            "  server {} has {}",
            server.journal_id,
            match server.reached() {
                Goal::Unspecified => "not begun",
                reached => participle(reached),
            }
        );
    }
    for failure in failures(state) {
        let _ = writeln!(out, "  {failure}");
    }
    lacking(&mut out, state);
    out
}

/// How many lack it, for the error of a timeout.
pub(super) fn lacks(state: &RotationState) -> String {
    let servers = state.servers.iter().filter(|server| !there(state, server)).count();
    let agents = usize::try_from(behind(state)).unwrap_or(usize::MAX);
    format!(
        "{servers} {} and {agents} {} lack it",
        plural(servers, "server", "servers"),
        plural(agents, "agent", "agents")
    )
}
