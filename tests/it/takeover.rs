//! Finial in SPIRE's place on SPIRE's own data, and back; the agent's commands and node attestation across the two.

use std::process::Command;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Client, Flavor, Output, Server, ServerOptions, Workdir};

/// A server and an agent change hands twice, `first` to `second` and back. Nobody joins again, nothing is lost, and SVIDs
/// go on under the same authorities.
fn changes_hands(first: Flavor, second: Flavor) {
    let mut server = Server::start(first, &ServerOptions::default());
    let id = server.entry("/workload", &["-dns", "a.example.org", "-hint", "h", "-jwtSVIDIncludeJTI"]);
    let mut agent = Agent::serving(first, &server, &AgentOptions::default());
    let shown = |server: &Server, what: &[&str]| server.command_by(Spire, what).ok().stdout;
    let entries = shown(&server, &["entry", "show", "-output", "json"]);
    let bundle = shown(&server, &["bundle", "show", "-format", "spiffe"]);
    for flavor in [second, first] {
        assert_eq!(agent.process.terminate(), 0, "{}", agent.process.log());
        assert_eq!(server.process.terminate(), 0, "{}", server.process.log());
        server.restart_as(flavor);
        agent.restart_as(flavor);
        agent.wait_serving();
        assert_eq!(shown(&server, &["entry", "show", "-output", "json"]), entries, "{flavor:?}");
        assert_eq!(
            shown(&server, &["bundle", "show", "-format", "spiffe"]),
            bundle,
            "{flavor:?}: the same authorities"
        );
        assert!(shown(&server, &["agent", "count"]).contains("1 attested agent"), "{flavor:?}: nobody joined again");
        let checked = Client("go").events(&agent, &["check", "audience"]);
        assert_eq!(checked[0]["id"], id.as_str(), "{flavor:?}: {checked:?}");
    }
}

#[test]
fn finial_takes_spires_place_and_gives_it_back() {
    changes_hands(Spire, Finial);
}

#[test]
fn spire_takes_finials_place_and_gives_it_back() {
    changes_hands(Finial, Spire);
}

/// The configuration's mistake costs nothing: neither the bundle nor the keys are touched.
#[test]
fn the_data_of_another_trust_domain_is_refused_and_left_alone() {
    let mut server = Server::start(Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    let file = server.dir.path().join("server.conf");
    let right = std::fs::read_to_string(&file).expect("the configuration");
    let bundle = server.command(&["bundle", "show"]).ok().stdout;
    for flavor in [Spire, Finial] {
        assert_eq!(server.process.terminate(), 0);
        std::fs::write(&file, right.replace("example.org", "other.org")).expect("a file");
        let out = server.run_on_same_data(flavor);
        assert_eq!(out.code, 1, "{flavor:?}: {out:?}");
        let said = format!("{}{}", out.stdout, out.stderr);
        for part in [
            "a registration entry with trust domain 'example.org' has been detected, which does not match the configured trust \
             domain of 'other.org'",
            "please delete all existing registration entries",
        ] {
            assert!(said.contains(part), "{flavor:?}: {said}");
        }
        std::fs::write(&file, &right).expect("a file");
        server.restart();
        assert_eq!(server.command(&["bundle", "show"]).ok().stdout, bundle, "{flavor:?}");
        assert!(!server.process.log().contains("unusable"), "{}", server.process.log());
    }
}

/// The agent's commands: the same words, the same output and exit code, at either agent. (Those of the server are compared
/// in `crates/cli/tests/real_server.rs`.)
#[test]
fn the_agents_commands_say_the_same_at_both_agents() {
    const WORDS: &[&[&str]] = &[
        &["healthcheck"],
        &["healthcheck", "-verbose"],
        &["api", "fetch"],
        &["api", "fetch", "x509"],
        &["api", "fetch", "x509", "-silent"],
        &["api", "fetch", "x509", "-write", "/nonexistent/dir"],
        &["api", "fetch", "jwt"],
        &["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "spiffe://example.org/other"],
        &["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "no id"],
        &["api", "validate", "jwt"],
        &["api", "validate", "jwt", "-audience", "a"],
        &["api", "validate", "jwt", "-audience", "a", "-svid", "garbage"],
        &["api", "validate", "jwt", "-audience", "a", "-svid", "e30.e30.e30"],
        &["api", "fetch", "x509", "-nonsense"],
    ];
    let mut differences = Vec::new();
    for flavor in [Finial, Spire] {
        let server = Server::start(flavor, &ServerOptions::default());
        server.entry("/workload", &["-hint", "h"]);
        let agent = Agent::serving(flavor, &server, &AgentOptions::default());
        for words in WORDS {
            let [ours, theirs] = [Finial, Spire].map(|by| plain(&agent.command_by(by, words)));
            if ours != theirs {
                differences.push(format!("{words:?} at {flavor:?}'s agent:\nSPIRE: {theirs:?}\nFinial: {ours:?}\n"));
            }
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

/// An output without what differs by chance (how long it took) and by intent (our hints).
fn plain(output: &Output) -> (i32, String, String) {
    let lines = |text: &str| {
        let lines = text.lines().filter(|l| !l.starts_with("hint: "));
        lines.map(|l| l.split(" after ").next().unwrap_or(l).to_owned() + "\n").collect()
    };
    (output.code, lines(&output.stdout), lines(&output.stderr))
}

/// Agents that prove themselves with a certificate, under the other's server.
#[test]
fn x509pop_agents_join_the_others_server() {
    for (agent, server) in [(Finial, Spire), (Spire, Finial)] {
        let pki = Workdir::new();
        let openssl = |args: &str| {
            Output::of(Command::new("openssl").args(args.split(' ')).current_dir(pki.path())).ok();
        };
        openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 1 -subj /CN=ca",
        );
        openssl("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout node.key -out node.csr -subj /CN=node");
        pki.write("ext", "keyUsage=critical,digitalSignature\n");
        openssl("x509 -req -in node.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile ext -out node.pem");
        let path = |name: &str| pki.path().join(name).display().to_string();
        let plugins =
            format!("NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{}\" }} }}", path("ca.pem"));
        let server = Server::start(server, &ServerOptions { plugins, ..Default::default() });
        // Found by what the attestor says of the node, so the selectors are proven as well.
        let node = format!("spiffe://{}/node", server.trust_domain);
        server.command(&["entry", "create", "-node", "-spiffeID", &node, "-selector", "x509pop:subject:cn:node"]).ok();
        let id = server.entry("/workload", &[]);
        let node_attestor = format!(
            "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{}\" certificate_path = \"{}\" }} }}",
            path("node.key"),
            path("node.pem")
        );
        let options = AgentOptions { node_attestor, join: false, ..Default::default() };
        let mut agent = Agent::serving(agent, &server, &options);
        assert_eq!(Client("go").events(&agent, &["check", "audience"])[0]["id"], id.as_str());
        // It can attest again: with its data lost, it comes back as the same agent.
        agent.process.kill();
        std::fs::remove_dir_all(agent.dir.path().join("data")).expect("its data");
        agent.restart();
        agent.wait_serving();
        assert!(server.command(&["agent", "count"]).ok().stdout.contains("1 attested agent"));
    }
}
