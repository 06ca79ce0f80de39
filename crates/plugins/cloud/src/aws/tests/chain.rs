//! Where keys come from.

use crate::aws::credentials::Credentials;
use crate::testing::{NOW, world, world_at};
use finial_core::{ManualClock, Secret};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::fake::{Act, Asked, tcp};

fn credentials() -> Credentials {
    Credentials::new("", &Secret::default(), &Secret::default(), "us-east-1")
}

/// Key, secret and token that are found with this environment.
async fn found(env: &[(&str, &str)]) -> Result<(String, String, Option<String>), String> {
    let keys = credentials().keys(&world(env)).await.map_err(|e| e.to_string())?;
    let token = keys.token.as_ref().map(|token| token.expose().clone());
    Ok((keys.id.clone(), keys.secret.expose().clone(), token))
}

fn text(id: &str, secret: &str, token: &str) -> (String, String, Option<String>) {
    (id.into(), secret.into(), Some(token.to_owned()).filter(|token| !token.is_empty()))
}

/// A security token service that gives keys named after the role and the identity.
fn sts() -> String {
    let port = tcp(None, |asked: &Asked| {
        let form = String::from_utf8(asked.body.clone()).unwrap();
        let field = |name: &str| {
            let value = form.split('&').find_map(|field| field.strip_prefix(&format!("{name}=")));
            value.unwrap_or_default().replace("%3A", ":").replace("%2F", "/")
        };
        let signed_by = asked.header("authorization").map_or(String::new(), |a| {
            assert!(a.contains("/us-east-1/sts/aws4_request"));
            a.split("Credential=").nth(1).unwrap().split('/').next().unwrap().to_owned()
        });
        let by = match field("Action").as_str() {
            "AssumeRoleWithWebIdentity" => {
                assert_eq!(signed_by, "", "a token is its own proof");
                field("WebIdentityToken")
            }
            _ => signed_by,
        };
        if field("RoleArn") == "arn:denied" {
            let no = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>not you &amp; me</Message></Error></ErrorResponse>";
            return Act::Say(403, no.into());
        }
        let id = format!("{} for {by} as {}{}", field("RoleArn"), field("RoleSessionName"), field("ExternalId"));
        Act::Say(
            200,
            format!(
                "<R><Credentials><AccessKeyId>{id}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
                 <SessionToken>t</SessionToken><Expiration>2023-11-14T23:13:20Z</Expiration></Credentials></R>"
            ),
        )
    });
    format!("http://127.0.0.1:{port}")
}

#[tokio::test]
async fn configuration_and_environment_come_first() {
    let env = [("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_SESSION_TOKEN", "t")];
    assert_eq!(found(&env).await.unwrap(), text("A", "s", "t"));
    assert_eq!(found(&env[..2]).await.unwrap(), text("A", "s", ""));
    let given = Credentials::new("B", &Secret::new("x".into()), &Secret::default(), "us-east-1");
    let keys = given.keys(&world(&env)).await.unwrap();
    assert_eq!((keys.id.as_str(), keys.token.is_none()), ("B", true));
    // Half of it is none, as in SPIRE.
    let half = Credentials::new("B", &Secret::default(), &Secret::default(), "us-east-1");
    assert_eq!(half.keys(&world(&env)).await.unwrap().id, "A");
}

