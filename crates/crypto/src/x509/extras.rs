//! What a certificate says beside what every one of its kind says: object identifiers and extensions that somebody adds.

use super::certificate::ParseError;
use super::extensions::put_extension;
use crate::der::{self, Reader};
use crate::oid;

/// Longest identifier in dotted form that is read.
const OID_TEXT_MAX: usize = 256;

/// An object identifier.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Oid {
    /// The content bytes of its DER.
    der: Vec<u8>,
}

impl Oid {
    /// Reads the dotted form.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let malformed = || ParseError::Malformed("object identifier");
        let mut arcs = Vec::new();
        for arc in text.split('.') {
            let digits = !arc.is_empty() && arc.bytes().all(|b| b.is_ascii_digit());
            let plain = digits && text.len() <= OID_TEXT_MAX && (arc == "0" || !arc.starts_with('0'));
            arcs.push(if plain { arc.parse::<u32>().map_err(|_| malformed())? } else { return Err(malformed()) });
        }
        let [root, second, rest @ ..] = &arcs[..] else { return Err(malformed()) };
        if *root > 2 || (*root < 2 && *second > 39) {
            return Err(malformed());
        }
        let mut der = Vec::with_capacity(text.len());
        put_base_128(&mut der, u64::from(*root) * 40 + u64::from(*second));
        rest.iter().for_each(|arc| put_base_128(&mut der, u64::from(*arc)));
        Ok(Self { der })
    }

    /// The content bytes of its DER.
    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }
}

impl std::fmt::Display for Oid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&der::dotted(&self.der))
    }
}

fn put_base_128(out: &mut Vec<u8>, value: u64) {
    let groups = (64 - value.leading_zeros()).div_ceil(7).max(1);
    for group in (0..groups).rev() {
        let more = if group > 0 { 0x80 } else { 0 };
        out.push((value >> (7 * group)) as u8 & 0x7f | more);
    }
}

/// An extension that is added to a certificate. It takes the place of one that would be there with the same identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which one.
    pub id: Oid,
    /// Whether who does not know it must refuse the certificate.
    pub critical: bool,
    /// What it says: what its OCTET STRING holds.
    pub value: Vec<u8>,
}

impl Extension {
    /// What is added to an authority that has these policies, and further extensions.
    pub fn of_ca(policies: &[Oid], further: Vec<Self>) -> Vec<Self> {
        let own = Some(Self::policies(policies)).filter(|own| {
            let stood_in_for = further.iter().any(|other| other.id == own.id);
            !policies.is_empty() && !stood_in_for
        });
        own.into_iter().chain(further).collect()
    }

    /// The certificate policies, without qualifiers.
    fn policies(policies: &[Oid]) -> Self {
        let mut value = Vec::new();
        der::put_nested(&mut value, der::SEQUENCE, |out| {
            for policy in policies {
                der::put_nested(out, der::SEQUENCE, |out| der::put(out, der::OID, policy.der()));
            }
        });
        Self { id: Oid { der: oid::CERTIFICATE_POLICIES.to_vec() }, critical: false, value }
    }
}

/// The extensions that are there anyway, without those that are replaced, and then the added ones.
pub(super) fn with_added(own: &[&[u8]], added: &[Extension]) -> Vec<u8> {
    let own = own.concat();
    let mut out = Vec::with_capacity(own.len() + added.iter().map(|e| e.value.len() + 32).sum::<usize>());
    let mut list = Reader::new(&own);
    while let Some(one) = list.element(der::SEQUENCE) {
        let id = Reader::new(one.content).read(der::OID);
        if !added.iter().any(|e| Some(e.id.der()) == id) {
            out.extend_from_slice(one.whole);
        }
    }
    for extension in added {
        put_extension(&mut out, extension.id.der(), extension.critical, &extension.value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn identifiers_are_read_and_written() {
        for text in ["2.5.29.32", "1.2.840.113549.1.9.1", "2.999.3", "0.39.4294967295", "2.5.4.45"] {
            assert_eq!(Oid::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Oid::parse("2.5.4.45").unwrap().der(), [0x55, 4, 45]);
        assert_eq!(Oid::parse("2.999.3").unwrap().der(), [0x88, 0x37, 3], "the example of X.690");
        for bad in ["", "1", "3.1", "1.40", "1..2", "1.2.", "a.b", "1.02", "1.2.4294967296", "-1.2", "+1.2"] {
            assert!(Oid::parse(bad).is_err(), "{bad}");
        }
        assert!(Oid::parse(&format!("1.2{}", ".1".repeat(200))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[0-9.]{0,40}") {
            if let Ok(id) = Oid::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
