//! The server's own X.509-SVID: signed by its own authority, renewed at half its life, shown to TLS.

use crate::authority::{KeyIds, Standing};
use crate::issue::{IssueError, Issuer, Rfc3339};
use crate::publish::BundleFeed;
use arc_swap::ArcSwapOption;
use finial_core::{Clock, ErrorKind, KeyType, UnixSeconds};
use finial_crypto::tls::TlsIdentity;
use finial_crypto::{PrivateKey, SignError};
use finial_runtime::{Metrics, Shutdown, Spawner};
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Why the server has no new SVID.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerSvidError {
    /// No key.
    #[error(transparent)]
    Key(#[from] SignError),
    /// No certificate.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The task that makes the key was lost.
    #[error("key generation was interrupted")]
    Interrupted,
}

impl ServerSvidError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Key(e) => e.kind(),
            Self::Issue(e) => e.kind(),
            Self::Interrupted => ErrorKind::Internal,
        }
    }
}

/// The SVID that the server shows now.
#[derive(Clone, Debug)]
pub struct ServerSvidState {
    /// Leaf first; DER each.
    pub chain: Vec<Arc<[u8]>>,
    /// Of the leaf.
    pub not_before: UnixSeconds,
    /// Of the leaf.
    pub not_after: UnixSeconds,
    /// Of the leaf; for plugins that act as the server.
    pub(crate) key: PrivateKey,
    /// From what it hangs.
    key_ids: KeyIds,
}

impl ServerSvidState {
    /// Past its half-life; or from the future, after the clock went back.
    fn is_due(&self, now: UnixSeconds) -> bool {
        now < self.not_before || now > self.not_before + (self.not_after - self.not_before) / 2
    }
}

/// Keeps the server's own SVID.
pub struct ServerSvid {
    issuer: Arc<Issuer>,
    bundles: Arc<BundleFeed>,
    key_type: KeyType,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    spawner: Spawner,
    tls: Arc<TlsIdentity>,
    state: ArcSwapOption<ServerSvidState>,
}

impl ServerSvid {
    /// Without an SVID; call [`ServerSvid::rotate`] once there is an authority.
    pub fn new(
        issuer: Arc<Issuer>,
        bundles: Arc<BundleFeed>,
        key_type: KeyType,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        spawner: Spawner,
    ) -> Arc<Self> {
        let tls = Arc::new(TlsIdentity::empty());
        Arc::new(Self { issuer, bundles, key_type, clock, metrics, spawner, tls, state: ArcSwapOption::empty() })
    }

    /// What TLS shows; follows the SVID.
    pub fn tls_identity(&self) -> Arc<TlsIdentity> {
        self.tls.clone()
    }

    /// The SVID now, once there is one.
    pub fn state(&self) -> Option<Arc<ServerSvidState>> {
        self.state.load_full()
    }

    /// Makes a new key and SVID and shows them from now on.
    pub async fn rotate(&self) -> Result<(), ServerSvidError> {
        let call = self.metrics.call("svid.rotate");
        let result = self.try_rotate().await;
        call.finish_with(&result, ServerSvidError::kind);
        result
    }

    async fn try_rotate(&self) -> Result<(), ServerSvidError> {
        tracing::debug!(subsystem_name = "svid_rotator", "Rotating server SVID");
        let key = self.generate().await?;
        let issued = self.issuer.server_x509_svid(key.public_key()).await?;
        self.tls.set(&issued.chain, &key)?;
        tracing::debug!(subsystem_name = "svid_rotator", expiration = %Rfc3339(issued.not_after), "Server SVID rotated");
        let key_ids = KeyIds::of(&issued.chain);
        let (not_before, not_after) = (issued.not_before, issued.not_after);
        let state = ServerSvidState { chain: issued.chain, not_before, not_after, key, key_ids };
        self.state.store(Some(Arc::new(state)));
        Ok(())
    }

    /// RSA keys take long enough to make that they must not hold up the tasks of this thread.
    async fn generate(&self) -> Result<PrivateKey, ServerSvidError> {
        let key_type = self.key_type;
        if matches!(key_type, KeyType::EcP256 | KeyType::EcP384) {
            return Ok(PrivateKey::generate(key_type)?);
        }
        let made = self.spawner.blocking(move || PrivateKey::generate(key_type)).await;
        Ok(made.map_err(|_| ServerSvidError::Interrupted)??)
    }

    /// Renews the SVID when it is due.
    pub async fn check(&self) {
        let now = self.clock.now();
        if self.state().is_none_or(|s| s.is_due(now) || self.is_abandoned(&s))
            && let Err(error) = self.rotate().await
        {
            tracing::error!(subsystem_name = "svid_rotator", %error, "Could not rotate server SVID");
        }
    }

    /// Whether the authority that signed it is tainted or gone, and another signs now.
    fn is_abandoned(&self, state: &ServerSvidState) -> bool {
        let stands = self.bundles.own().is_none_or(|own| state.key_ids.standing(own.stored()) == Standing::Good);
        let same =
            self.issuer.authorities().x509().is_none_or(|active| state.key_ids.include(&active.ca.subject_key_id()));
        if stands || same {
            return false;
        }
        let message = "Server SVID signed using a tainted authority, forcing rotation of the Server SVID";
        tracing::info!(subsystem_name = "svid_rotator", "{message}");
        true
    }

    /// Looks after the SVID until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        let (mut bundles, mut authorities) = (self.bundles.changes(), self.issuer.authorities().changes());
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(()) = bundles.changed() => {}
                Ok(()) = authorities.changed() => {}
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
            }
            self.check().await;
        }
    }
}

#[cfg(test)]
#[path = "svid_tests.rs"]
mod tests;
