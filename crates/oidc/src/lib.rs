//! The OIDC discovery provider: a trust domain's JWT keys as relying parties of OpenID Connect look for them (OpenID
//! Connect Discovery 1.0, RFC 7517).
//!
//! `keys` holds the last key set; a `source` keeps it current; `documents` answers requests from it; `serve` listens. A server that has a provider in it
//! sets [`Keys`] by itself.

mod documents;
mod health;
mod keys;
mod serve;
mod source;

pub use keys::Keys;
pub use serve::{ServeError, run, serve};
