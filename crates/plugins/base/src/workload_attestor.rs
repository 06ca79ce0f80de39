//! Workload attestors.

mod dbus;
mod gvisor;
mod names;
mod process;
mod slurm;
mod systemd;
mod unix;

pub use gvisor::{Gvisor, fence};
pub use slurm::Slurm;
pub use systemd::Systemd;
pub use unix::Unix;

/// What tests of several attestors need.
#[cfg(test)]
mod testing;
