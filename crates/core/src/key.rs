//! Key types that authorities and SVIDs may have.

use std::fmt;

/// The key types that SPIRE's configuration names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// ECDSA on P-256.
    EcP256,
    /// ECDSA on P-384.
    EcP384,
    /// RSA, 2048 bits.
    Rsa2048,
    /// RSA, 4096 bits.
    Rsa4096,
}

impl KeyType {
    /// The name in configuration: `ec-p256`, `ec-p384`, `rsa-2048`, `rsa-4096`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EcP256 => "ec-p256",
            Self::EcP384 => "ec-p384",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa4096 => "rsa-4096",
        }
    }

    /// Parses the configuration name, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::EcP256, Self::EcP384, Self::Rsa2048, Self::Rsa4096]
            .into_iter()
            .find(|k| k.as_str().eq_ignore_ascii_case(text))
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
