use super::*;
use finial_core::{Clock, KeyType, SystemClock};
use finial_crypto::{DistinguishedName, PrivateKey, X509Ca, create_ca_csr};
use finial_plugin::conformance::{UpstreamAuthorityFixture, ca};
use std::sync::Mutex;
use testkit::fake::{Act, Asked, Pki, tcp};

fn context() -> PluginContext {
    PluginContext { trust_domain: TrustDomain::parse("example.org").unwrap(), clock: Arc::new(SystemClock) }
}

/// As EJBCA answers: a sub CA that signs, below a root, to who shows a client certificate.
struct FakeEjbca {
    pki: Pki,
    port: u16,
    asked: Arc<Mutex<Vec<serde_json::Value>>>,
    root: Arc<[u8]>,
    /// The time by its clock, which stands still.
    now: i64,
}

/// By its profile.
fn sign(asked: &serde_json::Value, sub: &X509Ca, now: i64) -> Arc<[u8]> {
    let csr = pem::blocks(asked["certificate_request"].as_str().unwrap().as_bytes()).unwrap();
    ca::sign(sub, csr[0].der.expose(), (now - 30, now + 600))
}

impl FakeEjbca {
    fn start(format: &'static str, instead: Option<fn(&Asked) -> Act>) -> Self {
        let pki = Pki::new();
        pki.issue("server", "subjectAltName=IP:127.0.0.1");
        pki.issue("client", "extendedKeyUsage=clientAuth");
        let now = SystemClock.now();
        let (root, asked) = (ca::authority(None, "root", now), Arc::new(Mutex::new(Vec::new())));
        let sub = ca::authority(Some(&root), "sub", now);
        let (seen, of_root) = (asked.clone(), root.certificate().clone());
        let port = tcp(Some(pki.server("server", true)), move |asked| {
            if let Some(instead) = instead {
                return instead(asked);
            }
            assert!(asked.client.is_some());
            assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", PATH));
            let own = sign(&asked.json(), &sub, now);
            seen.lock().unwrap().push(asked.json());
            let write = |der: &Arc<[u8]>| match format {
                "PEM" => pem::encode("CERTIFICATE", der),
                _ => STANDARD.encode(der),
            };
            let chain = [write(sub.certificate()), write(root.certificate())];
            let answer = json!({
                "certificate": write(&own), "serial_number": "1", "response_format": format, "certificate_chain": chain
            });
            Act::Say(201, answer.to_string())
        });
        Self { pki, port, asked, root: of_root, now }
    }

    fn data(&self, more: &str) -> String {
        let path = |name| self.pki.path(name);
        format!(
            "hostname = \"127.0.0.1:{}\"\nca_cert_path = \"{}\"\nclient_cert_path = \"{}\"\nclient_cert_key_path = \"{}\"\n\
             ca_name = \"Sub-CA\"\nend_entity_profile_name = \"eep\"\ncertificate_profile_name = \"cp\"\n{more}",
            self.port,
            path("ca.crt"),
            path("client.crt"),
            path("client.key")
        )
    }

    fn plugin(&self, more: &str) -> Ejbca {
        of(&self.data(more)).unwrap()
    }
}

fn of(data: &str) -> Result<Ejbca, String> {
    Ejbca::within(&finial_hcl::parse(data).unwrap(), &context(), |_| None).map_err(|e| e.to_string())
}

fn fixture() -> UpstreamAuthorityFixture {
    let fake = Box::leak(Box::new(FakeEjbca::start("DER", None)));
    UpstreamAuthorityFixture {
        upstream: Arc::new(fake.plugin("")),
        trust_domain: context().trust_domain,
        now: fake.now,
    }
}

finial_plugin::upstream_authority_conformance!(fixture());

async fn csr() -> Vec<u8> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    create_ca_csr(&key, &DistinguishedName::ca_default(), &context().trust_domain).await.unwrap()
}

