//! What outlives the process, in the form of Go's autocert, which SPIRE uses: PEM files named as the domain (the key and its
//! certificates), `acme_account+key` and, while a challenge is open, `DOMAIN+token`. Where a [`KeyStore`] has the keys, the files hold
//! certificates alone, as those of SPIRE's server.

use crate::{AcmeError, KeyStore};
use finial_core::{KeyType, UnixSeconds};
use finial_crypto::pem::{self, PemBlock};
use finial_crypto::tls::TlsIdentity;
use finial_crypto::{Certificate, PrivateKey};
use finial_runtime::{Spawner, files};
use rustix::fs::FlockOperation;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The account's key, in files and in key stores.
const ACCOUNT: &str = "acme_account+key";
/// Held by who asks.
const LOCK: &str = "acme.lock";
/// Largest file that is read.
const FILE_BYTES_MAX: usize = 256 << 10;

/// A certificate with its chain, leaf first, and the key.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) chain: Vec<Arc<[u8]>>,
    pub(crate) key: PrivateKey,
    pub(crate) not_before: UnixSeconds,
    pub(crate) not_after: UnixSeconds,
}

impl Held {
    /// Of a chain that is for this key and name.
    pub(crate) fn new(chain: Vec<Arc<[u8]>>, key: PrivateKey, domain: &str) -> Result<Self, String> {
        let leaf = chain.first().ok_or("no certificate")?;
        let leaf = Certificate::parse(leaf.clone()).map_err(|e| e.to_string())?;
        if leaf.spki_der() != &**key.public_key().spki_der() {
            return Err("certificate and private key do not match".into());
        }
        if !leaf.dns_names().iter().any(|name| name.eq_ignore_ascii_case(domain)) {
            return Err(format!("the certificate is not for {domain}"));
        }
        Ok(Self { not_before: leaf.not_before(), not_after: leaf.not_after(), chain, key })
    }

    pub(crate) fn is_valid_at(&self, now: UnixSeconds) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }
}

/// The folder and the keys.
pub(crate) struct Kept {
    dir: Option<PathBuf>,
    keys: Option<Arc<dyn KeyStore>>,
    spawner: Spawner,
    /// Where there is no folder.
    account: Mutex<Option<PrivateKey>>,
}

impl Kept {
    pub(crate) fn new(dir: Option<PathBuf>, keys: Option<Arc<dyn KeyStore>>, spawner: Spawner) -> Self {
        Self { dir, keys, spawner, account: Mutex::default() }
    }

    /// What is there for the name. What cannot be read is as good as nothing: it is asked for again, and the log says so.
    pub(crate) async fn certificate(&self, domain: &str) -> Option<Held> {
        match self.load(domain).await {
            Ok(held) => held,
            Err(error) => {
                tracing::warn!(%domain, %error, "The certificate that is kept cannot be used");
                None
            }
        }
    }

    async fn load(&self, domain: &str) -> Result<Option<Held>, AcmeError> {
        let Some((path, text)) = self.read(domain.to_owned()).await? else { return Ok(None) };
        let bad = |cause: String| AcmeError::Cache { path: path.clone(), cause };
        let key = match pem::private_key(&text) {
            Ok(key) => Some(key),
            Err(pem::PemError::NoBlocks) => match &self.keys {
                Some(keys) => keys.key(domain).await.map_err(bad)?,
                None => None,
            },
            Err(error) => return Err(bad(error.to_string())),
        };
        let key = key.ok_or_else(|| bad("its private key is not there".into()))?;
        let chain = certificates(&text).map_err(bad)?;
        Held::new(chain, key, domain).map(Some).map_err(bad)
    }

    /// The key for the name: that of its last certificate, or a new one.
    pub(crate) async fn key(&self, domain: &str) -> Result<PrivateKey, AcmeError> {
        if let Some(keys) = &self.keys {
            return stored_key(&**keys, domain).await;
        }
        match self.load(domain).await {
            Ok(Some(held)) => Ok(held.key),
            _ => new_key(domain),
        }
    }

    /// Remembers it.
    pub(crate) async fn put(&self, domain: &str, held: &Held) -> Result<(), AcmeError> {
        let mut text = String::new();
        if self.keys.is_none() {
            text.push_str(pem::encode_private_key(held.key.pkcs8_der().expose()).expose());
        }
        text.push_str(&pem::encode_certificates(held.chain.iter().map(|c| &**c)));
        self.write(domain.to_owned(), text).await
    }

    /// Lets the processes that share the folder answer the challenge too.
    pub(crate) async fn put_token(&self, domain: &str, key: &PrivateKey, certificate: &[u8]) -> Result<(), AcmeError> {
        let mut text = pem::encode_private_key(key.pkcs8_der().expose()).expose().clone();
        text.push_str(&pem::encode_certificates([certificate]));
        self.write(token_name(domain), text).await
    }

