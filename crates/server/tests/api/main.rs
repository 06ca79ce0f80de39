//! The server's APIs, called over real sockets and real TLS by plain clients.
//!
//! [`harness::Server`] is a whole server on a temporary SQLite file, on loopback, with a clock that the test moves.

// A helper that cannot go on ends its test, as the tests themselves do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod agents;
mod authorities;
mod authorization;
mod bad_input;
mod bundles;
mod doors;
mod downstream;
mod entries;
mod from_memory;
mod harness;
mod local;
mod outage;
mod policy;
mod relationships;
mod rotation;
mod strangers;
mod svids;
mod sync;
#[path = "../shared/until.rs"]
mod until;
mod watch;
mod wit;
