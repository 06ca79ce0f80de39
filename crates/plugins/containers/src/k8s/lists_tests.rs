use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Takes its time, and counts how many ask at once.
#[derive(Clone, Default)]
struct Slow {
    asked: Arc<AtomicUsize>,
    now: Arc<AtomicUsize>,
    takes: Duration,
    fails: bool,
}

#[async_trait]
impl Source for Slow {
    async fn pods(&self) -> Result<PodList, PluginError> {
        struct Leaves(Arc<AtomicUsize>);
        impl Drop for Leaves {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        assert_eq!(self.now.fetch_add(1, Ordering::SeqCst), 0, "one request at a time");
        let _leaves = Leaves(self.now.clone());
        self.asked.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(self.takes).await;
        if self.fails { Err(PluginError::internal("no").because("reason")) } else { Ok(PodList::default()) }
    }
}

fn lists(source: &Slow) -> PodLists {
    PodLists::new(Box::new(source.clone()), Duration::from_millis(500))
}

#[tokio::test(start_paused = true)]
async fn all_who_wait_share_one_answer() {
    for fails in [false, true] {
        let source = Slow { takes: Duration::from_millis(10), fails, ..Slow::default() };
        let lists = lists(&source);
        let when = Instant::now();
        let answers = futures::future::join_all((0..100).map(|_| lists.since(when))).await;
        assert!(answers.iter().all(|a| a.began == when && a.result.is_err() == fails));
        assert_eq!(source.asked.load(Ordering::SeqCst), 1);
        if let Some(Err(failure)) = answers.first().map(|a| &a.result) {
            assert_eq!(failure.message, "no: reason");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_needs_a_newer_one_waits_for_the_gap() {
    let source = Slow { takes: Duration::from_millis(30), ..Slow::default() };
    let lists = lists(&source);
    let first = lists.since(Instant::now()).await;
    let second = lists.since(first.began + Duration::from_millis(1)).await;
    // Began at 0, took 30, then four times as long of peace.
    assert_eq!(second.began - first.began, Duration::from_millis(150));
    // An old one is still good for who can do with it.
    assert_eq!(lists.since(first.began).await.began, second.began);
    // A very slow kubelet is not left alone for longer than the interval of the configuration.
    let source = Slow { takes: Duration::from_secs(3), ..Slow::default() };
    let lists = self::lists(&source);
    let first = lists.since(Instant::now()).await;
    let second = lists.since(first.began + Duration::from_millis(1)).await;
    assert_eq!(second.began - first.began, Duration::from_millis(3500));
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_leaves_the_turn_to_the_next() {
    let source = Slow { takes: Duration::from_secs(60), ..Slow::default() };
    let lists = lists(&source);
    let when = Instant::now();
    let (gone, stayed) =
        tokio::join!(tokio::time::timeout(Duration::from_secs(1), lists.since(when)), lists.since(when));
    assert!(gone.is_err() && stayed.result.is_ok());
    assert_eq!(source.asked.load(Ordering::SeqCst), 2);
}
