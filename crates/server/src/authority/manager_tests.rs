use crate::testing::{HOUR, Lost, Process, START, World};
use finial_proto::journal as pb;
use prost::Message;

/// What must hold at any moment for whoever verifies: what signs is in the bundle, in the datastore and in the feed.
pub(super) fn assert_verifiable(world: &World, process: &Process, place: &str) {
    let stored = world.bundle();
    let published = process.feed.own();
    if let Some(active) = process.authorities.x509() {
        let root = active.ca.certificate();
        let known = |b: &finial_core::Bundle| b.x509_authorities.iter().any(|a| &a.der == root);
        assert!(stored.as_ref().is_some_and(known), "{place}: the active X.509 authority is not in the bundle");
        assert!(published.as_ref().is_some_and(|p| known(&p.bundle)), "{place}: the feed does not have it");
    }
    if let Some(active) = process.authorities.jwt() {
        let known = |b: &finial_core::Bundle| b.jwt_authorities.iter().any(|a| a.key_id == active.signer.key_id());
        assert!(stored.as_ref().is_some_and(known), "{place}: the active JWT authority is not in the bundle");
        assert!(published.is_some_and(|p| known(&p.bundle)), "{place}: the feed does not have the JWT key");
    }
}

pub(super) fn journal(world: &World) -> pb::Entries {
    let data = world.memory.data.lock().unwrap();
    assert_eq!(data.journals.len(), 1, "a server has one row");
    let row = data.journals.values().next().unwrap();
    pb::Entries::decode(row.data.as_slice()).unwrap()
}

#[tokio::test]
async fn a_first_start_makes_both_authorities_and_a_restart_finds_them() {
    let world = World::new();
    let process = world.start().await;
    assert_verifiable(&world, &process, "start");
    let (x509, jwt) = (process.x509_id().unwrap(), process.jwt_id().unwrap());
    assert_eq!(jwt.len(), 32);
    let entries = journal(&world);
    let entry = &entries.x509_c_as[0];
    assert_eq!((entry.slot_id.as_str(), entry.issued_at, entry.not_after), ("A", START, START + 24 * HOUR));
    assert_eq!((entry.status(), &entry.authority_id), (pb::Status::Active, &x509));
    assert_eq!((entries.jwt_keys[0].status(), &entries.jwt_keys[0].kid), (pb::Status::Active, &jwt));
    assert_eq!(world.memory.data.lock().unwrap().journals[&1].active_x509_authority_id, x509);
    drop(process);
    let process = world.load().await.unwrap();
    assert_eq!((process.x509_id(), process.jwt_id()), (Some(x509), Some(jwt)), "active again before the first round");
}

#[tokio::test]
async fn successors_are_in_the_bundle_half_a_life_before_they_sign() {
    let world = World::new();
    let mut process = world.start().await;
    let (first, first_jwt) = (process.x509_id(), process.jwt_id());
    world.clock.advance(12 * HOUR);
    process.manager.check().await.unwrap();
    assert_eq!(world.bundle().unwrap().x509_authorities.len(), 1, "not a second too early");
    world.clock.advance(1);
    process.manager.check().await.unwrap();
    let bundle = world.bundle().unwrap();
    assert_eq!((bundle.x509_authorities.len(), bundle.jwt_authorities.len()), (2, 2));
    assert_eq!((process.x509_id(), process.jwt_id()), (first.clone(), first_jwt.clone()));
    world.clock.advance(8 * HOUR);
    process.manager.check().await.unwrap();
    assert_ne!(process.x509_id(), first);
    assert_ne!(process.jwt_id(), first_jwt);
    let statuses: Vec<_> = journal(&world).x509_c_as.iter().map(|e| (e.slot_id.clone(), e.status())).collect();
    assert_eq!(statuses, [("A".into(), pb::Status::Old), ("B".into(), pb::Status::Active)]);
    assert_verifiable(&world, &process, "after a rotation");
    let now = process.x509_id();
    assert_eq!(world.load().await.unwrap().x509_id(), now, "a restart goes on with the new one");
    // Another rotation goes back to slot A.
    world.clock.advance(21 * HOUR);
    process.manager.check().await.unwrap();
    assert_eq!(journal(&world).x509_c_as.last().unwrap().slot_id, "A");
}

