//! Every management command beside SPIRE's own, against SPIRE's own server: the same arguments to both, and standard output,
//! standard error and exit code must be the same. Runs where SPIRE 1.15.3 is at hand: the folder that `FINIAL_REAL_SPIRE`
//! names, or `~/.cache/finial/spire-1.15.3`.
//!
//! There are two servers on copies of one database: what changes something is asked of one by SPIRE's command and of the
//! other by ours (names that are made up by chance are compared by place), what only reads is asked of the same.
//!
//! Known and meant: SPIRE takes DNS names with blanks, ours refuses them; SPIRE sorts DNS names in the answer to a creation,
//! where ours keeps their order, as both do in every other answer.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr, clippy::print_stdout)]

mod authorities;
mod federation;
mod files;
mod harness;
mod help;
mod validate;

use harness::{Pair, spire};

const CA: &str = include_str!("../data/root.pem");
const FULL: &str = r#"{"entries": [
  {"Spiffe_ID": "spiffe://example.org/file", "parent_id": "spiffe://example.org/spire/agent/x", "entry_id": "from-file",
   "selectors": [{"type": "unix", "value": "uid:1000"}, {"type": "unix", "value": "gid:1"}], "x509_svid_ttl": 60,
   "jwt_svid_ttl": 30, "federates_with": ["spiffe://a.test"], "admin": true, "downstream": true, "unknown": null,
   "entryExpiry": 2000000000, "dns_names": ["a.example", "z.example"], "hint": "<a> & 'hint'",
   "additional_attributes": {"disable_x509_svid_prefetch": true, "jwt_svid_include_jti": true}},
  {"spiffe_id": "spiffe://example.org/stored", "parent_id": "spiffe://example.org/spire/agent/x", "entry_id": "stored",
   "selectors": [{"type": "aws", "value": "secret:s"}], "store_svid": true, "dns_names": null},
  {"spiffe_id": "spiffe://example.org/file", "parent_id": "spiffe://example.org/spire/agent/x",
   "selectors": [{"type": "unix", "value": "gid:1"}, {"type": "unix", "value": "uid:1000"}]}
]}"#;

#[test]
fn each_command_beside_spires_own() {
    let Some(bin) = spire() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut pair = Pair::start(&bin, folder.path(), false);
    help::help(&mut pair);
    help::itself(&mut pair);
    usage(&mut pair);
    bundles(&mut pair);
    entries(&mut pair);
    agents(&mut pair);
    tokens(&mut pair);
    minting(&mut pair);
    minted_files(&pair);
    federation::federation(&mut pair, CA);
    authorities::local(&mut pair);
    pair.finish();
}

/// The same questions, all asked by SPIRE's commands: of SPIRE's server and of ours.
#[test]
fn our_server_answers_spires_commands_as_spires_own() {
    let Some(bin) = spire() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut pair = Pair::start(&bin, folder.path(), true);
    bundles(&mut pair);
    entries(&mut pair);
    agents(&mut pair);
    tokens(&mut pair);
    minting(&mut pair);
    federation::federation(&mut pair, CA);
    authorities::local(&mut pair);
    pair.finish();
}

#[test]
fn authorities_below_an_upstream_authority() {
    let Some(bin) = spire() else { return };
    for servers in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        authorities::upstream(&bin, folder.path(), servers);
    }
}

const COMMANDS: [&str; 26] = [
    "entry create",
    "entry update",
    "entry show",
    "entry count",
    "entry delete",
    "agent list",
    "agent show",
    "agent count",
    "agent ban",
    "agent evict",
    "agent purge",
    "token generate",
    "bundle show",
    "bundle list",
    "bundle set",
    "bundle delete",
    "bundle count",
    "x509 mint",
    "jwt mint",
    "wit mint",
    "federation create",
    "federation update",
    "federation show",
    "federation list",
    "federation delete",
    "federation refresh",
];

fn usage(pair: &mut Pair) {
    for command in COMMANDS {
        let words: Vec<&str> = command.split(' ').collect();
        pair.reads(&[words[0], words[1], "-help"]);
        pair.reads(&[words[0], words[1], "-nope"]);
        pair.reads(&[words[0], words[1], "-output", "xml"]);
        // a socket where nobody listens
        pair.reads(&[words[0], words[1], "-socketPath", "{folder}/none", "-instance", "x"]);
    }
    for args in [
        &["entry", "show", "-socketPath", "{folder}/none"][..],
        &["agent", "list", "-socketPath", "{folder}/none", "-output", "json"],
        &["bundle", "count", "-socketPath", "{folder}/conf"],
    ] {
        pair.reads(args);
    }
}

