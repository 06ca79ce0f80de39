//! Node attestors, both halves of each.

mod join_token;
pub mod x509pop;

pub use join_token::JoinTokenAgent;