#[tokio::test]
async fn the_journal_keeps_ten_of_each_kind() {
    let world = World::new();
    let mut process = world.start().await;
    for _ in 0..15 {
        world.clock.advance(21 * HOUR);
        process.manager.check().await.unwrap();
    }
    let entries = journal(&world);
    assert_eq!((entries.x509_c_as.len(), entries.jwt_keys.len()), (10, 10));
    assert_eq!(world.load().await.unwrap().x509_id(), process.x509_id());
}

/// One life of a server: start, prepare, rotate, prepare and rotate at once.
const LIFE: [i64; 4] = [0, 12 * HOUR + 1, 8 * HOUR, 13 * HOUR];

async fn live(world: &World, crash: bool) -> usize {
    let mut process: Option<Process> = None;
    // What may be active after a crash: what was before the round in which it happened, or what became so in it.
    let mut either = [None, None];
    let mut crashed = !crash;
    for (step, by) in LIFE.into_iter().enumerate() {
        world.clock.advance(by);
        // Rounds follow each other until one works; a crash throws the process away in the round with the fault.
        for round in 0..4 {
            let place = format!("step {step} round {round} crash {crash}");
            let mut alive = match process.take() {
                Some(alive) => alive,
                None => match world.load().await {
                    Ok(loaded) => {
                        let restored = loaded.x509_id();
                        assert!(step == 0 || restored.is_some(), "{place}: nothing came back");
                        assert!(restored.is_none() || either.contains(&restored), "{place}: another one came back");
                        loaded
                    }
                    Err(_) => continue,
                },
            };
            let before = alive.x509_id();
            let done = alive.manager.check().await.is_ok();
            either = [before.clone(), alive.x509_id()];
            assert!(before.is_none() || alive.x509_id().is_some(), "{place}: nothing signs any more");
            assert_verifiable(world, &alive, &place);
            if world.fault_fired() && !crashed {
                crashed = true;
                continue;
            }
            process = Some(alive);
            if done {
                break;
            }
        }
        let alive = process.as_mut().expect("a single fault is survived");
        alive.manager.check().await.expect("the fault is over");
        let active = alive.authorities.x509().expect("one is active");
        assert!(active.ca.not_after() > world.now(), "step {step}: it is valid");
        assert!(alive.authorities.jwt().is_some_and(|j| j.not_after > world.now()));
        either = [alive.x509_id(), alive.x509_id()];
        // And it would survive a crash now.
        let twin = match world.load().await {
            Ok(twin) => twin,
            Err(_) => world.load().await.expect("a single fault"),
        };
        let ids = (alive.x509_id(), alive.jwt_id());
        assert_eq!((twin.x509_id(), twin.jwt_id()), ids, "step {step}: authority lost by a restart");
    }
    world.calls()
}

#[tokio::test]
async fn a_fault_or_crash_at_any_call_loses_no_authority() {
    let calls = live(&World::new(), false).await;
    assert!(calls > 20, "{calls}");
    for crash in [false, true] {
        for lost in [Lost::Request, Lost::Answer] {
            for at in 0..calls {
                let world = World::new();
                world.fail(Some((at, lost)));
                live(&world, crash).await;
            }
        }
    }
}

