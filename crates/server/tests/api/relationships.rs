//! The TrustDomain service, and bundles fetched from endpoints over real TLS.

use crate::harness::*;
use finial_config::{BundleEndpointProfile, BundleEndpointSettings, FederatesWith};
use finial_core::{EndpointProfile, SpiffeId, TrustDomain};
use finial_crypto::bundle::{BundleFormat, bundle_to_json};
use finial_crypto::tls::{TlsIdentity, server_config};
use finial_net::https::{FetchError, FetchLimits};
use finial_proto::convert::bundle_from_proto;
use finial_proto::server::bundle::{GetBundleRequest, GetFederatedBundleRequest};
use finial_proto::server::trustdomain::trust_domain_client::TrustDomainClient;
use finial_proto::server::trustdomain::*;
use finial_proto::types::federation_relationship::BundleEndpointProfile as Profile;
use finial_proto::types::{self, FederationRelationship, FederationRelationshipMask};
use finial_runtime::Spawner;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::transport::Channel;
use tonic::{Code, Status};

on_every_database!(
    a_bundle_is_fetched_from_its_spiffe_endpoint_and_refreshed_on_demand,
    relationships_are_created_read_updated_and_deleted,
    a_relationship_may_bring_its_bundle_but_never_ours,
);

/// A bundle endpoint that says what the test wants, by path.
#[derive(Clone)]
struct Endpoint {
    address: SocketAddr,
    says: Arc<Mutex<Vec<(String, String)>>>,
}

impl Endpoint {
    /// Shows the identity.
    async fn start(spawner: &Spawner, identity: &Identity, clock: Arc<finial_core::ManualClock>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = Arc::new(TlsIdentity::new(&identity.chain, &identity.key).unwrap());
        let mut config = server_config(identity, None, clock).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let (acceptor, says) = (TlsAcceptor::from(Arc::new(config)), Arc::<Mutex<Vec<(String, String)>>>::default());
        let endpoint = Self { address, says };
        let this = endpoint.clone();
        spawner.spawn("endpoint", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(mut tls) = acceptor.accept(tcp).await else { continue };
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") && tls.read_buf(&mut request).await.is_ok_and(|n| n > 0) {}
                let request = String::from_utf8_lossy(&request).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default();
                let answer = this.says.lock().unwrap().iter().rev().find(|(p, _)| p == path).map(|(_, a)| a.clone());
                let answer = answer.unwrap_or_else(|| http("404 Not Found", "", "nothing here"));
                let _ = tls.write_all(answer.as_bytes()).await;
                let _ = tls.shutdown().await;
            }
        });
        endpoint
    }

    fn says(&self, path: &str, answer: String) {
        self.says.lock().unwrap().push((path.to_owned(), answer));
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }
}

