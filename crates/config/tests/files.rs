//! From files to settings: SPIRE's keys, defaults, precedence, and every problem at once with its place.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use finial_config::*;
use finial_core::KeyType;
use proptest::prelude::*;
use std::path::Path;
use std::time::Duration;

fn server(text: &str) -> Result<Loaded<ServerSettings>, Box<ConfigError>> {
    parse_server(Path::new("s.conf"), text, &ServerOverrides::default())
}

fn agent(text: &str) -> Result<Loaded<AgentSettings>, Box<ConfigError>> {
    parse_agent(Path::new("a.conf"), text, &AgentOverrides::default())
}

fn problems(error: &ConfigError) -> Vec<String> {
    error
        .problems
        .iter()
        .map(|p| format!("{} @{}", p.message, p.pos.map(|pos| pos.to_string()).unwrap_or_default()))
        .collect()
}

#[test]
fn the_sample_server_file() {
    let loaded = server(include_str!("data/server.conf")).unwrap();
    assert_eq!(loaded.notices, []);
    let s = loaded.settings;
    assert_eq!(s.trust_domain.as_str(), "example.org");
    assert_eq!(s.bind_address.to_string(), "127.0.0.1:8081");
    assert_eq!(s.socket_path, Path::new("/tmp/spire-server/private/api.sock"));
    assert_eq!(s.data_dir, Path::new("./.data"));
    assert_eq!(s.log.level, LogLevel::Debug);
    assert_eq!(
        (s.x509_svid_ttl, s.jwt_svid_ttl, s.ca_ttl, s.agent_ttl),
        (Duration::from_secs(3600), Duration::from_secs(300), Duration::from_secs(86_400), None)
    );
    assert_eq!((s.ca_key_type, s.jwt_key_type), (KeyType::EcP256, KeyType::EcP256));
    let plugins: Vec<_> = s.plugins.iter().map(|p| (p.kind.as_str(), p.name.as_str(), p.enabled)).collect();
    assert_eq!(
        plugins,
        [
            ("DataStore", "sql", true),
            ("NodeAttestor", "join_token", true),
            ("KeyManager", "memory", true),
            ("UpstreamAuthority", "disk", true)
        ]
    );
    let data = s.plugins[0].load_data().unwrap();
    assert_eq!(data.find(&["database_type"]).and_then(|v| v.as_str()), Some("sqlite3"));
}

#[test]
fn a_comment_above_changes_no_plugin() {
    let text = include_str!("data/server.conf");
    let (plain, commented) = (server(text).unwrap().settings, server(&format!("# why\n{text}")).unwrap().settings);
    assert_ne!(plain.plugins[0].pos, commented.plugins[0].pos);
    assert_eq!(plain.plugins, commented.plugins);
}

#[test]
fn the_sample_agent_file() {
    let loaded = agent(include_str!("data/agent.conf")).unwrap();
    assert_eq!(loaded.notices, []);
    let a = loaded.settings;
    assert_eq!((a.server_address.as_str(), a.server_port), ("127.0.0.1", 8081));
    assert_eq!(a.socket_path.as_deref(), Some(Path::new("/tmp/spire-agent/public/api.sock")));
    assert_eq!(a.bootstrap, Bootstrap::Path("./conf/agent/dummy_root_ca.crt".into()));
    assert_eq!(a.admin_socket_path, None);
    assert!(a.join_token.is_none());
    assert_eq!((a.x509_svid_cache_max_size, a.jwt_svid_cache_max_size), (1000, 1000));
    assert_eq!((a.sync_interval, a.rebootstrap_delay), (Duration::from_secs(5), Duration::from_secs(600)));
    assert_eq!(a.plugins.len(), 3);
}

