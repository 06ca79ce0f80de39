//! `agent-data.json`: the agent's own SVID and bundle between runs, in SPIRE's form.

use crate::attest::Attempts;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use finial_core::UnixSeconds;
use finial_crypto::pem;
use finial_runtime::{Spawner, files};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
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

/// How long a write may take, with those before it: a disk that hangs must not keep the agent from its work.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The file, and what it holds. Written off the thread that serves workloads, one change after the other; who changes it
/// hears when it is on disk.
pub(crate) struct Storage {
    kept: Arc<Kept>,
    /// Held from the moment a change is made until it is on disk, also when nobody waits for that any more.
    turn: Arc<tokio::sync::Mutex<()>>,
    spawner: Spawner,
}

struct Kept {
    path: PathBuf,
    /// What is on disk.
    state: Mutex<State>,
}

impl Storage {
    /// Reads the file below `dir`, if there is one.
    pub(crate) fn open(dir: &Path, spawner: Spawner) -> Result<Self, StorageError> {
        let path = dir.join(FILE_NAME);
        let state = match read_limited(&path)? {
            None => {
                State { data: AgentData::default(), bootstrap: Bootstrap { uses: 0, start_time: never(), attempts: 0 } }
            }
            Some(text) => parse(&path, &text)?,
        };
        Ok(Self { kept: Arc::new(Kept { path, state: Mutex::new(state) }), turn: Arc::default(), spawner })
    }

    /// What is kept now.
    pub(crate) fn load(&self) -> AgentData {
        self.kept.state().data.clone()
    }

    /// Keeps another SVID.
    pub(crate) async fn store_svid(&self, svid: &[Arc<[u8]>], reattestable: bool) -> Result<(), StorageError> {
        self.change(|State { data, .. }| {
            data.svid = svid.to_vec();
            data.reattestable = reattestable;
        })
        .await
    }

    /// Keeps another SVID and other roots, in one write.
    pub(crate) async fn store(
        &self,
        svid: &[Arc<[u8]>],
        reattestable: bool,
        roots: &[Arc<[u8]>],
    ) -> Result<(), StorageError> {
        self.change(|State { data, .. }| {
            *data = AgentData { svid: svid.to_vec(), bundle: roots.to_vec(), reattestable };
        })
        .await
    }

    /// Forgets the SVID, so that the next start attests.
    pub(crate) async fn delete_svid(&self) -> Result<(), StorageError> {
        self.store_svid(&[], false).await
    }

    /// Keeps other roots.
    pub(crate) async fn store_bundle(&self, roots: &[Arc<[u8]>]) -> Result<(), StorageError> {
        self.change(|state| state.data.bundle = roots.to_vec()).await
    }

    /// Notes one more attempt at a first contact, which began at `now` if there was none before.
    pub(crate) async fn attempt(&self, now: UnixSeconds) -> Result<Attempts, StorageError> {
        let began = OffsetDateTime::from_unix_timestamp(now).ok().and_then(|t| t.format(&Rfc3339).ok());
        self.change(|State { bootstrap, .. }| {
            bootstrap.attempts += 1;
            if bootstrap.uses == UNSPECIFIED {
                bootstrap.uses = FIRST;
            }
            if bootstrap.start_time == NEVER {
                bootstrap.start_time = began.unwrap_or_else(never);
            }
            let again = bootstrap.uses == AGAIN;
            Attempts { again, since: bootstrap.start_time.clone(), count: bootstrap.attempts }
        })
        .await
    }

    /// The first contact has been made: the next one would be another.
    pub(crate) async fn bootstrapped(&self) -> Result<(), StorageError> {
        self.change(|state| {
            if state.bootstrap.attempts > 0 {
                state.bootstrap = Bootstrap { uses: AGAIN, start_time: never(), attempts: 0 };
            }
        })
        .await
    }

    /// Makes a change that is on disk when this returns well.
    async fn change<T>(&self, edit: impl FnOnce(&mut State) -> T) -> Result<T, StorageError> {
        let change = async {
            let turn = self.turn.clone().lock_owned().await;
            let mut state = self.kept.state().clone();
            let result = edit(&mut state);
            let kept = self.kept.clone();
            let write = move || {
                let written = kept.write(state);
                drop(turn);
                written
            };
            match self.spawner.blocking(write).await {
                Ok(written) => written.map(|()| result),
                Err(_) => Err(self.kept.failed(io::Error::other("the write panicked; the log has the place"))),
            }
        };
        let late = |_| Err(self.kept.failed(io::Error::new(io::ErrorKind::TimedOut, "the disk does not answer")));
        tokio::time::timeout(WRITE_TIMEOUT, change).await.unwrap_or_else(late)
    }
}

