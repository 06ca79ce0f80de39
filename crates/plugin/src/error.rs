//! Errors of plugins.

use finial_core::{ErrorKind, Fault};
use std::fmt;

/// The kinds of plugins, by the word that errors use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginKind {
    /// Holds private keys.
    KeyManager,
    /// Attests agents.
    NodeAttestor,
    /// Attests workloads.
    WorkloadAttestor,
    /// Signs X.509 authorities.
    UpstreamAuthority,
    /// Stores SVIDs.
    SvidStore,
    /// Has a say in what credentials say.
    CredentialComposer,
    /// Hears of the bundle.
    Notifier,
    /// Publishes the bundle.
    BundlePublisher,
}

impl fmt::Display for PluginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeyManager => "keymanager",
            Self::NodeAttestor => "nodeattestor",
            Self::WorkloadAttestor => "workloadattestor",
            Self::UpstreamAuthority => "upstreamauthority",
            Self::SvidStore => "svidstore",
            Self::CredentialComposer => "credentialcomposer",
            Self::Notifier => "notifier",
            Self::BundlePublisher => "bundlepublisher",
        })
    }
}

/// A failure of a plugin: what kind it is, what the caller may read, and what only the log may say.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct PluginError {
    /// What kind it is.
    pub kind: ErrorKind,
    /// What the caller may read; SPIRE's wording where SPIRE has one.
    pub message: String,
    /// What only the log may say.
    #[source]
    pub cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl PluginError {
    /// A failure without a private cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    /// The input is malformed.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// The input is well formed and proves nothing.
    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Denied, message)
    }

    /// The plugin's own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Adds the private cause.
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Says whose it is, as SPIRE does: `nodeattestor(x509pop): …`. Whoever calls a plugin adds this, once.
    pub fn of(mut self, kind: PluginKind, name: &str) -> Self {
        self.message = format!("{kind}({name}): {}", self.message);
        self
    }
}

impl From<PluginError> for Fault {
    fn from(error: PluginError) -> Self {
        Self { kind: error.kind, message: error.message, cause: error.cause }
    }
}
