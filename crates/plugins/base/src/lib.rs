//! The plugins that need nothing but this machine and servers like this one: key managers `memory` and `disk`, node attestors
//! `join_token` and `x509pop`, workload attestors `unix`, `systemd`, `slurm` and `gvisor`, upstream authorities `disk` and
//! `spire`, SVID store `disk`,
//! credential composer `uniqueid`, bundle publisher `file`. Both halves of a node attestor live in one file.

pub mod bundle_publisher;
pub mod credential_composer;
pub mod key_manager;
pub mod node_attestor;
pub mod svid_store;
pub mod upstream_authority;
pub mod workload_attestor;
