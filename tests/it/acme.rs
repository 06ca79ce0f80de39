//! Certificates of the web from a real ACME authority, pebble: for the bundle endpoint and for the OIDC discovery provider.

use finial_crypto::{Certificate, pem};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::envoy::Answer;
use testkit::oidc::{Provider, curl};
use testkit::pebble::Pebble;
use testkit::{Flavor, Output, Process, Server, ServerOptions, Workdir, eventually};

const DOMAIN: &str = "fed.example.test";
/// Long enough that nothing is renewed.
const DAYS: u32 = 90 * 86_400;

/// A server whose bundle endpoint is `domain`, where pebble looks for it.
fn options(pebble: &Pebble, domain: &str, tos: bool) -> ServerOptions {
    let acme = format!(
        "acme {{ directory_url = \"{}\" domain_name = \"{domain}\" email = \"ops@example.test\" tos_accepted = {tos} }}",
        pebble.directory()
    );
    ServerOptions {
        server: format!(
            "federation {{ bundle_endpoint {{ address = \"127.0.0.1\" port = {} profile \"https_web\" {{ {acme} }} }} }}",
            pebble.tls_port
        ),
        web_roots: Some(pebble.web_root()),
        ..ServerOptions::default()
    }
}

/// The document at `/` of `domain` at `address`, if the certificate is good by that root.
fn get(domain: &str, address: &str, port: u16, root: &Path, path: &str) -> Answer {
    let resolve = format!("{domain}:{port}:{address}");
    let root = root.display().to_string();
    curl(&["--cacert", &root, "--resolve", &resolve, &format!("https://{domain}:{port}{path}")])
}

fn bundle(pebble: &Pebble, root: &Path) -> Result<String, String> {
    let answer = get(DOMAIN, "127.0.0.1", pebble.tls_port, root, "/");
    if answer.status == 200 && answer.body.contains("x509-svid") { Ok(answer.body) } else { Err(format!("{answer:?}")) }
}

/// The certificate that is presented to who asks for that name and protocol; nothing is verified.
fn presented(address: &str, port: u16, name: Option<&str>, alpn: Option<&str>) -> Option<Certificate> {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-showcerts", "-connect", &format!("{address}:{port}")]);
    match name {
        Some(name) => command.args(["-servername", name]),
        None => command.arg("-noservername"),
    };
    if let Some(alpn) = alpn {
        command.args(["-alpn", alpn]);
    }
    let text = Output::of(&mut command).stdout;
    let block = pem::blocks(text.as_bytes()).expect("PEM").into_iter().next()?;
    Some(Certificate::parse(block.der.expose().as_slice()).expect("a certificate"))
}

fn serial(pebble: &Pebble) -> Option<String> {
    presented("127.0.0.1", pebble.tls_port, Some(DOMAIN), None).map(|c| c.serial_decimal())
}

/// The serial number when the endpoint has a certificate.
fn first_serial(pebble: &Pebble, log: &dyn Fn() -> String) -> String {
    eventually("there is a certificate", || serial(pebble).ok_or_else(log))
}

#[test]
fn the_bundle_endpoint_gets_its_certificate_and_keeps_it() {
    let Some(mut pebble) = Pebble::start(DAYS) else { return };
    let mut server = Server::start(Flavor::Finial, &options(&pebble, DOMAIN, true));
    let root = pebble.root();
    eventually("the bundle is served", || bundle(&pebble, &root).map_err(|e| e + &server.process.log()));
    let first = serial(&pebble).expect("a certificate");
    // Nobody else's name, and no challenge that was not asked for.
    let at = |name, alpn| presented("127.0.0.1", pebble.tls_port, name, alpn).map(|c| c.serial_decimal());
    assert_eq!(at(Some("FED.example.TEST"), None), Some(first.clone()));
    for (name, alpn) in [
        (Some("other.example.test"), None),
        (None, None),
        (Some(DOMAIN), Some("acme-tls/1")),
        (Some("other.example.test"), Some("acme-tls/1")),
    ] {
        assert_eq!(at(name, alpn), None, "{name:?} {alpn:?}");
    }
    // Who is let in by the authority's protocol hears nothing more.
    let spoken = |alpn: &str| {
        let ask = format!(
            "printf 'GET / HTTP/1.1\\r\\nHost: {DOMAIN}\\r\\nConnection: close\\r\\n\\r\\n' | openssl s_client -quiet -ign_eof -alpn {alpn} \
             -servername {DOMAIN} -connect 127.0.0.1:{}",
            pebble.tls_port
        );
        Output::of(Command::new("sh").args(["-c", &ask])).stdout.contains("x509-svid")
    };
    assert!(spoken("http/1.1") && spoken("h2,http/1.1,acme-tls/1") && !spoken("h2,acme-tls/1"));
    // Keys are in the key manager, as SPIRE's are, and nowhere else.
    let folder = server.dir.path().join("data/bundle-acme");
    let kept = std::fs::read_to_string(folder.join(DOMAIN)).expect("the certificate's file");
    assert!(kept.contains("BEGIN CERTIFICATE") && !kept.contains("PRIVATE"), "{kept}");
    assert!(!folder.join(format!("{DOMAIN}+token")).exists());
    let keys = std::fs::read_to_string(server.dir.path().join("data/keys.json")).expect("keys");
    for key in [format!("bundle-acme-{DOMAIN}"), "bundle-acme-acme_account+key".into()] {
        assert!(keys.contains(&key), "{key}");
    }
    // With nobody to ask, it goes on with what it has; and so does SPIRE's server on the same data, and Finial's after that.
    pebble.process.kill();
    for flavor in [Flavor::Finial, Flavor::Spire, Flavor::Finial] {
        server.process.terminate();
        server.restart_as(flavor);
        let log = || server.process.log();
        assert_eq!(first_serial(&pebble, &log), first, "{flavor:?}: {}", log());
        bundle(&pebble, &root).unwrap_or_else(|e| panic!("{flavor:?}: {e}"));
    }
}

