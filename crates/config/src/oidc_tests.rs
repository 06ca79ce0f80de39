use super::*;

fn parse(text: &str) -> Result<OidcSettings, Vec<String>> {
    match parse_oidc(Path::new("oidc.conf"), text) {
        Ok(loaded) => Ok(loaded.settings),
        Err(error) => Err(error.problems.into_iter().map(|p| p.message).collect()),
    }
}

const LEAST: &str = "domains = [\"x.test\"]\nserver_api { address = \"unix:///run/api.sock\" }\n";

#[test]
fn what_is_not_written_has_spires_defaults() {
    let settings = parse(&format!("{LEAST} insecure_addr = \":8080\"")).unwrap();
    assert_eq!(settings.endpoint.domains, ["x.test"]);
    assert_eq!(settings.endpoint.listen, OidcListen::Insecure(":8080".into()));
    assert_eq!(settings.source, OidcSource::Server("/run/api.sock".into()));
    assert_eq!(settings.poll_interval, Duration::from_secs(10));
    assert_eq!((settings.health, settings.endpoint.documents), (None, OidcDocuments::default()));
}

#[test]
fn all_that_can_be_written_is_read() {
    let settings = parse(
        r#"
        log_level = "debug"
        domains = ["a.test", "b.test", "a.test"]
        set_key_use = true
        allow_insecure_scheme = true
        jwt_issuer = "https://issuer.test/path"
        jwks_uri = "https://keys.test/k"
        server_path_prefix = "/pre"
        log_requests = true
        health_checks { live_path = "/alive" }
        workload_api { socket_path = "/run/agent.sock" trust_domain = "example.org" poll_interval = "3s" }
        serving_cert_file { cert_file_path = "c.pem" key_file_path = "k.pem" addr = "127.0.0.1:8443" }
        "#,
    )
    .unwrap();
    assert_eq!(settings.endpoint.domains, ["a.test", "b.test"]);
    assert_eq!(settings.poll_interval, Duration::from_secs(3));
    let health = OidcHealth { port: 8008, ready_path: "/ready".into(), live_path: "/alive".into() };
    assert_eq!(settings.health, Some(health));
    let domain = TrustDomain::parse("example.org").unwrap();
    assert_eq!(settings.source, OidcSource::Workload("/run/agent.sock".into(), domain));
    let OidcEndpoint { listen, documents, log_requests, .. } = settings.endpoint;
    let OidcListen::ServingCert { address, file_sync_interval, .. } = listen else { panic!("another listener") };
    assert_eq!((address.to_string().as_str(), file_sync_interval.as_secs()), ("127.0.0.1:8443", 60));
    assert!(log_requests && documents.set_key_use && documents.allow_insecure_scheme);
}

#[test]
fn a_prefix_without_a_slash_is_one_all_the_same() {
    for (written, read) in [("oidc", "/oidc"), ("/oidc", "/oidc"), ("/oidc/", "/oidc/"), ("/", "/"), ("", "")] {
        let settings =
            parse(&format!("{LEAST} insecure_addr = \":8080\"\nserver_path_prefix = \"{written}\"")).unwrap();
        assert_eq!(settings.endpoint.documents.path_prefix, read);
    }
}

#[test]
fn everything_wrong_is_named_at_once() {
    let said =
        parse("domains = [\"Ä.test\"]\njwt_issuer = \"nonsense\"\nhealth_checks { bind_port = 99999 }").unwrap_err();
    assert_eq!(
        said,
        [
            "exactly one of the server_api, workload_api, or file sections must be configured",
            "health_checks: bind_port 99999 is not a TCP port",
            "domain \"Ä.test\" must already be punycode encoded",
            "either acme, serving_cert_file, insecure_addr or listen_socket_path must be configured",
            "the jwt_issuer url must contain a scheme",
        ]
    );
}

