//! Orders to rotate as operators see them, under a server that does what the test says.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::disallowed_methods)] // all of it is test

use super::*;
use crate::app::Exit;
use crate::context::{Captured, Io};
use finial_proto::rotation::rotation_server::{Rotation, RotationServer};
use finial_proto::rotation::{Agents, Peer, Server};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

/// What it tells: an act's states one after the other; the next act begins when the next goal is ordered.
#[derive(Clone)]
struct Fake {
    acts: Arc<Vec<Vec<RotationState>>>,
    act: Arc<watch::Sender<usize>>,
    /// What was ordered, and whether it was forced.
    ordered: Arc<Mutex<Vec<(Goal, bool)>>>,
    /// What an unforced order is answered with.
    refusal: Option<&'static str>,
    /// What the beginning is answered with.
    no_beginning: Option<Status>,
    /// How many streams break off after the first state.
    broken: Arc<Mutex<usize>>,
    /// It tells nothing at all.
    is_spires: bool,
}

fn fake(acts: Vec<Vec<RotationState>>) -> Fake {
    Fake {
        acts: Arc::new(acts),
        act: Arc::new(watch::Sender::new(0)),
        ordered: Arc::default(),
        refusal: None,
        no_beginning: None,
        broken: Arc::default(),
        is_spires: false,
    }
}

impl Fake {
    fn now(&self) -> Result<RotationState, Status> {
        match self.acts.get(*self.act.borrow()).and_then(|act| act.first()) {
            _ if self.is_spires => Err(Status::unimplemented("unknown service finial.server.rotation.v1.Rotation")),
            Some(state) => Ok(state.clone()),
            None => Err(Status::not_found("no order")),
        }
    }
}

#[tonic::async_trait]
impl Rotation for Fake {
    async fn begin_rotation(
        &self,
        request: Request<pb::BeginRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        if let Some(refusal) = &self.no_beginning {
            return Err(refusal.clone());
        }
        let (asked, state) = (request.into_inner(), self.now()?);
        assert_eq!((asked.kind(), asked.revoke), (state.kind(), state.revoke));
        Ok(Response::new(state))
    }

    async fn get_rotation(
        &self,
        request: Request<pb::GetRotationRequest>,
    ) -> Result<Response<pb::GetRotationResponse>, Status> {
        let kind = request.into_inner().kind();
        let fits = |state: &RotationState| kind == Kind::Unspecified || kind == state.kind();
        let rotations = match self.now() {
            Err(status) if self.is_spires => return Err(status),
            found => found.into_iter().filter(fits).collect(),
        };
        Ok(Response::new(pb::GetRotationResponse { rotations }))
    }

    async fn advance_rotation(
        &self,
        request: Request<pb::AdvanceRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        let asked = request.into_inner();
        assert_eq!(asked.id, 7);
        self.ordered.lock().unwrap().push((asked.goal(), asked.force));
        if let (Some(refusal), false) = (self.refusal, asked.force) {
            return Err(Status::failed_precondition(refusal));
        }
        self.act.send_modify(|act| *act += 1);
        Ok(Response::new(self.now()?))
    }

    async fn take_back_rotation(
        &self,
        _: Request<pb::TakeBackRotationRequest>,
    ) -> Result<Response<RotationState>, Status> {
        let state = RotationState { goal: Goal::TakeBack.into(), next: 0, ..self.now()? };
        Ok(Response::new(state))
    }

    type WatchRotationStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<RotationState, Status>> + Send>>;

    async fn watch_rotation(
        &self,
        request: Request<pb::WatchRotationRequest>,
    ) -> Result<Response<Self::WatchRotationStream>, Status> {
        assert_eq!(request.into_inner().id, 7);
        let breaks = {
            let mut broken = self.broken.lock().unwrap();
            let breaks = *broken > 0;
            *broken = broken.saturating_sub(1);
            breaks
        };
        let (send, states) = mpsc::channel(1);
        let (acts, mut act) = (self.acts.clone(), self.act.subscribe());
        let first = *act.borrow();
        tokio::spawn(async move {
            for (number, states) in acts.iter().enumerate().skip(first) {
                act.wait_for(|now| *now >= number).await.unwrap();
                for state in states {
                    let _ = send.send(Ok(state.clone())).await;
                    if breaks {
                        let _ = send.send(Err(Status::unavailable("going away"))).await;
                        return;
                    }
                }
                if states.last().is_some_and(|state| state.done) {
                    return;
                }
            }
            send.closed().await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(states))))
    }
}

