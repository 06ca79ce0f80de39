//! Bundle publishers that need nothing but this machine.

mod file;

pub use file::File;
