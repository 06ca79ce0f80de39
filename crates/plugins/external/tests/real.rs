//! The plugins of tests/plugins, which are built on SPIRE's plugin SDK, as any operator's are.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod shared;

use async_trait::async_trait;
use finial_config::PluginConfig;
use finial_core::{Bundle, ErrorKind, KeyType, Secret, SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::SignatureAlgorithm;
use finial_plugin::conformance::{self, NodeAttestorFixture, UpstreamAuthorityFixture};
use finial_plugin::{
    AttestVerdict, KeyManager, Peer, PluginError, Reference, ServerHost, ServerIdentity, StoredSvid, SvidStore,
    WorkloadAttestor,
};
use finial_plugins_external::{
    ExternalAgentNodeAttestor, ExternalKeyManager, ExternalServerNodeAttestor, ExternalSvidStore,
    ExternalUpstreamAuthority, ExternalWorkloadAttestor, Plugin, Service,
};
use finial_runtime::{Metrics, telemetry};
use rustix::fd::AsFd;
use shared::{Program, config, own, pids, real_plugin, until};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn workload_attestor(plugin: &Path, mark: &str, data: &str) -> PluginConfig {
    config("WorkloadAttestor", "greeter", plugin, &["workloadattestor", &own(mark)], data)
}

async fn attest(attestor: &ExternalWorkloadAttestor) -> Result<Vec<String>, PluginError> {
    let proc_dir = std::fs::File::open("/proc/self").unwrap();
    let peer = Peer { pid: i32::try_from(std::process::id()).unwrap(), proc_dir: proc_dir.as_fd() };
    let mut selectors: Vec<_> = attestor.attest(&peer).await?.iter().map(ToString::to_string).collect();
    selectors.sort();
    Ok(selectors)
}

#[tokio::test]
async fn a_workload_attestor_attests_is_configured_and_measures() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let metrics = Metrics::new(telemetry::Settings { prefix: "spire_agent".into(), ..Default::default() });
    program.around.host.metrics.set(metrics.clone()).ok().unwrap();
    let data = "greeting = \"hé \\\"llo\\\"\"\nlabels { a = \"1\" b = \"2\" }";
    let config = workload_attestor(&plugin, "mark-attests", data);
    let attestor = Plugin::launch(&config, Service::WorkloadAttestor, &program.around).await.unwrap();
    let attestor = ExternalWorkloadAttestor(attestor);
    let found = attest(&attestor).await.unwrap();
    assert_eq!(found[0][..13].to_owned(), "greeter:comm:");
    let rest = ["domain:example.org", "greeting:hé \"llo\"", "label:a:1", "label:b:2"];
    assert_eq!(found[1..], rest.map(|value| format!("greeter:{value}")));
    let broker = SpiffeId::parse("spiffe://example.org/broker").unwrap();
    let refer = |type_url| Reference { type_url, value: b"web", broker: &broker };
    assert!(attestor.attest_reference(&refer("type.googleapis.com/test.Other")).await.unwrap().is_none());
    let found = attestor.attest_reference(&refer("type.googleapis.com/test.Name")).await.unwrap().unwrap();
    let found: Vec<_> = found.iter().map(ToString::to_string).collect();
    assert_eq!(found, ["greeter:name:web", "greeter:broker:spiffe://example.org/broker"]);
    let rendered = metrics.render();
    assert!(rendered.contains("test_plugin_attested"), "{rendered}");
    assert_eq!(pids("mark-attests").len(), 1);
    program.end().await;
    assert!(pids("mark-attests").is_empty(), "it ended with us");
    assert_eq!(attest(&attestor).await.unwrap_err().kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn one_that_dies_or_is_killed_is_started_again_with_its_configuration() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let folder = tempfile::tempdir().unwrap();
    let die = folder.path().join("die");
    let data = format!("greeting = \"hello\"\ndie_file = \"{}\"", die.display());
    let config = workload_attestor(&plugin, "mark-dies", &data);
    let attestor = Plugin::launch(&config, Service::WorkloadAttestor, &program.around).await.unwrap();
    let attestor = ExternalWorkloadAttestor(attestor);
    attest(&attestor).await.unwrap();
    std::fs::write(&die, "").unwrap();
    let error = attest(&attestor).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    until("it is down", async || {
        let error = attest(&attestor).await.unwrap_err();
        error.message.contains("the plugin is down: exit status: 2 (its last words: \"panic: as told")
    })
    .await;
    std::fs::remove_file(&die).unwrap();
    until("it runs again", async || attest(&attestor).await.is_ok()).await;
    let first = pids("mark-dies");
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(first[0].parse().unwrap()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    until("it runs again", async || {
        attest(&attestor).await.is_ok_and(|s| s.contains(&"greeter:greeting:hello".to_owned()))
            && pids("mark-dies") != first
    })
    .await;
    program.end().await;
}

#[tokio::test]
async fn one_that_hangs_costs_its_caller_no_more_than_he_grants_and_ends_all_the_same() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let folder = tempfile::tempdir().unwrap();
    let hang = folder.path().join("hang");
    let config = workload_attestor(&plugin, "mark-hangs", &format!("hang_file = \"{}\"", hang.display()));
    let attestor = Plugin::launch(&config, Service::WorkloadAttestor, &program.around).await.unwrap();
    let attestor = ExternalWorkloadAttestor(attestor);
    std::fs::write(&hang, "").unwrap();
    let patience = Duration::from_millis(200);
    tokio::time::timeout(patience, attest(&attestor)).await.expect_err("it hangs");
    // Stopped, it answers nothing and does not end when it is asked to.
    let pid = rustix::process::Pid::from_raw(pids("mark-hangs")[0].parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    program.end().await;
    assert!(pids("mark-hangs").is_empty());
}

#[tokio::test]
async fn floods_wrong_kinds_and_refused_configurations() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let config = workload_attestor(&plugin, "mark-floods", "greeting = \"x\"\nflood = 20000");
    let attestor = Plugin::launch(&config, Service::WorkloadAttestor, &program.around).await.unwrap();
    attest(&ExternalWorkloadAttestor(attestor)).await.expect("works beside the flood");

    let refused = async |config: &PluginConfig, service| {
        Plugin::launch(config, service, &program.around).await.err().expect("is refused").to_string()
    };
    let wrong = workload_attestor(&plugin, "mark-floods", "refuse = \"not today\"");
    let error = refused(&wrong, Service::WorkloadAttestor).await;
    assert_eq!(error, "failed to configure plugin \"greeter\": not today");
    let store = config_of_kind(&plugin, "SVIDStore", "svidstore");
    let error = refused(&store, Service::WorkloadAttestor).await;
    assert!(
        error.starts_with(
            "failed to bind plugin \"p\": no supported plugin interface found in: [\"spire.plugin.agent.svidstore"
        ),
        "{error}"
    );
    // The cookie is the type: go-plugin's own text is its last word.
    let error = refused(&config_of_kind(&plugin, "KeyManager", "svidstore"), Service::SvidStore).await;
    assert!(error.contains("exit status: 1") && error.contains("plugin"), "{error}");

    let notes = finial_plugins_external::validate(&wrong, Service::WorkloadAttestor, &program.around.context).unwrap();
    assert_eq!(notes, ["not today"]);
    program.end().await;
}

fn config_of_kind(plugin: &Path, kind: &str, arg: &str) -> PluginConfig {
    config(kind, "p", plugin, &[arg, "mark-of-kind"], "")
}

async fn svid_store(program: &Program, plugin: &Path, folder: &Path) -> ExternalSvidStore {
    let data = format!("folder = \"{}\"", folder.display());
    let config = config("SVIDStore", "files", plugin, &["svidstore"], &data);
    ExternalSvidStore(Plugin::launch(&config, Service::SvidStore, &program.around).await.unwrap())
}

#[tokio::test]
async fn an_svid_store_gets_all_of_an_svid() {
    let Some(plugin) = real_plugin() else { return };
    let (program, folder) = (Program::default(), tempfile::tempdir().unwrap());
    let store = svid_store(&program, &plugin, folder.path()).await;
    let svid = StoredSvid {
        spiffe_id: SpiffeId::parse("spiffe://example.org/db").unwrap(),
        cert_chain: vec![Arc::from(*b"leaf"), Arc::from(*b"ca")],
        private_key: Secret::new(b"key".to_vec()),
        bundle: vec![Arc::from(*b"root")],
        federated_bundles: BTreeMap::from([("other.test".to_owned(), vec![Arc::from(*b"a"), Arc::from(*b"b")])]),
        expires_at: 77,
    };
    let metadata = ["name:db".to_owned()];
    store.put(&svid, &metadata).await.unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join("db")).unwrap()).unwrap();
    // Base64, as Go writes bytes.
    assert_eq!(kept["svid"]["spiffeID"], "spiffe://example.org/db");
    assert_eq!(kept["svid"]["cert_chain"], serde_json::json!(["bGVhZg==", "Y2E="]));
    assert_eq!((&kept["svid"]["private_key"], &kept["svid"]["expires_at"]), (&"a2V5".into(), &77.into()));
    assert_eq!(kept["federated_bundles"], serde_json::json!({"other.test": "YWI="}));
    store.delete(&metadata).await.unwrap();
    assert!(!folder.path().join("db").exists());
    assert_eq!(store.delete(&[]).await.unwrap_err().kind, ErrorKind::InvalidArgument);
    program.end().await;
}

