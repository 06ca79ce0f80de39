//! Against moto, which is a real implementation of the protocols, and against recorded contracts where it has none.

mod chain;
mod contract;
mod moto;
