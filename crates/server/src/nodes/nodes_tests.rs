use super::*;
use finial_core::{ManualClock, TrustDomain};
use finial_runtime::Supervisor;
use finial_store::StoreSettings;

struct Scene {
    store: Store,
    turn: Turn,
    nodes: Arc<Nodes>,
    id: SpiffeId,
    supervisor: Supervisor,
}

/// One agent, whose serial number is 1.
async fn scene() -> Scene {
    scene_on(StoreSettings::memory()).await
}

/// No agent but those that are stored.
async fn load(settings: StoreSettings) -> Scene {
    let store = Store::open(settings, Arc::new(ManualClock::at(0))).await.unwrap();
    let supervisor = Supervisor::default();
    let turn = Turn::new(supervisor.spawner());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let entries = Entries::load(store.clone(), turn.clone(), trust_domain.clone()).await.unwrap();
    let nodes = Nodes::load(store.clone(), turn.clone(), entries).await.unwrap();
    let id = trust_domain.agent_id("test/a").unwrap();
    Scene { store, turn, nodes, id, supervisor }
}

async fn scene_on(settings: StoreSettings) -> Scene {
    let scene = load(settings).await;
    let record = AgentRecord {
        id: scene.id.clone(),
        attestation_type: "test".into(),
        serial_number: "1".into(),
        expires_at: 100,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: false,
        agent_version: String::new(),
        selectors: SelectorSet::default(),
    };
    scene.nodes.attest(record).await.unwrap();
    scene
}

async fn at_once<T>(what: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(Duration::ZERO, what).await.ok()
}

#[tokio::test]
async fn a_line_that_is_full_refuses() {
    let Scene { turn, nodes, id, .. } = scene().await;
    assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
    let stuck = || turn.take(std::future::pending::<Result<(), StoreError>>());
    assert!(at_once(stuck()).await.is_none());
    // An agent whose SVID is new has one place, however often it calls.
    assert!(at_once(nodes.promote(&id, "2")).await.is_none(), "the first waits");
    assert!(at_once(nodes.promote(&id, "2")).await.is_some(), "others go on");
    let mut waiting = 2;
    let refusal = loop {
        match at_once(stuck()).await {
            None => waiting += 1,
            Some(result) => break result.unwrap_err(),
        }
        assert!(waiting < 100_000, "no end");
    };
    assert_eq!(refusal.kind(), finial_core::ErrorKind::Unavailable);
}

#[tokio::test]
async fn what_was_given_out_without_the_datastore_is_stored_by_itself() {
    let Scene { store, nodes, id, supervisor, .. } = scene().await;
    let follows = nodes.serials(&id).unwrap();
    assert!(nodes.renew_without_datastore(&id, "1", follows, "2", 200));
    drop(supervisor.spawner().spawn("agents", nodes.clone().run(supervisor.shutdown())));
    nodes.store_pending_soon();
    let stored = async {
        while store.fetch_node(&id).await.unwrap().unwrap().new_serial_number != "2" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), stored).await.unwrap();
}

/// A full disk and a failing one are the same to it: whatever the datastore cannot store now waits.
#[tokio::test]
async fn agents_of_a_file_that_cannot_be_written_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let settings = StoreSettings::file(folder.path().join("db"));
    let Scene { store, nodes, id, .. } = scene_on(settings.clone()).await;
    assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
    store.close().await;
    drop((store, nodes));
    let Scene { nodes, .. } = load(StoreSettings { read_only: true, ..settings }).await;
    assert_eq!(nodes.judge(&id, "2", &[]).await.unwrap(), Standing::Renewed);
    nodes.promote(&id, "2").await.unwrap();
    for (own, serial) in [("2", "3"), ("3", "4")] {
        assert_eq!(nodes.renew(&id, own, serial.into(), 300).await.unwrap(), Renewal::DatastoreAway);
        let follows = nodes.serials(&id).unwrap();
        assert!(nodes.renew_without_datastore(&id, own, follows, serial, 300));
        assert_eq!(nodes.standing(&id, serial, &[]), Standing::Current);
    }
    nodes.store_pending().await;
    assert_eq!(nodes.standing(&id, "4", &[]), Standing::Current, "it waits on");
    assert_eq!(nodes.standing(&id, "2", &[]), Standing::Renewed, "so does the one that is stored");
}