#[test]
fn every_server_key_as_json() {
    let Loaded { settings: s, notices, .. } = server(include_str!("data/server.json")).unwrap();
    assert_eq!(s.admin_ids[0].as_str(), "spiffe://other.test/admin");
    assert_eq!(s.agent_ttl, Some(Duration::from_secs(7200)));
    assert_eq!(s.bind_address.to_string(), "[::1]:9081");
    assert_eq!((s.ca_key_type, s.jwt_key_type, s.wit_key_type), (KeyType::Rsa2048, KeyType::EcP384, KeyType::Rsa2048));
    assert_eq!(s.ca_subject.country, ["DE"]);
    assert_eq!(s.trust_domain.as_str(), "example.org");
    assert!(s.socket_path.is_absolute() && s.socket_path.ends_with("config/api.sock"), "{:?}", s.socket_path);
    assert!(s.audit_log_enabled && s.wit_svids_enabled && s.events.events_based_cache);
    assert_eq!(s.events.event_timeout, Duration::from_secs(1800));
    let prune = s.prune_agents.unwrap();
    assert_eq!(
        (prune.expired_for, prune.batch_size, prune.non_reattestable),
        (Duration::from_secs(720 * 3600), 1000, true)
    );
    assert_eq!((s.rate_limit.attestation, s.rate_limit.signing), (false, true));
    let endpoint = s.federation.bundle_endpoint.unwrap();
    assert_eq!(endpoint.address.to_string(), "0.0.0.0:8443");
    assert!(
        matches!(endpoint.profile, BundleEndpointProfile::Acme(BundleEndpointAcme { ref cache_dir, tos_accepted: true, .. }) if cache_dir == Path::new("/run/spire/data/bundle-acme"))
    );
    assert_eq!(s.federation.federates_with.len(), 2);
    assert_eq!((s.log.level, s.log.format), (LogLevel::Warn, LogFormat::Json));
    assert_eq!(
        (s.health.bind_address.as_str(), s.health.bind_port, s.health.live_path.as_str(), s.health.ready_path.as_str()),
        ("0.0.0.0", 8080, "/l", "/ready")
    );
    assert_eq!(s.telemetry.prometheus.as_ref().map(|p| p.port), Some(9988));
    assert_eq!(s.telemetry.dogstatsd, ["d:1"]);
    assert_eq!(s.telemetry.m3.len(), 2);
    assert!(s.telemetry.in_mem && s.telemetry.enabled());
    assert_eq!(s.telemetry.hostname_label, Some(false));
    let names: Vec<_> = s.plugins.iter().map(|p| (p.name.as_str(), p.enabled)).collect();
    assert_eq!(names, [("disk", true), ("sql", true), ("k8s_psat", true), ("join_token", false), ("own", true)]);
    assert_eq!(s.plugins[2].data, PluginData::File("psat.conf".into()));
    assert_eq!(
        (s.plugins[4].command.as_deref(), s.plugins[4].checksum.as_str()),
        (Some(Path::new("/bin/own")), "00ff")
    );
    let texts: Vec<String> = notices.iter().map(|n| format!("{n:?}")).collect();
    for part in [
        "Unknown configuration key server.experimental.something_new at 20:7 is ignored",
        "Experimental features have been enabled. Please see docs/compatibility.md",
        "experimental.sql_transaction_timeout is deprecated",
        "Using events based cache",
        "Developer feature flag \\\"wit-svid\\\" has been enabled",
    ] {
        assert!(texts.iter().any(|t| t.contains(part)), "{part}: {texts:#?}");
    }
}

