//! Entries as a file for version control: in an order and a form that only change when the entries do.

use crate::server::api::print;
use finial_hcl::{Kind, yaml};
use finial_proto::types;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// Words that readers of YAML 1.1 take for something else than a text.
const WORDS: [&str; 8] = ["yes", "no", "on", "off", "y", "n", "true", "false"];

/// The fields of an entry that are not at their default, by the names of SPIRE's files.
fn fields(entry: &types::Entry) -> Vec<(&'static str, Value)> {
    let selector = |s: &types::Selector| json!({"type": s.r#type, "value": s.value});
    let attributes = entry.additional_attributes.unwrap_or_default();
    let mut additional = Map::new();
    for (name, on) in [
        ("disable_x509_svid_prefetch", attributes.disable_x509_svid_prefetch),
        ("jwt_svid_include_jti", attributes.jwt_svid_include_jti),
    ] {
        if on {
            additional.insert(name.into(), true.into());
        }
    }
    let all = [
        ("entry_id", Value::from(entry.id.as_str())),
        ("spiffe_id", print::id(entry.spiffe_id.as_ref()).into()),
        ("parent_id", print::id(entry.parent_id.as_ref()).into()),
        ("selectors", entry.selectors.iter().map(selector).collect()),
        ("x509_svid_ttl", entry.x509_svid_ttl.into()),
        ("jwt_svid_ttl", entry.jwt_svid_ttl.into()),
        ("federates_with", entry.federates_with.as_slice().into()),
        ("admin", entry.admin.into()),
        ("downstream", entry.downstream.into()),
        ("entryExpiry", entry.expires_at.into()),
        ("dns_names", entry.dns_names.as_slice().into()),
        ("store_svid", entry.store_svid.into()),
        ("hint", entry.hint.as_str().into()),
        ("additional_attributes", Value::Object(additional)),
    ];
    let is_default = |value: &Value| match value {
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0),
        Value::Bool(yes) => !yes,
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Null => true,
    };
    all.into_iter().filter(|(_, value)| !is_default(value)).collect()
}

/// An entry as an object of JSON.
pub(super) fn json_of(entry: &types::Entry) -> Value {
    fields(entry).into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A file that `spire-server entry create -data` takes as well.
pub(super) fn json(entries: &[types::Entry]) -> String {
    let entries: Vec<Value> = entries.iter().map(json_of).collect();
    format!("{:#}\n", json!({ "entries": entries }))
}

/// The same as YAML.
pub(super) fn yaml(entries: &[types::Entry]) -> String {
    if entries.is_empty() {
        return "entries: []\n".into();
    }
    let mut out = String::from("entries:\n");
    for entry in entries {
        for (at, (name, value)) in fields(entry).into_iter().enumerate() {
            out.push_str(if at == 0 { "  - " } else { "    " });
            out.push_str(name);
            out.push(':');
            field(&mut out, &value);
        }
    }
    out
}

fn field(out: &mut String, value: &Value) {
    // writing to memory does not fail
    match value {
        Value::Array(list) => {
            out.push('\n');
            for value in list {
                match value.as_object() {
                    Some(object) => {
                        for (at, (name, value)) in object.iter().enumerate() {
                            let before = if at == 0 { "      - " } else { "        " };
                            let _ = writeln!(out, "{before}{name}: {}", scalar(value));
                        }
                    }
                    None => {
                        let _ = writeln!(out, "      - {}", scalar(value));
                    }
                }
            }
        }
        Value::Object(object) => {
            out.push('\n');
            for (name, value) in object {
                let _ = writeln!(out, "      {name}: {}", scalar(value));
            }
        }
        value => {
            let _ = writeln!(out, " {}", scalar(value));
        }
    }
}

fn scalar(value: &Value) -> String {
    match value.as_str() {
        Some(text) => quoted(text),
        None => value.to_string(),
    }
}

/// A text of YAML: as it is where no reader could take it for something else, else in quotes.
fn quoted(text: &str) -> String {
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_./:@-".contains(c))
        && !text.ends_with(':')
        && !WORDS.contains(&text.to_ascii_lowercase().as_str())
        && matches!(yaml::plain(text), Kind::String(_));
    if is_plain {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            // what YAML does not take as it is
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}') => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