async fn key_manager(program: &Program, plugin: &Path, service: Service) -> Arc<dyn KeyManager> {
    let arg = if service == Service::ServerKeyManager { "server-keymanager" } else { "agent-keymanager" };
    let launched = Plugin::launch(&config_of_kind(plugin, "KeyManager", arg), service, &program.around).await;
    Arc::new(ExternalKeyManager(launched.unwrap()))
}

#[tokio::test]
async fn key_managers_of_both_programs_conform() {
    let Some(plugin) = real_plugin() else { return };
    for service in [Service::ServerKeyManager, Service::AgentKeyManager] {
        let program = Program::default();
        conformance::keys_sign_and_are_found_by_name(key_manager(&program, &plugin, service).await).await;
        conformance::bad_key_requests_are_refused(key_manager(&program, &plugin, service).await).await;
        conformance::concurrent_generation_loses_no_key(key_manager(&program, &plugin, service).await).await;
        let manager = key_manager(&program, &plugin, service).await;
        let rsa = manager.generate_key("k", KeyType::Rsa2048).await.unwrap();
        for algorithm in [SignatureAlgorithm::RsaPssSha256, SignatureAlgorithm::RsaPkcs1Sha512] {
            let signature = rsa.sign(algorithm, b"m").await.unwrap();
            rsa.public_key().verify(algorithm, b"m", &signature).unwrap();
        }
        rsa.sign(SignatureAlgorithm::EcdsaP256Sha256, b"m").await.expect_err("not with that key");
        // A key stays with the plugin, which has one of a name: the signer of the one before must not sign with the other.
        manager.generate_key("k", KeyType::Rsa2048).await.unwrap();
        let error = rsa.sign(SignatureAlgorithm::RsaPkcs1Sha256, b"m").await.unwrap_err().to_string();
        assert!(error.contains("fingerprint") && error.contains("does not match"), "{error}");
        program.end().await;
    }
}

