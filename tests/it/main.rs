//! End to end and interop: real servers, agents, clients and the real SPIRE, over real sockets.

mod answers;
mod answers_trust;
mod audit;
mod bulk;
mod broker;
mod clients;
mod delegated;
mod docker;
mod documents;
mod faults;
mod forced_rotation;
mod envoy;
mod envoy_answers;
mod guide;
mod kill_points;
mod kubernetes;
mod outage;
mod outage_renewal;
mod outage_sqlite;
mod pushed;
mod reload;
mod several;
mod spire;
mod takeover;
mod takeover_live;
mod wit;
