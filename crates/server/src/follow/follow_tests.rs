//! The follower against a database that does what a test says.

use super::*;
use finial_core::ErrorKind;
use std::sync::Mutex as StdMutex;

/// A database, as far as a follower sees it.
#[derive(Default)]
struct Fake {
    now: StdMutex<Now>,
}

#[derive(Clone, Default)]
struct Now {
    beat: Beat,
    entries: Vec<Event>,
    agents: Vec<Event>,
    broken: bool,
    hangs: bool,
    marks: u64,
    statements: usize,
}

impl Fake {
    fn change(&self, act: impl FnOnce(&mut Now)) {
        act(&mut self.now.lock().unwrap());
    }

    fn write(&self, id: i64, subject: &str) {
        self.change(|now| {
            now.entries.push(Event { id, subject: subject.into() });
            now.entries.sort_by_key(|event| event.id);
        });
    }

    fn statement(&self) -> Result<Now, StoreError> {
        let mut now = self.now.lock().unwrap();
        now.statements += 1;
        if now.broken {
            return Err(StoreError::Unavailable { what: "db".into(), detail: "refuses".into(), advice: "run it" });
        }
        Ok(now.clone())
    }
}

fn within(events: &[Event], spans: &[Span]) -> Vec<Event> {
    let inside = |id: i64| spans.iter().any(|(from, to)| (*from..=*to).contains(&id));
    events.iter().filter(|event| inside(event.id)).cloned().collect()
}

#[async_trait]
impl Source for Fake {
    async fn beat(&self, entries: &[Span], agents: &[Span]) -> Result<Beat, StoreError> {
        let now = self.statement()?;
        if now.hangs {
            std::future::pending::<()>().await;
        }
        let seen = |events: &[Event], spans: &[Span]| EventsSeen {
            first: events.first().map_or(0, |event| event.id),
            last: events.last().map_or(0, |event| event.id),
            within: within(events, spans).len() as i64,
        };
        Ok(Beat { entries: seen(&now.entries, entries), agents: seen(&now.agents, agents), ..now.beat })
    }

    async fn events_after(&self, feed: EventFeed, after: i64, limit: u32) -> Result<Vec<Event>, StoreError> {
        let now = self.statement()?;
        let events = if feed == EventFeed::Entries { now.entries } else { now.agents };
        Ok(events.into_iter().filter(|event| event.id > after).take(limit as usize).collect())
    }

    async fn events_within(&self, feed: EventFeed, spans: &[Span]) -> Result<Vec<Event>, StoreError> {
        let now = self.statement()?;
        Ok(within(if feed == EventFeed::Entries { &now.entries } else { &now.agents }, spans))
    }

    async fn mark(&self) -> Result<u64, StoreError> {
        self.statement()?;
        self.change(|now| now.marks += 10);
        Ok(self.now.lock().unwrap().marks)
    }

    async fn standpoint(&self, feed: EventFeed) -> Result<Standpoint, StoreError> {
        let now = self.statement()?;
        let events = if feed == EventFeed::Entries { now.entries } else { now.agents };
        Ok(Standpoint { last: events.last().map_or(0, |event| event.id), skipped: Default::default() })
    }

    async fn listen(&self) -> Result<Option<Listener>, StoreError> {
        Ok(None)
    }
}

/// What memory was told.
#[derive(Default)]
struct Told(StdMutex<Vec<String>>);

impl Told {
    fn add(&self, text: impl Into<String>) {
        self.0.lock().unwrap().push(text.into());
    }
}

#[async_trait]
impl Memory for Told {
    async fn entries_changed(&self, ids: Vec<EntryId>) -> Result<(), StoreError> {
        self.add(ids.iter().map(EntryId::as_str).collect::<Vec<_>>().join(" "));
        Ok(())
    }
    async fn agents_changed(&self, ids: Vec<SpiffeId>) -> Result<(), StoreError> {
        self.add(ids.iter().map(SpiffeId::as_str).collect::<Vec<_>>().join(" "));
        Ok(())
    }
    async fn bundles_changed(&self) -> Result<(), StoreError> {
        self.add("bundles");
        Ok(())
    }
    async fn compare_all(&self) -> Result<(), StoreError> {
        self.add("all");
        Ok(())
    }
    fn datastore_is_back(&self) {
        self.add("back");
    }
}

struct Scene {
    fake: Arc<Fake>,
    told: Arc<Told>,
    link: Arc<Link>,
    follower: Arc<Follower>,
}

impl Scene {
    async fn new(before: impl FnOnce(&Fake)) -> Self {
        let (fake, told, link) = (Arc::new(Fake::default()), Arc::new(Told::default()), Arc::new(Link::default()));
        fake.change(|now| now.beat.history = "one".into());
        before(&fake);
        let state = State::now(&*fake).await.unwrap();
        let follower = Follower::new(fake.clone(), told.clone(), link.clone(), state);
        Self { fake, told, link, follower }
    }

    /// Looks once; what memory was told.
    async fn look(&self) -> Vec<String> {
        let mut state = self.follower.state.lock().await;
        self.follower.look(&mut state).await;
        std::mem::take(&mut *self.told.0.lock().unwrap())
    }
}

#[tokio::test]
async fn events_are_read_once_and_late_ones_when_they_come() {
    let scene = Scene::new(|fake| fake.write(1, "before")).await;
    assert_eq!(scene.look().await, [""; 0]);
    scene.fake.write(2, "a");
    scene.fake.write(4, "b");
    scene.fake.write(6, "b");
    assert_eq!(scene.look().await, ["a b"]);
    // 3 commits late, 5 was rolled back; the horizon shows when that is certain.
    scene.fake.write(3, "late");
    assert_eq!(scene.look().await, ["late"]);
    let gaps = || async { scene.follower.state.lock().await.entries.gaps(9) };
    assert_eq!(gaps().await, [(5, 5)]);
    scene.fake.change(|now| now.beat.horizon = 9);
    assert_eq!((scene.look().await.len(), gaps().await), (0, vec![(5, 5)]));
    scene.fake.change(|now| now.beat.horizon = 10);
    assert_eq!((scene.look().await.len(), gaps().await), (0, vec![]));
}

