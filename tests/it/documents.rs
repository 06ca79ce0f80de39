//! SVIDs on disk, as openssl reads them.

use std::process::Command;
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir};

#[test]
fn openssl_verifies_and_reads_an_x509_svid() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let id = server.entry("/workload", &["-dns", "a.example.org", "-dns", "b.example.org"]);
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    let out = Workdir::new();
    let dir = out.path().to_str().expect("a path");
    agent.command(&["api", "fetch", "x509", "-write", dir]).ok();
    let openssl = |args: &[&str]| Output::of(Command::new("openssl").args(args).current_dir(dir)).ok().stdout;
    assert_eq!(openssl(&["verify", "-x509_strict", "-CAfile", "bundle.0.pem", "svid.0.pem"]), "svid.0.pem: OK\n");

    let text = openssl(&["x509", "-in", "svid.0.pem", "-noout", "-text"]);
    for want in [
        format!("URI:{id}"),
        "DNS:a.example.org".into(),
        "DNS:b.example.org".into(),
        "X509v3 Key Usage: critical".into(),
        "Digital Signature, Key Encipherment, Key Agreement".into(),
        "TLS Web Server Authentication, TLS Web Client Authentication".into(),
        "X509v3 Basic Constraints: critical".into(),
        "CA:FALSE".into(),
        "X509v3 Subject Key Identifier".into(),
        "X509v3 Authority Key Identifier".into(),
        "ecdsa-with-SHA256".into(),
    ] {
        assert!(text.contains(&want), "{want} is missing in:\n{text}");
    }
    let text = openssl(&["x509", "-in", "bundle.0.pem", "-noout", "-text"]);
    for want in ["CA:TRUE", "Certificate Sign, CRL Sign", "URI:spiffe://example.org\n"] {
        assert!(text.contains(want), "{want} is missing in:\n{text}");
    }
    // The key belongs to the certificate.
    let of_key = openssl(&["pkey", "-in", "svid.0.key", "-pubout"]);
    assert_eq!(openssl(&["x509", "-in", "svid.0.pem", "-noout", "-pubkey"]), of_key);
}
