//! `federation …`: arguments, refusals and outputs.

use crate::harness::{Pair, Server};
use std::time::{Duration, Instant};

const WEB: [&str; 6] = [
    "-trustDomain",
    "a.test",
    "-bundleEndpointURL",
    "https://127.0.0.1:1/bundle",
    "-bundleEndpointProfile",
    "https_web",
];

pub(crate) fn federation(pair: &mut Pair, ca: &str) {
    let path = pair.first.folder.parent().unwrap().join("foreign.pem");
    std::fs::write(&path, ca).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let spiffe = pair.first.theirs(&["bundle", "show", "-format", "spiffe"], "").stdout;
    let spiffe_path = pair.first.folder.parent().unwrap().join("foreign.json");
    std::fs::write(&spiffe_path, &spiffe).unwrap();
    let spiffe_path = spiffe_path.to_str().unwrap().to_owned();
    refused_arguments(pair, &path);
    by_flags(pair, &path, &spiffe_path);
    by_file(pair, ca, &spiffe);
    for args in [
        &["federation", "list"][..],
        &["federation", "list", "-output", "json"],
        &["federation", "show"],
        &["federation", "show", "-trustDomain", "a.test"],
        &["federation", "show", "-trustDomain", "a.test", "-output", "json"],
        &["federation", "show", "-trustDomain", "spiffe://b.test"],
        &["federation", "show", "-trustDomain", "none.test"],
        &["federation", "show", "-trustDomain", "No"],
        &["bundle", "list"],
        &["bundle", "list", "-id", "b.test", "-output", "json"],
        &["federation", "refresh"],
        &["federation", "refresh", "-id", "none.test"],
        &["federation", "refresh", "-id", "none.test", "-output", "json"],
        &["federation", "refresh", "-id", "No"],
    ] {
        pair.reads(args);
    }
    refresh(pair);
    for args in [
        &["federation", "delete"][..],
        &["federation", "delete", "-id", "none.test"],
        &["federation", "delete", "-id", "none.test", "-output", "json"],
        &["federation", "delete", "-id", "No"],
        &["federation", "delete", "-id", "a.test"],
        &["federation", "delete", "-id", "spiffe://b.test", "-output", "json"],
        &["federation", "list"],
    ] {
        pair.changes(args, "");
    }
}

