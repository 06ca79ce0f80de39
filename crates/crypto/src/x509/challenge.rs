//! What a server shows to an ACME authority that asks whether a name is its own (RFC 8737).

use super::authority::{SerialNumber, algorithm_identifier, assemble, tbs};
use super::extensions::{put_extension, san_value};
use crate::signer::{PrivateKey, SignError};
use crate::{der, oid};
use finial_core::UnixSeconds;
use std::sync::Arc;

/// How long it may be shown: some hours, for clocks that differ.
const VALID_SECONDS: i64 = 12 * 3600;

/// The self-signed certificate of `domain` that answers a `tls-alpn-01` challenge; `digest` is SHA-256 of the key authorization.
///
/// # Errors
/// When the key cannot sign.
pub fn acme_challenge_certificate(
    key: &PrivateKey,
    domain: &str,
    digest: &[u8],
    now: UnixSeconds,
) -> Result<Arc<[u8]>, SignError> {
    let algorithm = key.public_key().default_algorithm();
    let algorithm_der = algorithm_identifier(algorithm);
    let subject = [der::SEQUENCE, 0];
    let mut extensions = Vec::with_capacity(128);
    put_extension(&mut extensions, oid::SUBJECT_ALT_NAME, true, &san_value(&[domain.to_owned()], None));
    let mut value = Vec::with_capacity(40);
    der::put(&mut value, der::OCTET_STRING, digest);
    put_extension(&mut extensions, oid::ACME_IDENTIFIER, true, &value);
    let after_serial = [&algorithm_der[..], &subject].concat();
    let (from, to) = (now - VALID_SECONDS, now + VALID_SECONDS);
    let signed = tbs(SerialNumber::random(), &after_serial, from, to, &subject, key.public_key(), &[&extensions]);
    Ok(assemble(&signed, &algorithm_der, &key.sign_now(algorithm, &signed)?))
}
