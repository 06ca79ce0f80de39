//! SPIFFE libraries that nobody here wrote, on Finial's Workload API.

use std::process::Command;
use testkit::{Agent, AgentOptions, Client, Flavor, Output, Server, ServerOptions};

fn trust_domain(entry: &[&str]) -> (Server, String, Agent) {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let id = server.entry("/workload", entry);
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    (server, id, agent)
}

#[test]
fn every_client_fetches_and_verifies() {
    let (_server, id, agent) = trust_domain(&[]);
    for client in Client::ALL {
        let events = client.events(&agent, &["check", "some-audience"]);
        assert_eq!(events.len(), 2, "{client:?}: {events:?}");
        assert_eq!((&events[0]["event"], &events[0]["id"]), (&"x509".into(), &id.as_str().into()), "{client:?}");
        assert_eq!((&events[1]["event"], &events[1]["id"]), (&"jwt".into(), &id.as_str().into()), "{client:?}");
    }
}

#[test]
fn every_client_calls_and_serves_mutual_tls() {
    let (_server, id, agent) = trust_domain(&[]);
    let go = Client("go").serve(&agent, &id);
    for client in Client::ALL {
        let answered = client.events(&agent, &["call", &go.addr, &id]);
        assert_eq!(answered[0]["peer"], id.as_str(), "{client:?} calls go");
        let serving = client.serve(&agent, &id);
        let answered = Client("go").events(&agent, &["call", &serving.addr, &id]);
        assert_eq!(answered[0]["peer"], id.as_str(), "go calls {client:?}");
        // A server that is not who was expected is refused by each, and a caller that is not is refused by each.
        let other = "spiffe://example.org/other";
        assert_ne!(client.run(&agent, &["call", &go.addr, other]).code, 0, "{client:?} took a wrong server");
        let strict = client.serve(&agent, other);
        assert_ne!(Client("go").run(&agent, &["call", &strict.addr, &id]).code, 0, "{client:?} took a wrong caller");
    }
}

#[test]
fn every_client_sees_rotations() {
    let (_server, id, agent) = trust_domain(&["-x509SVIDTTL", "12"]);
    let seen: Vec<_> = std::thread::scope(|scope| {
        let watching: Vec<_> =
            Client::ALL.iter().map(|c| (c, scope.spawn(|| c.events(&agent, &["watch", "3"])))).collect();
        watching.into_iter().map(|(c, handle)| (c, handle.join().expect("a watcher"))).collect()
    });
    for (client, events) in seen {
        assert_eq!(events.len(), 3, "{client:?}");
        assert!(events.iter().all(|e| e["id"] == id.as_str()), "{client:?}: {events:?}");
    }
}

/// X.509, JWT and the workload's own keys of every type that can be configured.
#[test]
fn every_client_verifies_keys_of_every_type() {
    for (kind, shown, workload) in [
        ("rsa-2048", "(2048 bit)", "rsa-2048"),
        ("rsa-4096", "(4096 bit)", "rsa-2048"),
        ("ec-p256", "(256 bit)", "ec-p256"),
        ("ec-p384", "(384 bit)", "ec-p256"),
    ] {
        let keys = format!("ca_key_type = \"{kind}\" jwt_key_type = \"{kind}\"");
        let server = Server::start(Flavor::Finial, &ServerOptions { server: keys, ..ServerOptions::default() });
        let id = server.entry("/workload", &[]);
        let keys = format!("workload_x509_svid_key_type = \"{workload}\"");
        let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions { agent: keys, ..AgentOptions::default() });
        let mut openssl = Command::new("openssl");
        openssl.args(["x509", "-noout", "-text", "-in"]).arg(server.bundle_file());
        let root = Output::of(&mut openssl).ok().stdout;
        assert!(root.contains(&format!("Public-Key: {shown}")), "{kind}: {root}");
        for client in Client::ALL {
            let events = client.events(&agent, &["check", "some-audience"]);
            assert!(
                events.len() == 2 && events.iter().all(|e| e["id"] == id.as_str()),
                "{kind} {client:?}: {events:?}"
            );
        }
    }
}
