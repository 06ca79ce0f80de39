//! Cloud Storage against fake-gcs-server; tokens and the CA service against their documented contracts.

use super::token::Tokens;
use super::{Cas, CloudStorage, GcsBundle};
use crate::testing::{NOW, context, csr, data, root, world, world_now};
use crate::world::World;
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64URL};
use finial_core::{Bundle, KeyType, Secret, X509Authority};
use finial_crypto::{Certificate, PrivateKey, PublicKey, SignatureAlgorithm, X509Ca, pem};
use finial_plugin::conformance;
use finial_plugin::conformance::{
    BundlePublisherFixture, NotifierFixture, UpstreamAuthorityFixture, bad_csrs_are_refused,
};
use finial_plugin::{
    BundlePublisher, HostServices, Notifier, PluginError, ServerHost, ServerIdentity, UpstreamAuthority,
};
use http::Method;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use testkit::clouds::Emulator;
use testkit::envoy::http_get;
use testkit::fake::{Act, Asked, tcp};

/// A bucket of the emulator.
struct Bucket {
    emulator: Arc<Emulator>,
    world: World,
    name: String,
}

impl Bucket {
    async fn new() -> Option<Self> {
        let emulator = Emulator::gcs()?;
        let address = format!("127.0.0.1:{}", emulator.port());
        let world = world_now(&[("STORAGE_EMULATOR_HOST", &address)]);
        let name = format!("b-{}", uuid::Uuid::new_v4());
        let remote = world.remote(&format!("http://{address}")).unwrap();
        let headers = [("content-type", "application/json")];
        let body = json!({ "name": name }).to_string();
        let made = remote.ask(Method::POST, "/storage/v1/b?project=p", &headers, body).await.unwrap();
        assert!(made.status.is_success());
        Some(Self { emulator, world, name })
    }

    fn read(&self, object: &str) -> Option<String> {
        let path = format!("/storage/v1/b/{}/o/{object}?alt=media", self.name);
        let answer = http_get(self.emulator.port(), &path).unwrap();
        (answer.status == 200).then_some(answer.body)
    }

    fn publisher(&self, more: &str) -> Result<CloudStorage, PluginError> {
        let config = format!("bucket_name = \"{}\"\n{more}", self.name);
        CloudStorage::within(&data(&config), &self.world)
    }

    fn notifier(&self) -> GcsBundle {
        let config = format!("bucket = \"{}\"\nobject_path = \"a folder/bundle.pem\"", self.name);
        GcsBundle::within(&data(&config), &self.world).unwrap()
    }
}

mod publisher {
    use super::*;

    finial_plugin::bundle_publisher_conformance!({
        let Some(bucket) = Bucket::new().await else { return };
        let publisher = bucket.publisher("object_name = \"a folder/bundle\"\nformat = \"pem\"").unwrap();
        BundlePublisherFixture {
            publisher: Arc::new(publisher),
            published: Box::new(move || pem::certificates(bucket.read("a%20folder%2Fbundle")?.as_bytes()).ok()),
            spoil: None,
        }
    });

    #[tokio::test]
    async fn what_is_wrong_is_told() {
        let Some(bucket) = Bucket::new().await else { return };
        let publisher = CloudStorage::within(
            &data("bucket_name = \"nobodys\"\nobject_name = \"x\"\nformat = \"spiffe\""),
            &bucket.world,
        );
        let bundle = Bundle::empty(context().trust_domain);
        let error = publisher.unwrap().publish(&bundle).await.unwrap_err().to_string();
        assert!(
            error.starts_with("failed to write bundle: http://127.0.0.1:") && error.contains("answered 404"),
            "{error}"
        );
        let text = |config: &str| CloudStorage::within(&data(config), &bucket.world).err().unwrap().to_string();
        let all =
            ["bucket name", "object name", "bundle format"].map(|what| format!("configuration is missing the {what}"));
        assert_eq!(text(""), all.join("; "));
        assert_eq!(text("bucket_name = \"b\"\nobject_name = \"o\""), "configuration is missing the bundle format");
        let text = |config: &str| GcsBundle::within(&data(config), &bucket.world).err().unwrap().to_string();
        assert_eq!(text(""), "bucket must be set; object_path must be set");
        assert_eq!(text("bucket = \"b\""), "object_path must be set");
    }
}

