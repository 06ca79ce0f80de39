//! The server: the authority of a trust domain.
//!
//! The rooms, in the order of a call: [`endpoints`] (the doors) -> [`authz`] (the gate: who may) -> [`api`] (the handlers) ->
//! [`entries`] and [`nodes`] (what is known, in memory; [`watch`] tells agents what changes) -> [`issue`] (signs; [`compose`]: whose say it hears) with what
//! [`authority`] keeps ready, [`publish`] (bundles for readers), [`federation`] (bundles of others), [`svid`] (the server's own), [`rotation`] (how far orders to all servers are), [`prune`] (what expires). [`start`] puts them together.

pub mod api;
pub mod authority;
pub mod authz;
pub mod compose;
pub mod endpoints;
pub mod entries;
pub mod federation;
pub mod follow;
pub mod health;
pub mod issue;
pub mod live;
pub mod nodes;
pub mod notify;
mod plugin_host;
pub mod prune;
pub mod publish;
pub mod rotation;
mod start;
pub mod svid;
#[cfg(test)]
mod testing;
pub mod watch;

pub use start::{Environment, Running, StartError, open_store, start};
