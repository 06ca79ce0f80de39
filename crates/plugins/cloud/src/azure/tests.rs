//! Against Azurite with a key, by TLS; with tokens against the documented contract.

use super::Blob;
use super::shared_key::SharedKey;
use super::token::{Application, Tokens};
use crate::testing::{NOW, context, data, root, world, world_at, world_now};
use crate::world::World;
use finial_core::{Bundle, ManualClock, Secret, X509Authority};
use finial_crypto::pem;
use finial_plugin::conformance::{BundlePublisherFixture, ca};
use finial_plugin::{BundlePublisher, PluginError};
use http::Method;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::clouds::Emulator;
use testkit::fake::{Act, Asked, Pki, tcp};

/// Of the account that Azurite always has.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

struct Storage {
    emulator: Arc<Emulator>,
    world: World,
}

impl Storage {
    fn new() -> Option<Self> {
        let pki = Pki::new();
        pki.issue("blob", "subjectAltName=DNS:*.blob.localhost");
        let emulator = Emulator::azurite(&pki.path("blob.crt"), &pki.path("blob.key"))?;
        Some(Self { emulator, world: world_now(&[]) })
    }

    /// With the account's key. The path may have what belongs to the resource behind a line break.
    async fn ask(&self, method: Method, path: &str, resource: &str) -> finial_net::rest::Answer {
        let url = format!("https://{ACCOUNT}.blob.localhost:{}", self.emulator.port());
        let mut headers = vec![("x-ms-date", "Tue, 14 Nov 2023 22:13:20 GMT"), ("x-ms-version", "2022-11-02")];
        let key = SharedKey::new(ACCOUNT, &Secret::new(KEY.into())).unwrap();
        let authorization = key.authorization(method.as_str(), resource, 0, &headers);
        headers.push(("authorization", &authorization));
        self.world.remote(&url).unwrap().ask(method, path, &headers, "").await.unwrap()
    }

    fn publisher(&self, container: &str, key: &str) -> Result<Blob, PluginError> {
        let config = format!(
            "storage_account_name = \"{ACCOUNT}\"\nstorage_account_key = \"{key}\"\ncontainer_name = \"{container}\"\n\
             blob_name = \"a folder/bundle+1\"\nformat = \"pem\"\nservice_endpoint = \"blob.localhost:{}\"",
            self.emulator.port()
        );
        Blob::within(&data(&config), &self.world)
    }
}

finial_plugin::bundle_publisher_conformance!({
    let Some(storage) = Storage::new() else { return };
    let made = storage.ask(Method::PUT, "/bundles?restype=container", "/bundles\nrestype:container").await;
    assert_eq!(made.status, 201, "{made:?}");
    let publisher = storage.publisher("bundles", KEY).unwrap();
    let storage = Arc::new(storage);
    let published = move || {
        let (storage, path) = (storage.clone(), "/bundles/a%20folder/bundle%2B1");
        let blob = ca::aside(async move { storage.ask(Method::GET, path, path).await });
        pem::certificates(&blob.body).ok()
    };
    BundlePublisherFixture { publisher: Arc::new(publisher), published: Box::new(published), spoil: None }
});

#[tokio::test]
async fn what_storage_refuses_is_told() {
    let Some(storage) = Storage::new() else { return };
    let mut bundle = Bundle::empty(context().trust_domain);
    let der = root(NOW).await.0.certificate().clone();
    bundle.x509_authorities.push(X509Authority { der, tainted: false });
    let failed = async |container, key| {
        storage.publisher(container, key).unwrap().publish(&bundle).await.unwrap_err().to_string()
    };
    let gone = failed("nobodys", KEY).await;
    let want = format!(
        "failed to upload blob: https://{ACCOUNT}.blob.localhost:{} answered 404: ContainerNotFound: ",
        storage.emulator.port()
    );
    assert!(gone.starts_with(&want), "{gone}");
    let wrong = failed("nobodys", "AAAA").await;
    assert!(wrong.contains("answered 403: AuthorizationFailure: "), "{wrong}");
}

/// Stands for the tenant's token service and for the machine's.
fn authority(calls: Arc<AtomicUsize>) -> u16 {
    tcp(None, move |asked: &Asked| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        let body = String::from_utf8(asked.body.clone()).unwrap();
        let given = |by: &str| json!({ "access_token": format!("{by} {call}"), "expires_in": 3599 }).to_string();
        let usual = "grant_type=client_credentials&client_id=app&scope=https%3A%2F%2Fstorage.azure.com%2F.default";
        match asked.path.as_str() {
            "/tenant/oauth2/v2.0/token" if body == format!("{usual}&client_secret=s") => Act::Say(200, given("secret")),
            "/tenant/oauth2/v2.0/token" if body.ends_with("jwt-bearer&client_assertion=proof") => {
                assert!(body.starts_with(usual));
                Act::Say(200, given("workload"))
            }
            "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fstorage.azure.com" => {
                assert_eq!(asked.header("metadata"), Some("true"));
                let ends = (NOW + 3600).to_string();
                Act::Say(
                    200,
                    json!({ "access_token": "machine", "expires_in": "3600", "expires_on": ends }).to_string(),
                )
            }
            "/msi?api-version=2019-08-01&resource=https%3A%2F%2Fstorage.azure.com&client_id=app" => {
                assert_eq!(asked.header("x-identity-header"), Some("h"));
                Act::Say(200, json!({ "access_token": "service", "expires_on": (NOW + 3600).to_string() }).to_string())
            }
            _ => Act::Say(401, json!({ "error": "invalid_client", "error_description": "AADSTS7000215" }).to_string()),
        }
    })
}