#[test]
fn all_problems_at_once_with_their_places() {
    let error = server(
        r#"server {
    trust_domain = "Bad Domain"
    bind_prot = 1
    bind_port = 99999
    ca_ttl = "1d"
    ca_key_type = "dsa"
    admin_ids = ["x"]
    log_level = "loud"
    audit_log_enabled = "yes"
    ratelimit { sining = true }
}
telemetry { Prometheus { prot = 1 } }
plugins { KeyManager "disk" {} KeyManager "disk" {} }
"#,
    )
    .unwrap_err();
    let found = problems(&error);
    for want in [
        "unable to decode configuration at \"s.conf\": At 9:25: root.server.audit_log_enabled: expected true or false without quotes, found \"yes\" @9:25",
        "could not start logger: not a valid logrus Level: \"loud\" @8:5",
        "could not parse trust_domain \"Bad Domain\": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores @2:5",
        "data_dir must be configured @1:1",
        "plugin \"KeyManager\"/\"disk\" declared more than once @13:43",
        "could not resolve bind address \"0.0.0.0:99999\": address 99999: invalid port @4:5",
        "could not parse admin ID \"x\": scheme is missing or invalid @7:5",
        "could not parse default CA ttl \"1d\": time: unknown unit \"d\" in duration \"1d\" @5:5",
        "error parsing ca_key_type: key type \"dsa\" is unknown; must be one of [rsa-2048, rsa-4096, ec-p256, ec-p384] @6:5",
        "unknown configuration detected @3:5",
        "unknown configuration detected @10:17",
        "unknown configuration detected @12:26",
    ] {
        assert!(found.iter().any(|f| f == want), "{want}\n{found:#?}");
    }
    assert_eq!(found.len(), 12, "{found:#?}");
    let unknown = |section: &str, keys: &str| Notice::Unknown { section: section.into(), keys: keys.into() };
    for notice in [unknown("server", "bind_prot"), unknown("ratelimit", "sining"), unknown("Prometheus", "prot")] {
        assert!(error.notices.contains(&notice), "{notice:?}");
    }
    let hints: Vec<&str> = error.problems.iter().filter_map(|p| p.hint.as_deref()).collect();
    for hint in [
        "the key \"bind_prot\" is not known in section \"server\": did you mean \"bind_port\"?",
        "the key \"sining\" is not known in section \"ratelimit\": did you mean \"signing\"?",
        "the key \"prot\" is not known in section \"Prometheus\": did you mean \"port\"?",
    ] {
        assert!(hints.contains(&hint), "{hint}\n{hints:#?}");
    }
    assert_eq!(error.plugins.as_ref().map(Vec::len), Some(1));
    assert_eq!(error.trust_domain, None);
    let text = error.to_string();
    assert!(text.contains("\nalso: data_dir must be configured\n  at s.conf:1:1\n  hint: add data_dir"), "{text}");
}

/// SPIRE listens on all addresses then, and says nothing.
#[test]
fn a_bundle_endpoint_address_that_is_none_is_told() {
    let told = |address: &str| {
        let loaded = server(&format!(
            r#"server {{
                trust_domain = "example.org" bind_address = "::1" bind_port = 1 data_dir = "d"
                federation {{ bundle_endpoint {{ address = "{address}" port = 8443 profile "https_spiffe" {{}} }} }}
            }} plugins {{ DataStore "sql" {{ plugin_data {{}} }} KeyManager "memory" {{ plugin_data {{}} }} }}"#
        ))
        .unwrap();
        let endpoint = loaded.settings.federation.bundle_endpoint.unwrap();
        (endpoint.address.to_string(), loaded.notices)
    };
    let all = "[::]:8443".to_owned();
    let warning = "federation.bundle_endpoint.address \"localhost\" is not an IP address: the endpoint listens on all \
                   addresses of this machine";
    assert_eq!(told("localhost"), (all.clone(), vec![Notice::Warn(warning.into())]));
    assert_eq!(told(""), (all, vec![]));
    assert_eq!(told("127.0.0.1"), ("127.0.0.1:8443".into(), vec![]));
}

/// What the fetcher would refuse at every poll is refused here, and no password is shown.
#[test]
fn bundle_endpoint_urls_that_nobody_can_fetch() {
    let with = |url: &str| {
        server(&format!(
            r#"server {{
                trust_domain = "example.org" bind_address = "::1" bind_port = 1 data_dir = "d"
                federation {{ federates_with "a.test" {{
                    bundle_endpoint_url = "{url}" bundle_endpoint_profile "https_web" {{}}
                }} }}
            }} plugins {{ DataStore "sql" {{ plugin_data {{}} }} KeyManager "memory" {{ plugin_data {{}} }} }}"#
        ))
    };
    for good in
        ["https://a.test", "HTTPS://a.test:8443/x@y?user=u@h#at@all", "https://[::1]/bundle", "https://a.test#x y"]
    {
        let settings = with(good).unwrap().settings;
        assert_eq!(settings.federation.federates_with.values().next().unwrap().bundle_endpoint_url, good);
    }
    for (bad, cause) in [
        ("", "must be configured"),
        ("http://a.test", "must use the HTTPS protocol; URL found: \"http://a.test\""),
        ("https://", "is not a valid URL"),
        ("https:///bundle", "is not a valid URL"),
        ("https://:8443/bundle", "must specify the host"),
        ("https://u@a.test", "must not contain user info"),
        ("https://u:secret@a.test/bundle", "must not contain user info"),
        ("https://u:secret@a.test/two words", "is not a valid URL"),
    ] {
        let told = problems(&with(bad).unwrap_err());
        let expected = format!("federation.federates_with[\"a.test\"].bundle_endpoint_url {cause}");
        assert!(told.len() == 1 && told[0].contains(&expected) && !told[0].contains("secret"), "{bad}: {told:?}");
    }
}

