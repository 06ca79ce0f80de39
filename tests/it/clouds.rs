//! The same configuration under our server and the real SPIRE: what both take from and put into emulated clouds.

use serde_json::{Value, json};
use testkit::clouds::Emulator;
use testkit::envoy::Answer;
use testkit::fake::Pki;
use testkit::oidc::curl;
use testkit::{Flavor, Server, ServerOptions, eventually};

const REGION: &str = "us-east-1";

/// A request to moto, which looks at the signature's scope alone.
fn aws(port: u16, service: &str, more: &[&str], path: &str) -> Answer {
    let scope = format!("Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/{REGION}/{service}/aws4_request, ");
    let header = format!("{scope}SignedHeaders=host, Signature=0");
    let url = format!("http://127.0.0.1:{port}{path}");
    curl(&[&["-H", header.as_str()], more, &[url.as_str()]].concat())
}

fn secrets_manager(port: u16, action: &str, body: &str) {
    let action = format!("X-Amz-Target: secretsmanager.{action}");
    let headers = ["-H", action.as_str(), "-H", "Content-Type: application/x-amz-json-1.1", "--data-binary", body];
    let answer = aws(port, "secretsmanager", &headers, "/");
    assert_eq!(answer.status, 200, "{answer:?}");
}

fn secret(port: u16, name: &str, text: &str) {
    secrets_manager(port, "CreateSecret", &json!({ "Name": name, "SecretString": text }).to_string());
}

/// Stores an intermediate CA with its key and root.
fn store(port: u16, pki: &Pki, name: &str) {
    pki.issue(
        name,
        "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash",
    );
    let read = |file: &str| std::fs::read_to_string(pki.path(file)).expect("is there");
    secret(port, &format!("{name}-cert"), &read(&format!("{name}.crt")));
    secret(port, &format!("{name}-key"), &read(&format!("{name}.key")));
    secret(port, &format!("{name}-root"), &read("ca.crt"));
}

fn arns(name: &str) -> String {
    format!("cert_file_arn = \"{name}-cert\", key_file_arn = \"{name}-key\", bundle_file_arn = \"{name}-root\"")
}

/// The document without what every server has its own.
fn shape(document: &mut Value) {
    for key in document["keys"].as_array_mut().expect("keys") {
        for own in ["kid", "x", "y"] {
            if let Some(value) = key.get_mut(own) {
                *value = json!("…");
            }
        }
    }
}

/// The variables with which both find the emulators.
fn environment(moto: u16, gcs: u16) -> Vec<(&'static str, std::path::PathBuf)> {
    vec![
        ("AWS_ACCESS_KEY_ID", "AKIDTEST".into()),
        ("AWS_SECRET_ACCESS_KEY", "secret".into()),
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{moto}").into()),
        ("STORAGE_EMULATOR_HOST", format!("127.0.0.1:{gcs}").into()),
    ]
}

fn plugins(bucket: &str, moto: u16) -> String {
    format!(
        r#"UpstreamAuthority "awssecret" {{
        plugin_data {{ region = "{REGION}", {arns} }}
    }}
    BundlePublisher "aws_s3" {{
        plugin_data {{
            region = "{REGION}", bucket = "{bucket}", object_key = "a/bundle.json", format = "spiffe", refresh_hint = "7m"
            endpoint = "http://127.0.0.1:{moto}"
        }}
    }}
    BundlePublisher "gcp_cloudstorage" {{
        plugin_data {{ bucket_name = "{bucket}", object_name = "a/bundle.json", format = "jwks" }}
    }}
    Notifier "gcs_bundle" {{
        plugin_data {{ bucket = "{bucket}", object_path = "bundle.pem" }}
    }}"#,
        arns = arns("upstream")
    )
}

#[test]
fn both_servers_take_the_same_from_clouds_and_put_the_same_there() {
    let (Some(moto), Some(gcs)) = (Emulator::moto(), Emulator::gcs()) else { return };
    let (moto, gcs, _kept) = (moto.port(), gcs.port(), (moto.clone(), gcs.clone()));
    let pki = Pki::new();
    let root = std::fs::read_to_string(pki.path("ca.crt")).unwrap();
    store(moto, &pki, "upstream");
    let seen = [(Flavor::Spire, "of-spire"), (Flavor::Finial, "of-finial")].map(|(flavor, bucket)| {
        assert_eq!(aws(moto, "s3", &["-X", "PUT"], &format!("/{bucket}")).status, 200);
        let body = json!({ "name": bucket }).to_string();
        let url = format!("http://127.0.0.1:{gcs}/storage/v1/b?project=p");
        assert_eq!(curl(&["-H", "Content-Type: application/json", "-d", &body, &url]).status, 200);
        let server = Server::start(
            flavor,
            &ServerOptions {
                plugins: plugins(bucket, moto),
                environment: environment(moto, gcs),
                ..Default::default()
            },
        );
        let read = |what: &str, ask: &dyn Fn() -> Answer| {
            eventually(&format!("{flavor:?}: {what}"), || match ask() {
                answer if answer.status == 200 => Ok(answer),
                answer => Err(format!("{answer:?}")),
            })
        };
        let s3 = read("in S3", &|| aws(moto, "s3", &[], &format!("/{bucket}/a/bundle.json")));
        let object = |name: &str| curl(&[&format!("http://127.0.0.1:{gcs}/storage/v1/b/{bucket}/o/{name}?alt=media")]);
        let jwks = read("in Cloud Storage", &|| object("a%2Fbundle.json"));
        let pem = read("by the notifier", &|| object("bundle.pem"));
        assert_eq!(pem.body, root, "{flavor:?}: the root above is the trust domain's");
        drop(server);
        let documents = [&s3, &jwks].map(|answer| {
            let mut document: Value = serde_json::from_str(&answer.body).expect("is JSON");
            shape(&mut document);
            document
        });
        let kinds = [&s3, &jwks, &pem].map(|answer| answer.header("content-type").to_owned());
        (documents, kinds)
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[1].0[0]["spiffe_refresh_hint"], 420);
}

#[test]
fn a_ca_that_cannot_be_had_ends_the_start() {
    let Some(moto) = Emulator::moto() else { return };
    let pki = Pki::new();
    for (flavor, name) in [(Flavor::Spire, "gone-spire"), (Flavor::Finial, "gone-finial")] {
        store(moto.port(), &pki, name);
        let arns = arns(name);
        let plugins = format!("UpstreamAuthority \"awssecret\" {{ plugin_data {{ region = \"{REGION}\", {arns} }} }}");
        let environment = environment(moto.port(), 1);
        let server = Server::start(flavor, &ServerOptions { plugins, environment, ..Default::default() });
        let body = json!({ "SecretId": format!("{name}-key"), "ForceDeleteWithoutRecovery": true }).to_string();
        secrets_manager(moto.port(), "DeleteSecret", &body);
        let ended = server.second_on_same_data();
        assert_eq!(ended.code, 1, "{flavor:?}: {ended:?}");
        let said = format!("{}{}", ended.stdout, ended.stderr);
        for part in ["awssecret", &format!("unable to read {name}-key"), "ResourceNotFoundException"] {
            assert!(said.contains(part), "{flavor:?}: {part}: {said}");
        }
    }
}