fn http(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

/// A foreign trust domain with an endpoint of its own.
struct Foreign {
    server: Server,
    endpoint: Endpoint,
    bundle: types::Bundle,
}

const ENDPOINT_ID: &str = "spiffe://other.test/endpoint";

impl Foreign {
    async fn start() -> Self {
        let server = Server::with(|settings| settings.trust_domain = TrustDomain::parse("other.test").unwrap()).await;
        let identity = server.mint_in("other.test", "/endpoint").await;
        let endpoint = Endpoint::start(&server.supervisor.spawner(), &identity, server.clock.clone()).await;
        let bundle = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
        let foreign = Self { server, endpoint, bundle };
        foreign.publish("/", 600);
        foreign
    }

    /// Serves the bundle with that refresh hint.
    fn publish(&self, path: &str, refresh_hint: i64) {
        let bundle = types::Bundle { refresh_hint, ..self.bundle.clone() };
        let json = bundle_to_json(&bundle_from_proto(&bundle).unwrap(), BundleFormat::SPIFFE);
        self.endpoint.says(path, http("200 OK", "Content-Type: application/json\r\n", &json));
    }

    fn relationship(&self) -> FederationRelationship {
        FederationRelationship {
            trust_domain: "other.test".into(),
            bundle_endpoint_url: self.endpoint.url("/"),
            bundle_endpoint_profile: spiffe(ENDPOINT_ID),
            trust_domain_bundle: Some(self.bundle.clone()),
        }
    }
}

fn spiffe(id: &str) -> Option<Profile> {
    Some(Profile::HttpsSpiffe(types::HttpsspiffeProfile { endpoint_spiffe_id: id.into() }))
}

fn web() -> Option<Profile> {
    Some(Profile::HttpsWeb(types::HttpsWebProfile {}))
}

fn client(server: &Server) -> TrustDomainClient<Channel> {
    TrustDomainClient::new(server.local.clone())
}

type Outcome = (types::Status, Option<FederationRelationship>);

async fn create(server: &Server, relationships: Vec<FederationRelationship>) -> Vec<Outcome> {
    let request =
        BatchCreateFederationRelationshipRequest { federation_relationships: relationships, output_mask: None };
    let results = client(server).batch_create_federation_relationship(request).await.unwrap().into_inner().results;
    results.into_iter().map(|r| (r.status.unwrap(), r.federation_relationship)).collect()
}

async fn update(
    server: &Server,
    relationship: FederationRelationship,
    mask: Option<FederationRelationshipMask>,
) -> Outcome {
    let request = BatchUpdateFederationRelationshipRequest {
        federation_relationships: vec![relationship],
        input_mask: mask,
        output_mask: None,
    };
    let answer = client(server).batch_update_federation_relationship(request).await.unwrap().into_inner();
    let result = answer.results.into_iter().next().unwrap();
    (result.status.unwrap(), result.federation_relationship)
}

async fn refresh(server: &Server, name: &str) -> Result<(), Status> {
    let request = RefreshBundleRequest { trust_domain: name.into() };
    client(server).refresh_bundle(request).await.map(tonic::Response::into_inner)
}

/// The refresh hint of the stored bundle, by which the tests tell one from another.
async fn hint(server: &Server, name: &str) -> Result<i64, Status> {
    let request = GetFederatedBundleRequest { trust_domain: name.into(), output_mask: None };
    server.bundles().get_federated_bundle(request).await.map(|answer| answer.into_inner().refresh_hint)
}

async fn wait_for_hint(server: &Server, name: &str, want: i64) {
    let wait = async {
        while hint(server, name).await.ok() != Some(want) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.expect("the bundle with that hint");
}

async fn a_bundle_is_fetched_from_its_spiffe_endpoint_and_refreshed_on_demand(lab: Lab) {
    let (server, other) = (lab.start().await, Foreign::start().await);
    let (status, created) = create(&server, vec![other.relationship()]).await.remove(0);
    assert_eq!((status.code, status.message.as_str()), (0, "OK"));
    assert_eq!(created, Some(other.relationship()));
    wait_for_hint(&server, "other.test", 600).await;
    other.publish("/", 700);
    refresh(&server, "other.test").await.unwrap();
    assert_eq!(hint(&server, "other.test").await.unwrap(), 700);
    // Over redirects too, as long as they stay on https.
    other.endpoint.says("/", http("302 Found", "Location: /there\r\n", ""));
    other.publish("/there", 800);
    refresh(&server, "other.test").await.unwrap();
    assert_eq!(hint(&server, "other.test").await.unwrap(), 800);
    drop(other.server);
}

#[tokio::test]
async fn each_way_to_fail_is_told_apart_and_leaves_the_bundle_as_it_was() {
    let (server, other) = (Server::start().await, Foreign::start().await);
    create(&server, vec![other.relationship()]).await;
    wait_for_hint(&server, "other.test", 600).await;
    let url = other.endpoint.url("/");
    let failed = "failed to refresh bundle: failed to fetch federated bundle from endpoint: ";
    let large = "x".repeat(4 << 20) + "x";
    for (answer, want) in [
        (http("500 Internal Server Error", "", "oh no"), "unexpected status 500 fetching bundle: oh no".to_owned()),
        (http("200 OK", "", "<html>"), "failed to decode bundle: unable to parse JWKS: ".into()),
        (http("200 OK", "", "{}"), "failed to decode bundle: no authorities found".into()),
        (
            http("200 OK", "", &large),
            format!("failed to fetch bundle: Get {url:?}: the answer is larger than 4194304 bytes"),
        ),
        (
            http("301 Moved", "Location: http://a.test/\r\n", ""),
            format!("failed to fetch bundle: Get {url:?}: \"http://a.test/\" is not"),
        ),
        (
            http("302 Found", "Location: /\r\n", ""),
            format!("failed to fetch bundle: Get {url:?}: stopped after 10 redirects"),
        ),
        ("nonsense\r\n\r\n".into(), format!("failed to fetch bundle: Get {url:?}: ")),
        (String::new(), format!("failed to fetch bundle: Get {url:?}: ")),
    ] {
        other.endpoint.says("/", answer);
        let message = refused(refresh(&server, "other.test").await, Code::Internal);
        assert!(message.starts_with(&format!("{failed}{want}")), "{message}");
    }
    let wrong = |profile, url: String| FederationRelationship {
        bundle_endpoint_profile: profile,
        bundle_endpoint_url: url,
        ..other.relationship()
    };
    let closed = SocketAddr::from(([127, 0, 0, 1], testkit::free_port()));
    for (relationship, want) in [
        (
            wrong(spiffe("spiffe://other.test/else"), url.clone()),
            format!("{failed}failed to fetch bundle: Get {url:?}: tls: "),
        ),
        (
            wrong(spiffe("spiffe://nobody.test/x"), url.clone()),
            "failed to refresh bundle: can't perform SPIFFE Authentication: local copy of bundle not found".into(),
        ),
        (
            wrong(spiffe(ENDPOINT_ID), format!("https://{closed}/")),
            format!(
                "{failed}failed to fetch bundle: Get \"https://{closed}/\": dial tcp {closed}: connect: connection refused"
            ),
        ),
        (
            wrong(web(), url.clone()),
            format!(
                "{failed}failed to authenticate bundle endpoint using web authentication but the server certificate \
                 contains SPIFFE ID {ENDPOINT_ID:?}: maybe use https_spiffe instead of https_web: Get {url:?}: "
            ),
        ),
    ] {
        assert_eq!(update(&server, relationship, None).await.0.code, 0);
        let message = refused(refresh(&server, "other.test").await, Code::Internal);
        assert!(message.starts_with(&want), "{message}");
    }
    assert_eq!(hint(&server, "other.test").await.unwrap(), other.bundle.refresh_hint, "as the update set it");
    let message = refused(refresh(&server, "nobody.test").await, Code::NotFound);
    assert_eq!(message, "no relationship with trust domain \"nobody.test\"");
    let message = refused(refresh(&server, "no body").await, Code::InvalidArgument);
    assert!(message.starts_with("failed to parse trust domain: "), "{message}");
}

async fn serving(name: &str, profile: BundleEndpointProfile) -> Server {
    let refresh_hint = Duration::from_secs(420);
    let address = "127.0.0.1:0".parse().unwrap();
    Server::with(|settings| {
        settings.trust_domain = TrustDomain::parse(name).unwrap();
        settings.federation.bundle_endpoint = Some(BundleEndpointSettings { address, refresh_hint, profile });
    })
    .await
}

#[tokio::test]
async fn our_own_bundle_is_served_with_our_svid_and_others_fetch_it() {
    let (server, other) = (Server::start().await, serving("other.test", BundleEndpointProfile::HttpsSpiffe).await);
    let address = other.running.bundle_endpoint.unwrap();
    let bundle = other.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    let relationship = FederationRelationship {
        trust_domain: "other.test".into(),
        bundle_endpoint_url: format!("https://{address}"),
        bundle_endpoint_profile: spiffe("spiffe://other.test/spire/server"),
        trust_domain_bundle: Some(types::Bundle { refresh_hint: 0, jwt_authorities: vec![], ..bundle.clone() }),
    };
    assert_eq!(create(&server, vec![relationship.clone()]).await[0].0.code, 0);
    wait_for_hint(&server, "other.test", 420).await;
    let request = GetFederatedBundleRequest { trust_domain: "other.test".into(), output_mask: None };
    let fetched = server.bundles().get_federated_bundle(request).await.unwrap().into_inner();
    assert_eq!(fetched.x509_authorities, bundle.x509_authorities);
    assert_eq!(fetched.jwt_authorities[0].key_id, bundle.jwt_authorities[0].key_id);
    let lost = FederationRelationship { bundle_endpoint_url: format!("https://{address}/else"), ..relationship };
    assert_eq!(update(&server, lost, None).await.0.code, 0);
    let message = refused(refresh(&server, "other.test").await, Code::Internal);
    assert!(message.ends_with("unexpected status 404 fetching bundle: 404 page not found\n"), "{message}");
}

/// Makes a certificate for 127.0.0.1, valid for everyone's clock, and gives its root.
fn web_certificate(folder: &Path, certificate: &Path, key: &Path) -> Vec<u8> {
    let openssl = |args: &[&str]| {
        let out = std::process::Command::new("openssl").args(args).current_dir(folder).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    let new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3650"];
    openssl(&[&["req", "-x509", "-subj", "/CN=root", "-keyout", "root.key", "-out", "root.pem"], &new[..]].concat());
    let leaf = ["req", "-x509", "-CA", "root.pem", "-CAkey", "root.key", "-subj", "/CN=leaf"];
    let names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"];
    let files = ["-keyout", key.to_str().unwrap(), "-out", certificate.to_str().unwrap()];
    openssl(&[&leaf[..], &names, &files, &new].concat());
    std::fs::read(folder.join("root.pem")).unwrap()
}

async fn fetch(address: SocketAddr, root: &[u8]) -> Result<String, FetchError> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(
        finial_crypto::pem::certificates(root).unwrap().iter().map(|der| der.to_vec().into()),
    );
    let (exchange, clock) = (finial_crypto::tls::KeyExchange::Any, Arc::new(finial_core::ManualClock::at(NOW)));
    let config = finial_crypto::web::web_client_config(exchange, roots, clock).unwrap();
    let limits = FetchLimits { time: DEADLINE, body: 1 << 20 };
    let fetched = finial_net::https::get(&format!("https://{address}/"), Arc::new(config), limits).await?;
    assert_eq!(fetched.status, http::StatusCode::OK);
    Ok(String::from_utf8(fetched.body.to_vec()).unwrap())
}

#[tokio::test]
async fn our_own_bundle_is_served_with_a_certificate_from_files_that_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("web.pem"), folder.path().join("web.key"));
    let profile = BundleEndpointProfile::ServingCertFile {
        cert_file_path: certificate.clone(),
        key_file_path: key.clone(),
        file_sync_interval: Duration::from_millis(20),
    };
    let missing = Server::try_with(|settings| {
        let (address, refresh_hint) = ("127.0.0.1:0".parse().unwrap(), Duration::from_secs(60));
        let profile = profile.clone();
        settings.federation.bundle_endpoint = Some(BundleEndpointSettings { address, refresh_hint, profile });
    });
    let message = missing.await.err().unwrap().to_string();
    assert!(message.starts_with("bundle endpoint: failed to load certificate "), "{message}");
    let root = web_certificate(folder.path(), &certificate, &key);
    let server = serving("example.org", profile).await;
    let address = server.running.bundle_endpoint.unwrap();
    let json: serde_json::Value = serde_json::from_str(&fetch(address, &root).await.unwrap()).unwrap();
    assert_eq!((&json["spiffe_refresh_hint"], json["keys"].as_array().unwrap().len()), (&420.into(), 2));
    let newer = web_certificate(folder.path(), &certificate, &key);
    let changed = async {
        while fetch(address, &newer).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, changed).await.expect("the new certificate");
    assert!(fetch(address, &root).await.is_err());
}

