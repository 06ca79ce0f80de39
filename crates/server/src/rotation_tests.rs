use super::*;
use crate::entries::{Entries, Turn};
use crate::follow::{Known, Memory};
use finial_core::{AgentRecord, ManualClock, SelectorSet, TrustDomain};
use finial_proto::journal as pb;
use finial_runtime::Supervisor;
use finial_store::StoreSettings;
use std::time::Duration;

const BEGAN: i64 = 1000;

/// Agents `a`, `b`, ... whose SVIDs end one after the other, ten seconds apart from `BEGAN + 100` on.
pub(crate) async fn nodes(count: u8) -> (Arc<Nodes>, Supervisor) {
    nodes_at(count, BEGAN).await
}

/// The same, from another time on.
pub(crate) async fn nodes_at(count: u8, began: i64) -> (Arc<Nodes>, Supervisor) {
    let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(began))).await.unwrap();
    let supervisor = Supervisor::default();
    let turn = Turn::new(supervisor.spawner());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let entries = Entries::load(store.clone(), turn.clone(), trust_domain).await.unwrap();
    let nodes = Nodes::load(store, turn, entries).await.unwrap();
    for n in 0..count {
        let record = AgentRecord {
            id: agent(n),
            attestation_type: "test".into(),
            serial_number: "1".into(),
            expires_at: began + 100 + 10 * i64::from(n),
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest: false,
            agent_version: String::new(),
            selectors: SelectorSet::default(),
        };
        nodes.attest(record).await.unwrap();
    }
    (nodes, supervisor)
}

pub(crate) fn agent(n: u8) -> SpiffeId {
    TrustDomain::parse("example.org").unwrap().agent_id(&format!("test/{}", char::from(b'a' + n))).unwrap()
}

fn issuer(id: &str) -> u64 {
    of_bytes(id.as_bytes())
}

fn journal(id: i64, active: &str) -> CaJournal {
    let entry = |authority_id: &str, status: pb::Status| pb::X509caEntry {
        slot_id: if status == pb::Status::Active { "A" } else { "B" }.into(),
        authority_id: authority_id.into(),
        status: status.into(),
        not_after: BEGAN + 5000,
        ..Default::default()
    };
    let x509_c_as = vec![entry(active, pb::Status::Active), entry(&format!("{active}-next"), pb::Status::Prepared)];
    let data = pb::Entries { x509_c_as, ..Default::default() }.encode_to_vec();
    CaJournal { id, data, active_x509_authority_id: active.into() }
}

fn note(journal: i64, wrote_at: i64, says: ServerNote) -> Note {
    Note { journal, wrote_at, says }
}

fn reached(goal: Goal, sequence_number: u64, agents: &AgentsSeen) -> ServerNote {
    let (before, agents) = (vec!["one".into(), "old".into()], agents.told());
    ServerNote { before, reached: goal.into(), sequence_number, agents, ..Default::default() }
}

fn order(goal: Goal) -> Rotation {
    Rotation { id: 1, kind: 1, goal: goal as i64, revoke: true, created_at: BEGAN, ..Rotation::default() }
}

#[tokio::test]
async fn agents_are_added_up_over_all_servers_and_the_ended_do_not_count() {
    let (nodes, _supervisor) = nodes(4).await;
    let (here, there) = (Domain::new(Arc::default(), nodes), AgentsSeen::default());
    here.agents.has(&agent(0), issuer("one"), 7);
    there.has(&agent(1), issuer("one"), 6);
    // Was answered the bundle, and has not asked since.
    there.answered(&agent(2), issuer("new"), 7, || 1);
    let notes = vec![note(1, BEGAN + 1, reached(Goal::Prepare, 7, &there))];
    let told = Told { journals: vec![journal(1, "one")], notes };
    let at = |now| state(&order(Goal::Prepare), told.clone(), &here, (9, now));
    let now = at(BEGAN + 2);
    assert_eq!((now.sequence_number, now.next()), (7, Goal::Activate));
    let agents = now.agents.unwrap();
    assert_eq!((agents.count, agents.confirmed, agents.moved), (4, 1, 0));
    let lacking: Vec<_> = (1..4).map(|n| agent(n).to_string()).collect();
    assert_eq!(agents.lacking, lacking);
    let expected = format!("3 of 4 agents have not confirmed the new bundle: {}", lacking.join(", "));
    assert_eq!(now.obstacles, [expected]);
    assert_eq!(now.servers[0].former_authority_id, "one");
    assert_eq!(now.servers[0].prepared_authority_id, "one-next");
    there.answered(&agent(2), issuer("new"), 8, || 1);
    there.answered(&agent(2), issuer("new"), 8, || 1);
    let told = Told { notes: vec![note(1, BEGAN + 1, reached(Goal::Prepare, 7, &there))], ..told };
    let later = state(&order(Goal::Prepare), told.clone(), &here, (9, BEGAN + 115)).agents.unwrap();
    assert_eq!(later.silent, 1, "it says nothing of itself");
    assert_eq!((later.count, later.confirmed, later.moved, later.lacking), (2, 1, 1, vec![agent(3).to_string()]));
    // A datastore that was restored has lower numbers.
    assert_eq!(state(&order(Goal::Prepare), told, &here, (5, BEGAN + 2)).sequence_number, 5);
}

