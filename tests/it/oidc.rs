//! The OIDC discovery provider beside the real one: the same requests, the same answers.

use std::path::Path;
use testkit::envoy::Answer;
use testkit::oidc::{Provider, curl, web_certificate};
use testkit::{Agent, AgentOptions, Flavor, Server, ServerOptions, eventually, free_port};

const BOTH: [Flavor; 2] = [Flavor::Spire, Flavor::Finial];

/// What clients look at.
fn seen(answer: &Answer) -> (u16, Vec<String>, String) {
    let names = ["content-type", "cache-control", "pragma", "expires", "x-content-type-options"];
    (answer.status, names.map(|name| answer.header(name).to_owned()).to_vec(), answer.body.clone())
}

fn server_api(server: &Server) -> String {
    format!("server_api {{ address = \"unix://{}\" poll_interval = \"1s\" }}", server.socket().display())
}

#[test]
fn both_documents_are_those_of_the_real_one() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let bundle = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
    let file = server.dir.write("bundle.json", &bundle);
    let sources = [server_api(&server), format!("file {{ path = \"{}\" }}", file.display())];
    let documents = [
        "",
        "set_key_use = true\n jwt_issuer = \"https://issuer.test/deep/\"",
        "jwt_issuer = \"https://issuer.test\"\n jwks_uri = \"https://elsewhere.test/k\"",
        "server_path_prefix = \"/pre/\"\n allow_insecure_scheme = true\n set_key_use = true",
    ];
    let paths =
        ["/.well-known/openid-configuration", "/keys", "/pre/keys", "/pre/.well-known/openid-configuration", "/"];
    let headers: [&[&str]; 8] = [
        &["-H", "Host: x.test"],
        &["-H", "Host: x.test:8443"],
        &["-H", "Host: y.test"],
        &["-H", "Host: y.test", "-H", "X-Forwarded-Host: x.test", "-H", "X-Forwarded-Proto: HTTPS"],
        &["-H", "Host: x.test", "-H", "X-Forwarded-Scheme: http"],
        &["-H", "Host: x.test", "-H", "Forwarded: for=1.2.3.4;proto=https;host=y.test"],
        &["-X", "POST", "-H", "Host: x.test"],
        &["-X", "PUT", "-H", "Host: nobody"],
    ];
    let mut compared = 0;
    for (source, document) in sources.iter().flat_map(|s| documents.iter().map(move |d| (s, d))) {
        let ports = [free_port(), free_port()];
        let providers = BOTH.map(|flavor| {
            let port = ports[usize::from(flavor == Flavor::Finial)];
            let config = format!("domains = [\"x.test\"]\n insecure_addr = \"127.0.0.1:{port}\"\n{source}\n{document}");
            Provider::start(flavor, &config)
        });
        for (path, headers) in paths.iter().flat_map(|p| headers.iter().map(move |h| (p, h))) {
            let [spire, ours] = ports.map(|port| {
                let url = format!("http://127.0.0.1:{port}{path}");
                seen(&curl(&[headers, &[url.as_str()][..]].concat()))
            });
            assert_eq!(spire, ours, "{source} {document}: {path} {headers:?}");
            compared += 1;
        }
        for path in ["/ready", "/live", "/other"] {
            let [spire, ours] = [0, 1].map(|i| seen(&providers[i].probe(path)));
            assert_eq!(spire, ours, "{path}");
        }
    }
    assert_eq!(compared, 2 * 4 * 5 * 8);
}

#[test]
fn a_workload_api_tells_its_keys_and_each_change() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    server.entry("/oidc", &[]);
    let agent = Agent::serving(Flavor::Finial, &server, &AgentOptions::default());
    let providers = BOTH.map(|flavor| {
        let config = format!(
            "domains = [\"x.test\"]\n listen_socket_path = \"DIR/oidc.sock\"\n workload_api {{ socket_path = \"{}\" \
             trust_domain = \"example.org\" poll_interval = \"1s\" }}",
            agent.socket().display()
        );
        Provider::start(flavor, &config)
    });
    let keys = |provider: &Provider| {
        let socket = provider.path("oidc.sock");
        curl(&["--unix-socket", &socket.display().to_string(), "http://x.test/keys"])
    };
    let [spire, ours] = [0, 1].map(|i| seen(&keys(&providers[i])));
    assert_eq!(spire, ours);
    assert_eq!(spire.0, 200);
    // A second authority comes.
    server.order("jwt", "prepare");
    let ids = |body: &str| {
        let set: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let mut ids: Vec<_> = set["keys"].as_array().expect("keys").iter().map(|k| k["kid"].to_string()).collect();
        ids.sort();
        ids
    };
    let both = eventually("both have two keys", || {
        let both = [0, 1].map(|i| ids(&keys(&providers[i]).body));
        if both.iter().all(|ids| ids.len() == 2) { Ok(both) } else { Err(format!("{both:?}")) }
    });
    assert_eq!(both[0], both[1]);
    // Caches may ask whether it has changed.
    let first = keys(&providers[1]);
    let socket = providers[1].path("oidc.sock").display().to_string();
    let since = format!("If-Modified-Since: {}", first.header("last-modified"));
    let again = curl(&["--unix-socket", &socket, "-H", &since, "http://x.test/keys"]);
    assert_eq!((again.status, again.body.as_str()), (304, ""), "{since}");
}