#[tokio::test]
async fn what_is_asked_is_what_ejbca_reads() {
    for format in ["PEM", "DER"] {
        let fake = FakeEjbca::start(format, None);
        let minted = fake.plugin("account_binding_id = \"foo\"").mint_x509_ca(&csr().await, 600).await.unwrap();
        assert_eq!((minted.chain.len(), minted.roots.as_slice()), (2, &[fake.root.clone()][..]));
        let mut asked = fake.asked.lock().unwrap().remove(0);
        let (request, password) = (asked["certificate_request"].take(), asked["password"].take());
        assert!(request.as_str().unwrap().starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
        assert_eq!(password.as_str().unwrap().len(), 24);
        let want = json!({
            "certificate_request": null, "password": null, "certificate_profile_name": "cp",
            "end_entity_profile_name": "eep", "certificate_authority_name": "Sub-CA", "username": "spiffe://example.org",
            "account_binding_id": "foo", "include_chain": true
        });
        assert_eq!(asked, want);
    }
}

#[tokio::test]
async fn the_end_entity_is_named_as_it_is_told() {
    let request = csr().await;
    let csr = Csr::parse(&request).unwrap();
    let fake = FakeEjbca::start("PEM", None);
    let name = |wanted: &str| fake.plugin(&format!("end_entity_name = \"{wanted}\"")).end_entity(&csr);
    assert_eq!(name("uri").unwrap(), "spiffe://example.org");
    assert_eq!(name("spire-1").unwrap(), "spire-1");
    for none in ["cn", "dns", "ip"] {
        assert!(name(none).unwrap_err().to_string().starts_with("unable to determine end entity name: "));
    }
}

#[test]
fn what_is_missing_is_named_at_once() {
    let all = of("").err().unwrap();
    for key in ["hostname", "ca_name", "end_entity_profile_name", "certificate_profile_name", "EJBCA_CLIENT_CERT_PATH"]
    {
        assert!(all.contains(key), "{key}: {all}");
    }
    let data = finial_hcl::parse(
        "hostname = \"h\"\nca_name = \"c\"\nend_entity_profile_name = \"e\"\ncertificate_profile_name = \"p\"",
    );
    let plugin = Ejbca::within(&data.unwrap(), &context(), |name| Some(format!("/env/{name}"))).unwrap();
    assert_eq!(plugin.config.client_cert_key_path, "/env/EJBCA_CLIENT_CERT_KEY_PATH");
    assert_eq!(plugin.config.ca_cert_path, "/env/EJBCA_CA_CERT_PATH");
}

#[tokio::test]
async fn what_goes_wrong_is_told_with_who_did_it() {
    type Case = (fn(&Asked) -> Act, ErrorKind, &'static str);
    let cases: [Case; 5] = [
        (
            |_| Act::Say(400, r#"{"error_code":400,"error_message":"Wrong profile"}"#.into()),
            ErrorKind::Internal,
            "400 Bad Request: Wrong profile",
        ),
        (|_| Act::Say(403, "<html>".into()), ErrorKind::Denied, "403 Forbidden"),
        (|_| Act::Say(503, String::new()), ErrorKind::Unavailable, "503 Service Unavailable"),
        (|_| Act::Say(200, "[".into()), ErrorKind::Internal, "the answer is not EJBCA's: "),
        (|_| Act::Say(200, "x".repeat(2 << 20)), ErrorKind::Unavailable, "the answer is larger than "),
    ];
    for (instead, kind, want) in cases {
        let fake = FakeEjbca::start("PEM", Some(instead));
        let error = fake.plugin("").mint_x509_ca(&csr().await, 600).await.unwrap_err();
        let at = format!("failed to enroll CSR: POST https://127.0.0.1:{}{PATH}: {want}", fake.port);
        assert!(error.kind == kind && error.to_string().starts_with(&at), "{error}");
    }
    for (answer, want) in [
        (r#"{"response_format":"JKS"}"#, "ejbca returned unsupported certificate format: \"JKS\""),
        (r#"{"response_format":"PEM"}"#, "failed to parse certificate issued by EJBCA: "),
        (r#"{"response_format":"DER","certificate":"?"}"#, "failed to parse certificate issued by EJBCA: "),
    ] {
        let error = minted(&serde_json::from_str(answer).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    }
    let fake = FakeEjbca::start("PEM", None);
    let data = fake.data("").replace("client.crt", "away.crt");
    let error = of(&data).unwrap().mint_x509_ca(&csr().await, 600).await.unwrap_err().to_string();
    assert!(
        error.starts_with("failed to read client certificate from file: ") && error.contains("away.crt"),
        "{error}"
    );
}
