use super::*;
use crate::fake::{FakeVault, context};
use finial_core::{Clock, ErrorKind, KeyType, SystemClock};
use finial_crypto::{DistinguishedName, PrivateKey, create_ca_csr};
use finial_plugin::conformance::UpstreamAuthorityFixture;
use std::time::Duration;
use testkit::fake::{Act, Asked};

fn vault(data: &str) -> Vault {
    Vault::new(&finial_hcl::parse(data).unwrap(), &context()).unwrap()
}

fn fixture() -> UpstreamAuthorityFixture {
    let fake = Box::leak(Box::new(FakeVault::start((3600, true))));
    let (upstream, now) = (Arc::new(vault(&fake.data(&fake.ways()[2]))), SystemClock.now());
    fake.state.lock().unwrap().stopped = Some(now);
    UpstreamAuthorityFixture { upstream, trust_domain: context().trust_domain, now }
}

finial_plugin::upstream_authority_conformance!(fixture());

async fn csr() -> Vec<u8> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    create_ca_csr(&key, &DistinguishedName::ca_default(), &context().trust_domain).await.unwrap()
}

#[tokio::test]
async fn each_way_to_log_in_leads_to_a_signature() {
    let fake = FakeVault::start((3600, true));
    let sign = "PUT /v1/pki/root/sign-intermediate";
    let first = [
        "GET /v1/auth/token/lookup-self",
        "PUT /v1/auth/cert/login",
        "PUT /v1/auth/team/roles/login",
        "PUT /v1/auth/kubernetes/login",
    ];
    for (way, first) in fake.ways().iter().zip(first) {
        let vault = vault(&fake.data(way));
        for want in [&[first, sign][..], &[sign]] {
            let minted = vault.mint_x509_ca(&csr().await, 600).await.unwrap();
            assert_eq!(minted.chain.len(), 2, "its own and the engine's");
            assert_eq!(minted.roots, std::slice::from_ref(&fake.root));
            assert_eq!(fake.calls(), want, "{way}");
        }
    }
}

