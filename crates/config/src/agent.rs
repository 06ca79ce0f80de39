//! Resolved agent settings.

use crate::{HealthSettings, LogSettings, PluginConfig, ProfilingSettings, TelemetrySettings};
use finial_core::{Secret, SpiffeId, TrustDomain};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything an agent is told.
#[derive(Clone, Debug)]
pub struct AgentSettings {
    /// `trust_domain`.
    pub trust_domain: TrustDomain,
    /// `server_address`: DNS name or IP address, without brackets.
    pub server_address: String,
    /// `server_port`.
    pub server_port: u16,
    /// `data_dir`, default `.`.
    pub data_dir: PathBuf,
    /// `socket_path`, absolute, default `/tmp/spire-agent/public/api.sock`. None: Workload API and SDS are both off.
    pub socket_path: Option<PathBuf>,
    /// `admin_socket_path`, absolute. None: off (default).
    pub admin_socket_path: Option<PathBuf>,
    /// `authorized_delegates`: who may use the Delegated Identity API.
    pub authorized_delegates: Vec<SpiffeId>,
    /// `disable_workload_api`, default false.
    pub disable_workload_api: bool,
    /// `disable_sds_api`, default false.
    pub disable_sds_api: bool,
    /// `join_token`, or the trimmed content of `join_token_file`.
    pub join_token: Option<Secret<String>>,
    /// How the server is known at the first contact.
    pub bootstrap: Bootstrap,
    /// `trust_bundle_format`, default pem; for [`Bootstrap::Path`] and [`Bootstrap::Url`].
    pub trust_bundle_format: TrustBundleFormat,
    /// `rebootstrap_mode`, default never.
    pub rebootstrap_mode: RebootstrapMode,
    /// `rebootstrap_delay`, default 10 min.
    pub rebootstrap_delay: Duration,
    /// `allow_unauthenticated_verifiers`, default false.
    pub allow_unauthenticated_verifiers: bool,
    /// `allowed_foreign_jwt_claims`.
    pub allowed_foreign_jwt_claims: Vec<String>,
    /// `availability_target`: at least 24 h. None: off.
    pub availability_target: Option<Duration>,
    /// `workload_x509_svid_key_type`, default ec-p256.
    pub workload_key_type: WorkloadKeyType,
    /// `x509_svid_cache_max_size`, soft, default 1000.
    pub x509_svid_cache_max_size: usize,
    /// `jwt_svid_cache_max_size`, hard, default 1000.
    pub jwt_svid_cache_max_size: usize,
    /// `sds { }`.
    pub sds: SdsSettings,
    /// `experimental { sync_interval }`, default 5 s.
    pub sync_interval: Duration,
    /// `experimental { jwt_svid_cache_hit_timeout }`, default 30 s.
    pub jwt_svid_cache_hit_timeout: Duration,
    /// `experimental { use_sync_authorized_entries }`, default true.
    pub use_sync_authorized_entries: bool,
    /// `experimental { require_pq_kem }`, default false.
    pub require_pq_kem: bool,
    /// `experimental { offline_cache }`, ours, default auto.
    pub offline_cache: OfflineCache,
    /// `experimental { offline_cache_host_key_path }`, ours, default [`HOST_KEY_DEFAULT`].
    pub offline_cache_host_key_path: PathBuf,
    /// `experimental { handover }`, ours, default true: sockets are taken over from the agent that runs, and handed to the next one.
    pub handover: bool,
    /// `experimental { wait_for_entry, wait_for_entry_max_waiters }`, ours: whether a workload that no entry fits yet waits for one.
    /// None: it is refused at once (default).
    pub wait_for_entry: Option<WaitForEntry>,
    /// Whether `experimental { feature_flags }` names `wit-svid`: the Workload API gives WIT-SVIDs.
    pub wit_svids_enabled: bool,
    /// `experimental { ratelimit { } }`: calls per second and caller; 0: no limit (default).
    pub rate_limits: AgentRateLimits,
    /// `experimental { broker { } }`.
    pub broker: Option<BrokerSettings>,
    /// `log_selectors`: selector types that may be logged.
    pub log_selectors: Vec<String>,
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

impl AgentSettings {
    /// The settings that a file with only the required keys gives; the socket is below `data_dir`. For code and tests
    /// that start an agent without a file.
    pub fn minimal(trust_domain: TrustDomain, server: SocketAddr, bootstrap: Bootstrap, data_dir: PathBuf) -> Self {
        Self {
            trust_domain,
            server_address: server.ip().to_string(),
            server_port: server.port(),
            socket_path: Some(data_dir.join("public").join("api.sock")),
            data_dir,
            admin_socket_path: None,
            authorized_delegates: Vec::new(),
            disable_workload_api: false,
            disable_sds_api: false,
            join_token: None,
            bootstrap,
            trust_bundle_format: TrustBundleFormat::default(),
            rebootstrap_mode: RebootstrapMode::default(),
            rebootstrap_delay: Duration::from_secs(600),
            allow_unauthenticated_verifiers: false,
            allowed_foreign_jwt_claims: Vec::new(),
            availability_target: None,
            workload_key_type: WorkloadKeyType::default(),
            x509_svid_cache_max_size: 1000,
            jwt_svid_cache_max_size: 1000,
            sds: SdsSettings::default(),
            sync_interval: Duration::from_secs(5),
            jwt_svid_cache_hit_timeout: Duration::from_secs(30),
            use_sync_authorized_entries: true,
            require_pq_kem: false,
            offline_cache: OfflineCache::default(),
            offline_cache_host_key_path: HOST_KEY_DEFAULT.into(),
            handover: true,
            wait_for_entry: None,
            wit_svids_enabled: false,
            rate_limits: AgentRateLimits::default(),
            broker: None,
            log_selectors: Vec::new(),
            profiling: ProfilingSettings::default(),
            log: LogSettings::default(),
            telemetry: TelemetrySettings::default(),
            health: HealthSettings::default(),
            plugins: Vec::new(),
        }
    }
}

/// How the agent knows the server at the first contact, when it has no bundle of its own yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// `insecure_bootstrap`: it does not.
    Insecure,
    /// `trust_bundle_path`: a file.
    Path(PathBuf),
    /// `trust_bundle_url`: fetched by HTTPS, or by HTTP through `unix_socket`.
    Url {
        /// The URL.
        url: String,
        /// `trust_bundle_unix_socket`.
        unix_socket: Option<PathBuf>,
    },
    /// `trust_bundle_spiffe_workload_api`: address of another Workload API.
    WorkloadApi(String),
}

