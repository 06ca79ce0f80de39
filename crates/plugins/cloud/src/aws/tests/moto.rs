//! S3, Secrets Manager, ACM PCA and STS, as moto has them.

use crate::aws::credentials::Credentials;
use crate::aws::service::{Call, Name, Service};
use crate::aws::{Pca, S3, Secrets};
use crate::testing::{context, context_at, csr, data, root, world_now};
use crate::world::{Failure, World};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use finial_core::{Bundle, Clock, KeyType, ManualClock, Secret, SystemClock};
use finial_crypto::{Certificate, PrivateKey, pem};
use finial_net::rest::Answer;
use finial_plugin::conformance::{BundlePublisherFixture, UpstreamAuthorityFixture, ca};
use finial_plugin::{BundlePublisher, MintedX509Ca, PluginError, UpstreamAuthority};
use http::Method;
use serde_json::{Value, json};
use std::sync::Arc;
use testkit::clouds::Emulator;
use testkit::oidc::curl;

const REGION: &str = "us-east-1";

/// An account of moto's.
struct Aws {
    emulator: Arc<Emulator>,
    url: String,
}

impl Aws {
    fn new() -> Option<Self> {
        let emulator = Emulator::moto()?;
        let url = format!("http://127.0.0.1:{}", emulator.port());
        Some(Self { emulator, url })
    }

    fn world(&self) -> World {
        let keys = [("AWS_ACCESS_KEY_ID", "AKIDTEST"), ("AWS_SECRET_ACCESS_KEY", "secret")];
        world_now(&[&keys[..], &[("AWS_ENDPOINT_URL", &self.url)]].concat())
    }

    fn service(&self, name: Name) -> Service {
        let none = Secret::default();
        let credentials = Credentials::new("", &none, &none, REGION);
        Service::new(name, REGION, Some(self.url.clone()), credentials, &self.world()).unwrap()
    }

    async fn s3(&self, method: Method, path: &str) -> Result<Answer, Failure> {
        self.service(Name::S3).call(&Call { method, path, headers: &[], body: Bytes::new() }).await
    }

    async fn secret(&self, action: &str, fields: Value) {
        let service = self.service(Name::SecretsManager);
        service.operation(&format!("secretsmanager.{action}"), "1.1", &fields).await.unwrap();
    }

    async fn acm(&self, action: &str, fields: Value) -> Value {
        let service = self.service(Name::AcmPca);
        service.operation(&format!("ACMPrivateCA.{action}"), "1.1", &fields).await.unwrap()
    }
}

fn s3(aws: &Aws, bucket: &str, more: &str) -> Result<S3, PluginError> {
    let config = format!("region = \"{REGION}\", bucket = \"{bucket}\", endpoint = \"{}\", {more}", aws.url);
    S3::within(&data(&config.replace(", ", "\n")), &aws.world())
}

mod publisher {
    use super::*;

    // Without moto there is nothing to test; what stands for that says so loudly.
    finial_plugin::bundle_publisher_conformance!({
        let Some(aws) = Aws::new() else { return };
        aws.s3(Method::PUT, "/bundles").await.unwrap();
        let publisher = s3(&aws, "bundles", "object_key = \"a folder/bundle+1.pem\", format = \"pem\"").unwrap();
        let aws = Arc::new(aws);
        let published = move || {
            let aws = aws.clone();
            let object = ca::aside(async move { aws.s3(Method::GET, "/bundles/a folder/bundle+1.pem").await });
            pem::certificates(&object.ok()?.body).ok()
        };
        BundlePublisherFixture { publisher: Arc::new(publisher), published: Box::new(published), spoil: None }
    });

    #[tokio::test]
    async fn what_is_wrong_with_the_bucket_is_said() {
        let Some(aws) = Aws::new() else { return };
        let bundle = Bundle::empty(context().trust_domain);
        let publisher = s3(&aws, "nobodys", "object_key = \"x\", format = \"jwks\"").unwrap();
        let error = publisher.publish(&bundle).await.unwrap_err().to_string();
        let want = format!("failed to put object: {} answered 404: NoSuchBucket: ", aws.url);
        assert!(error.starts_with(&want), "{error}");
    }
}

/// Keeps the emulator for as long as it is used.
struct Kept<T>(T, #[allow(dead_code)] Arc<Emulator>);

#[async_trait]
impl<T: UpstreamAuthority> UpstreamAuthority for Kept<T> {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        self.0.mint_x509_ca(csr, ttl_seconds).await
    }
}

fn secrets(aws: &Aws, more: &str) -> Result<Secrets, PluginError> {
    let config = format!("region = \"{REGION}\"\n{}", more.replace(", ", "\n"));
    let clock = Arc::new(ManualClock::at(SystemClock.now()));
    Secrets::within(&data(&config), &context_at(clock), &aws.world())
}

