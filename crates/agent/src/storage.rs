//! `agent-data.json`: the agent's own SVID and bundle between runs, in SPIRE's form.

use crate::attest::Attempts;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::UnixSeconds;
use finial_crypto::pem;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The file's name below the data directory.
const FILE_NAME: &str = "agent-data.json";
/// Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";
/// What a first contact is for, in SPIRE's numbers.
const UNSPECIFIED: i64 = 0;
const FIRST: i64 = 1;
const AGAIN: i64 = 2;
/// No agent writes a larger file. Bytes.
const BYTES_MAX: u64 = 16 << 20;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("failed to read data: {path}: {cause}")]
    Read { path: PathBuf, cause: io::Error },
    #[error("failed to unmarshal data: {path}: {cause} (remove the file and the agent attests again)")]
    Malformed { path: PathBuf, cause: serde_json::Error },
    #[error("failed to parse {what}: {path}: {cause} (remove the file and the agent attests again)")]
    Certificates { what: &'static str, path: PathBuf, cause: String },
    #[error("failed to read data: {path}: the file is larger than {BYTES_MAX} bytes")]
    TooLarge { path: PathBuf },
    #[error("failed to write data file: {path}: {cause}")]
    Write { path: PathBuf, cause: io::Error },
}

/// The file as it is written: Go's names and forms. Each certificate is base64 of its PEM text.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Document {
    svid: Option<Vec<String>>,
    bundle: Option<Vec<String>>,
    #[serde(default)]
    reattestable: bool,
    #[serde(default)]
    bootstrap_use: i64,
    #[serde(default = "never")]
    bootstrap_start_time: String,
    #[serde(default)]
    connection_attempts: i64,
}

