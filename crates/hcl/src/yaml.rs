//! YAML into the tree that configuration files are read into, so that everything keeps its place in the text.

use crate::value::{Item, Kind, Object, Pos, Value};
use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use std::collections::HashMap;

/// How deep a file may be nested.
const DEPTH_MAX: usize = 32;
/// How many values aliases may repeat: a file of a few hundred bytes could otherwise mean any number.
const REPEATED_MAX: usize = 1_000_000;

/// Why a text is not YAML that can be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pos}: {message}")]
pub struct YamlError {
    /// Where it stops being so.
    pub pos: Pos,
    /// What is wrong there.
    pub message: String,
}

/// A list or mapping that is not complete yet.
struct Open {
    value: Value,
    /// Of mappings: the key that waits for its value.
    key: Option<(String, Pos)>,
    anchor: usize,
}

#[derive(Default)]
struct Loader {
    open: Vec<Open>,
    documents: Vec<Value>,
    /// Anchors with how many values they hold.
    anchors: HashMap<usize, (Value, usize)>,
    repeated: usize,
}

/// All documents of the text.
///
/// # Errors
/// It is not YAML, nested too deep, or repeats itself too often.
pub fn parse(text: &str) -> Result<Vec<Value>, YamlError> {
    let mut loader = Loader::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| YamlError {
            pos: place(error.marker().line(), error.marker().col()),
            message: error.info().to_owned(),
        })?;
        loader.take(event, span)?;
    }
    Ok(loader.documents)
}

fn place(line: usize, column_from_0: usize) -> Pos {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Pos { line: number(line), column: number(column_from_0).saturating_add(1) }
}

impl Loader {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), YamlError> {
        let pos = place(span.start.line(), span.start.col());
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let kind = if style == ScalarStyle::Plain { plain(&text) } else { Kind::String(text.into_owned()) };
                // what a key is written like does not matter
                if let Some(open) = self.open.last_mut()
                    && matches!(open.value.kind, Kind::Object(_))
                    && open.key.is_none()
                {
                    let key = match kind {
                        Kind::String(text) => text,
                        Kind::Int(number) => number.to_string(),
                        Kind::Bool(yes) => yes.to_string(),
                        _ => return Err(YamlError { pos, message: "this cannot be a key".into() }),
                    };
                    open.key = Some((key, pos));
                    return Ok(());
                }
                self.put(Value { pos, kind }, anchor)
            }
            Event::SequenceStart(anchor, _) => self.push(Value { pos, kind: Kind::List(Vec::new()) }, anchor),
            Event::MappingStart(anchor, _) => self.push(Value { pos, kind: Kind::Object(Object::default()) }, anchor),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(done) => self.put(done.value, done.anchor),
                None => Ok(()),
            },
            Event::Alias(anchor) => {
                let Some((value, size)) = self.anchors.get(&anchor).cloned() else {
                    return Err(YamlError { pos, message: "an alias inside what it stands for".into() });
                };
                self.repeated = self.repeated.saturating_add(size);
                if self.repeated > REPEATED_MAX {
                    return Err(YamlError { pos, message: format!("aliases repeat more than {REPEATED_MAX} values") });
                }
                self.put(value, 0)
            }
            _ => Ok(()),
        }
    }

    fn push(&mut self, value: Value, anchor: usize) -> Result<(), YamlError> {
        let pos = value.pos;
        if self.open.len() >= DEPTH_MAX {
            return Err(YamlError { pos, message: format!("nested deeper than {DEPTH_MAX} levels") });
        }
        if let Some(open) = self.open.last()
            && matches!(open.value.kind, Kind::Object(_))
            && open.key.is_none()
        {
            return Err(YamlError { pos, message: "a list or mapping cannot be a key".into() });
        }
        self.open.push(Open { value, key: None, anchor });
        Ok(())
    }

    /// Where a complete value belongs.
    fn put(&mut self, value: Value, anchor: usize) -> Result<(), YamlError> {
        let pos = value.pos;
        if anchor != 0 {
            let size = size(&value);
            self.anchors.insert(anchor, (value.clone(), size));
        }
        let Some(open) = self.open.last_mut() else {
            self.documents.push(value);
            return Ok(());
        };
        match (&mut open.value.kind, open.key.take()) {
            (Kind::List(list), _) => list.push(value),
            (Kind::Object(object), Some((key, pos))) => object.items.push(Item { key, pos, bare: true, value }),
            _ => return Err(YamlError { pos, message: "a list or mapping cannot be a key".into() }),
        }
        Ok(())
    }
}

