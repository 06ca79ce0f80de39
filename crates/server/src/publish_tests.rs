use super::*;
use crate::testing::{World, trust_domain};
use finial_core::X509Authority;

fn bundle(name: &str, sequence_number: u64) -> Bundle {
    Bundle { sequence_number, ..Bundle::empty(TrustDomain::parse(name).unwrap()) }
}

#[tokio::test]
async fn an_older_own_bundle_does_not_replace_a_newer_one() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    assert!(feed.own().is_none());
    let changes = feed.changes();
    for (given, want) in [(2, 2), (1, 2), (3, 3), (3, 3)] {
        feed.publish(bundle("example.org", given));
        assert_eq!(feed.own().unwrap().bundle.sequence_number, want);
    }
    assert!(changes.has_changed().unwrap());
}

#[tokio::test]
async fn an_own_bundle_that_was_read_before_it_was_published_does_not_replace_it() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    let stored = |number| {
        world.memory.data.lock().unwrap().bundles.insert("example.org".into(), bundle("example.org", number));
    };
    let number = || feed.own().unwrap().bundle.sequence_number;
    stored(5);
    feed.publish(bundle("example.org", 6));
    feed.refresh(&trust_domain()).await.unwrap();
    assert_eq!(number(), 6);
    feed.reload().await.unwrap();
    assert_eq!(number(), 6);
    stored(7);
    feed.refresh(&trust_domain()).await.unwrap();
    assert_eq!(number(), 7);
    stored(8);
    feed.reload().await.unwrap();
    assert_eq!(number(), 8);
}

#[tokio::test]
async fn a_federated_bundle_follows_the_datastore() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    let other = TrustDomain::parse("other.org").unwrap();
    world.memory.data.lock().unwrap().bundles.insert("other.org".into(), bundle("other.org", 9));
    feed.refresh(&other).await.unwrap();
    assert_eq!(feed.bundle("other.org").unwrap().bundle.sequence_number, 9);
    assert!(feed.x509_roots("other.org").is_some() && feed.x509_roots("third.org").is_none());
    world.memory.data.lock().unwrap().bundles.insert("other.org".into(), bundle("other.org", 4));
    feed.refresh(&other).await.unwrap();
    assert_eq!(feed.bundle("other.org").unwrap().bundle.sequence_number, 4, "foreign numbers mean nothing");
    world.memory.data.lock().unwrap().bundles.clear();
    feed.refresh(&other).await.unwrap();
    assert!(feed.bundle("other.org").is_none());
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_refresh_missed_is_read_later() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    world.memory.data.lock().unwrap().bundles.insert("other.org".into(), bundle("other.org", 1));
    world.fail_all(true);
    assert!(feed.refresh(&TrustDomain::parse("other.org").unwrap()).await.is_err());
    let shutdown = Shutdown::new();
    let mut changes = feed.changes();
    let act = async {
        tokio::time::sleep(RETRY * 3).await;
        assert!(!changes.has_changed().unwrap());
        world.fail_all(false);
        changes.changed().await.unwrap();
        shutdown.trigger();
    };
    tokio::join!(feed.clone().run(shutdown.clone()), act);
    assert!(feed.bundle("other.org").is_some());
}

#[tokio::test]
async fn an_unreadable_root_does_not_take_the_others_with_it() {
    let world = World::new();
    let process = world.start().await;
    let mut damaged = world.bundle().unwrap();
    damaged.x509_authorities.insert(0, X509Authority { der: Arc::from(*b"garbage"), tainted: false });
    damaged.sequence_number += 1;
    process.feed.publish(damaged);
    let own = process.feed.own().unwrap();
    assert_eq!(own.roots.as_ref().unwrap().certificates().len(), 1);
    assert_eq!(own.bundle.x509_authorities.len(), 2, "what is stored is shown as it is");
}
