use super::super::process::has_groups_line;
use super::super::testing::{Sleeper, values};
use super::*;
use finial_core::{Clock, ManualClock, SystemClock, TrustDomain};
use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn unix(config: &str, clock: Arc<dyn Clock>) -> Unix {
    let trust_domain = TrustDomain::parse("example.org").expect("a name");
    let data = finial_hcl::parse(config).expect("is HCL");
    Unix::new(&data, &PluginContext { trust_domain, clock }).expect("is configured well")
}

fn id(flag: &str) -> String {
    let out = Command::new("id").arg(flag).output().expect("runs id").stdout;
    String::from_utf8(out).expect("text").trim().to_owned()
}

fn real_sleep() -> std::path::PathBuf {
    std::fs::canonicalize("/bin/sleep").expect("sleep is there")
}

#[tokio::test]
async fn a_process_of_ours_has_our_user_and_groups() {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    let found = values(&unix("", Arc::new(SystemClock)), &sleeper.peer()).await;
    let mut expected = BTreeSet::from([format!("uid:{}", id("-u")), format!("gid:{}", id("-g"))]);
    expected.insert(format!("user:{}", id("-un")));
    expected.insert(format!("group:{}", id("-gn")));
    // `id -G` lists the primary group as well; the kernel's list is what counts.
    let status = std::fs::read_to_string("/proc/self/status").expect("reads");
    let groups = status.lines().find_map(|l| l.strip_prefix("Groups:")).expect("a line").split_whitespace();
    let names = Names::of("/etc/group");
    for gid in groups {
        expected.insert(format!("supplementary_gid:{gid}"));
        expected.extend(names.find(gid.parse().expect("a number")).map(|n| format!("supplementary_group:{n}")));
    }
    assert_eq!(found, expected, "no path and no hash unless configured");
}

#[tokio::test]
async fn another_user_is_told_apart() {
    if id("-u") != "0" {
        return; // only root may become someone else
    }
    let sleeper = Sleeper::start(Command::new("sleep").uid(12_345).gid(54_321));
    let found = values(&unix("", Arc::new(SystemClock)), &sleeper.peer()).await;
    // Unknown names just drop their selectors; root's supplementary groups are dropped by the change of the user.
    let expected = ["gid:54321", "uid:12345"].map(str::to_owned);
    assert_eq!(found, BTreeSet::from(expected));
}

#[tokio::test]
async fn the_effective_user_and_supplementary_groups_count() {
    let status = b"Name:\tUid:\t7\nUid:\t1000\t0\t1000\t1000\nGid:\t1000\t5\t6\t7\nFDSize:\t64\nGroups:\t4 24 \n";
    assert_eq!(Owner::of(status).expect("parses"), Owner { uid: 0, gid: 5, groups: vec![4, 24] });
    assert!(Owner::of(b"Uid:\t1\nGid:\t1\t2\nGroups:\n").is_err());
    assert!(Owner::of(b"Uid:\t1\t1\nGid:\t1\t2\n").is_err(), "without groups the answer would be too small");
    assert!(Owner::of(b"Uid:\t1\t1\nGid:\t1\t2\nGroups:\t1 x\n").is_err());
    assert_eq!(Owner::of(b"Uid:\t1\t1\nGid:\t1\t2\nGroups:\n").expect("parses").groups.len(), 0);
    if id("-u") == "0" {
        let mut command = Command::new("setpriv");
        command.args(["--regid=0", "--groups=4,65001", "sleep"]);
        let sleeper = Sleeper::start(&mut command);
        let attestor = unix("", Arc::new(SystemClock));
        // setpriv becomes sleep by exec; until then it has its starter's groups.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let found = loop {
            let found = values(&attestor, &sleeper.peer()).await;
            if found.contains("supplementary_gid:65001") || std::time::Instant::now() > deadline {
                break found;
            }
            tokio::task::yield_now().await;
        };
        for expected in ["uid:0", "user:root", "gid:0", "group:root", "supplementary_gid:4", "supplementary_gid:65001"]
        {
            assert!(found.contains(expected), "{expected} in {found:?}");
        }
    }
}

