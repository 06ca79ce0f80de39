//! Keys, X.509, JWS and bundle documents: everything that a SPIFFE identity is made of.
//!
//! One DER reader and one DER writer serve all of X.509 here. Certificates are issued by [`X509Ca`] and verified by
//! [`verify_x509_svid`]; tokens are signed by [`JwtAuthoritySigner`] and verified by [`verify_jwt_svid`], key-bound ones likewise by [`WitAuthoritySigner`] and [`verify_wit_svid`]; [`tls`] joins
//! SPIFFE verification to rustls; [`bundle`] reads and writes the SPIFFE bundle format. Nothing here asks for the time
//! of day: `now` is an argument, or a [`finial_core::Clock`] where rustls calls back.

pub mod bundle;
mod der;
mod jwt;
mod key;
mod oid;
pub mod pem;
mod private_jwk;
mod random;
mod signer;
pub mod tls;
pub mod web;
mod x509;

pub use jwt::{
    JwtAuthoritySigner, JwtError, JwtKeySource, JwtKeys, JwtSvid, JwtSvidClaims, LEEWAY_SECONDS, TOKEN_BYTES_MAX,
    WitAuthoritySigner, WitError, WitSvid, WitSvidClaims, jwt_svid_times, sign_jwt_svid, verify_jwt_svid,
    verify_wit_svid, wit_key_algorithm,
};
pub use key::{KeyError, PublicKey, SignatureAlgorithm};
pub use private_jwk::private_key_to_jwk;
pub use random::{hex, random_bytes, random_key_id, sha1_hex, sha256_hex};
pub use signer::{PrivateKey, SignError, Signer};
pub use x509::{
    CERTIFICATE_BYTES_MAX, CHAIN_LENGTH_MAX, CSR_BYTES_MAX, CaTemplate, Certificate, Csr, DistinguishedName,
    ExtendedKeyUsage, Extension, IssueError, KeyUsage, NameParts, Oid, ParseError, SerialNumber, SvidTemplate,
    TrustRoots, VerifyError, X509Ca, acme_challenge_certificate, create_ca_csr, create_ca_csr_with, create_csr,
    is_dns_san, verify_x509_chain, verify_x509_svid,
};
