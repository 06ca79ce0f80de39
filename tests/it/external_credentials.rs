//! Credential composers, notifiers and bundle publishers, built on SPIRE's plugin SDK (tests/plugins), under Finial and under
//! the real SPIRE: the certificates and tokens that come out say the same.

use crate::external::{block, gone, plugin};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually};

/// A composer that greets.
fn composer(plugin: &Path, name: &str, mark: &str, labels: &str) -> String {
    let extension = if name == "one" { "1.3.6.1.4.1.99999.2" } else { "1.3.6.1.4.1.99999.3" };
    let data = format!("greeting = \"{name}\"\n labels {{ extension = \"{extension}\" {labels} }}");
    block(plugin, "CredentialComposer", name, "credentialcomposer", mark, &data)
}

fn server(flavor: Flavor, plugins: &[String]) -> Server {
    Server::start(flavor, &ServerOptions { plugins: plugins.concat(), ..ServerOptions::default() })
}

/// What a PEM certificate says, without what no two have in common.
fn says(pem: &str) -> String {
    let dir = Workdir::new();
    let file = dir.write("certificate.pem", pem);
    let mut command = Command::new("openssl");
    command.args(["x509", "-noout", "-text", "-nameopt", "RFC2253,-esc_msb,utf8", "-certopt"]);
    command.arg("no_serial,no_validity,no_pubkey,no_sigdump").arg("-in").arg(file);
    let text = Output::of(&mut command).ok().stdout;
    let random = |line: &&str| {
        let hex = line.trim().trim_start_matches("keyid:");
        hex.contains(':') && hex.bytes().all(|b| b.is_ascii_hexdigit() || b == b':')
    };
    text.lines().filter(|line| !random(line)).collect::<Vec<_>>().join("\n")
}

/// The claims of the token among these lines, without its times, which are whole numbers.
fn claims(out: &str) -> Value {
    use base64::Engine;
    let token = out.split_whitespace().find(|word| word.starts_with("ey")).unwrap_or_else(|| panic!("no token: {out}"));
    let payload = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
    let mut claims: Value = serde_json::from_slice(&payload).unwrap();
    for time in ["iat", "exp"] {
        let time = claims.as_object_mut().unwrap().remove(time).unwrap();
        assert!(time.is_i64(), "{time}");
    }
    claims
}

/// All credentials of a trust domain with three composers.
fn composed(flavor: Flavor, plugin: &Path) -> Vec<String> {
    let mark = format!("mark-composed-{flavor:?}");
    let uniqueid = "CredentialComposer \"uniqueid\" { plugin_data {} }\n".to_owned();
    let composers = [composer(plugin, "two", &mark, ""), uniqueid, composer(plugin, "one", &mark, "")];
    let mut server = server(flavor, &composers);
    server.entry("/w", &["-dns", "w.example.org"]);
    let mut agent = Agent::serving(flavor, &server, &AgentOptions::default());
    let written = Workdir::new();
    agent.command(&["api", "fetch", "x509", "-write", &written.path().display().to_string()]).ok();
    let data: Value =
        serde_json::from_slice(&fs::read(agent.dir.path().join("data/agent-data.json")).unwrap()).unwrap();
    let of_agent = {
        use base64::Engine;
        let leaf = data["svid"][0].as_str().unwrap_or_else(|| panic!("{data}"));
        String::from_utf8(base64::prelude::BASE64_STANDARD.decode(leaf).unwrap()).unwrap()
    };
    let shown = Output::of(
        Command::new("openssl")
            .args(["s_client", "-connect", &format!("127.0.0.1:{}", server.port), "-showcerts"])
            .stdin(std::process::Stdio::null()),
    );
    let of_server = shown.stdout.split("-----BEGIN").nth(1).unwrap_or_else(|| panic!("{shown:?}"));
    let jwt = agent.command(&["api", "fetch", "jwt", "-audience", "a", "-audience", "b"]).ok().stdout;
    let minted = server.command(&["jwt", "mint", "-spiffeID", "spiffe://example.org/m", "-audience", "x"]).ok().stdout;
    let all = vec![
        says(&server.command(&["bundle", "show"]).ok().stdout),
        says(&format!("-----BEGIN{of_server}")),
        // Agents are named by tokens.
        says(&of_agent).lines().filter(|l| !l.contains("/spire/agent/")).collect::<Vec<_>>().join("\n"),
        says(&fs::read_to_string(written.path().join("svid.0.pem")).unwrap()),
        claims(&jwt).to_string(),
        claims(&minted).to_string(),
    ];
    agent.process.terminate();
    server.process.terminate();
    gone(&mark);
    all
}

#[test]
fn composers_have_the_say_that_they_have_under_spire() {
    let Some(plugin) = plugin() else { return };
    let ours = composed(Flavor::Finial, &plugin);
    let workload = &ours[3];
    for part in ["OU=two+OU=one", "L=Zürich", "w.example.org", "two.example.org", "1.3.6.1.4.1.99999.3", "one workload"]
    {
        assert!(workload.contains(part), "{part}: {workload}");
    }
    assert!(ours[4].contains("\"greeted\":[\"two\",\"one\"]"), "{}", ours[4]);
    for (ours, theirs) in ours.iter().zip(composed(Flavor::Spire, &plugin)) {
        assert_eq!(*ours, theirs);
    }
}

