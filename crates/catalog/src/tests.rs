use super::*;
use finial_core::{SystemClock, TrustDomain};
use std::path::PathBuf;

fn plugin(kind: &str, name: &str, data: &str) -> PluginConfig {
    PluginConfig::inline(kind, name, finial_hcl::parse(data).expect("is HCL"))
}

fn context() -> PluginContext {
    PluginContext { trust_domain: TrustDomain::parse("example.org").expect("a name"), clock: Arc::new(SystemClock) }
}

fn server() -> Vec<PluginConfig> {
    vec![plugin("DataStore", "sql", ""), plugin("KeyManager", "memory", ""), plugin("NodeAttestor", "join_token", "")]
}

fn agent() -> Vec<PluginConfig> {
    vec![
        plugin("KeyManager", "memory", ""),
        plugin("NodeAttestor", "join_token", ""),
        plugin("WorkloadAttestor", "unix", ""),
    ]
}

fn run<T>(work: impl AsyncFnOnce(Spawner) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let supervisor = finial_runtime::Supervisor::default();
    runtime.block_on(work(supervisor.spawner()))
}

fn server_plugins(configs: &[PluginConfig]) -> Result<ServerPlugins, CatalogError> {
    run(async |spawner| build_server_plugins(configs, &context(), &spawner).await)
}

fn agent_plugins(configs: &[PluginConfig], token: Option<Secret<String>>) -> Result<AgentPlugins, CatalogError> {
    run(async |spawner| build_agent_plugins(configs, token, &context(), &spawner).await)
}

fn refusal(configs: &[PluginConfig]) -> String {
    server_plugins(configs).err().expect("is refused").to_string()
}

#[test]
fn the_smallest_configurations_work() {
    let built = server_plugins(&server()).expect("builds");
    assert!(built.join_token && built.node_attestors.is_empty());
    let folder = tempfile::tempdir().expect("a folder");
    let mut with_disk = agent();
    with_disk[0] = plugin("KeyManager", "disk", &format!("directory = \"{}\"", folder.path().display()));
    let built = agent_plugins(&with_disk, None).expect("builds");
    assert!(!built.keys_are_volatile && built.node_attestor.0 == "join_token");
    assert_eq!(built.workload_attestors[0].name(), "unix");
    let token = Some(Secret::new("t".to_owned()));
    assert!(agent_plugins(&agent(), token).expect("builds").keys_are_volatile);
}

#[test]
fn plugins_of_which_there_may_be_several_keep_their_order() {
    let file = |name: &str| plugin("BundlePublisher", "file", &format!("pem = \"{name}\""));
    let more = vec![file("a"), plugin("CredentialComposer", "uniqueid", ""), file("b")];
    let built = server_plugins(&[server(), more].concat()).expect("builds");
    assert_eq!(built.credential_composers[0].name(), "uniqueid");
    assert_eq!((built.bundle_publishers.len(), built.notifiers.len()), (2, 0));
    let bad = plugin("BundlePublisher", "file", "path = \"a\"");
    let text = refusal(&[server(), vec![bad]].concat());
    assert!(text.starts_with("failed to configure plugin \"file\": one of spiffe, jwks and pem is"), "{text}");
}

