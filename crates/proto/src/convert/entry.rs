//! SPIFFE IDs, selectors and registration entries.

use super::ConvertError;
use crate::{common, types};
use finial_core::{Entry, EntryId, MatchBehavior, Selector, SelectorError, SelectorSet, SpiffeId, TrustDomain};
use prost::Message;

/// The two parts of an ID.
pub fn id_to_proto(id: &SpiffeId) -> types::Spiffeid {
    types::Spiffeid { trust_domain: id.trust_domain_name().to_owned(), path: id.path().to_owned() }
}

/// Joins and checks the two parts; a missing message is an error.
pub fn id_from_proto(id: Option<&types::Spiffeid>) -> Result<SpiffeId, ConvertError> {
    let id = id.ok_or(ConvertError::NoId)?;
    let trust_domain = TrustDomain::parse(&id.trust_domain)?;
    Ok(SpiffeId::new(&trust_domain, &id.path)?)
}

/// The selectors in their order.
pub fn selectors_to_proto<'a>(selectors: impl IntoIterator<Item = &'a Selector>) -> Vec<types::Selector> {
    selectors.into_iter().map(|s| types::Selector { r#type: s.kind.clone(), value: s.value.clone() }).collect()
}

/// Checks each selector; the set may be empty.
pub fn selectors_from_proto(selectors: &[types::Selector]) -> Result<SelectorSet, SelectorError> {
    selectors.iter().map(|s| Selector::new(s.r#type.as_str(), s.value.as_str())).collect()
}

/// Only what says with whom an entry federates; the rest is skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct Federating {
    #[prost(string, repeated, tag = "6")]
    federates_with: Vec<String>,
}

/// The trust domains that an encoded `spire.api.types.Entry` federates with; none of one that cannot be read.
pub fn federates_with(encoded: &[u8]) -> Vec<String> {
    Federating::decode(encoded).unwrap_or_default().federates_with
}

/// The meaning of a filter's `match`; the numbers are the same for selectors and trust domains.
pub fn match_behavior(number: i32) -> Option<MatchBehavior> {
    match number {
        0 => Some(MatchBehavior::Exact),
        1 => Some(MatchBehavior::Subset),
        2 => Some(MatchBehavior::Superset),
        3 => Some(MatchBehavior::Any),
        _ => None,
    }
}

/// The whole entry; see [`mask_entry`].
pub fn entry_to_proto(entry: &Entry) -> types::Entry {
    let attributes = (entry.disable_x509_svid_prefetch || entry.jwt_svid_include_jti).then_some(
        types::entry::AdditionalAttributes {
            disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
            jwt_svid_include_jti: entry.jwt_svid_include_jti,
        },
    );
    types::Entry {
        id: entry.id.as_str().to_owned(),
        spiffe_id: Some(id_to_proto(&entry.spiffe_id)),
        parent_id: Some(id_to_proto(&entry.parent_id)),
        selectors: selectors_to_proto(&entry.selectors),
        x509_svid_ttl: entry.x509_svid_ttl,
        federates_with: entry.federates_with.iter().map(|td| td.as_str().to_owned()).collect(),
        admin: entry.admin,
        downstream: entry.downstream,
        expires_at: entry.expires_at,
        dns_names: entry.dns_names.clone(),
        revision_number: entry.revision_number,
        store_svid: entry.store_svid,
        jwt_svid_ttl: entry.jwt_svid_ttl,
        hint: entry.hint.clone(),
        created_at: entry.created_at,
        additional_attributes: attributes,
    }
}

/// A complete entry, as an agent gets it from its server. What a caller may *ask* a server to store is the server's to check.
pub fn entry_from_proto(entry: &types::Entry) -> Result<Entry, ConvertError> {
    let selectors = selectors_from_proto(&entry.selectors)?;
    if selectors.is_empty() {
        return Err(ConvertError::NoSelectors);
    }
    let federates_with = entry.federates_with.iter().map(|td| TrustDomain::parse(td));
    let attributes = entry.additional_attributes.unwrap_or_default();
    Ok(Entry {
        id: EntryId::parse(&entry.id)?,
        spiffe_id: id_from_proto(entry.spiffe_id.as_ref()).map_err(|e| ConvertError::SpiffeId(Box::new(e)))?,
        parent_id: id_from_proto(entry.parent_id.as_ref()).map_err(|e| ConvertError::ParentId(Box::new(e)))?,
        selectors,
        x509_svid_ttl: entry.x509_svid_ttl,
        jwt_svid_ttl: entry.jwt_svid_ttl,
        federates_with: federates_with.collect::<Result<_, _>>().map_err(ConvertError::FederatedTrustDomain)?,
        admin: entry.admin,
        downstream: entry.downstream,
        expires_at: entry.expires_at,
        dns_names: entry.dns_names.clone(),
        revision_number: entry.revision_number,
        store_svid: entry.store_svid,
        hint: entry.hint.clone(),
        created_at: entry.created_at,
        disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti: attributes.jwt_svid_include_jti,
    })
}

/// Clears what the mask does not name. The ID always stays.
pub fn mask_entry(entry: &mut types::Entry, mask: &types::EntryMask) {
    macro_rules! clear {
        ($($field:ident),*) => {$( if !mask.$field { entry.$field = Default::default(); } )*};
    }
    clear!(
        spiffe_id,
        parent_id,
        selectors,
        x509_svid_ttl,
        federates_with,
        admin,
        downstream,
        expires_at,
        dns_names,
        revision_number,
        store_svid,
        jwt_svid_ttl,
        hint,
        created_at,
        additional_attributes
    );
}

/// The column `registered_entries.additional_attributes`: nothing where nothing is switched on.
pub fn attributes_to_blob(entry: &Entry) -> Option<common::registration_entry::AdditionalAttributes> {
    (entry.disable_x509_svid_prefetch || entry.jwt_svid_include_jti).then_some(
        common::registration_entry::AdditionalAttributes {
            disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
            jwt_svid_include_jti: entry.jwt_svid_include_jti,
        },
    )
}

/// Puts the column's switches into `entry`.
pub fn attributes_from_blob(entry: &mut Entry, blob: &common::registration_entry::AdditionalAttributes) {
    entry.disable_x509_svid_prefetch = blob.disable_x509_svid_prefetch;
    entry.jwt_svid_include_jti = blob.jwt_svid_include_jti;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Entry {
        Entry {
            id: EntryId::parse("e1").unwrap(),
            spiffe_id: SpiffeId::parse("spiffe://td/w").unwrap(),
            parent_id: SpiffeId::parse("spiffe://td/spire/agent/x").unwrap(),
            selectors: SelectorSet::new(vec![Selector::parse("unix:uid:1").unwrap()]),
            x509_svid_ttl: 1,
            jwt_svid_ttl: 2,
            federates_with: vec![TrustDomain::parse("other").unwrap()],
            admin: true,
            downstream: true,
            expires_at: 3,
            dns_names: vec!["a.example".into()],
            revision_number: 4,
            store_svid: true,
            hint: "h".into(),
            created_at: 5,
            disable_x509_svid_prefetch: true,
            jwt_svid_include_jti: false,
        }
    }

    #[test]
    fn an_empty_mask_leaves_the_id_and_a_full_one_everything() {
        let full = entry_to_proto(&sample());
        let mut masked = full.clone();
        mask_entry(&mut masked, &types::EntryMask::default());
        assert_eq!(masked, types::Entry { id: "e1".into(), ..Default::default() });
        let mut masked = full.clone();
        let all = types::EntryMask {
            spiffe_id: true,
            parent_id: true,
            selectors: true,
            x509_svid_ttl: true,
            federates_with: true,
            admin: true,
            downstream: true,
            expires_at: true,
            dns_names: true,
            revision_number: true,
            store_svid: true,
            jwt_svid_ttl: true,
            hint: true,
            created_at: true,
            additional_attributes: true,
        };
        mask_entry(&mut masked, &all);
        assert_eq!(masked, full);
    }

    #[test]
    fn whom_an_entry_federates_with_is_read_without_the_rest() {
        let wire = entry_to_proto(&sample());
        assert_eq!(federates_with(&wire.encode_to_vec()), wire.federates_with);
        assert!(!wire.federates_with.is_empty());
    }

    #[test]
    fn errors_are_worded_as_spire_words_them() {
        let good = entry_to_proto(&sample());
        let text = |e: types::Entry| entry_from_proto(&e).unwrap_err().to_string();
        assert_eq!(text(types::Entry { selectors: vec![], ..good.clone() }), "selector list is empty");
        assert_eq!(
            text(types::Entry { spiffe_id: None, ..good.clone() }),
            "invalid SPIFFE ID: request must specify SPIFFE ID"
        );
        let parent = Some(types::Spiffeid { trust_domain: "td".into(), path: "x".into() });
        assert_eq!(
            text(types::Entry { parent_id: parent, ..good.clone() }),
            "invalid parent ID: path must have a leading slash"
        );
        assert_eq!(
            text(types::Entry { federates_with: vec!["UP".into()], ..good }),
            "invalid federated trust domain: trust domain characters are limited to lowercase letters, numbers, dots, \
             dashes, and underscores"
        );
    }

    proptest! {
        #[test]
        fn entries_round_trip(ttl in any::<i32>(), at in any::<i64>(), hint in ".{0,20}", flags in any::<[bool; 5]>()) {
            let [admin, downstream, store_svid, prefetch, jti] = flags;
            let entry = Entry {
                x509_svid_ttl: ttl, expires_at: at, hint, admin, downstream, store_svid,
                disable_x509_svid_prefetch: prefetch, jwt_svid_include_jti: jti, ..sample()
            };
            prop_assert_eq!(entry_from_proto(&entry_to_proto(&entry)).unwrap(), entry);
        }

        #[test]
        fn any_id_message_converts_or_errs(td in "\\PC{0,20}", path in "\\PC{0,20}") {
            let wire = types::Spiffeid { trust_domain: td, path };
            if let Ok(id) = id_from_proto(Some(&wire)) {
                prop_assert_eq!(id_to_proto(&id).path, wire.path);
            }
        }
    }
}