struct Stage {
    _runtime: tokio::runtime::Runtime,
    _folder: tempfile::TempDir,
    socket: PathBuf,
}

fn serve(fake: &Fake) -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(&socket).unwrap()
    };
    let router = tonic::transport::Server::builder().add_service(RotationServer::new(fake.clone()));
    runtime.spawn(router.serve_with_incoming(UnixListenerStream::new(listener)));
    Stage { _runtime: runtime, _folder: folder, socket }
}

/// The exit code, and what was printed and complained of.
fn run(fake: &Fake, args: &[&str]) -> (u8, String, String) {
    let stage = serve(fake);
    let (io, stdout, stderr) = Io::captured(Vec::new(), |_| None);
    let args = [&args[..1], &["-socketPath", stage.socket.to_str().unwrap()], &args[1..]].concat();
    let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    let code = crate::finial_authority().main(&args, &io);
    (code, stdout.text(), stderr.text())
}

fn server(id: i64, reached: Goal) -> Server {
    Server {
        journal_id: id,
        follows: true,
        seen_at: 1_800_000_000,
        reached: reached.into(),
        active_authority_id: format!("a{id}"),
        prepared_authority_id: format!("p{id}"),
        ..Server::default()
    }
}

/// An order with two servers that have come so far, and two agents.
fn state(goal: Goal, reached: [Goal; 2], confirmed: u64, moved: u64) -> RotationState {
    let next = match goal {
        Goal::Prepare => Goal::Activate,
        Goal::Activate => Goal::Taint,
        Goal::Taint => Goal::Revoke,
        _ => Goal::Unspecified,
    };
    let lack = match goal {
        Goal::Prepare => confirmed < 2,
        _ => moved < 2,
    };
    let behind = reached.iter().any(|one| *one < goal);
    let mut obstacles = Vec::new();
    if behind {
        obstacles.push("1 server is not there yet".to_owned());
    }
    if lack && goal != Goal::Activate {
        obstacles.push("1 agent lacks it".to_owned());
    }
    RotationState {
        id: 7,
        kind: Kind::X509.into(),
        revoke: true,
        goal: goal.into(),
        asked_by: "uid 0 on host-a".into(),
        began_at: 1_800_000_000,
        done: goal == Goal::Revoke && !behind,
        next: next.into(),
        obstacles,
        servers: vec![server(1, reached[0]), server(4, reached[1])],
        agents: Some(Agents {
            count: 2,
            confirmed,
            moved,
            lacking: if lack { vec!["spiffe://td/spire/agent/b".into()] } else { Vec::new() },
            silent: 0,
        }),
        peers: vec![Peer {
            address: "203.0.113.9".into(),
            user_agent: "spire\u{1b}".into(),
            sequence_number: 11,
            fetched_at: 1_800_000_100,
        }],
        sequence_number: 12,
        ..RotationState::default()
    }
}

use Goal::{Activate, Prepare, Revoke, Taint, TakeBack, Unspecified};

/// The whole way, with what changes in between.
fn whole_way() -> Vec<Vec<RotationState>> {
    vec![
        vec![
            state(Prepare, [Unspecified; 2], 0, 0),
            state(Prepare, [Prepare, Unspecified], 0, 0),
            state(Prepare, [Prepare; 2], 1, 0),
            state(Prepare, [Prepare; 2], 2, 0),
        ],
        vec![state(Activate, [Prepare; 2], 2, 0), state(Activate, [Activate; 2], 2, 0)],
        vec![state(Taint, [Activate; 2], 2, 0), state(Taint, [Taint; 2], 2, 1), state(Taint, [Taint; 2], 2, 2)],
        vec![state(Revoke, [Taint; 2], 2, 2), state(Revoke, [Revoke; 2], 2, 2)],
    ]
}

