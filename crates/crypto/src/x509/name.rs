//! Distinguished names: the subject and issuer of certificates.

use super::certificate::ParseError;
use super::extras::Oid;
use crate::der::{self, Reader};
use std::fmt::Write as _;
use std::sync::Arc;

/// The attribute types that we know: the last byte of `2.5.4.x`, and the short name where Go's `pkix` prints one.
const COUNTRY: u8 = 6;
const ORGANIZATION: u8 = 10;
const ORGANIZATIONAL_UNIT: u8 = 11;
const LOCALITY: u8 = 7;
const PROVINCE: u8 = 8;
const STREET_ADDRESS: u8 = 9;
const POSTAL_CODE: u8 = 17;
const COMMON_NAME: u8 = 3;
const SERIAL_NUMBER: u8 = 5;

/// Most attributes that a name may have.
const ATTRIBUTES_MAX: usize = 64;

/// The attributes of a subject that SPIRE knows, with their DER. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DistinguishedName(Arc<Inner>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Inner {
    parts: NameParts,
    der: Vec<u8>,
}

/// Attribute values; empty = absent. Written in this order, as `pkix.Name` of Go 1.26 does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameParts {
    /// `C`
    pub country: Vec<String>,
    /// `ST`
    pub province: Vec<String>,
    /// `L`
    pub locality: Vec<String>,
    /// `STREET`
    pub street_address: Vec<String>,
    /// `postalCode`
    pub postal_code: Vec<String>,
    /// `O`
    pub organization: Vec<String>,
    /// `OU`
    pub organizational_unit: Vec<String>,
    /// `CN`
    pub common_name: String,
    /// `serialNumber`
    pub serial_number: String,
    /// Further attributes, which follow the others one by one. One of a type above stands in for that. Not read back.
    pub extra_names: Vec<(Oid, String)>,
}

impl DistinguishedName {
    /// Encodes the attributes once.
    pub fn new(parts: NameParts) -> Self {
        let mut der = Vec::with_capacity(64);
        der::put_nested(&mut der, der::SEQUENCE, |out| {
            for (attribute, values) in parts.ordered() {
                let id = [0x55, 0x04, attribute];
                if parts.extra_names.iter().all(|(extra, _)| extra.der() != id) {
                    put_rdn(out, &id, values);
                }
            }
            parts.extra_names.iter().for_each(|(id, value)| put_rdn(out, id.der(), std::slice::from_ref(value)));
        });
        Self(Arc::new(Inner { parts, der }))
    }

    /// The usual form: countries, organizations and a common name, each possibly empty.
    pub fn of(country: &[&str], organization: &[&str], common_name: &str) -> Self {
        let list = |items: &[&str]| items.iter().map(|s| (*s).to_owned()).collect();
        Self::new(NameParts {
            country: list(country),
            organization: list(organization),
            common_name: common_name.to_owned(),
            ..NameParts::default()
        })
    }

    /// SPIRE's default subject of SVIDs: `C=US, O=SPIRE`.
    pub fn svid_default() -> Self {
        Self::of(&["US"], &["SPIRE"], "")
    }

    /// SPIRE's default subject of CAs: `C=US, O=SPIFFE`.
    pub fn ca_default() -> Self {
        Self::of(&["US"], &["SPIFFE"], "")
    }

    /// Reads a DER Name; attributes that are not in [`NameParts`] are dropped.
    pub fn from_der(der: &[u8]) -> Result<Self, ParseError> {
        let parts = read_name(der).ok_or(ParseError::Malformed("distinguished name"))?;
        Ok(Self::new(parts))
    }

    /// The attributes.
    pub fn parts(&self) -> &NameParts {
        &self.0.parts
    }

    /// The DER Name.
    pub fn der(&self) -> &[u8] {
        &self.0.der
    }

    /// Whether there is no attribute at all.
    pub fn is_empty(&self) -> bool {
        self.0.parts == NameParts::default()
    }

    /// The same with another common name (SPIRE puts an entry's first DNS name there).
    pub fn with_common_name(&self, common_name: &str) -> Self {
        Self::new(NameParts { common_name: common_name.to_owned(), ..self.0.parts.clone() })
    }

    /// The same with another serial number attribute (CAs carry the decimal of their certificate's serial).
    pub fn with_serial_number(&self, serial_number: &str) -> Self {
        Self::new(NameParts { serial_number: serial_number.to_owned(), ..self.0.parts.clone() })
    }

    /// The same with other organizational units (downstream CAs carry `DOWNSTREAM-<depth>`).
    pub fn with_organizational_unit(&self, unit: &str) -> Self {
        Self::new(NameParts { organizational_unit: vec![unit.to_owned()], ..self.0.parts.clone() })
    }
}

