//! Resolved server settings.

use crate::{HealthSettings, LogSettings, OidcEndpoint, PluginConfig, ProfilingSettings, TelemetrySettings};
use finial_core::{EndpointProfile, KeyType, SpiffeId, TrustDomain};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything a server is told.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// `trust_domain`.
    pub trust_domain: TrustDomain,
    /// `data_dir`.
    pub data_dir: PathBuf,
    /// `bind_address` and `bind_port`, resolved; default `0.0.0.0:8081`.
    pub bind_address: SocketAddr,
    /// `socket_path`, absolute; default `/tmp/spire-server/private/api.sock`.
    pub socket_path: PathBuf,
    /// `admin_ids`; may be of foreign trust domains.
    pub admin_ids: Vec<SpiffeId>,
    /// `agent_ttl`; None: [`Self::x509_svid_ttl`].
    pub agent_ttl: Option<Duration>,
    /// `default_x509_svid_ttl`, default 1 h.
    pub x509_svid_ttl: Duration,
    /// `default_jwt_svid_ttl`, default 5 min.
    pub jwt_svid_ttl: Duration,
    /// `ca_ttl`, default 24 h: of X.509 authorities and JWT keys.
    pub ca_ttl: Duration,
    /// `ca_key_type`, default ec-p256; also the key of the server's own SVID.
    pub ca_key_type: KeyType,
    /// `jwt_key_type`, default as `ca_key_type`.
    pub jwt_key_type: KeyType,
    /// `jwt_issuer`: the `iss` claim; None: the claim is left out.
    pub jwt_issuer: Option<String>,
    /// `ca_subject`, default C=US, O=SPIFFE.
    pub ca_subject: CaSubject,
    /// `disable_jwt_svids`, default false.
    pub disable_jwt_svids: bool,
    /// `audit_log_enabled`, default false.
    pub audit_log_enabled: bool,
    /// `prune_attested_nodes_expired_for` and its companions; None: agents are not pruned.
    pub prune_agents: Option<PruneAgentsSettings>,
    /// `proxy_protocol_trusted_cidrs`.
    pub proxy_protocol_trusted_cidrs: Vec<String>,
    /// `ratelimit { }`.
    pub rate_limit: RateLimitSettings,
    /// `max_attested_node_info_staleness`, default 0.
    pub max_attested_node_info_staleness: Duration,
    /// `federation { }`.
    pub federation: FederationSettings,
    /// `experimental { auth_opa_policy_engine { local { } } }`; None: the built-in rules.
    pub policy: Option<PolicySettings>,
    /// `experimental { agent_spiffe_id_as_selector }`, default false.
    pub agent_spiffe_id_as_selector: bool,
    /// `experimental { require_pq_kem }`: TLS only with a post-quantum key exchange, default false.
    pub require_pq_kem: bool,
    /// Timing of the entry cache and of the event tables (`experimental { }`).
    pub events: EventSettings,
    /// `experimental { wit_key_type }`, default as `ca_key_type`.
    pub wit_key_type: KeyType,
    /// `experimental { wit_issuer }`.
    pub wit_issuer: Option<String>,
    /// Whether `experimental { feature_flags }` names `wit-svid`.
    pub wit_svids_enabled: bool,
    /// `experimental { oidc { } }`, of our own: an OIDC discovery provider in the server.
    pub oidc: Option<OidcEndpoint>,
    /// `profiling_*`.
    pub profiling: ProfilingSettings,
    /// `log_*`.
    pub log: LogSettings,
    /// `telemetry { }`.
    pub telemetry: TelemetrySettings,
    /// `health_checks { }`.
    pub health: HealthSettings,
    /// `plugins { }`, in order, disabled ones included.
    pub plugins: Vec<PluginConfig>,
}

impl ServerSettings {
    /// The settings that a file with only the required keys gives; `socket_path` is below `data_dir`. For code and
    /// tests that start a server without a file.
    pub fn minimal(trust_domain: TrustDomain, data_dir: PathBuf) -> Self {
        Self {
            trust_domain,
            bind_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            socket_path: data_dir.join("api.sock"),
            data_dir,
            admin_ids: Vec::new(),
            agent_ttl: None,
            x509_svid_ttl: Duration::from_secs(3600),
            jwt_svid_ttl: Duration::from_secs(300),
            ca_ttl: Duration::from_secs(24 * 3600),
            ca_key_type: KeyType::EcP256,
            jwt_key_type: KeyType::EcP256,
            jwt_issuer: None,
            ca_subject: CaSubject::default(),
            disable_jwt_svids: false,
            audit_log_enabled: false,
            prune_agents: None,
            proxy_protocol_trusted_cidrs: Vec::new(),
            rate_limit: RateLimitSettings::default(),
            max_attested_node_info_staleness: Duration::ZERO,
            federation: FederationSettings::default(),
            policy: None,
            agent_spiffe_id_as_selector: false,
            require_pq_kem: false,
            events: EventSettings::default(),
            wit_key_type: KeyType::EcP256,
            wit_issuer: None,
            wit_svids_enabled: false,
            oidc: None,
            profiling: ProfilingSettings::default(),
            log: LogSettings::default(),
            telemetry: TelemetrySettings::default(),
            health: HealthSettings::default(),
            plugins: Vec::new(),
        }
    }
}