#[test]
fn what_excludes_each_other_is_refused_in_spires_words() {
    let cases = [
        (
            "insecure_addr = \":1\"\n listen_socket_path = \"s\"",
            "insecure_addr and listen_socket_path are mutually exclusive",
        ),
        ("acme { }\n serving_cert_file { }", "acme and serving_cert_file are mutually exclusive"),
        ("acme { email = \"x\" }", "tos_accepted must be set to true in the acme configuration section"),
        ("acme { tos_accepted = true }", "email must be configured in the acme configuration section"),
        (
            "acme { tos_accepted = true email = \"x\" addr = \":x\" }",
            "invalid addr in the acme configuration section: address :x: invalid port",
        ),
        (
            "serving_cert_file { key_file_path = \"k\" }",
            "cert_file_path must be configured in the serving_cert_file configuration section",
        ),
        (
            "insecure_addr = \":1\"\n file { path = \"b\" }",
            "the server_api, workload_api, and file sections are mutually exclusive",
        ),
    ];
    for (text, message) in cases {
        let said = parse(&format!("{LEAST}{text}")).unwrap_err();
        assert!(said.iter().any(|s| s == message), "{text}: {said:?}");
    }
    let tcp = "domains = [\"x\"]\ninsecure_addr = \":1\"\nserver_api { address = \"tcp:1\" }";
    let message = "address must use the unix name system in the server_api configuration section";
    assert_eq!(parse(tcp).unwrap_err(), [message]);
}

#[test]
fn a_server_may_have_one_of_its_own() {
    let server = |oidc: &str| {
        let text = format!(
            "server {{ trust_domain = \"td\" data_dir = \"d\"\n experimental {{ oidc {{ {oidc} }} }} }}\nplugins {{\n\
             DataStore \"sql\" {{}}\n KeyManager \"memory\" {{}} }}"
        );
        crate::parse_server(Path::new("server.conf"), &text, &crate::ServerOverrides::default())
    };
    let loaded = server("domains = [\"x.test\"] insecure_addr = \"127.0.0.1:8080\"").unwrap();
    let endpoint = loaded.settings.oidc.unwrap();
    assert_eq!(
        (endpoint.domains, endpoint.listen),
        (vec!["x.test".into()], OidcListen::Insecure("127.0.0.1:8080".into()))
    );
    let refused = server("insecure_addr = \":1\"\n file { path = \"x\" }\n jwks_uri = \"x\"").unwrap_err();
    let said: Vec<_> = refused.problems.iter().map(|p| (p.message.as_str(), p.pos.map(|pos| pos.line))).collect();
    assert_eq!(
        said,
        [
            ("experimental.oidc: file has no meaning in a server", Some(3)),
            ("at least one domain must be configured", Some(2)),
            ("the jwks_uri url must contain a scheme", Some(4)),
        ]
    );
}

#[test]
fn a_server_whose_tokens_name_another_issuer_is_warned() {
    let said = |issuer: &str, oidc: &str| {
        let text = format!(
            "server {{ trust_domain = \"td\" data_dir = \"d\"\n {issuer}\n experimental {{ oidc {{ insecure_addr = \":1\" \
             {oidc} }} }} }}\nplugins {{\n DataStore \"sql\" {{}}\n KeyManager \"memory\" {{}} }}"
        );
        let overrides = crate::ServerOverrides::default();
        let loaded = crate::parse_server(Path::new("server.conf"), &text, &overrides).unwrap();
        let notices = loaded.notices.iter().map(|notice| format!("{notice:?}"));
        notices.filter(|text| text.contains("refuses them")).collect::<Vec<_>>()
    };
    let domains = "domains = [\"a.test\", \"b.test\"]";
    for (issuer, oidc, part) in [
        ("", "", "JWT-SVIDs name no issuer, as the server's jwt_issuer is not set"),
        (
            "jwt_issuer = \"https://c.test/a.test\"",
            "",
            "is \\\"https://c.test/a.test\\\", which is none of the domains",
        ),
        ("jwt_issuer = \"https://a.test\"", "jwt_issuer = \"https://a.test/x\"", "that of the oidc block is another"),
    ] {
        let lines = said(issuer, &format!("{domains} {oidc}"));
        assert!(lines.len() == 1 && lines[0].contains(part), "{issuer}: {lines:?}");
    }
    for (issuer, oidc) in [
        ("https://b.test", ""),
        ("https://a.test:8443/x", ""),
        ("https://elsewhere.test", "jwt_issuer = \"https://elsewhere.test\""),
    ] {
        assert_eq!(said(&format!("jwt_issuer = \"{issuer}\""), &format!("{domains} {oidc}")), [""; 0], "{issuer}");
    }
    assert_eq!(said("jwt_issuer = \"https://[::1]:8443\"", "domains = [\"::1\"]"), [""; 0]);
}
