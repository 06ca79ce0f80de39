//! `unix`: what the kernel says of a process: effective user and group, supplementary groups and, when configured, the path
//! and SHA-256 of its program. Of our own, each off by default: the programs of its ancestors, its namespaces, its SELinux context,
//! and paths only where they are true on the host.
//!
//! Everything is read through the process's open `/proc/PID` folder. Three system calls (open, read and close of `status`); four
//! more with `discover_workload_path` (readlink, open, stat and close of `exe`), and once a second one for each of
//! `/etc/passwd` and `/etc/group`. A program is hashed when it is first seen or has changed.

mod around;
pub(super) mod program;

use super::names::Names;
use super::process::{self, Owner};
use around::Namespaces;
use async_trait::async_trait;
use finial_core::{ErrorKind, Selector};
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, WorkloadAttestor, decode, prefixed_selectors};
use program::{Hashes, Host, Program};
use rustix::fd::AsFd;
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    discover_workload_path: bool,
    workload_size_limit: i64,
    verify_workload_path: bool,
    discover_parents: bool,
    discover_namespaces: bool,
    discover_selinux: bool,
}

/// The attestor.
pub struct Unix {
    config: Config,
    users: Names,
    groups: Names,
    hashes: Hashes,
    host: Host,
    host_namespaces: Namespaces,
}

impl Unix {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "unix";

    /// With `discover_workload_path` (default false) and `workload_size_limit` (bytes; 0: no limit; below 0: no hash), and four
    /// keys of our own, each false by default: `verify_workload_path` (a path is only told where the host has this very file
    /// there), `discover_parents`, `discover_namespaces` and `discover_selinux`.
    ///
    /// # Errors
    /// When a value has the wrong type.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        let config: Config = decode(data)?;
        Ok(Self {
            users: Names::of("/etc/passwd"),
            groups: Names::of("/etc/group"),
            hashes: Hashes::new(config.workload_size_limit, context.clock.clone()),
            host: Host::look(),
            host_namespaces: Namespaces::of_host(),
            config,
        })
    }

    async fn program(&self, peer: &Peer<'_>) -> Result<Vec<String>, PluginError> {
        let failed = |what: &'static str| move |e: String| PluginError::internal(format!("{what}: {e}"));
        let path = if self.config.verify_workload_path {
            let program = Program::of(peer.proc_dir).map_err(failed("path lookup"))?;
            self.host.has(&program).await.then_some(program.path)
        } else {
            Some(program::path(peer.proc_dir).map_err(failed("path lookup"))?)
        };
        let mut values: Vec<_> = path.map(|path| format!("path:{path}")).into_iter().collect();
        if self.config.workload_size_limit >= 0 {
            let (hash, _) = self.hashes.of(peer.proc_dir, peer.pid).await.map_err(failed("SHA256 digest"))?;
            values.push(format!("sha256:{hash}"));
        }
        Ok(values)
    }

    /// The programs of all ancestors. What cannot be looked at is left out, never guessed: one without a selector too few
    /// is refused, one with a selector too many would be another.
    async fn parents(&self, peer: &Peer<'_>) -> Result<Vec<String>, PluginError> {
        let chain = program::ancestors(peer.proc_dir);
        let chain = chain.map_err(|e| PluginError::internal(format!("parent lookup: {e}")))?;
        let mut values = Vec::new();
        for ancestor in chain {
            let folder = ancestor.folder.as_fd();
            // One of the kernel, of another user while we are not root, or gone.
            let Ok(program) = Program::of(folder) else { continue };
            if self.config.workload_size_limit >= 0 {
                match self.hashes.of(folder, ancestor.pid).await {
                    Ok((hash, file)) if file == program.file => values.push(format!("parent_sha256:{hash}")),
                    Ok(_) => continue, // it runs another program now
                    Err(error) => tracing::debug!(pid = ancestor.pid, error, "A parent's program is not hashed"),
                }
            }
            if self.host.has(&program).await {
                values.push(format!("parent_path:{}", program.path));
            }
        }
        Ok(values)
    }

    /// What is asked for beyond SPIRE's selectors.
    async fn more(&self, peer: &Peer<'_>) -> Result<Vec<String>, PluginError> {
        let mut values = Vec::new();
        if self.config.discover_parents {
            values.extend(self.parents(peer).await?);
        }
        if self.config.discover_namespaces {
            let found = self.host_namespaces.of(peer.proc_dir);
            values.extend(found.map_err(|e| PluginError::internal(format!("namespace lookup: {e}")))?);
        }
        if self.config.discover_selinux {
            let found = around::selinux(peer.proc_dir);
            values.extend(found.map_err(|e| PluginError::internal(format!("SELinux context lookup: {e}")))?);
        }
        Ok(values)
    }
}

#[async_trait]
impl WorkloadAttestor for Unix {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let status = process::status(peer.proc_dir).map_err(|e| {
            let gone = PluginError::new(ErrorKind::NotFound, format!("failed to get process: {e}"));
            gone.because(format!("reading /proc/{}/status", peer.pid))
        })?;
        let owner = Owner::of(&status)?;
        let mut values = vec![format!("uid:{}", owner.uid)];
        values.extend(self.users.find(owner.uid).map(|name| format!("user:{name}")));
        values.push(format!("gid:{}", owner.gid));
        values.extend(self.groups.find(owner.gid).map(|name| format!("group:{name}")));
        for gid in owner.groups {
            values.push(format!("supplementary_gid:{gid}"));
            values.extend(self.groups.find(gid).map(|name| format!("supplementary_group:{name}")));
        }
        if self.config.discover_workload_path {
            values.extend(self.program(peer).await?);
        }
        values.extend(self.more(peer).await?);
        Ok(prefixed_selectors(Self::NAME, values))
    }
}

#[cfg(test)]
#[path = "unix_tests.rs"]
mod tests;

#[cfg(test)]
mod impostor_tests;
