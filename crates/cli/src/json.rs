//! JSON as SPIRE's commands print it: protobuf's JSON form with the original field names, unset fields included, nulls
//! left out, keys sorted, one line, and `<`, `>`, `&` escaped as Go does.

use anyhow::Context as _;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;
use std::sync::OnceLock;

fn pool() -> anyhow::Result<&'static DescriptorPool> {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = DescriptorPool::decode(finial_proto::DESCRIPTORS).context("the built-in contracts cannot be read")?;
    Ok(POOL.get_or_init(|| pool))
}

/// A message as JSON. `name` is its full name, such as `spire.api.server.entry.v1.ListEntriesResponse`; the messages of
/// the Workload API have no package: `X509SVIDResponse`.
///
/// # Errors
/// The name is not in the contracts.
pub(crate) fn message(name: &str, message: &impl prost::Message) -> anyhow::Result<Value> {
    let descriptor = pool()?.get_message_by_name(name).with_context(|| format!("no message {name:?}"))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())?;
    let options =
        SerializeOptions::new().skip_default_fields(false).use_proto_field_name(true).stringify_64_bit_integers(true);
    let mut value = dynamic.serialize_with_options(serde_json::value::Serializer, &options)?;
    tidy(&mut value);
    Ok(value)
}

/// Leaves nulls out, sorts keys, and writes whole numbers without a fraction, as Go does.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(tidy);
            map.sort_keys();
        }
        Value::Array(list) => {
            list.retain(|v| !v.is_null());
            list.iter_mut().for_each(tidy);
        }
        Value::Number(number) => {
            // Exact up to 2^53; Go goes over to exponents beyond that as well, at 1e21.
            const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
            if let Some(float) = number.as_f64().filter(|f| number.is_f64() && f.fract() == 0.0 && f.abs() <= EXACT_MAX)
            {
                #[allow(clippy::cast_possible_truncation)] // whole and in range
                let whole = float as i64;
                *value = whole.into();
            }
        }
        _ => {}
    }
}

/// One line, without its end.
pub(crate) fn line(value: &Value) -> String {
    // Go escapes these so that JSON can stand in HTML. They only occur inside strings.
    value
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

/// What a command prints for its messages: one as it is, several as a list.
pub(crate) fn lines(mut values: Vec<Value>) -> String {
    let value = if values.len() == 1 { values.remove(0) } else { Value::Array(values) };
    line(&value) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_proto::server::entry::{GetEntryRequest, ListEntriesResponse};
    use finial_proto::types::{Entry, Selector, Spiffeid};
    use finial_proto::workload::ValidateJwtsvidResponse;

    fn entry() -> Entry {
        Entry {
            id: "a".into(),
            spiffe_id: Some(Spiffeid { trust_domain: "td".into(), path: "/w<&>".into() }),
            selectors: vec![Selector { r#type: "unix".into(), value: "uid:1".into() }],
            expires_at: 5,
            ..Entry::default()
        }
    }

    #[test]
    fn unset_fields_are_printed_and_nulls_are_not() {
        let response = ListEntriesResponse { entries: vec![entry()], next_page_token: String::new() };
        let value = message("spire.api.server.entry.v1.ListEntriesResponse", &response).unwrap();
        let text = lines(vec![value]);
        for part in [
            r#"{"entries":[{"admin":false,"#,
            r#""expires_at":"5""#,
            r#""selectors":[{"type":"unix","value":"uid:1"}]"#,
            r#""spiffe_id":{"path":"/w\u003c\u0026\u003e","trust_domain":"td"}"#,
            r#""federates_with":[]"#,
            r#""next_page_token":""}"#,
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("parent_id") && text.ends_with("}\n"), "{text}");
    }

    #[test]
    fn several_messages_are_a_list() {
        let request = message("spire.api.server.entry.v1.GetEntryRequest", &GetEntryRequest::default()).unwrap();
        assert_eq!(lines(vec![request.clone(), request]), "[{\"id\":\"\"},{\"id\":\"\"}]\n");
    }

    #[test]
    fn numbers_of_claims_are_whole_if_they_are() {
        let number = |n| prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(n)) };
        let fields = [("iat", 1_795_388_540.0), ("x", 1.5), ("y", 1e300)];
        let fields = fields.into_iter().map(|(name, n)| (name.to_owned(), number(n))).collect();
        let response =
            ValidateJwtsvidResponse { spiffe_id: String::new(), claims: Some(prost_types::Struct { fields }) };
        let value = message("ValidateJWTSVIDResponse", &response).unwrap();
        assert_eq!(lines(vec![value]), "{\"claims\":{\"iat\":1795388540,\"x\":1.5,\"y\":1e+300},\"spiffe_id\":\"\"}\n");
    }

    #[test]
    fn an_unknown_name_is_an_error() {
        assert!(message("no.such.Message", &GetEntryRequest::default()).is_err());
    }
}