#[tokio::test]
async fn an_outage_leaves_the_active_authority_signing_and_ends_by_itself() {
    let world = World::new();
    let mut process = world.start().await;
    let first = process.x509_id();
    world.fail_all(true);
    let health = process.manager.health();
    for hours in 0..22 {
        world.clock.advance(HOUR);
        assert_eq!(process.manager.check().await.is_err(), hours >= 12, "hour {hours}");
        assert_eq!(process.x509_id(), first);
    }
    assert!(health.error().is_none(), "ten failures are not more than ten");
    let _ = process.manager.check().await;
    assert_eq!(health.error(), Some("rotations exceed the threshold number of failures"));
    world.fail_all(false);
    process.manager.check().await.unwrap();
    assert!(health.error().is_none());
    assert_eq!(process.x509_id(), first, "others are given the time to know the next");
    world.clock.advance(300);
    process.manager.check().await.unwrap();
    assert_ne!(process.x509_id(), first);
    assert_verifiable(&world, &process, "after the outage");
}

#[tokio::test]
async fn without_anything_to_sign_with_the_start_fails() {
    let world = World::new();
    let mut process = world.load().await.unwrap();
    world.fail_all(true);
    assert!(process.manager.start().await.is_err());
    assert!(process.x509_id().is_none() && process.jwt_id().is_none());
    world.fail_all(false);
    process.manager.start().await.unwrap();
}

#[tokio::test]
async fn a_journal_that_cannot_be_saved_is_saved_later() {
    let world = World::new();
    let mut process = world.start().await;
    world.clock.advance(12 * HOUR + 1);
    // Calls of the next round: save the journal (nothing to save), then key, journal, bundle of the X.509 authority.
    world.fail(Some((1, Lost::Request)));
    process.manager.check().await.unwrap();
    world.clock.advance(8 * HOUR);
    process.manager.check().await.unwrap();
    assert_eq!(journal(&world).x509_c_as.len(), 2);
    assert_eq!(world.load().await.unwrap().x509_id(), process.x509_id());
}

#[tokio::test]
async fn no_key_is_overwritten_while_the_journal_says_that_it_signs() {
    let world = World::new();
    let mut process = world.start().await;
    world.clock.advance(12 * HOUR + 1);
    process.manager.check().await.unwrap();
    world.memory.faults.lock().unwrap().fail_journal_writes = true;
    world.clock.advance(8 * HOUR);
    process.manager.check().await.unwrap();
    let second = process.x509_id();
    // Slot A is free in memory, but the datastore still finds this server's journal by the key in it.
    world.clock.advance(9 * HOUR);
    assert!(process.manager.check().await.is_err(), "a successor would overwrite it");
    assert_eq!(process.x509_id(), second);
    world.memory.faults.lock().unwrap().fail_journal_writes = false;
    let process = world.start().await;
    assert_eq!(process.x509_id(), second, "after a crash it is found again");
}

#[tokio::test]
async fn an_authority_that_is_not_in_the_bundle_is_not_used() {
    let world = World::new();
    let process = world.start().await;
    let (old, old_jwt) = (process.x509_id(), process.jwt_id());
    {
        let mut data = world.memory.data.lock().unwrap();
        let bundle = data.bundles.get_mut("example.org").unwrap();
        bundle.x509_authorities.clear();
        bundle.jwt_authorities.clear();
    }
    let process = world.start().await;
    assert!(process.x509_id().is_some_and(|id| Some(id) != old));
    assert!(process.jwt_id().is_some_and(|id| Some(id) != old_jwt));
    assert_verifiable(&world, &process, "after a restore");
}