#[tokio::test]
async fn a_renewal_does_not_wait_for_a_slow_datastore_and_its_late_end_is_void() {
    let Scene { store, turn, nodes, id, .. } = scene().await;
    let (go, gate) = tokio::sync::oneshot::channel::<()>();
    let slow = async move {
        let _ = gate.await;
        Ok(())
    };
    assert!(at_once(turn.take(slow)).await.is_none());
    tokio::time::pause();
    assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::DatastoreAway);
    tokio::time::resume();
    let follows = nodes.serials(&id).unwrap();
    assert!(nodes.renew_without_datastore(&id, "1", follows, "3", 300));
    go.send(()).unwrap();
    turn.take(async { Ok(()) }).await.unwrap();
    nodes.store_pending().await;
    let stored = store.fetch_node(&id).await.unwrap().unwrap();
    assert_eq!((stored.serial_number.as_str(), stored.new_serial_number.as_str()), ("1", "3"));
    assert_eq!(nodes.standing(&id, "3", &[]), Standing::Renewed);
    assert_eq!(nodes.standing(&id, "2", &[]), Standing::Superseded, "nobody ever got it");
}

#[tokio::test]
async fn an_agent_that_was_evicted_while_it_waited_gets_nothing() {
    let Scene { nodes, id, store, .. } = scene().await;
    let evicted = store.fetch_node(&id).await.unwrap().unwrap();
    nodes.delete(id.clone()).await.unwrap();
    nodes.attest(AgentRecord { serial_number: "9".into(), ..evicted }).await.unwrap();
    let follows = nodes.serials(&id).unwrap();
    assert!(!nodes.renew_without_datastore(&id, "1", follows.clone(), "2", 200));
    assert_eq!(nodes.standing(&id, "2", &follows), Standing::Ahead, "nobody may get an SVID that says so");
    assert!(nodes.renew_without_datastore(&id, "9", follows, "10", 200));
}

#[tokio::test]
async fn what_waits_to_be_stored_outlives_a_new_look_at_the_datastore() {
    let Scene { nodes, id, .. } = scene().await;
    let follows = nodes.serials(&id).unwrap();
    assert!(nodes.renew_without_datastore(&id, "1", follows, "2", 200));
    nodes.read_again().await.unwrap();
    assert_eq!(nodes.standing(&id, "2", &[]), Standing::Current);
}

async fn stored(Scene { store, id, .. }: &Scene) -> (String, String) {
    let stored = store.fetch_node(id).await.unwrap().unwrap();
    (stored.serial_number, stored.new_serial_number)
}

fn serials(of: (&str, &str)) -> (String, String) {
    (of.0.into(), of.1.into())
}

/// Its answer may be lost again, and then the agent has nothing else.
#[tokio::test]
async fn the_svid_that_asks_stays_good_until_the_next_is_used() {
    let scene = scene().await;
    let Scene { nodes, id, .. } = &scene;
    let give = |own: &str, serial: &str| {
        let follows = nodes.serials(id).unwrap();
        assert!(nodes.renew_without_datastore(id, own, follows, serial, 200));
    };
    give("1", "2");
    assert_eq!(nodes.renew(id, "2", "3".into(), 300).await.unwrap(), Renewal::Stored);
    assert_eq!(stored(&scene).await, serials(("2", "3")), "2 asked");
    // The answers with 3 and 4 were lost.
    give("2", "4");
    give("2", "5");
    nodes.store_pending().await;
    assert_eq!(stored(&scene).await, serials(("2", "5")), "2 asked each time");
    give("5", "6");
    give("6", "7");
    nodes.store_pending().await;
    assert_eq!(stored(&scene).await, serials(("6", "7")), "6 asked last");
}

