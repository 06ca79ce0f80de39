//! X.509: reading certificates and CSRs, issuing SVIDs, verifying chains by the X509-SVID standard.

mod authority;
pub(crate) mod certificate;
mod challenge;
mod csr;
mod extensions;
mod extras;
mod name;
#[cfg(test)]
mod tests;
mod time;
pub(crate) mod verify;

pub use authority::{CaTemplate, IssueError, SerialNumber, SvidTemplate, X509Ca, is_dns_san};
pub use certificate::{CERTIFICATE_BYTES_MAX, Certificate, ExtendedKeyUsage, KeyUsage, ParseError};
pub use challenge::acme_challenge_certificate;
pub use csr::{CSR_BYTES_MAX, Csr, create_ca_csr, create_ca_csr_with, create_csr};
pub use extras::{Extension, Oid};
pub use name::{DistinguishedName, NameParts};
pub use verify::{CHAIN_LENGTH_MAX, TrustRoots, VerifyError, verify_x509_chain, verify_x509_svid};