#[tokio::test]
async fn path_and_hash_are_those_of_the_program() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("my sleep");
    // Copied by another process: a test that forks while we hold the file open for writing would make it "busy".
    assert!(Command::new("cp").arg(real_sleep()).arg(&program).status().expect("runs cp").success());
    let sleeper = Sleeper::start(&mut Command::new(&program));
    let attestor = unix("discover_workload_path = true", Arc::new(SystemClock));
    let found = values(&attestor, &sleeper.peer()).await;
    let content = std::fs::read(&program).expect("reads");
    let (path, hash) =
        (format!("path:{}", program.display()), format!("sha256:{}", finial_crypto::sha256_hex(&content)));
    assert!(found.contains(&path) && found.contains(&hash), "{found:?}");
    // Also when the file is no longer where it was, or another is there: it is the process's program that counts.
    std::fs::remove_file(&program).expect("removes");
    std::fs::write(&program, "something else").expect("writes");
    let found = values(&attestor, &sleeper.peer()).await;
    assert!(found.contains(&format!("{path} (deleted)")) && found.contains(&hash), "{found:?}");
    let no_hash = unix("discover_workload_path = true\nworkload_size_limit = -1", Arc::new(SystemClock));
    assert!(!values(&no_hash, &sleeper.peer()).await.iter().any(|v| v.starts_with("sha256:")));
}

#[tokio::test]
async fn a_program_above_the_limit_fails_the_attestation() {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    let size = std::fs::metadata(real_sleep()).expect("is there").len();
    for (limit, fits) in [(size, true), (size - 1, false)] {
        let config = format!("discover_workload_path = true\nworkload_size_limit = {limit}");
        let result = unix(&config, Arc::new(SystemClock)).attest(&sleeper.peer()).await;
        match result {
            Ok(_) => assert!(fits),
            Err(error) => {
                let pid = sleeper.0.id();
                let expected = format!("SHA256 digest: workload /proc/{pid}/exe exceeds size limit ({size} > {limit})");
                assert_eq!((fits, error.to_string()), (false, expected));
            }
        }
    }
}

#[tokio::test]
async fn hashes_are_remembered_unless_the_file_is_too_new() {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    let changed = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).expect("is there").ctime()
    };
    let ctime = changed(&real_sleep());
    for (now, remembered) in [(ctime + 1, 0), (ctime + 10, 1)] {
        let attestor = unix("discover_workload_path = true", Arc::new(ManualClock::at(now)));
        let first = values(&attestor, &sleeper.peer()).await;
        assert_eq!(attestor.hashes.count(), remembered);
        assert_eq!(values(&attestor, &sleeper.peer()).await, first);
    }
}

#[tokio::test]
async fn a_process_that_is_gone_is_not_attested() {
    let mut sleeper = Sleeper::start(&mut Command::new("sleep"));
    sleeper.0.kill().expect("kills");
    sleeper.0.wait().expect("waits");
    let error = unix("", Arc::new(SystemClock)).attest(&sleeper.peer()).await.expect_err("is gone");
    assert!(error.to_string().starts_with("failed to get process: "), "{error}");
}

proptest::proptest! {
    /// The name of a program is chosen by whoever writes it. The kernel escapes line feeds in it, so it never forges a line.
    #[test]
    fn no_program_name_forges_a_user(name in "[^\n]{0,64}", uid: u32, gid: u32, groups in proptest::collection::vec(proptest::prelude::any::<u32>(), 0..40)) {
        let list: String = groups.iter().map(|g| format!("{g} ")).collect();
        let status = format!("Name:\t{name}\nUid:\t1\t{uid}\t3\t4\nGid:\t1\t{gid}\t3\t4\nGroups:\t{list}\n");
        proptest::prop_assert_eq!(Owner::of(status.as_bytes()).expect("parses"), Owner { uid, gid, groups });
    }

    #[test]
    fn any_bytes_are_answered(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let _ = Owner::of(&bytes);
        let _ = has_groups_line(&bytes);
    }
}
