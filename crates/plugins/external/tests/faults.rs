//! Programs that are no plugins, or bad ones: each is refused in words that say why, and none is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod shared;

use finial_config::PluginConfig;
use finial_plugins_external::{Plugin, Service};
use shared::{Program, config, own, pids, until};
use std::path::Path;

async fn refusal(config: &PluginConfig) -> String {
    let program = Program::default();
    let refused = Plugin::launch(config, Service::WorkloadAttestor, &program.around).await;
    program.end().await;
    refused.err().expect("is refused").to_string()
}

fn shell(script: &str) -> PluginConfig {
    config("WorkloadAttestor", "bad", Path::new("/bin/sh"), &["-c", script], "")
}

#[tokio::test]
async fn what_is_no_plugin_is_refused_with_its_last_words() {
    for (script, why) in [
        ("exit 7", "plugin exited before we could connect: exit status: 7"),
        ("kill -9 $$", "plugin exited before we could connect: signal: 9"),
        ("echo 'cannot find my library' >&2; exit 1", "last words: \"cannot find my library\""),
        ("echo hello; exec sleep 1000", "Unrecognized remote plugin message: \"hello\""),
        // Chance may put the handshake's bars into the first line.
        ("exec cat /dev/urandom", "failed to launch plugin: "),
        ("exec yes '1|1'", "Unrecognized remote plugin message: \"1|1\""),
        ("exec tr '\\0' x </dev/zero", "Unrecognized remote plugin message"),
        ("echo '1|9|unix|/x|grpc'; exec sleep 1000", "incompatible API version with plugin. Plugin version: 9"),
        ("echo '9|1|unix|/x|grpc'; exec sleep 1000", "incompatible core API version with plugin"),
        ("echo '1|1|unix|/x|netrpc'; exec sleep 1000", "unsupported plugin protocol \"netrpc\""),
        ("echo '1|1|unix|/nonexistent|grpc'; sleep 0.1; exit 5", "failed to initialize plugin"),
    ] {
        let error = refusal(&shell(script)).await;
        assert!(error.starts_with("failed to load plugin \"bad\": failed to "), "{script}: {error}");
        assert!(error.contains(why), "{script}: {error}");
        assert!(error.len() < 2000, "{script}: {error}");
    }
}

/// Time stands still but for waits: the plugin says nothing for ever.
#[tokio::test(start_paused = true)]
async fn one_that_hangs_at_its_start_is_given_up() {
    let error = refusal(&shell("exec sleep 1000")).await;
    assert!(error.contains("timeout while waiting for plugin to start"), "{error}");
}

#[tokio::test]
async fn what_a_refused_plugin_started_is_killed_with_it() {
    let mark = own("mark-grandchild");
    let error = refusal(&shell(&format!("sh -c 'sleep 1000; :' {mark} & echo nonsense; wait"))).await;
    assert!(error.contains("nonsense"), "{error}");
    until("the grandchild is gone", async || pids("mark-grandchild").is_empty()).await;
}

#[tokio::test]
async fn only_the_program_of_the_checksum_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let ran = folder.path().join("ran");
    let with = |checksum: &str| PluginConfig {
        checksum: checksum.to_owned(),
        ..shell(&format!("touch {}; echo nonsense", ran.display()))
    };
    for (checksum, why) in [
        ("xyz", "checksum is not a valid hex string"),
        ("abcd", "expected checksum of length 64; got 4"),
        (&"0".repeat(64), "checksums did not match"),
    ] {
        let error = refusal(&with(checksum)).await;
        assert!(error.contains(why), "{error}");
    }
    assert!(!ran.exists(), "was not started");
    let sum = std::process::Command::new("sha256sum").arg("/bin/sh").output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap()[..64].to_uppercase();
    assert!(refusal(&with(&sum)).await.contains("nonsense"));
    assert!(ran.exists(), "was started");
}

#[tokio::test]
async fn a_program_is_not_looked_for() {
    let error = refusal(&config("WorkloadAttestor", "bad", Path::new("sh"), &[], "")).await;
    assert!(error.contains("no such file or directory"), "{error}");
    let error = refusal(&config("WorkloadAttestor", "bad", Path::new("/etc/passwd"), &[], "")).await;
    assert!(error.contains("fork/exec /etc/passwd: permission denied"), "{error}");
}