async fn relationships_are_created_read_updated_and_deleted(lab: Lab) {
    let server = lab.start().await;
    let plain = |name: &str| FederationRelationship {
        trust_domain: name.into(),
        bundle_endpoint_url: "https://127.0.0.1:1/".into(),
        bundle_endpoint_profile: web(),
        trust_domain_bundle: None,
    };
    let own = plain("example.org");
    let outcome =
        create(&server, vec![plain("a.test"), plain("a.test"), own.clone(), plain("b.test"), plain("No")]).await;
    let told: Vec<_> = outcome.iter().map(|(s, _)| (Code::from(s.code), s.message.as_str())).collect();
    let cause = lab.duplicate("federated_trust_domains", "trust_domain", "a.test");
    let doubled = format!("failed to create federation relationship: datastore-sql: {cause}");
    assert_eq!(told[..2], [(Code::Ok, "OK"), (Code::Internal, &*doubled)]);
    let message = "unable to create federation relationship for server trust domain";
    assert_eq!(told[2], (Code::InvalidArgument, message));
    assert!(told[4].1.starts_with("failed to convert federation relationship: failed to parse trust domain: "));

    let get = |name: &str, output_mask| {
        let request = GetFederationRelationshipRequest { trust_domain: name.into(), output_mask };
        let mut client = client(&server);
        async move { client.get_federation_relationship(request).await.map(tonic::Response::into_inner) }
    };
    assert_eq!(get("a.test", None).await.unwrap(), plain("a.test"));
    let only = FederationRelationshipMask { bundle_endpoint_profile: true, ..Default::default() };
    let masked = FederationRelationship { bundle_endpoint_url: String::new(), ..plain("a.test") };
    assert_eq!(get("a.test", Some(only)).await.unwrap(), masked);
    assert_eq!(refused(get("c.test", None).await, Code::NotFound), "federation relationship does not exist");

    let changed = FederationRelationship {
        bundle_endpoint_url: "https://localhost/x".into(),
        bundle_endpoint_profile: spiffe("spiffe://a.test/e"),
        ..plain("a.test")
    };
    let only = FederationRelationshipMask { bundle_endpoint_url: true, ..Default::default() };
    let (status, updated) = update(&server, changed.clone(), Some(only)).await;
    assert_eq!(status.code, 0, "{}", status.message);
    assert_eq!(updated.unwrap(), FederationRelationship { bundle_endpoint_profile: web(), ..changed.clone() });
    assert_eq!(update(&server, changed.clone(), None).await.1.unwrap(), changed);
    let (status, _) = update(&server, plain("c.test"), None).await;
    let missing = "failed to update federation relationship: unable to fetch federation relationship: record not found";
    assert_eq!((Code::from(status.code), status.message.as_str()), (Code::Internal, missing));

    let list = |page_size, page_token: &str| {
        let request =
            ListFederationRelationshipsRequest { output_mask: None, page_size, page_token: page_token.into() };
        let mut client = client(&server);
        async move { client.list_federation_relationships(request).await.unwrap().into_inner() }
    };
    let names = |answer: &ListFederationRelationshipsResponse| {
        answer.federation_relationships.iter().map(|r| r.trust_domain.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&list(0, "").await), ["a.test", "b.test"]);
    let first = list(1, "").await;
    let second = list(1, &first.next_page_token).await;
    let third = list(1, &second.next_page_token).await;
    assert_eq!((names(&first), names(&second), names(&third)), (vec!["a.test".into()], vec!["b.test".into()], vec![]));
    assert_eq!(third.next_page_token, "");

    let names = ["a.test", "a.test", "", "no body"].map(str::to_owned).to_vec();
    let request = BatchDeleteFederationRelationshipRequest { trust_domains: names };
    let results = client(&server).batch_delete_federation_relationship(request).await.unwrap().into_inner().results;
    let told: Vec<_> =
        results.iter().map(|r| r.status.as_ref().unwrap()).map(|s| (s.code, s.message.as_str())).collect();
    assert_eq!(told[..2], [(0, "OK"), (Code::NotFound as i32, "federation relationship not found")]);
    assert_eq!(told[2], (Code::InvalidArgument as i32, "missing trust domain"));
    assert!(told[3].1.starts_with("failed to parse trust domain: "), "{}", told[3].1);
    assert_eq!(refused(get("a.test", None).await, Code::NotFound), "federation relationship does not exist");
}

