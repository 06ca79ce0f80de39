//! The suite for credential composers.

use crate::{CredentialComposer, Holder, X509CaAttributes, X509SvidAttributes};
use finial_core::{KeyType, SpiffeId};
use finial_crypto::{DistinguishedName, PrivateKey};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The suite for credential composers. `$make` is an expression of an async block's body that gives a new
/// `Arc<dyn CredentialComposer>` which has nothing against the usual credentials.
#[macro_export]
macro_rules! credential_composer_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn usual_credentials_stay_usable() {
                $crate::conformance::run(async { $crate::conformance::usual_credentials_stay_usable($make).await });
            }
            #[test]
            fn the_same_question_has_the_same_answer() {
                $crate::conformance::run(async { $crate::conformance::same_question_same_answer($make).await });
            }
        }
    };
}

fn ca() -> X509CaAttributes {
    let subject = DistinguishedName::ca_default().with_serial_number("42").parts().clone();
    X509CaAttributes { subject, ..X509CaAttributes::default() }
}

fn svid() -> X509SvidAttributes {
    let subject = DistinguishedName::svid_default().with_common_name("db.example.org").parts().clone();
    let dns_names = vec!["db.example.org".to_owned()];
    X509SvidAttributes { subject, dns_names, ..X509SvidAttributes::default() }
}

fn claims(id: &SpiffeId) -> Map<String, Value> {
    let claims = json!({"sub": id.as_str(), "aud": ["a", "b"], "exp": 1_800_000_300, "iat": 1_800_000_000});
    claims.as_object().cloned().unwrap_or_default()
}

type Composed = (X509CaAttributes, Vec<X509SvidAttributes>, Map<String, Value>);

async fn all_kinds(composer: &dyn CredentialComposer, id: &SpiffeId, key: &PrivateKey) -> Composed {
    let holder = Holder { id, public_key: key.public_key() };
    let ca = composer.server_x509_ca(ca()).await.expect("composes an authority");
    let svids = vec![
        composer.server_x509_svid(svid()).await.expect("composes the server's SVID"),
        composer.agent_x509_svid(holder, svid()).await.expect("composes an agent's SVID"),
        composer.workload_x509_svid(holder, svid()).await.expect("composes a workload's SVID"),
    ];
    (ca, svids, composer.workload_jwt_svid(id, claims(id)).await.expect("composes a JWT-SVID"))
}

fn holder() -> (SpiffeId, PrivateKey) {
    let id = SpiffeId::parse("spiffe://example.org/db").expect("an ID");
    (id, PrivateKey::generate(KeyType::EcP256).expect("a key"))
}

/// What makes a credential one: subjects are not lost, no certificate gets two extensions of one kind, tokens keep whose
/// they are, for whom and for how long.
pub async fn usual_credentials_stay_usable(composer: Arc<dyn CredentialComposer>) {
    assert!(!composer.name().is_empty());
    let (id, key) = holder();
    let (ca, svids, token) = all_kinds(&*composer, &id, &key).await;
    assert!(!DistinguishedName::new(ca.subject).is_empty(), "an authority has a subject");
    for extensions in svids.iter().map(|svid| &svid.extra_extensions).chain([&ca.extra_extensions]) {
        let mut ids: Vec<_> = extensions.iter().map(|e| &e.id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), extensions.len(), "an extension stands there twice");
    }
    assert_eq!((&token["sub"], token["exp"].as_f64()), (&json!(id.as_str()), Some(1_800_000_300.0)));
    assert!(token["aud"].as_array().is_some_and(|aud| !aud.is_empty()), "{token:?}");
}

/// Servers beside each other must not issue different credentials for the same workload.
pub async fn same_question_same_answer(composer: Arc<dyn CredentialComposer>) {
    let (id, key) = holder();
    assert_eq!(all_kinds(&*composer, &id, &key).await, all_kinds(&*composer, &id, &key).await);
}