fn never() -> String {
    NEVER.to_owned()
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AgentData {
    /// Leaf first, DER; empty = none.
    pub(crate) svid: Vec<Arc<[u8]>>,
    /// The X.509 roots, DER; empty = none.
    pub(crate) bundle: Vec<Arc<[u8]>>,
    /// Whether the server lets the agent attest again.
    pub(crate) reattestable: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bootstrap {
    uses: i64,
    start_time: String,
    attempts: i64,
}

#[derive(Clone, PartialEq, Eq)]
struct State {
    data: AgentData,
    bootstrap: Bootstrap,
}

/// The file, and what it holds.
pub(crate) struct Storage {
    path: PathBuf,
    state: Mutex<State>,
}

impl Storage {
    /// Reads the file below `dir`, if there is one.
    pub(crate) fn open(dir: &Path) -> Result<Self, StorageError> {
        let path = dir.join(FILE_NAME);
        let state = match read_limited(&path)? {
            None => {
                State { data: AgentData::default(), bootstrap: Bootstrap { uses: 0, start_time: never(), attempts: 0 } }
            }
            Some(text) => parse(&path, &text)?,
        };
        Ok(Self { path, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept now.
    pub(crate) fn load(&self) -> AgentData {
        self.state().data.clone()
    }

    /// Keeps another SVID.
    pub(crate) fn store_svid(&self, svid: &[Arc<[u8]>], reattestable: bool) -> Result<(), StorageError> {
        self.change(|data| {
            data.svid = svid.to_vec();
            data.reattestable = reattestable;
        })
    }

    /// Keeps another SVID and other roots, in one write.
    pub(crate) fn store(
        &self,
        svid: &[Arc<[u8]>],
        reattestable: bool,
        roots: &[Arc<[u8]>],
    ) -> Result<(), StorageError> {
        self.change(|data| {
            *data = AgentData { svid: svid.to_vec(), bundle: roots.to_vec(), reattestable };
        })
    }

    /// Forgets the SVID, so that the next start attests.
    pub(crate) fn delete_svid(&self) -> Result<(), StorageError> {
        self.store_svid(&[], false)
    }

    /// Keeps other roots.
    pub(crate) fn store_bundle(&self, roots: &[Arc<[u8]>]) -> Result<(), StorageError> {
        self.change(|data| data.bundle = roots.to_vec())
    }

    /// Notes one more attempt at a first contact, which began at `now` if there was none before.
    pub(crate) fn attempt(&self, now: UnixSeconds) -> Result<Attempts, StorageError> {
        let began = OffsetDateTime::from_unix_timestamp(now).ok().and_then(|t| t.format(&Rfc3339).ok());
        let mut attempts = Attempts { again: false, since: never(), count: 0 };
        self.change_all(|state| {
            let bootstrap = &mut state.bootstrap;
            bootstrap.attempts += 1;
            if bootstrap.uses == UNSPECIFIED {
                bootstrap.uses = FIRST;
            }
            if bootstrap.start_time == NEVER {
                bootstrap.start_time = began.unwrap_or_else(never);
            }
            let again = bootstrap.uses == AGAIN;
            attempts = Attempts { again, since: bootstrap.start_time.clone(), count: bootstrap.attempts };
        })?;
        Ok(attempts)
    }

    /// The first contact has been made: the next one would be another.
    pub(crate) fn bootstrapped(&self) -> Result<(), StorageError> {
        self.change_all(|state| {
            if state.bootstrap.attempts > 0 {
                state.bootstrap = Bootstrap { uses: AGAIN, start_time: never(), attempts: 0 };
            }
        })
    }

    fn change(&self, edit: impl FnOnce(&mut AgentData)) -> Result<(), StorageError> {
        self.change_all(|state| edit(&mut state.data))
    }

    fn change_all(&self, edit: impl FnOnce(&mut State)) -> Result<(), StorageError> {
        let mut held = self.state();
        let mut state = held.clone();
        edit(&mut state);
        if state == *held && self.path.exists() {
            return Ok(());
        }
        let document = Document {
            svid: encode(&state.data.svid),
            bundle: encode(&state.data.bundle),
            reattestable: state.data.reattestable,
            bootstrap_use: state.bootstrap.uses,
            bootstrap_start_time: state.bootstrap.start_time.clone(),
            connection_attempts: state.bootstrap.attempts,
        };
        let text = serde_json::to_vec(&document).map_err(|cause| self.write_error(cause.into()))?;
        replace(&self.path, |mut file| file.write_all(&text)).map_err(|cause| self.write_error(cause))?;
        *held = state;
        Ok(())
    }

    fn write_error(&self, cause: io::Error) -> StorageError {
        StorageError::Write { path: self.path.clone(), cause }
    }
}

fn read_limited(path: &Path) -> Result<Option<Vec<u8>>, StorageError> {
    let failed = |cause| StorageError::Read { path: path.to_owned(), cause };
    match std::fs::metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(failed(cause)),
        Ok(meta) if meta.len() > BYTES_MAX => Err(StorageError::TooLarge { path: path.to_owned() }),
        Ok(_) => std::fs::read(path).map(Some).map_err(failed),
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<State, StorageError> {
    let document: Document =
        serde_json::from_slice(text).map_err(|cause| StorageError::Malformed { path: path.to_owned(), cause })?;
    Ok(State {
        data: AgentData {
            svid: decode(path, "SVID", document.svid)?,
            bundle: decode(path, "bundle", document.bundle)?,
            reattestable: document.reattestable,
        },
        bootstrap: Bootstrap {
            uses: document.bootstrap_use,
            start_time: document.bootstrap_start_time,
            attempts: document.connection_attempts,
        },
    })
}

fn encode(certificates: &[Arc<[u8]>]) -> Option<Vec<String>> {
    // Go writes an empty slice that was never made as null.
    let texts = certificates.iter().map(|der| BASE64.encode(pem::encode("CERTIFICATE", der)));
    (!certificates.is_empty()).then(|| texts.collect())
}

fn decode(path: &Path, what: &'static str, texts: Option<Vec<String>>) -> Result<Vec<Arc<[u8]>>, StorageError> {
    let failed = |cause: String| StorageError::Certificates { what, path: path.to_owned(), cause };
    let mut certificates = Vec::new();
    for text in texts.unwrap_or_default() {
        let text = BASE64.decode(&text).map_err(|e| failed(e.to_string()))?;
        certificates.extend(pem::certificates(&text).map_err(|e| failed(e.to_string()))?);
    }
    Ok(certificates)
}

/// Where a file is written before it takes the place of `path`.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Writes beside, flushes to disk, and moves into place: a crash leaves the old file or the new one.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let beside = beside(path);
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    write(&file)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCa;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_kept_is_there_after_a_restart_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("td");
        let svid: Vec<Arc<[u8]>> = vec![ca.root.clone()];
        let storage = Storage::open(dir.path()).unwrap();
        assert_eq!(storage.load(), AgentData::default());
        storage.store_bundle(&svid).unwrap();
        storage.store_svid(&svid, true).unwrap();
        let again = Storage::open(dir.path()).unwrap();
        assert_eq!(again.load(), AgentData { svid: svid.clone(), bundle: svid.clone(), reattestable: true });
        let mode = std::fs::metadata(dir.path().join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        again.delete_svid().unwrap();
        assert_eq!(Storage::open(dir.path()).unwrap().load(), AgentData { bundle: svid, ..AgentData::default() });
    }

    #[test]
    fn the_file_has_spires_form() {
        let dir = tempfile::tempdir().unwrap();
        Storage::open(dir.path()).unwrap().store_svid(&[], false).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(
            text,
            r#"{"svid":null,"bundle":null,"reattestable":false,"bootstrap_use":0,"bootstrap_start_time":"0001-01-01T00:00:00Z","connection_attempts":0}"#
        );
    }

    #[test]
    fn bootstrap_state_of_another_program_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let text = r#"{"svid":null,"bundle":null,"reattestable":false,"bootstrap_use":1,"bootstrap_start_time":"2026-01-02T03:04:05.6Z","connection_attempts":4}"#;
        std::fs::write(&path, text).unwrap();
        Storage::open(dir.path()).unwrap().store_svid(&[], true).unwrap();
        let after = std::fs::read_to_string(&path).unwrap();
        assert_eq!(after, text.replace("\"reattestable\":false", "\"reattestable\":true"));
    }

    #[test]
    fn attempts_are_counted_until_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let storage = || Storage::open(dir.path()).unwrap();
        let attempts = |again, since: &str, count| Attempts { again, since: since.to_owned(), count };
        assert_eq!(storage().attempt(0).unwrap(), attempts(false, "1970-01-01T00:00:00Z", 1));
        assert_eq!(storage().attempt(60).unwrap(), attempts(false, "1970-01-01T00:00:00Z", 2));
        storage().bootstrapped().unwrap();
        assert_eq!(storage().attempt(60).unwrap(), attempts(true, "1970-01-01T00:01:00Z", 1));
    }

    #[test]
    fn a_damaged_file_is_named_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, "{\"svid\":\n  [,]}").unwrap();
        let error = Storage::open(dir.path()).err().unwrap().to_string();
        assert!(
            error.contains("agent-data.json") && error.contains("line 2 column 4") && error.contains("remove"),
            "{error}"
        );
        std::fs::write(&path, r#"{"svid":["AAAA"],"bundle":null}"#).unwrap();
        let error = Storage::open(dir.path()).err().unwrap().to_string();
        assert!(error.starts_with("failed to parse SVID: ") && error.contains("agent-data.json"), "{error}");
    }
}
