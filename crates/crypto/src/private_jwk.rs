//! A private key as a JWK, for those who are handed a key in that form.

use crate::PrivateKey;
use crate::bundle::public_key_to_jwk;
use crate::der::{INTEGER, OCTET_STRING, Reader, SEQUENCE};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use finial_core::Secret;

/// The members after `n` and `e`, in the order of PKCS#1 and of go-jose (RFC 7518 section 6.3.2).
const RSA_MEMBERS: [&str; 6] = ["d", "p", "q", "dp", "dq", "qi"];

/// The key as a JWK object on one line, members in go-jose's order; None for a key that cannot be taken apart.
pub fn private_key_to_jwk(key: &PrivateKey) -> Option<Secret<String>> {
    let public = serde_json::to_string(&public_key_to_jwk(key.public_key(), None)).ok()?;
    let pkcs8 = key.pkcs8_der();
    let mut info = Reader::new(pkcs8.expose()).nested(SEQUENCE)?;
    info.small()?;
    info.read(SEQUENCE)?;
    let mut inner = Reader::new(info.read(OCTET_STRING)?).nested(SEQUENCE)?;
    let mut out = String::with_capacity(public.len() + 2 * pkcs8.expose().len());
    out.push_str(public.strip_suffix('}')?);
    inner.small()?;
    let mut member = |name: &str, value: &[u8]| {
        out.push_str(",\"");
        out.push_str(name);
        out.push_str("\":\"");
        BASE64URL.encode_string(value, &mut out);
        out.push('"');
    };
    if inner.peek() == Some(INTEGER) {
        // n and e stand in the public half
        inner.unsigned()?;
        inner.unsigned()?;
        for name in RSA_MEMBERS {
            member(name, inner.unsigned()?);
        }
    } else {
        // SEC 1: as long as the field
        member("d", inner.read(OCTET_STRING)?);
    }
    out.push('}');
    Some(Secret::new(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::KeyType;
    use serde_json::{Map, Value};

    #[test]
    fn all_members_in_order_and_of_full_length() {
        for (key_type, want, lengths) in [
            (KeyType::EcP256, "kty crv x y d", vec![("d", 32), ("x", 32)]),
            (KeyType::EcP384, "kty crv x y d", vec![("d", 48), ("y", 48)]),
            (KeyType::Rsa2048, "kty n e d p q dp dq qi", vec![("n", 256), ("p", 128)]),
        ] {
            let key = PrivateKey::generate(key_type).unwrap();
            let jwk: Map<String, Value> = serde_json::from_str(private_key_to_jwk(&key).unwrap().expose()).unwrap();
            assert_eq!(jwk.keys().map(String::as_str).collect::<Vec<_>>().join(" "), want);
            for (name, bytes) in lengths {
                assert_eq!(BASE64URL.decode(jwk[name].as_str().unwrap()).unwrap().len(), bytes, "{key_type} {name}");
            }
            assert_eq!(crate::bundle::public_key_from_jwk(&jwk).unwrap().spki_der(), key.public_key().spki_der());
        }
    }
}