/// Stores a root and its key by that name.
async fn store(aws: &Aws, action: &str, name: &str) -> Arc<[u8]> {
    let (ca, key) = root(SystemClock.now()).await;
    let key = pem::encode_private_key(key.pkcs8_der().expose());
    let id = if action == "CreateSecret" { "Name" } else { "SecretId" };
    aws.secret(action, json!({ id: format!("{name}-key"), "SecretString": key.expose() })).await;
    let certificate = pem::encode("CERTIFICATE", ca.certificate());
    aws.secret(action, json!({ id: format!("{name}-cert"), "SecretString": certificate })).await;
    ca.certificate().clone()
}

mod in_secrets_manager {
    use super::*;

    finial_plugin::upstream_authority_conformance!({
        let Some(aws) = Aws::new() else { return };
        // Tests share the account.
        let name = uuid::Uuid::new_v4().to_string();
        store(&aws, "CreateSecret", &name).await;
        let upstream =
            secrets(&aws, &format!("cert_file_arn = \"{name}-cert\", key_file_arn = \"{name}-key\"")).unwrap();
        let now = upstream.context().clock.now();
        let trust_domain = context().trust_domain;
        UpstreamAuthorityFixture { upstream: Arc::new(Kept(upstream, aws.emulator)), trust_domain, now }
    });

    #[tokio::test]
    async fn replaced_secrets_are_used_and_what_was_read_last_serves_on() {
        let Some(aws) = Aws::new() else { return };
        let first = store(&aws, "CreateSecret", "turns").await;
        let config = "cert_file_arn = \"turns-cert\", key_file_arn = \"turns-key\"";
        // A role is taken first, as STS has it.
        let role = ", assume_role_arn = \"arn:aws:iam::123456789012:role/signer\"";
        let upstream = secrets(&aws, &format!("{config}{role}")).unwrap();
        upstream.prepare().await.unwrap();
        let csr = csr(&PrivateKey::generate(KeyType::EcP256).unwrap()).await;
        let roots = async || upstream.mint_x509_ca(&csr, 600).await.unwrap().roots;
        assert_eq!(roots().await, [first]);
        let second = store(&aws, "PutSecretValue", "turns").await;
        assert_eq!(roots().await, std::slice::from_ref(&second));
        aws.secret("DeleteSecret", json!({ "SecretId": "turns-key", "ForceDeleteWithoutRecovery": true })).await;
        assert_eq!(roots().await, [second]);
        let error = secrets(&aws, config).unwrap().prepare().await.unwrap_err().to_string();
        // AWS says 400.
        let want = format!("unable to read turns-key: {} answered 404: ResourceNotFoundException: ", aws.url);
        assert!(error.starts_with(&want), "{error}");
    }

    #[tokio::test]
    async fn secrets_that_are_no_ca_are_named() {
        let Some(aws) = Aws::new() else { return };
        store(&aws, "CreateSecret", "good").await;
        store(&aws, "CreateSecret", "other").await;
        aws.secret("CreateSecret", json!({ "Name": "garbage", "SecretString": "garbage" })).await;
        aws.secret("CreateSecret", json!({ "Name": "binary", "SecretBinary": "AAAA" })).await;
        for (cert, key, bundle, want) in [
            ("good-cert", "garbage", "", "unable to parse private key of garbage: no PEM blocks"),
            ("garbage", "good-key", "", "unable to parse certificate of garbage: no PEM blocks"),
            ("good-cert", "good-key", "garbage", "unable to load upstream CA bundle of garbage: "),
            ("good-cert", "other-key", "", "unable to load upstream CA: certificate and private key do not match"),
            ("good-cert", "good-key", "other-cert", "unable to load upstream CA: certificate cannot be validated"),
        ] {
            let config =
                format!("cert_file_arn = \"{cert}\", key_file_arn = \"{key}\", bundle_file_arn = \"{bundle}\"");
            let error = secrets(&aws, &config).unwrap().prepare().await.unwrap_err().to_string();
            assert!(error.starts_with(want), "{error}");
        }
        let config = "cert_file_arn = \"binary\", key_file_arn = \"good-key\"";
        let error = secrets(&aws, config).unwrap().prepare().await.unwrap_err().to_string();
        assert!(error.contains("the secret has no text; it must be PEM"), "{error}");
    }
}