#[test]
fn a_source_that_goes_away_leaves_the_last_keys_in_force() {
    let mut server = Server::start(Flavor::Finial, &ServerOptions::default());
    let port = free_port();
    let listen = format!("domains = [\"x.test\"]\n insecure_addr = \"127.0.0.1:{port}\"\n");
    let provider = Provider::start(Flavor::Finial, &(listen + &server_api(&server)));
    let keys = || curl(&[&format!("http://127.0.0.1:{port}/keys")]);
    let before = keys();
    server.process.kill();
    eventually("it says that the server is away", || {
        let log = provider.process.log();
        if log.contains("Failed to fetch bundle") { Ok(()) } else { Err(log) }
    });
    assert_eq!(keys().body, before.body);
    server.restart();
    server.order("jwt", "prepare");
    eventually("it hears of the new key", || {
        let now = keys();
        if now.body == before.body { Err(now.body) } else { Ok(()) }
    });
    // Nothing is known yet.
    let port = free_port();
    let nobody = "server_api { address = \"unix:///nonexistent/api.sock\" }";
    let _provider = Provider::begin(
        Flavor::Finial,
        &format!("domains = [\"x.test\"]\n insecure_addr = \"127.0.0.1:{port}\"\n{nobody}"),
    );
    let answer = eventually("it listens", || {
        let answer = curl(&[&format!("http://127.0.0.1:{port}/keys")]);
        if answer.status == 0 { Err("no answer".into()) } else { Ok(answer) }
    });
    assert_eq!((answer.status, answer.body.as_str()), (500, "document not available\n"));
}

#[test]
fn https_presents_the_certificate_that_is_in_the_files_now() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let port = free_port();
    let dir = server.dir.path();
    let install = |name: &str| {
        let [certificate, key] = web_certificate(dir, name);
        let [to_certificate, to_key] = [dir.join("web.crt"), dir.join("web.key")];
        std::fs::copy(key, to_key).expect("a copy");
        std::fs::copy(&certificate, to_certificate).expect("a copy");
        certificate
    };
    let first = install("first");
    let config = format!(
        "domains = [\"localhost\"]\n serving_cert_file {{ cert_file_path = \"{0}/web.crt\" key_file_path = \"{0}/web.key\" \
         addr = \"127.0.0.1:{port}\" file_sync_interval = \"100ms\" }}\n{1}",
        dir.display(),
        server_api(&server)
    );
    let _provider = Provider::start(Flavor::Finial, &config);
    let ask = |root: &Path| {
        let url = format!("https://localhost:{port}/.well-known/openid-configuration");
        curl(&["--cacert", &root.display().to_string(), &url])
    };
    let answer = ask(&first);
    let document: serde_json::Value = serde_json::from_str(&answer.body).expect("JSON");
    assert_eq!(document["issuer"], format!("https://localhost:{port}"));
    let second = install("second");
    eventually("the new certificate is presented", || {
        let answer = ask(&second);
        if answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}")) }
    });
    assert_eq!(ask(&first).status, 0, "the old one is gone");
}

#[test]
fn its_command_line_is_that_of_the_real_one() {
    for args in [&["-nonsense"][..], &["more", "words"], &["-h"], &["-config", "/nonexistent/x.conf"]] {
        let [spire, ours] = BOTH.map(|flavor| Provider::command(flavor, args));
        assert_eq!(spire.code, ours.code, "{args:?}: {ours:?}");
        // It calls itself as it was called, with the path.
        let bare = |text: &str| {
            let lines = text.lines().map(|line| match line.strip_prefix("Usage of ") {
                Some(_) => "Usage of".to_owned(),
                None => line.to_owned(),
            });
            lines.collect::<Vec<_>>()
        };
        if args[0] != "-config" {
            assert_eq!(bare(&spire.stderr), bare(&ours.stderr), "{args:?}");
        }
    }
    let version = Provider::command(Flavor::Finial, &["-version"]);
    assert!(version.stdout.starts_with("1.15.3"), "{version:?}");
}

#[test]
fn a_server_can_be_its_own_provider() {
    let port = free_port();
    let oidc = format!(
        "experimental {{ oidc {{ domains = [\"x.test\"] insecure_addr = \"127.0.0.1:{port}\" }} }}\n\
         jwt_issuer = \"https://x.test\""
    );
    let server = Server::start(Flavor::Finial, &ServerOptions { server: oidc, ..ServerOptions::default() });
    let separate = free_port();
    let listen = format!("domains = [\"x.test\"]\n insecure_addr = \"127.0.0.1:{separate}\"\n");
    let _provider = Provider::start(Flavor::Finial, &(listen + &server_api(&server)));
    let both = |path: &str| {
        [port, separate].map(|port| seen(&curl(&["-H", "Host: x.test", &format!("http://127.0.0.1:{port}{path}")])))
    };
    let [own, other] = both("/.well-known/openid-configuration");
    assert_eq!(own, other);
    server.order("jwt", "prepare");
    // The answer to the order comes after the key is served.
    let own = both("/keys")[0].clone();
    assert_eq!(own.2.matches("\"kid\"").count(), 2, "{own:?}");
    eventually("the one that polls has it too", || {
        let [own, other] = both("/keys");
        if own == other { Ok(()) } else { Err(format!("{other:?}")) }
    });
}
