//! SPIRE's configuration files, resolved: what a server or an agent is told to do.
//!
//! [`ServerSettings`] and [`AgentSettings`] are plain values, checked and with defaults filled in; nothing below reads
//! a file or an environment variable again. All durations are `std::time::Duration`; all paths are as written unless
//! said otherwise.

mod agent;
mod common;
mod plugins;
mod server;

pub use agent::{
    AgentRateLimits, AgentSettings, Bootstrap, BrokerReference, BrokerSettings, BrokerUser, RebootstrapMode,
    SdsSettings, TrustBundleFormat, WorkloadKeyType,
};
pub use common::{
    HealthSettings, LogFormat, LogLevel, LogSettings, M3Sink, ProfilingSettings, PrometheusSettings, PrometheusTls,
    TelemetrySettings,
};
pub use plugins::{PluginConfig, PluginData, PluginDataError};
pub use server::{
    BundleEndpointProfile, BundleEndpointSettings, CaSubject, EndpointProfile, EventSettings, FederatesWith,
    FederationSettings, PruneAgentsSettings, RateLimitSettings, ServerSettings,
};