#[test]
fn keys_that_moved_are_told_where_they_went() {
    let error = server("server { default_svid_ttl = \"1h\"\n registration_uds_path = \"/x\" zzz = 1 }").unwrap_err();
    let text = error.to_string();
    for hint in [
        "\"default_svid_ttl\" is not known in section \"server\": it became default_x509_svid_ttl and default_jwt_svid_ttl",
        "\"registration_uds_path\" is not known in section \"server\": it is called socket_path now",
        "\"zzz\" is not known in section \"server\": remove or correct it",
    ] {
        assert!(text.contains(hint), "{hint}: {text}");
    }
    let loaded = server(
        "server { trust_domain = \"a\" data_dir = \"d\" experimental { wit_isuer = \"x\" } } plugins { KeyManager \"x\" { enabledd = true } }",
    );
    let texts = format!("{:?}", loaded.unwrap().notices);
    for part in [
        "server.experimental.wit_isuer at 1:",
        " is ignored (did you mean \\\"wit_issuer\\\"?)",
        "(did you mean \\\"enabled\\\"?)",
    ] {
        assert!(texts.contains(part), "{part}: {texts}");
    }
}

#[test]
fn what_must_be_configured() {
    assert_eq!(
        problems(&server("").unwrap_err()),
        ["trust_domain must be configured @", "data_dir must be configured @", "plugins section must be configured @"]
    );
    assert_eq!(
        problems(&agent("agent {}").unwrap_err()),
        [
            "plugins section must be configured @",
            "server_address must be configured @1:1",
            "server_port must be configured @1:1",
            "trust_domain must be configured @1:1",
            "trust_bundle_path, trust_bundle_url, or trust_bundle_spiffe_workload_api must be configured unless insecure_bootstrap is set @1:1",
        ]
    );
}

