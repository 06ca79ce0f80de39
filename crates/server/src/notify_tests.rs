use super::*;
use crate::testing::{World, trust_domain};
use async_trait::async_trait;
use std::sync::Mutex;
use tokio::time::{Duration, Instant, advance};

fn bundle(sequence_number: u64) -> Bundle {
    Bundle { sequence_number, ..Bundle::empty(trust_domain()) }
}

/// Keeps what it was told, and fails, or hangs, as often as it is told to.
#[derive(Default)]
struct Ear {
    heard: Mutex<Vec<String>>,
    fails: Mutex<usize>,
    hangs: bool,
}

impl Ear {
    async fn hear(&self, what: &str, bundle: &Bundle) -> Result<(), PluginError> {
        self.heard.lock().unwrap().push(format!("{what} {}", bundle.sequence_number));
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let mut fails = self.fails.lock().unwrap();
        if *fails == 0 {
            return Ok(());
        }
        *fails -= 1;
        Err(PluginError::internal("deaf"))
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }
}

#[async_trait]
impl Notifier for Ear {
    fn name(&self) -> &str {
        "ear"
    }

    async fn bundle_loaded(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.hear("loaded", bundle).await
    }

    async fn bundle_updated(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.hear("updated", bundle).await
    }
}

#[async_trait]
impl BundlePublisher for Ear {
    fn name(&self) -> &str {
        "ear"
    }

    async fn publish(&self, bundle: &Bundle) -> Result<(), PluginError> {
        self.hear("publish", bundle).await
    }
}

async fn feed() -> Arc<BundleFeed> {
    let feed = BundleFeed::open(World::new().memory, trust_domain()).await.unwrap();
    feed.publish(bundle(1));
    feed
}

fn told(feed: &Arc<BundleFeed>, notifiers: &[&Arc<Ear>], publishers: &[&Arc<Ear>]) -> Told {
    Told {
        notifiers: notifiers.iter().map(|ear| Arc::clone(ear) as _).collect(),
        publishers: publishers.iter().map(|ear| Arc::clone(ear) as _).collect(),
        feed: feed.clone(),
        last: None,
    }
}

/// Lets everybody do what there is to do now.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn notifiers_hear_of_the_beginning_and_of_each_change_once() {
    let (feed, ear) = (feed().await, Arc::new(Ear::default()));
    let mut told = told(&feed, &[&ear], &[]);
    told.begin().await.unwrap();
    assert_eq!(ear.heard(), ["loaded 1"]);
    let shutdown = Shutdown::new();
    let running = told.run(shutdown.clone());
    let doing = async {
        settle().await;
        assert!(ear.heard().is_empty(), "nothing has changed");
        // Somebody else's.
        feed.publish(Bundle {
            sequence_number: 9,
            ..Bundle::empty(finial_core::TrustDomain::parse("other.test").unwrap())
        });
        settle().await;
        assert!(ear.heard().is_empty());
        feed.publish(bundle(2));
        settle().await;
        *ear.fails.lock().unwrap() = 1;
        feed.publish(bundle(3));
        settle().await;
        feed.publish(bundle(4));
        settle().await;
        assert_eq!(ear.heard(), ["updated 2", "updated 3", "updated 4"]);
        shutdown.trigger();
    };
    tokio::join!(running, doing);
}

#[tokio::test(start_paused = true)]
async fn a_notifier_that_failed_hears_again_without_another_change() {
    let (feed, ear) = (feed().await, Arc::new(Ear::default()));
    let mut told = told(&feed, &[&ear], &[]);
    told.begin().await.unwrap();
    let shutdown = Shutdown::new();
    let running = told.run(shutdown.clone());
    let doing = async {
        *ear.fails.lock().unwrap() = 2;
        feed.publish(bundle(2));
        settle().await;
        for _ in 0..4 {
            advance(REFRESH).await;
            settle().await;
        }
        assert_eq!(ear.heard(), ["loaded 1", "updated 2", "updated 2", "updated 2"], "and then no more");
        shutdown.trigger();
    };
    tokio::join!(running, doing);
}

#[tokio::test(start_paused = true)]
async fn a_change_between_the_beginning_and_the_work_is_not_lost() {
    let (feed, ear) = (feed().await, Arc::new(Ear::default()));
    let mut told = told(&feed, &[&ear], &[]);
    told.begin().await.unwrap();
    feed.publish(bundle(2));
    let shutdown = Shutdown::new();
    let running = told.run(shutdown.clone());
    let doing = async {
        settle().await;
        shutdown.trigger();
    };
    tokio::join!(running, doing);
    assert_eq!(ear.heard(), ["loaded 1", "updated 2"]);
}

#[tokio::test(start_paused = true)]
async fn a_notifier_that_refuses_or_hangs_keeps_the_server_from_beginning() {
    let (feed, good) = (feed().await, Arc::new(Ear::default()));
    let bad = Arc::new(Ear { fails: Mutex::new(1), ..Ear::default() });
    let error = told(&feed, &[&good, &bad], &[]).begin().await.unwrap_err();
    assert_eq!(error.to_string(), "one or more notifiers returned an error: notifier(ear): deaf");
    assert_eq!(good.heard(), ["loaded 1"]);
    let hanging = Arc::new(Ear { hangs: true, ..Ear::default() });
    let start = Instant::now();
    let error = told(&feed, &[&hanging], &[]).begin().await.unwrap_err();
    assert!(error.to_string().ends_with("notifier(ear): no answer within 60 s"), "{error}");
    assert_eq!(start.elapsed(), DEADLINE);
}

#[tokio::test(start_paused = true)]
async fn publishers_publish_at_once_at_each_change_and_in_between() {
    let feed = feed().await;
    let failing = Arc::new(Ear { fails: Mutex::new(1), ..Ear::default() });
    let hanging = Arc::new(Ear { hangs: true, ..Ear::default() });
    let shutdown = Shutdown::new();
    let running = told(&feed, &[], &[&hanging, &failing]).run(shutdown.clone());
    let doing = async {
        settle().await;
        assert_eq!(failing.heard(), ["publish 1"], "although the other one hangs");
        feed.publish(bundle(2));
        settle().await;
        assert_eq!(failing.heard(), ["publish 2"]);
        advance(REFRESH - Duration::from_secs(1)).await;
        settle().await;
        assert!(failing.heard().is_empty());
        advance(Duration::from_secs(2)).await;
        settle().await;
        assert_eq!(failing.heard(), ["publish 2"], "again");
        assert_eq!(hanging.heard(), ["publish 1"]);
        advance(DEADLINE).await;
        settle().await;
        assert_eq!(hanging.heard(), ["publish 2"], "after its deadline it is asked for what is new");
        shutdown.trigger();
    };
    tokio::join!(running, doing);
}