/// As the one who looks sees it: what clocks say of when it was told is of no account.
#[tokio::test(start_paused = true)]
async fn servers_that_are_silent_or_of_spire_are_waited_for_a_while_only() {
    let (nodes, _supervisor) = nodes(0).await;
    let none = AgentsSeen::default();
    let mut told = Told {
        journals: vec![journal(1, "one"), journal(2, "spire"), journal(3, "slow")],
        notes: vec![
            note(1, BEGAN - 9999, reached(Goal::Activate, 7, &none)),
            note(3, BEGAN + 9999, ServerNote { error: "no key".into(), ..reached(Goal::Prepare, 7, &none) }),
        ],
    };
    let domain = Domain::new(Arc::default(), nodes);
    let seen = |told: &Told, order: &Rotation| state(order, told.clone(), &domain, (9, BEGAN + 2));
    let obstacles = |told: &Told| seen(told, &order(Goal::Activate)).obstacles;
    let spire = "the server of journal 2 (active authority spire) has not taken the order up yet";
    let slow = "the server of journal 3 (active authority slow) has not come to the present goal: no key";
    assert_eq!(obstacles(&told), [spire, slow]);
    assert!(!all_are_there(&order(Goal::Activate), &told.notes, &domain.beats), "it is too new");
    for _ in 0..4 {
        tokio::time::advance(Duration::from_secs(15)).await;
        told.notes[1].wrote_at -= 1; // a clock that was set back
        assert_eq!(obstacles(&told), [slow], "it is there, whatever it is at");
        assert!(!all_are_there(&order(Goal::Activate), &told.notes, &domain.beats));
    }
    tokio::time::advance(Duration::from_secs(29)).await;
    assert_eq!(obstacles(&told), [slow]);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(obstacles(&told).is_empty());
    assert!(all_are_there(&order(Goal::Activate), &told.notes, &domain.beats));
    assert!(!is_over(&order(Goal::Activate), &seen(&told, &order(Goal::Activate))), "there is more to come");
    let short = Rotation { revoke: false, ..order(Goal::Activate) };
    assert!(is_over(&short, &seen(&told, &short)));
    let closed = Rotation { done: true, ..short };
    assert!(!is_over(&closed, &seen(&told, &closed)));
    let follows: Vec<_> = seen(&told, &closed).servers.iter().map(|server| server.follows).collect();
    assert_eq!(follows, [true, false, true]);
    // To another who looks for the first time, it may be there.
    let another = Domain::default();
    assert_eq!(state(&order(Goal::Activate), told, &another, (9, BEGAN + 2)).obstacles, [spire, slow]);
}

/// Relying parties hold what workloads showed them, and nobody replaces that.
#[tokio::test]
async fn tokens_that_the_former_authority_signed_are_waited_for() {
    let (nodes, _supervisor) = nodes(0).await;
    let domain = Domain::new(Arc::default(), nodes);
    let says = |end| ServerNote { tokens_end: end, ..reached(Goal::Taint, 7, &AgentsSeen::default()) };
    let told = Told {
        journals: vec![journal(1, "one")],
        notes: vec![note(1, 1, says(BEGAN + 300)), note(2, 1, says(BEGAN + 200))],
    };
    let jwt = |goal| Rotation { kind: 2, ..order(goal) };
    let obstacles = |goal, now| state(&jwt(goal), told.clone(), &domain, (9, now)).obstacles;
    let expected = format!("tokens signed by one live until {}", Rfc3339(BEGAN + 300));
    assert_eq!(obstacles(Goal::Taint, BEGAN + 299), [expected]);
    assert!(obstacles(Goal::Taint, BEGAN + 300).is_empty());
    assert!(obstacles(Goal::Activate, BEGAN).is_empty(), "to taint, none is waited for");
}

/// The bundle without what is revoked is one more, which nobody is asked about.
#[tokio::test]
async fn who_has_moved_stays_so_to_the_end() {
    let (nodes, _supervisor) = nodes(1).await;
    let domain = Domain::new(Arc::default(), nodes);
    domain.agents.has(&agent(0), issuer("new"), 7);
    let says = |goal, number| vec![note(1, 1, reached(goal, number, &AgentsSeen::default()))];
    let moved = |goal, number| {
        let told = Told { journals: vec![journal(1, "new")], notes: says(goal, number) };
        state(&order(goal), told, &domain, (9, BEGAN)).agents.unwrap().moved
    };
    assert_eq!((moved(Goal::Taint, 7), moved(Goal::Taint, 8), moved(Goal::Revoke, 8)), (1, 0, 1));
}

