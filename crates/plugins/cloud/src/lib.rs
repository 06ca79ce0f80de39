//! Plugins for AWS, Google Cloud and Azure: bundle publishers, a notifier, and upstream authorities. Each is a handful of HTTP
//! requests, so they are made here and not by the clouds' own libraries (docs/adr/17).
//!
//! [`aws`], [`gcp`] and [`azure`] each know how to identify to their cloud; `world` is what all see of the world.

pub mod aws;
pub mod azure;
pub mod gcp;
mod oauth;
mod world;

#[cfg(test)]
mod testing;