mod notifier {
    use super::*;

    finial_plugin::notifier_conformance!({
        let Some(bucket) = Bucket::new().await else { return };
        NotifierFixture {
            notifier: Arc::new(bucket.notifier()),
            told: Box::new(move || pem::certificates(bucket.read("a%20folder%2Fbundle.pem")?.as_bytes()).ok()),
        }
    });

    /// A server whose bundle is asked for while another server writes.
    struct Busy {
        other: GcsBundle,
        theirs: Bundle,
        newest: Bundle,
        asked: AtomicUsize,
    }

    #[async_trait]
    impl ServerHost for Busy {
        async fn has_agent(&self, _: &str) -> Result<bool, PluginError> {
            Ok(false)
        }

        async fn identity(&self) -> Result<ServerIdentity, PluginError> {
            if self.asked.fetch_add(1, Ordering::SeqCst) < 2 {
                self.other.bundle_updated(&self.theirs).await.unwrap();
            }
            let bundle = self.newest.clone();
            Ok(ServerIdentity { cert_chain: Vec::new(), private_key: Secret::new(Vec::new()), bundle })
        }
    }

    #[tokio::test]
    async fn who_finds_that_another_wrote_meanwhile_begins_anew_with_the_newest() {
        let Some(bucket) = Bucket::new().await else { return };
        let bundle = async || {
            let mut bundle = Bundle::empty(context().trust_domain);
            let der = root(NOW).await.0.certificate().clone();
            bundle.x509_authorities.push(X509Authority { der, tainted: false });
            bundle
        };
        let (told, newest, theirs) = (bundle().await, bundle().await, bundle().await);
        let asked = AtomicUsize::new(0);
        let server = Arc::new(Busy { other: bucket.notifier(), theirs, newest: newest.clone(), asked });
        let host = Arc::<HostServices>::default();
        assert!(host.server.set(server.clone()).is_ok());
        let notifier = bucket.notifier();
        notifier.use_host(host);
        notifier.bundle_updated(&told).await.unwrap();
        assert_eq!(server.asked.load(Ordering::SeqCst), 3, "twice somebody else was faster");
        let written = pem::certificates(bucket.read("a%20folder%2Fbundle.pem").unwrap().as_bytes()).unwrap();
        assert_eq!(written, [newest.x509_authorities[0].der.clone()]);
    }
}

#[tokio::test]
async fn somebody_who_always_writes_in_between_is_not_fought_for_ever() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let port = tcp(None, move |asked: &Asked| {
        if asked.method == "GET" {
            return Act::Say(200, json!({ "generation": "7" }).to_string());
        }
        count.fetch_add(1, Ordering::SeqCst);
        assert!(asked.path.ends_with("&ifGenerationMatch=7"), "{}", asked.path);
        let no = json!({ "code": 412, "message": "m", "errors": [{ "reason": "conditionNotMet" }] });
        Act::Say(412, json!({ "error": no }).to_string())
    });
    let world = world(&[("STORAGE_EMULATOR_HOST", &format!("http://127.0.0.1:{port}"))]);
    let notifier = GcsBundle::within(&data("bucket = \"b\"\nobject_path = \"o\""), &world).unwrap();
    let error = notifier.bundle_updated(&Bundle::empty(context().trust_domain)).await.unwrap_err().to_string();
    assert_eq!(error, "unable to update bundle object b/o: others wrote it 10 times meanwhile");
    assert_eq!(calls.load(Ordering::SeqCst), 10);
}

/// A service account's file, and the key that its assertions verify with.
fn service_account(token_uri: &str) -> (tempfile::NamedTempFile, PublicKey) {
    let key = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let account = json!({
        "type": "service_account", "client_email": "me@project", "private_key_id": "k1", "token_uri": token_uri,
        "private_key": pem::encode_private_key(key.pkcs8_der().expose()).expose(),
    });
    std::fs::write(file.path(), account.to_string()).unwrap();
    (file, key.public_key().clone())
}

