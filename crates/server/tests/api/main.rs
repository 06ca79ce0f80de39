//! The server's APIs, called over real sockets and real TLS by plain clients.
//!
//! [`harness::Server`] is a whole server on a temporary SQLite file, on loopback, with a clock that the test moves.

mod agents;
mod authorization;
mod bad_input;
mod bundles;
mod entries;
mod harness;
mod local;
mod svids;
mod sync;
