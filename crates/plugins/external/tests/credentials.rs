//! Plugins with a say in credentials, and those that hear of the bundle: the real ones of tests/plugins.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod shared;

use finial_core::{Bundle, ErrorKind, KeyType, SpiffeId, TrustDomain};
use finial_crypto::{DistinguishedName, Oid, PrivateKey};
use finial_plugin::conformance::{self, BundlePublisherFixture, NotifierFixture};
use finial_plugin::{BundlePublisher, CredentialComposer, Holder, Notifier, X509CaAttributes, X509SvidAttributes};
use finial_plugins_external::{ExternalBundlePublisher, ExternalCredentialComposer, ExternalNotifier, Plugin, Service};
use serde_json::{Value, json};
use shared::{Program, config, real_plugin};
use std::path::{Path, PathBuf};
use std::sync::Arc;

async fn composer(program: &Program, plugin: &Path, labels: &str) -> Arc<dyn CredentialComposer> {
    let data = format!("greeting = \"hello\"\nlabels {{ extension = \"1.3.6.1.4.1.99999.2\" {labels} }}");
    let config = config("CredentialComposer", "scribe", plugin, &["credentialcomposer"], &data);
    let launched = Plugin::launch(&config, Service::CredentialComposer, &program.around).await.unwrap();
    Arc::new(ExternalCredentialComposer(launched))
}

#[tokio::test]
async fn a_composer_conforms_and_changes_what_it_may() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let composer = composer(&program, &plugin, "").await;
    conformance::usual_credentials_stay_usable(composer.clone()).await;
    conformance::same_question_same_answer(composer.clone()).await;

    let subject = DistinguishedName::ca_default().with_serial_number("7").parts().clone();
    let usual = X509CaAttributes { subject, ..X509CaAttributes::default() };
    let ca = composer.server_x509_ca(usual).await.unwrap();
    assert_eq!(DistinguishedName::new(ca.subject).to_string(), "CN=hello CA,O=SPIFFE,C=US");
    assert_eq!(ca.policies, [Oid::parse("1.3.6.1.4.1.99999.2.1").unwrap()]);
    assert_eq!(ca.extra_extensions[0].value, b"\x0c\x08hello ca");

    let id = SpiffeId::parse("spiffe://example.org/db").unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let holder = Holder { id: &id, public_key: key.public_key() };
    let svid = composer.workload_x509_svid(holder, X509SvidAttributes::default()).await.unwrap();
    assert_eq!(
        (&svid.dns_names[0], &svid.subject.locality[0]),
        (&"hello.example.org".to_owned(), &"Zürich".to_owned())
    );
    assert_eq!(svid.subject.extra_names, [(Oid::parse("2.5.4.12").unwrap(), "workload".to_owned())]);
    let claims = json!({"sub": id.as_str(), "exp": 1_800_000_000, "greeted": ["x"]});
    let composed = composer.workload_jwt_svid(&id, claims.as_object().unwrap().clone()).await.unwrap();
    let expected = json!({
        "sub": id.as_str(), "exp": 1_800_000_000, "greeted": ["x", "hello"], "number": 7, "half": 0.5, "nothing": null,
        "nested": {"yes": true, "id": id.as_str()},
    });
    assert_eq!(Value::Object(composed), expected);
    program.end().await;
}

