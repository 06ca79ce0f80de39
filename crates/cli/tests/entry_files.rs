//! Whatever is in a file that a person hands to `entry create`, `update` or `delete`: it ends with an error, not a panic.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use finial_cli::Io;
use proptest::prelude::*;

fn run(command: &[&str], stdin: &[u8]) -> (u8, String) {
    let socket = ["-socketPath", "/none/sock"];
    let args: Vec<String> = command.iter().chain(&socket).map(|a| (*a).to_owned()).collect();
    let (io, _, stderr) = Io::captured(stdin.to_vec(), |_| None);
    let code = finial_cli::spire_server().main(&args, &io);
    (code, stderr.text())
}

const CREATE: [&str; 4] = ["entry", "create", "-data", "-"];

#[test]
fn says_what_is_wrong_with_a_file() {
    for (text, want) in [
        ("", "Error: unexpected end of JSON input\n"),
        (r#"{"entries": 1}"#, "Error: invalid type: integer `1`, expected a sequence at line 1 column 13\n"),
        (r#"{"entries": [{}]}"#, "Error: invalid SPIFFE ID: cannot be empty\n"),
        (r#"{"entries": [{"spiffe_id": "spiffe://a"}]}"#, "Error: invalid parent ID: cannot be empty\n"),
        (
            r#"{"entries": [{"spiffe_id": "spiffe://a", "parent_id": "spiffe://a", "federates_with": ["A"]}]}"#,
            "Error: invalid federated trust domain: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores\n",
        ),
    ] {
        let (code, stderr) = run(&CREATE, text.as_bytes());
        let error: String = stderr.split_inclusive('\n').filter(|line| !line.starts_with("hint: ")).collect();
        assert_eq!((code, error), (1, want.to_owned()), "{text}");
    }
    // in any case of letters, and after fields that are not given
    let text = "{\"x\": null, \"ENTRIES\": [{\"Hint\" : null, \"\\\"\": null, \"dns_names\":null,\n\"note\": \"\\\"admin\\\": null\",\n  \"Admin\": \"yes\"}]}";
    let (_, stderr) = run(&CREATE, text.as_bytes());
    let want = "Error: invalid type: string \"yes\", expected a boolean at line 3 column 16\n";
    assert!(stderr.starts_with(want), "{stderr}");
    let many = r#"{"entries": [{"spiffe_id": "spiffe://a/b", "parent_id": "spiffe://a/c"}, {"spiffe_id": "x"}, {}]}"#;
    let (_, stderr) = run(&CREATE, many.as_bytes());
    let hint = "hint: it is entry 2 of the file, with spiffe_id \"x\", and 1 more cannot be read; nothing was sent\n";
    assert!(stderr.ends_with(hint), "{stderr}");
    // what can be read is sent, in any case of letters
    for text in ["{}", "null", r#"{"ENTRIES": null, "x": 1}"#] {
        assert!(run(&CREATE, text.as_bytes()).1.contains("dial unix /none/sock"), "{text}");
    }
    // a list is no object, and what is wrong names the file
    for (text, want) in [
        ("[]", "Error: the file does not hold a JSON object\nhint: the top of standard input must be an object: "),
        ("\n{x", "Error: key must be a string at line 2 column 2\nhint: this is not JSON: standard input\n"),
    ] {
        let (code, stderr) = run(&CREATE, text.as_bytes());
        assert!(code == 1 && stderr.starts_with(want), "{stderr}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), r#"{"entries": 1}"#).unwrap();
    let path = file.path().display().to_string();
    let (_, stderr) = run(&["entry", "create", "-data", &path], b"");
    assert!(stderr.ends_with(&format!("hint: a field has the wrong type in {path}\n")), "{stderr}");
    let deeper = "[".repeat(100_000);
    assert_eq!(run(&CREATE, deeper.as_bytes()).0, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bytes_of_any_kind(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(run(&CREATE, &bytes).0, 1);
    }

    #[test]
    fn json_of_any_shape(
        field in prop::sample::select(vec!["spiffe_id", "parent_id", "selectors", "x509_svid_ttl", "dns_names", "admin", "entryExpiry", "additional_attributes", "Hint"]),
        value in prop::sample::select(vec!["1", "-1", "1e99", "\"\"", "\"spiffe://a/b\"", "[]", "[null]", "[{}]", "{}", "true", "null", "99999999999999999999"]),
    ) {
        let text = format!(r#"{{"entries":[{{"spiffe_id":"spiffe://a/b","parent_id":"spiffe://a/c","{field}":{value}}}]}}"#);
        for command in [CREATE, ["entry", "update", "-data", "-"], ["entry", "delete", "-file", "-"]] {
            prop_assert_eq!(run(&command, text.as_bytes()).0, 1);
        }
    }
}