/// The form of a bootstrap bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrustBundleFormat {
    /// PEM certificates (default).
    #[default]
    Pem,
    /// A SPIFFE bundle document.
    Spiffe,
}

/// What to do when the server no longer fits the bundle we hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebootstrapMode {
    /// Nothing (default).
    #[default]
    Never,
    /// Start over if attestation can be repeated.
    Auto,
    /// Start over.
    Always,
}

/// Where systemd keeps the host's key.
pub const HOST_KEY_DEFAULT: &str = "/var/lib/systemd/credential.secret";

/// What seals the SVIDs that an agent keeps on disk for a restart without a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OfflineCache {
    /// `auto` (default): the host's key, or else the kernel's keyring, or else nothing is kept.
    #[default]
    Auto,
    /// `host_key`: systemd's key of the host, which only root can read.
    HostKey,
    /// `keyring`: a key that the kernel holds until the next reboot.
    Keyring,
    /// `off`: nothing is kept on disk.
    Off,
}

/// How workloads wait for their entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitForEntry {
    /// `wait_for_entry`: for how long, at most ten minutes.
    pub longest: Duration,
    /// `wait_for_entry_max_waiters`: how many at a time, half of them of one user; default 1000.
    pub waiters_max: usize,
}

/// Key types of workload SVIDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadKeyType {
    /// `ec-p256` (default).
    #[default]
    EcP256,
    /// `ec-p384`.
    EcP384,
    /// `rsa-2048`.
    Rsa2048,
}

/// `sds { }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SdsSettings {
    /// `default_svid_name`, default `default`.
    pub default_svid_name: String,
    /// `default_bundle_name`, default `ROOTCA`.
    pub default_bundle_name: String,
    /// `default_all_bundles_name`, default `ALL`.
    pub default_all_bundles_name: String,
    /// `disable_spiffe_cert_validation`, default false.
    pub disable_spiffe_cert_validation: bool,
}

impl Default for SdsSettings {
    fn default() -> Self {
        Self {
            default_svid_name: "default".into(),
            default_bundle_name: "ROOTCA".into(),
            default_all_bundles_name: "ALL".into(),
            disable_spiffe_cert_validation: false,
        }
    }
}

/// Calls per second and caller; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentRateLimits {
    /// FetchX509SVID.
    pub fetch_x509_svid: u32,
    /// FetchJWTSVID.
    pub fetch_jwt_svid: u32,
    /// FetchX509Bundles.
    pub fetch_x509_bundles: u32,
    /// FetchJWTBundles.
    pub fetch_jwt_bundles: u32,
    /// StreamSecrets (SDS).
    pub stream_secrets: u32,
    /// FetchSecrets (SDS).
    pub fetch_secrets: u32,
}

/// `experimental { broker { } }`: at least one of the two addresses is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerSettings {
    /// `socket_path`, absolute.
    pub socket_path: Option<PathBuf>,
    /// `bind_address`, resolved.
    pub bind_address: Option<SocketAddr>,
    /// `brokers`.
    pub brokers: Vec<BrokerUser>,
}

/// Who may use the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerUser {
    /// `id`.
    pub id: SpiffeId,
    /// `allowed_reference_types`, not empty.
    pub allowed_reference_types: Vec<BrokerReference>,
}

/// A workload reference type a broker may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerReference {
    /// `type_url`; `*`: any.
    pub type_url: String,
    /// `allow_over_tcp`, default false.
    pub allow_over_tcp: bool,
}
