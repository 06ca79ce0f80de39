//! `finial entries`: the same files, against SPIRE's server and ours.

use crate::harness::{Outcome, Pair, Server, spire};

const FILE: &str = "\
entries:
  - entry_id: web
    spiffe_id: spiffe://example.org/team-a/web
    parent_id: spiffe://example.org/agent
    selectors: [{type: unix, value: \"uid:1000\"}, \"unix:gid:1000\"]
    x509_svid_ttl: 3600
    dns_names: [web.test, a.test]
    hint: \"yes\"
  - entry_id: db
    spiffe_id: spiffe://example.org/team-b/db
    parent_id: spiffe://example.org/agent
    selectors: [\"unix:uid:1001\"]
    additional_attributes: {jwt_svid_include_jti: true}
";

/// One flow after the other; what was printed and with which exit code.
fn flow(server: &Server) -> Vec<(String, Outcome)> {
    let mut said = Vec::new();
    let mut run = |args: &[&str], stdin: &str, code: i32| {
        let outcome = server.entries(args, stdin);
        assert_eq!(outcome.code, code, "{args:?}: {outcome:?}");
        said.push((format!("{args:?}"), outcome));
    };
    let count = || server.theirs(&["entry", "count"], "").stdout;
    run(&["export"], "", 0);
    run(&["import", "-f", "-"], FILE, 0);
    assert_eq!(count(), "0 registration entries\n", "a plan changes nothing");
    run(&["import", "-f", "-", "-yes"], FILE, 0);
    assert_eq!(count(), "2 registration entries\n");
    run(&["import", "-f", "-", "-yes"], FILE, 0);
    run(&["diff", "-f", "-"], FILE, 0);
    run(&["export"], "", 0);
    run(&["export", "-format", "json", "-under", "spiffe://example.org/team-a"], "", 0);
    let changed = FILE.replace("3600", "60").replace("gid:1000", "gid:2000").replace("team-b/db", "team-b/database")
        + "  - {spiffe_id: spiffe://example.org/new, parent_id: spiffe://example.org/agent, selectors: [\"a:b\"], entry_id: n}\n";
    run(&["diff", "-f", "-"], &changed, 1);
    run(&["diff", "-f", "-", "-output", "json"], &changed, 1);
    run(&["import", "-f", "-"], &changed, 0);
    run(&["apply", "-f", "-"], &changed, 0);
    run(&["diff", "-f", "-"], &changed, 1);
    run(&["apply", "-f", "-", "-yes"], &changed, 0);
    run(&["diff", "-f", "-"], &changed, 0);
    // SPIRE's command reads what was exported, and finds all of it there
    let exported = server.entries(&["export", "-format", "json", "-withoutIDs"], "").stdout;
    let again = server.theirs(&["entry", "create", "-data", "-"], &exported);
    assert_eq!(again.stderr.matches("similar entry already exists").count(), 3, "{again:?}");
    // what is below one path is another team's only where it is named
    let one = FILE.split_inclusive("hint: \"yes\"\n").next().unwrap();
    run(&["diff", "-f", "-", "-prune", "-under", "spiffe://example.org/team-a"], one, 1);
    run(&["apply", "-f", "-", "-prune", "-under", "spiffe://example.org/team-a", "-yes", "-output", "json"], one, 0);
    assert_eq!(count(), "3 registration entries\n");
    run(&["apply", "-f", "-", "-under", "spiffe://example.org/team-b"], one, 1);
    run(&["apply", "-f", "-", "-prune", "-yes"], one, 0);
    assert_eq!(count(), "1 registration entry\n");
    run(&["apply", "-f", "-", "-prune", "-yes"], "entries: []", 1);
    run(&["diff", "-f", "-"], "entries: [{}]", 2);
    run(&["diff"], "", 2);
    run(&["diff", "-f", "/no/such/file"], "", 2);
    run(&["export", "-format", "toml"], "", 1);
    // what the server refuses is told, and the rest is done
    let foreign = FILE.replace("spiffe://example.org/team-b/db", "spiffe://other.test/db");
    run(&["apply", "-f", "-", "-yes"], &foreign, 1);
    assert_eq!(count(), "1 registration entry\n");
    said
}

#[test]
fn entries_as_files_at_spires_server_and_at_ours() {
    let Some(bin) = spire() else { return };
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::start(&bin, folder.path(), true);
    let (theirs, ours) = (flow(&pair.first), flow(&pair.second));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs, ours);
    }
    let outcome = |n: usize| theirs[n].1.stdout.as_str();
    assert_eq!(outcome(0), "entries: []\n");
    assert_eq!(
        outcome(5),
        "\
entries:
  - entry_id: web
    spiffe_id: spiffe://example.org/team-a/web
    parent_id: spiffe://example.org/agent
    selectors:
      - type: unix
        value: gid:1000
      - type: unix
        value: uid:1000
    x509_svid_ttl: 3600
    dns_names:
      - web.test
      - a.test
    hint: \"yes\"
  - entry_id: db
    spiffe_id: spiffe://example.org/team-b/db
    parent_id: spiffe://example.org/agent
    selectors:
      - type: unix
        value: uid:1001
    additional_attributes:
      jwt_svid_include_jti: true
"
    );
    assert_eq!(
        outcome(7),
        "\
~ spiffe://example.org/team-a/web  (entry web)
    x509_svid_ttl: 3600s -> 60s
    - selectors: unix:gid:1000
    + selectors: unix:gid:2000
~ spiffe://example.org/team-b/db  (entry db)
    spiffe_id: spiffe://example.org/team-b/db -> spiffe://example.org/team-b/database
+ spiffe://example.org/new  (entry n)
    parent_id: spiffe://example.org/agent
    selectors: a:b
1 to create, 2 to change, 0 to delete; 0 unchanged
"
    );
}
