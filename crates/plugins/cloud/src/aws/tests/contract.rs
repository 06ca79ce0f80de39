//! What moto does not have, as AWS documents it.

use crate::aws::{Pca, RolesAnywhere, S3, Secrets};
use crate::testing::{NOW, context, csr, data, root, world};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::{Bundle, KeyType, TrustDomain, X509Authority};
use finial_crypto::{PrivateKey, pem};
use finial_plugin::conformance::{BundlePublisherFixture, UpstreamAuthorityFixture, ca};
use finial_plugin::{BundlePublisher, UpstreamAuthority};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use testkit::fake::{Act, Asked, tcp};

const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AKIDTEST"), ("AWS_SECRET_ACCESS_KEY", "secret")];

fn roles_anywhere(port: u16) -> RolesAnywhere {
    let url = format!("http://127.0.0.1:{port}");
    let world = world(&[&KEYS[..], &[("AWS_ENDPOINT_URL_ROLESANYWHERE", &url)]].concat());
    let config = "region = \"us-east-1\"\ntrust_anchor_id = \"153d3e58-cab5-4a59-a0a1-3febad2937c4\"";
    RolesAnywhere::within(&data(config), &world).unwrap()
}

mod trust_anchor {
    use super::*;

    finial_plugin::bundle_publisher_conformance!({
        let held: Arc<Mutex<Option<String>>> = Arc::default();
        let written = held.clone();
        let port = tcp(None, move |asked: &Asked| {
            assert_eq!(asked.method, "PATCH");
            assert_eq!(asked.path, "/trustanchor/153d3e58-cab5-4a59-a0a1-3febad2937c4");
            assert_eq!(asked.header("content-type"), Some("application/json"));
            let scope =
                "AWS4-HMAC-SHA256 Credential=AKIDTEST/20231114/us-east-1/rolesanywhere/aws4_request, SignedHeaders=";
            assert!(asked.header("authorization").unwrap().starts_with(scope));
            let source = &asked.json()["source"];
            assert_eq!(source["sourceType"], "CERTIFICATE_BUNDLE");
            let pem = source["sourceData"]["x509CertificateData"].as_str().unwrap().to_owned();
            *written.lock().unwrap() = Some(pem);
            Act::Say(200, json!({ "trustAnchor": { "trustAnchorArn": "arn", "name": "n" } }).to_string())
        });
        BundlePublisherFixture {
            publisher: Arc::new(roles_anywhere(port)),
            published: Box::new(move || pem::certificates(held.lock().unwrap().as_ref()?.as_bytes()).ok()),
            spoil: None,
        }
    });

    #[tokio::test]
    async fn a_bundle_that_aws_would_not_take_is_not_sent_and_a_refusal_is_told() {
        let refusal = r#"{"message":"User is not authorized"}"#.to_owned();
        let port = tcp(None, move |_| {
            let length = refusal.len();
            let head = format!(
                "HTTP/1.1 403 X\r\nx-amzn-ErrorType: AccessDeniedException:http://x/\r\nContent-Length: {length}\r\n\r\n"
            );
            Act::Raw([head.as_bytes(), refusal.as_bytes()].concat())
        });
        let publisher = roles_anywhere(port);
        let mut bundle = Bundle::empty(TrustDomain::parse("a.test").unwrap());
        let (ca, _) = root(NOW).await;
        bundle.x509_authorities.push(X509Authority { der: ca.certificate().clone(), tainted: false });
        let error = publisher.publish(&bundle).await.unwrap_err().to_string();
        let want = "answered 403: AccessDeniedException: User is not authorized";
        assert!(error.starts_with("failed to update trust anchor: http://") && error.ends_with(want), "{error}");
        while bundle.x509_authorities.len() < 20 {
            bundle.x509_authorities.push(bundle.x509_authorities[0].clone());
        }
        let error = publisher.publish(&bundle).await.unwrap_err().to_string();
        assert!(error.starts_with("bundle too large: ") && error.ends_with("and AWS takes 8000"), "{error}");
    }
}

