//! Upstream authorities that need nothing but this machine, or a server like this one.

mod disk;
mod spire;

pub use disk::Disk;
pub use spire::Spire;
