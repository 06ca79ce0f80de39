use super::super::testing::{Sleeper, open_folder, there, values};
use super::*;
use rustix::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

async fn attest(cgroup: &str) -> Result<Vec<String>, PluginError> {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("cgroup"), cgroup).expect("writes");
    let held = open_folder(folder.path());
    let selectors = Slurm.attest(&Peer { pid: 1, proc_dir: held.as_fd() }).await?;
    assert!(selectors.iter().all(|s| s.kind == "slurm"));
    Ok(selectors.into_iter().map(|s| s.value).collect())
}

#[tokio::test]
async fn jobs_and_steps_are_told_by_the_cgroup() {
    for (path, expected) in [
        ("/system.slice/slurmstepd.scope/s5K1KKYAYG5D00/step_0/user/task_0", &["sluid:s5K1KKYAYG5D00", "step:0"][..]),
        ("/system.slice/slurmstepd.scope/job_3385/step_batch/slurm", &["job_id:3385", "step:batch"]),
        ("/system.slice/slurmstepd.scope/job_42/step_extern", &["job_id:42", "step:extern"]),
        ("/system.slice/node1_slurmstepd.scope/job_100/step_1/slurm", &["job_id:100", "step:1"]),
        // Whose paths these are is not Slurm's to say: no job, and no failure.
        ("/system.slice/docker-0123456789abcdef.scope", &[]),
        ("/user.slice/user-1000.slice/session-3.scope", &[]),
        ("/user.slice/user-1000.slice/user@1000.service/slurmstepd.scope/job_999/step_0", &[]),
        ("/user.slice/user-1000.slice/system.slice/slurmstepd.scope/job_999/step_0", &[]),
        ("/../system.slice/slurmstepd.scope/job_999/step_0", &[]),
        ("/system.slice/slurmstepd.scope.d/job_1/step_0", &[]),
        ("/system.slice/a/slurmstepd.scope/job_1/step_0", &[]),
        ("/system.slice/slurmstepd.scope/job_/step_0", &[]),
        ("/system.slice/slurmstepd.scope/job_1x/step_0", &[]),
        ("/system.slice/slurmstepd.scope/s/step_0", &[]),
        ("/system.slice/slurmstepd.scope/system/x/step_0", &[]),
        ("/system.slice/slurmstepd.scope/job_1/step_", &[]),
        ("/system.slice/slurmstepd.scope/job_1", &[]),
        ("/system.slice/slurmstepd.scope/job_1/slurm/step_0", &[]),
        ("", &[]),
    ] {
        assert_eq!(attest(&format!("0::{path}\n")).await.expect("attests"), expected, "{path}");
    }
    let hybrid = "9:name=systemd:/\n4:memory:/x:y\n0::/system.slice/slurmstepd.scope/job_7/step_2/user/task_0\n";
    assert_eq!(attest(hybrid).await.expect("attests"), ["job_id:7", "step:2"]);
}

#[tokio::test]
async fn what_is_no_list_of_cgroups_or_two_jobs_is_refused() {
    let two = "0::/system.slice/slurmstepd.scope/job_1/step_0\n0::/system.slice/slurmstepd.scope/job_2/step_0\n";
    let error = attest(two).await.expect_err("two jobs");
    assert_eq!(error.kind, ErrorKind::FailedPrecondition);
    assert_eq!(error.message, "multiple Slurm jobs found in cgroups (job_1/step_0, job_2/step_0)");
    let error = attest("11:hugetlb\n").await.expect_err("no list");
    let expected = "invalid cgroup entry, contains 2 colon separated fields but expected at least 3: \"11:hugetlb\"";
    assert_eq!(error.message, format!("unable to obtain cgroups: {expected}"));
    let error = attest(&"0::/\n".repeat(20_000)).await.expect_err("too long");
    assert!(error.message.starts_with("unable to obtain cgroups: "), "{error}");
}

/// Where this machine has cgroups of version 2.
fn cgroups() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

/// Real cgroups, removed at the end with the folders above that were made for them.
struct Cgroup(PathBuf, Vec<PathBuf>);

impl Cgroup {
    fn make(path: &str) -> Option<Self> {
        let root = cgroups()?;
        let full = root.join(path);
        let missing = full.ancestors().take_while(|p| *p != root && !p.exists()).map(Path::to_path_buf).collect();
        std::fs::create_dir_all(&full).ok().map(|()| Self(full, missing))
    }

    /// Also when it is another process that just ends.
    fn hold(&self, pid: i32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("moves");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let end = std::time::Instant::now() + super::super::testing::DEADLINE;
        for folder in &self.1 {
            // Busy until the kernel is done with the processes that were in it.
            while std::fs::remove_dir(folder).is_err() && folder.exists() && std::time::Instant::now() < end {
                std::thread::yield_now();
            }
        }
    }
}

#[tokio::test]
async fn real_cgroups_tell_a_job_from_one_that_only_looks_like_it() {
    let number = std::process::id();
    let genuine = Cgroup::make(&format!("system.slice/fin{number}_slurmstepd.scope/job_{number}/step_3/user/task_0"));
    if !there("a writable cgroup hierarchy of version 2", genuine.is_some()) {
        return;
    }
    let genuine = genuine.expect("was asked");
    let forged = format!("fin{number}.slice/system.slice/slurmstepd.scope/job_{number}/step_3");
    let forged = Cgroup::make(&forged).expect("the same place");
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    assert_eq!(values(&Slurm, &sleeper.peer()).await.len(), 0);
    genuine.hold(sleeper.pid());
    let expected = [format!("job_id:{number}"), "step:3".to_owned()].into();
    assert_eq!(values(&Slurm, &sleeper.peer()).await, expected);
    forged.hold(sleeper.pid());
    assert_eq!(values(&Slurm, &sleeper.peer()).await.len(), 0);
    // A name that would be a line of its own is the kernel's to refuse: nobody forges a line.
    let line = forged.0.join("x\n0::\u{2215}system.slice");
    assert!(std::fs::create_dir(&line).is_err(), "a cgroup's name has a line feed");
}

proptest::proptest! {
    #[test]
    fn any_lines_are_answered(lines in "([0-9]{0,2}:[a-z,=]{0,9}:(/system.slice/|/)?(slurmstepd.scope/)?(job_|s)?[0-9a-z/_.]{0,20}\n?){0,4}") {
        let _ = find(&lines);
    }
}
