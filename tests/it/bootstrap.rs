//! How an agent knows its server at first, without a file: SPIRE's agent and ours, with the same helpers.

use crate::answers_trust::{endpoint, web_certificate};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, Workdir, eventually};

fn server() -> Server {
    let server = Server::start(Finial, &ServerOptions::default());
    server.entry("/workload", &[]);
    server
}

fn serving(flavor: Flavor, server: &Server, bootstrap: String) -> Agent {
    Agent::serving(flavor, server, &AgentOptions { bootstrap: Some(bootstrap), ..Default::default() })
}

/// Answers each request on a socket with the next of `answers`, the last one again and again, and tells what was asked.
fn helper(socket: &Path, answers: Vec<String>) -> mpsc::Receiver<String> {
    let listener = UnixListener::bind(socket).expect("a socket");
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut answers = answers.into_iter().peekable();
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read_exact(&mut byte).is_err() {
                    break;
                }
                request.extend(byte);
            }
            let request = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned();
            let answer = answers.next_if(|_| true).unwrap_or_default();
            if answers.peek().is_none() {
                answers = vec![answer.clone()].into_iter().peekable();
            }
            let _ = stream.write_all(answer.as_bytes());
            if tell.send(request).is_err() {
                return;
            }
        }
    });
    told
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// The request without what differs by nature.
fn plain(request: &str, port: u16) -> String {
    let mut parts: Vec<String> = request.split('&').map(str::to_owned).collect();
    for part in &mut parts {
        if part.starts_with("spire-attest-start-time=") {
            assert!(part.contains('T') && part.contains("%3A"), "{request}");
            *part = "spire-attest-start-time={time}".to_owned();
        }
    }
    parts.join("&").replace(&port.to_string(), "{port}")
}

#[test]
fn a_helper_on_a_unix_socket() {
    let server = server();
    let pem = server.command(&["bundle", "show"]).ok().stdout;
    let spiffe = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    for (format, body) in [("pem", &pem), ("spiffe", &spiffe)] {
        let asked = [Spire, Finial].map(|flavor| {
            let folder = Workdir::new();
            let socket = folder.path().join("helper.sock");
            let told = helper(&socket, vec![ok(body)]);
            let bootstrap = format!(
                "trust_bundle_url = \"http://helper/bundle?z=1&a=b\"\n trust_bundle_unix_socket = \"{}\"\n trust_bundle_format = \"{format}\"",
                socket.display()
            );
            let _agent = serving(flavor, &server, bootstrap);
            plain(&told.recv().expect("a request"), server.port)
        });
        assert_eq!(asked[0], asked[1]);
        assert!(asked[0].contains("spire-attest-mode=bootstrap") && asked[0].contains("z=1"), "{}", asked[0]);
    }
}

/// A helper that has nothing yet is asked again, and told how often it was asked.
#[test]
fn a_helper_that_has_no_bundle_yet() {
    let server = server();
    let pem = server.command(&["bundle", "show"]).ok().stdout;
    let asked = [Spire, Finial].map(|flavor| {
        let folder = Workdir::new();
        let socket = folder.path().join("helper.sock");
        let none = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned();
        let told = helper(&socket, vec![none, ok(&pem)]);
        let bootstrap = format!(
            "trust_bundle_url = \"http://helper/bundle\"\n trust_bundle_unix_socket = \"{}\"",
            socket.display()
        );
        let agent = serving(flavor, &server, bootstrap);
        assert!(
            agent.process.log().contains("error downloading trust bundle: 404 Not Found"),
            "{}",
            agent.process.log()
        );
        [told.recv().expect("a request"), told.recv().expect("another")].map(|request| plain(&request, server.port))
    });
    assert_eq!(asked[0], asked[1]);
    assert!(asked[0][1].contains("spire-connection-attempts=2"), "{:?}", asked[0]);
}

#[test]
fn an_endpoint_of_the_web() {
    let files = Workdir::new();
    let (key, certificate, root) = web_certificate(files.path());
    let profile = format!(
        "profile \"https_web\" {{ serving_cert_file {{ cert_file_path = \"{}\" key_file_path = \"{}\" }} }}",
        certificate.display(),
        key.display()
    );
    let (server, port) = endpoint(Finial, "web.org", &profile);
    server.entry("/workload", &[]);
    let bootstrap = format!("trust_bundle_url = \"https://localhost:{port}/\"\n trust_bundle_format = \"spiffe\"");
    for flavor in [Spire, Finial] {
        let options = AgentOptions { bootstrap: Some(bootstrap.clone()), ..Default::default() };
        let stranger = Agent::start(flavor, &server, &options);
        eventually("the endpoint is not trusted", || {
            let log = stranger.process.log();
            let said = log.contains(&format!("unable to fetch trust bundle URL https://localhost:{port}/: "));
            if said { Ok(()) } else { Err(log) }
        });
        drop(stranger);
        let options = AgentOptions { web_roots: Some(root.clone()), ..options };
        Agent::serving(flavor, &server, &options);
    }
}

#[test]
fn another_workload_api() {
    let server = server();
    let first = Agent::serving(Finial, &server, &AgentOptions::default());
    for flavor in [Spire, Finial] {
        for form in ["unix://", "unix:"] {
            serving(
                flavor,
                &server,
                format!("trust_bundle_spiffe_workload_api = \"{form}{}\"", first.socket().display()),
            );
        }
    }
}