#[tokio::test]
async fn an_authority_whose_key_is_gone_or_another_is_replaced() {
    for key in [None, Some(finial_crypto::PrivateKey::generate(finial_core::KeyType::EcP256).unwrap())] {
        let world = World::new();
        let process = world.start().await;
        let (old, jwt) = (process.x509_id(), process.jwt_id());
        world.clock.advance(12 * HOUR + 1);
        let mut process = process;
        process.manager.check().await.unwrap();
        {
            let mut data = world.memory.data.lock().unwrap();
            match key {
                None => data.keys.remove("JWT-Signer-A"),
                Some(key) => data.keys.insert("JWT-Signer-A".into(), key),
            };
        }
        let process = world.start().await;
        assert_eq!(process.x509_id(), old, "the other kind is not touched");
        assert_ne!(process.jwt_id(), jwt);
        assert_verifiable(&world, &process, "key gone");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_past_the_end_or_back_leaves_something_usable() {
    let world = World::new();
    let mut process = world.start().await;
    for by in [400 * 24 * HOUR, -400 * 24 * HOUR, 23 * HOUR, -30 * HOUR, -5] {
        world.clock.advance(by);
        process.manager.check().await.unwrap();
        assert_verifiable(&world, &process, "after a jump");
        let issuer = world.issuer(&process.authorities);
        issuer.self_test().await.unwrap();
        let active = process.authorities.x509().unwrap();
        let svid = issuer.server_x509_svid(active.ca.signer().public_key()).await.unwrap();
        let roots = process.feed.own().unwrap().roots.clone().unwrap();
        finial_crypto::verify_x509_svid(&svid.chain, &roots, world.now()).unwrap();
        drop(process);
        process = world.start().await;
    }
}

#[tokio::test]
async fn without_jwt_svids_there_is_no_jwt_authority() {
    let mut world = World::new();
    world.settings.jwt_key_type = None;
    let process = world.start().await;
    assert!(process.x509_id().is_some() && process.jwt_id().is_none());
    assert!(world.bundle().unwrap().jwt_authorities.is_empty());
}

/// By row: the active authority that the row is found by, and the one that its entries have.
fn rows(world: &World) -> Vec<(String, Vec<String>)> {
    let data = world.memory.data.lock().unwrap();
    let active = |row: &finial_store::CaJournal| {
        let entries = pb::Entries::decode(row.data.as_slice()).unwrap();
        let active = entries.x509_c_as.into_iter().filter(|e| e.status() == pb::Status::Active);
        (row.active_x509_authority_id.clone(), active.map(|e| e.authority_id).collect())
    };
    data.journals.values().map(active).collect()
}

#[tokio::test]
async fn servers_on_one_datastore_keep_a_journal_each_whatever_their_clocks_say() {
    let first = World::new();
    let worlds = [first.beside("one ", 0), first.beside("two ", 60), first.beside("three ", -60)];
    let mut processes = Vec::new();
    for world in &worlds {
        processes.push(world.start().await);
    }
    for round in 0..4 {
        let signing: Vec<_> = processes.iter().map(|p| p.x509_id().unwrap()).collect();
        let rows = rows(&first);
        assert_eq!(rows.len(), 3, "round {round}: each has one row");
        for id in &signing {
            assert!(rows.contains(&(id.clone(), vec![id.clone()])), "round {round}: {rows:?}");
        }
        let bundle = first.bundle().unwrap();
        for (at, world) in worlds.iter().enumerate() {
            assert_verifiable(world, &processes[at], "of several");
            let twin = world.load().await.unwrap();
            assert_eq!(twin.x509_id(), Some(signing[at].clone()), "round {round}: each finds its own again");
            assert_eq!(twin.jwt_id(), processes[at].jwt_id());
            // What the others sign is verified by what this one reads of them.
            let others = twin.feed.own().unwrap().bundle.x509_authorities.len();
            assert_eq!(others, bundle.x509_authorities.len());
        }
        for (at, world) in worlds.iter().enumerate() {
            for hours in [13, 8] {
                world.clock.advance(hours * HOUR);
                processes[at].manager.check().await.unwrap();
            }
        }
        let now: Vec<_> = processes.iter().map(|p| p.x509_id().unwrap()).collect();
        assert!(now.iter().zip(&signing).all(|(now, then)| now != then), "round {round}: all rotated");
    }
}

#[tokio::test]
async fn wit_authorities_live_as_jwt_authorities_do_where_they_are_wanted() {
    let mut world = World::new();
    assert!(world.start().await.authorities.wit().is_none(), "off by default");
    world.settings.wit_key_type = Some(finial_core::KeyType::EcP384);
    let mut process = world.start().await;
    let id = |process: &Process| process.authorities.wit().unwrap().signer.key_id().to_owned();
    let first = id(&process);
    let bundle = world.bundle().unwrap();
    assert_eq!(bundle.wit_authorities.iter().map(|k| &k.key_id).collect::<Vec<_>>(), [&first]);
    assert_eq!(bundle.jwt_authorities.len(), 1, "JWT-SVIDs have keys of their own");
    assert!(world.memory.data.lock().unwrap().keys.contains_key("WIT-Signer-A"));
    let entry = journal(&world).wit_keys[0].clone();
    assert_eq!((entry.slot_id.as_str(), entry.status(), &entry.kid), ("A", pb::Status::Active, &first));
    assert_eq!(id(&world.load().await.unwrap()), first, "a restart finds it");
    for hours in [13, 8] {
        world.clock.advance(hours * HOUR);
        process.manager.check().await.unwrap();
    }
    let second = id(&process);
    assert_ne!(second, first);
    let states = process.authorities.states();
    let ids = [&states.wit.current, &states.wit.next].map(|s| s.as_ref().unwrap().authority_id.clone());
    assert_eq!(ids, [second.clone(), first]);
    world.memory.data.lock().unwrap().bundles.get_mut("example.org").unwrap().wit_authorities.clear();
    assert_ne!(id(&world.start().await), second, "one that is not in the bundle is not used");
}

/// As an upstream authority gives it that makes subject key IDs in another way than of the key's SHA-1.
#[tokio::test]
async fn a_journal_is_found_by_the_key_whatever_the_certificate_calls_it() {
    let datastore = World::new();
    let [world, other] = ["one ", "two "].map(|name| datastore.beside(name, 0));
    let process = world.start().await;
    other.start().await;
    for row in world.memory.data.lock().unwrap().journals.values_mut() {
        row.active_x509_authority_id = format!("so called {}", row.id);
    }
    let twin = world.load().await.unwrap();
    assert_eq!((twin.x509_id(), twin.jwt_id()), (process.x509_id(), process.jwt_id()));
    assert_eq!(world.start().await.jwt_id(), process.jwt_id());
    assert_eq!(world.memory.data.lock().unwrap().journals.len(), 2, "nobody has another row");
}

/// Protobuf by hand, from the field numbers of SPIRE's journal.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut len = bytes.len();
    while len > 0x7f {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(bytes);
    out
}

fn number(number: u8, mut value: u64) -> Vec<u8> {
    let mut out = vec![number << 3];
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

#[tokio::test]
async fn a_journal_that_spire_wrote_is_gone_on_from_and_what_we_do_not_know_is_kept() {
    let world = World::new();
    let process = world.start().await;
    let active = process.authorities.x509().unwrap();
    let id = process.x509_id().unwrap();
    let (issued, ends) = (START as u64, (START + 24 * HOUR) as u64);
    let x509 = [
        field(1, b"A"),
        number(2, issued),
        field(3, active.ca.certificate()),
        number(5, 3),
        field(6, id.as_bytes()),
        number(7, ends),
        field(8, b"00"),
    ]
    .concat();
    let jwt = process.authorities.jwt().unwrap();
    let kid = process.jwt_id().unwrap();
    let jwt_entry = [
        field(1, b"A"),
        number(2, issued),
        number(3, ends),
        field(4, kid.as_bytes()),
        field(5, jwt.signer.signer().public_key().spki_der()),
        number(6, 3),
        field(7, kid.as_bytes()),
    ]
    .concat();
    let wit = [field(1, b"A"), number(2, issued), number(3, ends), field(4, b"wit-kid"), number(6, 3)].concat();
    let blob = [field(1, &x509), field(2, &jwt_entry), field(3, &wit)].concat();
    world.memory.data.lock().unwrap().journals.get_mut(&1).unwrap().data = blob;
    let mut process = world.start().await;
    assert_eq!((process.x509_id(), process.jwt_id()), (Some(id), Some(kid)));
    world.clock.advance(21 * HOUR);
    process.manager.check().await.unwrap();
    let entries = journal(&world);
    assert_eq!(entries.wit_keys[0].kid, "wit-kid", "another kind's entries are kept");
    assert_eq!(entries.x509_c_as.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_task_rotates_when_it_is_time_and_ends_when_asked() {
    let world = World::new();
    let mut process = world.start().await;
    let first = process.x509_id();
    world.clock.advance(13 * HOUR);
    process.manager.check().await.unwrap();
    let shutdown = finial_runtime::Shutdown::new();
    let mut changes = process.authorities.changes();
    changes.mark_unchanged();
    let run = process.manager.run(shutdown.clone());
    let authorities = process.authorities.clone();
    let act = async {
        world.clock.advance(8 * HOUR);
        changes.changed().await.unwrap();
        shutdown.trigger();
    };
    tokio::join!(run, act);
    let now = authorities.x509().map(|a| a.authority_id.clone());
    assert_ne!(now, first);
}

/// What happens to a server over the years.
#[derive(Clone, Debug)]
enum Event {
    Pass(i64),
    Fault(usize, bool),
    Crash,
}

fn event() -> impl proptest::strategy::Strategy<Value = Event> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (1..14 * HOUR).prop_map(Event::Pass),
        1 => (-40 * HOUR..400 * 24 * HOUR).prop_map(Event::Pass),
        3 => (0usize..8, any::<bool>()).prop_map(|(at, answer)| Event::Fault(at, answer)),
        2 => Just(Event::Crash),
    ]
}

async fn survive(events: Vec<Event>) {
    let world = World::new();
    let mut process = world.start().await;
    let mut signed_by = std::collections::BTreeSet::new();
    for event in &events {
        match event {
            Event::Pass(seconds) => world.clock.advance(*seconds),
            Event::Fault(at, answer) => {
                world.fail(Some((*at, if *answer { Lost::Answer } else { Lost::Request })));
            }
            Event::Crash => {
                process = loop {
                    if let Ok(loaded) = world.load().await {
                        break loaded;
                    }
                };
            }
        }
        let before = process.x509_id();
        let _ = process.manager.check().await;
        assert!(before.is_none() || process.x509_id().is_some(), "nothing signs any more");
        assert_verifiable(&world, &process, "on the way");
        signed_by.extend(process.authorities.x509().map(|a| a.ca.certificate().to_vec()));
    }
    world.fail(None);
    process.manager.check().await.expect("nothing fails any more");
    world.issuer(&process.authorities).self_test().await.expect("it signs");
    let bundle = world.bundle().unwrap();
    for root in signed_by {
        assert!(bundle.x509_authorities.iter().any(|a| *a.der == *root), "what signed once left the bundle");
    }
    let twin = world.load().await.unwrap();
    assert_eq!((twin.x509_id(), twin.jwt_id()), (process.x509_id(), process.jwt_id()), "a restart changes nothing");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_happens_there_is_something_to_sign_with_that_everyone_trusts(
        events in proptest::collection::vec(event(), 1..25),
    ) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(survive(events));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_has_the_deadline_that_it_is_given() {
    let takes = async |seconds| {
        tokio::time::sleep(std::time::Duration::from_secs(seconds)).await;
        Ok::<_, super::AuthorityError>(())
    };
    super::manager::within("the datastore", takes(29), |e| e).await.unwrap();
    let late = super::manager::within("the datastore", takes(31), |e| e).await.unwrap_err();
    assert!(matches!(late, super::AuthorityError::Timeout("the datastore", 30)), "{late}");
    super::manager::within_seconds(240, "the upstream authority", takes(200), |e| e).await.unwrap();
}
