//! Workload attestors.

mod names;
mod unix;

pub use unix::Unix;
