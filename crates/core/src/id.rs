//! SPIFFE IDs and trust domains, by the rules of the SPIFFE-ID standard (sections 2.1 to 2.4).

use std::fmt;
use std::sync::Arc;

/// Longest SPIFFE ID that must be accepted, and the longest that we accept, in bytes (SPIFFE-ID section 2.3).
pub(crate) const ID_BYTES_MAX: usize = 2048;
/// Longest trust domain name, in bytes (SPIFFE-ID section 2.3, after RFC 3986 section 3.2.2).
pub(crate) const TRUST_DOMAIN_BYTES_MAX: usize = 255;
const SCHEME: &str = "spiffe://";

/// Which rule of the SPIFFE-ID standard a text broke. The wording is the one that SPIFFE's own libraries use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// Nothing was given.
    #[error("cannot be empty")]
    Empty,
    /// Section 2: the scheme is `spiffe`.
    #[error("scheme is missing or invalid")]
    WrongScheme,
    /// Section 2.1: a trust domain name is required.
    #[error("trust domain is missing")]
    MissingTrustDomain,
    /// Section 2.1: lowercase letters, digits, dots, dashes and underscores; no port, no user info.
    #[error("trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores")]
    BadTrustDomainChar,
    /// Section 2.3: at most 255 bytes.
    #[error("trust domain is too long: at most 255 bytes are allowed")]
    TrustDomainTooLong,
    /// Section 2.2: no empty segments.
    #[error("path cannot contain empty segments")]
    EmptySegment,
    /// Section 2.2: no `.` or `..` segments.
    #[error("path cannot contain dot segments")]
    DotSegment,
    /// Section 2.2: no trailing slash.
    #[error("path cannot have a trailing slash")]
    TrailingSlash,
    /// Section 2.2: a path starts with a slash.
    #[error("path must have a leading slash")]
    NoLeadingSlash,
    /// Section 2.2: letters, digits, dots, dashes and underscores.
    #[error("path segment characters are limited to letters, numbers, dots, dashes, and underscores")]
    BadPathSegmentChar,
    /// Section 2.3: at most 2048 bytes.
    #[error("SPIFFE ID is too long: at most 2048 bytes are allowed")]
    TooLong,
}

/// The name of a trust domain, such as `example.org`: lowercase, never empty, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a bare name (`example.org`) or, as SPIRE's configuration and API allow, a SPIFFE ID whose trust domain
    /// is taken (`spiffe://example.org/x`).
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::MissingTrustDomain);
        }
        if text.contains(":/") {
            return Ok(SpiffeId::parse(text)?.trust_domain());
        }
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }

    /// The bare name, `example.org`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ID of the trust domain itself, `spiffe://example.org`.
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: format!("{SCHEME}{}", self.0).into(), path_at: SCHEME.len() + self.0.len() }
    }

    /// The text of [`TrustDomain::id`], which is how bundles are keyed on the Workload API and in SQL.
    pub fn id_string(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }

    /// The server's own ID: `spiffe://TD/spire/server`.
    pub fn server_id(&self) -> SpiffeId {
        SpiffeId { text: format!("{SCHEME}{}/spire/server", self.0).into(), path_at: SCHEME.len() + self.0.len() }
    }

    /// An agent's ID: `spiffe://TD/spire/agent/` followed by `suffix`, which must be a valid path without its leading slash.
    pub fn agent_id(&self, suffix: &str) -> Result<SpiffeId, SpiffeIdError> {
        SpiffeId::new(self, &format!("/spire/agent/{suffix}"))
    }
}

/// A SPIFFE ID, `spiffe://TD/PATH`; the path may be empty (the ID of the trust domain itself). Cheap to clone.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path begins; equal to the length of the text when the path is empty.
    path_at: usize,
}

impl SpiffeId {
    /// Parses the full form. At most 2048 bytes.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::Empty);
        }
        if text.len() > ID_BYTES_MAX {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::WrongScheme)?;
        let (domain, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        check_trust_domain(domain)?;
        check_path(path)?;
        Ok(Self { text: text.into(), path_at: SCHEME.len() + domain.len() })
    }

    /// Joins a trust domain and a path, which is empty or begins with a slash.
    pub fn new(trust_domain: &TrustDomain, path: &str) -> Result<Self, SpiffeIdError> {
        check_path(path)?;
        let text = format!("{SCHEME}{}{path}", trust_domain.0);
        if text.len() > ID_BYTES_MAX {
            return Err(SpiffeIdError::TooLong);
        }
        Ok(Self { path_at: SCHEME.len() + trust_domain.0.len(), text: text.into() })
    }

    /// The full form.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of the trust domain.
    pub fn trust_domain_name(&self) -> &str {
        self.text.get(SCHEME.len()..self.path_at).unwrap_or_default()
    }

    /// The trust domain as a value of its own (allocates; compare names with [`SpiffeId::is_member_of`]).
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    /// The path with its leading slash, or nothing.
    pub fn path(&self) -> &str {
        self.text.get(self.path_at..).unwrap_or_default()
    }

    /// Whether the ID lies in that trust domain.
    pub fn is_member_of(&self, trust_domain: &TrustDomain) -> bool {
        self.trust_domain_name() == trust_domain.as_str()
    }

    /// Whether the path is `/spire` or below it, which SPIRE reserves for servers and agents.
    pub fn is_reserved(&self) -> bool {
        self.path() == "/spire" || self.path().starts_with("/spire/")
    }

    /// Whether the path is below `/spire/agent/`.
    pub fn is_agent(&self) -> bool {
        self.path().starts_with("/spire/agent/")
    }

    /// Whether this is the ID of a SPIRE server.
    pub fn is_server(&self) -> bool {
        self.path() == "/spire/server"
    }
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    if name.is_empty() {
        return Err(SpiffeIdError::MissingTrustDomain);
    }
    if name.len() > TRUST_DOMAIN_BYTES_MAX {
        return Err(SpiffeIdError::TrustDomainTooLong);
    }
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if name.bytes().all(allowed) { Ok(()) } else { Err(SpiffeIdError::BadTrustDomainChar) }
}

