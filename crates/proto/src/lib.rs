//! The wire: generated code for each contract in `/proto`, the conversions between it and `finial_core`, and the codec
//! that sends ready-made answers. Nothing outside this crate knows field numbers.
//!
//! Module tree: [`types`] (shared values), [`server`] and [`agent`] (SPIRE's APIs, one module per service),
//! [`workload`] (the SPIFFE Workload API; its server half, in [`workload::server`], answers [`encoded`] bytes),
//! [`sync`] (our own stream to our agents, likewise), [`rotation`] (orders to a whole domain), [`plugin`] (external plugins), [`envoy`] (secret discovery), [`health`], [`rpc`] (status details), [`common`] and [`journal`] (SPIRE's
//! blobs in SQL); [`digest`] says whether two sets of entries are the same.

pub mod convert;
pub mod digest;
pub mod encoded;
mod redact;

/// The contracts as a compiled `FileDescriptorSet`, for what handles messages by their names: JSON output, policies. Kept
/// current by `tests/descriptors.rs`.
pub const DESCRIPTORS: &[u8] = include_bytes!("descriptors.bin");

/// Metadata of `BatchNewX509SVID` by which our agents say when the first of the SVIDs that they renew ends, in unix seconds (0
/// when a workload waits for its first): who is nearest to it is served first.
pub const SVID_EXPIRY: &str = "finial-svid-expiry";

macro_rules! generated {
    ($(#[$doc:meta])* $name:ident, $file:literal) => {
        $(#[$doc])*
        #[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
        pub mod $name {
            include!(concat!("gen/", $file, ".rs"));
        }
    };
}

generated!(
    /// Values that the server's and the agent's APIs share.
    types, "types"
);
generated!(
    /// Blobs in SPIRE's datastore.
    common, "common"
);
generated!(
    /// The journal of the server's authorities.
    journal, "journal"
);
generated!(
    /// gRPC health checking.
    health, "health"
);
generated!(
    /// The status that carries details.
    rpc, "rpc"
);

/// The server's APIs.
pub mod server {
    generated!(
        /// Agents: joining, renewing, management.
        agent, "server_agent"
    );
    generated!(
        /// Bundles.
        bundle, "server_bundle"
    );
    generated!(
        /// What a running server says of itself.
        debug, "server_debug"
    );
    /// Registration entries.
    #[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
    pub mod entry {
        include!("gen/server_entry.rs");
        /// The server half of which the answers to agents are [`crate::encoded::Encoded`].
        pub mod encoded {
            include!("gen/server_entry_encoded.rs");
            pub use entry_server::{Entry, EntryServer};
        }
    }
    generated!(
        /// The server's own authorities.
        localauthority, "server_localauthority"
    );
    generated!(
        /// The log level.
        logger, "server_logger"
    );
    generated!(
        /// Issuing.
        svid, "server_svid"
    );
    generated!(
        /// Federation relationships.
        trustdomain, "server_trustdomain"
    );
}

/// The agent's APIs on its admin socket.
pub mod agent {
    generated!(
        /// What a running agent says of itself.
        debug, "agent_debug"
    );
    generated!(
        /// SVIDs in the name of other workloads.
        delegatedidentity, "agent_delegatedidentity"
    );
    generated!(
        /// The log level.
        logger, "agent_logger"
    );
    generated!(
        /// Ours: why a process has the identities that it has.
        explain, "agent_explain"
    );
}

/// What we and external plugins say to each other: SPIRE's plugin SDK over HashiCorp's go-plugin.
pub mod plugin {
    generated!(
        /// go-plugin's own services.
        go, "plugin_go"
    );
    generated!(
        /// Which services each side has.
        init, "plugin_init"
    );
    generated!(
        /// A plugin's configuration.
        config, "plugin_config"
    );
    generated!(
        /// Values that several kinds share.
        types, "plugin_types"
    );
    generated!(
        /// Workload attestors.
        workload_attestor, "plugin_workload_attestor"
    );
    generated!(
        /// SVID stores.
        svid_store, "plugin_svid_store"
    );
    generated!(
        /// Key managers; those of agents have the same messages.
        key_manager, "plugin_key_manager"
    );
    generated!(
        /// The agent's half of node attestors.
        agent_node_attestor, "plugin_agent_node_attestor"
    );
    generated!(
        /// The server's half of node attestors.
        server_node_attestor, "plugin_server_node_attestor"
    );
    generated!(
        /// Upstream authorities.
        upstream_authority, "plugin_upstream_authority"
    );
    generated!(
        /// Credential composers.
        credential_composer, "plugin_credential_composer"
    );
    generated!(
        /// Notifiers.
        notifier, "plugin_notifier"
    );
    generated!(
        /// Bundle publishers.
        bundle_publisher, "plugin_bundle_publisher"
    );
    generated!(
        /// Metrics of plugins, which we take.
        host_metrics, "plugin_host_metrics"
    );
    generated!(
        /// Whether an agent has attested.
        host_agent_store, "plugin_host_agent_store"
    );
    generated!(
        /// The server's own identity.
        host_identity_provider, "plugin_host_identity_provider"
    );
}

/// The SPIFFE Workload API.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
pub mod workload {
    include!("gen/workload.rs");
    /// The server half, whose hot answers are [`crate::encoded::Encoded`].
    pub mod server {
        include!("gen/workload_server.rs");
        pub use spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
    }
}

generated!(
    /// The SPIFFE Broker API.
    broker, "broker"
);
pub mod envoy;

generated!(
    /// Orders that replace the authorities of all servers.
    rotation, "rotation"
);

impl rotation::Goal {
    /// As people say it.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Unspecified => "nothing",
            Self::Prepare => "prepare",
            Self::Activate => "activate",
            Self::Taint => "taint",
            Self::Revoke => "revoke",
            Self::TakeBack => "take back",
        }
    }
}

/// Our own stream of what an agent may have.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
pub mod sync {
    include!("gen/sync.rs");
    /// The server half, whose answers are [`crate::encoded::Encoded`].
    pub mod server {
        include!("gen/sync_server.rs");
        pub use agent_sync_server::{AgentSync, AgentSyncServer};
    }
}
