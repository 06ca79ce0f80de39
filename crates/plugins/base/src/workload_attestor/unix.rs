//! `unix`: what the kernel says of a process: effective user and group, supplementary groups and, when configured, the path
//! and SHA-256 of its program.
//!
//! Everything is read through the process's open `/proc/PID` folder. Three system calls (open, read and close of `status`); four
//! more with `discover_workload_path` (readlink, open, stat and close of `exe`), and once a second one for each of
//! `/etc/passwd` and `/etc/group`. A program is hashed when it is first seen or has changed.

use super::names::Names;
use async_trait::async_trait;
use finial_core::{Clock, ErrorKind, Selector, UnixSeconds};
use finial_crypto::hex;
use finial_hcl::Value;
use finial_plugin::{Peer, PluginContext, PluginError, WorkloadAttestor, decode, prefixed_selectors};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, openat, readlinkat};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

/// The largest `/proc/PID/status` that is read; a process may have 65,536 groups.
const STATUS_BYTES_MAX: usize = 1 << 20;
/// Programs whose hash is remembered.
const HASHES_MAX: usize = 1024;
/// A file changed later than this before now may be changed again without a new time stamp, so its hash is not remembered.
const SETTLED_AFTER_SECONDS: UnixSeconds = 2;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    discover_workload_path: bool,
    #[serde(default)]
    workload_size_limit: i64,
}

/// When these are the same, the content is: any write sets the ctime.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl FileStamp {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as i64,
            mtime: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            ctime: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }
}

/// The attestor.
pub struct Unix {
    config: Config,
    users: Names,
    groups: Names,
    hashes: Mutex<HashMap<FileStamp, Arc<str>>>,
    clock: Arc<dyn Clock>,
}

impl Unix {
    /// The name of the attestor, and the type of its selectors.
    pub const NAME: &str = "unix";

    /// With `discover_workload_path` (default false) and `workload_size_limit` (bytes; 0: no limit; below 0: no hash).
    ///
    /// # Errors
    /// When a value has the wrong type.
    pub fn new(data: &Value, context: &PluginContext) -> Result<Self, PluginError> {
        Ok(Self {
            config: decode(data)?,
            users: Names::of("/etc/passwd"),
            groups: Names::of("/etc/group"),
            hashes: Mutex::default(),
            clock: context.clock.clone(),
        })
    }

    async fn program(&self, peer: &Peer<'_>) -> Result<Vec<String>, PluginError> {
        let failed = |what: &str, e: &dyn std::fmt::Display| PluginError::internal(format!("{what}: {e}"));
        let path = readlinkat(peer.proc_dir, "exe", Vec::with_capacity(256)).map_err(|e| failed("path lookup", &e))?;
        let path = path.into_string().map_err(|e| failed("path lookup", &e))?;
        let mut values = vec![format!("path:{path}")];
        if self.config.workload_size_limit >= 0 {
            // Through /proc, so that it is this process's program, whatever the path means in our mount namespace. Not
            // blocking, in case it should be something else than a regular file.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let exe = openat(peer.proc_dir, "exe", flags, Mode::empty()).map_err(|e| failed("SHA256 digest", &e))?;
            let hash = self.hash(File::from(exe), peer.pid).await.map_err(|e| failed("SHA256 digest", &e))?;
            values.push(format!("sha256:{hash}"));
        }
        Ok(values)
    }

    async fn hash(&self, file: File, pid: i32) -> Result<Arc<str>, String> {
        let stat = fstat(&file).map_err(|e| e.to_string())?;
        let (stamp, limit) = (FileStamp::of(&stat), self.config.workload_size_limit);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("not a regular file".to_owned());
        }
        if limit > 0 && stamp.size > limit {
            return Err(format!("workload /proc/{pid}/exe exceeds size limit ({} > {limit})", stamp.size));
        }
        if let Some(hash) = self.hashes.lock().unwrap_or_else(PoisonError::into_inner).get(&stamp) {
            return Ok(hash.clone());
        }
        let hashed = tokio::task::spawn_blocking(move || sha256(file, stamp.size)).await;
        let hash: Arc<str> = hashed.map_err(|e| e.to_string())??.into();
        if self.clock.now() - stamp.ctime.0 > SETTLED_AFTER_SECONDS {
            let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
            if hashes.len() >= HASHES_MAX {
                hashes.clear();
            }
            hashes.insert(stamp, hash.clone());
        }
        Ok(hash)
    }
}

