//! External plugins, built on SPIRE's plugin SDK (tests/plugins), under Finial and under the real SPIRE: the same
//! configuration, the same outcome, the same lines in the log.

use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};

/// The plugin of every kind, if it was built.
pub(crate) fn plugin() -> Option<PathBuf> {
    let cache = std::env::var_os("FINIAL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/finial"));
    let plugin = cache.join("plugins/plugin");
    if plugin.exists() {
        return Some(plugin);
    }
    let promised = ["CI", "FINIAL_REAL_SPIRE"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(!promised, "{} is not there; tests/plugins/build.sh builds it", plugin.display());
    eprintln!("SKIPPED: {} is not there; tests/plugins/build.sh builds it", plugin.display());
    None
}

/// Other runs have marks of their own.
pub(crate) fn own(mark: &str) -> String {
    format!("{mark}-{}", std::process::id())
}

/// A plugin's block. `mark` is an argument by which its process is found.
pub(crate) fn block(plugin: &Path, kind: &str, name: &str, arg: &str, mark: &str, data: &str) -> String {
    let (plugin, mark) = (plugin.display(), own(mark));
    format!(
        "{kind} \"{name}\" {{ plugin_cmd = \"{plugin}\"\n plugin_args = [\"{arg}\", \"{mark}\"]\n plugin_data {{ {data} }} }}\n"
    )
}

/// The processes that run with this argument.
pub(crate) fn pids(mark: &str) -> Vec<i32> {
    let mark = own(mark);
    let all = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    let marked = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).any(|arg| arg == mark.as_bytes())
    };
    all.filter(marked).collect()
}

pub(crate) fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

pub(crate) fn gone(mark: &str) {
    eventually("the plugins ended", || if pids(mark).is_empty() { Ok(()) } else { Err(format!("{:?}", pids(mark))) });
}

/// A line of the log that says `what`, without what differs from run to run.
fn line(log: &str, what: &str) -> String {
    let line = log.lines().find(|l| l.contains(what)).unwrap_or_else(|| panic!("no {what:?} in\n{log}"));
    let kept = |word: &&str| !word.starts_with("time=") && !word.starts_with("timestamp=");
    line.split(' ').filter(kept).collect::<Vec<_>>().join(" ")
}

/// An agent whose workloads are known by a plugin, and one that stores SVIDs in another. Gives what the log says of it.
fn agent_with_plugins(flavor: Flavor, plugin: &Path) -> Vec<String> {
    let mark = format!("mark-agent-{flavor:?}");
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let store = Workdir::new();
    let options = AgentOptions {
        node_attestor: [
            "NodeAttestor \"join_token\" { plugin_data {} }\n".to_owned(),
            block(
                plugin,
                "WorkloadAttestor",
                "greeter",
                "workloadattestor",
                &mark,
                "greeting = \"hello\"\n labels { a = \"b c\" }",
            ),
            block(
                plugin,
                "SVIDStore",
                "files",
                "svidstore",
                &mark,
                &format!("folder = \"{}\"", store.path().display()),
            ),
        ]
        .concat(),
        ..AgentOptions::default()
    };
    let id = server.entry("/greeted", &["-selector", "greeter:greeting:hello", "-selector", "greeter:label:a:b c"]);
    server.entry("/stored", &["-selector", "files:name:db", "-storeSVID"]);
    let mut agent = Agent::serving(flavor, &server, &options);
    let fetched = agent.command(&["api", "fetch", "x509"]).ok().stdout;
    assert!(fetched.contains(&id) && !fetched.contains("/stored"), "{fetched}");

    let file = store.path().join("db");
    let kept = eventually("the SVID is stored", || fs::read_to_string(&file).map_err(|e| e.to_string()));
    assert!(kept.contains("\"spiffeID\":\"spiffe://example.org/stored\""), "{kept}");
    let shown = server.command(&["entry", "show", "-spiffeID", "spiffe://example.org/stored"]).ok().stdout;
    let entry =
        shown.lines().find_map(|l| l.strip_prefix("Entry ID")).unwrap().trim_start_matches([' ', ':']).to_owned();
    server.command(&["entry", "delete", "-entryID", &entry]).ok();
    eventually("it is deleted", || if file.exists() { Err("still there".to_owned()) } else { Ok(()) });

    assert_eq!(pids(&mark).len(), 2);
    agent.process.terminate();
    gone(&mark);
    let log = agent.process.log();
    ["msg=Ready answer=42", "msg=\"Plugin loaded\" external=true plugin_name=greeter"]
        .map(|what| line(&log, what))
        .to_vec()
}

#[test]
fn plugins_of_an_agent_work_under_finial_as_under_spire() {
    let Some(plugin) = plugin() else { return };
    let ours = agent_with_plugins(Flavor::Finial, &plugin);
    assert_eq!(ours, agent_with_plugins(Flavor::Spire, &plugin));
}

