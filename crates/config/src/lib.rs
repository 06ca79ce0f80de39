//! SPIRE's configuration files, resolved: what a server or an agent is told to do.
//!
//! [`ServerSettings`] and [`AgentSettings`] are plain values, checked and with defaults filled in; nothing below reads
//! a file or an environment variable again. All durations are `std::time::Duration`; all paths are as written unless
//! said otherwise.

mod agent;
mod agent_file;
mod common;
mod duration;
mod expand;
mod nearest;
mod oidc;
mod plugins;
mod problem;
mod raw;
mod resolve;
mod server;
mod server_file;

pub use agent::{
    AgentRateLimits, AgentSettings, Bootstrap, BrokerReference, BrokerSettings, BrokerUser, HOST_KEY_DEFAULT,
    OfflineCache, RebootstrapMode, SdsSettings, TrustBundleFormat, WaitForEntry, WorkloadKeyType,
};
pub use agent_file::{AGENT_CONFIG_DEFAULT, AGENT_SOCKET_DEFAULT, AgentOverrides, load_agent, parse_agent};
pub use common::{
    HealthSettings, LogFormat, LogLevel, LogSettings, M3Sink, ProfilingSettings, PrometheusSettings, PrometheusTls,
    TelemetrySettings,
};
pub use duration::{format_go_duration, parse_go_duration};
pub use expand::expand_env;
pub use nearest::nearest;
pub use oidc::{
    OIDC_CONFIG_DEFAULT, OidcDocuments, OidcEndpoint, OidcHealth, OidcListen, OidcSettings, OidcSource, load_oidc,
    parse_oidc, socket_address,
};
pub use plugins::{PluginConfig, PluginData, PluginDataError};
pub use problem::{ConfigError, Loaded, Notice, Problem, Readable};
pub use server::{
    BundleEndpointAcme, BundleEndpointProfile, BundleEndpointSettings, CaSubject, EventSettings, FederatesWith,
    FederationSettings, PolicySettings, PruneAgentsSettings, RateLimitSettings, ServerSettings,
};
pub use server_file::{SERVER_CONFIG_DEFAULT, SERVER_SOCKET_DEFAULT, ServerOverrides, load_server, parse_server};
