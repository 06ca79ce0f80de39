//! SVID stores that need nothing but this machine.

mod disk;

pub use disk::Disk;
