//! Registration entries: which workload (by selectors), on which agent (by parent), gets which SPIFFE ID.

use crate::{SelectorSet, SpiffeId, TrustDomain, UnixSeconds};
use std::fmt;
use std::sync::Arc;

/// The ID of an entry: 1 to 255 characters of `A-Z a-z 0-9 - . _`; a UUID unless the operator chose it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(Arc<str>);

/// Why a text cannot be an entry ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryIdError {
    /// Nothing was given.
    #[error("missing entry ID")]
    Empty,
    /// More than 255 characters.
    #[error("invalid registration entry: entry ID too long")]
    TooLong,
    /// A character outside `A-Z a-z 0-9 - . _`.
    #[error("invalid registration entry: entry ID contains invalid characters")]
    BadChar,
}

impl EntryId {
    /// Checks length and characters.
    pub fn parse(text: &str) -> Result<Self, EntryIdError> {
        if text.is_empty() {
            return Err(EntryIdError::Empty);
        }
        if text.len() > 255 {
            return Err(EntryIdError::TooLong);
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')) {
            return Err(EntryIdError::BadChar);
        }
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryId({})", self.0)
    }
}
/// Hashes and compares as its text, so that maps keyed by entry IDs can be asked with a `&str`.
impl std::borrow::Borrow<str> for EntryId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A registration entry as stored and as served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Unique in the trust domain.
    pub id: EntryId,
    /// What the workload is called.
    pub spiffe_id: SpiffeId,
    /// The agent, node alias or server below which it hangs.
    pub parent_id: SpiffeId,
    /// All of these must be attested; never empty.
    pub selectors: SelectorSet,
    /// Lifetime of X.509-SVIDs in seconds; 0 = the server's default.
    pub x509_svid_ttl: i32,
    /// Lifetime of JWT-SVIDs in seconds; 0 = the server's default.
    pub jwt_svid_ttl: i32,
    /// Foreign trust domains whose bundles the workload gets.
    pub federates_with: Vec<TrustDomain>,
    /// The holder may use the server's management API.
    pub admin: bool,
    /// The holder is a server below this one.
    pub downstream: bool,
    /// When the entry is to be pruned; 0 = never.
    pub expires_at: UnixSeconds,
    /// DNS SANs of its X.509-SVIDs; the first becomes the common name.
    pub dns_names: Vec<String>,
    /// Grows with each update.
    pub revision_number: i64,
    /// Issued into an SVID store instead of the Workload API.
    pub store_svid: bool,
    /// A name for the workload to tell its identities apart; at most 1024 characters.
    pub hint: String,
    /// When it was created.
    pub created_at: UnixSeconds,
    /// The agent fetches its X.509-SVID only when asked.
    pub disable_x509_svid_prefetch: bool,
    /// Its JWT-SVIDs carry a `jti`.
    pub jwt_svid_include_jti: bool,
}

impl Entry {
    /// An entry with nothing but the needful: what is not given has its neutral value.
    pub fn new(id: EntryId, spiffe_id: SpiffeId, parent_id: SpiffeId, selectors: SelectorSet) -> Self {
        Self {
            id,
            spiffe_id,
            parent_id,
            selectors,
            x509_svid_ttl: 0,
            jwt_svid_ttl: 0,
            federates_with: Vec::new(),
            admin: false,
            downstream: false,
            expires_at: 0,
            dns_names: Vec::new(),
            revision_number: 0,
            store_svid: false,
            hint: String::new(),
            created_at: 0,
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
        }
    }
}