#[tokio::test]
async fn what_another_server_gave_out_meanwhile_is_replaced_only_when_the_agent_did_not_get_it() {
    let scene = scene().await;
    let Scene { store, nodes, id, .. } = &scene;
    let follows = nodes.serials(id).unwrap();
    assert!(nodes.renew_without_datastore(id, "1", follows.clone(), "2", 200));
    store.renew_node(id, &follows, "5", 200).await.unwrap();
    nodes.store_pending().await;
    assert_eq!(stored(&scene).await, serials(("1", "5")));
    assert_eq!(nodes.standing(id, "5", &[]), Standing::Renewed);
    assert_eq!(nodes.standing(id, "2", &follows), Standing::Ahead);
    nodes.adopt(id, "2", 200, &follows).await;
    assert_eq!(stored(&scene).await, serials(("1", "2")), "it has this one");
    // And the agent is another by now.
    let follows = nodes.serials(id).unwrap();
    assert!(nodes.renew_without_datastore(id, "1", follows, "3", 200));
    store.delete_node(id).await.unwrap();
    nodes.store_pending().await;
    assert_eq!(nodes.standing(id, "3", &[]), Standing::Unknown);
}

impl Scene {
    /// Another server on the same datastore.
    async fn beside(&self) -> Self {
        let supervisor = Supervisor::default();
        let turn = Turn::new(supervisor.spawner());
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let entries = Entries::load(self.store.clone(), turn.clone(), trust_domain).await.unwrap();
        let nodes = Nodes::load(self.store.clone(), turn.clone(), entries).await.unwrap();
        Self { store: self.store.clone(), turn, nodes, id: self.id.clone(), supervisor }
    }
}

