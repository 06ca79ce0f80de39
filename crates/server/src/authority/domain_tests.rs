use super::super::manager_tests::assert_verifiable;
use super::super::{AuthorityState, Order};
use super::*;
use crate::testing::{HOUR, Lost, Process, START, World};
use AuthorityKind::{Jwt, Wit, X509};
use finial_core::KeyType;
use std::sync::Arc;

const GOALS: [Goal; 5] = [Goal::Prepare, Goal::Activate, Goal::Taint, Goal::Revoke, Goal::TakeBack];

/// One server without keys: two slots and a bundle.
#[derive(Clone, Debug)]
struct Model {
    slots: SlotStates,
    before: Vec<String>,
    tainted: Vec<String>,
    marks: Marks,
    made: u32,
}

fn state(id: &str, status: Status) -> Option<AuthorityState> {
    let upstream_authority_id = String::new();
    Some(AuthorityState { authority_id: id.into(), status, expires_at: START + HOUR, upstream_authority_id })
}

impl Model {
    fn next_step(&self, goal: Goal) -> Option<Due> {
        let (before, tainted) = (&*self.before, &*self.tainted);
        let view = View { slots: &self.slots, before, tainted, marks: Some(&self.marks), now: START };
        due(goal, &view)
    }

    fn current(&self) -> String {
        self.slots.current.as_ref().unwrap().authority_id.clone()
    }

    fn prepare(&mut self) {
        self.made += 1;
        let id = format!("new-{}", self.made);
        self.marks.insert(id.clone(), false);
        self.slots.next = state(&id, Status::Prepared);
    }

    fn swap(&mut self) {
        std::mem::swap(&mut self.slots.current, &mut self.slots.next);
        self.slots.next.as_mut().unwrap().status = Status::Old;
        self.slots.current.as_mut().unwrap().status = Status::Active;
    }

    fn take(&mut self, step: Due, place: &str) {
        match step {
            Due::Prepare => self.prepare(),
            Due::Swap => {
                assert!(self.slots.next.is_some(), "{place}");
                self.swap();
            }
            Due::Taint(id) => {
                assert_ne!(id, self.current(), "{place}: it signs");
                assert!(self.before.contains(&id), "{place}: not meant");
                assert_eq!(self.marks.insert(id.clone(), true), Some(false), "{place}");
                self.tainted.push(id);
            }
            Due::Revoke(id) => {
                assert!(self.before.contains(&id) && id != self.current(), "{place}: not meant");
                assert_eq!(self.marks.remove(&id), Some(true), "{place}: not tainted before");
            }
            Due::Untaint => self.tainted.iter().for_each(|id| {
                self.marks.entry(id.clone()).and_modify(|mark| *mark = false);
            }),
        }
        assert!(self.marks.contains_key(&self.current()), "{place}: what signs is not in the bundle");
    }

    /// What a natural rotation does.
    fn rotate_by_itself(&mut self) {
        match &self.slots.next {
            Some(next) if next.status == Status::Prepared => self.swap(),
            _ => self.prepare(),
        }
    }
}

/// All that can be there when an order comes; `leaked` is tainted already.
fn beginnings() -> Vec<Model> {
    let active = state("active", Status::Active);
    let others = [None, state("other", Status::Prepared), state("other", Status::Old)];
    others
        .into_iter()
        .map(|next| {
            let known = ["active", "older", "leaked"].into_iter().chain(next.is_some().then_some("other"));
            let before: Vec<String> = known.map(String::from).collect();
            // One of them is not in the bundle any more.
            let marks = before.iter().filter(|id| *id != "older").map(|id| (id.clone(), id == "leaked")).collect();
            Model { slots: SlotStates { current: active.clone(), next }, before, tainted: Vec::new(), marks, made: 0 }
        })
        .collect()
}

