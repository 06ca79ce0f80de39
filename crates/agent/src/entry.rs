//! What an agent keeps of a registration entry.

use finial_core::{EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_proto::types;

/// The part of a registration entry that the agent asks for. (Not the parent, the TTLs and the DNS names: the server
/// applies those.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkloadEntry {
    pub(crate) id: EntryId,
    pub(crate) spiffe_id: SpiffeId,
    pub(crate) selectors: EntrySelectors,
    pub(crate) federates_with: Vec<TrustDomain>,
    pub(crate) revision_number: i64,
    pub(crate) created_at: i64,
    pub(crate) hint: String,
    pub(crate) store_svid: bool,
    pub(crate) disable_x509_svid_prefetch: bool,
    pub(crate) jwt_svid_include_jti: bool,
    /// Administers the server.
    pub(crate) admin: bool,
    /// Of a server below ours.
    pub(crate) downstream: bool,
}

impl WorkloadEntry {
    /// Whether its identity is for the workload itself only, never for who acts in its name.
    pub(crate) fn is_privileged(&self) -> bool {
        self.admin || self.downstream
    }
}

/// The selectors of an entry, in order, in one piece of memory: an agent may hold 100,000 entries.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct EntrySelectors(Box<[u8]>);

impl EntrySelectors {
    /// Types with their values.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first_chunk()?;
            let (text, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
            rest = after;
            std::str::from_utf8(text).ok()?.split_once(':')
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Selector> {
        self.parts().map(|(kind, value)| Selector { kind: kind.to_owned(), value: value.to_owned() })
    }

    pub(crate) fn len(&self) -> usize {
        self.parts().count()
    }

    /// Whether a workload that has these selectors has all of the entry's.
    pub(crate) fn is_subset_of(&self, workload: &SelectorSet) -> bool {
        let workload = workload.as_slice();
        let has = |wanted| workload.binary_search_by(|s| (s.kind.as_str(), s.value.as_str()).cmp(&wanted)).is_ok();
        self.parts().all(has)
    }
}

impl From<SelectorSet> for EntrySelectors {
    fn from(selectors: SelectorSet) -> Self {
        let mut bytes = Vec::new();
        for selector in &selectors {
            let text = selector.to_string();
            // No message of the server is that long.
            let Ok(length) = u32::try_from(text.len()) else { continue };
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        Self(bytes.into())
    }
}

impl std::fmt::Debug for EntrySelectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter().map(|selector| selector.to_string())).finish()
    }
}

/// Why an entry of the server cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadEntry {
    #[error("entry ID: {0}")]
    Id(#[from] finial_core::EntryIdError),
    #[error("missing SPIFFE ID")]
    NoSpiffeId,
    #[error("SPIFFE ID: {0}")]
    SpiffeId(#[from] finial_core::SpiffeIdError),
    #[error("selector: {0}")]
    Selector(#[from] finial_core::SelectorError),
    #[error("missing selectors")]
    NoSelectors,
}

impl TryFrom<types::Entry> for WorkloadEntry {
    type Error = BadEntry;

    fn try_from(entry: types::Entry) -> Result<Self, BadEntry> {
        let extra = entry.additional_attributes.unwrap_or_default();
        let selectors: Result<Vec<_>, _> =
            entry.selectors.into_iter().map(|s| Selector::new(s.r#type, s.value)).collect();
        let selectors = SelectorSet::new(selectors?);
        if selectors.is_empty() {
            return Err(BadEntry::NoSelectors); // it would match every workload
        }
        let federates: Result<Vec<_>, _> = entry.federates_with.iter().map(|td| TrustDomain::parse(td)).collect();
        Ok(Self {
            id: EntryId::parse(&entry.id)?,
            spiffe_id: spiffe_id(entry.spiffe_id.as_ref().ok_or(BadEntry::NoSpiffeId)?)?,
            selectors: selectors.into(),
            federates_with: federates?,
            revision_number: entry.revision_number,
            created_at: entry.created_at,
            hint: entry.hint,
            store_svid: entry.store_svid,
            disable_x509_svid_prefetch: extra.disable_x509_svid_prefetch,
            jwt_svid_include_jti: extra.jwt_svid_include_jti,
            admin: entry.admin,
            downstream: entry.downstream,
        })
    }
}

/// A SPIFFE ID as SPIRE's APIs carry it. A path without its leading slash is accepted, as SPIRE does.
pub(crate) fn spiffe_id(id: &types::Spiffeid) -> Result<SpiffeId, finial_core::SpiffeIdError> {
    let trust_domain = TrustDomain::parse(&id.trust_domain)?;
    if id.path.is_empty() || id.path.starts_with('/') {
        SpiffeId::new(&trust_domain, &id.path)
    } else {
        SpiffeId::new(&trust_domain, &format!("/{}", id.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wire() -> types::Entry {
        types::Entry {
            id: "e1".into(),
            spiffe_id: Some(types::Spiffeid { trust_domain: "td".into(), path: "/web".into() }),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            ..Default::default()
        }
    }

    proptest! {
        /// Whatever they are called, also by what they are kept with.
        #[test]
        fn selectors_are_kept_as_they_are(
            entry in proptest::collection::btree_set(("[a-z]{1,3}", "[a-c:\\x00\\x04\n]{1,4}"), 1..5),
            workload in proptest::collection::btree_set(("[a-z]{1,3}", "[a-c:\\x00\\x04\n]{1,4}"), 0..5),
            all: bool,
        ) {
            let set = |parts: &std::collections::BTreeSet<(String, String)>| -> SelectorSet {
                parts.iter().map(|(kind, value)| Selector::new(kind, value).unwrap()).collect()
            };
            let workload = if all { workload.union(&entry).cloned().collect() } else { workload };
            let kept = EntrySelectors::from(set(&entry));
            prop_assert_eq!(kept.iter().collect::<SelectorSet>(), set(&entry));
            prop_assert_eq!(kept.len(), entry.len());
            prop_assert_eq!(kept.is_subset_of(&set(&workload)), entry.is_subset(&workload));
        }
    }

    /// How much an entry costs, beside those of `cache::index`.
    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<WorkloadEntry>() <= 136, "{}", size_of::<WorkloadEntry>());
    }

    #[test]
    fn an_entry_without_selectors_is_refused() {
        assert!(WorkloadEntry::try_from(wire()).is_ok());
        assert!(matches!(
            WorkloadEntry::try_from(types::Entry { selectors: vec![], ..wire() }),
            Err(BadEntry::NoSelectors)
        ));
        assert!(matches!(
            WorkloadEntry::try_from(types::Entry { spiffe_id: None, ..wire() }),
            Err(BadEntry::NoSpiffeId)
        ));
        assert!(matches!(WorkloadEntry::try_from(types::Entry { id: "a b".into(), ..wire() }), Err(BadEntry::Id(_))));
    }
}
