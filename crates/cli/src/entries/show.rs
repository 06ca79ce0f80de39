//! A plan for people, and as JSON.

use super::plan::{Plan, Update, changes};
use super::write::json_of;
use crate::server::api::print;
use finial_proto::types::Entry;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// How many changes of a kind are shown unless all are asked for.
const SHOWN: usize = 50;

/// `3 to create, 1 to change, nothing to delete; 20 as they should be, 4 others left alone`.
pub(super) fn summary(plan: &Plan) -> String {
    let mut out = format!(
        "{} to create, {} to change, {} to delete; {} unchanged",
        plan.create.len(),
        plan.update.len(),
        plan.delete.len(),
        plan.unchanged
    );
    if !plan.left.is_empty() {
        let _ = write!(out, ", {} that differ left as they are", plan.left.len());
    }
    if plan.others > 0 {
        let _ = write!(out, ", {} that are not in the file left alone", plan.others);
    }
    out
}

/// The plan, change by change. Its marks are those of `diff`: `+` comes, `-` goes, `~` changes.
pub(super) fn pretty(plan: &Plan, full: bool) -> String {
    let mut out = String::new();
    let limit = if full { usize::MAX } else { SHOWN };
    let more = |count: usize, what: &str| {
        if count > limit {
            format!("… and {} more to {what}: -full shows all\n", count - limit)
        } else {
            String::new()
        }
    };
    for update in plan.update.iter().take(limit) {
        out.push_str(&changed('~', update));
    }
    out.push_str(&more(plan.update.len(), "change"));
    for entry in plan.create.iter().take(limit) {
        out.push_str(&whole('+', entry));
    }
    out.push_str(&more(plan.create.len(), "create"));
    for entry in plan.delete.iter().take(limit) {
        out.push_str(&whole('-', entry));
    }
    out.push_str(&more(plan.delete.len(), "delete"));
    for update in plan.left.iter().take(limit) {
        out.push_str(&changed('!', update));
    }
    out.push_str(&more(plan.left.len(), "leave as they are"));
    for note in &plan.notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

fn head(mark: char, entry: &Entry) -> String {
    let id = if entry.id.is_empty() { String::new() } else { format!("  (entry {})", entry.id) };
    format!("{mark} {}{id}\n", print::id(entry.spiffe_id.as_ref()))
}

fn whole(mark: char, entry: &Entry) -> String {
    let mut out = head(mark, entry);
    if let Value::Object(fields) = json_of(entry) {
        for (name, value) in fields.iter().filter(|(name, _)| !matches!(name.as_str(), "entry_id" | "spiffe_id")) {
            let _ = writeln!(out, "    {name}: {}", short(name, value));
        }
    }
    out
}

fn short(name: &str, value: &Value) -> String {
    let list = |values: &[Value]| {
        let texts = values.iter().map(|value| match value {
            Value::Object(selector) => {
                let part = |name| selector.get(name).and_then(Value::as_str).unwrap_or_default();
                format!("{}:{}", part("type"), part("value"))
            }
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        texts.collect::<Vec<_>>().join(", ")
    };
    match value {
        Value::Array(values) => list(values),
        Value::Object(fields) => fields.keys().cloned().collect::<Vec<_>>().join(", "),
        Value::Number(number) if name.ends_with("_ttl") => format!("{number}s"),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn changed(mark: char, update: &Update) -> String {
    let mut out = head(mark, &update.before);
    for change in changes(update) {
        match (change.before.as_slice(), change.after.as_slice()) {
            ([before], [after]) if !matches!(change.field, "selectors" | "federates_with") => {
                let _ = writeln!(out, "    {}: {before} -> {after}", change.field);
            }
            (before, after) => {
                for (mark, values) in [('-', before), ('+', after)] {
                    for value in values {
                        let _ = writeln!(out, "    {mark} {}: {value}", change.field);
                    }
                }
            }
        }
    }
    out
}

/// The plan as JSON; `applied` tells whether it was done.
pub(super) fn json(plan: &Plan, applied: bool, failed: &[(String, Entry, String)]) -> Value {
    let entries = |entries: &[Entry]| entries.iter().map(json_of).collect::<Value>();
    let updates = |updates: &[Update]| {
        let one = |update: &Update| {
            let changes: serde_json::Map<String, Value> = changes(update)
                .into_iter()
                .map(|c| (c.field.to_owned(), json!({"before": c.before, "after": c.after})))
                .collect();
            json!({"entry": json_of(&update.after), "changes": changes})
        };
        updates.iter().map(one).collect::<Value>()
    };
    let failed: Vec<Value> = failed
        .iter()
        .map(|(verb, entry, status)| json!({"verb": verb, "entry": json_of(entry), "status": status}))
        .collect();
    json!({
        "applied": applied,
        "create": entries(&plan.create),
        "update": updates(&plan.update),
        "delete": entries(&plan.delete),
        "left": updates(&plan.left),
        "unchanged": plan.unchanged,
        "others": plan.others,
        "notes": plan.notes,
        "failed": failed,
    })
}
