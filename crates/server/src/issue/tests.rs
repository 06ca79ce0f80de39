use super::*;
use crate::testing::{HOUR, START, World, trust_domain};
use finial_core::KeyType;
use finial_crypto::{
    Certificate, JwtAuthoritySigner, JwtKeySource, JwtKeys, NameParts, PrivateKey, SignatureAlgorithm, Signer, X509Ca,
    verify_jwt_svid, verify_x509_svid,
};

fn key() -> PrivateKey {
    PrivateKey::generate(KeyType::EcP256).unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&trust_domain(), path).unwrap()
}

fn x509<'a>(id: &'a SpiffeId, key: &'a PrivateKey) -> X509Request<'a> {
    X509Request { id, public_key: key.public_key(), dns_names: &[], ttl_seconds: 0, subject: None }
}

#[tokio::test]
async fn a_workload_svid_has_spires_profile_and_verifies() {
    let world = World::new();
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let (workload, key) = (id("/db"), key());
    let dns = ["db.example.org".to_owned(), "db2".to_owned()];
    let request = X509Request { dns_names: &dns, ttl_seconds: 600, ..x509(&workload, &key) };
    let svid = issuer.workload_x509_svid(&request).await.unwrap();
    assert_eq!((svid.not_before, svid.not_after), (START - 10, START + 600));
    let leaf = Certificate::parse(svid.chain[0].clone()).unwrap();
    assert_eq!(svid.chain.len(), 1, "never the root");
    assert_eq!((leaf.not_before(), leaf.not_after()), (START - 10, START + 600));
    assert_eq!(leaf.serial_decimal(), svid.serial.to_string());
    assert_eq!(leaf.subject().unwrap().to_string(), "CN=db.example.org,O=SPIRE,C=US");
    assert_eq!(leaf.dns_names().iter().map(|n| n.to_string()).collect::<Vec<_>>(), dns);
    assert_eq!(leaf.uri_sans()[0].as_ref(), "spiffe://example.org/db");
    let roots = process.feed.own().unwrap().roots.clone().unwrap();
    assert_eq!(verify_x509_svid(&svid.chain, &roots, START).unwrap(), workload);
    assert!(verify_x509_svid(&svid.chain, &roots, START + 601).is_err());
}

#[tokio::test]
async fn lifetimes_default_by_purpose_and_never_outlive_the_authority() {
    let world = World::new();
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let (workload, agent, key) = (id("/w"), id("/spire/agent/x"), key());
    let ends = |svid: Result<IssuedX509, IssueError>| svid.unwrap().not_after - START;
    assert_eq!(ends(issuer.workload_x509_svid(&x509(&workload, &key)).await), HOUR);
    assert_eq!(ends(issuer.agent_x509_svid(&agent, key.public_key()).await), 2 * HOUR);
    assert_eq!(ends(issuer.server_x509_svid(key.public_key()).await), HOUR);
    let long = X509Request { ttl_seconds: i64::MAX, ..x509(&workload, &key) };
    let svid = issuer.workload_x509_svid(&long).await;
    assert_eq!(ends(svid), 24 * HOUR);
    let jwt = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: i64::MAX, include_jti: false };
    assert_eq!(issuer.jwt_svid(&jwt).await.unwrap().expires_at, START + 24 * HOUR);
    world.clock.advance(24 * HOUR);
    let late = issuer.workload_x509_svid(&x509(&workload, &key)).await.unwrap_err();
    assert_eq!(late.to_string(), "invalid X509-SVID: already expired as of 2023-11-15T22:13:20Z");
    assert!(matches!(issuer.jwt_svid(&jwt).await, Err(IssueError::Expired { .. })));
}

#[tokio::test]
async fn a_minted_svid_carries_the_subject_of_the_request() {
    let world = World::new();
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let (workload, key) = (id("/w"), key());
    let subject = DistinguishedName::new(NameParts { organization: vec!["ACME".into()], ..NameParts::default() });
    let empty = DistinguishedName::new(NameParts::default());
    for (subject, want) in [(&subject, "O=ACME"), (&empty, "O=SPIRE,C=US")] {
        let request = X509Request { subject: Some(subject), ..x509(&workload, &key) };
        let svid = issuer.workload_x509_svid(&request).await.unwrap();
        assert_eq!(Certificate::parse(svid.chain[0].clone()).unwrap().subject().unwrap().to_string(), want);
    }
}

struct OneDomain(Arc<JwtKeys>);

impl JwtKeySource for OneDomain {
    fn jwt_keys(&self, trust_domain: &str) -> Option<Arc<JwtKeys>> {
        (trust_domain == "example.org").then(|| self.0.clone())
    }
}