#[tokio::test]
async fn an_agents_keys_outlive_their_plugin() {
    let Some(plugin) = real_plugin() else { return };
    let (program, folder) = (Program::default(), tempfile::tempdir().unwrap());
    let die = folder.path().join("die");
    let data = format!("folder = \"{}\"\ndie_file = \"{}\"", folder.path().display(), die.display());
    let config = config("KeyManager", "keys", &plugin, &["agent-keymanager"], &data);
    let launched = Plugin::launch(&config, Service::AgentKeyManager, &program.around).await.unwrap();
    let manager = ExternalKeyManager(launched);
    let key = manager.generate_key("agent-svid-A", KeyType::EcP256).await.unwrap();
    std::fs::write(&die, "").unwrap();
    let error = key.sign(SignatureAlgorithm::EcdsaP256Sha256, b"m").await.unwrap_err();
    assert!(error.to_string().contains("the plugin hung up"), "{error}");
    std::fs::remove_file(&die).unwrap();
    until("it signs again", async || key.sign(SignatureAlgorithm::EcdsaP256Sha256, b"m").await.is_ok()).await;
    let again = manager.key("agent-svid-A").await.unwrap().unwrap();
    assert!(again.public_key() == key.public_key(), "the same key");
    program.end().await;
}

struct FakeServer;

#[async_trait]
impl ServerHost for FakeServer {
    async fn has_agent(&self, agent_id: &str) -> Result<bool, PluginError> {
        Ok(agent_id.ends_with("/bob"))
    }

    async fn identity(&self) -> Result<ServerIdentity, PluginError> {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let key = Arc::new(finial_crypto::PrivateKey::generate(KeyType::EcP256).unwrap());
        let template = finial_crypto::CaTemplate {
            subject: &finial_crypto::DistinguishedName::ca_default(),
            trust_domain: &trust_domain,
            not_before: 0,
            not_after: 2_000_000_000,
            serial: finial_crypto::SerialNumber::new(1),
        };
        let ca = finial_crypto::X509Ca::self_sign(key.clone(), &template).await.unwrap();
        Ok(ServerIdentity {
            cert_chain: vec![ca.certificate().clone()],
            private_key: Secret::new(key.pkcs8_der().expose().clone()),
            bundle: Bundle::empty(trust_domain),
        })
    }
}