#[test]
fn spires_server_fetches_from_an_endpoint_with_such_a_certificate() {
    let Some(pebble) = Pebble::start(DAYS) else { return };
    let server = Server::start(Flavor::Finial, &options(&pebble, DOMAIN, true));
    let url = format!("https://{DOMAIN}:{}/", pebble.tls_port);
    let proxy = connect_proxy();
    let there = ServerOptions {
        trust_domain: "other.test".into(),
        server: format!(
            "federation {{ federates_with \"example.org\" {{ bundle_endpoint_url = \"{url}\" bundle_endpoint_profile \
             \"https_web\" {{}} }} }}"
        ),
        web_roots: Some(pebble.root()),
        environment: vec![("HTTPS_PROXY", PathBuf::from(format!("http://{proxy}")))],
        ..ServerOptions::default()
    };
    first_serial(&pebble, &|| server.process.log());
    let spire = Server::start(Flavor::Spire, &there);
    let own = server.command(&["bundle", "show", "-format", "pem"]).ok().stdout;
    eventually("SPIRE's server has the bundle", || {
        let listed = spire.command(&["bundle", "list", "-id", "spiffe://example.org", "-format", "pem"]).stdout;
        if listed.contains(own.trim()) { Ok(()) } else { Err(spire.process.log()) }
    });
}

/// A proxy for who asks names that only pebble's DNS knows: all of them are on this machine.
fn connect_proxy() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || pass_on(stream));
        }
    });
    address
}

fn pass_on(stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut head = String::new();
    while reader.read_line(&mut head).ok()? > 2 {}
    let port: u16 = head.split(' ').nth(1)?.rsplit(':').next()?.parse().ok()?;
    let target = TcpStream::connect(("127.0.0.1", port)).ok()?;
    (&stream).write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
    let mut from_target = target.try_clone().ok()?;
    let back = std::thread::spawn(move || std::io::copy(&mut from_target, &mut &stream));
    let _ = std::io::copy(&mut reader, &mut &target);
    let _ = target.shutdown(std::net::Shutdown::Write);
    let _ = back.join();
    Some(())
}

#[test]
fn it_is_renewed_in_time_and_an_authority_that_is_away_leaves_the_last_one() {
    let Some(mut pebble) = Pebble::start(24) else { return };
    let server = Server::start(Flavor::Finial, &options(&pebble, DOMAIN, true));
    let root = pebble.root();
    let log = || server.process.log();
    let first = first_serial(&pebble, &log);
    let second = eventually("it is renewed before it ends", || {
        bundle(&pebble, &root).unwrap_or_else(|e| panic!("there is always a good one: {e}\n{}", log()));
        serial(&pebble).filter(|now| *now != first).ok_or_else(log)
    });
    pebble.process.kill();
    eventually("it says that the authority is away, and that the last one is kept", || {
        let lines = log();
        let said =
            |line: &str| line.contains("does not answer") && line.contains("No new certificate; the last one is kept");
        lines.lines().any(said).then_some(()).ok_or(lines)
    });
    assert_eq!(serial(&pebble), Some(second.clone()));
    // It comes back with a new root, and knows nobody.
    pebble.come_back();
    let root = pebble.root();
    eventually("the next one is there", || bundle(&pebble, &root).map_err(|e| e + &log()));
    assert_ne!(serial(&pebble), Some(second));
}

#[test]
fn nobody_waits_for_an_authority_at_the_start() {
    let Some(mut pebble) = Pebble::away(DAYS) else { return };
    // It is healthy with nobody to ask.
    let server = Server::start(Flavor::Finial, &options(&pebble, DOMAIN, true));
    let log = || server.process.log();
    eventually("it says why there is no certificate", || {
        let lines = log();
        let said = |line: &str| {
            line.contains(&format!("the ACME authority at {} does not answer: dial tcp", pebble.directory()))
                && line.contains("No certificate yet; handshakes are refused")
        };
        lines.lines().any(said).then_some(()).ok_or(lines)
    });
    assert_eq!(serial(&pebble), None);
    pebble.come_back();
    first_serial(&pebble, &log);
}

