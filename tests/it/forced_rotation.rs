//! Authorities replaced by hand, because a key is no longer good: everything moves off them, and nobody attests again.

use finial_core::{KeyType, TrustDomain};
use finial_crypto::hex;
use finial_crypto::{CaTemplate, Certificate, DistinguishedName, PrivateKey, SerialNumber, X509Ca, pem};
use std::path::Path;
use std::sync::Arc;
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};

pub(crate) fn serials(server: &Server) -> Vec<String> {
    let listed = server.command(&["agent", "list"]).ok().stdout;
    let mut serials: Vec<_> =
        listed.lines().filter_map(|line| line.strip_prefix("Serial number")).map(str::to_owned).collect();
    serials.sort();
    serials
}

/// Key IDs of those who signed the workload's SVID and what stands above it, as the agent hands them out.
fn signers(agent: &Agent) -> Result<Vec<String>, String> {
    let dir = Workdir::new();
    let path = dir.path().display().to_string();
    let fetched = agent.command(&["api", "fetch", "x509", "-write", &path]);
    if fetched.code != 0 {
        return Err(fetched.stderr);
    }
    let written = std::fs::read(dir.path().join("svid.0.pem")).map_err(|e| e.to_string())?;
    let chain = pem::certificates(&written).map_err(|e| e.to_string())?;
    let signer = |der: &Arc<[u8]>| {
        let certificate = Certificate::parse(der.clone()).expect("a certificate");
        certificate.authority_key_id().map(hex).unwrap_or_default()
    };
    Ok(chain.iter().map(signer).collect())
}

fn wait_signed_by(agent: &Agent, authority: &str) {
    eventually("the workload's SVID moves off", || {
        let signers = signers(agent)?;
        if signers.iter().any(|id| id == authority) { Ok(()) } else { Err(format!("{signers:?}, not {authority}")) }
    });
}

fn wait_renewed(server: &Server, before: &[String]) {
    eventually("the agents' own SVIDs move off", || {
        let now = serials(server);
        let all = now.len() == before.len() && now.iter().all(|serial| !before.contains(serial));
        if all { Ok(()) } else { Err(format!("{now:?} after {before:?}")) }
    });
}

/// A new entry comes through: agent and server understand each other by what the bundle has now.
fn wait_for_entry(server: &Server, agents: &[Agent], path: &str) {
    let id = server.entry(path, &[]);
    for agent in agents {
        eventually("a new entry comes through", || {
            let out = agent.command(&["api", "fetch", "x509"]);
            if out.stdout.contains(&id) {
                Ok(())
            } else {
                Err(format!("{}{}\n{}", out.stdout, out.stderr, agent.process.log()))
            }
        });
        agent.assert_attested_once();
    }
}

fn by_hand(server: Flavor) {
    let server = Server::start(server, &ServerOptions::default());
    server.entry("/workload", &[]);
    let agents =
        [Flavor::Finial, Flavor::Spire].map(|flavor| Agent::serving(flavor, &server, &AgentOptions::default()));
    let (first, before) = (server.authority("x509", "active"), serials(&server));
    agents.iter().for_each(|agent| wait_signed_by(agent, &first));
    server.order("x509", "prepare");
    let second = server.authority("x509", "prepared");
    server.order("x509", "activate");
    server.order("x509", "taint");
    agents.iter().for_each(|agent| wait_signed_by(agent, &second));
    wait_renewed(&server, &before);
    server.order("x509", "revoke");
    let bundle = server.command(&["bundle", "show"]).ok().stdout;
    assert_eq!(bundle.matches("BEGIN CERTIFICATE").count(), 1, "{bundle}");
    wait_for_entry(&server, &agents, "/after");
}

#[test]
fn an_authority_is_replaced_by_hand_and_agents_of_both_kinds_move_off() {
    by_hand(Flavor::Finial);
}

/// The control: what is expected holds for SPIRE's server, too.
#[test]
fn under_spire_agents_of_both_kinds_move_off_as_well() {
    by_hand(Flavor::Spire);
}

/// Writes a root where the `disk` plugin finds it, and returns its key ID.
pub(crate) fn root(folder: &Path, name: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let key = PrivateKey::generate(KeyType::EcP256).expect("a key");
    let template = CaTemplate {
        subject: &DistinguishedName::of(&["US"], &[name], ""),
        trust_domain: &TrustDomain::parse("upstream.test").expect("a name"),
        not_before: 1_700_000_000,
        not_after: 2_500_000_000,
        serial: SerialNumber::random(),
    };
    let ca = runtime.block_on(X509Ca::self_sign(Arc::new(key.clone()), &template)).expect("a root");
    std::fs::write(folder.join("root.key"), pem::encode_private_key(key.pkcs8_der().expose()).expose())
        .expect("written");
    std::fs::write(folder.join("root.pem"), pem::encode("CERTIFICATE", ca.certificate())).expect("written");
    hex(&ca.subject_key_id())
}

/// In SPIRE a taint reaches only the server that was told; here the other one, and its agents, move off as well.
#[test]
fn an_upstream_authority_that_one_server_is_told_to_taint_is_left_by_the_other_too() {
    let Some(database) = testkit::postgres() else { return };
    let dir = Workdir::new();
    let first = root(dir.path(), "FIRST");
    let at = dir.path().display();
    let options = ServerOptions {
        datastore: Some(testkit::datastore(&database, database.port())),
        plugins: format!(
            r#"UpstreamAuthority "disk" {{ plugin_data {{ cert_file_path = "{at}/root.pem" key_file_path = "{at}/root.key" }} }}"#
        ),
        ..Default::default()
    };
    let [told, other] = [(); 2].map(|()| Server::start(Flavor::Finial, &options));
    other.entry("/workload", &[]);
    let agents = [Flavor::Finial, Flavor::Spire].map(|flavor| Agent::serving(flavor, &other, &AgentOptions::default()));
    agents.iter().for_each(|agent| wait_signed_by(agent, &first));
    let before = serials(&other);
    let second = root(dir.path(), "SECOND");
    told.order("x509", "prepare");
    told.order("x509", "activate");
    told.command(&["upstreamauthority", "taint", "-subjectKeyID", &first]).ok();
    eventually("the other server has another authority", || {
        let upstream = other.of_authority("x509", "active", "upstream_authority_subject_key_id");
        if upstream == second { Ok(()) } else { Err(format!("{upstream}\n{}", other.process.log())) }
    });
    agents.iter().for_each(|agent| wait_signed_by(agent, &second));
    wait_renewed(&other, &before);
    told.command(&["upstreamauthority", "revoke", "-subjectKeyID", &first]).ok();
    eventually("the root is gone at the other", || {
        let bundle = other.command(&["bundle", "show"]).ok().stdout;
        if bundle.matches("BEGIN CERTIFICATE").count() == 1 { Ok(()) } else { Err(bundle) }
    });
    wait_for_entry(&other, &agents, "/after");
}
