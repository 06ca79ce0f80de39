//! Distinguished names: the subject and issuer of certificates.

use super::certificate::ParseError;
use std::sync::Arc;

/// The attributes of a subject that SPIRE knows, with their DER. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DistinguishedName(Arc<Inner>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Inner {
    parts: NameParts,
    der: Vec<u8>,
}

/// Attribute values; empty = absent. Written in this order, as Go's `pkix.Name` does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameParts {
    /// `C`
    pub country: Vec<String>,
    /// `O`
    pub organization: Vec<String>,
    /// `OU`
    pub organizational_unit: Vec<String>,
    /// `L`
    pub locality: Vec<String>,
    /// `ST`
    pub province: Vec<String>,
    /// `STREET`
    pub street_address: Vec<String>,
    /// `postalCode`
    pub postal_code: Vec<String>,
    /// `CN`
    pub common_name: String,
    /// `serialNumber`
    pub serial_number: String,
}

impl DistinguishedName {
    /// Encodes the attributes once.
    pub fn new(parts: NameParts) -> Self {
        let _ = Inner::default();
        let _ = parts;
        todo!()
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
        let _ = der;
        todo!()
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

/// RFC 2253 text, last attribute first, as Go prints names: `CN=x,O=SPIRE,C=US`.
impl std::fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let _ = f;
        todo!()
    }
}