/// moto ignores templates, so what it signs is no CA: only the protocol is tested here, and what is signed in `contract`.
#[tokio::test]
async fn a_private_ca_signs_what_it_is_sent() {
    let Some(aws) = Aws::new() else { return };
    let ca = json!({
        "CertificateAuthorityType": "ROOT",
        "CertificateAuthorityConfiguration": {
            "KeyAlgorithm": "EC_prime256v1",
            "SigningAlgorithm": "SHA256WITHECDSA",
            "Subject": { "CommonName": "root" },
        },
    });
    let created = aws.acm("CreateCertificateAuthority", ca).await;
    let arn = json!({ "CertificateAuthorityArn": created["CertificateAuthorityArn"] });
    let request = aws.acm("GetCertificateAuthorityCsr", arn.clone()).await;
    let with = |more: Value| {
        let mut all = arn.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let issue = with(json!({
        "Csr": BASE64.encode(request["Csr"].as_str().unwrap()),
        "SigningAlgorithm": "SHA256WITHECDSA",
        "TemplateArn": "arn:aws:acm-pca:::template/RootCACertificate/V1",
        "Validity": { "Type": "YEARS", "Value": 10 },
    }));
    let issued = aws.acm("IssueCertificate", issue).await;
    let own = aws.acm("GetCertificate", with(json!({ "CertificateArn": issued["CertificateArn"] }))).await;
    let own = own["Certificate"].as_str().unwrap();
    aws.acm("ImportCertificateAuthorityCertificate", with(json!({ "Certificate": BASE64.encode(own) }))).await;
    let further = tempfile::NamedTempFile::new().unwrap();
    let (other, _) = root(SystemClock.now()).await;
    std::fs::write(further.path(), pem::encode("CERTIFICATE", other.certificate())).unwrap();
    let config = format!(
        "region = \"{REGION}\"\ncertificate_authority_arn = {}\nendpoint = \"{}\"\nsupplemental_bundle_path = \"{}\"",
        arn["CertificateAuthorityArn"],
        aws.url,
        further.path().display(),
    );
    let pca = Pca::within(&data(&config), &context_at(Arc::new(SystemClock)), &aws.world()).unwrap();
    pca.prepare().await.unwrap();
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let minted = pca.mint_x509_ca(&csr(&key).await, 600).await.unwrap();
    let certificate = Certificate::parse(minted.chain[0].clone()).unwrap();
    assert!(certificate.public_key().unwrap() == *key.public_key());
    assert_eq!(minted.roots, [pem::certificates(own.as_bytes()).unwrap()[0].clone(), other.certificate().clone()]);
    let gone = config.replace("certificate-authority/", "certificate-authority/0");
    let pca = Pca::within(&data(&gone), &context_at(Arc::new(SystemClock)), &aws.world()).unwrap();
    let error = pca.prepare().await.unwrap_err().to_string();
    assert!(error.starts_with("failed to describe CertificateAuthority: http://127.0.0.1:"), "{error}");
    assert!(error.contains("ResourceNotFoundException"), "{error}");
}

/// What IAM answers to a request that nobody has signed.
fn iam(url: &str, form: &str) -> String {
    let scope =
        "Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, ";
    let answer = curl(&["-H", &format!("{scope}Signature=0"), "-d", form, url]);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

/// moto can be told to compute each signature by itself, with what AWS's own library for Python has, and to compare.
#[tokio::test]
async fn signatures_are_what_awss_own_library_computes() {
    let Some(emulator) = Emulator::moto_alone() else { return };
    let url = format!("http://127.0.0.1:{}", emulator.port());
    iam(&url, "Version=2010-05-08&Action=CreateUser&UserName=finial");
    let policy = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}"#;
    let put = "Version=2010-05-08&Action=PutUserPolicy&UserName=finial&PolicyName=all&PolicyDocument=";
    iam(&url, &format!("{put}{}", crate::world::encode(policy)));
    let made = iam(&url, "Version=2010-05-08&Action=CreateAccessKey&UserName=finial");
    let part = |name| crate::world::element(&made, name).unwrap();
    let (id, secret) = (part("AccessKeyId"), part("SecretAccessKey"));
    assert_eq!(curl(&["-H", "Content-Type: text/plain", "-d", "0", &format!("{url}/moto-api/reset-auth")]).status, 200);
    let service = |name, secret: &str| {
        let credentials = Credentials::new(&id, &Secret::new(secret.to_owned()), &Secret::default(), REGION);
        Service::new(name, REGION, Some(url.clone()), credentials, &world_now(&[])).unwrap()
    };
    let headers = [("content-type", "application/octet-stream".to_owned())];
    let bucket = Call { method: Method::PUT, path: "/bundles", headers: &[], body: Bytes::new() };
    let path = "/bundles/a folder/bundle+1 \u{1234}.pem";
    let object = Call { method: Method::PUT, path, headers: &headers, body: Bytes::from("text") };
    service(Name::S3, &secret).call(&bucket).await.unwrap();
    service(Name::S3, &secret).call(&object).await.unwrap();
    let fields = json!({ "Name": "n", "SecretString": "s" });
    let create = async |secret: &str| {
        let target = "secretsmanager.CreateSecret";
        service(Name::SecretsManager, secret).operation(target, "1.1", &fields).await
    };
    create(&secret).await.unwrap();
    for refused in [service(Name::S3, "other").call(&object).await.map(drop), create("other").await.map(drop)] {
        let error = refused.unwrap_err();
        assert_eq!((error.status(), error.code()), (Some(403), "SignatureDoesNotMatch"), "{error}");
    }
}
