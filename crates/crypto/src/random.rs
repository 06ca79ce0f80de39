//! Random identifiers and digests as text.

/// Fills an array with random bytes of the process-wide generator.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    todo!()
}

/// A key ID as SPIRE makes them: 32 characters of `[a-zA-Z0-9]`.
pub fn random_key_id() -> String {
    todo!()
}

/// SHA-1 in lowercase hex, for certificate fingerprints in agent IDs. Not for anything that must resist collisions.
pub fn sha1_hex(data: &[u8]) -> String {
    let _ = data;
    todo!()
}

/// SHA-256 in lowercase hex.
pub fn sha256_hex(data: &[u8]) -> String {
    let _ = data;
    todo!()
}