#[tokio::test]
async fn a_service_account_proves_itself_with_its_key() {
    let verifier: Arc<Mutex<Option<PublicKey>>> = Arc::default();
    let key = verifier.clone();
    let port = tcp(None, move |asked: &Asked| {
        let body = String::from_utf8(asked.body.clone()).unwrap();
        let body =
            body.strip_prefix("grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=").unwrap();
        let (signed, signature) = body.rsplit_once('.').unwrap();
        let signature = BASE64URL.decode(signature).unwrap();
        let key = key.lock().unwrap().clone().unwrap();
        key.verify(SignatureAlgorithm::RsaPkcs1Sha256, signed.as_bytes(), &signature).unwrap();
        let part = |nth: usize| -> Value {
            serde_json::from_slice(&BASE64URL.decode(signed.split('.').nth(nth).unwrap()).unwrap()).unwrap()
        };
        assert_eq!(part(0), json!({ "alg": "RS256", "typ": "JWT", "kid": "k1" }));
        let claims = part(1);
        assert_eq!(
            (&claims["iss"], &claims["iat"], &claims["exp"]),
            (&json!("me@project"), &json!(NOW), &json!(NOW + 3600))
        );
        assert_eq!(claims["scope"], "https://www.googleapis.com/auth/cloud-platform");
        assert!(claims["aud"].as_str().unwrap().ends_with("/token"));
        Act::Say(200, json!({ "access_token": "secret-token", "expires_in": 3599, "token_type": "Bearer" }).to_string())
    });
    let (file, public) = service_account(&format!("http://127.0.0.1:{port}/token"));
    *verifier.lock().unwrap() = Some(public);
    let path = file.path().display().to_string();
    assert_eq!(Tokens::new(&path).get(&world(&[])).await.unwrap().expose(), "secret-token");
    let by_env = Tokens::new("").get(&world(&[("GOOGLE_APPLICATION_CREDENTIALS", &path)])).await;
    assert_eq!(by_env.unwrap().expose(), "secret-token");
}

#[tokio::test]
async fn credentials_that_are_no_good_are_named_and_not_quoted() {
    let port = tcp(None, |_| {
        Act::Say(400, json!({ "error": "invalid_grant", "error_description": "Invalid JWT" }).to_string())
    });
    let (file, _) = service_account(&format!("http://127.0.0.1:{port}/token"));
    let failed = async |file: &str| Tokens::new(file).get(&world(&[])).await.unwrap_err().to_string();
    let error = failed(&file.path().display().to_string()).await;
    assert!(error.ends_with("/token answered 400: invalid_grant: Invalid JWT"), "{error}");
    let text = failed("/nonexistent").await;
    assert!(text.starts_with("Google credentials /nonexistent (by service_account_file): "), "{text}");
    for (content, want) in [
        (json!({ "type": "service_account", "private_key": "hidden" }), "missing field `client_email`"),
        (json!({ "type": "service_account", "client_email": "a", "private_key": "hidden" }), "no PEM blocks"),
        (json!({ "type": "external_account" }), "its type is not supported"),
        (
            json!({ "type": "authorized_user", "client_id": "a", "client_secret": "hidden", "refresh_token": "hidden" }),
            "a service account's is wanted",
        ),
    ] {
        std::fs::write(file.path(), content.to_string()).unwrap();
        let error = failed(&file.path().display().to_string()).await;
        assert!(error.contains(want) && !error.contains("hidden"), "{error}");
    }
}

#[tokio::test]
async fn a_machine_has_a_metadata_service() {
    let port = tcp(None, |asked: &Asked| {
        assert_eq!(asked.header("metadata-flavor"), Some("Google"));
        assert_eq!(asked.path, "/computeMetadata/v1/instance/service-accounts/default/token");
        Act::Say(200, json!({ "access_token": "machine", "expires_in": 60 }).to_string())
    });
    let host = format!("127.0.0.1:{port}");
    assert_eq!(Tokens::new("").get(&world(&[("GCE_METADATA_HOST", &host)])).await.unwrap().expose(), "machine");
    let closed = format!("127.0.0.1:{}", testkit::free_port());
    let error = Tokens::new("").get(&world(&[("GCE_METADATA_HOST", &closed)])).await.unwrap_err().to_string();
    assert!(error.starts_with("no Google credentials: none configured, ") && error.contains("refused"), "{error}");
}

const POOL: &str = "projects/p/locations/l/caPools/pool";

