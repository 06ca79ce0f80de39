//! Help, refusals and exit codes are SPIRE's to the letter. `data/words.txt` was recorded from SPIRE's own programs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use finial_cli::{Io, spire_agent, spire_server};

struct Case {
    line: String,
    exit: u8,
    stdout: String,
    stderr: String,
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut part = "";
    for line in include_str!("data/words.txt").split_inclusive('\n').skip(1) {
        match line.trim_end_matches('\n').strip_prefix("=== ") {
            Some("end") => {}
            Some("stdout") => part = "stdout",
            Some("stderr") => part = "stderr",
            Some(text) => match text.strip_prefix("exit ") {
                Some(code) => cases.last_mut().unwrap().exit = code.parse().unwrap(),
                None => {
                    let (stdout, stderr) = (String::new(), String::new());
                    cases.push(Case { line: text.into(), exit: 0, stdout, stderr });
                }
            },
            None if part == "stdout" => cases.last_mut().unwrap().stdout.push_str(line),
            None => cases.last_mut().unwrap().stderr.push_str(line),
        }
    }
    cases
}

fn run(line: &str, env: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> (u8, String, String) {
    let mut words = line.split_whitespace().map(String::from);
    let program = if words.next().as_deref() == Some("spire-server") { spire_server() } else { spire_agent() };
    let (io, stdout, stderr) = Io::captured(Vec::new(), env);
    let exit = program.main(&words.collect::<Vec<_>>(), &io);
    (exit, stdout.text(), stderr.text())
}

#[test]
fn every_word_is_spires() {
    let cases = cases();
    assert!(cases.len() > 50);
    let mut wrong = Vec::new();
    for case in &cases {
        let got = run(&case.line, |_| None);
        if got != (case.exit, case.stdout.clone(), case.stderr.clone()) {
            wrong.push(format!(
                "{}\n  want {} {:?} {:?}\n  got  {} {:?} {:?}",
                case.line, case.exit, case.stdout, case.stderr, got.0, got.1, got.2
            ));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_version_names_spires_and_ours() {
    let (exit, stdout, stderr) = run("spire-agent --version", |_| None);
    assert_eq!((exit, stdout.as_str(), stderr), (0, "", format!("{}\n", finial_cli::version())));
    assert!(finial_cli::version().starts_with("1.15.3+finial."));
}

#[test]
fn the_socket_is_found_as_spire_finds_it() {
    let server = |args: &str, env: &'static [(&'static str, &'static str)]| {
        let find = move |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        run(&format!("spire-server logger get {args}"), find).2
    };
    const TEMPLATE: (&str, &str) = ("SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE", "/none/%i/s");
    const SOCKET: (&str, &str) = ("SPIRE_SERVER_PRIVATE_SOCKET", "/none/env");
    let dials =
        |text: String, socket: &str| assert!(text.contains(&format!("dial unix {socket}: connect: no such")), "{text}");
    dials(server("-socketPath /none/flag -instance a", &[TEMPLATE, SOCKET]), "/none/flag");
    dials(server("-instance a", &[TEMPLATE, SOCKET]), "/none/a/s");
    dials(server("", &[TEMPLATE, SOCKET]), "/none/env");
    dials(server("", &[]), "/tmp/spire-server/private/api.sock");
    assert_eq!(
        server("-instance a", &[("SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE", "/none/s")]),
        "Error: failed to find %i in SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE\n"
    );
}

#[test]
fn who_cannot_be_reached_is_said_with_a_hint() {
    let (exit, stdout, stderr) = run("spire-agent api fetch x509 -socketPath /none/sock", |_| None);
    let want = "rpc error: code = Unavailable desc = connection error: desc = \"transport: Error while dialing: dial unix /none/sock: connect: no such file or directory\"\nhint: ";
    assert_eq!((exit, stdout.as_str()), (1, ""));
    assert!(stderr.starts_with(want), "{stderr}");
}

#[test]
fn an_agent_that_could_not_start_is_not_called_valid() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.conf");
    let config = |attestor: &str, experimental: &str| {
        let text = format!(
            "agent {{\n  data_dir = \"/none\"\n  server_address = \"localhost\"\n  server_port = 8081\n  \
             trust_domain = \"example.org\"\n  insecure_bootstrap = true\n  {experimental}\n}}\nplugins {{\n  KeyManager \"memory\" {{}}\n  \
             NodeAttestor \"join_token\" {{}}\n  WorkloadAttestor \"{attestor}\" {{}}\n}}\n"
        );
        std::fs::write(&file, text).unwrap();
        run(&format!("spire-agent validate -config {}", file.display()), |_| None)
    };
    let (exit, stdout, stderr) = config("unix", "");
    assert_eq!((exit, stdout.as_str(), stderr.as_str()), (0, "SPIRE agent configuration file is valid.\n", ""));
    let (exit, stdout, stderr) = config("container", "");
    assert_eq!((exit, stdout.as_str()), (1, ""));
    let start = "SPIRE agent configuration file is invalid: no built-in plugin \"container\" for type \"WorkloadAttestor\" (there ";
    assert!(stderr.starts_with(start), "{stderr}");
    assert!(stderr.contains(&format!("\n  at {}:12:", file.display())), "{stderr}");
    for experimental in ["disable_workload_api = true", "sds { default_svid_name = \"mine\" }"] {
        let (exit, stdout, stderr) = config("unix", experimental);
        assert_eq!((exit, stdout.as_str(), stderr.as_str()), (0, "SPIRE agent configuration file is valid.\n", ""));
    }
}

#[test]
fn validate_tells_what_run_refuses_or_passes_over() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.conf");
    let validate = |program: &str, text: String| {
        std::fs::write(&file, text).unwrap();
        run(&format!("{program} validate -config {}", file.display()), |_| None)
    };
    let at = |line: &str| format!("\n  at {}:{line}:", file.display());
    let plugins = "plugins {\n  KeyManager \"memory\" {}\n  NodeAttestor \"join_token\" {}\n";
    let server = |telemetry: &str| {
        let data = folder.path().join("d.sqlite3");
        format!(
            "server {{\n  trust_domain = \"example.org\"\n  data_dir = \"/none\"\n  profiling_enabled = true\n}}\n\
             telemetry {{\n  {telemetry}\n}}\n{plugins}  DataStore \"sql\" {{\n    plugin_data {{\n      \
             database_type = \"sqlite3\"\n      connection_string = \"{}\"\n    }}\n  }}\n}}\n",
            data.display()
        )
    };
    let agent = |telemetry: &str| {
        format!(
            "agent {{\n  data_dir = \"/none\"\n  server_address = \"localhost\"\n  server_port = 8081\n  \
             trust_domain = \"example.org\"\n  profiling_enabled = true\n  insecure_bootstrap = true\n}}\n\
             telemetry {{\n  {telemetry}\n}}\n{plugins}  WorkloadAttestor \"unix\" {{}}\n}}\n"
        )
    };
    let tls = "Prometheus {\n    port = 1\n    tls {\n      cert_file = \"a\"\n    }\n  }";
    let m3 = "M3 = [{ address = \"a:1\" env = \"b\" }]";
    for (program, refused, warned, names) in [
        ("spire-server", server(tls), server(m3), ["profiling_enabled", "4"]),
        ("spire-agent", agent(tls), agent(m3), ["profiling_enabled", "6"]),
    ] {
        let (exit, stdout, stderr) = validate(program, refused.clone());
        assert_eq!((exit, stdout.as_str()), (1, ""), "{stderr}");
        assert!(
            stderr
                .contains("failed to create TLS config for Prometheus: cert_file and key_file must both be configured"),
            "{stderr}"
        );
        assert!(stderr.contains(&at(if program == "spire-server" { "9" } else { "12" })), "{stderr}");

        // with other things wrong, the trust domain among them, it is told all the same
        let broken =
            refused.replace("\"example.org\"", "\"Not One\"").replace("KeyManager \"memory\"", "KeyManager \"none\"");
        let (exit, stdout, stderr) = validate(program, broken);
        assert_eq!((exit, stdout.as_str()), (1, ""), "{stderr}");
        let [key, line] = names;
        let unsupported = format!("warning: {key} is not supported yet");
        for told in [
            "could not parse trust_domain",
            "failed to create TLS config for Prometheus",
            "no built-in plugin \"none\"",
            &unsupported,
        ] {
            assert!(stderr.contains(told), "{told}:\n{stderr}");
        }
        assert!(stderr.contains(&at(line)), "{stderr}");

        let (exit, stdout, stderr) = validate(program, warned);
        assert_eq!(exit, 0, "{stderr}");
        let valid = format!("SPIRE {} configuration file is valid.\n", &program["spire-".len()..]);
        assert_eq!(stdout, valid);
        assert!(stderr.contains(&unsupported), "{stderr}");
        assert!(stderr.contains(&at(line)), "{stderr}");
        assert!(stderr.contains("warning: telemetry M3 is not supported yet and has no effect\n  at "), "{stderr}");
    }
}
