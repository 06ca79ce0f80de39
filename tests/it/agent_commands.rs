//! Every command of `spire-agent`, SPIRE's and ours, at the same running agent: the same words and the same exit codes.

use std::collections::BTreeMap;
use std::path::Path;
use testkit::Flavor::{Finial, Spire};
use testkit::{Agent, AgentOptions, Flavor, Output, Server, ServerOptions, Workdir, eventually};

/// What a command said, without what differs by nature.
fn plain(output: Output) -> (i32, String, String) {
    // SPIRE prints federated bundles in another order each time.
    let mut lines: Vec<&str> = output.stdout.split_inclusive('\n').collect();
    lines.chunk_by_mut(|a, b| a.starts_with("[spiffe:") && b.starts_with("[spiffe:")).for_each(<[&str]>::sort_unstable);
    let (mut parts, stdout) = (Vec::new(), lines.concat());
    for text in stdout.split_inclusive('\n').filter(|text| !text.starts_with("time=")) {
        match parts.last_mut() {
            Some(part) if !text.starts_with("bundle(") => {
                *part = format!("{part}{}", line(text.trim_end_matches('\n')))
            }
            _ => parts.push(line(text.trim_end_matches('\n'))),
        }
    }
    parts.sort();
    // Ours may end with advice that SPIRE does not give.
    let stderr = output.stderr.lines().filter(|l| !l.starts_with("hint: ")).map(line).collect();
    (output.code, parts.concat(), stderr)
}

fn line(text: &str) -> String {
    // grpc-go names a socket that it cannot reach as `///path`.
    let text = text.replace("dial unix //", "dial unix ");
    // Go's JSON of messages has blanks by chance.
    let json = text.starts_with("Claims ") || text.starts_with('{') || text.starts_with('[');
    let text = if json { text.replace(", ", ",").replace(": ", ":") } else { text };
    for marker in
        [" svid after ", " svids after ", "  Uptime:", "\"uptime\":", "Last Sync Success:", "\"last_sync_success\":"]
    {
        if let Some((before, _)) = text.split_once(marker) {
            return format!("{before}{marker}{{time}}\n");
        }
    }
    format!("{text}\n")
}

struct Rig {
    agent: Agent,
    folder: Workdir,
    admin: String,
    differences: Vec<String>,
    asked: usize,
    _server: Server,
}

impl Rig {
    fn start(flavor: Flavor) -> Self {
        let reload = if flavor == Spire { "experimental { cache_reload_interval = \"1s\" }" } else { "" };
        let server = Server::start(flavor, &ServerOptions { server: reload.into(), ..Default::default() });
        let bundle = server.command(&["bundle", "show", "-format", "spiffe"]).ok().stdout;
        let file = server.dir.write("other.json", &bundle);
        let file = file.to_str().expect("a path");
        for domain in ["spiffe://a.org", "spiffe://b.org"] {
            server.command(&["bundle", "set", "-id", domain, "-format", "spiffe", "-path", file]).ok();
        }
        server.entry("/one", &["-entryID", "1", "-hint", "inside", "-federatesWith", "spiffe://b.org"]);
        server.entry("/two", &["-entryID", "2", "-federatesWith", "spiffe://a.org"]);
        let folder = Workdir::new();
        let admin = folder.path().join("admin/api.sock").display().to_string();
        let more = format!("admin_socket_path = \"{admin}\"");
        let agent = Agent::serving(flavor, &server, &AgentOptions { agent: more, ..Default::default() });
        let rig = Self { agent, folder, admin, differences: Vec::new(), asked: 0, _server: server };
        eventually("the agent has both SVIDs and bundles", || {
            let out = rig.agent.command(&["api", "fetch", "x509"]);
            let all = ["/one", "/two", "a.org", "b.org"].iter().all(|part| out.stdout.contains(part));
            if all { Ok(()) } else { Err(out.stdout) }
        });
        rig
    }

    fn note(&mut self, what: &str, theirs: (i32, String, String), ours: (i32, String, String)) {
        self.asked += 1;
        if theirs != ours {
            self.differences.push(format!("{what}\nSPIRE: {theirs:#?}\nours: {ours:#?}"));
        }
    }