fn size(value: &Value) -> usize {
    1 + match &value.kind {
        Kind::List(list) => list.iter().map(size).sum(),
        Kind::Object(object) => object.items.iter().map(|item| size(&item.value)).sum(),
        _ => 0,
    }
}

/// What a text without quotes is (YAML 1.2, core schema).
pub fn plain(text: &str) -> Kind {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Kind::Null,
        "true" | "True" | "TRUE" => return Kind::Bool(true),
        "false" | "False" | "FALSE" => return Kind::Bool(false),
        _ => {}
    }
    let number = |digits: &str, radix| i64::from_str_radix(digits, radix).ok();
    let int = match (text.strip_prefix("0x"), text.strip_prefix("0o")) {
        (Some(digits), _) if !digits.starts_with(['+', '-']) => number(digits, 16),
        (_, Some(digits)) if !digits.starts_with(['+', '-']) => number(digits, 8),
        _ => number(text, 10),
    };
    if let Some(int) = int {
        return Kind::Int(int);
    }
    let is_float =
        text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)) && text.bytes().any(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(float) if is_float => Kind::Float(float),
        _ => Kind::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(text: &str) -> Kind {
        parse(text).unwrap().remove(0).kind
    }

    #[test]
    fn kinds_and_places() {
        let documents = parse("a: 1\nb:\n  - \"2\"\n  - {c: yes, d: true}\n---\n- 0x1f\n- 1.5\n- ~\n").unwrap();
        assert_eq!(documents.len(), 2);
        let first = documents[0].as_object().unwrap();
        assert_eq!(first.items[0].value.kind, Kind::Int(1));
        assert_eq!((first.items[1].key.as_str(), first.items[1].pos), ("b", Pos { line: 2, column: 1 }));
        let Kind::List(list) = &first.items[1].value.kind else { panic!() };
        assert_eq!(list[0].kind, Kind::String("2".into()));
        assert_eq!(list[1].find(&["c"]).unwrap().kind, Kind::String("yes".into()));
        assert_eq!(list[1].find(&["d"]).unwrap().kind, Kind::Bool(true));
        assert_eq!(list[1].find_pos(&["d"]), Some(Pos { line: 4, column: 14 }));
        let kinds = [Kind::Int(31), Kind::Float(1.5), Kind::Null].map(|kind| Value { pos: Pos::default(), kind });
        assert_eq!(documents[1].kind, Kind::List(kinds.into()));
    }

    #[test]
    fn aliases_repeat_but_not_without_end() {
        let shared = one("x: &s {type: unix}\ny: [*s, *s]");
        let Kind::Object(shared) = shared else { panic!() };
        assert_eq!(shared.items[1].value.kind, Kind::List(vec![shared.items[0].value.clone(); 2]));
        let mut bomb = String::from("- &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..12 {
            let aliases = vec![format!("*a{}", n - 1); 10].join(", ");
            bomb.push_str(&format!("- &a{n} [{aliases}]\n"));
        }
        assert!(parse(&bomb).unwrap_err().message.contains("aliases repeat"));
        let deep = format!("{}x{}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(parse(&deep).is_err());
    }

    #[test]
    fn says_where_it_stops() {
        let error = parse("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(error.pos.line >= 2, "{error:?}");
        assert!(parse("? [a]\n: 1\n").unwrap_err().message.contains("cannot be a key"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[ -~\n]{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn nor_text_that_looks_like_yaml(text in prop::collection::vec(prop::sample::select(vec![
            "a", ": ", "- ", "\n", "  ", "[", "]", "{", "}", ",", "&x ", "*x", "\"", "'", "|", ">", "---", "...", "? ", "!!str ", "#", "\t", "1"
        ]), 0..60)) {
            let _ = parse(&text.concat());
        }
    }
}
