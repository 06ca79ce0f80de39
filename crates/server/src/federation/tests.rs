use super::judge::HINT_MAX;
use super::*;
use crate::live::{Live, LiveSettings};
use async_trait::async_trait;
use finial_core::{EndpointProfile, X509Authority};
use finial_store::StoreError;
use tokio::sync::watch;

/// What the network and the datastore are made of here.
#[derive(Default)]
struct Stage {
    relationships: Relationships,
    relationships_fail: bool,
    /// What endpoints answer; nothing: they are away.
    endpoints: BTreeMap<TrustDomain, Bundle>,
    stored: BTreeMap<TrustDomain, Bundle>,
    /// Whom was asked when, in seconds.
    fetches: Vec<(String, u64)>,
    saves: usize,
    save_fails: bool,
    /// How long an answer takes.
    slow: Duration,
    /// How long it takes to read the relationships, or one.
    slow_reading: Duration,
    /// How often all were read.
    readings: usize,
}

struct Play {
    stage: Mutex<Stage>,
    /// All that the datastore has.
    connection: tokio::sync::Mutex<()>,
    began: Instant,
    settings: LiveSettings,
    fetched: Notify,
    /// Tells of changes at other servers.
    others: watch::Sender<u64>,
}

impl Play {
    fn new() -> Arc<Self> {
        let settings = LiveSettings::new(Live::default());
        Arc::new(Self {
            stage: Mutex::default(),
            connection: tokio::sync::Mutex::default(),
            began: Instant::now(),
            settings,
            fetched: Notify::new(),
            others: watch::Sender::new(0),
        })
    }

    fn set<T>(&self, act: impl FnOnce(&mut Stage) -> T) -> T {
        act(&mut self.stage.lock().unwrap())
    }

    fn federation(self: &Arc<Self>) -> Arc<Federation> {
        Federation::new(self.clone(), Metrics::disabled())
    }

    async fn read(&self) -> Result<Relationships, StoreError> {
        let _connection = self.connection.lock().await;
        tokio::time::sleep(self.set(|s| s.slow_reading)).await;
        self.set(|s| if s.relationships_fail { Err(StoreError::Busy(1)) } else { Ok(s.relationships.clone()) })
    }

    /// Waits until so many fetches have begun, and gives their times.
    async fn fetches(&self, count: usize) -> Vec<u64> {
        let enough = async {
            while self.set(|s| s.fetches.len() < count) {
                self.fetched.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(7 * 24 * 3600), enough).await.expect("fetches");
        self.set(|s| s.fetches.iter().map(|(_, at)| *at).collect())
    }
}

#[async_trait]
impl Ground for Play {
    async fn relationships(&self) -> Result<Relationships, StoreError> {
        let read = self.read().await;
        self.set(|s| s.readings += 1);
        read
    }

    async fn relationship(&self, trust_domain: &TrustDomain) -> Result<Option<FederatesWith>, StoreError> {
        Ok(self.read().await?.remove(trust_domain))
    }

    fn changed(&self) -> watch::Receiver<Arc<Live>> {
        self.settings.subscribe()
    }

    async fn fetch(&self, trust_domain: &TrustDomain, _: &FederatesWith) -> Result<Bundle, FederationError> {
        let slow = self.set(|s| {
            s.fetches.push((trust_domain.as_str().to_owned(), self.began.elapsed().as_secs()));
            s.slow
        });
        self.fetched.notify_one();
        tokio::time::sleep(slow).await;
        let away = || FederationError::Fetch { url: "https://away.test".into(), cause: "away".into() };
        self.set(|s| s.endpoints.get(trust_domain).cloned().ok_or_else(away))
    }

    async fn save(&self, bundle: Bundle) -> Result<(), StoreError> {
        self.set(|s| {
            if s.save_fails {
                return Err(StoreError::Busy(1));
            }
            s.saves += 1;
            s.stored.insert(bundle.trust_domain.clone(), bundle);
            Ok(())
        })
    }

