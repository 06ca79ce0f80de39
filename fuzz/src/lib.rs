//! What the fuzz targets do. A body panics when a parser breaks a promise; that it refuses its input is fine.
pub mod config;
pub mod crypto;
pub mod net;