#[tokio::test]
async fn a_token_that_was_revoked_is_replaced_once() {
    let fake = FakeVault::start((3600, true));
    let vault = vault(&fake.data(&fake.ways()[2]));
    vault.mint_x509_ca(&csr().await, 600).await.unwrap();
    fake.state.lock().unwrap().tokens.clear();
    fake.calls();
    vault.mint_x509_ca(&csr().await, 600).await.unwrap();
    let (sign, log_in) = ("PUT /v1/pki/root/sign-intermediate", "PUT /v1/auth/team/roles/login");
    assert_eq!(fake.calls(), [sign, log_in, sign]);
    // With a policy that does not allow it, a new token is no better.
    fake.state.lock().unwrap().instead = Some(|asked: &Asked| match asked.path.ends_with("/login") {
        true => Act::Say(200, r#"{"auth":{"client_token":"s.9","lease_duration":60,"renewable":true}}"#.into()),
        false => Act::Say(403, r#"{"errors":["permission denied"]}"#.into()),
    });
    let error = vault.mint_x509_ca(&csr().await, 600).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Denied);
    let (message, port) = (error.to_string(), fake.port);
    let want = format!("PUT https://127.0.0.1:{port}/v1/pki/root/sign-intermediate: 403 Forbidden: permission denied");
    assert_eq!(message, format!("failed to sign intermediate: {want}"));
    assert_eq!(fake.calls(), [sign, log_in, sign]);
}

#[tokio::test]
async fn a_wrong_secret_is_named_and_not_shown() {
    let fake = FakeVault::start((3600, true));
    for (way, want) in [
        (
            "approle_auth { approle_auth_mount_point = \"team/roles\" approle_id = \"id\" approle_secret_id = \"wrong-secret\" }",
            "authentication failed auth/team/roles/login: ",
        ),
        ("token_auth { token = \"wrong-secret\" }", "token lookup failed: "),
        (
            "k8s_auth { k8s_auth_role_name = \"server\" token_path = \"/nowhere\" }",
            "failed to load Kubernetes service account token: /nowhere: ",
        ),
    ] {
        let error = vault(&fake.data(way)).mint_x509_ca(&csr().await, 600).await.unwrap_err().to_string();
        assert!(error.starts_with(want) && !error.contains("wrong-secret"), "{error}");
    }
}

/// Tokens of one second: what is not renewed in time cannot sign.
#[tokio::test]
async fn a_token_is_renewed_while_nothing_is_to_be_signed() {
    let fake = FakeVault::start((3, true));
    let vault = vault(&fake.data(&fake.ways()[0]));
    vault.mint_x509_ca(&csr().await, 600).await.unwrap();
    fake.calls();
    let renewed = async {
        // Whoever waits may be dropped and wait again.
        loop {
            let waiting = tokio::time::timeout(Duration::from_millis(700), vault.next_authorities()).await;
            assert!(waiting.is_err(), "never says a thing");
            if fake.state.lock().unwrap().calls.len() >= 2 {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("in time");
    assert!(fake.calls().iter().all(|call| call == "PUT /v1/auth/token/renew-self"));
}

#[tokio::test]
async fn one_that_may_not_be_renewed_is_fetched_again_when_it_is_old() {
    let fake = FakeVault::start((1, false));
    let vault = vault(&fake.data(&fake.ways()[2]));
    let old = async {
        loop {
            vault.mint_x509_ca(&csr().await, 600).await.unwrap();
            let logins = |calls: &[String]| calls.iter().filter(|call| call.ends_with("/login")).count();
            if logins(&fake.state.lock().unwrap().calls) >= 2 {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), old).await.expect("in time");
    assert!(!fake.calls().iter().any(|call| call.contains("renew")));
}

#[tokio::test]
async fn what_is_not_an_answer_is_told_with_its_sender() {
    let fake = FakeVault::start((3600, true));
    let vault = vault(&fake.data(&fake.ways()[0]));
    vault.mint_x509_ca(&csr().await, 600).await.unwrap();
    let at =
        format!("failed to sign intermediate: PUT https://127.0.0.1:{}/v1/pki/root/sign-intermediate: ", fake.port);
    type Case = (fn(&Asked) -> Act, &'static str);
    let cases: [Case; 7] = [
        (|_| Act::Say(200, "<html>".into()), "the answer is not Vault's: "),
        (|_| Act::Say(200, "{\"data\":{\"certificate\":7}}".into()), "the answer is not Vault's: "),
        (|_| Act::Say(503, "{\"errors\":[\"Vault is sealed\"]}".into()), "503 Service Unavailable: Vault is sealed"),
        (|_| Act::Say(400, String::new()), "400 Bad Request"),
        (|_| Act::Close, ""),
        (|_| Act::Say(200, "x".repeat(2 << 20)), "the answer is larger than 1048576 bytes"),
        (
            |_| Act::Send(307, "Location: http://127.0.0.1:1/v1/pki/root/sign-intermediate".into()),
            "redirected to http://127.0.0.1:1/",
        ),
    ];
    for (instead, want) in cases {
        fake.state.lock().unwrap().instead = Some(instead);
        let error = vault.mint_x509_ca(&csr().await, 600).await.unwrap_err().to_string();
        let rest = error.strip_prefix(&at).unwrap_or_else(|| panic!("{error}"));
        assert!(rest.starts_with(want), "{error}");
    }
    for (body, want) in [
        (r#"{"data":{"certificate":"x","issuing_ca":"y"}}"#, "failed to parse Root CA certificate: "),
        (
            r#"{"data":{"certificate":"x","issuing_ca":"y","ca_chain":["z"]}}"#,
            "failed to parse upstream bundle certificates: ",
        ),
    ] {
        let answer: Signed = serde_json::from_str(body).unwrap();
        let error = minted(&answer.data).unwrap_err().to_string();
        let own = error.starts_with("failed to parse certificate: ");
        assert!(own || error.starts_with(want), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_never_answers_costs_so_much_time_and_no_more() {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let vault = vault(&format!("vault_addr = \"http://127.0.0.1:{port}\"\ntoken_auth {{ token = \"x\" }}"));
    let error = vault.mint_x509_ca(&csr().await, 600).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.to_string().ends_with("/v1/auth/token/lookup-self: no answer within 12s"), "{error}");
}

#[tokio::test]
async fn a_standby_leads_to_the_one_that_signs() {
    let fake = FakeVault::start((3600, true));
    let location = format!("Location: https://127.0.0.1:{}", fake.port);
    let standby = testkit::fake::tcp(Some(fake.pki.server("server", false)), move |asked| {
        Act::Send(307, format!("{location}{}", asked.path))
    });
    let data = fake.data(&fake.ways()[2]).replace(&format!(":{}/", fake.port), &format!(":{standby}/"));
    vault(&data).mint_x509_ca(&csr().await, 600).await.unwrap();
}

#[tokio::test]
async fn nobody_passes_for_vault() {
    let fake = FakeVault::start((3600, true));
    let way = &fake.ways()[0];
    let without = fake.data(way).replace("ca_cert_path", "no_path");
    let error = vault(&without).mint_x509_ca(&csr().await, 600).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate: UnknownIssuer"), "{error}");
    assert_eq!(fake.calls().len(), 0);
    vault(&format!("{without}\ninsecure_skip_verify = true")).mint_x509_ca(&csr().await, 600).await.unwrap();
}

/// `VAULT_PROXY_ADDR` holds for every address, and before `VAULT_HTTP_PROXY`, as in Vault's own client.
#[tokio::test]
async fn vault_may_have_a_proxy_of_its_own() {
    let fake = FakeVault::start((3600, true));
    let proxy = testkit::fake::connect_proxy(|_| None);
    let mut vault = vault(&fake.data(&fake.ways()[0]));
    let keys: Keys = decode(&finial_hcl::parse(&fake.data(&fake.ways()[0])).unwrap()).unwrap();
    let url = format!("http://me:hush@127.0.0.1:{}", proxy.port);
    let settings = keys.resolve(|variable| match variable {
        "VAULT_PROXY_ADDR" => Some(url.clone()),
        "VAULT_HTTP_PROXY" => Some("http://127.0.0.1:1".into()),
        _ => None,
    });
    vault.settings = Arc::new(settings.unwrap());
    vault.mint_x509_ca(&csr().await, 600).await.unwrap();
    assert!(
        proxy.heads()[0].starts_with(&format!("CONNECT 127.0.0.1:{} HTTP/1.1\r\n", fake.port)),
        "{:?}",
        proxy.heads()
    );
}