/// They renew after the pause of each hundred, and say nothing of it.
#[tokio::test(start_paused = true)]
async fn agents_of_spire_have_moved_once_they_had_the_time_to() {
    for (entries, seconds) in [(0, 0), (99, 0), (100, 5), (250, 10)] {
        let seen = AgentsSeen::default();
        let asks = || seen.answered(&agent(0), 1, 7, || entries);
        asks();
        asks();
        assert_eq!(seen.of(&agent(0)), (7, 0), "it has the bundle");
        if seconds > 0 {
            tokio::time::advance(Duration::from_secs(seconds - 1)).await;
            asks();
            asks();
            assert_eq!(seen.of(&agent(0)), (7, 0), "{entries}");
            tokio::time::advance(Duration::from_secs(1)).await;
            asks();
        }
        asks();
        assert_eq!(seen.of(&agent(0)), (7, 7), "{entries}");
    }
    // One of ours says when it has moved, and no sooner.
    let ours = AgentsSeen::default();
    ours.has(&agent(0), 1, 6);
    (0..5).for_each(|_| ours.answered(&agent(0), 1, 7, || 1));
    assert_eq!(ours.of(&agent(0)), (7, 6));
    ours.has(&agent(0), 1, 7);
    assert_eq!(ours.of(&agent(0)), (7, 7));
}

#[tokio::test]
async fn agents_that_are_gone_are_forgotten() {
    let (nodes, _supervisor) = nodes(2).await;
    let seen = AgentsSeen::default();
    (0..3).for_each(|n| seen.has(&agent(n), 1, 1));
    let told = || seen.told().iter().map(|alike| alike.agents.len()).collect::<Vec<_>>();
    assert_eq!(told(), [3 * 8], "they are alike");
    seen.keep(&nodes, BEGAN + 105);
    assert_eq!(told(), [8]);
}

#[tokio::test]
async fn in_another_history_of_the_datastore_only_those_who_had_less_are_known_to_have_it() {
    let (nodes, supervisor) = nodes(4).await;
    let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(BEGAN))).await.unwrap();
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let own =
        |sequence_number| finial_core::Bundle { sequence_number, ..finial_core::Bundle::empty(trust_domain.clone()) };
    store.create_bundle(&own(10)).await.unwrap();
    let entries = Entries::load(store.clone(), Turn::new(supervisor.spawner()), trust_domain.clone()).await.unwrap();
    let bundles = crate::publish::BundleFeed::open(Arc::new(store), trust_domain.clone()).await.unwrap();
    bundles.publish(own(12));
    let domain = Domain::new(Arc::default(), nodes.clone());
    let known = Known { entries, nodes, bundles, domain: domain.clone() };
    domain.agents.has(&agent(0), 1, 12);
    domain.agents.has(&agent(1), 1, 9);
    domain.agents.answered(&agent(2), 1, 12, || 1);
    let sequence = |n| domain.agents.of(&agent(n)).0;
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(1)), (12, 9), "the same history");
    Memory::compare_all(&known).await.unwrap();
    assert_eq!(sequence(0), 12, "not read yet");
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(1)), (0, 9));
    domain.agents.answered(&agent(2), 1, 11, || 1);
    assert_eq!(sequence(2), 0, "it was answered that of another history");
    domain.agents.answered(&agent(2), 1, 11, || 1);
    domain.agents.has(&agent(0), 1, 11);
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(2)), (11, 11), "what is said since then holds");
}

/// Made for an order that was taken back, and its key is overwritten since.
#[test]
fn what_another_was_prepared_in_the_place_of_is_not_shown_as_next() {
    let entry = |slot: &str, id: &str, status: pb::Status| pb::JwtKeyEntry {
        slot_id: slot.into(),
        authority_id: id.into(),
        status: status.into(),
        ..Default::default()
    };
    use pb::Status::{Active, Old, Prepared};
    let next = |entries: &[pb::JwtKeyEntry]| {
        let data = pb::Entries { jwt_keys: entries.to_vec(), ..Default::default() }.encode_to_vec();
        of_journal(AuthorityKind::Jwt, &data).unwrap().1
    };
    let all = [entry("A", "a", Old), entry("B", "stale", Prepared), entry("B", "b", Active), entry("A", "c", Prepared)];
    assert_eq!((next(&all[..3]), next(&all)), (String::new(), "c".to_owned()));
}
