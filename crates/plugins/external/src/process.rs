//! The plugin's process: its program is checked and started, and says where it listens.

use crate::handshake::{self, Address};
use crate::log::{PluginLog, lines};
use finial_config::PluginConfig;
use finial_crypto::hex;
use finial_net::child::{End, dies_with_us};
use finial_runtime::{Spawner, errno_text};
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a plugin may take to say where it listens; go-plugin's.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest first line.
const HANDSHAKE_BYTES_MAX: u64 = 4096;
/// How long the last words of a plugin that has ended are waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A running plugin. Dropping it kills it, and all that it started.
pub(crate) struct Process {
    child: Child,
    /// As long as its number is its own: until its leader is waited for.
    group: Option<Pid>,
    /// That of the leader, which comes before it is waited for.
    end: Option<End>,
    /// Reads what it writes to its standard error.
    words: Option<JoinHandle<()>>,
    pub(crate) address: Address,
}

/// The program of a plugin: never looked for on the PATH.
fn program(config: &PluginConfig) -> Result<PathBuf, String> {
    let command = config.command.as_deref().unwrap_or(Path::new(""));
    std::path::absolute(command).map_err(|e| format!("failed to resolve plugin path: {}", errno_text(&e)))
}

/// Refuses a program that is not there, or not the one whose checksum is configured.
fn check(config: &PluginConfig) -> Result<(), String> {
    let program = program(config)?;
    let failed = |e: &std::io::Error| format!("failed to launch plugin: {}: {}", program.display(), errno_text(e));
    if config.checksum.is_empty() {
        return File::open(&program).map(drop).map_err(|e| failed(&e));
    }
    let is_hex = config.checksum.len().is_multiple_of(2) && config.checksum.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_hex {
        return Err("checksum is not a valid hex string".into());
    }
    if config.checksum.len() != 64 {
        return Err(format!("expected checksum of length 64; got {}", config.checksum.len()));
    }
    let found = sha256(&program).map_err(|e| failed(&e))?;
    if !found.eq_ignore_ascii_case(&config.checksum) {
        return Err(format!(
            "failed to launch plugin: checksums did not match: {} has {found}; if it was meant to change, change \
             plugin_checksum as well",
            program.display()
        ));
    }
    Ok(())
}

fn sha256(program: &Path) -> std::io::Result<String> {
    let mut file = File::open(program)?;
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(digest.finish().as_ref())),
            count => digest.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

/// Starts it, with its sockets in `folder`.
pub(crate) async fn start(
    config: &PluginConfig,
    folder: &Path,
    log: &Arc<PluginLog>,
    spawner: &Spawner,
) -> Result<Process, String> {
    let checked = config.clone();
    spawner.blocking(move || check(&checked)).await.map_err(|e| e.to_string())??;
    let program = program(config)?;
    let mut command = Command::new(&program);
    command
        .args(&config.args)
        .env(&config.kind, &config.kind)
        .env("PLUGIN_PROTOCOL_VERSIONS", handshake::VERSION)
        .env("PLUGIN_MIN_PORT", "10000")
        .env("PLUGIN_MAX_PORT", "25000")
        .env("PLUGIN_UNIX_SOCKET_DIR", folder)
        .env_remove("PLUGIN_CLIENT_CERT")
        .env_remove("PLUGIN_MULTIPLEX_GRPC")
        // Sockets that a supervisor gave us are not for plugins.
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_PID")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Signals from a terminal are for us, who end it in order.
        .process_group(0)
        .kill_on_drop(true);
    dies_with_us(command.as_std_mut());
    let failed =
        |e: &std::io::Error| format!("failed to launch plugin: fork/exec {}: {}", program.display(), errno_text(e));
    let mut child = command.spawn().map_err(|e| failed(&e))?;
    let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let end = group.and_then(|leader| End::of(leader).ok());
    tracing::debug!(plugin_name = config.name, plugin_type = config.kind, path = %program.display(), pid = child.id(), "Plugin started");
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut process = Process { child, group, end, words: None, address: Address::Unix(PathBuf::new()) };
    let (Some(stdout), Some(mut stderr)) = (stdout, stderr) else {
        return Err("failed to launch plugin: no pipes".into());
    };
    let for_errors = log.clone();
    process.words = Some(spawner.spawn("plugin log", async move {
        lines(&mut stderr, |line| for_errors.line(line)).await;
    }));
    let mut stdout = BufReader::new(stdout);
    let said = first_line(&mut stdout).await;
    // Who said something that makes no sense is not waited for.
    let patience = if said.is_ok() { Duration::ZERO } else { LAST_WORDS };
    match said.and_then(|line| handshake::parse(&line)) {
        Ok(address) => process.address = address,
        Err(mut why) => {
            if let Ok(status) = timeout(patience, process.ended()).await {
                why = format!("plugin exited before we could connect: {status}; {why}");
            }
            process.kill();
            process.last_words().await;
            let last = log.last();
            let last = if last.is_empty() { String::new() } else { format!(" (its last words: {last:?})") };
            return Err(format!("failed to launch plugin: {why}{last}"));
        }
    }
    // So that a plugin that writes there does not wait for ever. go-plugin does not log it either.
    spawner.spawn("plugin output", async move { tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await });
    Ok(process)
}