#[tokio::test]
async fn while_nothing_changes_a_look_is_one_statement() {
    let scene = Scene::new(|fake| fake.write(1, "a")).await;
    scene.fake.change(|now| now.statements = 0);
    for _ in 0..5 {
        scene.look().await;
    }
    assert_eq!(scene.fake.now.lock().unwrap().statements, 5);
}

#[tokio::test]
async fn bundles_and_relationships_are_told_by_their_fingerprints() {
    let scene = Scene::new(|_| {}).await;
    let mut federation = scene.follower.federation_changes();
    scene.fake.change(|now| now.beat.bundles = "x".into());
    assert_eq!(scene.look().await, ["bundles"]);
    assert!(!federation.has_changed().unwrap());
    scene.fake.change(|now| now.beat.federation = "y".into());
    assert_eq!(scene.look().await, [""; 0]);
    assert!(federation.has_changed().unwrap());
    federation.mark_unchanged();
    scene.look().await;
    assert!(!federation.has_changed().unwrap());
}

#[tokio::test]
async fn after_an_outage_it_goes_on_where_it_was() {
    let scene = Scene::new(|fake| fake.write(1, "a")).await;
    scene.fake.change(|now| now.broken = true);
    assert_eq!(scene.look().await, [""; 0]);
    let refusal = scene.link.refusal().unwrap();
    assert_eq!(refusal.kind(), ErrorKind::Unavailable);
    assert_eq!(refusal.to_string(), "datastore-sql: db refuses; run it");
    assert!(!scene.follower.catch_up().await);
    scene.fake.write(2, "meanwhile");
    scene.fake.change(|now| now.broken = false);
    assert_eq!(scene.look().await, ["meanwhile", "back"]);
    assert!(scene.link.refusal().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_database_that_hangs_is_away() {
    let scene = Scene::new(|_| {}).await;
    scene.fake.change(|now| now.hangs = true);
    scene.look().await;
    assert_eq!(
        scene.link.refusal().unwrap().to_string(),
        "datastore-sql: the database does not answer within 10 s; check its load, its locks and the network to it"
    );
}

#[tokio::test(start_paused = true)]
async fn what_events_cannot_tell_is_compared() {
    let everything = ["all", "bundles"];
    // A standby that was promoted, or a backup.
    let scene = Scene::new(|fake| fake.write(7, "a")).await;
    scene.fake.change(|now| now.beat.history = "two".into());
    assert_eq!(scene.look().await, everything);
    assert_eq!(scene.look().await, [""; 0]);
    // Numbers that were read are gone.
    scene.fake.change(|now| now.entries = vec![Event { id: 3, subject: "b".into() }]);
    assert_eq!(scene.look().await, everything);
    // Pruned before it was read.
    scene.fake.change(|now| now.entries = vec![Event { id: 9, subject: "c".into() }]);
    assert_eq!(scene.look().await, everything);
    // An empty table is nothing odd, unless nobody looked for long.
    scene.fake.change(|now| now.entries.clear());
    assert_eq!(scene.look().await, [""; 0]);
    tokio::time::advance(FORGETFUL * 2).await;
    assert_eq!(scene.look().await, everything);
    // It was empty at the start, and what came while it was away is pruned but for the last.
    let scene = Scene::new(|_| {}).await;
    tokio::time::advance(FORGETFUL * 2).await;
    scene.fake.write(9, "d");
    assert_eq!(scene.look().await, everything);
    // Numbers need not begin at 1.
    let scene = Scene::new(|_| {}).await;
    scene.fake.write(9, "e");
    assert_eq!(scene.look().await, ["e"]);
}

#[tokio::test]
async fn a_database_without_history_is_compared_after_each_outage() {
    let scene = Scene::new(|fake| {
        fake.change(|now| now.beat.history.clear());
        fake.write(1, "a");
    })
    .await;
    assert_eq!(scene.look().await, [""; 0]);
    scene.fake.change(|now| now.broken = true);
    scene.look().await;
    scene.fake.change(|now| now.broken = false);
    assert_eq!(scene.look().await, ["all", "bundles", "back"]);
}

#[tokio::test]
async fn who_catches_up_knows_what_was_committed_before() {
    let scene = Scene::new(|_| {}).await;
    for n in 1..20 {
        scene.fake.write(n, &format!("e{n}"));
        let (one, two) = tokio::join!(scene.follower.catch_up(), scene.follower.catch_up());
        assert!(one && two);
        assert!(scene.told.0.lock().unwrap().contains(&format!("e{n}")));
    }
}

#[tokio::test]
async fn who_would_be_refused_waits_for_a_look() {
    let scene = Scene::new(|_| {}).await;
    let follower = scene.follower.clone();
    let following = async { follower.look_for_ever().await };
    let asked = async {
        scene.fake.write(1, "a");
        assert!(scene.link.look_again().await.unwrap());
        assert_eq!(*scene.told.0.lock().unwrap(), ["a"]);
        scene.fake.change(|now| now.broken = true);
        assert_eq!(scene.link.look_again().await.unwrap_err().kind(), ErrorKind::Unavailable);
    };
    tokio::select! {
        () = following => unreachable!("for ever"),
        () = asked => {}
    }
    assert!(!Link::default().look_again().await.unwrap(), "nobody else writes");
}