/// An agent's SVID of an outage, and the ones that it says it follows.
type Svid = (&'static str, Box<[Box<str>]>);

/// The agent shows one at a server that cannot reach the datastore, and gets the next.
async fn renewed_at(server: &Scene, (own, follows): Svid, serial: &'static str) -> Svid {
    let Scene { nodes, id, .. } = server;
    match nodes.standing(id, own, &follows) {
        Standing::Ahead => nodes.adopt(id, own, 200, &follows).await,
        standing => assert_eq!(standing, Standing::Current),
    }
    let follows = nodes.serials(id).unwrap();
    assert!(nodes.renew_without_datastore(id, own, follows.clone(), serial, 200));
    (serial, follows)
}

/// Two servers that cannot reach the datastore, at which the agent was in turn, and what it has in the end.
async fn two_of_an_outage() -> ([Scene; 2], Svid) {
    let one = scene().await;
    let two = one.beside().await;
    for server in [&one, &two] {
        server.turn.link().set_away(&StoreError::Busy(1));
    }
    let svid = renewed_at(&one, ("1", Box::default()), "2").await;
    let svid = renewed_at(&two, svid, "3").await;
    let svid = renewed_at(&two, svid, "4").await;
    // This one has never heard of 3.
    let svid = renewed_at(&one, svid, "5").await;
    for server in [&one, &two] {
        server.turn.link().set_back();
    }
    ([one, two], svid)
}

#[tokio::test]
async fn servers_that_each_gave_out_a_part_store_it_in_any_order() {
    for first in [0, 1] {
        let (servers, (serial, follows)) = two_of_an_outage().await;
        for server in [first, 1 - first] {
            servers[server].nodes.store_pending().await;
            servers[1 - server].nodes.read_again().await.unwrap();
        }
        assert_eq!(stored(&servers[0]).await, serials(("4", "5")), "server {first} was first");
        for server in &servers {
            assert_eq!(server.nodes.standing(&server.id, serial, &follows), Standing::Renewed);
        }
    }
}

#[tokio::test]
async fn an_svid_is_known_by_any_that_it_follows_however_far_the_others_are() {
    let ([one, two], (serial, follows)) = two_of_an_outage().await;
    let Scene { store, id, .. } = &two;
    let first = ["1".into()];
    store.renew_node(id, &first, "3", 200).await.unwrap();
    for recorded in [("1", "3"), ("3", "")] {
        assert_eq!(stored(&two).await, serials(recorded));
        one.nodes.read_again().await.unwrap();
        assert_eq!(one.nodes.standing(id, serial, &[]), Standing::Current, "{recorded:?}");
        assert_eq!(one.beside().await.nodes.standing(id, serial, &follows), Standing::Ahead, "{recorded:?}");
        store.promote_serial(id, "3").await.unwrap();
    }
    one.nodes.store_pending().await;
    assert_eq!(stored(&one).await, serials(("4", "5")));
    // And not by an agent that is another by now.
    store.delete_node(id).await.unwrap();
    two.nodes.read_again().await.unwrap();
    assert_eq!(two.nodes.standing(id, serial, &follows), Standing::Unknown);
}

#[tokio::test]
async fn however_long_an_outage_an_svid_names_the_recorded_and_the_last() {
    let server = scene().await;
    server.turn.link().set_away(&StoreError::Busy(1));
    const SERIALS: [&str; 20] = [
        "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20", "21",
    ];
    let mut svid: Svid = ("1", Box::default());
    for serial in SERIALS {
        svid = renewed_at(&server, svid, serial).await;
    }
    let expected: Vec<Box<str>> = std::iter::once(1).chain(5..=20).map(|n| n.to_string().into()).collect();
    assert_eq!(*svid.1, *expected);
}

/// A standby that was behind has taken over.
#[tokio::test]
async fn what_a_failover_took_from_an_agent_is_stored_again() {
    let scene = scene().await;
    let Scene { store, nodes, id, .. } = &scene;
    for (own, serial) in [("1", "2"), ("2", "3"), ("3", "4")] {
        assert_eq!(nodes.renew(id, own, serial.into(), 200).await.unwrap(), Renewal::Stored);
    }
    // The agent has 3, or 4.
    for (serial, new_serial) in [("2", "3"), ("2", ""), ("3", "")] {
        let update = AgentUpdate {
            serial_number: Some(serial.into()),
            new_serial_number: Some(new_serial.into()),
            ..AgentUpdate::default()
        };
        store.update_node(id, update).await.unwrap();
        nodes.compare_all().await.unwrap();
        assert_eq!(nodes.standing(id, "4", &[]), Standing::Current, "{serial}, {new_serial}");
        let has = nodes.standing(id, "3", &[]);
        assert!([Standing::Current, Standing::Renewed].contains(&has), "{serial}, {new_serial}: {has:?}");
        assert_eq!(nodes.standing(id, "1", &[]), Standing::Superseded);
        nodes.store_pending().await;
        assert_eq!(stored(&scene).await, serials(("3", "4")), "{serial}, {new_serial}");
    }
    // There it renewed already; and what is evicted or banned there has nothing.
    store.renew_node(id, &["3".into()], "5", 200).await.unwrap();
    nodes.compare_all().await.unwrap();
    assert_eq!(nodes.standing(id, "4", &[]), Standing::Superseded);
    store.ban_node(id).await.unwrap();
    nodes.compare_all().await.unwrap();
    nodes.store_pending().await;
    assert_eq!(stored(&scene).await, serials(("", "")));
    assert_eq!(nodes.standing(id, "5", &[]), Standing::Banned);
}

/// The answer with 2 was lost, and the agent got 3 instead; the standby knows of 2 only.
#[tokio::test]
async fn what_a_failover_took_is_stored_in_the_place_of_what_the_agent_never_got() {
    let scene = scene().await;
    let Scene { store, nodes, id, .. } = &scene;
    for serial in ["2", "3"] {
        assert_eq!(nodes.renew(id, "1", serial.into(), 200).await.unwrap(), Renewal::Stored);
    }
    nodes.promote(id, "3").await.unwrap();
    let update =
        AgentUpdate { serial_number: Some("1".into()), new_serial_number: Some("2".into()), ..AgentUpdate::default() };
    store.update_node(id, update).await.unwrap();
    nodes.compare_all().await.unwrap();
    assert_eq!(nodes.standing(id, "3", &[]), Standing::Current);
    nodes.store_pending().await;
    assert_eq!(stored(&scene).await, serials(("1", "3")));
    assert_eq!(nodes.standing(id, "3", &[]), Standing::Renewed);
}

#[tokio::test]
async fn a_ban_that_a_failover_took_is_made_again() {
    let scene = scene().await;
    let Scene { store, nodes, id, .. } = &scene;
    let record = store.fetch_node(id).await.unwrap().unwrap();
    let lose = async || {
        let update = AgentUpdate { serial_number: Some("1".into()), ..AgentUpdate::default() };
        store.update_node(id, update).await.unwrap();
    };
    // Whether the row is known, or the last serial number.
    for nodes in [nodes, &scene.beside().await.nodes] {
        nodes.ban(id.clone()).await.unwrap();
        lose().await;
        nodes.compare_all().await.unwrap();
        assert_eq!(nodes.standing(id, "1", &[]), Standing::Banned);
        assert_eq!(stored(&scene).await, serials(("", "")));
        assert!(!nodes.some_wait.load(Ordering::SeqCst), "nothing is stored again");
    }
    // Evicted there, and attested anew.
    store.delete_node(id).await.unwrap();
    store.create_or_update_node(&AgentRecord { serial_number: "9".into(), ..record }).await.unwrap();
    nodes.compare_all().await.unwrap();
    assert_eq!(nodes.standing(id, "9", &[]), Standing::Current);
}

#[tokio::test]
async fn an_agent_is_not_unknown_before_a_look_at_the_datastore() {
    let Scene { turn, nodes, id, .. } = scene().await;
    let other = TrustDomain::parse("example.org").unwrap().agent_id("test/b").unwrap();
    assert!(!nodes.is_attested(&other).await.unwrap(), "nobody else writes");
    turn.link().set_followed();
    turn.link().set_away(&StoreError::Busy(1));
    assert!(nodes.is_attested(&id).await.unwrap());
    let unsure = nodes.is_attested(&other).await.unwrap_err();
    assert_eq!(unsure.kind(), finial_core::ErrorKind::Unavailable);
}

#[tokio::test]
async fn only_the_agent_that_called_is_renewed() {
    let Scene { nodes, id, .. } = scene().await;
    assert_eq!(nodes.renew(&id, "0", "2".into(), 200).await.unwrap(), Renewal::Superseded);
    assert_eq!(nodes.renew(&id, "1", "2".into(), 200).await.unwrap(), Renewal::Stored);
    // The first use of 2 is noted, if nothing else has done so: otherwise 3 would take its place.
    assert_eq!(nodes.renew(&id, "2", "3".into(), 300).await.unwrap(), Renewal::Stored);
    assert_eq!(nodes.standing(&id, "2", &[]), Standing::Current);
    assert_eq!(nodes.standing(&id, "3", &[]), Standing::Renewed);
    nodes.ban(id.clone()).await.unwrap();
    assert_eq!(nodes.renew(&id, "2", "4".into(), 400).await.unwrap(), Renewal::Superseded);
}

#[tokio::test]
async fn what_was_stored_by_a_change_that_failed_is_read_again() {
    let Scene { store, turn, nodes, id, supervisor: _supervisor } = scene().await;
    let fail = async |error: StoreError| {
        let (store, id) = (store.clone(), id.clone());
        let work = async move {
            store.ban_node(&id).await?;
            Err::<(), _>(error)
        };
        turn.take(work).await.unwrap_err();
        nodes.repair().await;
    };
    // A refusal says that nothing was stored, and is no reason to read anything.
    fail(StoreError::NotFound).await;
    assert_eq!(nodes.standing(&id, "1", &[]), Standing::Current);
    fail(StoreError::Io { path: "db".into(), detail: "fsync".into() }).await;
    assert_eq!(nodes.standing(&id, "1", &[]), Standing::Banned);
    assert!(!turn.is_in_doubt());
}