impl NameParts {
    /// Makes units of the further attributes that stand in for the units.
    pub fn settle_units(&mut self) {
        let is_unit = |id: &Oid| id.der() == [0x55, 0x04, ORGANIZATIONAL_UNIT];
        let further = std::mem::take(&mut self.extra_names).into_iter();
        let (units, others): (Vec<_>, Vec<_>) = further.partition(|(id, _)| is_unit(id));
        self.extra_names = others;
        if !units.is_empty() {
            self.organizational_unit = units.into_iter().map(|(_, unit)| unit).collect();
        }
    }

    /// Attribute types with their values, in the order in which they are written.
    fn ordered(&self) -> [(u8, &[String]); 9] {
        let one = |value: &'_ String| if value.is_empty() { 0 } else { 1 };
        [
            (COUNTRY, &self.country[..]),
            (PROVINCE, &self.province[..]),
            (LOCALITY, &self.locality[..]),
            (STREET_ADDRESS, &self.street_address[..]),
            (POSTAL_CODE, &self.postal_code[..]),
            (ORGANIZATION, &self.organization[..]),
            (ORGANIZATIONAL_UNIT, &self.organizational_unit[..]),
            (COMMON_NAME, std::slice::from_ref(&self.common_name).get(..one(&self.common_name)).unwrap_or_default()),
            (
                SERIAL_NUMBER,
                std::slice::from_ref(&self.serial_number).get(..one(&self.serial_number)).unwrap_or_default(),
            ),
        ]
    }

    fn add(&mut self, attribute: u8, value: String) {
        match attribute {
            COUNTRY => self.country.push(value),
            ORGANIZATION => self.organization.push(value),
            ORGANIZATIONAL_UNIT => self.organizational_unit.push(value),
            LOCALITY => self.locality.push(value),
            PROVINCE => self.province.push(value),
            STREET_ADDRESS => self.street_address.push(value),
            POSTAL_CODE => self.postal_code.push(value),
            COMMON_NAME => self.common_name = value,
            SERIAL_NUMBER => self.serial_number = value,
            _ => {}
        }
    }
}

/// Writes all values of an attribute as one RelativeDistinguishedName; a SET is sorted in DER.
fn put_rdn(out: &mut Vec<u8>, id: &[u8], values: &[String]) {
    let mut encoded: Vec<Vec<u8>> = values
        .iter()
        .map(|value| {
            let mut one = Vec::with_capacity(value.len() + 11);
            der::put_nested(&mut one, der::SEQUENCE, |out| {
                der::put(out, der::OID, id);
                let tag = if value.bytes().all(is_printable) { der::PRINTABLE_STRING } else { der::UTF8_STRING };
                der::put(out, tag, value.as_bytes());
            });
            one
        })
        .collect();
    if encoded.is_empty() {
        return;
    }
    encoded.sort();
    der::put(out, der::SET, &encoded.concat());
}

/// The characters of PrintableString (X.680 section 41.4).
fn is_printable(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b" '()+,-./:=?".contains(&b)
}

fn read_name(der: &[u8]) -> Option<NameParts> {
    let mut outer = Reader::new(der);
    let mut name = outer.nested(der::SEQUENCE)?;
    outer.end()?;
    let mut parts = NameParts::default();
    let mut count = 0;
    while !name.is_empty() {
        let mut rdn = name.nested(der::SET)?;
        while !rdn.is_empty() {
            count += 1;
            if count > ATTRIBUTES_MAX {
                return None;
            }
            let mut pair = rdn.nested(der::SEQUENCE)?;
            let oid = pair.read(der::OID)?;
            let value = pair.any()?;
            pair.end()?;
            if let [0x55, 0x04, attribute] = oid {
                // Values of other types (Go: not strings) are dropped like attributes that are not known.
                if let Some(text) = read_text(value.tag, value.content)? {
                    parts.add(*attribute, text);
                }
            }
        }
    }
    Some(parts)
}

/// A directory string. The outer `None`: malformed; the inner: not a string.
fn read_text(tag: u8, content: &[u8]) -> Option<Option<String>> {
    Some(match tag {
        der::PRINTABLE_STRING | der::IA5_STRING if content.is_ascii() => {
            Some(String::from_utf8_lossy(content).into_owned())
        }
        der::UTF8_STRING => Some(String::from_utf8(content.to_vec()).ok()?),
        der::TELETEX_STRING => Some(content.iter().map(|b| char::from(*b)).collect()),
        der::BMP_STRING => {
            let units: Vec<u16> =
                content.chunks_exact(2).map(|pair| pair.iter().fold(0, |n, b| n << 8 | u16::from(*b))).collect();
            content.len().is_multiple_of(2).then_some(())?;
            Some(String::from_utf16(&units).ok()?)
        }
        der::PRINTABLE_STRING | der::IA5_STRING => return None,
        _ => None,
    })
}

