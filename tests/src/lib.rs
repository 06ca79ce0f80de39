//! Nothing but tests: see `it/main.rs`.