#[tokio::test]
async fn a_composer_may_be_silent_or_against_it() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let id = SpiffeId::parse("spiffe://example.org/db").unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let holder = Holder { id: &id, public_key: key.public_key() };
    let silent = composer(&program, &plugin, "silent = \"yes\"").await;
    let usual = X509SvidAttributes { dns_names: vec!["db".into()], ..X509SvidAttributes::default() };
    assert_eq!(silent.workload_x509_svid(holder, usual.clone()).await.unwrap(), usual, "no attributes in its answer");
    let claims = json!({"sub": "x"}).as_object().unwrap().clone();
    assert_eq!(silent.workload_jwt_svid(&id, claims.clone()).await.unwrap(), claims, "no such method");

    let against = composer(&program, &plugin, "against = \"workload\"").await;
    let error = against.workload_x509_svid(holder, usual.clone()).await.unwrap_err();
    assert_eq!((error.kind, error.message.as_str()), (ErrorKind::Denied, "no workload today"));
    against.agent_x509_svid(holder, usual.clone()).await.unwrap();

    let garbled =
        config("CredentialComposer", "scribe", &plugin, &["credentialcomposer"], "labels { extension = \"1.x\" }");
    let garbled = Plugin::launch(&garbled, Service::CredentialComposer, &program.around).await.unwrap();
    let error = ExternalCredentialComposer(garbled).server_x509_svid(usual).await.unwrap_err();
    assert_eq!(error.message, "plugin returned invalid X509SVID attributes: extra extensions: invalid OID: \"1.x\"");
    program.end().await;
}

/// The X.509 authorities of the newest of these files.
fn read(files: &[PathBuf]) -> Option<Vec<Arc<[u8]>>> {
    let written = |file: &&PathBuf| std::fs::metadata(file).and_then(|m| m.modified()).ok();
    let newest = files.iter().filter(|file| file.exists()).max_by_key(written)?;
    let bundle: Value = serde_json::from_slice(&std::fs::read(newest).ok()?).ok()?;
    let root = |root: &Value| -> Arc<[u8]> {
        use base64::Engine;
        base64::prelude::BASE64_STANDARD.decode(root["asn1"].as_str().unwrap()).unwrap().into()
    };
    Some(bundle["x509_authorities"].as_array()?.iter().map(root).collect())
}

async fn outside(program: &Program, plugin: &Path, kind: (&str, &str, Service), data: &str) -> Plugin {
    let config = config(kind.0, "outside", plugin, &[kind.1], data);
    Plugin::launch(&config, kind.2, &program.around).await.unwrap()
}

const NOTIFIER: (&str, &str, Service) = ("Notifier", "notifier", Service::Notifier);
const PUBLISHER: (&str, &str, Service) = ("BundlePublisher", "bundlepublisher", Service::BundlePublisher);

#[tokio::test]
async fn notifiers_and_publishers_conform() {
    let Some(plugin) = real_plugin() else { return };
    let (program, folder) = (Program::default(), tempfile::tempdir().unwrap());
    let data = format!("folder = \"{}\"", folder.path().display());
    let notifier = ExternalNotifier(outside(&program, &plugin, NOTIFIER, &data).await);
    let files = ["loaded", "updated"].map(|name| folder.path().join(name));
    let told = Box::new(move || read(&files));
    conformance::tells_of_the_bundle(NotifierFixture { notifier: Arc::new(notifier), told }).await;
    let publisher = ExternalBundlePublisher(outside(&program, &plugin, PUBLISHER, &data).await);
    let file = folder.path().join("published");
    let published = Box::new(move || read(std::slice::from_ref(&file)));
    conformance::publishes_the_last_bundle(BundlePublisherFixture {
        publisher: Arc::new(publisher),
        published,
        spoil: None,
    })
    .await;
    program.end().await;
}

#[tokio::test]
async fn what_they_are_against_they_say() {
    let Some(plugin) = real_plugin() else { return };
    let (program, folder) = (Program::default(), tempfile::tempdir().unwrap());
    let data =
        |against: &str| format!("folder = \"{}\"\nlabels {{ against = \"{against}\" }}", folder.path().display());
    let bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
    let notifier = ExternalNotifier(outside(&program, &plugin, NOTIFIER, &data("loaded")).await);
    assert_eq!(notifier.bundle_loaded(&bundle).await.unwrap_err().message, "no loaded today");
    notifier.bundle_updated(&bundle).await.unwrap();
    let publisher = ExternalBundlePublisher(outside(&program, &plugin, PUBLISHER, &data("published")).await);
    assert_eq!(publisher.publish(&bundle).await.unwrap_err().message, "no published today");
    program.end().await;
}
