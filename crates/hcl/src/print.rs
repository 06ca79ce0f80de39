//! A value as HCL text again, for those who read HCL themselves.

use crate::value::{Item, Kind, Object, Value};
use std::fmt::Write;

impl Value {
    /// The text that reads as this value. The items of an object stand bare, without braces around them, as in a file.
    /// `null`, which HCL has not, is left out.
    pub fn to_hcl(&self) -> String {
        let mut out = String::new();
        match &self.kind {
            Kind::Object(object) => items(&mut out, object, 0),
            other => value(&mut out, other, 0),
        }
        out
    }
}

fn indent(out: &mut String, depth: usize) {
    (0..depth).for_each(|_| out.push_str("  "));
}

fn items(out: &mut String, object: &Object, depth: usize) {
    for item in object.items.iter().filter(|item| !matches!(item.value.kind, Kind::Null)) {
        indent(out, depth);
        key(out, item);
        match &item.value.kind {
            Kind::Object(_) => block(out, &item.value, depth),
            other => {
                out.push_str(" = ");
                value(out, other, depth);
            }
        }
        out.push('\n');
    }
}

/// ` "label" { … }`: what stands in quotes was a label, which some programs read otherwise than a nested block.
fn block(out: &mut String, inner: &Value, depth: usize) {
    let Kind::Object(object) = &inner.kind else { return };
    if let [only] = object.items.as_slice()
        && !only.bare
        && matches!(only.value.kind, Kind::Object(_))
    {
        out.push(' ');
        key(out, only);
        return block(out, &only.value, depth);
    }
    out.push_str(" {\n");
    items(out, object, depth + 1);
    indent(out, depth);
    out.push('}');
}

fn key(out: &mut String, item: &Item) {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let starts = |c: char| c.is_ascii_alphabetic() || c == '_';
    let name = &item.key;
    let word = name.starts_with(starts) && name.chars().all(plain) && name != "true" && name != "false";
    if item.bare && word { out.push_str(name) } else { text(out, name) }
}

fn value(out: &mut String, kind: &Kind, depth: usize) {
    match kind {
        Kind::Null => {}
        Kind::Bool(flag) => {
            let _ = write!(out, "{flag}");
        }
        Kind::Int(number) => {
            let _ = write!(out, "{number}");
        }
        // With a fraction, so that it stays a float.
        Kind::Float(number) => {
            let _ = write!(out, "{number:?}");
        }
        Kind::String(string) => text(out, string),
        Kind::List(list) => {
            out.push('[');
            for (at, one) in list.iter().filter(|one| !matches!(one.kind, Kind::Null)).enumerate() {
                out.push_str(if at == 0 { "" } else { ", " });
                value(out, &one.kind, depth);
            }
            out.push(']');
        }
        Kind::Object(object) => {
            out.push_str("{\n");
            items(out, object, depth + 1);
            indent(out, depth);
            out.push('}');
        }
    }
}

/// In quotes. What stands in `${ }` is written as it is: nothing in there is unescaped when it is read.
fn text(out: &mut String, string: &str) {
    out.push('"');
    let mut braces = 0_usize;
    let mut rest = string.chars().peekable();
    while let Some(c) = rest.next() {
        if braces > 0 {
            match c {
                '{' => braces += 1,
                '}' => braces -= 1,
                _ => {}
            }
            out.push(c);
            continue;
        }
        match c {
            '$' if rest.peek() == Some(&'{') => {
                rest.next();
                out.push_str("${");
                braces = 1;
            }
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;
    use proptest::prelude::*;

    #[test]
    fn what_is_printed_reads_as_the_same() {
        let original = r#"
            socket = "unix:///run/x.sock"   # a comment
            quoted "two words" "b" { deep = [1, -2.5, "a\"b\\c\n", true] }
            twice { a = 1 }
            twice { a = 2 }
            "odd key" = "${file("/x")} and \t tab"
            list = [{ a = 1, b = { c = "d" } }, {}]
            text = <<EOF
several
lines
EOF
        "#;
        let value = parse(original).unwrap();
        let printed = value.to_hcl();
        assert_eq!(parse(&printed).unwrap(), value, "{printed}");
        assert!(printed.contains("quoted \"two words\" \"b\" {"), "{printed}");
        assert_eq!(parse("").unwrap().to_hcl(), "");
        let json = parse(r#"{"a": {"b": [{"c": null, "d": 1.0}]}, "true": false}"#).unwrap();
        assert_eq!(json.to_hcl(), "a {\n  b = [{\n    d = 1.0\n  }]\n}\n\"true\" = false\n");
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "[^\u{0}$]{0,40}") {
            let string = Value { kind: Kind::String(text), ..Value::default() };
            let item = Item { key: "key".into(), pos: string.pos, bare: true, value: string };
            let value = Value { kind: Kind::Object(Object { items: vec![item] }), ..Value::default() };
            prop_assert_eq!(parse(&value.to_hcl()).unwrap(), value);
        }
    }
}
