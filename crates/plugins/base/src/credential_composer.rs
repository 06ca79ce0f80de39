//! Credential composers that need nothing but this machine.

mod uniqueid;

pub use uniqueid::UniqueId;
