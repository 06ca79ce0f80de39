//! The extensions that matter to SPIFFE, read and written.

use super::certificate::{ExtendedKeyUsage, KeyUsage, ParseError};
use crate::der::{self, Reader};
use crate::oid;
use std::ops::Range;

/// Most extensions in one certificate.
const EXTENSIONS_MAX: usize = 64;
/// Most names in one subjectAltName extension.
const NAMES_MAX: usize = 1024;

/// `uniformResourceIdentifier`
const URI: u8 = der::context_primitive(6);
/// `dNSName`
const DNS: u8 = der::context_primitive(2);

/// What was read. Key IDs are ranges of the bytes that hold the extensions.
#[derive(Clone, Default)]
pub(crate) struct Extensions {
    pub(crate) uri_sans: Vec<Box<str>>,
    pub(crate) dns_names: Vec<Box<str>>,
    pub(crate) san_critical: bool,
    pub(crate) key_usage: Option<KeyUsage>,
    pub(crate) key_usage_critical: bool,
    pub(crate) extended_key_usage: ExtendedKeyUsage,
    /// The basic constraints extension is there.
    pub(crate) basic_constraints: bool,
    pub(crate) is_ca: bool,
    pub(crate) path_len: Option<u32>,
    pub(crate) subject_key_id: Option<Range<usize>>,
    pub(crate) authority_key_id: Option<Range<usize>>,
}

/// Where `part` lies in `whole`, of which it is a slice.
pub(crate) fn range_in(whole: &[u8], part: &[u8]) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    (start + part.len() <= whole.len()).then(|| start..start + part.len())
}

impl Extensions {
    /// Reads the content of an `Extensions` SEQUENCE that lies inside of `whole`.
    pub(crate) fn read(whole: &[u8], mut list: Reader<'_>) -> Result<Self, ParseError> {
        let mut found = Self::default();
        let mut seen: Vec<&[u8]> = Vec::with_capacity(8);
        while !list.is_empty() {
            let malformed = || ParseError::Malformed("extension");
            let mut extension = list.nested(der::SEQUENCE).ok_or_else(malformed)?;
            let id = extension.read(der::OID).ok_or_else(malformed)?;
            let critical = extension.boolean_or(false).ok_or_else(malformed)?;
            let value = extension.read(der::OCTET_STRING).ok_or_else(malformed)?;
            extension.end().ok_or_else(malformed)?;
            if seen.contains(&id) {
                return Err(ParseError::DuplicateExtension(der::dotted(id)));
            }
            if seen.len() == EXTENSIONS_MAX {
                return Err(ParseError::Malformed("extensions: too many"));
            }
            seen.push(id);
            found.take(whole, id, critical, value)?;
        }
        Ok(found)
    }

    fn take(&mut self, whole: &[u8], id: &[u8], critical: bool, value: &[u8]) -> Result<(), ParseError> {
        match id {
            oid::KEY_USAGE => {
                self.key_usage = Some(key_usage(value).ok_or(ParseError::Malformed("key usage extension"))?);
                self.key_usage_critical = critical;
            }
            oid::BASIC_CONSTRAINTS => {
                let (is_ca, path_len) =
                    basic_constraints(value).ok_or(ParseError::Malformed("basic constraints extension"))?;
                (self.basic_constraints, self.is_ca, self.path_len) = (true, is_ca, path_len);
            }
            oid::EXTENDED_KEY_USAGE => {
                self.extended_key_usage =
                    extended_key_usage(value).ok_or(ParseError::Malformed("extended key usage extension"))?;
            }
            oid::SUBJECT_ALT_NAME => {
                self.san_critical = critical;
                self.names(value).ok_or(ParseError::Malformed("subject alternative name extension"))?;
            }
            oid::SUBJECT_KEY_ID => {
                let mut reader = Reader::new(value);
                let id = reader.read(der::OCTET_STRING).filter(|_| reader.is_empty());
                self.subject_key_id = Some(
                    id.and_then(|id| range_in(whole, id))
                        .ok_or(ParseError::Malformed("subject key identifier extension"))?,
                );
            }
            oid::AUTHORITY_KEY_ID => {
                let mut reader = Reader::new(value);
                let id = reader.nested(der::SEQUENCE).and_then(|mut aki| aki.optional(der::context_primitive(0)));
                let id = id.ok_or(ParseError::Malformed("authority key identifier extension"))?;
                self.authority_key_id = id.and_then(|id| range_in(whole, id));
            }
            _ => {}
        }
        Ok(())
    }

    fn names(&mut self, value: &[u8]) -> Option<()> {
        let mut outer = Reader::new(value);
        let mut names = outer.nested(der::SEQUENCE)?;
        outer.end()?;
        let mut count = 0;
        while !names.is_empty() {
            count += 1;
            let name = names.any().filter(|_| count <= NAMES_MAX)?;
            let list = match name.tag {
                URI => &mut self.uri_sans,
                DNS => &mut self.dns_names,
                _ => continue,
            };
            let text = std::str::from_utf8(name.content).ok().filter(|t| t.is_ascii())?;
            list.push(text.into());
        }
        Some(())
    }
}

