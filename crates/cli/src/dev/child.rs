//! Starts workloads and listens to what they tell.

use super::Trouble;
use super::folder::Folder;
use super::workload::{Event, Task};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// Longest wait for a workload to tell something.
const DEADLINE: Duration = Duration::from_secs(30);

/// A workload. It is ended when this is dropped, and ends by itself when this process is killed, as its input ends.
pub(super) struct Workload<'a> {
    name: &'static str,
    folder: &'a Folder,
    process: Child,
    _input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl<'a> Workload<'a> {
    /// Starts the workload's own program.
    pub(super) fn start(folder: &'a Folder, name: &'static str, task: &Task) -> Result<Self, Trouble> {
        let failed =
            |e: &dyn std::fmt::Display| Trouble::in_log(format!("the workload {name} does not start: {e}"), folder);
        let program = std::env::current_exe().map_err(|e| failed(&e))?;
        let program = folder.make_workload(&program, name).map_err(|e| failed(&e))?;
        let task = serde_json::to_string(task).map_err(|e| failed(&e))?;
        let mut process = Command::new(program)
            .args(["dev", "workload", &task])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            // Ctrl-C at a terminal is for us; we end the workloads.
            .process_group(0)
            .spawn()
            .map_err(|e| failed(&e))?;
        let output = process.stdout.take().ok_or_else(|| failed(&"no output"))?;
        let _input = process.stdin.take();
        Ok(Self { name, folder, process, _input, output: BufReader::new(output).lines() })
    }

    /// The next thing it tells.
    pub(super) async fn next(&mut self) -> Result<Event, Trouble> {
        let name = self.name;
        let failed = |e: &dyn std::fmt::Display| Trouble::in_log(format!("the workload {name}: {e}"), self.folder);
        let line = timeout(DEADLINE, self.output.next_line()).await.map_err(|_| failed(&"tells nothing"))?;
        let line = line.map_err(|e| failed(&e))?.ok_or_else(|| failed(&"ended early"))?;
        match serde_json::from_str(&line).map_err(|e| failed(&e))? {
            Event::Failed { reason } => Err(failed(&reason)),
            event => Ok(event),
        }
    }

    /// Ends it, and waits until it has.
    pub(super) async fn stop(mut self) {
        self._input = None;
        if timeout(Duration::from_secs(2), self.process.wait()).await.is_err() {
            let _ = self.process.kill().await;
        }
    }
}
