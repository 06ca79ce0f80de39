//! What an agent keeps of a registration entry.

use finial_core::{EntryId, Selector, SelectorSet, SpiffeId, TrustDomain};
use finial_proto::types;

/// The part of a registration entry that the agent asks for. (Not the parent, the TTLs and the DNS names: the server
/// applies those.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkloadEntry {
    pub(crate) id: EntryId,
    pub(crate) spiffe_id: SpiffeId,
    pub(crate) selectors: SelectorSet,
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
            selectors,
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

    fn wire() -> types::Entry {
        types::Entry {
            id: "e1".into(),
            spiffe_id: Some(types::Spiffeid { trust_domain: "td".into(), path: "/web".into() }),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            ..Default::default()
        }
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