/// Lines beside the ones that must be there, and the one problem that there is with them.
const AGENT_RULES: &[(&str, &str)] = &[
    (
        "insecure_bootstrap = true\n trust_bundle_path = \"x\"",
        "only one of insecure_bootstrap or trust_bundle_path can be specified, not both",
    ),
    (
        "insecure_bootstrap = true\n trust_bundle_url = \"x\"",
        "only one of insecure_bootstrap or trust_bundle_url can be specified, not both",
    ),
    (
        "trust_bundle_path = \"y\"\n trust_bundle_url = \"x\"",
        "only one of trust_bundle_url or trust_bundle_path can be specified, not both",
    ),
    (
        "insecure_bootstrap = true\n trust_bundle_path = \"x\"\n trust_bundle_url = \"y\"",
        "only one of insecure_bootstrap, trust_bundle_url, or trust_bundle_path can be specified, not the three options",
    ),
    ("trust_bundle_url = \"http://x\"", "trust bundle URL must start with https://"),
    (
        "trust_bundle_unix_socket = \"/s\"\n trust_bundle_url = \"https://x\"",
        "trust bundle URL must start with http:// when used with trust bundle unix socket",
    ),
    (
        "trust_bundle_unix_socket = \"/s\"\n trust_bundle_url = \"http://x?a=1&spiffe-x=1\"",
        "trust_bundle_url query params can not start with spiffe-",
    ),
    (
        "trust_bundle_unix_socket = \"/s\"\n insecure_bootstrap = true",
        "if trust_bundle_unix_socket is specified, so must be trust_bundle_url",
    ),
    (
        "trust_bundle_spiffe_workload_api = \"unix:x\"",
        "trust_bundle_spiffe_workload_api is not a valid SPIFFE Workload API endpoint address: workload endpoint unix socket URI must not be opaque",
    ),
    (
        "trust_bundle_spiffe_workload_api = \"tcp://a:1\"",
        "trust_bundle_spiffe_workload_api is not a valid SPIFFE Workload API endpoint address: workload endpoint tcp socket URI host component must be an IP:port",
    ),
    (
        "insecure_bootstrap = true\n trust_bundle_format = \"x\"",
        "invalid value for trust_bundle_format, expected \"pem\" or \"spiffe\"",
    ),
    (
        "insecure_bootstrap = true\n rebootstrap_mode = \"auto\"",
        "insecure_bootstrap option can not be used with rebootstrapping",
    ),
    ("insecure_bootstrap = true\n rebootstrap_mode = \"x\"", "unknown rebootstrap mode specified: x"),
    (
        "insecure_bootstrap = true\n join_token = \"a\"\n join_token_file = \"b\"",
        "only one of join_token or join_token_file can be specified, not both",
    ),
    (
        "insecure_bootstrap = true\n join_token_file = \"/none/here\"",
        "unable to read join token file \"/none/here\": open /none/here: no such file or directory",
    ),
    (
        "insecure_bootstrap = true\n admin_socket_path = \"/tmp/spire-agent/public/x/admin.sock\"",
        "admin socket cannot be in the same directory or a subdirectory as that containing the Workload API socket",
    ),
    ("insecure_bootstrap = true\n availability_target = \"1h\"", "availability_target must be at least 24h0m0s"),
    ("insecure_bootstrap = true\n x509_svid_cache_max_size = -1", "x509_svid_cache_max_size should not be negative"),
    (
        "insecure_bootstrap = true\n workload_x509_svid_key_type = \"rsa-4096\"",
        "key type \"rsa-4096\" is unknown; must be one of [rsa-2048, ec-p256, ec-p384]",
    ),
    (
        "insecure_bootstrap = true\n authorized_delegates = [\"spiffe://other/x\"]",
        "error validating authorized delegate: SPIFFE ID \"spiffe://other/x\" is not a member of trust domain \"example.org\"",
    ),
    (
        "insecure_bootstrap = true\n experimental { jwt_svid_cache_hit_timeout = \"30s\" }",
        "jwt_svid_cache_hit_timeout (30s) must be less than 30s",
    ),
    (
        "insecure_bootstrap = true\n experimental { sync_interval = \"x\" }",
        "could not parse synchronization interval: time: invalid duration \"x\"",
    ),
    (
        "insecure_bootstrap = true\n experimental { ratelimit { fetch_x509_svid = -1 } }",
        "experimental.ratelimit.fetch_x509_svid must not be negative",
    ),
    (
        "insecure_bootstrap = true\n experimental { feature_flags = [\"b\", \"a\"] }",
        "error loading feature flags: unknown feature flag(s): [a b]",
    ),
    (
        "insecure_bootstrap = true\n experimental { broker { } }",
        "experimental.broker requires socket_path, bind_address, or both",
    ),
    (
        "insecure_bootstrap = true\n experimental { broker { bind_address = \"127.0.0.1:1\" brokers = [{ id = \"spiffe://x/y\" }] } }",
        "experimental.broker.brokers[spiffe://x/y].allowed_reference_types: must list at least one reference type URL",
    ),
    (
        "insecure_bootstrap = true\n experimental { named_pipe_name = \"x\" }",
        "invalid configuration: named_pipe_name is not supported in this platform; please use socket_path instead",
    ),
];

const AGENT_BASE: &str = "trust_domain = \"example.org\"\n server_address = \"x\"\n server_port = 1\n";

#[test]
fn agent_rules() {
    for (lines, want) in AGENT_RULES {
        let error = agent(&format!("agent {{\n {AGENT_BASE} {lines}\n}}\nplugins {{}}")).map(|_| ()).expect_err(lines);
        assert_eq!(error.problems.iter().map(|p| p.message.as_str()).collect::<Vec<_>>(), [*want], "{lines}");
        assert!(error.problems[0].pos.is_some());
    }
}