const WHOLE_WAY: &str = "\
X.509: 0 of 2 servers prepared, 0 of 2 agents have the new bundle, 0 of 1 peers fetched it
X.509: 1 of 2 servers prepared, 0 of 2 agents have the new bundle, 0 of 1 peers fetched it
X.509: 2 of 2 servers prepared, 1 of 2 agents have the new bundle, 0 of 1 peers fetched it
X.509: 2 of 2 servers prepared, 2 of 2 agents have the new bundle, 0 of 1 peers fetched it
X.509: 0 of 2 servers activated, 0 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 2 of 2 servers activated, 0 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 0 of 2 servers tainted, 0 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 2 of 2 servers tainted, 1 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 2 of 2 servers tainted, 2 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 0 of 2 servers revoked, 2 of 2 agents have moved, 0 of 1 peers fetched it
X.509: 2 of 2 servers revoked, 2 of 2 agents have moved, 0 of 1 peers fetched it
Order 7 is done: every server signs with a new X.509 authority, and nobody trusts the former ones any more.
";

#[test]
fn each_step_is_ordered_once_all_have_confirmed_and_the_way_is_shown() {
    let fake = fake(whole_way());
    let (code, stdout, stderr) = run(&fake, &["rotate", "-x509", "-wait", "-revoke"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, WHOLE_WAY, ""));
    assert_eq!(*fake.ordered.lock().unwrap(), [(Activate, false), (Taint, false), (Revoke, false)]);
}

#[test]
fn a_stream_that_breaks_is_opened_again() {
    let mut fake = fake(whole_way());
    fake.broken = Arc::new(Mutex::new(2));
    let (code, stdout, stderr) = run(&fake, &["rotate", "-x509", "-wait", "-revoke"]);
    assert_eq!((code, stderr), (0, "The server does not answer (going away); trying again\n".repeat(2)));
    assert_eq!(stdout, WHOLE_WAY);
}

#[test]
fn who_lacks_is_named_when_the_time_is_over() {
    let fake = fake(vec![vec![state(Prepare, [Prepare, Unspecified], 1, 0)]]);
    let (code, stdout, stderr) = run(&fake, &["rotate", "-x509", "-revoke", "-wait", "-timeout", "300ms"]);
    assert_eq!(code, 1);
    assert_eq!(stdout, "X.509: 1 of 2 servers prepared, 1 of 2 agents have the new bundle, 0 of 1 peers fetched it\n");
    assert_eq!(
        stderr,
        "\
X.509: 1 of 2 servers prepared, 1 of 2 agents have the new bundle, 0 of 1 peers fetched it
  1 server is not there yet
  1 agent lacks it
  server 4 has not begun
    lacks it: spiffe://td/spire/agent/b
Error: order 7 did not get from prepare to activate within 300ms: 1 server and 1 agent lack it
hint: the order stays in force; `finial authority rotate -x509 -order 7 -wait` goes on with it, `finial authority take-back -x509` takes it back
"
    );
    assert!(fake.ordered.lock().unwrap().is_empty(), "nothing was activated");
}

#[test]
fn servers_that_are_not_waited_for_are_named_when_it_goes_on_without_them() {
    let mut first = state(Prepare, [Prepare, Unspecified], 2, 0);
    first.obstacles.clear();
    first.servers.push(Server { journal_id: 9, active_authority_id: "z".into(), ..Server::default() });
    let done = RotationState { revoke: false, done: true, next: 0, ..state(Activate, [Activate; 2], 2, 0) };
    first.revoke = false;
    let (code, _, stderr) = run(&fake(vec![vec![first], vec![done]]), &["rotate", "-x509", "-wait"]);
    assert_eq!(code, 0);
    assert_eq!(
        stderr,
        "\
server 4 is not waited for: it was last heard of at 2027-01-15 08:00:00 +0000 UTC, and does all steps when it comes back
server 9 is not waited for: it is SPIRE's (order it there, with `spire-server localauthority`), or does not run (it does all steps when it comes back)
"
    );
}

