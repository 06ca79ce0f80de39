//! Files of entries: YAML or JSON with the field names of `spire-server entry create -data`; what
//! `spire-server entry show -output json` prints can be read as well. Everything that is wrong is said at once.

use finial_config::{ConfigError, Problem, nearest};
use finial_core::{SpiffeId, TrustDomain};
use finial_hcl::{Item, Kind, Object, Pos, Value, yaml};
use finial_proto::types::{self, entry::AdditionalAttributes};
use std::collections::HashMap;
use std::path::Path;

/// After so many problems the rest is not looked for.
const PROBLEMS_MAX: usize = 50;

/// An entry of a file, in its canonical form, and where it stands there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placed {
    pub(crate) pos: Pos,
    pub(crate) entry: types::Entry,
}

/// The fields that are written, and what else is read by another name.
const FIELDS: [&str; 14] = [
    "entry_id",
    "spiffe_id",
    "parent_id",
    "selectors",
    "x509_svid_ttl",
    "jwt_svid_ttl",
    "federates_with",
    "admin",
    "downstream",
    "entryExpiry",
    "dns_names",
    "store_svid",
    "hint",
    "additional_attributes",
];

/// The entries of a text; `path` is only named in what is wrong.
///
/// # Errors
/// All that is wrong with it.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Vec<Placed>, Box<ConfigError>> {
    let mut reader = Reader::default();
    let documents = if text.trim_start().starts_with('{') {
        finial_hcl::parse(text).map(|value| vec![value]).map_err(|error| (error.pos, error.message))
    } else {
        yaml::parse(text).map_err(|error| (error.pos, error.message))
    };
    let mut entries = Vec::new();
    match documents {
        Ok(documents) => documents.iter().for_each(|document| reader.document(document, &mut entries)),
        Err((pos, message)) => reader.problem(pos, message, ""),
    }
    reader.twice(&entries);
    if reader.problems.is_empty() {
        return Ok(entries);
    }
    let problems = reader.problems;
    Err(Box::new(ConfigError { file: path.into(), problems, ..ConfigError::default() }))
}