#[tokio::test]
async fn tokens_come_from_where_azures_own_libraries_look() {
    let url = format!("http://127.0.0.1:{}", authority(Arc::default()));
    let proof = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(proof.path(), "proof\n").unwrap();
    let file = proof.path().display().to_string();
    let found = async |env: &[(&str, &str)]| {
        let token = Tokens::new(None).get(&world(env)).await;
        token.map(|token| token.expose().split(' ').next().unwrap().to_owned()).map_err(|e| e.to_string())
    };
    let app = [("AZURE_TENANT_ID", "tenant"), ("AZURE_CLIENT_ID", "app"), ("AZURE_AUTHORITY_HOST", url.as_str())];
    let with = |more: &[(&'static str, &str)]| -> Vec<(String, String)> {
        app.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let ask = async |env: Vec<(String, String)>| {
        let env: Vec<_> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        found(&env).await
    };
    assert_eq!(ask(with(&[("AZURE_CLIENT_SECRET", "s")])).await.unwrap(), "secret");
    assert_eq!(ask(with(&[("AZURE_FEDERATED_TOKEN_FILE", &file)])).await.unwrap(), "workload");
    let service = format!("{url}/msi");
    assert_eq!(ask(with(&[("IDENTITY_ENDPOINT", &service), ("IDENTITY_HEADER", "h")])).await.unwrap(), "service");
    assert_eq!(found(&[("AZURE_POD_IDENTITY_AUTHORITY_HOST", &url)]).await.unwrap(), "machine");
    let wrong = ask(with(&[("AZURE_CLIENT_SECRET", "other")])).await.unwrap_err();
    assert_eq!(wrong, format!("{url} answered 401: invalid_client: AADSTS7000215"));
    let closed = format!("http://127.0.0.1:{}", testkit::free_port());
    let none = found(&[("AZURE_POD_IDENTITY_AUTHORITY_HOST", &closed)]).await.unwrap_err();
    assert!(none.starts_with("no Azure credentials: none configured, ") && none.contains("refused"), "{none}");
}

#[tokio::test]
async fn a_blob_is_written_with_a_token_and_a_new_one_when_that_is_refused() {
    let calls = Arc::new(AtomicUsize::new(0));
    let url = format!("http://127.0.0.1:{}", authority(calls.clone()));
    let pki = Pki::new();
    pki.issue("blob", "subjectAltName=DNS:me.blob.localhost");
    let port = tcp(Some(pki.server("blob", false)), |asked: &Asked| {
        assert_eq!((asked.method.as_str(), asked.path.as_str()), ("PUT", "/c/b"));
        assert_eq!(asked.header("x-ms-blob-type"), Some("BlockBlob"));
        assert_eq!(asked.header("x-ms-date"), Some("Tue, 14 Nov 2023 22:13:20 GMT"));
        assert!(asked.body.starts_with(b"{\"keys\":"));
        match asked.header("authorization") {
            Some("Bearer secret 1") => Act::Say(201, String::new()),
            _ => Act::Say(401, String::new()),
        }
    });
    let clock = Arc::new(ManualClock::at(NOW));
    let config = format!(
        "storage_account_name = \"me\"\ncontainer_name = \"c\"\nblob_name = \"b\"\nformat = \"spiffe\"\n\
         tenant_id = \"tenant\"\napp_id = \"app\"\napp_secret = \"s\"\nservice_endpoint = \"blob.localhost:{port}\""
    );
    let publisher = Blob::within(&data(&config), &world_at(clock, &[("AZURE_AUTHORITY_HOST", &url)])).unwrap();
    let bundle = Bundle::empty(context().trust_domain);
    publisher.publish(&bundle).await.unwrap();
    publisher.publish(&bundle).await.unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_token_is_kept_until_shortly_before_its_end() {
    let calls = Arc::new(AtomicUsize::new(0));
    let url = format!("http://127.0.0.1:{}", authority(calls.clone()));
    let clock = Arc::new(ManualClock::at(NOW));
    let world = world_at(clock.clone(), &[("AZURE_AUTHORITY_HOST", &url)]);
    let application = Application { tenant: "tenant".into(), id: "app".into(), secret: Secret::new("s".into()) };
    let tokens = Tokens::new(Some(application));
    for (later, want) in [(0, 1), (3200, 1), (200, 2)] {
        clock.advance(later);
        tokens.get(&world).await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), want);
    }
}

#[test]
fn what_is_missing_or_too_much_is_named_in_the_words_of_spire() {
    let world = world(&[]);
    let text = |config: &str| Blob::within(&data(config), &world).err().unwrap().to_string();
    let all = ["storage account name", "container name", "blob name", "bundle format"];
    assert_eq!(text(""), all.map(|what| format!("configuration is missing the {what}")).join("; "));
    let most = "storage_account_name = \"a\"\ncontainer_name = \"c\"\nblob_name = \"b\"";
    assert_eq!(text(most), "configuration is missing the bundle format");
    let all = format!("{most}\nformat = \"jwks\"");
    assert_eq!(text(&format!("{all}\napp_id = \"a\"")), "configuration is missing the tenant ID");
    assert_eq!(text(&format!("{all}\ntenant_id = \"t\"")), "configuration is missing the app ID");
    assert_eq!(text(&format!("{all}\ntenant_id = \"t\"\napp_id = \"a\"")), "configuration is missing the app secret");
    let both = format!("{all}\nstorage_account_key = \"AAAA\"\napp_id = \"a\"");
    assert_eq!(text(&both), "storage account key and client secret credentials are mutually exclusive");
    assert!(text(&format!("{all}\nstorage_account_key = \"?\"")).starts_with("unable to get shared key credential: "));
    assert!(text(&format!("{all}\nservice_endpoint = \"x y\"")).starts_with("could not parse service endpoint url: "));
}