impl Kept {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: State) -> Result<(), StorageError> {
        if state == *self.state() && self.path.exists() {
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
        let text = serde_json::to_vec(&document).map_err(|cause| self.failed(cause.into()))?;
        files::replace(&self.path, 0o600, |mut file| file.write_all(&text)).map_err(|cause| self.failed(cause))?;
        *self.state() = state;
        Ok(())
    }

    fn failed(&self, cause: io::Error) -> StorageError {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCa;
    use finial_runtime::Supervisor;
    use std::os::unix::fs::PermissionsExt;

    fn open(dir: &Path) -> Result<Storage, StorageError> {
        Storage::open(dir, Supervisor::default().spawner())
    }

    #[tokio::test]
    async fn what_is_kept_is_there_after_a_restart_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("td");
        let svid: Vec<Arc<[u8]>> = vec![ca.root.clone()];
        let storage = open(dir.path()).unwrap();
        assert_eq!(storage.load(), AgentData::default());
        storage.store_bundle(&svid).await.unwrap();
        storage.store_svid(&svid, true).await.unwrap();
        let again = open(dir.path()).unwrap();
        assert_eq!(again.load(), AgentData { svid: svid.clone(), bundle: svid.clone(), reattestable: true });
        let mode = std::fs::metadata(dir.path().join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        again.delete_svid().await.unwrap();
        assert_eq!(open(dir.path()).unwrap().load(), AgentData { bundle: svid, ..AgentData::default() });
    }

    #[tokio::test]
    async fn the_file_has_spires_form() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap().store_svid(&[], false).await.unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(
            text,
            r#"{"svid":null,"bundle":null,"reattestable":false,"bootstrap_use":0,"bootstrap_start_time":"0001-01-01T00:00:00Z","connection_attempts":0}"#
        );
    }

    #[tokio::test]
    async fn bootstrap_state_of_another_program_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let text = r#"{"svid":null,"bundle":null,"reattestable":false,"bootstrap_use":1,"bootstrap_start_time":"2026-01-02T03:04:05.6Z","connection_attempts":4}"#;
        std::fs::write(&path, text).unwrap();
        open(dir.path()).unwrap().store_svid(&[], true).await.unwrap();
        let after = std::fs::read_to_string(&path).unwrap();
        assert_eq!(after, text.replace("\"reattestable\":false", "\"reattestable\":true"));
    }

    #[tokio::test]
    async fn attempts_are_counted_until_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let storage = || open(dir.path()).unwrap();
        let attempts = |again, since: &str, count| Attempts { again, since: since.to_owned(), count };
        assert_eq!(storage().attempt(0).await.unwrap(), attempts(false, "1970-01-01T00:00:00Z", 1));
        assert_eq!(storage().attempt(60).await.unwrap(), attempts(false, "1970-01-01T00:00:00Z", 2));
        storage().bootstrapped().await.unwrap();
        assert_eq!(storage().attempt(60).await.unwrap(), attempts(true, "1970-01-01T00:01:00Z", 1));
    }

    #[test]
    fn a_damaged_file_is_named_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, "{\"svid\":\n  [,]}").unwrap();
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(
            error.contains("agent-data.json") && error.contains("line 2 column 4") && error.contains("remove"),
            "{error}"
        );
        std::fs::write(&path, r#"{"svid":["AAAA"],"bundle":null}"#).unwrap();
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(error.starts_with("failed to parse SVID: ") && error.contains("agent-data.json"), "{error}");
    }

    /// The thread that serves workloads, which there is one of, is not held up by the disk; the order is kept, and who asks
    /// hears only when it is done.
    #[tokio::test]
    async fn a_slow_disk_delays_who_stores_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let storage = open(dir.path()).unwrap();
        // As long as a write before has not ended.
        let beside = files::beside(&dir.path().join(FILE_NAME));
        let turn = storage.turn.clone().lock_owned().await;
        let svid = |byte: u8| vec![Arc::<[u8]>::from(vec![byte])];
        let (one, two) = (svid(1), svid(2));
        let (mut first, mut second) =
            (Box::pin(storage.store_svid(&one, true)), Box::pin(storage.store_svid(&two, true)));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        assert!(storage.load().svid.is_empty() && !beside.exists(), "nothing is said to be stored before it is");
        drop(turn);
        assert!(futures::poll!(&mut first).is_pending(), "the disk is waited for elsewhere");
        // Whoever waits may go away: the change is made all the same, and before the next one.
        drop(first);
        second.await.unwrap();
        assert_eq!(storage.load().svid, two);
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_hangs_is_an_error_and_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let storage = open(dir.path()).unwrap();
        let _hangs = storage.turn.clone().lock_owned().await;
        let error = storage.store_svid(&[], true).await.unwrap_err().to_string();
        assert!(error.contains("agent-data.json") && error.ends_with("the disk does not answer"), "{error}");
        assert_eq!(storage.load(), AgentData::default());
    }
}
