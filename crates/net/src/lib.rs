//! Sockets: listeners that survive whatever connects to them, the identity of local peers, and channels for clients.
//!
//! [`unix`] knows which process is at the other end ([`PeerInfo`]) and notices when its pid is reused; [`tls`] runs
//! handshakes side by side, each with a deadline, behind the proxies that [`proxy`] is told to trust; [`client`] builds the channels that the agent
//! and the commands use, [`https`] fetches a document, [`rest`] sends requests, and [`http1`] is what all who ask by HTTP have in
//! common. [`Proxies`] says through which proxy TLS leaves.
//! Both listeners count connections ([`Limits`]), give a silent peer a deadline, and never end because of a peer.
//!
//! This is the only crate with `unsafe`: one `getsockopt` that rustix does not offer, the settings of the allocator ([`memory`]), the kernel's
//! keyrings ([`keyring`]), the files that systemd passes ([`handover`]), and
//! what a child does before it is another program ([`child`]).

mod accept;
mod authority;
pub mod child;
pub mod client;
mod dial;
mod egress;
mod elsewhere;
mod guard;
pub mod handover;
pub mod http1;
pub mod https;
pub mod https_server;
pub mod keyring;
pub mod memory;
mod peer;
pub mod prometheus;
pub mod proxy;
pub mod rest;
pub mod serving_cert;
pub mod tls;
pub mod unix;
pub mod unix_tls;

pub use dial::DialError;
pub use egress::Proxies;
pub use elsewhere::Handshakes;
pub use guard::Limits;
pub use peer::{PeerError, PeerHandle, PeerInfo};
