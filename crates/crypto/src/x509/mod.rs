//! X.509: reading certificates and CSRs, issuing SVIDs, verifying chains by the X509-SVID standard.

mod authority;
pub mod certificate;
pub mod csr;
mod name;
pub mod verify;

pub use authority::{CaTemplate, IssueError, SerialNumber, SvidTemplate, X509Ca};
pub use certificate::{Certificate, ExtendedKeyUsage, KeyUsage, ParseError};
pub use csr::{Csr, create_ca_csr, create_csr};
pub use name::{DistinguishedName, NameParts};
pub use verify::{TrustRoots, VerifyError, verify_x509_chain, verify_x509_svid};
