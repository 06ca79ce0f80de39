//! End to end and interop: real servers, agents, clients and the real SPIRE, over real sockets.

mod answers;
mod clients;
mod documents;
mod faults;
mod spire;
mod takeover;
mod takeover_live;