    /// As it is written, with `{socket}`, `{admin}` and `{folder}` filled in.
    fn both(&mut self, args: &[&str], variables: &[(&str, &str)]) {
        let public = self.agent.socket().display().to_string();
        let folder = self.folder.path().display().to_string();
        let fill =
            |text: &str| text.replace("{socket}", &public).replace("{admin}", &self.admin).replace("{folder}", &folder);
        let args: Vec<String> = args.iter().map(|arg| fill(arg)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let variables: Vec<(&str, String)> = variables.iter().map(|(name, value)| (*name, fill(value))).collect();
        let variables: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let run = |flavor| plain(self.agent.run_by(flavor, &args, &variables));
        let (theirs, ours) = (run(Spire), run(Finial));
        self.note(&format!("{args:?} {variables:?}"), theirs, ours);
    }

    /// At the Workload API.
    fn public(&mut self, args: &[&str]) {
        self.both(&[args, &["-socketPath", "{socket}"]].concat(), &[]);
    }

    /// At the admin socket.
    fn admin(&mut self, args: &[&str]) {
        self.both(&[args, &["-socketPath", "{admin}"]].concat(), &[]);
    }

    fn finish(self) {
        let count = self.differences.len();
        assert!(count == 0, "{count} of {} answers differ:\n{}", self.asked, self.differences.join("\n\n"));
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        (path.file_name().expect("a name").to_string_lossy().into_owned(), std::fs::read(path).expect("a file"))
    };
    std::fs::read_dir(folder).expect("a folder").map(entry).collect()
}

fn workload_api(rig: &mut Rig) {
    for args in [
        &["api", "fetch"][..],
        &["api", "fetch", "x509"],
        &["api", "fetch", "x509", "-silent"],
        &["api", "fetch", "x509", "-output", "json"],
        &["api", "fetch", "x509", "-output", "xml"],
        &["api", "fetch", "x509", "-timeout", "x"],
        &["api", "fetch", "x509", "-timeout", "10s"],
        &["api", "fetch", "x509", "-write", "/no/such/folder"],
        &["api", "fetch", "jwt"],
        &["api", "fetch", "jwt", "-audience", "a"],
        &["api", "fetch", "jwt", "-audience", "a,b", "-output", "json"],
        &["api", "fetch", "jwt", "-audience", "a", "-format", "json"],
        &["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "spiffe://example.org/two"],
        &["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "spiffe://example.org/none"],
        &["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "none"],
        &["api", "validate", "jwt"],
        &["api", "validate", "jwt", "-audience", "a"],
        &["api", "validate", "jwt", "-svid", "x"],
        &["api", "validate", "jwt", "-svid", "a.b.c", "-audience", "a", "-output", "json"],
        &["healthcheck"],
        &["healthcheck", "-verbose"],
        &["healthcheck", "-shallow"],
    ] {
        rig.public(args);
    }
    let socket = rig.agent.socket();
    let token = rig.agent.command(&["api", "fetch", "jwt", "-audience", "a", "-spiffeID", "spiffe://example.org/one"]);
    let token = token.ok().stdout.lines().nth(1).expect("a token").trim().to_owned();
    for args in [
        &["api", "validate", "jwt", "-audience", "a", "-svid", &token][..],
        &["api", "validate", "jwt", "-audience", "a", "-svid", &token, "-output", "json"],
        &["api", "validate", "jwt", "-audience", "b", "-svid", &token],
    ] {
        rig.public(args);
    }
    // What is written is the same.
    let mut written = Vec::new();
    for (flavor, name) in [(Spire, "theirs"), (Finial, "ours")] {
        let folder = rig.folder.sub(name);
        let path = folder.to_str().expect("a path");
        let out = rig.agent.command_by(flavor, &["api", "fetch", "x509", "-silent", "-write", path]);
        written.push((plain(out).1.replace(path, "{folder}"), files(&folder)));
    }
    assert_eq!(written[0], written[1]);
    assert_eq!(written[0].1.len(), 10, "two SVIDs with keys, bundles and two federated bundles each");
    // Where the socket is found.
    let template = socket.display().to_string().replace("public", "%i");
    for (args, variables) in [
        (&["healthcheck"][..], &[("SPIRE_AGENT_PUBLIC_SOCKET", "{socket}")][..]),
        (&["api", "fetch"], &[("SPIRE_AGENT_PUBLIC_SOCKET", "{socket}")]),
        (&["healthcheck", "-instance", "public"], &[("SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE", &template)]),
        (&["healthcheck", "-instance", "other"], &[("SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE", &template)]),
        (&["healthcheck", "-instance", "x"], &[("SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE", "/without")]),
        (&["healthcheck", "-instance", "x"], &[]),
        (&["healthcheck", "-instance", "x", "-socketPath", "{socket}"], &[]),
    ] {
        rig.both(args, variables);
    }
}

fn nobody_there(rig: &mut Rig) {
    for command in ["api fetch x509", "api fetch jwt -audience a", "api validate jwt -audience a -svid b"] {
        let words: Vec<&str> = command.split(' ').collect();
        rig.both(&[&words[..], &["-socketPath", "{folder}/none"]].concat(), &[]);
    }
    for command in ["healthcheck", "healthcheck -verbose", "logger get", "logger reset", "logger set -level debug"] {
        let words: Vec<&str> = command.split(' ').collect();
        rig.both(&[&words[..], &["-socketPath", "{folder}/none"]].concat(), &[]);
    }
    rig.both(&["debug", "getinfo", "-socketPath", "{folder}/none"], &[]);
}

fn admin_api(rig: &mut Rig) {
    for args in [
        &["logger", "get"][..],
        &["logger", "get", "-output", "json"],
        &["logger", "set"],
        &["logger", "set", "-level", "loud"],
        &["logger", "set", "-level", "warn"],
        &["logger", "set", "-level", "INFO", "-output", "json"],
        &["logger", "get"],
        &["logger", "reset"],
        &["logger", "reset", "-output", "json"],
        &["debug", "getinfo"],
        &["debug", "getinfo", "-output", "json"],
    ] {
        rig.admin(args);
    }
}

fn usage(rig: &mut Rig) {
    for command in [
        "run",
        "validate",
        "healthcheck",
        "api fetch",
        "api fetch x509",
        "api fetch jwt",
        "api validate jwt",
        "api watch",
        "logger get",
        "logger set",
        "logger reset",
        "debug getinfo",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        rig.both(&[&words[..], &["-help"]].concat(), &[]);
        rig.both(&[&words[..], &["-nope"]].concat(), &[]);
    }
    for args in [&[][..], &["-help"], &["none"], &["api"], &["logger"], &["debug"], &["api", "none"]] {
        rig.both(args, &[]);
    }
}

fn validate(rig: &mut Rig) {
    rig.both(&["validate", "-config", "/no/such/file"], &[]);
    let good = std::fs::read_to_string(rig.agent.dir.path().join("agent.conf")).expect("a file");
    for (name, text) in [
        ("good.conf", good.clone()),
        ("unknown.conf", good.replace("trust_domain =", "trust_domian =")),
        ("domain.conf", good.replace("\"example.org\"", "\"Not One\"")),
        ("empty.conf", String::new()),
        ("garbage.conf", "agent {".to_owned()),
        ("attestor.conf", good.replace("trust_bundle_path", "insecure_bootstrap = true\n trust_bundle_path")),
    ] {
        rig.folder.write(name, &text);
        let args = ["validate", "-config", &format!("{{folder}}/{name}")];
        let [theirs, ours] = [Spire, Finial].map(|flavor| {
            let args = args.map(|arg| arg.replace("{folder}", &rig.folder.path().display().to_string()));
            let out = rig.agent.run_by(flavor, &args.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
            // Ours says where, and all that is wrong; SPIRE's log lines carry the time.
            (out.code, plain(out).1, String::new())
        });
        rig.note(&format!("{args:?}"), theirs, ours);
    }
}

/// The first update that `api watch` prints.
fn watch(rig: &mut Rig) {
    let mut first = Vec::new();
    for flavor in [Spire, Finial] {
        let socket = rig.agent.socket();
        let socket = socket.to_str().expect("a path").to_owned();
        let process = rig.agent.start_by(flavor, &["api", "watch", "-socketPath", &socket]);
        let text = eventually("the first update is printed", || {
            let text = process.log();
            if text.contains("b.org] CA #1 Valid Until") && text.contains("/two") && text.ends_with("\n\n") {
                Ok(text)
            } else {
                Err(text)
            }
        });
        let mut lines: Vec<String> = text.lines().map(line).collect();
        // SPIRE's order of federated trust domains differs from run to run.
        lines.sort();
        first.push((0, lines.concat(), String::new()));
    }
    let (theirs, ours) = (first.remove(0), first.remove(0));
    rig.note("api watch", theirs, ours);
}

fn commands_at(flavor: Flavor) {
    let mut rig = Rig::start(flavor);
    usage(&mut rig);
    workload_api(&mut rig);
    admin_api(&mut rig);
    nobody_there(&mut rig);
    validate(&mut rig);
    watch(&mut rig);
    rig.finish();
}

#[test]
fn commands_at_our_agent() {
    commands_at(Finial);
}

#[test]
fn commands_at_the_real_spire_agent() {
    commands_at(Spire);
}
