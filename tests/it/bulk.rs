//! `entry create -data` at the size that people have: a hundred thousand entries in one command, a few of them bad.

use std::fmt::Write as _;
use std::process::Command;
use testkit::{Flavor, Output, Server, ServerOptions, Workdir, finial};

const COUNT: usize = 100_000;

/// A bad entry, what is wrong in it, and how the server says so.
const BAD: [(usize, &str, &str); 4] = [
    (
        777,
        r#""federates_with": ["spiffe://nowhere.test"]"#,
        r#"(code: Internal, msg: "failed to create entry: unable to find federated bundle \"spiffe://nowhere.test\"")"#,
    ),
    (12_345, r#""x509_svid_ttl": -5"#, "X509SvidTtl is not set"),
    (50_000, r#""dns_names": ["no name"]"#, "failed to convert entry: invalid DNS name"),
    (99_999, r#""hint": "again""#, r#"(code: AlreadyExists, msg: "similar entry already exists")"#),
];

fn file() -> String {
    let mut text = String::from("{\"entries\": [\n");
    for n in 0..COUNT {
        let id = if n == 99_999 { 3 } else { n };
        let wrong = BAD.iter().find(|(at, ..)| *at == n).map(|(_, wrong, _)| format!(", {wrong}"));
        let end = if n + 1 < COUNT { ",\n" } else { "]}\n" };
        let _ = write!(
            text,
            r#"{{"spiffe_id": "spiffe://example.org/w/{id}", "parent_id": "spiffe://example.org/node/{}", "selectors": [{{"type": "unix", "value": "uid:{id}"}}]{}}}{end}"#,
            id % 100,
            wrong.unwrap_or_default(),
        );
    }
    text
}

#[test]
fn a_hundred_thousand_entries_are_created_and_the_bad_ones_are_named() {
    let server = Server::start(Flavor::Finial, &ServerOptions::default());
    let dir = Workdir::new();
    let (data, created) = (dir.write("entries.json", &file()), dir.path().join("created"));
    // as a person runs it: on a terminal, with the long output in a file
    let line = format!(
        "'{}' entry create -socketPath '{}' -data '{}' >'{}'",
        dir.path().join("spire-server").display(),
        server.socket().display(),
        data.display(),
        created.display()
    );
    std::os::unix::fs::symlink(finial(), dir.path().join("spire-server")).expect("a link");
    let out = Output::of(Command::new("script").args(["-q", "-e", "-c", &line, "/dev/null"]));
    let said = out.stdout.replace("\r\n", "\n");
    assert_eq!(out.code, 1, "{said}");
    assert!(said.trim_end().ends_with("Error: failed to create one or more entries"), "{said}");
    assert_eq!(said.matches("Failed to create the following entry").count(), BAD.len(), "{said}");
    for (n, _, why) in BAD {
        let of = said.split("Failed to create the following entry ").find(|part| part.contains(why));
        let of = of.unwrap_or_else(|| panic!("{why}\n{said}"));
        let id = if n == 99_999 { 3 } else { n };
        assert!(of.contains(&format!("SPIFFE ID               : spiffe://example.org/w/{id}\n")), "{why}\n{of}");
    }
    // how far it was, again and again, and how far it got
    let progress: Vec<&str> = said.split(['\r', '\n']).filter(|line| line.contains("created ")).collect();
    let done: Vec<usize> =
        progress.iter().filter_map(|line| line.split("created ").nth(1)?.split(' ').next()?.parse().ok()).collect();
    assert!(done.len() > 1 && done.is_sorted(), "{progress:?}");
    let good = COUNT - BAD.len();
    let last = format!("created {good} of {COUNT} entries, {} failed, ", BAD.len());
    assert!(progress.last().is_some_and(|line| line.contains(&last)), "{progress:?}");
    let created = std::fs::read_to_string(created).expect("what was created");
    assert_eq!(created.matches("Entry ID ").count(), good);
    assert_eq!(server.command(&["entry", "count"]).ok().stdout, format!("{good} registration entries\n"));
    let shown = server.command(&["entry", "show", "-spiffeID", "spiffe://example.org/w/99998"]).ok().stdout;
    assert!(shown.starts_with("Found 1 entry\n"), "{shown}");
}
