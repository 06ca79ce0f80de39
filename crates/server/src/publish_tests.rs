use super::*;
use crate::testing::{World, trust_domain};
use finial_core::{JwtAuthority, X509Authority};

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
async fn in_another_history_the_datastore_is_right() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    let stored = |number| {
        world.memory.data.lock().unwrap().bundles.insert("example.org".into(), bundle("example.org", number));
    };
    let number = || feed.own().unwrap().bundle.sequence_number;
    feed.publish(bundle("example.org", 6));
    stored(3);
    feed.start_anew();
    assert_eq!(number(), 6, "until it was read");
    feed.reload().await.unwrap();
    assert_eq!(number(), 3);
    stored(2);
    feed.reload().await.unwrap();
    assert_eq!(number(), 3, "from there on, what is older is older");
    feed.start_anew();
    feed.refresh(&trust_domain()).await.unwrap();
    assert_eq!(number(), 2);
    feed.start_anew();
    feed.publish(bundle("example.org", 1));
    assert_eq!(number(), 1, "an answer from there counts as well");
    feed.reload().await.unwrap();
    assert_eq!(number(), 2);
    feed.start_anew();
    world.memory.data.lock().unwrap().bundles.clear();
    feed.reload().await.unwrap();
    assert!(feed.own().is_none());
}

#[tokio::test]
async fn an_answer_from_the_history_before_settles_nothing() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    feed.publish(with(&["a", "b"], 6));
    world.memory.data.lock().unwrap().bundles.insert("example.org".into(), with(&["a"], 3));
    let begun = feed.history();
    feed.start_anew();
    feed.publish_since(begun, with(&["a", "b", "c"], 7));
    assert_eq!(feed.own().unwrap().bundle.sequence_number, 6);
    assert!(feed.lost().is_none() && feed.stale.load(Ordering::Relaxed), "it is read again");
    feed.reload().await.unwrap();
    assert_eq!(feed.own().unwrap().bundle.sequence_number, 3);
    assert!(feed.lost().is_some());
    feed.publish_since(begun, with(&["a", "b", "c"], 7));
    assert_eq!(feed.own().unwrap().bundle.sequence_number, 3);
}

fn key(key_id: &str) -> JwtAuthority {
    JwtAuthority { key_id: key_id.into(), public_key: vec![1].into(), expires_at: 0, tainted: false }
}

fn with(keys: &[&str], sequence_number: u64) -> Bundle {
    Bundle { jwt_authorities: keys.iter().map(|id| key(id)).collect(), ..bundle("example.org", sequence_number) }
}

fn ids(bundle: &Bundle) -> Vec<&str> {
    bundle.jwt_authorities.iter().map(|key| key.key_id.as_str()).collect()
}

#[tokio::test]
async fn what_was_lost_is_lost_until_it_is_restored() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    feed.publish(with(&["a", "b"], 6));
    world.memory.data.lock().unwrap().bundles.insert("example.org".into(), with(&["a"], 5));
    feed.start_anew();
    feed.refresh(&trust_domain()).await.unwrap();
    let lost = feed.lost().unwrap();
    assert_eq!(ids(lost.unclear.as_ref().unwrap()), ["b"]);
    // Not all could be compared: once more.
    feed.start_anew();
    feed.reload().await.unwrap();
    assert_eq!(feed.lost(), Some(lost.clone()));
    let decided = Lost { unclear: None, ..lost.clone() };
    feed.decided(&decided, lost.clone());
    assert_eq!(feed.lost(), Some(lost.clone()), "that was another one");
    feed.decided(&lost, decided.clone());
    assert_eq!(feed.lost(), Some(decided.clone()));
    feed.restored(&lost);
    assert!(feed.lost().is_some(), "that was another one");
    feed.restored(&decided);
    assert_eq!(feed.lost(), None);
}