fn refused_arguments(pair: &mut Pair, path: &str) {
    let create = |args: &[&'static str]| [&["federation", "create"], args].concat();
    for args in [
        create(&[]),
        create(&["-trustDomain", "a.test"]),
        create(&["-trustDomain", "a.test", "-bundleEndpointURL", "u"]),
        create(&["-trustDomain", "a.test", "-bundleEndpointURL", "u", "-bundleEndpointProfile", "web"]),
        create(&["-trustDomain", "a.test", "-bundleEndpointURL", "u", "-bundleEndpointProfile", "https_spiffe"]),
        [&create(&["-endpointSpiffeID", "No"])[..], &WEB[..4], &["-bundleEndpointProfile", "https_spiffe"]].concat(),
        [&create(&["-trustDomainBundlePath", "/none"])[..], &WEB].concat(),
        [&create(&["-trustDomainBundlePath", "-"])[..], &WEB].concat(),
        create(&["-data", "-", "-trustDomain", "a.test"]),
        create(&["-data", "-", "-trustDomainBundleFormat", "spiffe"]),
        create(&["-data", "/no/such/file"]),
        vec!["federation", "update"],
        vec!["federation", "update", "-data", "/no/such/file"],
        vec!["federation", "update", "-data", "-", "-bundleEndpointURL", "https://x"],
    ] {
        pair.reads(&args);
    }
    // PEM where a document is to be, and nothing where PEM is to be
    let args =
        [&["federation", "create", "-trustDomainBundleFormat", "pem", "-trustDomainBundlePath", "/dev/null"], &WEB[..]];
    pair.reads(&args.concat());
    // a domain, an address and a bundle that only the server refuses
    for (name, url) in
        [("No Domain", "https://x"), ("x.test", "http://x"), ("x.test", "https://u:p@x"), ("example.org", "https://x")]
    {
        let args = ["federation", "create", "-trustDomain", name, "-bundleEndpointURL", url];
        pair.changes(&[&args[..], &["-bundleEndpointProfile", "https_web"]].concat(), "");
    }
    let args = ["federation", "create", "-trustDomain", "No", "-bundleEndpointURL", "https://x"];
    let bundle = ["-bundleEndpointProfile", "https_web", "-trustDomainBundlePath", path, "-output", "json"];
    pair.changes(&[&args[..], &bundle].concat(), "");
}

fn by_flags(pair: &mut Pair, path: &str, spiffe_path: &str) {
    let create = [&["federation", "create"], &WEB[..]].concat();
    let update = [&["federation", "update"], &WEB[..]].concat();
    let spiffe = [
        "-trustDomain",
        "b.test",
        "-bundleEndpointURL",
        "https://127.0.0.1:1",
        "-bundleEndpointProfile",
        "https_spiffe",
        "-endpointSpiffeID",
        "spiffe://b.test/spire/server",
        "-trustDomainBundlePath",
    ];
    pair.changes(&update, "");
    pair.changes(&create, "");
    pair.changes(&create, "");
    pair.changes(&[&create[..], &["-output", "json"]].concat(), "");
    pair.changes(&[&["federation", "create"], &spiffe[..], &[path]].concat(), "");
    pair.changes(&[&update[..], &["-bundleEndpointURL", "https://127.0.0.1:2/x"]].concat(), "");
    pair.changes(&[&update[..], &["-trustDomainBundlePath", path, "-output", "json"]].concat(), "");
    let document = [spiffe_path, "-trustDomainBundleFormat", "spiffe"];
    pair.changes(&[&["federation", "update"], &spiffe[..], &document].concat(), "");
}

fn by_file(pair: &mut Pair, ca: &str, document: &str) {
    let pem = serde_json::to_string(ca).unwrap();
    let good = format!(
        r#"{{"federationRelationships": [
            {{"trustDomain": "c.test", "bundleEndpointURL": "https://c.test/x", "bundleEndpointProfile": "https_web"}},
            {{"TRUSTDOMAIN": "d.test", "bundleEndpointURL": "https://d.test/x", "bundleEndpointProfile": "https_spiffe",
              "endpointSPIFFEID": "spiffe://e.test/endpoint"}},
            {{"trustDomain": "f.test", "bundleEndpointURL": "https://f.test/x", "bundleEndpointProfile": "https_web",
              "trustDomainBundle": {pem}, "trustDomainBundleFormat": "pem", "unknown": 1}},
            {{"trustDomain": "g.test", "bundleEndpointURL": "https://g.test/x", "bundleEndpointProfile": "https_spiffe",
              "endpointSPIFFEID": "spiffe://g.test/endpoint", "trustDomainBundle": {document},
              "trustDomainBundleFormat": "spiffe"}},
            {{"trustDomain": "d.test", "bundleEndpointURL": "https://h.test/x", "bundleEndpointProfile": "https_web"}}
        ]}}"#
    );
    pair.changes(&["federation", "create", "-data", "-"], &good);
    pair.changes(&["federation", "create", "-data", "-", "-output", "json"], &good);
    pair.changes(&["federation", "update", "-data", "-"], &good);
    let one = |rest: &str| {
        format!(
            r#"{{"federationRelationships":[{{"trustDomain":"c.test","bundleEndpointURL":"https://x","bundleEndpointProfile":"https_web"{rest}}}]}}"#
        )
    };
    for text in [
        "",
        "{}",
        "null",
        r#"{"federationRelationships":null}"#,
        r#"{"federationRelationships":[{}]}"#,
        &one(r#","trustDomainBundle":"x""#),
        &one(r#","trustDomainBundle":"x","trustDomainBundleFormat":"der""#),
        &one(r#","trustDomainBundle":{},"trustDomainBundleFormat":"pem""#),
        &one(r#","trustDomainBundle":"","trustDomainBundleFormat":"pem""#),
        &one(r#","endpointSPIFFEID":"ignored""#),
    ] {
        pair.changes(&["federation", "create", "-data", "-"], text);
    }
}

/// A bundle that can be fetched, and one that cannot. A server learns of new relationships when it next looks.
fn refresh(pair: &mut Pair) {
    let folder = pair.first.folder.parent().unwrap().join("foreign");
    let (foreign, port) = Server::foreign(&pair.first.bin, &folder);
    let bundle = foreign.theirs(&["bundle", "show"], "").stdout;
    let path = folder.join("bundle.pem");
    std::fs::write(&path, bundle).unwrap();
    let url = format!("https://127.0.0.1:{port}");
    let created = [
        "federation",
        "create",
        "-trustDomain",
        "foreign.test",
        "-bundleEndpointURL",
        &url,
        "-bundleEndpointProfile",
        "https_spiffe",
        "-endpointSpiffeID",
        "spiffe://foreign.test/spire/server",
        "-trustDomainBundlePath",
        path.to_str().unwrap(),
    ];
    pair.changes(&created, "");
    let start = Instant::now();
    for (server, id) in [(&pair.first, "a.test"), (&pair.first, "foreign.test"), (&pair.second, "foreign.test")] {
        while server.theirs(&["federation", "refresh", "-id", id], "").stderr.contains("no federation relationship") {
            assert!(start.elapsed() < Duration::from_secs(60), "the relationship with {id} is never refreshed");
            std::thread::park_timeout(Duration::from_millis(200));
        }
    }
    pair.reads(&["federation", "refresh", "-id", "a.test"]);
    pair.reads(&["federation", "refresh", "-id", "foreign.test"]);
    pair.reads(&["federation", "refresh", "-id", "spiffe://foreign.test", "-output", "json"]);
}