async fn first_line(stdout: &mut BufReader<ChildStdout>) -> Result<String, String> {
    let mut line = Vec::new();
    let mut limited = stdout.take(HANDSHAKE_BYTES_MAX);
    match timeout(START_TIMEOUT, limited.read_until(b'\n', &mut line)).await {
        Err(_) => Err("timeout while waiting for plugin to start: it did not say where it listens".into()),
        Ok(Err(error)) => Err(errno_text(&error)),
        Ok(Ok(0)) => Err("Failed to read any lines from plugin's stdout".into()),
        Ok(Ok(_)) => Ok(String::from_utf8_lossy(&line).into_owned()),
    }
}

impl Process {
    /// Returns when it has ended, and what it started was killed.
    pub(crate) async fn ended(&mut self) -> String {
        if let Some(end) = &self.end {
            end.reached().await;
            self.kill();
        }
        let status = self.child.wait().await;
        // From now on its number may be another one's.
        self.group = None;
        status.map_or_else(|e| e.to_string(), |status: ExitStatus| status.to_string())
    }

    /// Waits until all that it wrote was read, unless someone else still holds the pipe.
    pub(crate) async fn last_words(&mut self) {
        if let Some(words) = self.words.as_mut()
            && timeout(LAST_WORDS, words).await.is_ok()
        {
            self.words = None;
        }
    }

    /// Kills it, and what it started.
    pub(crate) fn kill(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_config::PluginConfig;
    use finial_runtime::Supervisor;

    /// Before its number can be another's. What it started would hold its standard error open.
    #[tokio::test]
    async fn what_it_started_is_killed_before_it_is_waited_for() {
        let data = finial_hcl::parse("").unwrap();
        let script = "echo '1|1|unix|/x|grpc'; sleep 1000 & exit 3";
        let config = PluginConfig {
            command: Some("/bin/sh".into()),
            args: vec!["-c".into(), script.into()],
            ..PluginConfig::inline("WorkloadAttestor", "brief", data)
        };
        let supervisor = Supervisor::default();
        let log = Arc::new(PluginLog::new("brief", "WorkloadAttestor", "sh"));
        let folder = tempfile::tempdir().unwrap();
        let mut process = start(&config, folder.path(), &log, &supervisor.spawner()).await.unwrap();
        assert_eq!(process.ended().await, "exit status: 3");
        assert!(process.group.is_none(), "its number is nobody's, or a stranger's");
        process.last_words().await;
        assert!(process.words.is_none(), "all that it started is gone");
    }
}
