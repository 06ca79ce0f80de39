//! The server: the authority of a trust domain.

pub mod authority;
pub mod health;
pub mod issue;
pub mod prune;
pub mod publish;
pub mod svid;