fn bundles(pair: &mut Pair) {
    let path = pair.first.folder.parent().unwrap().join("root.pem");
    std::fs::write(&path, CA).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let spiffe = pair.first.theirs(&["bundle", "show", "-format", "spiffe"], "").stdout;
    for (args, stdin) in [
        (vec!["bundle", "set"], ""),
        (vec!["bundle", "set", "-id", "spiffe://a.test", "-path", &path], ""),
        (vec!["bundle", "set", "-id", "a.test"], CA),
        (vec!["bundle", "set", "-id", "b.test", "-output", "json"], CA),
        (vec!["bundle", "set", "-id", "spiffe://c.test", "-format", "SPIFFE"], &spiffe),
        (vec!["bundle", "set", "-id", "spiffe://d.test", "-format", "spiffe"], "{}"),
        (vec!["bundle", "set", "-id", "spiffe://d.test"], ""),
        (vec!["bundle", "set", "-id", "spiffe://d.test", "-format", "der"], CA),
        (vec!["bundle", "set", "-id", "spiffe://d.test", "-path", "/no/such/file"], ""),
        (vec!["bundle", "set", "-id", "spiffe://example.org"], CA),
        (vec!["bundle", "set", "-id", "no domain"], CA),
        (vec!["bundle", "delete"], ""),
        (vec!["bundle", "delete", "-id", "spiffe://none.test"], ""),
        (vec!["bundle", "delete", "-id", "spiffe://none.test", "-output", "json"], ""),
        (vec!["bundle", "delete", "-id", "spiffe://b.test", "-mode", "some"], ""),
        (vec!["bundle", "delete", "-id", "spiffe://b.test"], ""),
    ] {
        pair.changes(&args, stdin);
    }
    for args in [
        &["bundle", "show"][..],
        &["bundle", "show", "-format", "spiffe"],
        &["bundle", "show", "-format", "der"],
        &["bundle", "show", "-output", "json"],
        &["bundle", "list"],
        &["bundle", "list", "-format", "spiffe"],
        &["bundle", "list", "-output", "json"],
        &["bundle", "list", "-id", "spiffe://a.test"],
        &["bundle", "list", "-id", "spiffe://a.test", "-output", "json"],
        &["bundle", "list", "-id", "spiffe://none.test"],
        &["bundle", "count"],
        &["bundle", "count", "-output", "json"],
    ] {
        pair.reads(args);
    }
}

/// An entry by flags.
const W: [&str; 6] = [
    "-spiffeID",
    "spiffe://example.org/w",
    "-parentID",
    "spiffe://example.org/spire/agent/x",
    "-selector",
    "unix:uid:1",
];

type Case = (Vec<&'static str>, &'static str);