/// A private CA below a root, as ACM PCA answers: not ready at first, and out of order once.
async fn private_ca() -> (u16, Arc<AtomicUsize>) {
    let (ca, _) = root(NOW).await;
    let ca = Arc::new(ca);
    let issued: Mutex<BTreeMap<String, (String, usize)>> = Mutex::default();
    let count = Arc::new(AtomicUsize::new(0));
    let calls = count.clone();
    let port = tcp(None, move |asked: &Asked| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        let fields = asked.json();
        assert_eq!(fields["CertificateAuthorityArn"], "arn:ca");
        let no = |kind: &str| {
            Act::Say(400, json!({ "__type": format!("com.amazonaws#{kind}"), "message": "m" }).to_string())
        };
        match asked.header("x-amz-target").unwrap() {
            "ACMPrivateCA.DescribeCertificateAuthority" => {
                let ca = json!({
                    "Status": "ACTIVE",
                    "CertificateAuthorityConfiguration": { "SigningAlgorithm": "SHA384WITHECDSA" },
                });
                Act::Say(200, json!({ "CertificateAuthority": ca }).to_string())
            }
            // What passes is tried again.
            "ACMPrivateCA.IssueCertificate" if call == 1 => no("ThrottlingException"),
            "ACMPrivateCA.IssueCertificate" => {
                assert_eq!(fields["SigningAlgorithm"], "SHA384WITHECDSA");
                let template = "arn:aws:acm-pca:::template/SubordinateCACertificate_PathLen0/V1";
                assert_eq!(
                    (&fields["TemplateArn"], &fields["Validity"]["Type"]),
                    (&json!(template), &json!("ABSOLUTE"))
                );
                let request = BASE64.decode(fields["Csr"].as_str().unwrap()).unwrap();
                let request = pem::blocks(&request).unwrap().remove(0);
                assert_eq!(request.label, "CERTIFICATE REQUEST");
                let (ca, ends) = (ca.clone(), fields["Validity"]["Value"].as_i64().unwrap());
                let signed = ca::sign(&ca, request.der.expose(), (NOW - 10, ends));
                let arn = format!("arn:certificate/{call}");
                issued.lock().unwrap().insert(arn.clone(), (pem::encode("CERTIFICATE", &signed), 0));
                Act::Say(200, json!({ "CertificateArn": arn }).to_string())
            }
            "ACMPrivateCA.GetCertificate" => {
                let mut issued = issued.lock().unwrap();
                let (certificate, asked) = issued.get_mut(fields["CertificateArn"].as_str().unwrap()).unwrap();
                *asked += 1;
                if *asked < 2 {
                    return no("RequestInProgressException");
                }
                let chain = pem::encode("CERTIFICATE", ca.certificate());
                Act::Say(200, json!({ "Certificate": certificate, "CertificateChain": chain }).to_string())
            }
            other => panic!("{other}"),
        }
    });
    (port, count)
}

fn pca(port: u16) -> Pca {
    let world = world(&[&KEYS[..], &[("AWS_ENDPOINT_URL_ACM_PCA", &format!("http://127.0.0.1:{port}"))]].concat());
    Pca::within(&data("region = \"us-east-1\"\ncertificate_authority_arn = \"arn:ca\""), &context(), &world).unwrap()
}

mod acm_pca {
    use super::*;

    finial_plugin::upstream_authority_conformance!({
        let (port, _) = private_ca().await;
        let upstream = Arc::new(pca(port));
        UpstreamAuthorityFixture { upstream, trust_domain: context().trust_domain, now: NOW }
    });

    #[tokio::test]
    async fn a_refusal_for_good_is_not_repeated() {
        let count = Arc::new(AtomicUsize::new(0));
        let calls = count.clone();
        let port = tcp(None, move |asked: &Asked| {
            calls.fetch_add(1, Ordering::SeqCst);
            if asked.header("x-amz-target") == Some("ACMPrivateCA.DescribeCertificateAuthority") {
                return Act::Say(200, json!({ "CertificateAuthority": { "Status": "DISABLED" } }).to_string());
            }
            let no = json!({ "__type": "InvalidStateException", "message": "The CA is disabled\n for now" });
            Act::Say(400, no.to_string())
        });
        let csr = csr(&PrivateKey::generate(KeyType::EcP256).unwrap()).await;
        let error = pca(port).mint_x509_ca(&csr, 600).await.unwrap_err().to_string();
        assert!(error.ends_with("the CA has no signing algorithm; set signing_algorithm"), "{error}");
        let world = world(&[&KEYS[..], &[("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{port}"))]].concat());
        let config = "region = \"a\"\ncertificate_authority_arn = \"b\"\nsigning_algorithm = \"SHA256WITHECDSA\"";
        let pca = Pca::within(&data(config), &context(), &world).unwrap();
        let error = pca.mint_x509_ca(&csr, 600).await.unwrap_err().to_string();
        assert!(error.starts_with("failed submitting CSR: "), "{error}");
        assert!(error.ends_with("answered 400: InvalidStateException: The CA is disabled for now"), "{error}");
        assert_eq!(count.load(Ordering::SeqCst), 3);
        assert!(pca.mint_seconds() > 180, "the server waits for as long as it is polled");
    }
}

#[tokio::test]
async fn what_cannot_be_reached_or_read_is_tried_three_times_at_most() {
    let count = Arc::new(AtomicUsize::new(0));
    let calls = count.clone();
    let port = tcp(None, move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Act::Close,
        1 => Act::Say(503, String::new()),
        2 => Act::Say(200, String::new()),
        3 | 4 => Act::Say(500, "<Error><Code>InternalError</Code></Error>".into()),
        _ => Act::Send(301, "x-amz-bucket-region: eu-north-1".into()),
    });
    let world = world(&[&KEYS[..], &[("AWS_ENDPOINT_URL_S3", &format!("http://127.0.0.1:{port}"))]].concat());
    let config = "region = \"us-east-1\"\nbucket = \"b\"\nobject_key = \"k\"\nformat = \"spiffe\"";
    let publisher = S3::within(&data(config), &world).unwrap();
    let mut bundle = Bundle::empty(TrustDomain::parse("a.test").unwrap());
    publisher.publish(&bundle).await.unwrap();
    publisher.publish(&bundle).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 3, "an equal bundle is not sent again");
    bundle.sequence_number = 2;
    let error = publisher.publish(&bundle).await.unwrap_err().to_string();
    assert!(error.ends_with("answered 301: (the bucket is in region eu-north-1)"), "{error}");
    assert_eq!(count.load(Ordering::SeqCst), 6);
    let closed = testkit::free_port();
    let world =
        crate::testing::world(&[&KEYS[..], &[("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{closed}"))]].concat());
    let publisher = S3::within(&data(config), &world).unwrap();
    let error = publisher.publish(&bundle).await.unwrap_err().to_string();
    let want = format!(
        "failed to put object: http://127.0.0.1:{closed} cannot be reached: dial tcp 127.0.0.1:{closed}: connect: connection refused"
    );
    assert_eq!(error, want);
}