/// `ca_subject { }`: the distinguished name of X.509 authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaSubject {
    /// `country`.
    pub country: Vec<String>,
    /// `organization`.
    pub organization: Vec<String>,
    /// `common_name`; empty: none.
    pub common_name: String,
}

impl Default for CaSubject {
    fn default() -> Self {
        Self { country: vec!["US".into()], organization: vec!["SPIFFE".into()], common_name: String::new() }
    }
}

/// When expired agents are removed. The job runs every hour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PruneAgentsSettings {
    /// `prune_attested_nodes_expired_for`: how long after expiry.
    pub expired_for: Duration,
    /// `prune_attested_nodes_batch_size`: rows a turn, default 1000.
    pub batch_size: u32,
    /// `prune_tofu_nodes`: also agents that cannot attest again, default false.
    pub non_reattestable: bool,
}

/// `ratelimit { }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimitSettings {
    /// AttestAgent, per address; default true.
    pub attestation: bool,
    /// SVID signing, per address; default true.
    pub signing: bool,
}

impl Default for RateLimitSettings {
    fn default() -> Self {
        Self { attestation: true, signing: true }
    }
}

/// A policy of one's own in Rego, in place of the built-in rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicySettings {
    /// `rego_path`: the policy.
    pub rego_path: PathBuf,
    /// `policy_data_path`: a JSON object that the policy sees as `data`; None: an empty one.
    pub data_path: Option<PathBuf>,
}

/// Timing of the entry cache and of the event tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventSettings {
    /// `events_based_cache`, default false.
    pub events_based_cache: bool,
    /// `cache_reload_interval`, default 5 s.
    pub cache_reload_interval: Duration,
    /// `full_cache_reload_interval`, default 24 h.
    pub full_cache_reload_interval: Duration,
    /// `prune_events_older_than`, default 12 h.
    pub prune_events_older_than: Duration,
    /// `event_timeout`, default 15 min.
    pub event_timeout: Duration,
}

impl Default for EventSettings {
    fn default() -> Self {
        Self {
            events_based_cache: false,
            cache_reload_interval: Duration::from_secs(5),
            full_cache_reload_interval: Duration::from_secs(24 * 3600),
            prune_events_older_than: Duration::from_secs(12 * 3600),
            event_timeout: Duration::from_secs(15 * 60),
        }
    }
}

/// `federation { }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FederationSettings {
    /// `bundle_endpoint { }`: serve our bundle.
    pub bundle_endpoint: Option<BundleEndpointSettings>,
    /// `federates_with "td" { }`.
    pub federates_with: BTreeMap<TrustDomain, FederatesWith>,
}

/// `bundle_endpoint { }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleEndpointSettings {
    /// IP address, unspecified if it does not parse; and port.
    pub address: SocketAddr,
    /// `refresh_hint`, default 5 min.
    pub refresh_hint: Duration,
    /// How it authenticates.
    pub profile: BundleEndpointProfile,
}

/// How the bundle endpoint authenticates itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BundleEndpointProfile {
    /// With the server's SVID (default).
    #[default]
    HttpsSpiffe,
    /// With a certificate from an ACME authority.
    Acme(BundleEndpointAcme),
    /// With certificate and key files.
    ServingCertFile {
        /// `cert_file_path`.
        cert_file_path: PathBuf,
        /// `key_file_path`.
        key_file_path: PathBuf,
        /// `file_sync_interval`, default 1 h.
        file_sync_interval: Duration,
    },
}

/// Where the bundle endpoint's certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleEndpointAcme {
    /// `directory_url`; empty: Let's Encrypt.
    pub directory_url: String,
    /// `domain_name`.
    pub domain_name: String,
    /// `email`.
    pub email: String,
    /// `tos_accepted`.
    pub tos_accepted: bool,
    /// Where certificates are kept: `bundle-acme` in the data directory.
    pub cache_dir: PathBuf,
}

/// One federation relationship from the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FederatesWith {
    /// `bundle_endpoint_url`.
    pub bundle_endpoint_url: String,
    /// `bundle_endpoint_profile`.
    pub profile: EndpointProfile,
}
