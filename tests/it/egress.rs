//! A network that nothing leaves but through a proxy: federation by both profiles, and an agent to its server, ours and SPIRE's.

use std::path::PathBuf;
use testkit::fake::{ConnectProxy, Pki, connect_proxy};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, free_port};

fn environment(proxy: &ConnectProxy) -> Vec<(&'static str, PathBuf)> {
    let url = format!("http://me:hush@127.0.0.1:{}", proxy.port);
    vec![("HTTPS_PROXY", url.into()), ("NO_PROXY", "near.test, 10.0.0.0/8".into())]
}

/// A server whose bundle endpoint is to be found at this port.
fn endpoint(trust_domain: &str, profile: &str) -> (Server, u16) {
    let port = free_port();
    let options = ServerOptions {
        trust_domain: trust_domain.into(),
        server: format!(
            "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {port} profile {profile} }} }}"
        ),
        ..ServerOptions::default()
    };
    (Server::start(Flavor::Finial, &options), port)
}

#[test]
fn bundles_and_agents_pass_a_proxy() {
    let pki = Pki::new();
    pki.issue("web", "subjectAltName=DNS:web.test");
    let files = format!(
        "\"https_web\" {{ serving_cert_file {{ cert_file_path = \"{}\" key_file_path = \"{}\" }} }}",
        pki.path("web.crt"),
        pki.path("web.key")
    );
    let (by_web, web) = endpoint("web.example", &files);
    let (by_spiffe, spiffe) = endpoint("spiffe.example", "\"https_spiffe\" {}");
    for flavor in [Flavor::Finial, Flavor::Spire] {
        let proxy = connect_proxy(|_| None);
        let server = Server::start(
            flavor,
            &ServerOptions {
                server: format!(
                    "federation {{ federates_with \"web.example\" {{ bundle_endpoint_url = \"https://web.test:{web}/\" \
                     bundle_endpoint_profile \"https_web\" {{}} }} federates_with \"spiffe.example\" {{ \
                     bundle_endpoint_url = \"https://spiffe.test:{spiffe}/\" bundle_endpoint_profile \"https_spiffe\" {{ \
                     endpoint_spiffe_id = \"spiffe://spiffe.example/spire/server\" }} }} }}"
                ),
                web_roots: Some(pki.path("ca.crt").into()),
                environment: environment(&proxy),
                ..ServerOptions::default()
            },
        );
        let first = by_spiffe.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
        let file = server.dir.write("first.json", &first).display().to_string();
        server.command(&["bundle", "set", "-id", "spiffe://spiffe.example", "-format", "spiffe", "-path", &file]).ok();
        for id in ["spiffe://web.example", "spiffe://spiffe.example"] {
            server.command(&["federation", "refresh", "-id", id]).ok();
        }
        let taken = server.command(&["bundle", "list", "-id", "spiffe://web.example"]).ok().stdout;
        assert_eq!(taken, by_web.command(&["bundle", "show"]).ok().stdout, "{flavor:?}");
        let mut agent =
            AgentOptions { server_address: "server.test", environment: environment(&proxy), ..Default::default() };
        agent.agent = "insecure_bootstrap = true".into();
        agent.bootstrap = Some(String::new());
        server.entry("/work", &[]);
        let agent = Agent::serving(flavor, &server, &agent);
        let (heads, credentials) = (proxy.heads(), "Proxy-Authorization: Basic bWU6aHVzaA==\r\n");
        for target in
            [format!("web.test:{web}"), format!("spiffe.test:{spiffe}"), format!("server.test:{}", server.port)]
        {
            let asked = heads.iter().find(|head| head.starts_with(&format!("CONNECT {target} HTTP/1.1\r\n")));
            let asked = asked.unwrap_or_else(|| panic!("{flavor:?}: nobody asked for {target}: {heads:?}"));
            assert!(asked.contains(credentials), "{flavor:?}: {asked}");
        }
        if flavor == Flavor::Finial {
            assert!(!server.process.log().contains("hush") && !agent.process.log().contains("hush"));
        }
    }
}