/// Every way through the goals, with natural rotations before any two steps, ends where it should.
#[test]
fn every_order_comes_to_its_goal_whatever_happens_between_two_steps() {
    for begin in beginnings() {
        // Which goals are ordered, and before which steps a natural rotation comes, each as bits.
        for ordered in 1..1_u32 << GOALS.len() {
            for rotations in 0..1_u32 << 7 {
                let place = format!("{begin:?} goals {ordered:b} rotations {rotations:b}");
                let (mut model, mut step_no, mut last) = (begin.clone(), 0, Goal::Unspecified);
                for goal in GOALS.into_iter().enumerate().filter(|(n, _)| ordered & 1 << n != 0).map(|(_, goal)| goal) {
                    if goal == Goal::TakeBack && last == Goal::Revoke {
                        continue; // nobody may order that
                    }
                    last = goal;
                    for round in 0.. {
                        if step_no < 7 && rotations & 1 << step_no != 0 {
                            model.rotate_by_itself();
                        }
                        step_no += 1;
                        let Some(step) = model.next_step(goal) else { break };
                        model.take(step, &place);
                        assert!(round < 24, "{place}: no end");
                    }
                }
                let signs_new = !model.before.contains(&model.current());
                let left = |tainted| model.before.iter().any(|id| model.marks.get(id) == Some(&tainted));
                match last {
                    Goal::Activate => assert!(signs_new, "{place}"),
                    Goal::Taint => assert!(signs_new && !left(false), "{place}"),
                    Goal::Revoke => assert!(signs_new && !left(false) && !left(true), "{place}"),
                    Goal::TakeBack => {
                        let left = model.before.iter().filter(|id| model.marks.get(*id) == Some(&true));
                        assert_eq!(left.collect::<Vec<_>>(), ["leaked"], "{place}: what others tainted stays so");
                    }
                    _ => {}
                }
                if last == Goal::TakeBack && rotations == 0 {
                    assert_eq!(model.current(), "active", "{place}");
                }
            }
        }
    }
}

#[test]
fn below_an_upstream_authority_nothing_is_marked() {
    let mut model = beginnings().remove(0);
    let step = |model: &Model, goal| {
        due(goal, &View { slots: &model.slots, before: &model.before, tainted: &[], marks: None, now: START })
    };
    assert_eq!(step(&model, Goal::Revoke), Some(Due::Prepare));
    model.prepare();
    assert_eq!(step(&model, Goal::Prepare), None);
    assert_eq!(step(&model, Goal::Revoke), Some(Due::Swap));
    model.swap();
    assert_eq!(step(&model, Goal::Revoke), None);
    assert_eq!(step(&model, Goal::TakeBack), Some(Due::Swap));
}

fn world() -> World {
    let mut world = World::new();
    world.settings.wit_key_type = Some(KeyType::EcP256);
    world
}

fn order(world: &World, kind: AuthorityKind, goal: Goal) {
    let kind = kind.number();
    let mut data = world.memory.data.lock().unwrap();
    match data.rotations.iter_mut().find(|order| order.kind == kind) {
        Some(order) => order.goal = goal as i64,
        None => {
            let order = Rotation { id: 1, kind, goal: goal as i64, created_at: START, ..Rotation::default() };
            data.rotations.push(order);
        }
    }
}

fn close(world: &World) {
    world.memory.data.lock().unwrap().rotations[0].done = true;
}

fn note(world: &World, journal_id: i64) -> Option<ServerNote> {
    let data = world.memory.data.lock().unwrap();
    data.notes.get(&(1, journal_id)).map(|(data, _)| ServerNote::decode(data.as_slice()).unwrap())
}

fn ids(process: &Process, kind: AuthorityKind) -> [Option<(String, Status)>; 2] {
    let slots = process.manager.slots(kind);
    [slots.current, slots.next].map(|s| s.map(|s| (s.authority_id, s.status)))
}

fn signs(process: &Process, kind: AuthorityKind) -> String {
    match ids(process, kind) {
        [Some((id, Status::Active)), _] => id,
        other => panic!("nothing signs: {other:?}"),
    }
}