#[tokio::test]
async fn a_jwt_svid_verifies_and_says_what_was_asked() {
    let world = World::new();
    let process = world.start().await;
    let mut issuer = world.issuer(&process.authorities);
    issuer.settings.jwt_issuer = Some("https://issuer".into());
    let workload = id("/w");
    let audience = ["one".to_owned(), String::new(), "two".to_owned()];
    let request = JwtRequest { id: &workload, audience: &audience, ttl_seconds: 0, include_jti: true };
    let svid = issuer.jwt_svid(&request).await.unwrap();
    assert_eq!((svid.issued_at, svid.expires_at), (START, START + 300));
    let bundle = world.bundle().unwrap();
    let keys = OneDomain(Arc::new(JwtKeys::from_bundle(&bundle).unwrap()));
    let verified = verify_jwt_svid(&svid.token, &keys, &["two".to_owned()], START).unwrap();
    assert_eq!(verified.id, workload);
    let claim = |name: &str| verified.claims.get(name).cloned().unwrap();
    assert_eq!(claim("aud"), serde_json::json!(["one", "two"]));
    assert_eq!((claim("exp"), claim("iat")), (serde_json::json!(START + 300), serde_json::json!(START)));
    assert_eq!(claim("iss"), "https://issuer");
    assert_eq!(claim("jti").as_str().unwrap().len(), 22, "16 bytes, base64url");
    let none = JwtRequest { audience: &[String::new()], ..request };
    assert_eq!(issuer.jwt_svid(&none).await.unwrap_err().to_string(), "invalid JWT-SVID audience: cannot be empty");
}

#[tokio::test]
async fn ids_of_others_and_empty_paths_are_refused_in_spires_words() {
    let world = World::new();
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let key = key();
    let foreign = SpiffeId::parse("spiffe://other/w").unwrap();
    assert_eq!(
        issuer.workload_x509_svid(&x509(&foreign, &key)).await.unwrap_err().to_string(),
        "invalid X509-SVID ID: \"spiffe://other/w\" is not a member of trust domain \"example.org\""
    );
    let root = trust_domain().id();
    let request = JwtRequest { id: &root, audience: &["a".into()], ttl_seconds: 0, include_jti: false };
    assert_eq!(
        issuer.jwt_svid(&request).await.unwrap_err().to_string(),
        "invalid JWT-SVID ID: \"spiffe://example.org\" is not a member of trust domain \"example.org\"; path is empty"
    );
}

#[tokio::test]
async fn without_authorities_nothing_is_issued() {
    let world = World::new();
    let issuer = world.issuer(&Authorities::new());
    let (workload, key) = (id("/w"), key());
    let error = issuer.workload_x509_svid(&x509(&workload, &key)).await.unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.kind()),
        ("X509 CA is not available for signing", ErrorKind::Unavailable)
    );
    let request = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: 0, include_jti: false };
    assert_eq!(issuer.jwt_svid(&request).await.unwrap_err().to_string(), "JWT key is not available for signing");
    assert!(issuer.self_test().await.is_err());
}

/// A key that is elsewhere: never local, and perhaps without an answer.
struct Remote {
    key: PrivateKey,
    silent: bool,
}

#[async_trait::async_trait]
impl Signer for Remote {
    fn public_key(&self) -> &PublicKey {
        self.key.public_key()
    }

    async fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        if self.silent {
            std::future::pending::<()>().await;
        }
        self.key.sign_now(algorithm, message)
    }
}

#[tokio::test(start_paused = true)]
async fn remote_keys_sign_too_and_have_a_deadline() {
    let world = World::new();
    let process = world.start().await;
    let issuer = world.issuer(&process.authorities);
    let (workload, key) = (id("/w"), key());
    let request = JwtRequest { id: &workload, audience: &["a".into()], ttl_seconds: 0, include_jti: false };
    let local = process.authorities.x509().unwrap();
    let (x509_key, jwt_key) = {
        let data = world.memory.data.lock().unwrap();
        (data.keys["x509-CA-A"].clone(), data.keys["JWT-Signer-A"].clone())
    };
    for silent in [false, true] {
        let remote = |key: &PrivateKey| Arc::new(Remote { key: key.clone(), silent });
        let ca = X509Ca::new(remote(&x509_key), local.ca.certificate().clone(), Vec::new()).unwrap();
        let id = local.authority_id.clone();
        process.authorities.set_x509(Arc::new(ActiveX509 { authority_id: id.clone(), upstream_authority_id: id, ca }));
        let signer = JwtAuthoritySigner::new(remote(&jwt_key), "kid");
        process.authorities.set_jwt(Arc::new(ActiveJwt { signer, not_after: START + HOUR }));
        let svid = issuer.workload_x509_svid(&x509(&workload, &key)).await;
        let token = issuer.jwt_svid(&request).await;
        if silent {
            assert!(matches!(svid, Err(IssueError::Timeout)) && matches!(token, Err(IssueError::Timeout)));
        } else {
            let roots = process.feed.own().unwrap().roots.clone().unwrap();
            verify_x509_svid(&svid.unwrap().chain, &roots, START).unwrap();
            token.unwrap();
        }
    }
}

#[tokio::test]
async fn an_agents_svid_names_all_that_it_follows() {
    let world = World::new();
    let process = world.start().await;
    let (agent, key) = (id("/spire/agent/x"), key());
    let serials: [Box<str>; 2] = ["12345678901234567890".into(), "7".into()];
    let issuer = world.issuer(&process.authorities);
    let svid = issuer.agent_x509_svid_following(&agent, key.public_key(), &serials).await.unwrap();
    let leaf = Certificate::parse(svid.chain[0].clone()).unwrap();
    let mut told = follows(&leaf).into_vec();
    told.sort();
    assert_eq!(told, serials);
}
