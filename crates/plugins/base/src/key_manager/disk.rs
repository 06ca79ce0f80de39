//! `disk`: keys in a JSON file, in the form that SPIRE writes and reads: `{"keys": {"<id>": "<base64 PKCS#8>"}}`, indented
//! by tabs, mode 0600, replaced as a whole so that a crash leaves the old file or the new one.

use super::Memory;
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use finial_core::{ErrorKind, KeyType, Secret};
use finial_crypto::{PrivateKey, Signer};
use finial_hcl::Value;
use finial_plugin::{KeyManager, PluginError, decode};
use finial_runtime::files;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;
use zeroize::Zeroize;

/// Far above what a server or an agent needs (a dozen keys).
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Keys in a file, held in memory as well.
pub struct Disk {
    path: PathBuf,
    keys: Memory,
    /// One writer at a time, so that no key is lost between two of them.
    writing: Mutex<()>,
}

#[derive(Deserialize)]
struct ServerConfig {
    #[serde(default)]
    keys_path: String,
}

#[derive(Deserialize)]
struct AgentConfig {
    #[serde(default)]
    directory: String,
}

impl Disk {
    /// The server's: `keys_path` names the file.
    ///
    /// # Errors
    /// When the configuration is incomplete or the file cannot be read; the error names the place and what to do.
    pub fn for_server(data: &Value) -> Result<Self, PluginError> {
        let config: ServerConfig = decode(data)?;
        if config.keys_path.is_empty() {
            return Err(PluginError::invalid("keys_path is required"));
        }
        Self::open(config.keys_path.into())
    }

    /// The agent's: `directory` is made if it does not exist, and holds `keys.json`.
    ///
    /// # Errors
    /// As [`Disk::for_server`], and when the directory cannot be written to.
    pub fn for_agent(data: &Value) -> Result<Self, PluginError> {
        let config: AgentConfig = decode(data)?;
        if config.directory.is_empty() {
            return Err(PluginError::invalid("directory must be configured"));
        }
        let directory = PathBuf::from(config.directory);
        probe(&directory).map_err(|error| {
            let message = format!("directory validation failed: {}: {error}", directory.display());
            PluginError::new(ErrorKind::FailedPrecondition, message)
        })?;
        Self::open(directory.join("keys.json"))
    }

    /// Reads the file; none is as good as an empty one.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub fn open(path: PathBuf) -> Result<Self, PluginError> {
        let keys = Memory::with(load(&path)?);
        Ok(Self { path, keys, writing: Mutex::new(()) })
    }
}

/// Makes the directory, and a file in it.
fn probe(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let probe = directory.join(".probe");
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&probe)?;
    fs::remove_file(&probe)
}

#[async_trait]
impl KeyManager for Disk {
    async fn generate_key(&self, id: &str, key_type: KeyType) -> Result<Arc<dyn Signer>, PluginError> {
        let key = super::generate(id, key_type).await?;
        let _writing = self.writing.lock().await;
        let mut keys = self.keys.snapshot();
        keys.insert(id.to_owned(), key.clone());
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || store(&path, &keys)).await;
        let written = written.unwrap_or_else(|e| Err(io::Error::other(e)));
        written.map_err(|error| {
            let path = self.path.display();
            PluginError::internal(format!("failed to generate key: unable to write entries: {path}: {error}"))
        })?;
        self.keys.put(id, key.clone());
        Ok(key)
    }

    async fn key(&self, id: &str) -> Result<Option<Arc<dyn Signer>>, PluginError> {
        Ok(self.keys.find(id))
    }

    async fn keys(&self) -> Result<Vec<(String, Arc<dyn Signer>)>, PluginError> {
        Ok(self.keys.list())
    }
}

/// The file as it is written.
#[derive(Serialize)]
struct Stored<'a> {
    keys: BTreeMap<&'a str, Wiped>,
}

/// A text that is a secret.
struct Wiped(String);

impl Serialize for Wiped {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The file's content, byte for byte as SPIRE writes it.
fn encode(keys: &BTreeMap<String, Arc<PrivateKey>>) -> io::Result<Secret<Vec<u8>>> {
    let text = |key: &PrivateKey| Wiped(STANDARD.encode(key.pkcs8_der().expose()));
    let stored = Stored { keys: keys.iter().map(|(id, key)| (id.as_str(), text(key))).collect() };
    // Large enough from the start: a vector that grows leaves copies behind that nobody wipes.
    let mut out = Vec::with_capacity(1024 + keys.len() * 4096);
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let done = stored.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter));
    let out = Secret::new(out);
    done.map_err(io::Error::other).map(|()| out)
}

fn store(path: &Path, keys: &BTreeMap<String, Arc<PrivateKey>>) -> io::Result<()> {
    let content = encode(keys)?;
    files::replace(path, 0o600, |mut file| file.write_all(content.expose()))
}

fn load(path: &Path) -> Result<BTreeMap<String, Arc<PrivateKey>>, PluginError> {
    let unreadable = |error: io::Error| {
        let path = path.display();
        PluginError::new(ErrorKind::FailedPrecondition, format!("unable to read keys file {path}: {error}"))
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut content = Vec::with_capacity(16 * 1024);
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(unreadable)?;
    let content = Secret::new(content);
    if content.expose().len() as u64 > FILE_BYTES_MAX {
        return Err(unreadable(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes"))));
    }
    parse(content.expose()).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let text = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
        let path = path.display();
        PluginError::internal(format!(
            "unable to decode keys JSON: {path}:{line}:{column}: {text}. Restore the file from a backup; or, if its keys \
             may be lost, move it away and start again with new ones"
        ))
    })
}

fn parse(content: &[u8]) -> serde_json::Result<BTreeMap<String, Arc<PrivateKey>>> {
    #[derive(Deserialize)]
    struct Loaded {
        #[serde(default)]
        keys: Option<Keys>,
    }
    serde_json::from_slice::<Loaded>(content).map(|loaded| loaded.keys.map(|keys| keys.0).unwrap_or_default())
}

/// Keys are decoded while the JSON is read, so that what is wrong with one is reported with its place.
struct Keys(BTreeMap<String, Arc<PrivateKey>>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeysVisitor;
        impl<'de> Visitor<'de> for KeysVisitor {
            type Value = Keys;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of keys")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = BTreeMap::new();
                while let Some(id) = map.next_key::<String>()? {
                    let key = map.next_value_seed(KeySeed(&id))?;
                    keys.insert(id, key);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(KeysVisitor)
    }
}

struct KeySeed<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Arc<PrivateKey>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for KeySeed<'_> {
    type Value = Arc<PrivateKey>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {:?} as base64 text", self.0)
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        let unusable = |why: &dyn fmt::Display| E::custom(format!("unable to parse key {:?}: {why}", self.0));
        let der = Secret::new(STANDARD.decode(text).map_err(|e| unusable(&e))?);
        PrivateKey::from_pkcs8(der.expose()).map(Arc::new).map_err(|e| unusable(&e))
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
