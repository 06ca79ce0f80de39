//! Bundles on the wire and in SQL.

use super::ConvertError;
use crate::{common, types};
use bytes::Bytes;
use finial_core::{Bundle, JwtAuthority, TrustDomain, X509Authority};
use std::sync::Arc;

/// The whole bundle; see [`mask_bundle`].
pub fn bundle_to_proto(bundle: &Bundle) -> types::Bundle {
    types::Bundle {
        trust_domain: bundle.trust_domain.as_str().to_owned(),
        x509_authorities: bundle.x509_authorities.iter().map(x509_to_proto).collect(),
        jwt_authorities: bundle.jwt_authorities.iter().map(jwt_key_to_proto).collect(),
        refresh_hint: bundle.refresh_hint,
        sequence_number: bundle.sequence_number,
        wit_authorities: bundle.wit_authorities.iter().map(wit_key_to_proto).collect(),
    }
}

fn x509_to_proto(authority: &X509Authority) -> types::X509Certificate {
    types::X509Certificate { asn1: Bytes::copy_from_slice(&authority.der), tainted: authority.tainted }
}

/// One JWT key.
pub fn jwt_key_to_proto(key: &JwtAuthority) -> types::JwtKey {
    types::JwtKey {
        public_key: Bytes::copy_from_slice(&key.public_key),
        key_id: key.key_id.clone(),
        expires_at: key.expires_at,
        tainted: key.tainted,
    }
}

/// One WIT key.
pub fn wit_key_to_proto(key: &JwtAuthority) -> types::WitKey {
    let types::JwtKey { public_key, key_id, expires_at, tainted } = jwt_key_to_proto(key);
    types::WitKey { public_key, key_id, expires_at, tainted }
}

/// A bundle as a server sends it. Certificates and keys are not looked into here.
pub fn bundle_from_proto(bundle: &types::Bundle) -> Result<Bundle, ConvertError> {
    let wit = bundle.wit_authorities.iter().map(|k| key(&k.key_id, &k.public_key, k.expires_at, k.tainted));
    let jwt = bundle.jwt_authorities.iter().map(|k| key(&k.key_id, &k.public_key, k.expires_at, k.tainted));
    Ok(Bundle {
        trust_domain: TrustDomain::parse(&bundle.trust_domain).map_err(ConvertError::TrustDomain)?,
        x509_authorities: bundle
            .x509_authorities
            .iter()
            .map(|a| X509Authority { der: Arc::from(&a.asn1[..]), tainted: a.tainted })
            .collect(),
        jwt_authorities: jwt.collect::<Result<_, _>>()?,
        wit_authorities: wit.collect::<Result<_, _>>()?,
        refresh_hint: bundle.refresh_hint,
        sequence_number: bundle.sequence_number,
    })
}

fn key(id: &str, public_key: &[u8], expires_at: i64, tainted: bool) -> Result<JwtAuthority, ConvertError> {
    if id.is_empty() {
        return Err(ConvertError::NoKeyId);
    }
    Ok(JwtAuthority { key_id: id.to_owned(), public_key: Arc::from(public_key), expires_at, tainted })
}

/// Clears what the mask does not name. The trust domain always stays.
pub fn mask_bundle(bundle: &mut types::Bundle, mask: &types::BundleMask) {
    macro_rules! clear {
        ($($field:ident),*) => {$( if !mask.$field { bundle.$field = Default::default(); } )*};
    }
    clear!(x509_authorities, jwt_authorities, refresh_hint, sequence_number, wit_authorities);
}

/// The column `bundles.data`.
pub fn bundle_to_blob(bundle: &Bundle) -> common::Bundle {
    let keys = |keys: &[JwtAuthority]| {
        keys.iter()
            .map(|k| common::PublicKey {
                pkix_bytes: Bytes::copy_from_slice(&k.public_key),
                kid: k.key_id.clone(),
                not_after: k.expires_at,
                tainted_key: k.tainted,
            })
            .collect()
    };
    common::Bundle {
        trust_domain_id: bundle.trust_domain.id_string(),
        root_cas: bundle
            .x509_authorities
            .iter()
            .map(|a| common::Certificate { der_bytes: Bytes::copy_from_slice(&a.der), tainted_key: a.tainted })
            .collect(),
        jwt_signing_keys: keys(&bundle.jwt_authorities),
        refresh_hint: bundle.refresh_hint,
        sequence_number: bundle.sequence_number,
        wit_signing_keys: keys(&bundle.wit_authorities),
    }
}

/// Reads the column `bundles.data`. Older rows may hold a certificate chain in one `der_bytes`; it stays as it is.
pub fn bundle_from_blob(blob: &common::Bundle) -> Result<Bundle, ConvertError> {
    let keys = |keys: &[common::PublicKey]| {
        keys.iter().map(|k| key(&k.kid, &k.pkix_bytes, k.not_after, k.tainted_key)).collect::<Result<_, _>>()
    };
    Ok(Bundle {
        trust_domain: TrustDomain::parse(&blob.trust_domain_id).map_err(ConvertError::TrustDomain)?,
        x509_authorities: blob
            .root_cas
            .iter()
            .map(|c| X509Authority { der: Arc::from(&c.der_bytes[..]), tainted: c.tainted_key })
            .collect(),
        jwt_authorities: keys(&blob.jwt_signing_keys)?,
        wit_authorities: keys(&blob.wit_signing_keys)?,
        refresh_hint: blob.refresh_hint,
        sequence_number: blob.sequence_number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn authority() -> impl Strategy<Value = JwtAuthority> {
        ("[a-z]{1,8}", proptest::collection::vec(any::<u8>(), 0..40), any::<i64>(), any::<bool>()).prop_map(
            |(key_id, der, expires_at, tainted)| JwtAuthority { key_id, public_key: der.into(), expires_at, tainted },
        )
    }

    prop_compose! {
        fn bundle()(
            ders in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 0..4),
            jwt in proptest::collection::vec(authority(), 0..4),
            wit in proptest::collection::vec(authority(), 0..4),
            refresh_hint in any::<i64>(),
            sequence_number in any::<u64>(),
        ) -> Bundle {
            Bundle {
                trust_domain: TrustDomain::parse("example.org").unwrap(),
                x509_authorities: ders.into_iter().map(|(d, tainted)| X509Authority { der: d.into(), tainted }).collect(),
                jwt_authorities: jwt,
                wit_authorities: wit,
                refresh_hint,
                sequence_number,
            }
        }
    }

    proptest! {
        #[test]
        fn bundles_round_trip_on_the_wire_and_in_sql(bundle in bundle()) {
            prop_assert_eq!(&bundle_from_proto(&bundle_to_proto(&bundle)).unwrap(), &bundle);
            prop_assert_eq!(&bundle_from_blob(&bundle_to_blob(&bundle)).unwrap(), &bundle);
        }
    }

    #[test]
    fn masks_and_errors() {
        let mut wire = bundle_to_proto(&Bundle::empty(TrustDomain::parse("td").unwrap()));
        wire.refresh_hint = 7;
        wire.sequence_number = 8;
        mask_bundle(&mut wire, &types::BundleMask { sequence_number: true, ..Default::default() });
        assert_eq!((wire.trust_domain.as_str(), wire.refresh_hint, wire.sequence_number), ("td", 0, 8));
        wire.jwt_authorities.push(types::JwtKey::default());
        assert_eq!(bundle_from_proto(&wire).unwrap_err().to_string(), "missing key ID");
        wire.trust_domain.clear();
        assert_eq!(bundle_from_proto(&wire).unwrap_err().to_string(), "invalid trust domain: trust domain is missing");
    }
}