/// What the bundle has of a kind, with whether it is tainted.
fn in_bundle(world: &World, kind: AuthorityKind) -> Marks {
    marks(kind, &world.bundle().unwrap())
}

/// An order through all goals to the last of these, with a fault on the way, after which the process may be gone. Returns how
/// many calls that took.
async fn carried_out(kind: AuthorityKind, goals: &[Goal], fault: Option<(usize, Lost)>, crash: bool) -> usize {
    let world = world();
    let mut process = world.start().await;
    let place = format!("{kind} {goals:?} {fault:?} crash {crash}");
    let first = signs(&process, kind);
    world.fail(fault);
    for goal in goals {
        order(&world, kind, *goal);
        let mut rounds = 0;
        while note(&world, 1).is_none_or(|note| note.reached() != *goal) {
            rounds += 1;
            assert!(rounds < 12, "{place}: it never came to {goal:?}");
            let fired = world.fault_fired();
            process.manager.heed_orders().await;
            assert_verifiable(&world, &process, &place);
            if crash && !fired && world.fault_fired() {
                process = match world.load().await {
                    Ok(loaded) => loaded,
                    Err(_) => world.load().await.expect("a single fault"),
                };
                assert_verifiable(&world, &process, &place);
            }
            tokio::time::advance(APART).await;
            world.clock.advance(100); // tokens end
        }
    }
    let calls = world.calls();
    process.manager.check().await.expect("the fault is over");
    let known = in_bundle(&world, kind);
    match goals.last() {
        Some(Goal::TakeBack) => {
            assert_eq!((signs(&process, kind), known.get(&first)), (first.clone(), Some(&false)), "{place}");
        }
        _ => {
            assert_ne!(signs(&process, kind), first, "{place}");
            assert!(!known.contains_key(&first), "{place}: it is not revoked");
        }
    }
    let again = world.load().await.unwrap();
    assert_eq!(signs(&again, kind), signs(&process, kind), "{place}: a restart finds another");
    calls
}