#[test]
fn what_is_missing_is_named_in_the_words_of_spire() {
    let world = world(&[]);
    let text = |result: Result<(), finial_plugin::PluginError>| result.unwrap_err().to_string();
    let s3 = |config: &str| text(S3::within(&data(config), &world).map(drop));
    let all = ["region", "bucket name", "object key", "bundle format"];
    assert_eq!(s3(""), all.map(|what| format!("configuration is missing the {what}")).join("; "));
    let most = "region = \"a\"\nbucket = \"b\"\nobject_key = \"c\"";
    assert_eq!(s3(most), "configuration is missing the bundle format");
    assert_eq!(
        s3(&format!("{most}\nformat = \"der\"")),
        "could not parse bundle format from configuration: unknown bundle format: \"der\""
    );
    let all = format!("{most}\nformat = \"pem\"");
    let want = "could not parse refresh_hint: could not parse refresh hint \"soon\": time: invalid duration \"soon\"";
    assert_eq!(s3(&format!("{all}\nrefresh_hint = \"soon\"")), want);
    assert!(s3(&format!("{all}\nendpoint = \"ftp://x\"")).starts_with("\"ftp://x\" is not an http or https URL"));
    assert!(s3(&all.replace("\"a\"", "\"a.evil.test/\"")).starts_with("region \"a.evil.test/\" is not the name of"));
    let anchor = |config: &str| text(RolesAnywhere::within(&data(config), &world).map(drop));
    assert!(anchor("").starts_with("configuration is missing the region; configuration is missing the "));
    assert_eq!(anchor("region = \"a\""), "configuration is missing the trust anchor id");
    assert!(anchor("region = \"a\"\ntrust_anchor_id = \"arn:x/y\"").starts_with("trust_anchor_id is not an id"));
    let pca = |config: &str| text(Pca::within(&data(config), &context(), &world).map(drop));
    assert!(pca("").starts_with("plugin configuration is missing the region; plugin configuration is "));
    assert_eq!(pca("region = \"a\""), "plugin configuration is missing the certificate_authority_arn");
    let supplemental = "region = \"a\"\ncertificate_authority_arn = \"b\"\nsupplemental_bundle_path = \"/nonexistent\"";
    assert!(pca(supplemental).starts_with("failed to load supplemental bundle: /nonexistent: "));
    let secrets = |config: &str| text(Secrets::within(&data(config), &context(), &world).map(drop));
    assert_eq!(secrets(""), "configuration missing 'cert_file_arn' value; configuration missing 'key_file_arn' value");
    assert_eq!(secrets("cert_file_arn = \"a\""), "configuration missing 'key_file_arn' value");
    assert_eq!(secrets("cert_file_arn = \"a\"\nkey_file_arn = \"b\""), "configuration missing 'region' value");
}

fn s3_at(port: u16) -> S3 {
    let world = world(&[&KEYS[..], &[("AWS_ENDPOINT_URL_S3", &format!("http://127.0.0.1:{port}"))]].concat());
    S3::within(&data("region = \"a\"\nbucket = \"b\"\nobject_key = \"k\"\nformat = \"spiffe\""), &world).unwrap()
}

#[tokio::test(start_paused = true)]
async fn who_never_answers_is_given_up() {
    let bundle = Bundle::empty(TrustDomain::parse("a.test").unwrap());
    let error = s3_at(tcp(None, |_| Act::Hang)).publish(&bundle).await.unwrap_err().to_string();
    assert!(error.ends_with(" cannot be reached: no answer within 8s"), "{error}");
}

#[tokio::test]
async fn an_endless_answer_is_not_read_and_not_asked_for_again() {
    let count = Arc::new(AtomicUsize::new(0));
    let calls = count.clone();
    let port = tcp(None, move |_| {
        calls.fetch_add(1, Ordering::SeqCst);
        Act::Say(500, "x".repeat(2 << 20))
    });
    let bundle = Bundle::empty(TrustDomain::parse("a.test").unwrap());
    let error = s3_at(port).publish(&bundle).await.unwrap_err().to_string();
    assert!(error.ends_with("the answer is larger than 1048576 bytes"), "{error}");
    assert_eq!(count.load(Ordering::SeqCst), 1);
}
