//! `slurm`: job and step of a process that `slurmstepd` started, by the cgroup that it put the process into.
//!
//! Only paths directly below `/system.slice` count. That folder is root's: who may make cgroups of his own (a rootless
//! container, a user's session) makes them elsewhere, whatever names he gives them.

use super::process;
use async_trait::async_trait;
use finial_core::{ErrorKind, Selector};
use finial_plugin::{Peer, PluginError, WorkloadAttestor, prefixed_selectors};

/// A line for each of a dozen hierarchies, each with a path of at most 4 KiB.
const CGROUP_BYTES_MAX: usize = 64 << 10;

/// The attestor.
#[derive(Default)]
pub struct Slurm;

impl Slurm {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "slurm";
}

#[async_trait]
impl WorkloadAttestor for Slurm {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let failed = |e: &dyn std::fmt::Display| PluginError::internal(format!("unable to obtain cgroups: {e}"));
        let lines = process::read(peer.proc_dir, "cgroup", CGROUP_BYTES_MAX, |_| false).map_err(|e| failed(&e))?;
        if lines.len() == CGROUP_BYTES_MAX {
            return Err(failed(&"too many of them"));
        }
        let lines = String::from_utf8(lines).map_err(|e| failed(&e))?;
        // Who is of no job has no selectors, which is no failure.
        let Some(step) = find(&lines)? else { return Ok(Vec::new()) };
        let job = match step.job.strip_prefix("job_") {
            Some(number) => format!("job_id:{number}"),
            None => format!("sluid:{}", step.job),
        };
        Ok(prefixed_selectors(Self::NAME, [job, format!("step:{}", step.step)]))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Step<'a> {
    /// `job_NUMBER`, or Slurm's own kind of identifier, which begins with an `s`.
    job: &'a str,
    step: &'a str,
}

/// The step that the lines of a `/proc/PID/cgroup` are about.
fn find(lines: &str) -> Result<Option<Step<'_>>, PluginError> {
    let mut found = None;
    for line in lines.lines() {
        let mut fields = line.splitn(3, ':');
        let Some(path) = fields.nth(2) else {
            let count = line.split(':').count();
            return Err(PluginError::internal(format!(
                "unable to obtain cgroups: invalid cgroup entry, contains {count} colon separated fields but expected at least 3: {line:?}"
            )));
        };
        match (found, step(path)) {
            (_, None) => {}
            (None, first) => found = first,
            (Some(one), Some(other)) if one != other => {
                let (one, other) =
                    (format!("{}/step_{}", one.job, one.step), format!("{}/step_{}", other.job, other.step));
                let message = format!("multiple Slurm jobs found in cgroups ({one}, {other})");
                return Err(PluginError::new(ErrorKind::FailedPrecondition, message));
            }
            _ => {}
        }
    }
    Ok(found)
}

/// `/system.slice/[NODE_]slurmstepd.scope/(job_NUMBER|sID)/step_STEP[/…]`
fn step(path: &str) -> Option<Step<'_>> {
    let mut parts = path.strip_prefix("/system.slice/")?.split('/');
    parts.next()?.strip_suffix("slurmstepd.scope")?;
    let job = parts.next()?;
    let all = |text: &str, is: fn(&u8) -> bool| !text.is_empty() && text.as_bytes().iter().all(is);
    let known = match job.strip_prefix("job_") {
        Some(number) => all(number, u8::is_ascii_digit),
        None => job.strip_prefix('s').is_some_and(|id| all(id, u8::is_ascii_alphanumeric)),
    };
    let step = parts.next()?.strip_prefix("step_").filter(|step| !step.is_empty())?;
    known.then_some(Step { job, step })
}

#[cfg(test)]
#[path = "slurm_tests.rs"]
mod tests;
