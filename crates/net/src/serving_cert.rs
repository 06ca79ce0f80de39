//! A server's certificate that somebody else keeps current in files: read at the start, and again when it changes.

use finial_core::Secret;
use finial_crypto::pem;
use finial_crypto::tls::TlsIdentity;
use finial_runtime::{Shutdown, Spawner, errno_text, files};
use std::convert::Infallible;
use std::fmt::Display;
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

/// Why certificate and key cannot be used, with the file at fault.
#[derive(Debug, thiserror::Error)]
#[error("failed to load {0}")]
pub struct CertFilesError(String);

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
    fn bad_certificate(&self, cause: impl Display) -> CertFilesError {
        CertFilesError(format!("certificate {}: {cause}", self.certificate.display()))
    }

    fn bad_key(&self, cause: impl Display) -> CertFilesError {
        let key = self.key.as_os_str();
        if key.is_empty() {
            return CertFilesError(format!("the key of certificate {}: no file is named", self.certificate.display()));
        }
        CertFilesError(format!("key {}: {cause}", self.key.display()))
    }

    async fn read(self, spawner: &Spawner) -> Result<Read, CertFilesError> {
        let reading = spawner.blocking(move || {
            let read = |path: &Path| files::read_limited(path, pem::PEM_BYTES_MAX);
            Ok(Read {
                certificate: read(&self.certificate).map_err(|e| self.bad_certificate(errno_text(&e)))?,
                key: Secret::new(read(&self.key).map_err(|e| self.bad_key(errno_text(&e)))?),
            })
        });
        reading.await.unwrap_or_else(|e| Err(CertFilesError(e.to_string())))
    }
}

impl Read {
    fn is(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.key.expose() == other.key.expose()
    }

    fn put(&self, files: &CertFiles, identity: &TlsIdentity) -> Result<(), CertFilesError> {
        let chain = pem::certificates(&self.certificate).map_err(|e| files.bad_certificate(e))?;
        let key = pem::private_key(self.key.expose()).map_err(|e| files.bad_key(e))?;
        identity.set(&chain, &key).map_err(|e| files.bad_certificate(format!("with key {}: {e}", files.key.display())))
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

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::fake::Pki;

    #[tokio::test]
    async fn the_file_at_fault_is_named() {
        let pki = Pki::new();
        for name in ["web", "other"] {
            pki.issue(name, "subjectAltName=DNS:web.test");
        }
        std::fs::write(pki.path("empty"), "").unwrap();
        let supervisor = finial_runtime::Supervisor::default();
        let (web, key, path) = (pki.path("web.crt"), pki.path("web.key"), |name| pki.path(name));
        for (certificate, key, want) in [
            (path("none"), key.clone(), format!("certificate {}: no such file or directory", path("none"))),
            (path("empty"), key, format!("certificate {}: no PEM blocks", path("empty"))),
            (web.clone(), path("none"), format!("key {}: no such file or directory", path("none"))),
            (web.clone(), path("empty"), format!("key {}: no PEM blocks", path("empty"))),
            (web.clone(), String::new(), format!("the key of certificate {web}: no file is named")),
            (
                web.clone(),
                path("other.key"),
                format!("certificate {web}: with key {}: certificate and private key do not match", path("other.key")),
            ),
        ] {
            let files = CertFiles { certificate: certificate.into(), key: key.into() };
            let error = serve(files, Duration::from_secs(60), "test", &supervisor.spawner()).await.err().unwrap();
            assert_eq!(error.to_string(), format!("failed to load {want}"));
        }
    }
}
