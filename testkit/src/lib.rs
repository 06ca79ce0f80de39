//! Real processes for tests: Finial's servers and agents, the real SPIRE's, and client programs, each in a folder and on
//! a port of its own, each ended by its own process id when the value is dropped, also when the test fails.
//!
//! Nothing here sleeps for a fixed time to "let something happen": [`eventually`] asks again until the real thing
//! answers, up to a deadline that is only there to end a broken run.

mod client;
pub mod clouds;
pub mod database;
pub mod docker;
pub mod envoy;
pub mod fake;
pub mod guide;
pub mod gvisor;
pub mod kube;
pub mod oidc;
pub mod pebble;
mod process;
mod proxy;
pub mod relying;
mod spire;
pub mod systemd;

pub use client::{Client, Serving};
pub use database::{Database, DatabaseKind, Held, MariaDb, Postgres, PostgresPair, mariadb, postgres};
pub use process::{Output, Process, Workdir, cache, eventually, eventually_within, finial, free_port, uid};
pub use proxy::{Proxy, Weather};
pub use spire::{Agent, AgentOptions, Flavor, Server, ServerOptions, datastore, faketime, require_spire};