#[tokio::test(start_paused = true)]
async fn a_server_killed_at_any_step_of_an_order_sees_it_through() {
    let ways: [&[Goal]; 3] = [
        &[Goal::Prepare, Goal::Activate, Goal::Taint, Goal::Revoke],
        &[Goal::Revoke],
        &[Goal::Prepare, Goal::Activate, Goal::Taint, Goal::TakeBack],
    ];
    for kind in [X509, Jwt, Wit] {
        for way in ways {
            let calls = carried_out(kind, way, None, false).await;
            assert!(calls >= 12, "{calls}");
            for crash in [false, true] {
                for lost in [Lost::Request, Lost::Answer] {
                    for at in 0..calls {
                        carried_out(kind, way, Some((at, lost)), crash).await;
                    }
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn all_servers_follow_and_one_that_comes_late_takes_the_steps_apart() {
    let world = world();
    let late = world.beside("late-", -HOUR);
    let mut here = world.start().await;
    let mut there = late.start().await;
    let (first, second) = (signs(&here, X509), signs(&there, X509));
    order(&world, X509, Goal::Prepare);
    here.manager.heed_orders().await;
    let told = note(&world, 1).unwrap();
    assert_eq!((told.reached(), &told.before[0]), (Goal::Prepare, &first));
    assert_eq!(told.sequence_number, world.bundle().unwrap().sequence_number);
    for goal in [Goal::Activate, Goal::Taint, Goal::Revoke] {
        order(&world, X509, goal);
        here.manager.heed_orders().await;
        assert_eq!(note(&world, 1).unwrap().reached(), goal, "at once where nothing was missed");
    }
    close(&world);
    // Its clock is an hour behind, and still it knows what is old.
    there.manager.heed_orders().await;
    assert!(!world.memory.data.lock().unwrap().rotations[0].done, "the order is open again");
    for goal in [Goal::Prepare, Goal::Activate, Goal::Taint, Goal::Revoke] {
        for _ in 0..3 {
            there.manager.heed_orders().await;
        }
        let known = in_bundle(&world, X509).get(&second).copied();
        let expected = match goal {
            Goal::Prepare | Goal::Activate => Some(false),
            Goal::Taint => Some(true),
            _ => None,
        };
        assert_eq!(known, expected, "{goal:?}");
        assert_eq!(signs(&there, X509) == second, goal == Goal::Prepare, "{goal:?}");
        tokio::time::advance(APART).await;
    }
    let left = in_bundle(&world, X509);
    assert_eq!(left.len(), 2);
    assert!(left.contains_key(&signs(&here, X509)) && left.contains_key(&signs(&there, X509)));
    // A server of a later time has nothing to do with it.
    close(&world);
    world.clock.advance(HOUR);
    let new = world.beside("new-", 0);
    let mut process = new.start().await;
    let own = ids(&process, X509);
    process.manager.heed_orders().await;
    assert_eq!(ids(&process, X509), own);
    assert_eq!(note(&world, 3), None);
}

#[tokio::test(start_paused = true)]
async fn what_was_prepared_before_the_order_is_replaced_too_and_kinds_that_are_off_are_left_alone() {
    let world = World::new();
    let mut process = world.start().await;
    let prepared = process.manager.obey(Order::Prepare(Jwt)).await.unwrap().authority_id;
    let first = signs(&process, Jwt);
    order(&world, Wit, Goal::Revoke);
    order(&world, Jwt, Goal::Revoke);
    for _ in 0..5 {
        process.manager.heed_orders().await;
        tokio::time::advance(APART).await;
    }
    let now = signs(&process, Jwt);
    assert!(now != first && now != prepared);
    assert_eq!(in_bundle(&world, Jwt).into_keys().collect::<Vec<_>>(), [now]);
    let data = world.memory.data.lock().unwrap();
    assert_eq!(data.notes.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_waited_out_and_what_fails_is_told() {
    let world = world();
    let mut process = world.start().await;
    order(&world, X509, Goal::Activate);
    world.fail_all(true);
    assert_eq!(process.manager.heed_orders().await, RETRY);
    world.fail_all(false);
    assert_eq!(process.manager.heed_orders().await, LOOK);
    assert_eq!(note(&world, 1).unwrap().reached(), Goal::Prepare);
    close(&world);
    tokio::time::advance(APART).await;
    // Closed, and not done here: all are to tell again.
    assert_eq!(process.manager.heed_orders().await, LOOK);
    process.manager.heed_orders().await;
    assert_eq!(note(&world, 1).unwrap().reached(), Goal::Activate);
    close(&world);
    assert_eq!(process.manager.heed_orders().await, IDLE, "closed, and done here");
    assert_ne!(Some(signs(&process, X509)), note(&world, 1).unwrap().before.first().cloned());
}

#[tokio::test(start_paused = true)]
async fn what_is_taken_back_leaves_tainted_what_others_tainted() {
    for kind in [X509, Jwt, Wit] {
        // Before the order, or while it stands, and what signed before it, which then signs no more.
        for (goals, by_hand_first) in [
            (&[Goal::Prepare][..], true),
            (&[Goal::Prepare, Goal::Activate, Goal::Taint], true),
            (&[Goal::Prepare, Goal::Activate], false),
            (&[], true),
        ] {
            let world = world();
            let mut process = world.start().await;
            let leaked = signs(&process, kind);
            if by_hand_first {
                let next = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
                process.manager.obey(Order::Activate(kind, next)).await.unwrap();
                process.manager.obey(Order::Taint(kind, leaked.clone())).await.unwrap();
            }
            let first = signs(&process, kind);
            for goal in goals {
                order(&world, kind, *goal);
                process.manager.heed_orders().await;
            }
            if !by_hand_first {
                process.manager.obey(Order::Taint(kind, leaked.clone())).await.unwrap();
            }
            order(&world, kind, Goal::TakeBack);
            process = world.load().await.unwrap();
            process.manager.heed_orders().await;
            let known = in_bundle(&world, kind);
            assert_eq!(known.get(&leaked), Some(&true), "{kind} {goals:?}: its taint was lifted");
            assert_eq!(known.values().filter(|tainted| **tainted).count(), 1, "{kind} {goals:?}");
            assert_eq!(signs(&process, kind) == first, by_hand_first, "{kind} {goals:?}: what is tainted signs");
        }
    }
}

/// The datastore fails over to this state.
async fn fails_over_to(world: &World, process: &Process, data: crate::testing::Data) {
    {
        let mut now = world.memory.data.lock().unwrap();
        let keys = std::mem::take(&mut now.keys);
        *now = crate::testing::Data { keys, ..data };
    }
    process.feed.start_anew();
    process.feed.reload().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_a_failover_undid_is_done_again() {
    let goals = [Goal::Prepare, Goal::Activate, Goal::Taint, Goal::Revoke];
    for kind in [X509, Jwt, Wit] {
        // What is lost with it: all since a goal; the bundle alone, as where a note was written late; our note, and with it
        // which ones were there before.
        for kept in goals {
            for (loses_note, open) in [(false, true), (true, true), (false, false)] {
                let place = format!("{kind} {kept:?} {loses_note} {open}");
                let world = world();
                let mut process = world.start().await;
                let first = signs(&process, kind);
                let mut standby = None;
                for goal in goals {
                    order(&world, kind, goal);
                    process.manager.heed_orders().await;
                    if goal == kept {
                        standby = Some(world.memory.data.lock().unwrap().clone());
                    }
                }
                let signed = signs(&process, kind);
                assert!(!in_bundle(&world, kind).contains_key(&first), "{place}");
                if !open {
                    close(&world);
                }
                let mut standby = standby.unwrap();
                standby.rotations = world.memory.data.lock().unwrap().rotations.clone();
                if loses_note {
                    standby.notes.clear();
                }
                fails_over_to(&world, &process, standby).await;
                for _ in 0..8 {
                    process.manager.check().await.unwrap();
                    process.manager.heed_orders().await;
                    tokio::time::advance(APART).await;
                }
                let known = in_bundle(&world, kind);
                assert!(!known.contains_key(&first), "{place}: it is trusted again");
                assert_eq!((signs(&process, kind), known.get(&signed)), (signed, Some(&false)), "{place}");
                let told = note(&world, 1).unwrap();
                assert!(told.before.contains(&first), "{place}");
                assert!(!open || told.reached() == Goal::Revoke, "{place}: {told:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_of_the_bundle_alone_is_done_again_too_but_what_is_taken_back_is_over() {
    let world = world();
    let mut process = world.start().await;
    let first = signs(&process, Jwt);
    for goal in [Goal::Prepare, Goal::Activate] {
        order(&world, Jwt, goal);
        process.manager.heed_orders().await;
    }
    let bundle = world.bundle().unwrap();
    order(&world, Jwt, Goal::Taint);
    process.manager.heed_orders().await;
    assert_eq!(in_bundle(&world, Jwt).get(&first), Some(&true));
    let calls = world.calls();
    process.manager.heed_orders().await;
    assert_eq!(world.calls(), calls + 1, "a look at what is reached costs nothing");
    let mut lost = world.memory.data.lock().unwrap().clone();
    lost.bundles.insert("example.org".into(), bundle);
    fails_over_to(&world, &process, lost).await;
    process.manager.heed_orders().await;
    assert_eq!(in_bundle(&world, Jwt).get(&first), Some(&true), "its taint is lost");
    order(&world, Jwt, Goal::TakeBack);
    process.manager.heed_orders().await;
    assert_eq!(signs(&process, Jwt), first);
    let next = process.manager.obey(Order::Prepare(Jwt)).await.unwrap().authority_id;
    process.manager.obey(Order::Activate(Jwt, next)).await.unwrap();
    process.manager.obey(Order::Taint(Jwt, first.clone())).await.unwrap();
    process.manager.heed_orders().await;
    assert_eq!(in_bundle(&world, Jwt).get(&first), Some(&true), "what came after is not the order's");
    assert_ne!(signs(&process, Jwt), first);
}

#[tokio::test(start_paused = true)]
async fn another_order_with_the_id_of_one_that_was_lost_is_another() {
    let world = world();
    let mut process = world.start().await;
    let before = world.memory.data.lock().unwrap().clone();
    for goal in [Goal::Prepare, Goal::Activate] {
        order(&world, X509, goal);
        process.manager.heed_orders().await;
    }
    let second = signs(&process, X509);
    // The order is lost; by and by the ID is given again, and here nobody noticed another history.
    world.memory.data.lock().unwrap().notes = before.notes;
    world.memory.data.lock().unwrap().rotations[0].created_at += 5;
    process.manager.heed_orders().await;
    tokio::time::advance(APART).await;
    process.manager.heed_orders().await;
    assert_ne!(signs(&process, X509), second);
    assert_eq!(note(&world, 1).unwrap().before[0], second);
}

#[tokio::test(start_paused = true)]
async fn who_tells_tells_of_agents_that_are_there() {
    let world = world();
    let mut process = world.start().await;
    let (nodes, _supervisor) = crate::rotation::tests::nodes(1).await;
    let domain = Domain::new(Arc::default(), nodes);
    process.manager.parts.domain = domain.clone();
    // Its SVID ended long ago.
    domain.agents.has(&crate::rotation::tests::agent(0), 1, 1);
    order(&world, Jwt, Goal::Prepare);
    for _ in 0..2 {
        process.manager.heed_orders().await;
        tokio::time::advance(TELL).await;
    }
    assert_eq!(note(&world, 1).unwrap().agents.len(), 0);
    assert!(domain.agents.told().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_told_is_known_and_told_later() {
    let world = world();
    let mut process = world.start().await;
    order(&world, Jwt, Goal::Prepare);
    process.manager.heed_orders().await;
    world.memory.data.lock().unwrap().notes.clear();
    // The orders are read, and the note cannot be written.
    world.fail(Some((1, Lost::Request)));
    for is_mute in [true, false] {
        tokio::time::advance(TELL).await;
        process.manager.heed_orders().await;
        assert_eq!(process.manager.following[&Jwt.number()].mute, is_mute);
        assert_eq!(note(&world, 1).is_none(), is_mute);
    }
}

/// A server of which nobody took notice while the order was open comes back when it is done: what it hangs agents and tokens from is
/// not revoked before these have moved, and before that nothing is signed with what they do not know.
#[tokio::test(start_paused = true)]
async fn who_comes_late_waits_for_what_the_others_waited_for() {
    for (kind, forced) in [(X509, false), (Jwt, false), (X509, true)] {
        let world = world();
        let late = world.beside("late-", -10);
        let (mut here, mut there) = (world.start().await, late.start().await);
        let first = signs(&there, kind);
        let (nodes, _supervisor) = crate::rotation::tests::nodes_at(1, world.now()).await;
        for process in [&mut here, &mut there] {
            process.manager.parts.domain = Domain::new(Arc::default(), nodes.clone());
        }
        let agent = crate::rotation::tests::agent(0);
        let hangs_from = |id: &str| finial_proto::digest::of_bytes(id.as_bytes());
        let has = |process: &Process, id: &str| {
            let number = world.bundle().unwrap().sequence_number;
            process.manager.parts.domain.agents.has(&agent, hangs_from(id), number);
        };
        has(&here, &first);
        if kind == Jwt {
            there.authorities.signs_jwt(late.now() + 50);
        }
        for goal in &GOALS[..4] {
            order(&world, kind, *goal);
            here.manager.heed_orders().await;
            assert_eq!(note(&world, 1).unwrap().reached(), *goal);
        }
        {
            let mut data = world.memory.data.lock().unwrap();
            let order = &mut data.rotations[0];
            (order.done, order.revoke, order.forced) = (true, true, forced);
        }
        let stays_at = async |goal: Goal, there: &mut Process, here: &mut Process| {
            for _ in 0..4 {
                there.manager.heed_orders().await;
                here.manager.heed_orders().await;
                world.memory.touch_rotation_note(1, 2).await.unwrap();
                tokio::time::advance(APART).await;
            }
            assert_eq!(note(&world, 2).unwrap().reached(), goal, "{kind}");
            note(&world, 2).unwrap().error
        };
        if forced {
            for _ in 0..6 {
                there.manager.heed_orders().await;
                tokio::time::advance(APART).await;
            }
            assert!(!in_bundle(&world, kind).contains_key(&first), "who forced it waits for nobody");
            continue;
        }
        // The agent has the bundle as it was; another server hears that it has what is new.
        let why = stays_at(Goal::Prepare, &mut there, &mut here).await;
        let expected = format!("it is too early to activate: 1 of 1 agents have not confirmed the new bundle: {agent}");
        assert_eq!((why, signs(&there, kind)), (expected, first.clone()));
        has(&here, &first);
        let why = stays_at(Goal::Taint, &mut there, &mut here).await;
        assert!(why.starts_with("it is too early to revoke: 1 of 1 agents have not moved"), "{why}");
        let second = signs(&there, kind);
        assert_ne!(second, first);
        has(&here, &second);
        if kind == Jwt {
            let why = stays_at(Goal::Taint, &mut there, &mut here).await;
            assert!(
                why.starts_with(&format!("it is too early to revoke: tokens signed by {first} live until ")),
                "{why}"
            );
            world.clock.advance(50);
            late.clock.advance(50);
        }
        assert_eq!(in_bundle(&world, kind).get(&first), Some(&true));
        assert_eq!(stays_at(Goal::Revoke, &mut there, &mut here).await, "");
        assert!(!in_bundle(&world, kind).contains_key(&first));
        assert!(world.memory.data.lock().unwrap().rotations[0].done, "and nobody had to ask for it");
    }
}

/// However long a step takes, the others see that this server is there.
#[tokio::test(start_paused = true)]
async fn a_step_that_takes_long_is_no_silence() {
    let world = world();
    let process = world.start().await;
    order(&world, X509, Goal::Prepare);
    let mut process = process;
    process.manager.heed_orders().await;
    let domain = process.manager.parts.domain.clone();
    let wrote_at = || world.memory.data.lock().unwrap().notes[&(1, 1)].1;
    let first = wrote_at();
    let step = tokio::time::sleep(Duration::from_secs(240));
    tokio::select! {
        () = beat(&*world.memory, &domain) => {}
        () = step => {}
    }
    assert!(wrote_at() > first + 40);
    close(&world);
    process.manager.heed_orders().await;
    assert_eq!(domain.open().0, [0; 0]);
}

#[tokio::test]
async fn tokens_of_a_key_from_before_the_start_may_live_as_long_as_tokens_do() {
    let world = world();
    let process = world.start().await;
    let end = |process: &Process| process.authorities.tokens_end(super::super::tokens::TokenKind::Jwt);
    assert_eq!(end(&process), 0, "nothing was signed");
    let request = crate::issue::JwtRequest {
        id: &finial_core::SpiffeId::parse("spiffe://example.org/w").unwrap(),
        audience: &["a".into()],
        ttl_seconds: 20,
        include_jti: false,
    };
    world.issuer(&process.authorities).jwt_svid(&request).await.unwrap();
    assert_eq!(end(&process), world.now() + 20);
    assert_eq!(end(&world.load().await.unwrap()), world.now() + world.settings.token_ttl_seconds.0);
}