/// What is said where a composer is against it, or spoils it.
fn refused(flavor: Flavor, plugin: &Path) -> Vec<(String, String)> {
    let mint_x509 = ["x509", "mint", "-spiffeID", "spiffe://example.org/m"];
    let mint_jwt = ["jwt", "mint", "-spiffeID", "spiffe://example.org/m", "-audience", "x"];
    let mut said = Vec::new();
    for (labels, args) in [
        ("against = \"workload\"", &mint_x509[..]),
        ("spoil = \"workload\"", &mint_x509[..]),
        ("against = \"jwt\"", &mint_jwt[..]),
        ("spoil = \"jwt\"", &mint_jwt[..]),
    ] {
        let server = server(flavor, &[composer(plugin, "one", "mark-refused", labels)]);
        let out = server.command(args);
        assert_ne!(out.code, 0, "{labels}: {out:?}");
        said.push((labels.to_owned(), out.stderr));
    }
    said
}

#[test]
fn what_composers_are_against_is_refused_in_the_words_of_spire() {
    let Some(plugin) = plugin() else { return };
    let ours = refused(Flavor::Finial, &plugin);
    assert!(ours[0].1.contains("credentialcomposer(one): no workload today"), "{ours:?}");
    for (ours, theirs) in ours.into_iter().zip(refused(Flavor::Spire, &plugin)) {
        // What to do is ours alone to say.
        let said = ours.1.lines().filter(|line| !line.starts_with("hint:")).collect::<Vec<_>>().join("\n");
        assert_eq!((ours.0, said.trim()), (theirs.0, theirs.1.trim()));
    }
}

/// How many X.509 authorities, and how many JWT keys, a plugin wrote down.
fn told(folder: &Workdir, name: &str) -> Result<(usize, usize), String> {
    let text = fs::read(folder.path().join(name)).map_err(|e| format!("{name}: {e}"))?;
    let bundle: Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    assert_eq!(bundle["trust_domain"], "example.org");
    let count = |list: &str| bundle[list].as_array().map_or(0, Vec::len);
    Ok((count("x509_authorities"), count("jwt_authorities")))
}

fn expect(folder: &Workdir, name: &str, want: (usize, usize)) {
    eventually(&format!("{name} has {want:?}"), || match told(folder, name)? {
        there if there == want => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// Notifiers and publishers hear of the bundle at the start and when it changes.
fn outside(flavor: Flavor, plugin: &Path) {
    let (mark, folder) = (format!("mark-outside-{flavor:?}"), Workdir::new());
    let data = format!("folder = \"{}\"", folder.path().display());
    let mut plugins = vec![
        block(plugin, "Notifier", "files", "notifier", &mark, &data),
        block(plugin, "BundlePublisher", "files", "bundlepublisher", &mark, &data),
    ];
    let files = ["pem", "jwks", "spiffe"].map(|format| (format, folder.path().join(format)));
    if flavor == Flavor::Finial {
        let data = files.each_ref().map(|(format, path)| format!("{format} = \"{}\"\n", path.display())).concat();
        plugins.push(format!("BundlePublisher \"file\" {{ plugin_data {{ {data} }} }}\n"));
    }
    let mut server = server(flavor, &plugins);
    for name in ["loaded", "published"] {
        expect(&folder, name, (1, 1));
    }
    server.order("x509", "prepare");
    for name in ["updated", "published"] {
        expect(&folder, name, (2, 1));
    }
    server.order("jwt", "prepare");
    for name in ["updated", "published"] {
        expect(&folder, name, (2, 2));
    }
    if flavor == Flavor::Finial {
        let pem = server.command(&["bundle", "show"]).ok().stdout;
        let shown = finial_crypto::pem::certificates(pem.as_bytes()).unwrap();
        eventually("the files are there", || {
            let read = |at: usize| fs::read_to_string(&files[at].1).map_err(|e| e.to_string());
            let written = finial_crypto::pem::certificates(read(0)?.as_bytes()).map_err(|e| e.to_string())?;
            let keys = |at| -> Result<usize, String> {
                let document: Value = serde_json::from_str(&read(at)?).map_err(|e| e.to_string())?;
                Ok(document["keys"].as_array().map_or(0, Vec::len))
            };
            if (&written, keys(1)?, keys(2)?) == (&shown, 4, 4) { Ok(()) } else { Err(format!("{}", written.len())) }
        });
        let mode = fs::metadata(&files[0].1).map(|m| m.permissions().mode() & 0o777);
        assert_eq!(mode.unwrap(), 0o644, "everyone may read it, whatever the server's umask");
    }
    server.process.terminate();
    gone(&mark);
}

#[test]
fn notifiers_and_publishers_hear_of_the_bundle() {
    let Some(plugin) = plugin() else { return };
    outside(Flavor::Finial, &plugin);
    outside(Flavor::Spire, &plugin);
}

/// The error with which a server ends whose notifier would not have it begin.
fn unwelcome(flavor: Flavor, plugin: &Path) -> String {
    let folder = Workdir::new();
    let data = format!("folder = \"{}\"", folder.path().display());
    let mut server = server(flavor, &[block(plugin, "Notifier", "files", "notifier", "mark-unwelcome", &data)]);
    server.process.terminate();
    folder.write("against-loaded", "");
    server.begin();
    assert_ne!(server.process.wait(), 0);
    let log = server.process.log();
    let words = "one or more notifiers returned an error: ";
    let line = log.lines().find(|l| l.contains(words) && l.contains("crashed")).unwrap_or_else(|| panic!("{log}"));
    // SPIRE's log also has the code.
    let said = line.split_once(words).unwrap().1.split('"').next().unwrap();
    said.rsplit("desc = ").next().unwrap().to_owned()
}

#[test]
fn a_notifier_can_keep_a_server_from_beginning() {
    let Some(plugin) = plugin() else { return };
    assert_eq!(unwelcome(Flavor::Finial, &plugin), unwelcome(Flavor::Spire, &plugin));
}
