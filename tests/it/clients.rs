//! SPIFFE libraries that nobody here wrote, on Finial's Workload API.

use testkit::{Agent, AgentOptions, Client, Flavor, Server, ServerOptions};

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