/// The CA service with CAs that end after so many seconds, in that state. It signs with the one that is asked for.
struct Service {
    port: u16,
    roots: Vec<Arc<[u8]>>,
}

async fn service(cas: &[(&'static str, i64, &'static str)]) -> Service {
    let mut authorities: Vec<(&'static str, i64, &'static str, Arc<X509Ca>)> = Vec::new();
    for (name, seconds, state) in cas {
        authorities.push((name, *seconds, state, Arc::new(root(NOW).await.0)));
    }
    let roots = authorities.iter().map(|(.., ca)| ca.certificate().clone()).collect();
    let refused = AtomicUsize::new(0);
    let port = tcp(None, move |asked: &Asked| {
        if asked.path.starts_with("/computeMetadata") {
            return Act::Say(200, json!({ "access_token": "machine", "expires_in": 3600 }).to_string());
        }
        assert_eq!(asked.header("authorization"), Some("Bearer machine"));
        // One token is taken back before its end.
        if refused.fetch_add(1, Ordering::SeqCst) == 0 {
            return Act::Say(401, json!({ "error": { "status": "UNAUTHENTICATED", "message": "m" } }).to_string());
        }
        let (path, query) = asked.path.split_once('?').unwrap();
        if path.ends_with("/caPools") {
            return Act::Say(
                200,
                json!({ "caPools": [{ "name": "projects/p/locations/l/caPools/none" }, { "name": POOL }] }).to_string(),
            );
        }
        if path.ends_with("/none/certificateAuthorities") {
            return Act::Say(200, "{}".into());
        }
        if path == format!("/v1/{POOL}/certificateAuthorities") {
            assert!(query.contains("filter=labels.key%3Avalue"), "{query}");
            // A page each.
            let at: usize = query.rsplit_once("pageToken=").unwrap().1.parse().unwrap_or(0);
            let Some((name, seconds, state, ca)) = authorities.get(at) else { return Act::Say(200, "{}".into()) };
            let authority = json!({
                "name": format!("{POOL}/certificateAuthorities/{name}"), "state": state,
                "createTime": "2023-11-14T22:13:20.5Z", "lifetime": format!("{seconds}s"),
                "pemCaCertificates": [pem::encode("CERTIFICATE", ca.certificate())],
            });
            let next = if at + 1 < authorities.len() { (at + 1).to_string() } else { String::new() };
            return Act::Say(200, json!({ "certificateAuthorities": [authority], "nextPageToken": next }).to_string());
        }
        assert_eq!((asked.method.as_str(), path), ("POST", format!("/v1/{POOL}/certificates").as_str()));
        let value = |name: &str| query.split('&').find_map(|p| p.strip_prefix(&format!("{name}="))).unwrap().to_owned();
        assert_eq!(value("certificateId").len(), 43);
        let signing = value("issuingCertificateAuthorityId");
        let (.., ca) = authorities.iter().find(|(name, ..)| *name == signing).unwrap();
        Act::Say(200, issue(ca.clone(), &asked.json()).to_string())
    });
    Service { port, roots }
}

/// What the service makes of a request for a certificate.
fn issue(ca: Arc<X509Ca>, request: &Value) -> Value {
    let config = &request["config"];
    assert_eq!(config["x509Config"]["caOptions"], json!({ "isCa": true, "maxIssuerPathLength": 0 }));
    assert_eq!(config["x509Config"]["keyUsage"]["baseKeyUsage"], json!({ "certSign": true, "crlSign": true }));
    assert_eq!(config["subjectConfig"]["subjectAltName"]["uris"], json!(["spiffe://example.org"]));
    assert_eq!(config["publicKey"]["format"], "PEM");
    let lifetime: i64 = request["lifetime"].as_str().unwrap().trim_end_matches('s').parse().unwrap();
    let key = BASE64.decode(config["publicKey"]["key"].as_str().unwrap()).unwrap();
    let key = pem::public_key(&key).unwrap();
    let subject = config["subjectConfig"]["subject"].clone();
    let certificate = conformance::ca::aside(async {
        let parts = finial_crypto::NameParts {
            organization: vec![subject["organization"].as_str().unwrap().to_owned()],
            ..Default::default()
        };
        let template = finial_crypto::CaTemplate {
            subject: &finial_crypto::DistinguishedName::new(parts),
            trust_domain: &context().trust_domain,
            not_before: NOW - 10,
            not_after: NOW + lifetime,
            serial: finial_crypto::SerialNumber::random(),
        };
        ca.issue_ca(&key, &template).await.unwrap()
    });
    json!({
        "pemCertificate": pem::encode("CERTIFICATE", &certificate),
        "pemCertificateChain": [pem::encode("CERTIFICATE", ca.certificate())],
    })
}

