//! AWS: how requests are signed, where the keys for that come from, and what is asked of its services.

mod credentials;
mod profile;
mod roles_anywhere;
mod s3;
mod service;
mod sigv4;
mod upstream;

pub use roles_anywhere::RolesAnywhere;
pub use s3::S3;
pub use upstream::{Pca, Secrets};

#[cfg(test)]
mod tests;