/// Arguments and standard input that create entries, or are refused.
fn creations() -> Vec<Case> {
    let with = |extra: &[&'static str]| [&["entry", "create"], &W[..], extra].concat();
    vec![
        (with(&[]), ""),
        (with(&[]), ""),
        (with(&["-output", "json"]), ""),
        (
            with(&[
                "-selector",
                "unix:gid:2",
                "-entryID",
                "mine",
                "-x509SVIDTTL",
                "60",
                "-jwtSVIDTTL",
                "0x10",
                "-hint",
                "h",
                "-dns",
                "a.b",
                "-dns",
                "c.d",
            ]),
            "",
        ),
        (with(&["-selector", "unix:gid:3", "-entryID", "mine"]), ""),
        (
            with(&[
                "-selector",
                "unix:gid:4",
                "-federatesWith",
                "spiffe://a.test",
                "-admin",
                "-downstream",
                "-entryExpiry",
                "2000000000",
            ]),
            "",
        ),
        (with(&["-selector", "unix:gid:5", "-federatesWith", "spiffe://none.test"]), ""),
        (with(&["-selector", "unix:gid:6", "-storeSVID", "-output=json"]), ""),
        (with(&["-selector", "k8s:ns:7", "-storeSVID"]), ""),
        (with(&["-selector", "unix:gid:8", "-disableX509SVIDPrefetch", "-jwtSVIDIncludeJTI"]), ""),
        (with(&["-selector", "none"]), ""),
        (with(&["-selector", "unix:gid:9", "-entryID", "not/valid"]), ""),
        (with(&["-x509SVIDTTL", "-1"]), ""),
        (with(&["-jwtSVIDTTL", "-1"]), ""),
        (with(&["-x509SVIDTTL", "3000000000"]), ""),
        (vec!["entry", "create"], ""),
        (vec!["entry", "create", "-selector", "a:b"], ""),
        (vec!["entry", "create", "-selector", "a:b", "-parentID", "spiffe://example.org/p"], ""),
        (
            vec![
                "entry",
                "create",
                "-selector",
                "a:b",
                "-parentID",
                "spiffe://example.org/p",
                "-spiffeID",
                "example.org/w",
            ],
            "",
        ),
        (vec!["entry", "create", "-selector", "a:b", "-parentID", "p", "-spiffeID", "spiffe://example.org/w"], ""),
        (vec!["entry", "create", "-selector", "a:b", "-node", "-spiffeID", "spiffe://example.org/node"], ""),
        (
            vec![
                "entry",
                "create",
                "-selector",
                "a:b",
                "-node",
                "-spiffeID",
                "spiffe://example.org/node",
                "-federatesWith",
                "x",
            ],
            "",
        ),
        (
            vec![
                "entry",
                "create",
                "-selector",
                "a:b",
                "-parentID",
                "spiffe://other.org/p",
                "-spiffeID",
                "spiffe://example.org/w",
            ],
            "",
        ),
        (vec!["entry", "create", "-data", "-"], FULL),
        (vec!["entry", "create", "-data", "-", "-output", "json"], FULL),
        (vec!["entry", "create", "-data", "-"], r#"{"entries":[{"spiffe_id":"x"}]}"#),
        (vec!["entry", "create", "-data", "-"], "{}"),
        (vec!["entry", "create", "-data", "/no/such/file"], ""),
    ]
}

/// The same of what changes them.
fn updates() -> Vec<Case> {
    let update = |extra: &[&'static str]| [&["entry", "update", "-entryID", "mine"], &W[..], extra].concat();
    vec![
        (update(&["-hint", "new", "-selector", "unix:x:y"]), ""),
        (update(&["-jwtSVIDIncludeJTI", "-output", "json"]), ""),
        (update(&["-disableX509SVIDPrefetch"]), ""),
        (update(&["-federatesWith", "none.test"]), ""),
        (vec!["entry", "update"], ""),
        (vec!["entry", "update", "-entryID", "mine"], ""),
        (vec!["entry", "update", "-entryID", "mine", "-selector", "a:b"], ""),
        (vec!["entry", "update", "-entryID", "mine", "-selector", "a:b", "-parentID", "spiffe://example.org/p"], ""),
        ([&["entry", "update", "-entryID", "none"], &W[..]].concat(), ""),
        ([&["entry", "update", "-entryID", "none", "-jwtSVIDIncludeJTI"], &W[..]].concat(), ""),
        ([&["entry", "update", "-entryID", "none", "-output", "json"], &W[..]].concat(), ""),
        (
            vec!["entry", "update", "-data", "-"],
            r#"{"entries":[{"entry_id":"from-file","spiffe_id":"spiffe://example.org/u","parent_id":"spiffe://example.org/p","selectors":[{"type":"a","value":"b"}]}]}"#,
        ),
    ]
}

fn entries(pair: &mut Pair) {
    for (args, stdin) in creations().into_iter().chain(updates()) {
        pair.changes(&args, stdin);
    }
    entries_read(pair);
    // more than one page
    let many = (0..1203).map(|n| {
        format!(r#"{{"spiffe_id":"spiffe://example.org/many/{n}","parent_id":"spiffe://example.org/p","entry_id":"many-{n}","selectors":[{{"type":"n","value":"{n}"}}]}}"#)
    });
    let many = format!(r#"{{"entries":[{}]}}"#, many.collect::<Vec<_>>().join(","));
    pair.changes(&["entry", "create", "-data", "-"], &many);
    // only these: SPIRE leaves the order of entries that differ in their ID alone to chance
    pair.reads(&["entry", "show", "-parentID", "spiffe://example.org/p"]);
    pair.reads(&["entry", "count"]);
    let ids = (0..1203).map(|n| format!("\"many-{n}\"")).collect::<Vec<_>>().join(",");
    pair.changes(&["entry", "delete", "-file", "-"], &format!(r#"{{"ids":[{ids}]}}"#));
    for (args, stdin) in [
        (vec!["entry", "delete"], ""),
        (vec!["entry", "delete", "-entryID", "stored"], ""),
        (vec!["entry", "delete", "-entryID", "stored"], ""),
        (vec!["entry", "delete", "-entryID", "stored", "-output", "json"], ""),
        (vec!["entry", "delete", "-file", "-"], r#"{"ids": ["mine", "none", ""]}"#),
        (vec!["entry", "delete", "-file", "-"], r#"{"ids": ["from-file"]}"#),
        (vec!["entry", "delete", "-file", "/no/such/file"], ""),
        (vec!["bundle", "delete", "-id", "a.test"], ""),
        (vec!["bundle", "delete", "-id", "a.test", "-mode", "dissociate"], ""),
        (vec!["entry", "count", "-output", "json"], ""),
    ] {
        pair.changes(&args, stdin);
    }
}

fn entries_read(pair: &mut Pair) {
    for args in [
        &["entry", "show"][..],
        &["entry", "show", "-output", "json"],
        &["entry", "show", "-entryID", "mine"],
        &["entry", "show", "-entryID", "mine", "-output", "json"],
        &["entry", "show", "-entryID", "none"],
        &["entry", "show", "-entryID", "mine", "-spiffeID", "spiffe://example.org/w"],
        &["entry", "show", "-spiffeID", "spiffe://example.org/w"],
        &["entry", "show", "-spiffeID", "w"],
        &["entry", "show", "-parentID", "spiffe://example.org/spire/server"],
        &["entry", "show", "-parentID", "p"],
        &["entry", "show", "-downstream"],
        &["entry", "show", "-hint", "new"],
        &["entry", "show", "-selector", "unix:uid:1"],
        &["entry", "show", "-selector", "unix:uid:1", "-matchSelectorsOn", "exact"],
        &["entry", "show", "-selector", "unix:uid:1", "-selector", "unix:gid:4", "-matchSelectorsOn", "subset"],
        &["entry", "show", "-selector", "unix:gid:4", "-selector", "k8s:ns:7", "-matchSelectorsOn", "any"],
        &["entry", "show", "-selector", "unix:uid:1", "-matchSelectorsOn", "some"],
        &["entry", "show", "-selector", "none"],
        &["entry", "show", "-federatesWith", "spiffe://a.test"],
        &["entry", "show", "-federatesWith", "a.test", "-matchFederatesWithOn", "exact", "-output", "json"],
        &["entry", "show", "-federatesWith", "a.test", "-matchFederatesWithOn", "some"],
        &["entry", "show", "-spiffeID", "spiffe://example.org/none"],
        &["entry", "show", "-spiffeID", "spiffe://example.org/none", "-output", "json"],
        &["entry", "count"],
        &["entry", "count", "-spiffeID", "spiffe://example.org/node"],
        &["entry", "count", "-selector", "unix:uid:1", "-output", "json"],
        &["entry", "count", "-selector", "none"],
        &["entry", "count", "-parentID", "p"],
        &["entry", "count", "-federatesWith", "a.test", "-hint", "x"],
    ] {
        pair.reads(args);
    }
}

fn agents(pair: &mut Pair) {
    for args in [
        &["agent", "list"][..],
        &["agent", "list", "-output", "json"],
        &["agent", "list", "-attestationType", "join_token"],
        &["agent", "list", "-attestationType", "none"],
        &["agent", "list", "-attestationType", "none", "-output", "json"],
        &["agent", "list", "-canReattest", "true"],
        &["agent", "list", "-canReattest=false"],
        &["agent", "list", "-canReattest", "maybe", "-banned", "true"],
        &["agent", "list", "-selector", "x509pop:subject:cn:a", "-matchSelectorsOn", "any"],
        &["agent", "list", "-selector", "x509pop:subject:cn:a", "-matchSelectorsOn", "some"],
        &["agent", "list", "-selector", "none"],
        &["agent", "list", "-expiresBefore", "2020-01-01 00:00:00 +0000 +00"],
        &["agent", "count"],
        &["agent", "count", "-expiresBefore", "2018-01-01 00:00:00 +0000 +00"],
        &["agent", "count", "-output", "json", "-banned", "false"],
        &["agent", "show"],
        &["agent", "show", "-spiffeID", "x"],
        &["agent", "show", "-spiffeID", "spiffe://example.org/spire/agent/none"],
        &["agent", "show", "-spiffeID", "spiffe://example.org/w"],
        &["agent", "show", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/one"],
        &["agent", "show", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/one", "-output", "json"],
        &["agent", "purge", "-dryRun"],
        &["agent", "purge", "-dryRun", "-output", "json"],
        &["agent", "purge", "-dryRun", "-expiredFor", "1000000h"],
        &["agent", "purge", "-dryRun", "-expiredFor", "1000000h", "-output", "json"],
    ] {
        pair.reads(args);
    }
    for args in [
        &["agent", "ban"][..],
        &["agent", "ban", "-spiffeID", "spiffe://example.org/spire/agent/none"],
        &["agent", "ban", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/one"],
        &["agent", "ban", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/one", "-output", "json"],
        &["agent", "list", "-banned", "true"],
        &["agent", "show", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/one"],
        &["agent", "evict"],
        &["agent", "evict", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/gone"],
        &["agent", "evict", "-spiffeID", "spiffe://example.org/spire/agent/x509pop/gone"],
        &["agent", "evict", "-spiffeID", "spiffe://example.org/spire/agent/join_token/t", "-output", "json"],
        &["agent", "purge"],
        &["agent", "purge"],
        &["agent", "list"],
    ] {
        pair.changes(args, "");
    }
}

fn tokens(pair: &mut Pair) {
    for args in [
        &["token", "generate"][..],
        &["token", "generate", "-spiffeID", "spiffe://example.org/node", "-ttl", "60"],
        &["token", "generate", "-spiffeID", "spiffe://example.org/node", "-output", "json"],
        &["token", "generate", "-spiffeID", "node"],
        &["token", "generate", "-spiffeID", "spiffe://example.org/spire/x"],
        &["token", "generate", "-ttl", "0"],
        &["token", "generate", "-ttl", "3000000000"],
    ] {
        pair.changes(args, "");
    }
}

/// What is minted differs by nature; where it stands does not.
fn minting(pair: &mut Pair) {
    for args in [
        &["x509", "mint"][..],
        &["x509", "mint", "-spiffeID", "w"],
        &["x509", "mint", "-spiffeID", "spiffe://other.org/w"],
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-write", "/no/such/folder"],
        &["wit", "mint"],
        &["wit", "mint", "-spiffeID", "w"],
        &["wit", "mint", "-spiffeID", "spiffe://other.org/w"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-keyType", "ec-p384"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-keyType", "EC-P256"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-signingAlgorithm", "ES384"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-signingAlgorithm", "PS256"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-signingAlgorithm", "ES512"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-write", "/no/such/folder"],
        &["jwt", "mint"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w"],
        &["jwt", "mint", "-spiffeID", "w", "-audience", "a"],
        &["jwt", "mint", "-spiffeID", "spiffe://other.org/w", "-audience", "a"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w", "-audience", "a", "-write", "/no/such/folder/t"],
    ] {
        pair.reads(args);
    }
    for args in [
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-dns", "a.b"][..],
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-ttl", "-5s"],
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-ttl", "2000h"],
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-output", "json"],
        &["x509", "mint", "-spiffeID", "spiffe://example.org/w", "-write", "{folder}"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-ttl", "2000h"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-output", "json"],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-keyType", "rsa-2048", "-signingAlgorithm", "PS512"],
        &[
            "wit",
            "mint",
            "-spiffeID",
            "spiffe://example.org/w",
            "-keyType",
            "ec-p384",
            "-signingAlgorithm",
            "ES384",
            "-output",
            "json",
        ],
        &["wit", "mint", "-spiffeID", "spiffe://example.org/w", "-write", "{folder}"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w", "-audience", "a", "-audience", "b"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w", "-audience", "a", "-ttl", "2000h"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w", "-audience", "a", "-output", "json"],
        &["jwt", "mint", "-spiffeID", "spiffe://example.org/w", "-audience", "a", "-write", "{folder}/token"],
    ] {
        pair.mints(args);
    }
}

fn minted_files(pair: &Pair) {
    let file = |name: &str| pair.first.folder.join(name);
    for (name, mode) in
        [("svid.pem", 0o644), ("key.pem", 0o600), ("bundle.pem", 0o644), ("token", 0o600), ("key", 0o600)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(file(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
    }
    let leaf = finial_crypto::pem::certificates(&std::fs::read(file("svid.pem")).unwrap()).unwrap().remove(0);
    let leaf = finial_crypto::Certificate::parse(leaf).unwrap();
    assert_eq!(leaf.uri_sans().len(), 1);
    let key = finial_crypto::pem::private_key(&std::fs::read(file("key.pem")).unwrap()).unwrap();
    assert_eq!(key.public_key().spki_der().as_ref(), leaf.spki_der());
}
