//! The whole agent, with real sockets and real processes, under a server that does what the test says.

mod abuse;
mod broker;
mod callers;
mod delegated;
mod explain;
mod fake;
mod handover;
mod harness;
mod identity;
mod lifecycle;
mod outage;
mod pid_reuse;
mod pushed;
mod sds;
mod sds_delta;
mod server_away;
mod svid_store;
mod tokens;
mod waiting;
mod wit;
mod wrong_server;