#[test]
fn a_join_token_comes_from_a_file() {
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), " abc\n").unwrap();
    let text = format!(
        "agent {{ {AGENT_BASE} insecure_bootstrap = true\n join_token_file = \"{}\"\n disable_workload_api = true\n disable_sds_api = true }}\nplugins {{}}",
        token.path().display()
    );
    let settings = agent(&text).unwrap().settings;
    assert_eq!(settings.join_token.unwrap().expose(), "abc");
    assert_eq!(settings.socket_path, None);
    std::fs::write(token.path(), " \n").unwrap();
    assert_eq!(agent(&text).unwrap_err().problems[0].message, "join token file is empty");
}

#[test]
fn waiting_for_an_entry_is_off_and_has_bounds() {
    let with = |keys: &str| {
        let base = "trust_domain = \"td\"\n server_address = \"h\"\n server_port = 1\n insecure_bootstrap = true";
        agent(&format!("agent {{\n {base}\n experimental {{\n {keys}\n }}\n}}\nplugins {{}}"))
    };
    assert_eq!(with("").unwrap().settings.wait_for_entry, None);
    assert_eq!(with("wait_for_entry = \"0s\"").unwrap().settings.wait_for_entry, None);
    let wait = with("wait_for_entry = \"30s\"").unwrap().settings.wait_for_entry;
    assert_eq!(wait, Some(WaitForEntry { longest: Duration::from_secs(30), waiters_max: 1000 }));
    let few = with("wait_for_entry = \"10m\"\n wait_for_entry_max_waiters = 7").unwrap().settings.wait_for_entry;
    assert_eq!(few.map(|wait| wait.waiters_max), Some(7));
    for (keys, problem) in [
        ("wait_for_entry = \"10m1s\"", "wait_for_entry must be at most 10m0s @7:2"),
        ("wait_for_entry = \"soon\"", "could not parse wait_for_entry: time: invalid duration \"soon\" @7:2"),
        ("wait_for_entry_max_waiters = -1", "wait_for_entry_max_waiters must be between 1 and 16384 @7:2"),
    ] {
        assert_eq!(problems(&with(keys).unwrap_err()), [problem]);
    }
    let idle = with("wait_for_entry_max_waiters = 5").unwrap();
    assert!(idle.notices.iter().any(|n| format!("{n:?}").contains("has no effect without wait_for_entry")));
}

#[test]
fn flags_win_over_the_file_and_are_not_blamed_on_it() {
    let text = include_str!("data/server.conf");
    let flags = ServerOverrides {
        bind_port: 1234,
        trust_domain: "other.test".into(),
        data_dir: "/d".into(),
        ..ServerOverrides::default()
    };
    let settings = parse_server(Path::new("s"), text, &flags).unwrap().settings;
    assert_eq!((settings.bind_address.port(), settings.trust_domain.as_str()), (1234, "other.test"));
    assert_eq!(settings.data_dir, Path::new("/d"));
    let flags = ServerOverrides { trust_domain: "A".into(), ..flags };
    let error = parse_server(Path::new("s"), text, &flags).unwrap_err();
    assert_eq!(error.problems[0].pos, None);
    let flags = AgentOverrides { server_port: 99, insecure_bootstrap: true, ..AgentOverrides::default() };
    let error = parse_agent(Path::new("a"), include_str!("data/agent.conf"), &flags).unwrap_err();
    assert_eq!(
        error.problems[0].message,
        "only one of insecure_bootstrap or trust_bundle_path can be specified, not both"
    );
}

#[test]
fn files_that_cannot_be_read() {
    let env = |name: &str| (name == "TD").then(|| "from.env".to_owned());
    let load = |path: &Path| load_server(path, true, &env, &ServerOverrides::default());
    let error = load(Path::new("/none/s.conf")).unwrap_err();
    assert_eq!(error.to_string(), "could not find config file /none/s.conf: please use the -config flag");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.conf");
    assert!(load(dir.path()).unwrap_err().to_string().contains("is a directory"));
    std::fs::write(&path, "server {").unwrap();
    let shown = path.display();
    let want = format!(
        "unable to decode configuration at \"{shown}\": At 1:9: object expected closing RBRACE got: EOF\n  at {shown}:1:9"
    );
    assert_eq!(load(&path).unwrap_err().to_string(), want);
    std::fs::write(&path, b"server { \xff }").unwrap();
    assert!(load(&path).unwrap_err().to_string().contains("illegal UTF-8 encoding"));
    std::fs::write(&path, "server { trust_domain = \"$TD\"\n data_dir = \"${TD}/x\" }\nplugins {}").unwrap();
    let settings = load(&path).unwrap().settings;
    assert_eq!((settings.trust_domain.as_str(), settings.data_dir.to_str()), ("from.env", Some("from.env/x")));
}