#[test]
fn what_does_not_exist_is_refused_in_the_words_of_spire() {
    let with = |extra: PluginConfig| [server(), vec![extra]].concat();
    let text = refusal(&with(plugin("NodeAttestor", "aws_iid", "")));
    assert!(text.starts_with("no built-in plugin \"aws_iid\" for type \"NodeAttestor\""), "{text}");
    assert!(text.contains("join_token, x509pop;"), "{text}");
    let text = refusal(&with(plugin("NodeAttestor", "join-token", "")));
    assert!(text.contains("did you mean \"join_token\"?"), "{text}");
    assert!(refusal(&with(plugin("UpstreamAuthority", "other", ""))).starts_with("no built-in plugin \"other\""));
    for (name, missing) in [("vault", "token_auth"), ("cert-manager", "namespace"), ("ejbca", "hostname is required")] {
        assert!(refusal(&with(plugin("UpstreamAuthority", name, ""))).contains(missing), "{name}");
    }
    let map = refusal(&with(plugin("BundlePublisher", "k8s_configmap", "clusters = { \"one\" = {} }")));
    assert!(map.contains("missing bundle format in cluster \"one\""), "{map}");
    assert!(refusal(&with(plugin("UpstreamAuthority", "disk", ""))).contains("'cert_file_path' and 'key_file_path'"));
    assert_eq!(refusal(&with(plugin("Nope", "x", ""))), "unsupported plugin type \"Nope\"");
    let expected = "plugin type \"KeyManager\" constraint not satisfied: expected exactly 1 but got 2";
    assert_eq!(refusal(&with(plugin("KeyManager", "memory", ""))), expected);
    let disabled = PluginConfig { enabled: false, ..plugin("KeyManager", "nope", "") };
    server_plugins(&with(disabled)).expect("a disabled plugin is not looked at");
    let external = PluginConfig { command: Some(PathBuf::from("/bin/x")), ..plugin("NodeAttestor", "join_token", "") };
    assert!(refusal(&with(external)).contains("cannot be overridden by an external plugin"));
    let external = |kind: &str| PluginConfig { command: Some(PathBuf::from("/bin/x")), ..plugin(kind, "x", "") };
    for kind in ["UpstreamAuthority", "Notifier", "BundlePublisher", "CredentialComposer"] {
        let text = refusal(&with(external(kind)));
        let expected = "failed to load plugin \"x\": failed to launch plugin: /bin/x: no such file";
        assert!(text.starts_with(expected), "{text}");
    }
    let text = refusal(&with(plugin("Notifier", "k8sbundles", "")));
    assert!(text.contains("(did you mean \"k8sbundle\"? there is gcs_bundle, k8sbundle;"), "{text}");
    server_plugins(&with(plugin("Notifier", "k8sbundle", ""))).expect("nothing is missing");
    let with_keys = [external("KeyManager"), agent().remove(1), agent().remove(2)];
    let error = agent_plugins(&with_keys, None).err().expect("no").to_string();
    assert!(error.starts_with("failed to load plugin \"x\": failed to launch plugin"), "{error}");
    assert!(refusal(&with(plugin("DataStore", "other", ""))).contains("only the built-in \"sql\" plugin"));
    assert!(refusal(&server()[1..]).contains("\"DataStore\" constraint not satisfied: expected exactly 1 but got 0"));
    let disk = [plugin("DataStore", "sql", ""), plugin("KeyManager", "disk", "")];
    assert_eq!(refusal(&disk), "failed to configure plugin \"disk\": keys_path is required");
    let missing = PluginConfig {
        data: finial_config::PluginData::File(PathBuf::from("/nonexistent")),
        ..plugin("KeyManager", "disk", "")
    };
    assert!(refusal(&[plugin("DataStore", "sql", ""), missing]).contains("/nonexistent"));
    let text = agent_plugins(&agent()[..2], None).err().expect("is refused").to_string();
    assert!(text.contains("\"WorkloadAttestor\" constraint not satisfied: expected at least 1 but got 0"), "{text}");
}

#[test]
fn a_check_finds_all_that_building_would_refuse_and_makes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("keys");
    let disk = plugin("KeyManager", "disk", &format!("directory = \"{}\"", keys.display()));
    let good = [vec![disk.clone()], agent()[1..].to_vec()].concat();
    assert!(check_agent_plugins(&good, &context()).is_empty());
    assert!(!keys.exists());
    let bad = [disk.clone(), disk, plugin("NodeAttestor", "x509pop", ""), plugin("WorkloadAttestor", "windows", "")];
    let found = check_agent_plugins(&bad, &context());
    let texts: Vec<String> = found.iter().map(|(_, error)| error.to_string()).collect();
    assert_eq!(texts[0], "failed to configure plugin \"x509pop\": private_key_path is required");
    assert!(texts[1].starts_with("no built-in plugin \"windows\" for type \"WorkloadAttestor\""), "{texts:?}");
    assert!(texts[2].contains("\"KeyManager\" constraint not satisfied: expected exactly 1 but got 2"), "{texts:?}");
    assert_eq!(found[1].0.map(|c| c.name.as_str()), Some("windows"));
    assert!(found[2].0.is_none() && found.len() == 3);
    assert!(agent_plugins(&bad, None).is_err());
}