/// RFC 2253 text, last attribute first, as Go prints names: `CN=x,O=SPIRE,C=US`.
impl std::fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut first = true;
        for (attribute, values) in self.0.parts.ordered().into_iter().rev() {
            for (index, value) in values.iter().enumerate() {
                if !first {
                    f.write_char(if index == 0 { ',' } else { '+' })?;
                }
                first = false;
                f.write_str(short_name(attribute))?;
                f.write_char('=')?;
                write_escaped(f, value)?;
            }
        }
        Ok(())
    }
}

fn short_name(attribute: u8) -> &'static str {
    match attribute {
        COUNTRY => "C",
        ORGANIZATION => "O",
        ORGANIZATIONAL_UNIT => "OU",
        LOCALITY => "L",
        PROVINCE => "ST",
        STREET_ADDRESS => "STREET",
        POSTAL_CODE => "POSTALCODE",
        COMMON_NAME => "CN",
        _ => "SERIALNUMBER",
    }
}

fn write_escaped(f: &mut std::fmt::Formatter<'_>, value: &str) -> std::fmt::Result {
    let last = value.chars().count().saturating_sub(1);
    for (index, c) in value.chars().enumerate() {
        let escape = match c {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => true,
            ' ' => index == 0 || index == last,
            '#' => index == 0,
            _ => false,
        };
        if escape {
            f.write_char('\\')?;
        }
        f.write_char(c)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn default_subjects_are_spires() {
        // SEQUENCE { SET { SEQUENCE { 2.5.4.6, PrintableString "US" } }, SET { SEQUENCE { 2.5.4.10, "SPIRE" } } }
        let want =
            b"\x30\x1d\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02US\x31\x0e\x30\x0c\x06\x03\x55\x04\x0a\x13\x05SPIRE";
        assert_eq!(DistinguishedName::svid_default().der(), want);
        assert_eq!(DistinguishedName::svid_default().to_string(), "O=SPIRE,C=US");
        let ca = DistinguishedName::ca_default().with_serial_number("42").with_organizational_unit("DOWNSTREAM-1");
        assert_eq!(ca.to_string(), "SERIALNUMBER=42,OU=DOWNSTREAM-1,O=SPIFFE,C=US");
        let place = NameParts { locality: vec!["Bern".into()], province: vec!["BE".into()], ..ca.parts().clone() };
        let place = DistinguishedName::new(place).to_string();
        assert_eq!(place, "SERIALNUMBER=42,OU=DOWNSTREAM-1,O=SPIFFE,L=Bern,ST=BE,C=US", "places before organizations");
    }

    #[test]
    fn asterisks_make_a_utf8_string_as_in_go() {
        let name = DistinguishedName::of(&[], &[], "*.example.org");
        assert!(name.der().contains(&der::UTF8_STRING));
        assert_eq!(DistinguishedName::from_der(name.der()).unwrap(), name);
    }

    #[test]
    fn special_characters_are_escaped() {
        assert_eq!(DistinguishedName::of(&[], &["#a, b+c "], "").to_string(), "O=\\#a\\, b\\+c\\ ");
        assert!(DistinguishedName::of(&[], &[], "").is_empty());
    }

    #[test]
    fn extra_names_follow_and_stand_in() {
        let extra = |id: &str, value: &str| (Oid::parse(id).unwrap(), value.to_owned());
        let parts = NameParts {
            country: vec!["US".into()],
            common_name: "x".into(),
            extra_names: vec![extra("2.5.4.45", "id"), extra("2.5.4.3", "y")],
            ..NameParts::default()
        };
        let name = DistinguishedName::new(parts);
        let want = b"\x30\x26\x31\x0b\x30\x09\x06\x03\x55\x04\x06\x13\x02US\x31\x0b\x30\x09\x06\x03\x55\x04\x2d\x13\x02id\x31\x0a\x30\x08\x06\x03\x55\x04\x03\x13\x01y";
        assert_eq!(name.der(), want);
        assert!(!name.is_empty());
        assert_eq!(DistinguishedName::from_der(name.der()).unwrap().to_string(), "CN=y,C=US");
    }

    proptest! {
        #[test]
        fn names_round_trip(country in proptest::collection::vec("[A-Z]{2}", 0..3), organization in proptest::collection::vec("\\PC{1,20}", 0..3), cn in "\\PC{0,20}", serial in "[0-9]{0,30}") {
            let mut parts = NameParts { country, organization, common_name: cn, serial_number: serial, ..NameParts::default() };
            let name = DistinguishedName::new(parts.clone());
            let mut read = DistinguishedName::from_der(name.der()).unwrap().parts().clone();
            // A SET has no order of its own.
            for list in [&mut parts.country, &mut parts.organization, &mut read.country, &mut read.organization] {
                list.sort();
            }
            prop_assert_eq!(read, parts);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = DistinguishedName::from_der(&bytes);
        }
    }
}