/// In a hurry: agents are not waited for to activate; that they move is, but for no longer than the time.
#[test]
fn by_force_it_activates_at_once_and_revokes_when_the_time_is_over() {
    let fake = fake(vec![
        vec![state(Prepare, [Prepare; 2], 0, 0)],
        vec![state(Activate, [Activate; 2], 0, 0)],
        vec![state(Taint, [Taint; 2], 0, 1)],
        vec![state(Revoke, [Revoke; 2], 0, 1)],
    ]);
    let (code, stdout, stderr) = run(&fake, &["rotate", "-x509", "-revoke", "-force", "-wait", "-timeout", "300ms"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(*fake.ordered.lock().unwrap(), [(Activate, true), (Taint, false), (Revoke, true)]);
    assert!(stderr.starts_with("Going on to revoke although it took too long:\n"), "{stderr}");
    assert!(stderr.contains("lacks it: spiffe://td/spire/agent/b\n"), "{stderr}");
    assert!(stdout.ends_with("nobody trusts the former ones any more.\n"), "{stdout}");
}

#[test]
fn ctrl_c_leaves_the_order_in_force_and_says_how_to_go_on() {
    let fake = fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0)]]);
    let stage = serve(&fake);
    let (io, stdout, stderr) = Io::captured(Vec::new(), |_| None);
    let mut set = FlagSet::new("authority rotate");
    rotate_flags(&mut set);
    set.string("socketPath", "", "");
    set.string("instance", "", "");
    let args = ["-x509", "-wait", "-revoke", "-socketPath", stage.socket.to_str().unwrap()].map(str::to_owned);
    let context = Context { flags: set.parse(&args).unwrap(), io };
    let shown = async |stdout: &Captured| {
        while stdout.text().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    let error = crate::block_on(rotate_until(context, shown(&stdout))).unwrap_err();
    assert_eq!(error.downcast_ref::<Exit>().unwrap().0, 130);
    assert_eq!(
        stderr.text(),
        "\
Interrupted. Order 7 stays in force: servers stay at prepare, and those that come late get there too.
hint: `finial authority rotate -x509 -order 7 -wait` goes on with it, `finial authority take-back -x509` takes it back
"
    );
}