    fn known(&self, trust_domain: &TrustDomain) -> Option<Bundle> {
        self.set(|s| s.stored.get(trust_domain).cloned())
    }
}

fn name(text: &str) -> TrustDomain {
    TrustDomain::parse(text).unwrap()
}

fn with(url: &str) -> FederatesWith {
    FederatesWith { bundle_endpoint_url: url.into(), profile: EndpointProfile::HttpsWeb }
}

fn bundle(text: &str, root: u8, sequence_number: u64) -> Bundle {
    let x509_authorities = vec![X509Authority { der: Arc::from([root]), tainted: false }];
    Bundle { x509_authorities, sequence_number, refresh_hint: 600, ..Bundle::empty(name(text)) }
}

/// With a task that runs until the test ends.
fn running(play: &Arc<Play>) -> (Arc<Federation>, finial_runtime::Supervisor) {
    let (federation, supervisor) = (play.federation(), finial_runtime::Supervisor::default());
    let task = federation.clone().run(Some(play.others.subscribe()), supervisor.shutdown());
    supervisor.spawner().service("federation", async move {
        task.await;
        Ok::<(), std::convert::Infallible>(())
    });
    (federation, supervisor)
}

#[tokio::test(start_paused = true)]
async fn a_bundle_is_fetched_at_once_and_four_times_within_its_hint() {
    let play = Play::new();
    play.set(|s| {
        s.relationships.insert(name("a.test"), with("https://a.test"));
        s.endpoints.insert(name("a.test"), bundle("a.test", 1, 1));
    });
    let (_federation, _supervisor) = running(&play);
    assert_eq!(play.fetches(4).await, [0, 150, 300, 450]);
    assert_eq!(play.set(|s| s.saves), 1, "stored when it is another one");
    play.set(|s| s.endpoints.insert(name("a.test"), bundle("a.test", 2, 2)));
    play.fetches(6).await;
    assert_eq!(play.set(|s| (s.saves, s.stored[&name("a.test")].x509_authorities[0].der[0])), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_away_is_asked_again_and_the_others_do_not_wait_for_it() {
    let play = Play::new();
    play.set(|s| {
        s.relationships.insert(name("a.test"), with("https://a.test"));
        s.slow = Duration::from_secs(30);
    });
    let (federation, _supervisor) = running(&play);
    play.fetches(1).await;
    play.set(|s| {
        s.slow = Duration::ZERO;
        s.relationships.insert(name("b.test"), with("https://b.test"));
        s.endpoints.insert(name("b.test"), bundle("b.test", 1, 1));
    });
    federation.reload();
    play.fetches(2).await;
    let asked = play.set(|s| s.fetches.clone());
    assert_eq!(asked, [("a.test".to_owned(), 0), ("b.test".to_owned(), 0)], "while the first is still asked");
    play.fetches(4).await;
    let asked = play.set(|s| s.fetches.clone());
    assert_eq!(asked[2], ("a.test".to_owned(), 90), "a minute after its failure: there is no bundle with a hint");
}

#[tokio::test(start_paused = true)]
async fn relationships_come_change_and_go() {
    let play = Play::new();
    play.set(|s| s.endpoints.insert(name("a.test"), bundle("a.test", 1, 1)));
    let (federation, _supervisor) = running(&play);
    tokio::time::sleep(Duration::from_secs(5)).await;
    play.set(|s| s.relationships.insert(name("a.test"), with("https://a.test")));
    play.others.send_modify(|n| *n += 1);
    assert_eq!(play.fetches(1).await, [5], "at once when another server tells");
    play.set(|s| s.relationships.insert(name("a.test"), with("https://elsewhere.test")));
    federation.reload();
    assert_eq!(play.fetches(2).await, [5, 5], "at once when its endpoint changes");
    play.set(|s| s.relationships_fail = true);
    federation.reload();
    assert!(federation.refresh(&name("a.test")).await.unwrap(), "what is known stays while they cannot be read");
    play.set(|s| {
        s.relationships_fail = false;
        s.relationships.clear();
    });
    assert!(!federation.refresh(&name("a.test")).await.unwrap());
    let count = play.set(|s| s.fetches.len());
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    assert_eq!(play.set(|s| s.fetches.len()), count, "nobody is asked any more");
}

#[tokio::test(start_paused = true)]
async fn what_was_fetched_for_a_relationship_that_is_gone_or_another_is_not_stored() {
    for gone in [true, false] {
        let play = Play::new();
        play.set(|s| {
            s.relationships.insert(name("a.test"), with("https://a.test"));
            s.endpoints.insert(name("a.test"), bundle("a.test", 1, 100));
            s.slow = Duration::from_secs(30);
        });
        let (_federation, _supervisor) = running(&play);
        play.fetches(1).await;
        play.set(|s| match gone {
            true => s.relationships.clear(),
            false => drop(s.relationships.insert(name("a.test"), with("https://elsewhere.test"))),
        });
        // nobody has told yet
        tokio::time::sleep(Duration::from_secs(29)).await;
        assert_eq!(play.set(|s| s.saves), 0);
        play.set(|s| s.slow = Duration::ZERO);
        tokio::time::sleep(Duration::from_secs(1)).await;
        play.set(|s| s.endpoints.insert(name("a.test"), bundle("a.test", 2, 1)));
        tokio::time::sleep(Duration::from_secs(300)).await;
        let stored = play.set(|s| s.stored.get(&name("a.test")).map(|b| b.sequence_number));
        assert_eq!(stored, (!gone).then_some(1), "only what the new endpoint says, whose numbers begin anew");
    }
}

/// What was fetched is stored after another look at the relationship; a reading that begins meanwhile waits for the
/// connection that this look holds.
#[tokio::test(start_paused = true)]
async fn a_reading_that_waits_for_a_fetch_lets_it_go_on() {
    let play = Play::new();
    play.set(|s| {
        s.relationships.insert(name("a.test"), with("https://a.test"));
        s.endpoints.insert(name("a.test"), bundle("a.test", 1, 1));
        s.slow_reading = Duration::from_secs(1);
    });
    let (_federation, _supervisor) = running(&play);
    play.fetches(1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    play.others.send_modify(|n| *n += 1);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(play.set(|s| s.saves), 1);
}

#[tokio::test(start_paused = true)]
async fn many_new_bundles_are_stored_after_one_reading_of_all_relationships() {
    let play = Play::new();
    play.set(|s| {
        for n in 0..40 {
            let td = format!("n{n}.test");
            s.relationships.insert(name(&td), with("https://n.test"));
            s.endpoints.insert(name(&td), bundle(&td, 1, 1));
        }
    });
    let (_federation, _supervisor) = running(&play);
    play.fetches(80).await;
    assert_eq!(play.set(|s| (s.saves, s.readings)), (40, 1));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_does_not_wait_for_the_datastore() {
    let play = Play::new();
    let supervisor = finial_runtime::Supervisor::default();
    let _held = play.connection.lock().await;
    let run = play.federation().run(None, supervisor.shutdown());
    let stop = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        supervisor.shutdown().trigger();
    };
    let both = async { tokio::join!(run, stop) };
    tokio::time::timeout(Duration::from_secs(3600), both).await.expect("ends");
}

#[tokio::test(start_paused = true)]
async fn a_refresh_says_what_went_wrong() {
    let play = Play::new();
    let federation = play.federation();
    assert!(!federation.refresh(&name("a.test")).await.unwrap());
    play.set(|s| s.relationships.insert(name("a.test"), with("https://a.test")));
    let error = federation.refresh(&name("a.test")).await.unwrap_err();
    let want =
        "failed to fetch federated bundle from endpoint: failed to fetch bundle: Get \"https://away.test\": away";
    assert_eq!(error.to_string(), want);
    play.set(|s| {
        s.endpoints.insert(name("a.test"), bundle("a.test", 1, 1));
        s.save_fails = true;
    });
    let error = federation.refresh(&name("a.test")).await.unwrap_err().to_string();
    assert!(error.starts_with("failed to store fetched federated bundle: "), "{error}");
    play.set(|s| s.save_fails = false);
    assert!(federation.refresh(&name("a.test")).await.unwrap(), "and what could not be stored is stored the next time");
    assert_eq!(play.set(|s| s.saves), 1);
}

#[tokio::test(start_paused = true)]
async fn an_older_bundle_is_not_taken_at_once_but_when_it_stays_or_an_operator_insists() {
    let play = Play::new();
    play.set(|s| {
        s.relationships.insert(name("a.test"), with("https://a.test"));
        s.endpoints.insert(name("a.test"), bundle("a.test", 5, 50));
    });
    let (federation, _supervisor) = running(&play);
    let root = || play.set(|s| s.stored[&name("a.test")].x509_authorities[0].der[0]);
    play.fetches(2).await;
    play.set(|s| s.endpoints.insert(name("a.test"), bundle("a.test", 4, 40)));
    play.fetches(4).await;
    assert_eq!(root(), 5, "one server behind the others");
    play.fetches(25).await;
    assert_eq!(root(), 5, "a cache that is long behind");
    let times = play.fetches(29).await;
    assert!(times[28] - times[2] > 3600, "{times:?}");
    assert_eq!(root(), 4, "it stays: the trust domain was set up anew");
    play.set(|s| s.endpoints.insert(name("a.test"), bundle("a.test", 3, 30)));
    federation.refresh(&name("a.test")).await.unwrap();
    assert_eq!(root(), 3);
}

#[test]
fn what_spire_stores_without_a_sequence_number_is_the_same_bundle() {
    assert!(same(&bundle("a.test", 1, 0), &bundle("a.test", 1, 7)));
    assert!(!same(&bundle("a.test", 1, 7), &bundle("a.test", 2, 7)));
    assert!(!same(&Bundle { refresh_hint: 1, ..bundle("a.test", 1, 7) }, &bundle("a.test", 1, 7)));
}

#[test]
fn waiting_times_are_bounded() {
    let hinted = |refresh_hint| refresh_after(Some(&Bundle { refresh_hint, ..bundle("a.test", 1, 1) })).as_secs();
    assert_eq!((hinted(1), hinted(60), hinted(3600), hinted(0)), (15, 15, 900, 300));
    assert_eq!((hinted(-1), hinted(i64::MAX)), (300, HINT_MAX.as_secs() / 4));
    assert_eq!(refresh_after(None).as_secs(), 60);
}
