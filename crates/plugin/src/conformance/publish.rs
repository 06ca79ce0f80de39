//! The suites for notifiers and bundle publishers.

use crate::{BundlePublisher, Notifier};
use finial_core::{Bundle, KeyType, TrustDomain, X509Authority};
use finial_crypto::{CaTemplate, DistinguishedName, PrivateKey, SerialNumber, X509Ca};
use std::sync::Arc;

/// What can be read where a plugin puts a bundle: its X.509 authorities, if there is one.
pub type ReadRoots = Box<dyn Fn() -> Option<Vec<Arc<[u8]>>> + Send + Sync>;

/// A bundle publisher and where it publishes.
pub struct BundlePublisherFixture {
    /// The implementation; nothing is published yet.
    pub publisher: Arc<dyn BundlePublisher>,
    /// What is published.
    pub published: ReadRoots,
    /// Takes away, or spoils, what is published, if somebody else can.
    pub spoil: Option<Box<dyn Fn() + Send + Sync>>,
}

/// A notifier and where it tells of the bundle.
pub struct NotifierFixture {
    /// The implementation; it has told nothing yet.
    pub notifier: Arc<dyn Notifier>,
    /// What it told last.
    pub told: ReadRoots,
}

/// The suite for bundle publishers. `$make` is an expression of an async block's body that gives a
/// [`BundlePublisherFixture`](crate::conformance::BundlePublisherFixture).
#[macro_export]
macro_rules! bundle_publisher_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn what_is_published_is_the_last_bundle() {
                $crate::conformance::run(async { $crate::conformance::publishes_the_last_bundle($make).await });
            }
        }
    };
}

/// The suite for notifiers. `$make` is an expression of an async block's body that gives a
/// [`NotifierFixture`](crate::conformance::NotifierFixture).
#[macro_export]
macro_rules! notifier_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn both_events_tell_of_the_bundle() {
                $crate::conformance::run(async { $crate::conformance::tells_of_the_bundle($make).await });
            }
        }
    };
}

/// A bundle of that many authorities.
async fn bundle(roots: i64) -> Bundle {
    let trust_domain = TrustDomain::parse("example.org").expect("a name");
    let mut bundle = Bundle::empty(trust_domain.clone());
    for nth in 0..roots {
        let template = CaTemplate {
            subject: &DistinguishedName::ca_default(),
            trust_domain: &trust_domain,
            not_before: 1_700_000_000,
            not_after: 1_900_000_000 + nth,
            serial: SerialNumber::new(1),
        };
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).expect("a key"));
        let ca = X509Ca::self_sign(key, &template).await.expect("an authority");
        bundle.x509_authorities.push(X509Authority { der: ca.certificate().clone(), tainted: false });
    }
    bundle.sequence_number = roots.unsigned_abs();
    bundle
}

fn roots(bundle: &Bundle) -> Option<Vec<Arc<[u8]>>> {
    Some(bundle.x509_authorities.iter().map(|a| a.der.clone()).collect())
}

/// The first, the second in its place, the same once more, and again where it was spoilt.
pub async fn publishes_the_last_bundle(fixture: BundlePublisherFixture) {
    let BundlePublisherFixture { publisher, published, spoil } = fixture;
    assert!(!publisher.name().is_empty());
    for bundle in [bundle(1).await, bundle(3).await, bundle(2).await] {
        for _ in 0..2 {
            publisher.publish(&bundle).await.expect("publishes");
            assert_eq!(published(), roots(&bundle));
        }
        if let Some(spoil) = &spoil {
            spoil();
            assert_ne!(published(), roots(&bundle), "it is spoilt");
            publisher.publish(&bundle).await.expect("publishes");
            assert_eq!(published(), roots(&bundle), "it is made good");
        }
    }
}

/// At the start, and at each change.
pub async fn tells_of_the_bundle(fixture: NotifierFixture) {
    let NotifierFixture { notifier, told } = fixture;
    assert!(!notifier.name().is_empty());
    let (first, second) = (bundle(1).await, bundle(2).await);
    notifier.bundle_loaded(&first).await.expect("hears of it");
    assert_eq!(told(), roots(&first));
    for bundle in [&second, &first] {
        notifier.bundle_updated(bundle).await.expect("hears of it");
        assert_eq!(told(), roots(bundle));
    }
}
