//! Values as text of a statement, for MySQL: a statement that is run once would need three packets as a prepared one, the
//! last of which holds up what follows for 40 ms. Texts are written in hexadecimal, which no setting of the server reads
//! in another way, and in which no value can end its literal.

use super::Value;
use super::time::time_text;
use std::fmt::Write;

/// The statement with each `?` replaced by its value.
pub(super) fn inlined(text: &str, values: &[Value<'_>]) -> String {
    let mut whole = String::with_capacity(text.len() + values.len() * 24);
    let mut values = values.iter();
    for (at, part) in text.split('?').enumerate() {
        if at > 0 {
            match values.next() {
                Some(value) => push(&mut whole, value),
                None => whole.push('?'),
            }
        }
        whole.push_str(part);
    }
    whole
}

// writing into a string cannot fail
fn push(to: &mut String, value: &Value<'_>) {
    let _ = match value {
        Value::Int(value) => write!(to, "{value}"),
        Value::Bool(value) => write!(to, "{}", u8::from(*value)),
        Value::Text(value) => hexadecimal(to, "_utf8 ", value.as_bytes()),
        Value::Blob(Some(value)) => hexadecimal(to, "", value),
        Value::Time(Some(value)) => write!(to, "'{}'", time_text(*value).trim_end_matches("+00:00")),
        Value::Blob(None) | Value::Time(None) => write!(to, "NULL"),
    };
}

fn hexadecimal(to: &mut String, before: &str, bytes: &[u8]) -> std::fmt::Result {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    to.push_str(before);
    to.push_str("x'");
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            to.push(DIGITS.get(usize::from(digit)).copied().map_or('0', char::from));
        }
    }
    to.write_char('\'')
}

#[cfg(test)]
mod tests {
    use super::super::Moment;
    use super::*;

    #[test]
    fn no_value_ends_its_literal() {
        let values = [
            Value::from("a'b?"),
            Value::from(7_i64),
            Value::from(true),
            Value::from(Moment(1_795_385_010_846)),
            Value::from(None::<Moment>),
            Value::Blob(Some(vec![0, 255].into())),
        ];
        assert_eq!(
            inlined("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", &values),
            "INSERT INTO t VALUES (_utf8 x'6127623f', 7, 1, '2026-11-22 22:03:30.846', NULL, x'00ff')"
        );
    }

    proptest::proptest! {
        #[test]
        fn only_digits_stand_between_the_quotes(text in "\\PC{0,40}") {
            let whole = inlined("?", &[Value::from(text.as_str())]);
            let inner = whole.strip_prefix("_utf8 x'").and_then(|rest| rest.strip_suffix('\'')).unwrap();
            proptest::prop_assert!(inner.bytes().all(|b| b.is_ascii_hexdigit()) && inner.len() == text.len() * 2);
        }
    }
}
