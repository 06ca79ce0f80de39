//! What the server says of its parts on `/live` and `/ready`, under SPIRE's names and with SPIRE's details.

use crate::authority::RotationHealth;
use crate::follow::Link;
use crate::issue::Issuer;
use crate::publish::BundleFeed;
use finial_runtime::BoxError;
use finial_runtime::health::{Check, Health, State};
use finial_store::Store;
use std::sync::Arc;

/// Live and ready, or neither; `error` is shown under `key`.
fn state(key: &str, error: Option<String>) -> State {
    let ok = error.is_none();
    let mut details = serde_json::Map::new();
    if let Some(error) = error {
        details.insert(key.to_owned(), error.into());
    }
    let details = serde_json::Value::Object(details);
    State { started: None, live: ok, ready: ok, live_details: details.clone(), ready_details: details }
}

/// `server`: the bundle can be handed out.
struct ServerCheck(Arc<BundleFeed>);

#[async_trait::async_trait]
impl Check for ServerCheck {
    async fn check(&self) -> State {
        let missing = self.0.own().is_none().then(|| "unable to fetch bundle: bundle not found".to_owned());
        state("get_bundle_err", missing)
    }
}

/// `server.ca`: an X.509-SVID can be signed.
struct CaCheck(Arc<Issuer>);

#[async_trait::async_trait]
impl Check for CaCheck {
    async fn check(&self) -> State {
        state("sign_x509_svid_err", self.0.self_test().await.err().map(|e| e.to_string()))
    }
}

/// `server.ca.rotator`: rotations work.
struct RotatorCheck(RotationHealth);

#[async_trait::async_trait]
impl Check for RotatorCheck {
    async fn check(&self) -> State {
        state("rotation_err", self.0.error().map(str::to_owned))
    }
}

/// `catalog.datastore`: the datastore answers. One that is followed is no reason to stop a server or to send nobody to it:
/// it goes on without, so that only the details tell.
struct DatastoreCheck(Store, Arc<Link>);

#[async_trait::async_trait]
impl Check for DatastoreCheck {
    async fn check(&self) -> State {
        const KEY: &str = "list_bundle_err";
        if self.1.is_followed() {
            let told = state(KEY, self.1.refusal().map(|e| e.to_string()));
            return State { live: true, ready: true, ..told };
        }
        state(KEY, self.0.count_bundles().await.err().map(|e| e.to_string()))
    }
}

/// Adds the server's checks.
pub fn register(
    health: &Health,
    feed: Arc<BundleFeed>,
    issuer: Arc<Issuer>,
    rotation: RotationHealth,
    store: Store,
    link: Arc<Link>,
) -> Result<(), BoxError> {
    health.add("server", Arc::new(ServerCheck(feed)))?;
    health.add("server.ca", Arc::new(CaCheck(issuer)))?;
    health.add("server.ca.rotator", Arc::new(RotatorCheck(rotation)))?;
    health.add("catalog.datastore", Arc::new(DatastoreCheck(store, link)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authorities;
    use crate::testing::{HOUR, World, trust_domain};
    use finial_core::ManualClock;
    use finial_store::StoreSettings;

    #[tokio::test]
    async fn each_part_says_what_is_wrong_under_spires_key() {
        let world = World::new();
        let feed = BundleFeed::open(world.memory.clone(), trust_domain()).await.unwrap();
        let issuer = Arc::new(world.issuer(&Authorities::new()));
        let ill = ServerCheck(feed).check().await;
        assert!(!ill.live && !ill.ready);
        assert!(ill.ready_details["get_bundle_err"].is_string());
        let ill = CaCheck(issuer).check().await;
        assert_eq!(ill.live_details["sign_x509_svid_err"], "X509 CA is not available for signing");

        let process = world.start().await;
        let ca = CaCheck(Arc::new(world.issuer(&process.authorities)));
        let store = Store::open(StoreSettings::memory(), Arc::new(ManualClock::at(0))).await.unwrap();
        let rotator = RotatorCheck(process.manager.health());
        for well in [
            ServerCheck(process.feed).check().await,
            ca.check().await,
            rotator.check().await,
            DatastoreCheck(store, Arc::default()).check().await,
        ] {
            assert_eq!((well.live, well.ready, well.live_details), (true, true, serde_json::json!({})));
        }
        world.clock.advance(24 * HOUR);
        assert!(!ca.check().await.ready, "the authority has expired");
    }
}
