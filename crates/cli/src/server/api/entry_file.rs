//! The files that `entry create -data`, `entry update -data` and `entry delete -file` read.

use crate::app::Advised;
use crate::context::Context;
use crate::server::api::{FILE_BYTES_MAX, id};
use anyhow::Context as _;
use finial_core::TrustDomain;
use finial_proto::types;
use serde::Deserialize;
use serde_json::Value;

/// `{"entries": […]}`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entries {
    entries: Option<Vec<FileEntry>>,
}

/// One entry, with the field names of SPIRE's own file format. Unknown fields are passed over, as SPIRE does.
#[derive(Default, Deserialize)]
#[serde(default)]
struct FileEntry {
    selectors: Option<Vec<FileSelector>>,
    parent_id: String,
    spiffe_id: String,
    x509_svid_ttl: i32,
    jwt_svid_ttl: i32,
    federates_with: Option<Vec<String>>,
    entry_id: String,
    admin: bool,
    downstream: bool,
    entryexpiry: i64,
    dns_names: Option<Vec<String>>,
    revision_number: i64,
    store_svid: bool,
    hint: String,
    created_at: i64,
    additional_attributes: Option<FileAttributes>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FileSelector {
    r#type: String,
    value: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FileAttributes {
    disable_x509_svid_prefetch: bool,
    jwt_svid_include_jti: bool,
}

/// `{"ids": […]}`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Ids {
    ids: Option<Vec<String>>,
}

/// The entries of a file (`-`: standard input). Of a bad one it is said which it is, and how many more there are.
pub(crate) fn entries(cx: &Context, path: &str) -> anyhow::Result<Vec<types::Entry>> {
    let file: Entries = read(cx, path)?;
    let written = file.entries.unwrap_or_default();
    let mut entries = Vec::with_capacity(written.len());
    let mut first = None;
    let mut bad = 0;
    for (index, entry) in written.into_iter().enumerate() {
        let id = entry.spiffe_id.clone();
        match entry.into_wire() {
            Ok(entry) => entries.push(entry),
            Err(error) => {
                bad += 1;
                first.get_or_insert((index + 1, id, error));
            }
        }
    }
    let Some((number, id, error)) = first else { return Ok(entries) };
    let more = if bad > 1 { format!(", and {} more cannot be read", bad - 1) } else { String::new() };
    Err(Advised::new(error, format!("it is entry {number} of the file, with spiffe_id {id:?}{more}; nothing was sent"))
        .into())
}

/// The entry IDs of a file (`-`: standard input).
pub(crate) fn ids(cx: &Context, path: &str) -> anyhow::Result<Vec<String>> {
    Ok(read::<Ids>(cx, path)?.ids.unwrap_or_default())
}

fn read<T: Default + for<'de> Deserialize<'de>>(cx: &Context, path: &str) -> anyhow::Result<T> {
    let bytes = cx.read_file(path, FILE_BYTES_MAX)?;
    if bytes.trim_ascii().is_empty() {
        anyhow::bail!("unexpected end of JSON input");
    }
    let name = if path == "-" { "standard input" } else { path };
    let advised = |error: serde_json::Error, advice: &str| Advised::new(error.into(), format!("{advice} {name}"));
    let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| advised(e, "this is not JSON:"))?;
    if !matches!(value, Value::Object(_) | Value::Null) {
        // a list would be read as the fields in their order
        let hint = format!("the top of {name} must be an object: {{\"entries\": […]}}, or {{\"ids\": […]}} to delete");
        return Err(Advised::new(anyhow::anyhow!("the file does not hold a JSON object"), hint).into());
    }
    fold(&mut value);
    // `null` is an empty file to Go
    let read = serde_json::from_value::<Option<T>>(value);
    let read = read.map_err(|e| advised(with_place::<T>(e, bytes), "a field has the wrong type in"))?;
    Ok(read.unwrap_or_default())
}

/// The same error with line and column, which a value that is read already does not know.
fn with_place<T: for<'de> Deserialize<'de>>(error: serde_json::Error, mut json: Vec<u8>) -> serde_json::Error {
    fold_text(&mut json);
    match serde_json::from_slice::<Option<T>>(&json) {
        Err(placed) if placed.to_string().starts_with(&error.to_string()) => placed,
        _ => error,
    }
}

/// [`fold`] of a text, where everything stays in its place: a field that is `null` becomes one that nobody knows.
fn fold_text(json: &mut [u8]) {
    let mut at = 0;
    while let Some(start) = json.get(at..).and_then(|rest| rest.iter().position(|b| *b == b'"')).map(|n| at + n + 1) {
        let mut end = start;
        while let Some(byte) = json.get(end).filter(|byte| **byte != b'"') {
            end += if *byte == b'\\' { 2 } else { 1 };
        }
        at = end + 1;
        let after = json.get(at..).unwrap_or_default().trim_ascii_start();
        // only the name of a field is followed by a colon
        let Some(value) = after.strip_prefix(b":").map(<[u8]>::trim_ascii_start) else { continue };
        let is_null = value.starts_with(b"null");
        let name = json.get_mut(start..end).unwrap_or_default();
        name.make_ascii_lowercase();
        if let Some(first) = name.first_mut().filter(|first| is_null && **first != b'\\') {
            *first = b'!';
        }
    }
}

/// Go reads field names in any case, and takes `null` for "not given".
fn fold(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let fields = std::mem::take(map);
            for (name, mut field) in fields {
                fold(&mut field);
                if !field.is_null() {
                    map.insert(name.to_ascii_lowercase(), field);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(fold),
        _ => {}
    }
}

impl FileEntry {
    fn into_wire(self) -> anyhow::Result<types::Entry> {
        let trust_domain =
            |text: &String| Ok(TrustDomain::parse(text).context("invalid federated trust domain")?.to_string());
        let federates_with: anyhow::Result<_> = self.federates_with.iter().flatten().map(trust_domain).collect();
        let selector = |s: FileSelector| types::Selector { r#type: s.r#type, value: s.value };
        Ok(types::Entry {
            id: self.entry_id,
            spiffe_id: Some(id(&self.spiffe_id).context("invalid SPIFFE ID")?),
            parent_id: Some(id(&self.parent_id).context("invalid parent ID")?),
            selectors: self.selectors.unwrap_or_default().into_iter().map(selector).collect(),
            x509_svid_ttl: self.x509_svid_ttl,
            federates_with: federates_with?,
            admin: self.admin,
            downstream: self.downstream,
            expires_at: self.entryexpiry,
            dns_names: self.dns_names.unwrap_or_default(),
            revision_number: self.revision_number,
            store_svid: self.store_svid,
            jwt_svid_ttl: self.jwt_svid_ttl,
            hint: self.hint,
            created_at: self.created_at,
            additional_attributes: self.additional_attributes.map(|a| types::entry::AdditionalAttributes {
                disable_x509_svid_prefetch: a.disable_x509_svid_prefetch,
                jwt_svid_include_jti: a.jwt_svid_include_jti,
            }),
        })
    }
}
