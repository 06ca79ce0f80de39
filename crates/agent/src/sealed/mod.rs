//! What the agent serves, kept on disk for the time when it is restarted and no server answers.
//!
//! The file is sealed by a key that lies elsewhere ([`key`]), bound to this node and this agent ([`seal`]), and written off the
//! path of any answer ([`keep`]). A file that cannot be used is said in the log and left alone: the agent then waits for
//! its server, as without one. See `docs/adr/0013-the-sealed-cache.md`.

mod content;
mod keep;
mod key;
mod seal;
#[cfg(test)]
mod tests;

pub(crate) use content::Restored;
pub(crate) use keep::{keep, write_last};

use content::Contents;
use finial_config::AgentSettings;
use finial_core::{SpiffeId, TrustDomain, UnixSeconds};
use finial_runtime::files;
use key::{SealingKey, Source};
use seal::{Binding, OpenError, Sealer};
use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// As log lines say it.
const SUBSYSTEM: &str = "sealed_cache";
/// The file's name below the data directory.
const FILE_NAME: &str = "agent-cache.sealed";
/// No file is larger.
const BYTES_MAX: u64 = 256 << 20;

/// The file, with its key; or neither.
pub(crate) struct SealedCache {
    path: PathBuf,
    key: Option<SealingKey>,
    machine_id: String,
    trust_domain: TrustDomain,
    /// Nothing may be kept any more.
    forgotten: AtomicBool,
    /// The next agent has the file.
    handed: AtomicBool,
    /// Held while the file is written.
    writing: Mutex<()>,
}

impl SealedCache {
    /// With the key that the settings allow, and this machine's ID.
    pub(crate) fn open(settings: &AgentSettings) -> Self {
        Self::at(settings, key::machine_id())
    }

    fn at(settings: &AgentSettings, machine_id: String) -> Self {
        let found = key::find(settings.offline_cache, &settings.offline_cache_host_key_path);
        let key = found.unwrap_or_else(|error| {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "No key to seal a cache with: SVIDs are kept in memory only, and a restart needs a server");
            None
        });
        if key.as_ref().is_some_and(|key| key.source() == Source::Keyring) {
            tracing::info!(
                subsystem_name = SUBSYSTEM,
                key = Source::Keyring.name(),
                "The sealed cache's key is in the kernel's keyring, the weaker place: what runs as the agent's user may read it, in a \
                 container too unless seccomp forbids keyctl. A host key is better; `systemd-creds setup` makes it"
            );
        }
        let path = settings.data_dir.join(FILE_NAME);
        if key.is_none() && path.exists() {
            tracing::info!(subsystem_name = SUBSYSTEM, path = %path.display(), "The sealed cache of an earlier run is not used");
        }
        let trust_domain = settings.trust_domain.clone();
        Self {
            path,
            key,
            machine_id,
            trust_domain,
            forgotten: AtomicBool::new(false),
            handed: AtomicBool::new(false),
            writing: Mutex::default(),
        }
    }

    fn binding(&self, agent: &SpiffeId) -> Binding {
        Binding {
            machine_id: self.machine_id.clone(),
            trust_domain: self.trust_domain.clone(),
            agent_id: agent.clone(),
        }
    }

    /// What is kept for this agent and has not ended. Reads a file: not on the thread that answers workloads.
    pub(crate) fn load(&self, agent: &SpiffeId, now: UnixSeconds) -> Option<Restored> {
        let key = self.key.as_ref()?;
        let restored = match self.read(key, agent, now) {
            Ok(restored) => restored,
            Err(OpenError::Io(error)) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(subsystem_name = SUBSYSTEM, path = %self.path.display(), %error, "Ignoring the sealed cache; it will be written anew");
                return None;
            }
        };
        tracing::info!(
            subsystem_name = SUBSYSTEM,
            key = key.source().name(),
            entries = restored.entries.len(),
            svids = restored.svids.len(),
            jwt_svids = restored.jwts.len(),
            wit_svids = restored.wits.len(),
            ended = restored.ended,
            "Sealed cache loaded"
        );
        Some(restored)
    }

    fn read(&self, key: &SealingKey, agent: &SpiffeId, now: UnixSeconds) -> Result<Restored, OpenError> {
        let file = File::open(&self.path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(OpenError::NotOurs);
        }
        if meta.len() > BYTES_MAX {
            return Err(OpenError::TooLarge(BYTES_MAX));
        }
        let mut restored = Restored::default();
        let take = |item: &[u8]| restored.take(item, &self.trust_domain, now);
        seal::open(BufReader::new(file), key, &self.binding(agent), take)?;
        Ok(restored)
    }

    /// Keeps this in place of what was kept; the size of the file. Waits for the disk. The `last` one is the next agent's.
    fn save(&self, agent: &SpiffeId, contents: &Contents, last: bool) -> io::Result<u64> {
        let Some(key) = self.key.as_ref() else { return Ok(0) };
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_on(last) {
            return Ok(0);
        }
        let mut left_out = 0;
        let mut bytes = 0;
        files::replace(&self.path, 0o600, |file| {
            let mut sealer = Sealer::new(BufWriter::new(file), key, &self.binding(agent))?;
            left_out = content::write(&mut sealer, contents, BYTES_MAX)?;
            let (buffered, written) = sealer.finish()?;
            bytes = written;
            buffered.into_inner().map(drop).map_err(io::IntoInnerError::into_error)
        })?;
        if left_out > 0 {
            tracing::warn!(
                subsystem_name = SUBSYSTEM,
                left_out,
                "The sealed cache is full; a part of the entries is not kept"
            );
        }
        // Banned while it was written.
        if self.forgotten.load(Ordering::SeqCst) {
            self.remove();
        }
        Ok(bytes)
    }

    /// Whether there is something to write to, and it may be written; after the `last` one nothing may.
    fn is_on(&self, last: bool) -> bool {
        let handed = || !last && self.handed.load(Ordering::SeqCst);
        self.key.is_some() && !self.forgotten.load(Ordering::SeqCst) && !handed()
    }

    /// What is written now is for the next agent.
    fn hand(&self) {
        self.handed.store(true, Ordering::SeqCst);
    }

    /// The next agent did not take over.
    pub(crate) fn go_on(&self) {
        self.handed.store(false, Ordering::SeqCst);
    }

    /// Removes what is kept, and keeps nothing any more.
    pub(crate) fn forget(&self) {
        self.forgotten.store(true, Ordering::SeqCst);
        self.remove();
    }

    fn remove(&self) {
        for path in [&self.path, &files::beside(&self.path)] {
            if let Err(error) = remove_file(path) {
                tracing::error!(subsystem_name = SUBSYSTEM, path = %path.display(), %error, "Failed to remove the sealed cache");
            }
        }
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