/// The form in which entries are compared: nothing that has no order is in a chance order, and nothing that the server
/// counts itself is there.
pub(crate) fn canonical(mut entry: types::Entry) -> types::Entry {
    entry.selectors.sort_by(|a, b| (&a.r#type, &a.value).cmp(&(&b.r#type, &b.value)));
    entry.selectors.dedup();
    entry.federates_with.sort();
    entry.federates_with.dedup();
    entry.additional_attributes = entry.additional_attributes.filter(|a| *a != AdditionalAttributes::default());
    entry.revision_number = 0;
    entry.created_at = 0;
    entry
}

/// What no two entries may share: SPIFFE ID, parent and selectors.
pub(crate) type Identity = (String, String, Vec<(String, String)>);

/// The identity of a canonical entry.
pub(crate) fn identity(entry: &types::Entry) -> Identity {
    use crate::server::api::print::id;
    let selectors = entry.selectors.iter().map(|s| (s.r#type.clone(), s.value.clone())).collect();
    (id(entry.spiffe_id.as_ref()), id(entry.parent_id.as_ref()), selectors)
}

#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, pos: Pos, message: impl Into<String>, hint: &str) {
        if self.problems.len() < PROBLEMS_MAX {
            let hint = (!hint.is_empty()).then(|| hint.to_owned());
            self.problems.push(Problem { message: message.into(), pos: Some(pos), hint });
        }
    }

    fn document(&mut self, document: &Value, out: &mut Vec<Placed>) {
        let list = match &document.kind {
            Kind::Null => return,
            Kind::List(list) => list,
            Kind::Object(object) => {
                let mut list: &[Value] = &[];
                for item in &object.items {
                    match (item.key.as_str(), &item.value.kind) {
                        ("entries", Kind::List(entries)) => list = entries,
                        ("entries", Kind::Null) | ("next_page_token", _) => {}
                        ("entries", _) => self.problem(item.value.pos, "entries must be a list", ""),
                        (key, _) => {
                            let hint = "the top holds the list \"entries\" and nothing else";
                            self.problem(item.pos, format!("unknown field {key:?}"), hint);
                        }
                    }
                }
                return self.entries(list, out);
            }
            _ => return self.problem(document.pos, "expected a list of entries, or {\"entries\": […]}", ""),
        };
        self.entries(list, out);
    }

    fn entries(&mut self, list: &[Value], out: &mut Vec<Placed>) {
        for value in list {
            match &value.kind {
                Kind::Object(object) => {
                    let entry = canonical(self.entry(value.pos, object));
                    out.push(Placed { pos: value.pos, entry });
                }
                _ => self.problem(value.pos, "an entry must be an object with fields", ""),
            }
        }
    }

    fn entry(&mut self, pos: Pos, object: &Object) -> types::Entry {
        let mut entry = types::Entry::default();
        let mut selectors_given = false;
        let before = self.problems.len();
        for item in self.fields(object) {
            match item.key.to_ascii_lowercase().as_str() {
                "entry_id" | "id" => entry.id = self.text(item),
                "spiffe_id" => entry.spiffe_id = self.id(item),
                "parent_id" => entry.parent_id = self.id(item),
                "selectors" => {
                    selectors_given = true;
                    entry.selectors = self.selectors(item);
                }
                "x509_svid_ttl" => entry.x509_svid_ttl = self.seconds(item),
                "jwt_svid_ttl" => entry.jwt_svid_ttl = self.seconds(item),
                "federates_with" => entry.federates_with = self.trust_domains(item),
                "admin" => entry.admin = self.bool(item),
                "downstream" => entry.downstream = self.bool(item),
                "store_svid" => entry.store_svid = self.bool(item),
                "entryexpiry" | "expires_at" => entry.expires_at = self.int(item),
                "dns_names" => entry.dns_names = self.texts(item).into_iter().map(|(_, name)| name).collect(),
                "hint" => entry.hint = self.text(item),
                "additional_attributes" => entry.additional_attributes = self.attributes(item),
                // the server counts these itself
                "revision_number" | "created_at" => {}
                key => {
                    let hint = match nearest(key, FIELDS) {
                        Some(meant) => format!("did you mean {meant}?"),
                        None => format!("fields are {}", FIELDS.join(", ")),
                    };
                    self.problem(item.pos, format!("unknown field {:?}", item.key), &hint);
                }
            }
        }
        // a field that is there and wrong was told already
        let complete = self.problems.len() == before;
        if entry.spiffe_id.is_none() && complete {
            self.problem(pos, "spiffe_id is missing", "add spiffe_id: spiffe://your.domain/path");
        }
        if entry.parent_id.is_none() && complete {
            self.problem(pos, "parent_id is missing", "add parent_id: the SPIFFE ID of the agent, or of its alias");
        }
        if entry.selectors.is_empty() && (complete || !selectors_given) {
            self.problem(
                pos,
                "at least one selector is required",
                "add selectors: [{type: unix, value: \"uid:1000\"}]",
            );
        }
        entry
    }

    /// The fields that are given; each may be given once.
    fn fields<'a>(&mut self, object: &'a Object) -> Vec<&'a Item> {
        let mut fields: Vec<&Item> = Vec::with_capacity(object.items.len());
        for item in &object.items {
            if fields.iter().any(|f| f.key.eq_ignore_ascii_case(&item.key)) {
                self.problem(item.pos, format!("{} is given twice", item.key), "keep one of them");
            } else if item.value.kind != Kind::Null {
                fields.push(item);
            }
        }
        fields
    }

    fn wrong(&mut self, item: &Item, want: &str) {
        self.problem(item.value.pos, format!("{} must be {want}", item.key), "");
    }

    fn text(&mut self, item: &Item) -> String {
        match &item.value.kind {
            Kind::String(text) => text.clone(),
            Kind::Int(number) => number.to_string(),
            _ => {
                self.wrong(item, "a text");
                String::new()
            }
        }
    }

    fn bool(&mut self, item: &Item) -> bool {
        match &item.value.kind {
            Kind::Bool(yes) => *yes,
            _ => {
                self.wrong(item, "true or false");
                false
            }
        }
    }

    /// Whole numbers; in quotes as well, as protobuf's JSON has them.
    fn int(&mut self, item: &Item) -> i64 {
        let number = match &item.value.kind {
            Kind::Int(number) => Some(*number),
            Kind::String(text) => text.parse().ok(),
            _ => None,
        };
        number.unwrap_or_else(|| {
            self.wrong(item, "a whole number");
            0
        })
    }

    fn seconds(&mut self, item: &Item) -> i32 {
        let seconds = self.int(item);
        i32::try_from(seconds).ok().filter(|s| *s >= 0).unwrap_or_else(|| {
            self.wrong(item, "a number of seconds, from 0 (the default) to 2147483647");
            0
        })
    }

    fn id(&mut self, item: &Item) -> Option<types::Spiffeid> {
        let text = match &item.value.kind {
            Kind::Object(object) => {
                let part = |name| object.all(name).next().and_then(|i| i.value.as_str()).unwrap_or_default();
                format!("spiffe://{}{}", part("trust_domain"), part("path"))
            }
            _ => self.text(item),
        };
        match SpiffeId::parse(&text) {
            Ok(id) => Some(types::Spiffeid { trust_domain: id.trust_domain_name().into(), path: id.path().into() }),
            Err(error) => {
                let hint = "a SPIFFE ID looks like spiffe://your.domain/path";
                self.problem(item.value.pos, format!("{}: {error}: {text:?}", item.key), hint);
                None
            }
        }
    }

    fn list<'a>(&mut self, item: &'a Item) -> &'a [Value] {
        match &item.value.kind {
            Kind::List(list) => list,
            _ => {
                self.wrong(item, "a list");
                &[]
            }
        }
    }

    fn texts(&mut self, item: &Item) -> Vec<(Pos, String)> {
        let mut texts = Vec::new();
        for value in self.list(item) {
            match &value.kind {
                Kind::String(text) => texts.push((value.pos, text.clone())),
                _ => self.problem(value.pos, format!("{} must be a list of texts", item.key), ""),
            }
        }
        texts
    }

    fn trust_domains(&mut self, item: &Item) -> Vec<String> {
        let mut names = Vec::new();
        for (pos, text) in self.texts(item) {
            match TrustDomain::parse(&text) {
                Ok(name) => names.push(name.to_string()),
                Err(error) => self.problem(pos, format!("federates_with: {error}: {text:?}"), ""),
            }
        }
        names
    }

    fn selectors(&mut self, item: &Item) -> Vec<types::Selector> {
        let mut selectors: Vec<types::Selector> = Vec::new();
        for value in self.list(item) {
            let selector = match &value.kind {
                Kind::String(text) => crate::server::api::selector(text).map_err(|e| e.to_string()),
                Kind::Object(object) => {
                    let part = |name| object.all(name).next().map(|i| &i.value.kind);
                    match (part("type"), part("value")) {
                        (Some(Kind::String(kind)), Some(Kind::String(value))) if object.items.len() == 2 => {
                            Ok(types::Selector { r#type: kind.clone(), value: value.clone() })
                        }
                        _ => Err("a selector has a type and a value, both texts, and nothing else".into()),
                    }
                }
                _ => Err("a selector is {type: …, value: …}, or a text \"type:value\"".into()),
            };
            match selector {
                Ok(selector) if selectors.contains(&selector) => {
                    self.problem(
                        value.pos,
                        format!("selector {}:{} is given twice", selector.r#type, selector.value),
                        "",
                    );
                }
                Ok(selector) => selectors.push(selector),
                Err(message) => self.problem(value.pos, message, ""),
            }
        }
        selectors
    }

    fn attributes(&mut self, item: &Item) -> Option<AdditionalAttributes> {
        const NAMES: [&str; 2] = ["disable_x509_svid_prefetch", "jwt_svid_include_jti"];
        let Kind::Object(object) = &item.value.kind else {
            self.wrong(item, "an object");
            return None;
        };
        let mut attributes = AdditionalAttributes::default();
        for field in self.fields(object) {
            match field.key.to_ascii_lowercase().as_str() {
                "disable_x509_svid_prefetch" => attributes.disable_x509_svid_prefetch = self.bool(field),
                "jwt_svid_include_jti" => attributes.jwt_svid_include_jti = self.bool(field),
                key => {
                    let hint = nearest(key, NAMES).map(|meant| format!("did you mean {meant}?")).unwrap_or_default();
                    self.problem(field.pos, format!("unknown field {:?}", field.key), &hint);
                }
            }
        }
        Some(attributes)
    }

    /// Entries that only one of could ever be there.
    fn twice(&mut self, entries: &[Placed]) {
        let (mut ids, mut identities) = (HashMap::new(), HashMap::new());
        for Placed { pos, entry } in entries {
            let earlier = if entry.id.is_empty() { None } else { ids.insert(entry.id.as_str(), *pos) };
            if let Some(earlier) = earlier {
                let message = format!("entry ID {:?} is given twice, first at {earlier}", entry.id);
                self.problem(*pos, message, "IDs name one entry each");
            }
            let earlier = entry.spiffe_id.as_ref().and_then(|_| identities.insert(identity(entry), *pos));
            if let Some(earlier) = earlier {
                let message = format!("SPIFFE ID, parent and selectors are those of the entry at {earlier}");
                self.problem(
                    *pos,
                    message,
                    "a server keeps one such entry: remove one of them, or change its selectors",
                );
            }
        }
    }
}