#[test]
fn the_second_of_two_operators_is_told_of_the_first_and_how_to_join() {
    let mut fake = fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0)]]);
    let refusal = "order 7 was begun by uid 0 on host-a at 2027-01-15T08:00:00Z and is open";
    fake.no_beginning = Some(Status::failed_precondition(refusal));
    let (code, stdout, stderr) = run(&fake, &["rotate", "-x509", "-wait"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(
        stderr,
        format!(
            "Error: could not begin to rotate: rpc error: code = FailedPrecondition desc = {refusal}\n\
             hint: `finial authority rotate -x509 -order 7 -wait` goes on with it, `finial authority take-back -x509` takes it back\n"
        )
    );
}

#[test]
fn step_by_step_what_is_refused_says_who_lacks_and_what_force_would_mean() {
    let mut fake = fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0)], vec![state(Activate, [Prepare; 2], 1, 0)]]);
    fake.refusal = Some("1 of 2 agents lacks the new bundle: spiffe://td/spire/agent/b");
    let (code, stdout, _) = run(&fake, &["rotate", "-x509", "-revoke"]);
    assert_eq!(
        (code, stdout.as_str()),
        (
            0,
            "\
Order 7: every server is to prepare its X.509 authority.
X.509: 2 of 2 servers prepared, 1 of 2 agents have the new bundle, 0 of 1 peers fetched it
hint: `finial authority rotate -x509 -order 7 -wait` goes on with it, `finial authority take-back -x509` takes it back
"
        )
    );
    let (code, stdout, stderr) = run(&fake, &["rotate", "-order", "7"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(
        stderr,
        "\
Error: could not go on to activate: rpc error: code = FailedPrecondition desc = 1 of 2 agents lacks the new bundle: spiffe://td/spire/agent/b
hint: `finial authority status -x509` shows who lacks it; `finial authority rotate -x509 -order 7 -force` goes on nevertheless: who lacks the new bundle by then does not trust what is signed until it has it
"
    );
    let (code, stdout, _) = run(&fake, &["rotate", "-order", "7", "-force"]);
    assert_eq!(code, 0);
    assert!(stdout.starts_with("Order 7: every server is to activate its X.509 authority.\n"), "{stdout}");
    assert_eq!(*fake.ordered.lock().unwrap(), [(Activate, false), (Activate, true)]);
}

#[test]
fn the_status_names_servers_agents_and_peers() {
    let mut shown = state(Prepare, [Prepare, Unspecified], 1, 0);
    shown.servers.push(Server { journal_id: 9, active_authority_id: "z".into(), ..Server::default() });
    shown.servers.push(Server { journal_id: 11, active_authority_id: "y".into(), ..Server::default() });
    shown.servers[1].error = "the key manager\nis away".into();
    shown.servers[2].error = "it is too early to revoke".into();
    shown.servers[2].follows = true;
    shown.agents.as_mut().unwrap().silent = 1;
    let (code, stdout, stderr) = run(&fake(vec![vec![shown]]), &["status"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(
        stdout,
        "\
X.509 order 7, begun 2027-01-15 08:00:00 +0000 UTC by uid 0 on host-a
  Goal: prepare
  Next: activate
    not yet: 1 server is not there yet
    not yet: 1 agent lacks it
  Servers: 1 of 4 prepared
    1: prepared, signs with a1, next is p1
    4: nothing done yet, signs with a4, next is p4
      failed and tries again: the key manager\\nis away
    9: nothing done yet, signs with z
      waits: it is too early to revoke
    11: does not follow, signs with y
      if it stays so, it is SPIRE's (order it there, with `spire-server localauthority`), or does not run (it does all steps when it comes back)
  Agents: 1 of 2 agents have the new bundle
    1 of these say nothing of themselves (SPIRE's): what they have follows from what they asked and when, and whether each of their workloads has moved is not known
    lacks it: spiffe://td/spire/agent/b
  Peers: 0 of 1 fetched the new bundle
    203.0.113.9 (spire\\u{1b}): number 11 (12 is new), at 2027-01-15 08:01:40 +0000 UTC
hint: `finial authority rotate -x509 -order 7 -wait` goes on with it, `finial authority take-back -x509` takes it back
"
    );
    let (code, stdout, _) = run(&fake(vec![]), &["status", "-jwt"]);
    assert_eq!((code, stdout.as_str()), (0, "No order to rotate was ever given.\n"));
    let (code, stdout, _) = run(&fake(whole_way()), &["status", "-output", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, shown["rotations"][0]["goal"].as_str()), (0, Some("PREPARE")));
}

#[test]
fn an_order_is_taken_back() {
    let (code, stdout, _) = run(&fake(whole_way()), &["take-back"]);
    assert_eq!(
        (code, stdout.as_str()),
        (
            0,
            "\
Order 7 is being taken back: every server is to sign again with the X.509 authority that it had before.
hint: `finial authority status -x509` shows how far it is
"
        )
    );
    let (code, _, stderr) = run(&fake(vec![]), &["take-back"]);
    assert_eq!((code, stderr.as_str()), (1, "Error: there is no order to take back\n"));
    // Who waits meanwhile is told, and does not succeed.
    let back = RotationState { done: true, next: 0, ..state(TakeBack, [TakeBack; 2], 0, 0) };
    let waiting = fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0), back]]);
    let (code, stdout, _) = run(&waiting, &["rotate", "-x509", "-wait", "-revoke"]);
    assert_eq!(code, 1);
    assert!(
        stdout.ends_with("Order 7 was taken back: every server signs with the X.509 authority that it had before.\n")
    );
}

