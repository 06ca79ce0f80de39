//! DNS names of entries and CSRs: the rules that SPIRE takes from IDNA's strict profile, for names in ASCII.

use finial_core::SpiffeId;
use finial_proto::types;
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// Why a DNS name is refused, in SPIRE's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DnsNameError {
    #[error("name must be ascii")]
    NotAscii,
    #[error("too many wildcards")]
    TooManyWildcards,
    #[error("wildcard must be first label")]
    WildcardNotFirst,
    #[error("empty or only whitespace")]
    Empty,
    #[error("domain ends with dot")]
    TrailingDot,
    #[error("idna error: {0:?} is no DNS name: its labels must be of letters, digits, dashes and underscores")]
    Idna(String),
}

/// Checks a name; one leading `*.` is allowed. Labels are of letters, digits, dashes and underscores, 1 to 63 bytes, with
/// no dash at either end and none in third and fourth place unless it is punycode; names have at most 253 bytes. (SPIRE,
/// against the name of its profile, lets all other ASCII pass, too: blanks and commas are no part of any DNS name.)
pub(crate) fn check_dns_name(name: &str) -> Result<(), DnsNameError> {
    if !name.is_ascii() {
        return Err(DnsNameError::NotAscii);
    }
    let bare = match name.matches('*').count() {
        0 => name,
        1 => name.strip_prefix("*.").ok_or(DnsNameError::WildcardNotFirst)?,
        _ => return Err(DnsNameError::TooManyWildcards),
    };
    if bare.trim().is_empty() {
        return Err(DnsNameError::Empty);
    }
    if bare.ends_with('.') {
        return Err(DnsNameError::TrailingDot);
    }
    if bare.len() > 253 || !bare.split('.').all(label_is_valid) {
        return Err(DnsNameError::Idna(name.to_owned()));
    }
    Ok(())
}

fn label_is_valid(label: &str) -> bool {
    let bytes = label.as_bytes();
    let dashes_inside = bytes.get(2..4) == Some(b"--") && !label.to_ascii_lowercase().starts_with("xn--");
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        && !label.starts_with('-')
        && !label.ends_with('-')
        && !dashes_inside
}

/// Of how many entries it is remembered that they were told of.
const TOLD_MAX: usize = 4096;

/// Stored entries with DNS names that no SVID can carry, as SPIRE took them or another wrote them, that the log knows of.
#[derive(Default)]
pub struct UnfitNames(Mutex<HashSet<(String, i64)>>);

impl UnfitNames {
    /// Takes such names out of the entry, so that its SVID lacks them and nothing else. Says so once per entry and revision.
    pub(crate) fn leave_out(&self, id: &SpiffeId, entry: &mut types::Entry) {
        let unfit: Vec<String> = entry.dns_names.extract_if(.., |name| !finial_crypto::is_dns_san(name)).collect();
        if unfit.is_empty() || !self.is_news(&entry.id, entry.revision_number) {
            return;
        }
        tracing::warn!(
            entry_id = entry.id,
            spiffe_id = id.as_str(),
            dns_names = ?unfit,
            "The entry's X509-SVIDs lack DNS names that no certificate can carry; update the entry without them"
        );
    }

    fn is_news(&self, entry_id: &str, revision: i64) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= TOLD_MAX {
            told.clear();
        }
        told.insert((entry_id.to_owned(), revision))
    }
}

/// A name that a wildcard of the same list covers already.
pub(crate) fn wildcard_overlap<'a>(names: &[&'a str]) -> Option<&'a str> {
    let covered = |name: &&&str| {
        let rest = name.split_once('.').map(|(_, rest)| rest);
        !name.starts_with('*') && rest.is_some_and(|rest| names.iter().any(|n| n.strip_prefix("*.") == Some(rest)))
    };
    names.iter().find(covered).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        use DnsNameError::*;
        let long_label = "a".repeat(64);
        let long = ["a".repeat(60).as_str(); 5].join(".");
        let idna = |name: &str| (name.to_owned(), Err(Idna(name.to_owned())));
        let told_apart = [
            ("example.org", Ok(())),
            ("*.example.org", Ok(())),
            ("a-b.x1", Ok(())),
            ("xn--bcher-kva.example", Ok(())),
            ("localhost", Ok(())),
            ("my_service.ns", Ok(())),
            ("Example.org", Ok(())),
            ("", Err(Empty)),
            ("  ", Err(Empty)),
            ("*.", Err(Empty)),
            ("*", Err(WildcardNotFirst)),
            ("a.*.b", Err(WildcardNotFirst)),
            ("*.*.b", Err(TooManyWildcards)),
            ("b\u{fc}cher.example", Err(NotAscii)),
            ("example.org.", Err(TrailingDot)),
        ];
        let wrong = ["a..b", ".a", "-a.b", "a-.b", "ab--c.d", "a b.c", " a.b", "a.b/c", &long_label, &long].map(idna);
        for (name, want) in told_apart.map(|(name, want)| (name.to_owned(), want)).into_iter().chain(wrong) {
            assert_eq!(check_dns_name(&name), want, "{name:?}");
        }
    }

    #[test]
    fn wildcards_that_cover_others_are_found() {
        assert_eq!(wildcard_overlap(&["*.a.b", "x.a.b"]), Some("x.a.b"));
        assert_eq!(wildcard_overlap(&["*.a.b", "x.y.a.b", "a.b", "*.c"]), None);
        assert_eq!(wildcard_overlap(&["c", "*.c"]), None);
    }
}
