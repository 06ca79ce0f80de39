//! JSON as SPIRE's commands print it: protobuf's JSON form with the original field names, unset fields included, nulls
//! left out, keys sorted, one line, and `<`, `>`, `&` escaped as Go does.

use anyhow::Context as _;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;
use std::sync::OnceLock;

/// The contracts, compiled: see `tests/descriptors.rs`.
const DESCRIPTORS: &[u8] = include_bytes!("descriptors.bin");

fn pool() -> anyhow::Result<&'static DescriptorPool> {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = DescriptorPool::decode(DESCRIPTORS).context("the built-in contracts cannot be read")?;
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

/// Leaves nulls out and sorts keys.
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
