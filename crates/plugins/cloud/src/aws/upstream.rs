//! Upstream authorities: `aws_pca`, a private CA of AWS Certificate Manager, and `awssecret`, a CA in Secrets Manager.

mod pca;
mod secrets;

pub use pca::Pca;
pub use secrets::Secrets;