#[test]
fn plugin_rules() {
    let with = |plugins: &str| {
        server(&format!("server {{ trust_domain = \"a\"\n data_dir = \"d\" }}\nplugins {{ {plugins} }}"))
    };
    let error = with("KeyManager \"x\" { plugin_data {}\n plugin_data_file = \"f\" }").unwrap_err();
    assert_eq!(
        error.problems[0].message,
        "failed to create plugin config for \"KeyManager\"/\"x\": only one of [plugin_data, plugin_data_file] can be used"
    );
    let settings =
        with("NodeAttestor { a { plugin_data { x = 1 } }\n b {} }\n NodeAttestor \"c\" plugin_data { y = 2 }")
            .unwrap()
            .settings;
    let names: Vec<_> = settings.plugins.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert!(settings.plugins[2].load_data().unwrap().find(&["y"]).is_some());
}

proptest! {
    #[test]
    fn damaged_files_never_panic(at in 0_usize..900, cut in 0_usize..20, put in "[ -~\n]{0,6}") {
        for text in [include_str!("data/server.conf"), include_str!("data/server.json"), include_str!("data/agent.conf")] {
            let at = at.min(text.len());
            let end = (at + cut).min(text.len());
            let damaged = format!("{}{put}{}", &text[..at], &text[end..]);
            // Names are not resolved here: a damaged address could ask the network.
            let damaged = damaged.replace("bind_address", "bind_addresss");
            let _ = server(&damaged);
            let _ = agent(&damaged);
        }
    }
}

/// Not part of the suite: reads the server and agent files named in `FINIAL_CONFIG_FILES` (separated by `:`).
#[test]
fn reads_the_files_it_is_pointed_at() {
    for path in std::env::var("FINIAL_CONFIG_FILES").unwrap_or_default().split(':').filter(|p| !p.is_empty()) {
        let text = std::fs::read_to_string(path).unwrap();
        let result = if text.lines().any(|l| l.trim_start().starts_with("agent {")) {
            agent(&text).map(|l| l.notices).map_err(|e| e.to_string())
        } else {
            server(&text).map(|l| l.notices).map_err(|e| e.to_string())
        };
        println!("{path}: {result:#?}");
    }
}

/// Keys of ours, which SPIRE ignores.
#[test]
fn what_an_agent_keeps_for_an_outage() {
    use finial_config::{HOST_KEY_DEFAULT, OfflineCache};
    let with = |experimental: &str| {
        agent(&format!(
            r#"agent {{ trust_domain = "example.org" server_address = "s" server_port = 1 insecure_bootstrap = true
                experimental {{ {experimental} }} }}
            plugins {{ KeyManager "disk" {{}} NodeAttestor "join_token" {{}} WorkloadAttestor "unix" {{}} }}"#
        ))
    };
    let usual = with("").unwrap().settings;
    assert_eq!((usual.offline_cache, usual.handover), (OfflineCache::Auto, true));
    assert_eq!(usual.offline_cache_host_key_path, Path::new(HOST_KEY_DEFAULT));
    for (text, expected) in [
        ("auto", OfflineCache::Auto),
        ("host_key", OfflineCache::HostKey),
        ("keyring", OfflineCache::Keyring),
        ("off", OfflineCache::Off),
    ] {
        let text = format!("offline_cache = \"{text}\" offline_cache_host_key_path = \"/key\" handover = false");
        let settings = with(&text).unwrap().settings;
        assert_eq!((settings.offline_cache, settings.handover), (expected, false));
        assert_eq!(settings.offline_cache_host_key_path, Path::new("/key"));
    }
    let told = problems(&with("offline_cache = \"tpm\"").unwrap_err());
    assert!(told.len() == 1 && told[0].contains("experimental.offline_cache \"tpm\" is unknown"), "{told:?}");
}