#[tokio::test]
async fn a_role_is_taken_with_keys_or_a_token_and_renewed_before_its_end() {
    let sts = sts();
    let env = [("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_ENDPOINT_URL_STS", sts.as_str())];
    let clock = Arc::new(ManualClock::at(NOW));
    let world_then = world_at(clock.clone(), &env);
    let role = credentials().assuming("arn:aws:iam::1:role/r");
    let first = role.keys(&world_then).await.unwrap();
    assert_eq!(first.id, "arn:aws:iam::1:role/r for A as finial");
    assert!(Arc::ptr_eq(&first, &role.keys(&world_then).await.unwrap()));
    clock.advance(3300);
    assert!(!Arc::ptr_eq(&first, &role.keys(&world_then).await.unwrap()), "they would end within minutes");
    let denied = credentials().assuming("arn:denied").keys(&world(&env)).await.unwrap_err().to_string();
    let want = format!("the role arn:denied cannot be taken: {sts} answered 403: AccessDenied: not you & me");
    assert_eq!(denied, want);
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "proof\n").unwrap();
    let path = token.path().display().to_string();
    let env = [("AWS_WEB_IDENTITY_TOKEN_FILE", path.as_str()), ("AWS_ROLE_ARN", "arn:w"), ("AWS_ENDPOINT_URL", &sts)];
    assert_eq!(found(&env).await.unwrap().0, "arn:w for proof as finial");
    let named = [&env[..], &[("AWS_ROLE_SESSION_NAME", "me")]].concat();
    assert_eq!(found(&named).await.unwrap().0, "arn:w for proof as me");
    assert!(found(&env[..1]).await.unwrap_err().contains("AWS_ROLE_ARN is not"));
    let gone = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent"), ("AWS_ROLE_ARN", "arn:w")];
    assert!(found(&gone).await.unwrap_err().starts_with("the web identity token /nonexistent cannot be read: "));
}

#[tokio::test]
async fn profiles_have_keys_or_lead_to_others() {
    let sts = sts();
    let folder = tempfile::tempdir().unwrap();
    let aws = folder.path().join(".aws");
    std::fs::create_dir(&aws).unwrap();
    let secrets = "[default]\naws_access_key_id = D\naws_secret_access_key = d\naws_session_token = t\n[keys]\n\
                   aws_access_key_id=K\naws_secret_access_key=k\n";
    std::fs::write(aws.join("credentials"), secrets).unwrap();
    let config = "[profile up]\nrole_arn = arn:up\nsource_profile = keys\nexternal_id = -x\n[profile upper]\n\
                  role_arn = arn:upper\nsource_profile = up\n[profile round]\nrole_arn = arn:r\nsource_profile = about\n\
                  [profile about]\nrole_arn = arn:a\nsource_profile = round\n[profile sso]\nsso_session = s\n[profile env]\n\
                  role_arn = arn:e\ncredential_source = Environment\n[profile lost]\nrole_arn = arn:l\nsource_profile = none\n";
    std::fs::write(aws.join("config"), config).unwrap();
    let home = folder.path().display().to_string();
    let with = async |profile: &str| {
        let keys = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "e"), ("AWS_PROFILE", profile)];
        let env = [&keys[..], &[("HOME", home.as_str()), ("AWS_ENDPOINT_URL_STS", sts.as_str())]].concat();
        found(&env).await
    };
    assert_eq!(found(&[("HOME", &home)]).await.unwrap(), text("D", "d", "t"));
    assert_eq!(with("keys").await.unwrap(), text("K", "k", ""));
    assert_eq!(with("up").await.unwrap().0, "arn:up for K as finial-x");
    assert_eq!(with("upper").await.unwrap().0, "arn:upper for arn:up for K as finial-x as finial");
    assert_eq!(with("env").await.unwrap().0, "arn:e for E as finial");
    for (profile, want) in [
        ("round", "source_profile leads too far"),
        ("sso", "single sign-on and credential_process are not supported"),
        ("lost", "there is no AWS profile \"none\""),
        ("nobody", "AWS profile \"nobody\" has no credentials"),
    ] {
        let error = with(profile).await.unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}

fn document(id: &str) -> String {
    let expiration = "2023-11-14T23:13:20Z";
    json!({ "AccessKeyId": id, "SecretAccessKey": "s", "Token": "t", "Expiration": expiration, "Code": "Success" })
        .to_string()
}

