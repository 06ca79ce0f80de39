//! `validate`: SPIRE's words, and beside them every other problem with its place.

use crate::harness::spire;
use finial_cli::Io;
use std::path::Path;
use std::process::Command;

type Said = (i32, String, String);

fn theirs(bin: &Path, file: &Path) -> Said {
    let output = Command::new(bin).args(["validate", "-config"]).arg(file).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn ours(file: &Path) -> Said {
    let args = ["validate", "-config", file.to_str().unwrap()].map(str::to_owned);
    let (io, stdout, stderr) = Io::captured(Vec::new(), |_| None);
    let code = finial_cli::spire_server().main(&args, &io);
    (i32::from(code), stdout.text(), stderr.text())
}

/// Without places and advice, which SPIRE does not give, and without the end of the last line, which it forgets at times.
fn plain((code, stdout, stderr): Said) -> Said {
    let added = ["at ", "hint: ", "warning: "];
    let lines = stderr.lines().filter(|l| !added.iter().any(|a| l.trim_start().starts_with(a)));
    (code, stdout, lines.collect::<Vec<_>>().join("\n"))
}

const SQL: &str = r#"DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = "/none/db" } }"#;

fn written(file: &Path, server: &str, plugins: &str) {
    let text = format!(
        "server {{\n  trust_domain = \"example.org\"\n  data_dir = \"/none\"\n  socket_path = \"/none/s\"\n  {server}\n}}\nplugins {{\n  {plugins}\n}}\n"
    );
    std::fs::write(file, text).unwrap();
}

#[test]
fn one_problem_is_told_in_spires_words() {
    let Some(bin) = spire() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.conf");
    let memory = format!("{SQL} KeyManager \"memory\" {{}}");
    let mut wrong = Vec::new();
    for (server, plugins) in [
        ("", memory.clone()),
        ("default_x509_svid_ttl = \"1000h\"", memory.clone()),
        ("unknown_key = 1", memory.clone()),
        ("ca_ttl = \"1d\"", memory.clone()),
        ("ca_key_type = \"dsa\"", memory.clone()),
        ("log_level = \"loud\"", memory.clone()),
        ("admin_ids = [\"x\"]", memory.clone()),
        ("proxy_protocol_trusted_cidrs = [\"x\"]", memory.clone()),
        ("federation { federates_with \"x\" { bundle_endpoint_url = \"https://x\" } }", memory.clone()),
        ("", format!("{SQL} KeyManager \"disk\" {{ plugin_data {{}} }}")),
        ("", SQL.into()),
        ("", format!("{memory} KeyManager \"disk\" {{ plugin_data {{ keys_path = \"/none/keys\" }} }}")),
        ("", format!("{memory} NodeAttestor \"x509pop\" {{ plugin_data {{}} }}")),
        ("", format!("{memory} Foo \"bar\" {{}}")),
        ("", "KeyManager \"memory\" {}".into()),
    ] {
        written(&file, server, &plugins);
        let (theirs, ours) = (plain(theirs(&bin, &file)), plain(ours(&file)));
        if theirs != ours {
            wrong.push(format!("{server} {plugins}\nSPIRE {theirs:#?}\nours  {ours:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn all_problems_are_told_at_once_with_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.conf");
    written(
        &file,
        "ca_tll = \"1h\"\n  agent_ttl = \"1x\"\n  bind_port = \"no\"",
        "DataStore \"sql\" { plugin_data { database_type = \"oracle\" } }\n  KeyManager \"dsk\" {}\n  KeyManager \"disk\" { plugin_data {} }\n  NodeAtestor \"x\" {}",
    );
    let (code, stdout, stderr) = ours(&file);
    assert_eq!((code, stdout.as_str()), (1, ""));
    let at = file.display();
    for want in [
        &format!("expected a whole number, found \"no\"\n  at {at}:7:15"),
        &format!(
            "time: unknown unit \"x\" in duration \"1x\"\n  at {at}:6:3\n  hint: write a duration such as 90s, 10m or 1h30m"
        ),
        &format!(
            "unknown configuration detected\n  at {at}:5:3\n  hint: the key \"ca_tll\" is not known in section \"server\": did you mean \"ca_ttl\"?"
        ),
        &format!(
            "KeyManager \"dsk\": failed to load plugin \"dsk\": no built-in plugin \"dsk\" for type \"KeyManager\" (did you mean \"disk\"? there is disk, memory; see docs/compatibility.md for others)\n  at {at}:11:"
        ),
        &format!("KeyManager \"disk\": keys_path is required\n  at {at}:12:"),
        &format!("NodeAtestor \"x\": unsupported plugin type \"NodeAtestor\"\n  at {at}:13:"),
        "hint: did you mean NodeAttestor?",
        "KeyManager: constraint not satisfied: expected exactly 1 but got 2\n  hint: remove the others",
        &format!("DataStore \"sql\": datastore-sql: unsupported database_type: oracle\n  at {at}:10:"),
    ] as [&str; 9]
    {
        assert!(stderr.contains(want), "{want}\n{stderr}");
    }
    written(
        &file,
        "agent_ttl = \"1000h\"\n  experimental { wit_isuer = \"x\" }",
        &format!("{SQL} KeyManager \"memory\" {{}}"),
    );
    let (code, stdout, stderr) = ours(&file);
    assert_eq!((code, stdout.as_str()), (0, "SPIRE server configuration file is valid.\n"), "{stderr}");
    for want in ["warning: agent_ttl is too high", "(did you mean \"wit_issuer\"?)"] {
        assert!(stderr.contains(want), "{want}\n{stderr}");
    }
    written(&file, "agent_ttl = \"1000h\"\n  bind_port = \"no\"", &format!("{SQL} KeyManager \"memory\" {{}}"));
    let (code, _, stderr) = ours(&file);
    assert_eq!(code, 1);
    for want in ["expected a whole number", "warning: agent_ttl is too high"] {
        assert!(stderr.contains(want), "{want}\n{stderr}");
    }
}