    /// The challenge is over.
    pub(crate) async fn remove_token(&self, domain: &str) {
        let Some(path) = self.dir.as_ref().map(|dir| dir.join(token_name(domain))) else { return };
        let _ = self.spawner.blocking(move || std::fs::remove_file(path)).await;
    }

    /// The account's key, if there is one already.
    pub(crate) async fn account_key(&self) -> Result<Option<PrivateKey>, AcmeError> {
        if let Some(keys) = &self.keys {
            let found = keys.key(ACCOUNT).await.map_err(|cause| AcmeError::Key { name: ACCOUNT.into(), cause })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        if self.dir.is_none() {
            return Ok(self.account.lock().unwrap_or_else(PoisonError::into_inner).clone());
        }
        let Some((path, text)) = self.read(ACCOUNT.to_owned()).await? else { return Ok(None) };
        pem::private_key(&text).map(Some).map_err(|e| AcmeError::Cache { path, cause: e.to_string() })
    }

    /// Makes a key for an account that is yet to be. Only a key store keeps it already.
    pub(crate) async fn new_account_key(&self) -> Result<PrivateKey, AcmeError> {
        match &self.keys {
            Some(keys) => stored_key(&**keys, ACCOUNT).await,
            None => new_key(ACCOUNT),
        }
    }

    /// Keeps the key of an account that is there.
    pub(crate) async fn put_account_key(&self, key: PrivateKey) -> Result<(), AcmeError> {
        *self.account.lock().unwrap_or_else(PoisonError::into_inner) = Some(key.clone());
        let text = pem::encode_private_key(key.pkcs8_der().expose());
        self.write(ACCOUNT.to_owned(), text.expose().clone()).await
    }

    /// Nobody else with the same folder asks while this is held.
    pub(crate) async fn lock(&self) -> Result<Option<File>, AcmeError> {
        let Some(dir) = self.dir.clone() else { return Ok(None) };
        let path = dir.join(LOCK);
        let bad = |error: io::Error| AcmeError::Cache { path: path.clone(), cause: error.to_string() };
        let at = path.clone();
        let locking = self.spawner.blocking(move || {
            create(&dir)?;
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(at)?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok::<_, io::Error>(file)
        });
        match locking.await.map_err(|e| bad(io::Error::other(e)))? {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(AcmeError::Elsewhere),
            Err(error) => Err(bad(error)),
        }
    }

    async fn read(&self, name: String) -> Result<Option<(PathBuf, Vec<u8>)>, AcmeError> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let path = dir.join(name);
        let at = path.clone();
        let reading = self.spawner.blocking(move || files::read_limited(&at, FILE_BYTES_MAX)).await;
        match reading.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(text) => Ok(Some((path, text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(AcmeError::Cache { path, cause: error.to_string() }),
        }
    }

    async fn write(&self, name: String, text: String) -> Result<(), AcmeError> {
        let Some(dir) = self.dir.clone() else { return Ok(()) };
        let path = dir.join(name);
        let at = path.clone();
        let text = finial_core::Secret::new(text);
        let writing = self.spawner.blocking(move || {
            create(&dir)?;
            files::replace(&at, 0o600, |mut file| file.write_all(text.expose().as_bytes()))
        });
        let written = writing.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        written.map_err(|e| AcmeError::Cache { path, cause: e.to_string() })
    }
}

/// What another process with the same folder answers to the authority.
pub(crate) fn token(dir: &Path, domain: &str) -> Option<TlsIdentity> {
    let text = files::read_limited(&dir.join(token_name(domain)), FILE_BYTES_MAX).ok()?;
    let (chain, key) = (certificates(&text).ok()?, pem::private_key(&text).ok()?);
    TlsIdentity::new(&chain, &key).ok()
}

fn token_name(domain: &str) -> String {
    format!("{domain}+token")
}

fn create(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn certificates(text: &[u8]) -> Result<Vec<Arc<[u8]>>, String> {
    let blocks = pem::blocks(text).map_err(|e| e.to_string())?;
    let certificates = blocks.into_iter().filter(|block| block.label == "CERTIFICATE");
    Ok(certificates.map(|PemBlock { der, .. }| der.expose().as_slice().into()).collect())
}

fn new_key(name: &str) -> Result<PrivateKey, AcmeError> {
    PrivateKey::generate(KeyType::EcP256).map_err(|e| AcmeError::Key { name: name.into(), cause: e.to_string() })
}

async fn stored_key(keys: &dyn KeyStore, name: &str) -> Result<PrivateKey, AcmeError> {
    let failed = |cause| AcmeError::Key { name: name.into(), cause };
    match keys.key(name).await.map_err(failed)? {
        Some(key) => Ok(key),
        None => keys.generate(name).await.map_err(failed),
    }
}