fn cas(port: u16, pool: &str) -> Cas {
    let spec =
        format!("project_name = \"p\"\nregion_name = \"l\"\nlabel_key = \"key\"\nlabel_value = \"value\"\n{pool}");
    let world = world(&[("GCE_METADATA_HOST", &format!("127.0.0.1:{port}"))]);
    let url = format!("http://127.0.0.1:{port}");
    Cas::within(&data(&format!("root_cert_spec {{\n{spec}\n}}")), &url, &context(), &world).unwrap()
}

#[tokio::test]
async fn the_ca_that_ends_first_signs_and_all_that_are_enabled_are_trusted() {
    let service = service(&[("late", 9000, "ENABLED"), ("gone", 10, "DISABLED"), ("soon", 5000, "ENABLED")]).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let request = csr(&key).await;
    for pool in ["ca_pool = \"pool\"", ""] {
        let minted = cas(service.port, pool).mint_x509_ca(&request, 600).await.unwrap();
        assert_eq!(minted.roots, [service.roots[2].clone(), service.roots[0].clone()]);
        assert_eq!(minted.chain.len(), 1);
        let certificate = Certificate::parse(minted.chain[0].clone()).unwrap();
        let signer = Certificate::parse(service.roots[2].clone()).unwrap();
        certificate.verify_signed_by(&signer.public_key().unwrap()).unwrap();
        assert!(certificate.public_key().unwrap() == *key.public_key() && certificate.not_after() == NOW + 600);
    }
}

#[tokio::test]
async fn without_a_ca_to_sign_nothing_is_signed() {
    let request = csr(&PrivateKey::generate(KeyType::EcP256).unwrap()).await;
    let refused = async |cas_there: &[(&'static str, i64, &'static str)]| {
        let service = service(cas_there).await;
        cas(service.port, "ca_pool = \"pool\"").mint_x509_ca(&request, 600).await.unwrap_err().to_string()
    };
    let none = "no certificate authorities found";
    assert_eq!(refused(&[]).await, format!("{none} with label pair \"key\":\"value\""));
    let state = format!("{none} in ENABLED state with label pair \"key\":\"value\"");
    assert_eq!(refused(&[("a", 10, "STAGED")]).await, state);
    let port = tcp(None, |asked: &Asked| match asked.path.starts_with("/computeMetadata") {
        true => Act::Say(200, json!({ "access_token": "machine", "expires_in": 3600 }).to_string()),
        false => Act::Say(403, json!({ "error": { "status": "PERMISSION_DENIED", "message": "not you" } }).to_string()),
    });
    let error = cas(port, "").mint_x509_ca(&request, 600).await.unwrap_err().to_string();
    let want = format!("failed to load root CAs: http://127.0.0.1:{port} answered 403: PERMISSION_DENIED: not you");
    assert_eq!(error, want);
}

/// The rest of the suite is not for a CA service that takes over no serial number of a subject.
#[tokio::test]
async fn bad_requests_are_refused() {
    let service = service(&[("a", 9000, "ENABLED")]).await;
    let upstream = Arc::new(cas(service.port, ""));
    bad_csrs_are_refused(UpstreamAuthorityFixture { upstream, trust_domain: context().trust_domain, now: NOW }).await;
    let text = |config: &str| {
        let made = Cas::within(&data(config), "http://x", &context(), &world(&[]));
        made.err().unwrap().to_string()
    };
    let all = ["Project", "Location", "LabelKey", "LabelValue"];
    let all = all.map(|key| format!("plugin configuration root_cert_spec.{key} is missing")).join("; ");
    assert_eq!(text(""), all);
    let spec = "root_cert_spec {\nproject_name = \"p\"\nregion_name = \"l\"\nlabel_key = \"k\"\n}";
    assert_eq!(text(spec), "plugin configuration root_cert_spec.LabelValue is missing");
}