fn check_path(path: &str) -> Result<(), SpiffeIdError> {
    if path.is_empty() {
        return Ok(());
    }
    let segments = path.strip_prefix('/').ok_or(SpiffeIdError::NoLeadingSlash)?;
    if segments.is_empty() || segments.ends_with('/') {
        return Err(SpiffeIdError::TrailingSlash);
    }
    for segment in segments.split('/') {
        match segment {
            "" => return Err(SpiffeIdError::EmptySegment),
            "." | ".." => return Err(SpiffeIdError::DotSegment),
            _ => {}
        }
        if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
            return Err(SpiffeIdError::BadPathSegmentChar);
        }
    }
    Ok(())
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustDomain({})", self.0)
    }
}
impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpiffeId({})", self.text)
    }
}
impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}
impl Eq for SpiffeId {}
impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}
impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}
/// Hashes and compares as its text, so that maps keyed by IDs can be asked with a `&str`.
impl std::borrow::Borrow<str> for SpiffeId {
    fn borrow(&self) -> &str {
        &self.text
    }
}
impl std::str::FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}
impl std::str::FromStr for TrustDomain {
    type Err = SpiffeIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::SpiffeIdError::*;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_ids_are_told_apart() {
        let long_domain = format!("spiffe://{}", "a".repeat(256));
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        for (text, want) in [
            ("", Empty),
            ("http://td/x", WrongScheme),
            ("SPIFFE://td/x", WrongScheme),
            ("spiffe:/td/x", WrongScheme),
            ("spiffe://", MissingTrustDomain),
            ("spiffe:///x", MissingTrustDomain),
            ("spiffe://Td/x", BadTrustDomainChar),
            ("spiffe://td:80/x", BadTrustDomainChar),
            ("spiffe://u@td/x", BadTrustDomainChar),
            ("spiffe://td\u{e9}/x", BadTrustDomainChar),
            ("spiffe://td?q", BadTrustDomainChar),
            ("spiffe://td/", TrailingSlash),
            ("spiffe://td/x/", TrailingSlash),
            ("spiffe://td//x", EmptySegment),
            ("spiffe://td/x//y", EmptySegment),
            ("spiffe://td/.", DotSegment),
            ("spiffe://td/x/../y", DotSegment),
            ("spiffe://td/x%20y", BadPathSegmentChar),
            ("spiffe://td/x y", BadPathSegmentChar),
            ("spiffe://td/x?q=1", BadPathSegmentChar),
            ("spiffe://td/x#f", BadPathSegmentChar),
            ("spiffe://td/\u{e9}", BadPathSegmentChar),
            (long_domain.as_str(), TrustDomainTooLong),
            (long.as_str(), TooLong),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(want), "{text}");
        }
    }

    #[test]
    fn reserved_paths_and_kinds() {
        let td = TrustDomain::parse("example.org").unwrap();
        assert!(td.server_id().is_server() && td.server_id().is_reserved());
        assert!(td.agent_id("join_token/x").unwrap().is_agent());
        assert!(!SpiffeId::parse("spiffe://example.org/spirex").unwrap().is_reserved());
        assert_eq!(td.id().path(), "");
        assert_eq!(TrustDomain::parse("spiffe://example.org/x").unwrap(), td);
        assert_eq!(TrustDomain::parse(""), Err(MissingTrustDomain));
    }

    proptest! {
        #[test]
        fn parse_and_print_round_trip(td in "[a-z0-9._-]{1,40}", path in "(/[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,9}){0,6}") {
            let text = format!("spiffe://{td}{path}");
            let id = SpiffeId::parse(&text).unwrap();
            prop_assert_eq!(id.as_str(), &text);
            prop_assert_eq!(id.path(), &path);
            prop_assert_eq!(SpiffeId::new(&id.trust_domain(), id.path()).unwrap(), id);
        }

        #[test]
        fn anything_parses_or_errs_without_panic(text in "\\PC{0,80}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.as_str(), &text);
            }
        }
    }
}