/// What becomes of `came`, which was added while the bundle's number was 4 and then 5, and `old`, which was there before.
#[tokio::test]
async fn what_this_history_cannot_have_had_is_told_from_what_may_have_been_revoked() {
    for (number, never, unclear) in [
        (4, vec!["came"], vec!["old"]),
        // Somebody added another one, or two.
        (5, vec!["came"], vec!["old"]),
        (6, vec!["came"], vec!["old"]),
        // It came with 5, was tainted with 6 and revoked with 7, if anything was.
        (7, vec![], vec!["came", "old"]),
        (9, vec![], vec!["came", "old"]),
    ] {
        let world = World::new();
        let stored = |bundle: Bundle| {
            world.memory.data.lock().unwrap().bundles.insert("example.org".into(), bundle);
        };
        stored(with(&["kept", "old"], 4));
        let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
        feed.publish(with(&["kept", "came", "old"], 5));
        stored(with(&["kept", "came", "old", "later"], 8));
        feed.refresh(&trust_domain()).await.unwrap();
        stored(with(&["kept", "later"], number));
        feed.start_anew();
        feed.reload().await.unwrap();
        let lost = feed.lost().unwrap();
        assert_eq!((ids(&lost.never_there), ids(lost.unclear.as_ref().unwrap())), (never, unclear), "{number}");
        // In the new history the numbers of the old one tell nothing of what is there.
        stored(with(&["later"], 2));
        feed.restored(&lost);
        feed.start_anew();
        feed.reload().await.unwrap();
        let lost = feed.lost().unwrap();
        assert_eq!((ids(&lost.never_there), ids(lost.unclear.as_ref().unwrap())), (vec![], vec!["kept"]), "{number}");
        // Where there is nothing nothing was.
        world.memory.data.lock().unwrap().bundles.clear();
        feed.start_anew();
        feed.reload().await.unwrap();
        assert_eq!(ids(&feed.lost().unwrap().never_there), ["later", "kept"], "{number}");
    }
}

#[tokio::test]
async fn what_nobody_waited_for_is_read_later() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    let order = feed.refreshing.lock().await;
    world.memory.data.lock().unwrap().bundles.insert("b.org".into(), bundle("b.org", 1));
    let name = TrustDomain::parse("b.org").unwrap();
    assert!(tokio::time::timeout(Duration::ZERO, feed.refresh(&name)).await.is_err());
    drop(order);
    assert!(feed.stale.load(Ordering::Relaxed));
}

#[tokio::test]
async fn bundles_are_listed_from_memory_by_the_rows_of_the_datastore() {
    let world = World::new();
    let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
    for name in ["a.org", "b.org", "example.org"] {
        world.memory.data.lock().unwrap().bundles.insert(name.into(), bundle(name, 1));
    }
    feed.reload().await.unwrap();
    let list = async |token: &str, size| {
        let listed = feed.list(Some(&Page { token: token.into(), size }), false).await.unwrap();
        let names = listed.items.iter().map(|one| one.bundle.trust_domain.to_string()).collect::<Vec<_>>();
        (names.join(" "), listed.next_page_token)
    };
    world.fail_all(true);
    let all = feed.list(None, false).await.unwrap();
    assert_eq!((all.items.len(), all.next_page_token.as_str()), (3, ""));
    assert_eq!(list("", 2).await, ("a.org b.org".into(), "2".into()));
    assert_eq!(list("2", 2).await, ("example.org".into(), "3".into()));
    assert_eq!(list("3", 2).await, (String::new(), String::new()));
    let bad = feed.list(Some(&Page { token: "x".into(), size: 1 }), false).await.map(drop).unwrap_err();
    assert_eq!(bad.to_string(), "could not parse token 'x'");
    world.fail_all(false);
    // Those that are new are asked for; while nobody can be asked, they are the last.
    for name in ["aa.org", "c.org"] {
        world.memory.data.lock().unwrap().bundles.insert(name.into(), bundle(name, 1));
        feed.refresh(&TrustDomain::parse(name).unwrap()).await.unwrap();
    }
    world.fail_all(true);
    assert_eq!(list("3", 1).await, ("aa.org".into(), "4".into()));
    assert_eq!(list("4", 1).await, ("c.org".into(), "5".into()));
    assert_eq!(list("5", 1).await.0, "");
    world.fail_all(false);
    let away = feed.list(Some(&Page { token: "4".into(), size: 1 }), true).await.unwrap();
    assert_eq!(away.next_page_token, "5", "nobody is asked");
    assert_eq!(feed.rows().len(), 3);
    assert_eq!(list("", 9).await, ("a.org aa.org b.org c.org example.org".into(), "5".into()));
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