async fn a_relationship_may_bring_its_bundle_but_never_ours(lab: Lab) {
    let server = lab.start().await;
    let bundle = |name: &str| types::Bundle { trust_domain: name.into(), refresh_hint: 77, ..Default::default() };
    let bringing = |name: &str, whose: &str| FederationRelationship {
        trust_domain: name.into(),
        bundle_endpoint_url: "https://127.0.0.1:1/".into(),
        bundle_endpoint_profile: web(),
        trust_domain_bundle: Some(bundle(whose)),
    };
    let outcome = create(&server, vec![bringing("a.test", "b.test"), bringing("a.test", "spiffe://a.test")]).await;
    let mismatch = "failed to convert federation relationship: trust domain bundle (\"b.test\") must match the trust domain \
                    of the federation relationship (\"a.test\")";
    assert_eq!((Code::from(outcome[0].0.code), outcome[0].0.message.as_str()), (Code::InvalidArgument, mismatch));
    assert_eq!(outcome[1].0.code, 0);
    assert_eq!(hint(&server, "a.test").await.unwrap(), 77, "at once");
    let before = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    let (status, _) = update(&server, bringing("example.org", "example.org"), None).await;
    assert_eq!(Code::from(status.code), Code::InvalidArgument);
    let after = server.bundles().get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(before, after);
}

