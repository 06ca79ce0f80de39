//! Upstream authorities that need nothing but this machine, a server like this one, or one call over HTTPS.

mod disk;
mod ejbca;
mod spire;

pub use disk::Disk;
pub use ejbca::Ejbca;
pub use spire::Spire;