#[tokio::test]
async fn containers_and_machines_have_metadata_services() {
    let port = tcp(None, |asked: &Asked| match (asked.path.as_str(), asked.header("authorization")) {
        ("/creds?x=y", Some("pod-token")) => Act::Say(200, document("C")),
        _ => Act::Say(403, String::new()),
    });
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "pod-token").unwrap();
    let (url, path) = (format!("http://127.0.0.1:{port}/creds?x=y"), token.path().display().to_string());
    let env = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str()),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", path.as_str()),
    ];
    assert_eq!(found(&env).await.unwrap(), text("C", "s", "t"));
    let far = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://evil.test/creds")];
    assert!(found(&far).await.unwrap_err().ends_with("is neither https nor next door"));
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let port = tcp(None, move |asked: &Asked| {
        count.fetch_add(1, Ordering::SeqCst);
        let token = asked.header("x-aws-ec2-metadata-token");
        match (asked.method.as_str(), asked.path.as_str(), token) {
            ("PUT", "/latest/api/token", _) if asked.header("x-aws-ec2-metadata-token-ttl-seconds").is_some() => {
                Act::Say(200, "imds-token".into())
            }
            ("GET", "/latest/meta-data/iam/security-credentials/", Some("imds-token")) => {
                Act::Say(200, "my-role\n".into())
            }
            ("GET", "/latest/meta-data/iam/security-credentials/my-role", Some("imds-token")) => {
                Act::Say(200, document("I"))
            }
            _ => Act::Say(401, String::new()),
        }
    });
    let url = format!("http://127.0.0.1:{port}");
    let env = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", url.as_str())];
    assert_eq!(found(&env).await.unwrap(), text("I", "s", "t"));
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    let error = found(&[("AWS_EC2_METADATA_DISABLED", "true")]).await.unwrap_err();
    let want = "no AWS credentials: none configured, none in the environment or the shared files, and \
                AWS_EC2_METADATA_DISABLED is true";
    assert_eq!(error, want);
}

#[tokio::test]
async fn a_metadata_service_that_talks_nonsense_is_not_believed_and_not_quoted() {
    let answers = [
        r#"{"AccessKeyId":"a","SecretAccessKey":"hidden","Token":7,"Expiration":"soon"}"#,
        r#"{"AccessKeyId":"a","SecretAccessKey":"hidden","Token":"t","Expiration":"soon"}"#,
        r#"{"Code":"Failed","AccessKeyId":"a","SecretAccessKey":"hidden","Token":"t","Expiration":"soon"}"#,
        "garbage hidden",
    ];
    for answer in answers {
        let port = tcp(None, move |_| Act::Say(200, answer.into()));
        let url = format!("http://127.0.0.1:{port}/x");
        let error = found(&[("AWS_CONTAINER_CREDENTIALS_FULL_URI", &url)]).await.unwrap_err();
        assert!(!error.contains("hidden") && error.starts_with("no AWS credentials: "), "{error}");
    }
}

#[tokio::test]
async fn keys_that_are_not_known_any_more_are_looked_up_anew() {
    let given = Arc::new(AtomicUsize::new(0));
    let count = given.clone();
    let keys = tcp(None, move |_| Act::Say(200, document(&format!("C{}", count.fetch_add(1, Ordering::SeqCst)))));
    let service = tcp(None, |asked: &Asked| match asked.header("authorization") {
        Some(signed) if signed.contains("Credential=C1/") => Act::Say(200, "{}".into()),
        _ => Act::Say(400, json!({ "__type": "UnrecognizedClientException", "message": "m" }).to_string()),
    });
    let (keys, service) = (format!("http://127.0.0.1:{keys}/x"), format!("http://127.0.0.1:{service}"));
    let env = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", keys.as_str())];
    let name = crate::aws::service::Name::SecretsManager;
    let world = world(&env);
    let service = crate::aws::service::Service::new(name, "GRA_1", Some(service), credentials(), &world).unwrap();
    for _ in 0..2 {
        service.operation("secretsmanager.GetSecretValue", "1.1", &json!({})).await.unwrap();
    }
    assert_eq!(given.load(Ordering::SeqCst), 2);
}
