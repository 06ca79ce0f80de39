//! SVIDs that are stored instead of served.

use super::fake::wire_entry;
use super::harness::{World, until};
use async_trait::async_trait;
use finial_core::ErrorKind;
use finial_plugin::{PluginError, StoredSvid, SvidStore};
use finial_proto::types;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Keeps what it is given, by its metadata; fails as often as it is told to.
#[derive(Default)]
struct Shelf {
    kept: Mutex<BTreeMap<Vec<String>, StoredSvid>>,
    failures: AtomicUsize,
}

impl Shelf {
    fn places(&self) -> Vec<String> {
        self.kept.lock().unwrap().keys().map(|metadata| metadata.join(",")).collect()
    }

    fn fail(&self) -> Result<(), PluginError> {
        let fewer = |left: usize| left.checked_sub(1);
        match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer) {
            Ok(_) => Err(PluginError::new(ErrorKind::Unavailable, "the shelf is locked")),
            Err(_) => Ok(()),
        }
    }
}

#[async_trait]
impl SvidStore for Shelf {
    fn name(&self) -> &str {
        "shelf"
    }

    async fn put(&self, svid: &StoredSvid, metadata: &[String]) -> Result<(), PluginError> {
        self.fail()?;
        let copy = StoredSvid {
            spiffe_id: svid.spiffe_id.clone(),
            cert_chain: svid.cert_chain.clone(),
            private_key: svid.private_key.clone(),
            bundle: svid.bundle.clone(),
            federated_bundles: svid.federated_bundles.clone(),
            expires_at: svid.expires_at,
        };
        self.kept.lock().unwrap().insert(metadata.to_vec(), copy);
        Ok(())
    }

    async fn delete(&self, metadata: &[String]) -> Result<(), PluginError> {
        self.fail()?;
        self.kept.lock().unwrap().remove(metadata);
        Ok(())
    }
}

fn stored(id: &str, path: &str, selectors: &[&str]) -> types::Entry {
    types::Entry { store_svid: true, ..wire_entry(id, path, selectors) }
}

#[tokio::test]
async fn svids_are_stored_replaced_and_deleted_with_their_entries_and_served_to_nobody() {
    let mut world = World::new().await;
    let shelf = Arc::new(Shelf::default());
    world.stores = vec![shelf.clone()];
    let set = |entries: Vec<types::Entry>| {
        world.server.state().entries = entries.into_iter().map(|e| (e.id.clone(), e)).collect();
    };
    set(vec![
        stored("e1", "/db", &["shelf:name:db", "shelf:drawer:1"]),
        stored("e2", "/odd", &["shelf:name:odd", "other:x"]),
        stored("e3", "/lost", &["nowhere:name:lost"]),
        stored("e4", "/fooled", &["test:any"]),
    ]);
    let agent = world.started().await;
    until("it is stored", || shelf.places() == ["drawer:1,name:db"]).await;
    {
        let kept = shelf.kept.lock().unwrap();
        let svid = kept.values().next().unwrap();
        assert_eq!(svid.spiffe_id.as_str(), "spiffe://td/db");
        let leaf = finial_crypto::Certificate::parse(svid.cert_chain[0].clone()).unwrap();
        assert_eq!(leaf.spiffe_id().unwrap(), svid.spiffe_id);
        assert_eq!(leaf.not_after(), svid.expires_at);
        let key = finial_crypto::PrivateKey::from_pkcs8(svid.private_key.expose()).unwrap();
        assert!(*key.public_key() == leaf.public_key().unwrap());
        assert_eq!(svid.bundle, [Arc::<[u8]>::from(&world.server.ca().root[..])]);
    }
    let refused = agent.x509().await;
    assert!(refused.is_err() || refused.unwrap().message().await.is_err(), "a workload gets none of them");

    // To another place, of which the store is told only once the old one is emptied.
    set(vec![stored("e1", "/db", &["shelf:name:db", "shelf:drawer:2"])]);
    world.server.state().entries.get_mut("e1").unwrap().revision_number = 1;
    until("it was moved", || shelf.places() == ["drawer:2,name:db"]).await;

    // Another entry takes the place: nothing is deleted after it was put there.
    set(vec![stored("e9", "/db2", &["shelf:name:db", "shelf:drawer:2"])]);
    let holds = || shelf.kept.lock().unwrap().values().next().map(|svid| svid.spiffe_id.as_str().to_owned());
    // (The first one may be put there once more, with the SVID of its new revision.)
    until("the other is there", || holds().as_deref() == Some("spiffe://td/db2")).await;
    assert_eq!(shelf.places(), ["drawer:2,name:db"]);

    // No longer for a store.
    set(vec![wire_entry("e9", "/db2", &["shelf:name:db", "shelf:drawer:2"])]);
    world.server.state().entries.get_mut("e9").unwrap().revision_number = 1;
    until("it was deleted", || shelf.places().is_empty()).await;
    agent.stop().await;
}

#[tokio::test]
async fn what_fails_is_tried_again() {
    let mut world = World::new().await;
    let shelf = Arc::new(Shelf::default());
    shelf.failures.store(1, Ordering::SeqCst);
    world.stores = vec![shelf.clone()];
    world.server.state().entries = [("e1".to_owned(), stored("e1", "/db", &["shelf:name:db"]))].into_iter().collect();
    let agent = world.started().await;
    until("it is stored at last", || shelf.places() == ["name:db"]).await;
    shelf.failures.store(1, Ordering::SeqCst);
    world.server.state().entries.clear();
    until("it is deleted at last", || shelf.places().is_empty()).await;
    agent.stop().await;
}