/// Everything that can be external is.
fn all_external(flavor: Flavor, plugin: &Path) {
    let mark = format!("mark-all-{flavor:?}");
    let server = ServerOptions {
        key_manager: leak(block(plugin, "KeyManager", "keys", "server-keymanager", &mark, "")),
        plugins: [
            block(plugin, "NodeAttestor", "turner", "server-nodeattestor", &mark, ""),
            block(plugin, "UpstreamAuthority", "above", "upstreamauthority", &mark, ""),
        ]
        .concat(),
        ..ServerOptions::default()
    };
    let mut server = Server::start(flavor, &server);
    let options = AgentOptions {
        key_manager: leak(block(plugin, "KeyManager", "keys", "agent-keymanager", &mark, "")),
        node_attestor: [
            block(plugin, "NodeAttestor", "turner", "agent-nodeattestor", &mark, "greeting = \"bob\""),
            block(plugin, "WorkloadAttestor", "greeter", "workloadattestor", &mark, "greeting = \"hello\""),
        ]
        .concat(),
        join: false,
        ..AgentOptions::default()
    };
    let parent = "spiffe://example.org/spire/agent/turner/bob";
    let id = server.entry("/greeted", &["-parentID", parent, "-selector", "greeter:greeting:hello"]);
    let mut agent = Agent::serving(flavor, &server, &options);
    assert!(agent.command(&["api", "fetch", "x509"]).ok().stdout.contains(&id));
    assert!(
        agent.command(&["api", "fetch", "jwt", "-audience", "x"]).ok().stdout.contains(&id),
        "the plugin signs JWTs"
    );
    let agents = server.command(&["agent", "list"]).ok().stdout;
    assert!(agents.contains(parent) && agents.contains("turner"), "{agents}");
    let attested = line(&server.process.log(), "msg=Attested");
    for field in ["known=NotFound", "roots=1", "server=\"spiffe://example.org/spire/server\"", "127.0.0.1"] {
        assert!(attested.contains(field), "{field}: {attested}");
    }
    assert_eq!(pids(&mark).len(), 6);
    agent.process.terminate();
    server.process.terminate();
    gone(&mark);
}

#[test]
fn all_of_a_trust_domain_is_external() {
    let Some(plugin) = plugin() else { return };
    all_external(Flavor::Finial, &plugin);
    all_external(Flavor::Spire, &plugin);
}

/// How often a plugin has made a key.
fn keys_made(log: &str) -> usize {
    log.lines().filter(|l| l.contains("msg=Generated")).count()
}

/// The serial number of the only agent's SVID, as the server knows it.
fn serial(server: &Server) -> String {
    let agents = server.command(&["agent", "list"]).ok().stdout;
    agents.lines().find(|l| l.starts_with("Serial number")).expect("an agent").to_owned()
}

/// An agent whose keys are an external plugin's attests, begins again with the same key, and renews.
fn keys_elsewhere(flavor: Flavor, plugin: &Path) {
    let (mark, keys) = (format!("mark-keys-{flavor:?}"), Workdir::new());
    let server = ServerOptions { server: "agent_ttl = \"20s\"".into(), ..ServerOptions::default() };
    let server = Server::start(Flavor::Finial, &server);
    let id = server.entry("/w", &[]);
    let die = keys.path().join("die");
    let data = format!("folder = \"{}\"\n die_file = \"{}\"", keys.path().display(), die.display());
    let options = AgentOptions {
        key_manager: leak(block(plugin, "KeyManager", "keys", "agent-keymanager", &mark, &data)),
        ..AgentOptions::default()
    };
    let mut agent = Agent::serving(flavor, &server, &options);
    let first = serial(&server);
    assert_eq!(keys_made(&agent.process.log()), 1);
    assert!(keys.path().join("agent-svid-A.1").exists() && !agent.dir.path().join("data/keys.json").exists());

    agent.process.terminate();
    gone(&mark);
    agent.restart();
    agent.wait_serving();
    assert_eq!(serial(&server), first, "no other SVID");
    let log = agent.process.log();
    assert!(log.contains("SVID loaded") && log.matches("Node attestation was successful").count() <= 1, "{log}");

    // Half of 20 s later.
    let renewed = eventually("the agent renews", || match serial(&server) {
        same if same == first => Err("the first one".to_owned()),
        other => Ok(other),
    });
    assert!(keys.path().join("agent-svid-B.1").exists());
    // SPIRE does not start a plugin again.
    if flavor == Flavor::Finial {
        let before = pids(&mark);
        std::fs::write(&die, "").unwrap();
        eventually("the plugin died", || if pids(&mark) == before { Err("it lives".to_owned()) } else { Ok(()) });
        let told = eventually("the agent says so", || {
            let log = agent.process.log();
            if log.contains("External plugin ended by itself") { Ok(log) } else { Err(log) }
        });
        assert!(agent.command(&["api", "fetch", "x509"]).ok().stdout.contains(&id), "workloads are served on: {told}");
        assert_eq!(agent.process.ended(), None);
        std::fs::remove_file(&die).unwrap();
        eventually("it renews again", || if serial(&server) == renewed { Err(renewed.clone()) } else { Ok(()) });
        let entry = server.entry("/later", &[]);
        eventually("it is told what is new", || {
            let out = agent.command(&["api", "fetch", "x509"]);
            if out.stdout.contains(&entry) { Ok(()) } else { Err(out.stdout) }
        });
    }
    let log = server.process.log();
    let attested = log.matches("Agent attestation request completed").count();
    assert_eq!(attested, 1, "it attested once: {log}");
    agent.process.terminate();
    gone(&mark);
}

