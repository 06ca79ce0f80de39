//! A server's certificate that somebody else keeps current in files: read at the start, and again when it changes.

use finial_core::Secret;
use finial_crypto::pem;
use finial_crypto::tls::TlsIdentity;
use finial_runtime::{Shutdown, Spawner, files};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where a certificate with its chain, and its key, lie: PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertFiles {
    /// The certificate, leaf first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why certificate and key cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("failed to load certificate {}: {cause}", certificate.display())]
pub struct CertFilesError {
    certificate: PathBuf,
    cause: String,
}

/// Presents what is in `files`, looked at again `every` so often until shutdown. What cannot be used later leaves the last
/// ones in place; `subsystem` says so in the log.
///
/// # Errors
/// When the files cannot be read, or hold no certificate and its key.
pub async fn serve(
    files: CertFiles,
    every: Duration,
    subsystem: &'static str,
    spawner: &Spawner,
) -> Result<Arc<TlsIdentity>, CertFilesError> {
    let identity = Arc::new(TlsIdentity::empty());
    let read = files.clone().read(spawner).await?;
    read.put(&files, &identity)?;
    let watch = Watch { files, last: read, identity: identity.clone(), subsystem };
    let (tasks, shutdown) = (spawner.clone(), spawner.shutdown());
    spawner.service("serving certificate", async move {
        watch.run(every, tasks, shutdown).await;
        Ok::<(), Infallible>(())
    });
    Ok(identity)
}

/// What was in the files.
struct Read {
    certificate: Vec<u8>,
    key: Secret<Vec<u8>>,
}

impl CertFiles {
    fn bad(&self, cause: impl ToString) -> CertFilesError {
        CertFilesError { certificate: self.certificate.clone(), cause: cause.to_string() }
    }

    async fn read(self, spawner: &Spawner) -> Result<Read, CertFilesError> {
        let paths = self.clone();
        let reading = spawner.blocking(move || {
            let read = |path: &Path| {
                files::read_limited(path, pem::PEM_BYTES_MAX).map_err(|e| format!("{}: {e}", path.display()))
            };
            Ok::<_, String>(Read { certificate: read(&paths.certificate)?, key: Secret::new(read(&paths.key)?) })
        });
        reading.await.unwrap_or_else(|e| Err(e.to_string())).map_err(|cause| self.bad(cause))
    }
}

impl Read {
    fn is(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.key.expose() == other.key.expose()
    }

    fn put(&self, files: &CertFiles, identity: &TlsIdentity) -> Result<(), CertFilesError> {
        let chain = pem::certificates(&self.certificate).map_err(|e| files.bad(e))?;
        let key = pem::private_key(self.key.expose()).map_err(|e| files.bad(e))?;
        identity.set(&chain, &key).map_err(|e| files.bad(e))
    }
}

struct Watch {
    files: CertFiles,
    last: Read,
    identity: Arc<TlsIdentity>,
    subsystem: &'static str,
}

impl Watch {
    async fn run(mut self, every: Duration, spawner: Spawner, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
            let changed = match self.files.clone().read(&spawner).await {
                Ok(read) if read.is(&self.last) => continue,
                Ok(read) => read.put(&self.files, &self.identity).map(|()| self.last = read),
                Err(error) => Err(error),
            };
            let subsystem_name = self.subsystem;
            match changed {
                Ok(()) => tracing::info!(subsystem_name, "Loaded the new serving certificate"),
                Err(error) => tracing::error!(subsystem_name, %error, "The last serving certificate is kept"),
            }
        }
    }
}