#[test]
fn terms_that_nobody_accepted_are_named() {
    let Some(pebble) = Pebble::start(DAYS) else { return };
    let server = Server::start(Flavor::Finial, &options(&pebble, DOMAIN, false));
    eventually("it says what to do", || {
        let log = server.process.log();
        let text = "ACME Terms of Service have not been accepted. See the `tos_accepted` configurable";
        let asked = log.lines().filter(|line| line.contains(text)).any(|line| line.contains("No certificate yet"));
        asked.then_some(()).ok_or(log)
    });
    assert_eq!(serial(&pebble), None);
    assert!(!server.dir.path().join("data/bundle-acme").join(DOMAIN).exists());
}

/// A provider on that address, with keys from a file.
fn provider(pebble: &Pebble, domains: &[&str], address: &str, directory: &str, cache: &Path) -> Provider {
    let bundle = r#"{"keys": [], "spiffe_sequence": 1}"#;
    let config = format!(
        "domains = {domains:?}\n acme {{ directory_url = \"{directory}\" email = \"ops@example.test\" tos_accepted = true \
         cache_dir = \"{}\" addr = \"{address}:{}\" }}\n file {{ path = \"DIR/bundle.json\" poll_interval = \"1s\" }}",
        cache.display(),
        pebble.tls_port
    );
    let root = pebble.web_root();
    Provider::begin_with(Flavor::Finial, &config, &[("bundle.json", bundle)], &[("SSL_CERT_FILE", &root)])
}

#[test]
fn the_provider_has_one_for_each_name_and_says_which_it_cannot_get() {
    let Some(mut pebble) = Pebble::start(DAYS) else { return };
    let (good, blocked, elsewhere) = ("oidc.example.test", "blocked.example", "elsewhere.example.test");
    pebble.name_is_at(elsewhere, "127.0.0.9");
    let cache = Workdir::new();
    let domains = [good, "second.example.test", blocked, elsewhere, "localhost"];
    let mut running = provider(&pebble, &domains, "127.0.0.1", &pebble.directory(), cache.path());
    let (root, port) = (pebble.root(), pebble.tls_port);
    let document = |name: &str| get(name, "127.0.0.1", port, &root, "/.well-known/openid-configuration");
    for name in [good, "second.example.test"] {
        eventually("its document is served", || {
            let answer = document(name);
            if answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}\n{}", running.process.log())) }
        });
    }
    let says = |name: &str, text: &str| {
        eventually("it says why", || {
            let log = running.process.log();
            let said = |line: &str| line.contains(name) && line.contains(text) && line.contains("No certificate yet");
            log.lines().any(said).then_some(()).ok_or(log)
        });
        assert_eq!(presented("127.0.0.1", port, Some(name), None).map(|c| c.serial_decimal()), None, "{name}");
    };
    says(blocked, "refuses blocked.example");
    says(elsewhere, "could not see that elsewhere.example.test is ours");
    says(elsewhere, "port 443 of elsewhere.example.test must lead to this endpoint");
    assert!(running.process.log().contains("No ACME authority can certify this name"));
    // In Go's form, private, and used again after a restart.
    let kept = std::fs::read_to_string(cache.path().join(good)).expect("its file");
    assert!(kept.starts_with("-----BEGIN PRIVATE KEY-----") && kept.contains("BEGIN CERTIFICATE"));
    let account = cache.path().join("acme_account+key");
    for file in [&account, &cache.path().join(good)] {
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(file).expect("a file").permissions());
        assert_eq!(mode & 0o777, 0o600);
    }
    let first = presented("127.0.0.1", port, Some(good), None).expect("a certificate");
    running.process.terminate();
    pebble.process.kill();
    let again = provider(&pebble, &[good], "127.0.0.1", &pebble.directory(), cache.path());
    eventually("it is served again", || {
        let answer = document(good);
        if answer.status == 200 { Ok(()) } else { Err(again.process.log()) }
    });
    assert_eq!(presented("127.0.0.1", port, Some(good), None), Some(first));
}

#[test]
fn processes_that_share_a_folder_answer_for_each_other() {
    let Some(pebble) = Pebble::start(DAYS) else { return };
    let name = "shared.example.test";
    // Whoever asks, the authority comes to the second.
    pebble.name_is_at(name, "127.0.0.3");
    let cache = Workdir::new();
    let second = provider(&pebble, &[name], "127.0.0.3", "https://localhost:1/dir", cache.path());
    eventually("the second listens", || {
        let log = second.process.log();
        if log.contains("does not answer") { Ok(()) } else { Err(log) }
    });
    let first = provider(&pebble, &[name], "127.0.0.2", &pebble.directory(), cache.path());
    let at = |address: &str, who: &Process| {
        eventually("it has the certificate", || {
            presented(address, pebble.tls_port, Some(name), None).ok_or_else(|| who.log())
        })
    };
    let theirs = at("127.0.0.2", &first.process);
    assert_eq!(at("127.0.0.3", &second.process), theirs, "the second takes what the first got");
    assert!(!cache.path().join(format!("{name}+token")).exists());
}
