use super::*;
use crate::entries::{Entries, Turn};
use crate::follow::{Known, Memory};
use finial_core::{AgentRecord, ManualClock, SelectorSet, TrustDomain};
use finial_proto::journal as pb;
use finial_runtime::Supervisor;
use finial_store::StoreSettings;

const BEGAN: i64 = 1000;

/// Agents `a`, `b`, ... whose SVIDs end one after the other, ten seconds apart from `BEGAN + 100` on.
pub(crate) async fn nodes(count: u8) -> (Arc<Nodes>, Supervisor) {
    let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(BEGAN))).await.unwrap();
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
            expires_at: BEGAN + 100 + 10 * i64::from(n),
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
        authority_id: authority_id.into(),
        status: status.into(),
        not_after: BEGAN + 5000,
        ..Default::default()
    };
    let x509_c_as = vec![entry(active, pb::Status::Active), entry(&format!("{active}-next"), pb::Status::Prepared)];
    let data = pb::Entries { x509_c_as, ..Default::default() }.encode_to_vec();
    CaJournal { id, data, active_x509_authority_id: active.into() }
}

fn note(journal_id: i64, seen_at: i64, note: ServerNote) -> RotationNote {
    RotationNote { rotation_id: 1, journal_id, data: note.encode_to_vec(), seen_at }
}

fn reached(goal: Goal, sequence_number: u64, agents: &AgentsSeen) -> ServerNote {
    let (before, agents) = (vec!["one".into(), "old".into()], agents.told().into());
    ServerNote { before, reached: goal.into(), sequence_number, agents, ..Default::default() }
}

fn order(goal: Goal) -> Rotation {
    Rotation { id: 1, kind: 1, goal: goal as i64, revoke: true, created_at: BEGAN, ..Rotation::default() }
}

#[tokio::test]
async fn agents_are_added_up_over_all_servers_and_the_ended_do_not_count() {
    let (nodes, _supervisor) = nodes(4).await;
    let (here, there) = (Domain::default(), AgentsSeen::default());
    here.agents.has(&agent(0), issuer("one"), 7);
    there.has(&agent(1), issuer("one"), 6);
    // Was answered the bundle, and has not asked since.
    there.answered(&agent(2), issuer("new"), 7);
    let notes = vec![note(1, BEGAN + 1, reached(Goal::Prepare, 7, &there))];
    let told = Told { journals: vec![journal(1, "one")], notes };
    let at = |now| state(&order(Goal::Prepare), &told, (&here, &nodes), (9, now));
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
    there.answered(&agent(2), issuer("new"), 8);
    let told = Told { notes: vec![note(1, BEGAN + 1, reached(Goal::Prepare, 7, &there))], ..told };
    let later = state(&order(Goal::Prepare), &told, (&here, &nodes), (9, BEGAN + 115)).agents.unwrap();
    assert_eq!((later.count, later.confirmed, later.moved, later.lacking), (2, 1, 1, vec![agent(3).to_string()]));
    // A datastore that was restored has lower numbers.
    assert_eq!(state(&order(Goal::Prepare), &told, (&here, &nodes), (5, BEGAN + 2)).sequence_number, 5);
}

#[tokio::test]
async fn servers_that_are_silent_or_of_spire_are_waited_for_a_while_only() {
    let (nodes, _supervisor) = nodes(0).await;
    let none = AgentsSeen::default();
    let told = Told {
        journals: vec![journal(1, "one"), journal(2, "spire"), journal(3, "slow")],
        notes: vec![
            note(1, BEGAN + 1, reached(Goal::Activate, 7, &none)),
            note(3, BEGAN + 2, ServerNote { error: "no key".into(), ..reached(Goal::Prepare, 7, &none) }),
        ],
    };
    let domain = Domain::default();
    let obstacles = |now| state(&order(Goal::Activate), &told, (&domain, &nodes), (9, now)).obstacles;
    let spire = "the server of journal 2 (active authority spire) has not taken the order up yet";
    let slow = "the server of journal 3 (active authority slow) has not come to the present goal: no key";
    assert_eq!(obstacles(BEGAN + 2), [spire, slow]);
    assert_eq!(obstacles(BEGAN + TAKE_UP_SECONDS), [slow]);
    assert!(obstacles(BEGAN + 2 + SILENT_SECONDS).is_empty());
    let state = |order: &Rotation| state(order, &told, (&domain, &nodes), (9, BEGAN + 2 + SILENT_SECONDS));
    assert!(!is_over(&order(Goal::Activate), &state(&order(Goal::Activate))), "there is more to come");
    let short = Rotation { revoke: false, ..order(Goal::Activate) };
    assert!(is_over(&short, &state(&short)));
    let closed = Rotation { done: true, ..short };
    assert!(!is_over(&closed, &state(&closed)));
    let follows: Vec<_> = state(&closed).servers.iter().map(|server| server.follows).collect();
    assert_eq!(follows, [true, false, true]);
}

#[tokio::test]
async fn agents_that_are_gone_are_forgotten() {
    let (nodes, _supervisor) = nodes(2).await;
    let seen = AgentsSeen::default();
    (0..3).for_each(|n| seen.has(&agent(n), 1, 1));
    assert_eq!(seen.told().len(), 3 * 24);
    seen.keep(&nodes, BEGAN + 105);
    assert_eq!(seen.told().len(), 24);
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
    domain.agents.answered(&agent(2), 1, 12);
    let sequence = |n| domain.agents.lock()[&of_bytes(agent(n).path().as_bytes())].sequence;
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(1)), (12, 9), "the same history");
    Memory::compare_all(&known).await.unwrap();
    assert_eq!(sequence(0), 12, "not read yet");
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(1)), (0, 9));
    domain.agents.answered(&agent(2), 1, 11);
    assert_eq!(sequence(2), 0, "it was answered that of another history");
    domain.agents.answered(&agent(2), 1, 11);
    domain.agents.has(&agent(0), 1, 11);
    Memory::bundles_changed(&known).await.unwrap();
    assert_eq!((sequence(0), sequence(2)), (11, 11), "what is said since then holds");
}
