//! Random identifiers and digests as text.

use aws_lc_rs::digest;

/// Fills an array with random bytes of the process-wide generator.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The generator of AWS-LC aborts the process rather than give bytes that are not random; its error is never seen.
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        std::process::abort();
    }
    bytes
}

/// A key ID as SPIRE makes them: 32 characters of `[a-zA-Z0-9]`.
pub fn random_key_id() -> String {
    const ALPHABET: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    let mut id = String::with_capacity(32);
    while id.len() < 32 {
        // Six bits at a time; the two values beyond the alphabet are thrown away, so that no character is favoured.
        for byte in random_bytes::<48>() {
            if let Some(c) = ALPHABET.get(usize::from(byte & 63)).filter(|_| id.len() < 32) {
                id.push(char::from(*c));
            }
        }
    }
    id
}

/// SHA-1 in lowercase hex, for certificate fingerprints in agent IDs. Not for anything that must resist collisions.
pub fn sha1_hex(data: &[u8]) -> String {
    hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, data).as_ref())
}

/// SHA-256 in lowercase hex.
pub fn sha256_hex(data: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, data).as_ref())
}

/// Bytes in lowercase hex, as SPIRE writes subject key IDs and fingerprints.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_are_32_letters_and_digits_and_differ() {
        let (a, b) = (random_key_id(), random_key_id());
        assert!(a.len() == 32 && a.bytes().all(|c| c.is_ascii_alphanumeric()), "{a}");
        assert_ne!(a, b);
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        assert_eq!(sha1_hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(sha256_hex(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