fn key_usage(value: &[u8]) -> Option<KeyUsage> {
    let mut reader = Reader::new(value);
    let content = reader.read(der::BIT_STRING)?;
    reader.end()?;
    let (unused, bits) = content.split_first()?;
    let last = bits.last().copied().unwrap_or(0);
    let padding_is_zero = *unused < 8 && (last & ((1u16 << unused) as u8).wrapping_sub(1)) == 0;
    if !padding_is_zero || bits.len() > 2 || (bits.is_empty() && *unused != 0) {
        return None;
    }
    // Bit 0 of a BIT STRING is the highest of the first byte; ours counts from the lowest.
    let first = bits.first().copied().unwrap_or(0).reverse_bits();
    let second = bits.get(1).copied().unwrap_or(0).reverse_bits();
    Some(KeyUsage(u16::from(first) | u16::from(second) << 8))
}

fn basic_constraints(value: &[u8]) -> Option<(bool, Option<u32>)> {
    let mut outer = Reader::new(value);
    let mut constraints = outer.nested(der::SEQUENCE)?;
    outer.end()?;
    let is_ca = constraints.boolean_or(false)?;
    let path_len = if constraints.is_empty() { None } else { Some(constraints.small()?) };
    constraints.end()?;
    Some((is_ca, path_len))
}

fn extended_key_usage(value: &[u8]) -> Option<ExtendedKeyUsage> {
    let mut outer = Reader::new(value);
    let mut purposes = outer.nested(der::SEQUENCE)?;
    outer.end()?;
    let mut found = ExtendedKeyUsage { present: true, ..ExtendedKeyUsage::default() };
    while !purposes.is_empty() {
        match purposes.read(der::OID)? {
            oid::SERVER_AUTH => found.server_auth = true,
            oid::CLIENT_AUTH => found.client_auth = true,
            oid::ANY_PURPOSE => found.any = true,
            _ => {}
        }
    }
    Some(found)
}

/// Writes one extension.
pub(crate) fn put_extension(out: &mut Vec<u8>, id: &[u8], critical: bool, value: &[u8]) {
    let flag = if critical { 3 } else { 0 };
    let length = der::element_len(id.len()) + flag + der::element_len(value.len());
    der::put_header(out, der::SEQUENCE, length);
    der::put(out, der::OID, id);
    if critical {
        der::put(out, der::BOOLEAN, &[0xff]);
    }
    der::put(out, der::OCTET_STRING, value);
}

/// Writes the value of a subjectAltName extension: DNS names first, as Go does.
pub(crate) fn san_value(dns_names: &[String], uri: Option<&str>) -> Vec<u8> {
    let names = dns_names.iter().map(|n| (DNS, n.as_str())).chain(uri.map(|u| (URI, u)));
    let length = names.clone().map(|(_, n)| der::element_len(n.len())).sum();
    let mut value = Vec::with_capacity(der::element_len(length));
    der::put_header(&mut value, der::SEQUENCE, length);
    for (tag, name) in names {
        der::put(&mut value, tag, name.as_bytes());
    }
    value
}

/// Writes the value of a key usage extension.
pub(crate) fn key_usage_value(usage: KeyUsage) -> Vec<u8> {
    // All of our bits are in the first byte; trailing zero bits of a named bit list are not written.
    let byte = (usage.0 as u8).reverse_bits();
    vec![der::BIT_STRING, 2, byte.trailing_zeros().min(7) as u8, byte]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_usage_is_a_named_bit_list() {
        assert_eq!(key_usage_value(KeyUsage(1 | 1 << 2 | 1 << 4)), [3, 2, 3, 0xa8]);
        assert_eq!(key_usage_value(KeyUsage(1 << 5 | 1 << 6)), [3, 2, 1, 0x06]);
        for usage in 1..=0x7f {
            assert_eq!(key_usage(&key_usage_value(KeyUsage(usage))), Some(KeyUsage(usage)));
        }
        assert_eq!(key_usage(&[3, 3, 7, 0x00, 0x80]), Some(KeyUsage(1 << 8)), "decipherOnly");
        for bad in [&[3, 2, 1, 0x07][..], &[3, 2, 8, 0], &[3, 0], &[3, 4, 0, 1, 1, 1], &[4, 2, 0, 1]] {
            assert_eq!(key_usage(bad), None, "{bad:x?}");
        }
    }

    #[test]
    fn a_path_length_needs_no_ca_flag_to_be_read() {
        assert_eq!(basic_constraints(&[0x30, 0]), Some((false, None)));
        assert_eq!(basic_constraints(&[0x30, 3, 1, 1, 0xff]), Some((true, None)));
        assert_eq!(basic_constraints(&[0x30, 6, 1, 1, 0xff, 2, 1, 3]), Some((true, Some(3))));
        assert_eq!(basic_constraints(&[0x30, 3, 1, 1, 0x01]), None, "BOOLEAN is 00 or ff");
    }
}