#[test]
fn an_agents_keys_may_be_elsewhere() {
    let Some(plugin) = plugin() else { return };
    keys_elsewhere(Flavor::Finial, &plugin);
}

#[test]
fn keys_elsewhere_work_under_spire_the_same() {
    let Some(plugin) = plugin() else { return };
    keys_elsewhere(Flavor::Spire, &plugin);
}

#[test]
fn plugins_die_with_an_agent_that_is_killed() {
    let Some(plugin) = plugin() else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let mark = "mark-killed";
    let attestor = block(&plugin, "WorkloadAttestor", "greeter", "workloadattestor", mark, "greeting = \"hello\"");
    let options = AgentOptions {
        node_attestor: format!("NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n{attestor}"),
        ..AgentOptions::default()
    };
    server.entry("/w", &[]);
    let mut agent = Agent::serving(Flavor::Finial, &server, &options);
    assert_eq!(pids(mark).len(), 1);
    agent.process.signal(Signal::KILL);
    agent.process.wait();
    gone(mark);
}

#[test]
fn validate_and_run_refuse_a_plugin_of_another_checksum() {
    let Some(plugin) = plugin() else { return };
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let attestor = block(&plugin, "WorkloadAttestor", "greeter", "workloadattestor", "mark-checksum", "");
    let attestor = attestor.replace("plugin_args", &format!("plugin_checksum = \"{}\"\n plugin_args", "0".repeat(64)));
    let options = AgentOptions {
        node_attestor: format!("NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n{attestor}"),
        ..AgentOptions::default()
    };
    let mut agent = Agent::start(Flavor::Finial, &server, &options);
    assert_ne!(agent.process.wait(), 0);
    let log = agent.process.log();
    assert!(log.contains("failed to load plugin") && log.contains("checksums did not match"), "{log}");
    assert!(pids("mark-checksum").is_empty());

    // What the plugin itself refuses, it says when it is asked.
    let dir = Workdir::new();
    let plugins = [
        "KeyManager \"memory\" { plugin_data {} }\n NodeAttestor \"join_token\" { plugin_data {} }\n".to_owned(),
        block(&plugin, "WorkloadAttestor", "greeter", "workloadattestor", "mark-validate", "refuse = \"not today\""),
    ];
    let core = "data_dir = \"/nonexistent\"\n server_address = \"x\"\n server_port = 1\n insecure_bootstrap = true\n trust_domain = \"td\"";
    let file = dir.write("agent.conf", &format!("agent {{ {core} }}\nplugins {{ {} }}\n", plugins.concat()));
    let out = agent.run_by(Flavor::Finial, &["validate", "-config", &file.display().to_string()], &[]);
    assert!(out.code != 0 && out.stderr.contains("not today"), "{out:?}");
    assert!(pids("mark-validate").is_empty());
}

#[test]
fn the_disk_store_keeps_svids_in_files() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let folder = Workdir::new();
    let options = AgentOptions {
        node_attestor: format!(
            "NodeAttestor \"join_token\" {{ plugin_data {{}} }}\nSVIDStore \"disk\" {{ plugin_data {{ directory = \"{}\" }} }}",
            folder.path().join("svids").display()
        ),
        ..AgentOptions::default()
    };
    server.entry("/w", &[]);
    // Renewed about every 6 s.
    let id = server.entry("/stored", &["-selector", "disk:name:db", "-storeSVID", "-x509SVIDTTL", "12"]);
    let _agent = Agent::serving(Flavor::Finial, &server, &options);
    let db = folder.path().join("svids/db");
    let read = || fs::read(db.join("svid.pem")).map_err(|e| e.to_string());
    let first = eventually("it is stored", read);
    let leaf = finial_crypto::Certificate::parse(finial_crypto::pem::certificates(&first).unwrap()[0].clone()).unwrap();
    assert_eq!(leaf.spiffe_id().unwrap().as_str(), id);
    eventually("it is renewed", || if read()? == first { Err("not yet".to_owned()) } else { Ok(()) });
}