#[tokio::test]
async fn relationships_of_the_configuration_count_also_when_they_change_while_it_runs() {
    let other = Foreign::start().await;
    let with = |path: &str| {
        let profile = EndpointProfile::HttpsSpiffe { endpoint_id: SpiffeId::parse(ENDPOINT_ID).unwrap() };
        let with = FederatesWith { bundle_endpoint_url: other.endpoint.url(path), profile };
        (TrustDomain::parse("other.test").unwrap(), with)
    };
    let server = Server::with(|settings| settings.federation.federates_with.extend([with("/")])).await;
    let first = refused(refresh(&server, "other.test").await, Code::Internal);
    assert!(first.ends_with("local copy of bundle not found"), "{first}");
    // The first bundle comes from the operator; it says nothing of where the next ones are.
    let request = finial_proto::server::bundle::BatchSetFederatedBundleRequest {
        bundle: vec![other.bundle.clone()],
        output_mask: None,
    };
    server.bundles().batch_set_federated_bundle(request).await.unwrap();
    refresh(&server, "other.test").await.unwrap();
    assert_eq!(hint(&server, "other.test").await.unwrap(), 600);
    other.publish("/moved", 900);
    let mut live = (*server.running.live.now()).clone();
    live.federates_with = [with("/moved")].into();
    server.running.live.set(live);
    wait_for_hint(&server, "other.test", 900).await;
    server.running.live.set(finial_server::live::Live::default());
    let gone = async {
        while refresh(&server, "other.test").await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("no longer managed");
}