async fn node_attestor(program: &Program, plugin: &Path) -> NodeAttestorFixture {
    let agent = async |greeting: &str| {
        let data = format!("greeting = \"{greeting}\"");
        let config = config("NodeAttestor", "turner", plugin, &["agent-nodeattestor"], &data);
        let launched = Plugin::launch(&config, Service::AgentNodeAttestor, &program.around).await.unwrap();
        Arc::new(ExternalAgentNodeAttestor(launched))
    };
    let config = config("NodeAttestor", "turner", plugin, &["server-nodeattestor"], "");
    let server = Plugin::launch(&config, Service::ServerNodeAttestor, &program.around).await.unwrap();
    NodeAttestorFixture {
        server: Arc::new(ExternalServerNodeAttestor(server)),
        agent: agent("bob").await,
        expected: AttestVerdict {
            agent_id: SpiffeId::parse("spiffe://example.org/spire/agent/turner/bob").unwrap(),
            selectors: vec![finial_core::Selector::new("turner", "name:bob").unwrap()],
            can_reattest: true,
        },
        impostors: Vec::new(),
        challenges: true,
    }
}

#[tokio::test]
async fn node_attestors_agent_against_server() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let fixture = node_attestor(&program, &plugin).await;
    let mut session = fixture.agent.begin().await.unwrap();
    assert_eq!(session.payload(), b"bob");
    assert_eq!(session.respond(b"abc").await.unwrap(), b"cba");
    // Before the server is up its plugins cannot ask it.
    let error = attempt(&fixture).await.unwrap_err();
    assert!(error.message.contains("IdentityProvider host service has not been initialized"), "{error}");
    program.around.host.server.set(Arc::new(FakeServer)).ok().unwrap();
    conformance::genuine_evidence_is_accepted(fixture).await;
    conformance::replayed_and_altered_answers_are_refused(node_attestor(&program, &plugin).await).await;
    program.end().await;
}

async fn attempt(fixture: &NodeAttestorFixture) -> Result<AttestVerdict, PluginError> {
    struct Turn;
    #[async_trait]
    impl finial_plugin::Challenger for Turn {
        async fn challenge(&mut self, mut challenge: Vec<u8>) -> Result<Vec<u8>, PluginError> {
            challenge.reverse();
            Ok(challenge)
        }
    }
    fixture.server.attest(b"bob", &mut Turn).await
}

#[tokio::test]
async fn an_upstream_authority_conforms_and_tells_of_its_roots() {
    let Some(plugin) = real_plugin() else { return };
    let program = Program::default();
    let make = async || {
        let config = config_of_kind(&plugin, "UpstreamAuthority", "upstreamauthority");
        let launched = Plugin::launch(&config, Service::UpstreamAuthority, &program.around).await.unwrap();
        let upstream = Arc::new(ExternalUpstreamAuthority::new(launched));
        let now: UnixSeconds = program.around.context.clock.now();
        UpstreamAuthorityFixture { upstream, trust_domain: program.around.context.trust_domain.clone(), now }
    };
    conformance::mints_authorities(make().await).await;
    conformance::bad_csrs_are_refused(make().await).await;

    let upstream = make().await.upstream;
    let silent = tokio::time::timeout(Duration::from_millis(50), upstream.next_authorities()).await;
    assert!(silent.is_err(), "nothing was signed yet");
    let key = finial_crypto::PrivateKey::generate(KeyType::EcP256).unwrap();
    let subject = finial_crypto::DistinguishedName::ca_default();
    let csr = finial_crypto::create_ca_csr(&key, &subject, &program.around.context.trust_domain).await.unwrap();
    for _ in 0..2 {
        let minted = upstream.mint_x509_ca(&csr, 600).await.unwrap();
        let told = tokio::time::timeout(Duration::from_secs(30), upstream.next_authorities()).await.unwrap().unwrap();
        assert_eq!(told.x509[0].der, minted.roots[0]);
    }
    let jwt =
        finial_core::JwtAuthority { key_id: "k".into(), public_key: Arc::from(*b"x"), expires_at: 0, tainted: false };
    let error = upstream.publish_jwt_key(&jwt).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unimplemented, "{error}");
    program.end().await;
}