/// SHA-256 of the file, which must have the size that was looked up.
fn sha256(mut file: File, size: i64) -> Result<String, String> {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0i64;
    loop {
        let count = file.read(&mut buffer).map_err(|e| e.to_string())?;
        if count == 0 {
            break;
        }
        total = total.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
        context.update(buffer.get(..count).unwrap_or_default());
        if total > size {
            break;
        }
    }
    if total != size {
        return Err("the file changed while it was read".to_owned());
    }
    Ok(hex(context.finish().as_ref()))
}

#[async_trait]
impl WorkloadAttestor for Unix {
    fn name(&self) -> &str {
        Self::NAME
    }

    async fn attest(&self, peer: &Peer<'_>) -> Result<Vec<Selector>, PluginError> {
        let status = read_status(peer)?;
        let owner = parse_status(&status)?;
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
        Ok(prefixed_selectors(Self::NAME, values))
    }
}

/// `/proc/PID/status` up to the line that we need last. Usually one read.
fn read_status(peer: &Peer<'_>) -> Result<Vec<u8>, PluginError> {
    let failed = |e: &dyn std::fmt::Display| {
        let gone = PluginError::new(ErrorKind::NotFound, format!("failed to get process: {e}"));
        gone.because(format!("reading /proc/{}/status", peer.pid))
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(peer.proc_dir, "status", flags, Mode::empty()).map_err(|e| failed(&e))?;
    let mut status = vec![0; 4096];
    let mut length = 0;
    loop {
        let room = status.get_mut(length..).unwrap_or_default();
        let count = rustix::io::read(&file, room).map_err(|e| failed(&e))?;
        length += count;
        let known = status.get(..length).unwrap_or_default();
        if count == 0 || has_groups_line(known) || length >= STATUS_BYTES_MAX {
            break;
        }
        if length == status.len() {
            status.resize(length * 4, 0);
        }
    }
    status.truncate(length);
    Ok(status)
}

fn has_groups_line(status: &[u8]) -> bool {
    // Lines end with a line feed, so the last piece is empty or a line that is not complete.
    let mut lines = status.split(|b| *b == b'\n');
    lines.next_back();
    lines.any(|line| line.starts_with(b"Groups:"))
}

#[derive(Debug, PartialEq)]
struct Owner {
    /// Effective.
    uid: u32,
    /// Effective.
    gid: u32,
    groups: Vec<u32>,
}

/// Reads the lines `Uid`, `Gid` (real, effective, saved, file system) and `Groups`.
fn parse_status(status: &[u8]) -> Result<Owner, PluginError> {
    // `Name` is the first line and the process chooses it, but the kernel escapes line feeds in it.
    let line = |key: &str| {
        let found = status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(key.as_bytes()));
        found.and_then(|rest| std::str::from_utf8(rest).ok()).map(str::split_ascii_whitespace)
    };
    let effective = |key: &str| line(key).and_then(|mut numbers| numbers.nth(1)).and_then(|n| n.parse().ok());
    let internal = PluginError::internal;
    let uid = effective("Uid:").ok_or_else(|| internal("UIDs lookup: no UIDs for process"))?;
    let gid = effective("Gid:").ok_or_else(|| internal("GIDs lookup: no GIDs for process"))?;
    let groups = line("Groups:").ok_or_else(|| internal("supplementary GIDs lookup: no groups for process"))?;
    let groups = groups.map(str::parse).collect::<Result<_, _>>();
    let groups = groups.map_err(|e| internal("supplementary GIDs lookup: malformed line").because(e))?;
    Ok(Owner { uid, gid, groups })
}

#[cfg(test)]
#[path = "unix_tests.rs"]
mod tests;
