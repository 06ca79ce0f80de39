//! HashiCorp Vault: the upstream authority `vault`, by its PKI engine.
//!
//! Four calls over HTTPS need no SDK: `vaultrs` would bring reqwest and a second set of TLS settings.

mod api;
mod config;
#[cfg(test)]
mod fake;
mod session;
mod upstream;

pub use upstream::Vault;