#[test]
fn an_order_that_did_not_reach_every_server_does_not_say_so() {
    let revoked = |goal, reached| RotationState { done: true, next: 0, ..state(goal, reached, 2, 2) };
    let orders = fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0), revoked(Revoke, [Revoke, Taint])]]);
    let (code, stdout, _) = run(&orders, &["rotate", "-x509", "-wait", "-revoke"]);
    assert_eq!(code, 0);
    assert!(
        stdout.contains("Order 7 is done at 1 of 2 servers; `spire-server bundle show` shows what is trusted."),
        "{stdout}"
    );
    assert!(stdout.contains("is not waited for") && !stdout.contains("nobody trusts"), "{stdout}");
    let mut lost = revoked(TakeBack, [TakeBack; 2]);
    lost.servers[0].error = "the authority from before is not there any more".into();
    let (_, stdout, _) =
        run(&fake(vec![vec![state(Prepare, [Prepare; 2], 1, 0), lost]]), &["rotate", "-x509", "-wait", "-revoke"]);
    assert!(stdout.contains("Order 7 was taken back at 2 of 2 servers"), "{stdout}");
    assert!(stdout.contains(" could not: the authority from before is not there any more\n"), "{stdout}");
}

#[test]
fn what_was_done_without_a_revocation_is_taken_back_if_nothing_is_open() {
    let done = |goal, reached| RotationState { done: true, next: 0, ..state(goal, reached, 2, 2) };
    let (code, stdout, _) = run(&fake(vec![vec![done(Activate, [Activate; 2])]]), &["take-back"]);
    assert!(code == 0 && stdout.starts_with("Order 7 is being taken back"), "{stdout}");
    let (code, _, stderr) = run(&fake(vec![vec![done(Revoke, [Revoke; 2])]]), &["take-back"]);
    assert_eq!((code, stderr.as_str()), (1, "Error: there is no order to take back\n"));
}

#[test]
fn a_server_that_cannot_is_said_to_be_spires_or_older() {
    let mut fake = fake(vec![]);
    fake.is_spires = true;
    for command in [&["rotate", "-x509"][..], &["status"], &["take-back"]] {
        let (code, _, stderr) = run(&fake, command);
        assert_eq!(code, 1);
        assert!(
            stderr.contains("\nhint: that server is SPIRE's, or an older one: give the order to each server by"),
            "{stderr}"
        );
    }
    let (code, _, stderr) = run(&fake, &["rotate", "-x509", "-jwt"]);
    assert_eq!((code, stderr.as_str()), (1, "Error: -x509, -jwt and -wit are one order each: name one of them\n"));
}

/// One that came late opened it again, and waits for what the operator will not wait for.
#[test]
fn at_its_end_an_order_can_still_be_forced() {
    let mut stuck = state(Revoke, [Revoke, Taint], 2, 2);
    (stuck.next, stuck.obstacles) = (0, vec!["the server of journal 4 waits".into()]);
    let forced = RotationState { forced: true, ..stuck.clone() };
    let fake = fake(vec![vec![stuck], vec![forced]]);
    let (code, _, stderr) = run(&fake, &["rotate", "-order", "7"]);
    assert!(code == 1 && stderr.contains("nothing is left to order"), "{stderr}");
    let (code, _, stderr) = run(&fake, &["rotate", "-order", "7", "-force"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(*fake.ordered.lock().unwrap(), [(Revoke, true)]);
}

#[test]
fn nothing_is_ordered_that_was_not_named() {
    let fake = fake(whole_way());
    let (code, _, stderr) = run(&fake, &["rotate", "-revoke"]);
    assert_eq!((code, stderr.as_str()), (1, "Error: name what is to be replaced: -x509, -jwt or -wit\n"));
    let (code, _, stderr) = run(&fake, &["rotate", "-x509", "-wait", "-timeout", "-5m"]);
    assert_eq!((code, stderr.as_str()), (1, "Error: -timeout must be more than 0\n"));
    let mut off = self::fake(whole_way());
    off.no_beginning = Some(Status::unimplemented("WIT-SVID functionality is not yet implemented"));
    let (code, _, stderr) = run(&off, &["rotate", "-wit"]);
    assert!(code == 1 && !stderr.contains("hint: that server is SPIRE's"), "{stderr}");
}
