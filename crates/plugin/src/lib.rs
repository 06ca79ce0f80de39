//! What a plugin is: traits over plain values, one per kind. The server and the agent know these and no implementation;
//! `catalog` knows the implementations. Each trait has a conformance suite in [`conformance`], a macro line per implementation.
//!
//! A plugin returns verdicts and constraints; it never signs an SVID and never touches the datastore.

mod attest;
mod composer;
mod config;
pub mod conformance;
mod error;
mod host;
mod key_manager;
mod publish;
mod publishing;
mod renewed;
mod signing_ca;
mod svid_store;
mod upstream;

pub use attest::{
    AgentNodeAttestor, AttestSession, AttestVerdict, Challenger, Peer, Reference, ServerNodeAttestor, WorkloadAttestor,
    prefixed_selectors,
};
pub use composer::{CredentialComposer, Holder, X509CaAttributes, X509SvidAttributes};
pub use config::{PluginContext, all_given, decode, secret};
pub use error::{PluginError, PluginKind};
pub use host::{HostServices, ServerHost, ServerIdentity};
pub use key_manager::{KeyManager, metered_for_agent, metered_for_server};
pub use publish::{BundleFormat, BundlePublisher, Notifier, PublishedForm, parse_refresh_hint};
pub use publishing::Publishing;
pub use renewed::Renewed;
pub use signing_ca::{SigningCa, check_ca_csr};
pub use svid_store::{StoredSvid, SvidStore};
pub use upstream::{MintedX509Ca, UpstreamAuthorities, UpstreamAuthority};

use std::collections::BTreeMap;
use std::sync::Arc;

/// The plugins of a server, built and configured.
#[derive(Clone)]
pub struct ServerPlugins {
    /// Holds the keys of the authorities.
    pub key_manager: Arc<dyn KeyManager>,
    /// Node attestors by name. `join_token` is not among them: the server core handles it, as it needs the datastore.
    pub node_attestors: BTreeMap<String, Arc<dyn ServerNodeAttestor>>,
    /// Whether `join_token` is configured.
    pub join_token: bool,
    /// Signs the X.509 authorities; without one they are self-signed.
    pub upstream_authority: Option<Arc<dyn UpstreamAuthority>>,
    /// Have a say in what credentials say, in this order.
    pub credential_composers: Vec<Arc<dyn CredentialComposer>>,
    /// Hear of the bundle.
    pub notifiers: Vec<Arc<dyn Notifier>>,
    /// Put the bundle where others find it.
    pub bundle_publishers: Vec<Arc<dyn BundlePublisher>>,
    /// What external plugins may ask of the server, to be filled in by it.
    pub host: Arc<HostServices>,
}

/// The plugins of an agent, built and configured.
#[derive(Clone)]
pub struct AgentPlugins {
    /// Holds the agent's own keys.
    pub key_manager: Arc<dyn KeyManager>,
    /// Whether keys are gone after a restart (the `memory` key manager).
    pub keys_are_volatile: bool,
    /// The one node attestor, with its name.
    pub node_attestor: (String, Arc<dyn AgentNodeAttestor>),
    /// At least one.
    pub workload_attestors: Vec<Arc<dyn WorkloadAttestor>>,
    /// For entries whose SVIDs are to be stored.
    pub svid_stores: Vec<Arc<dyn SvidStore>>,
    /// What external plugins may ask of the agent, to be filled in by it.
    pub host: Arc<HostServices>,
}
