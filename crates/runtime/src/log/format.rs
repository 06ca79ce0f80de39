//! How a line looks: the rules of logrus, which readers of SPIRE's logs rely on.

use super::{Format, LITERAL_MARK, TIME_MARK};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use time::{OffsetDateTime, UtcOffset};
use tracing::Event;
use tracing::field::{Field, Visit};

/// A field of this name holds any number of fields whose names are only known at run time: name, unit separator (0x1f),
/// value; record separators (0x1e) in between.
const FIELDS: &str = "fields";

/// The parts of a line's look that do not change.
pub(super) struct Style {
    pub(super) format: Format,
    pub(super) source_location: bool,
    pub(super) offset: UtcOffset,
}

/// Gathers the fields of an event; the message apart.
#[derive(Default)]
struct Fields {
    message: String,
    others: BTreeMap<Cow<'static, str>, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("message", other) => self.message = other.to_string(),
            (FIELDS, Value::String(text)) => {
                for pair in text.split('\u{1e}') {
                    if let Some((name, value)) = pair.split_once('\u{1f}') {
                        self.add(Cow::Owned(name.to_owned()), value.into());
                    }
                }
            }
            (name, value) => self.add(Cow::Borrowed(name), value),
        }
    }

    /// The names of the fixed parts are taken; logrus moves such fields aside.
    fn add(&mut self, name: Cow<'static, str>, value: Value) {
        let taken = matches!(&*name, "msg" | "level" | "time");
        self.others.insert(if taken { Cow::Owned(format!("fields.{name}")) } else { name }, value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::String(value.to_owned()));
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, Value::String(value.to_string()));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        // Whole numbers without a fraction, as Go writes them.
        let whole = value.fract() == 0.0 && value.abs() < 9e15;
        self.put(field, if whole { (value as i64).into() } else { value.into() });
    }
}

impl Style {
    /// The line of `event`, with its line end.
    pub(super) fn line(&self, event: &Event<'_>, now_ms: i64) -> String {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        if self.source_location {
            if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
                let name = file.rsplit('/').next().unwrap_or(file);
                fields.others.insert("file".into(), format!("{name}:{line}").into());
            }
            fields.others.insert("func".into(), metadata.module_path().unwrap_or_default().into());
        }
        let level = match *metadata.level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warning",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        for value in fields.others.values_mut() {
            let Value::String(text) = value else { continue };
            if let Some(seconds) = text.strip_prefix(TIME_MARK).and_then(|s| s.parse().ok()) {
                *text = self.time_field(seconds);
            } else if let Some((json, plain)) =
                text.strip_prefix(LITERAL_MARK).and_then(|forms| forms.split_once(LITERAL_MARK))
            {
                *value = match self.format {
                    Format::Json => serde_json::from_str(json).unwrap_or_else(|_| plain.into()),
                    Format::Default | Format::Text => plain.into(),
                };
            }
        }
        let time = self.time(now_ms);
        match self.format {
            Format::Json => json_line(fields, level, time),
            Format::Default | Format::Text => text_line(&fields, level, &time),
        }
    }

    /// A time that is a field.
    fn time_field(&self, seconds: i64) -> String {
        if self.format == Format::Json {
            return self.time(seconds.saturating_mul(1000));
        }
        let t =
            OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH).to_offset(self.offset);
        let minutes = self.offset.whole_minutes();
        let (sign, hours, rest) = (if minutes < 0 { '-' } else { '+' }, minutes.abs() / 60, minutes.abs() % 60);
        // Go adds the zone's abbreviation; of zones other than UTC only the offset is known here, which Go then repeats.
        let zone = if minutes == 0 { "UTC".to_owned() } else { format!("{sign}{hours:02}{rest:02}") };
        let (hour, minute, second) = (t.hour(), t.minute(), t.second());
        format!("{} {hour:02}:{minute:02}:{second:02} {sign}{hours:02}{rest:02} {zone}", t.date())
    }

    /// RFC 3339; trailing zeros of a fraction are left out.
    fn time(&self, now_ms: i64) -> String {
        let seconds = now_ms.div_euclid(1000);
        let t =
            OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH).to_offset(self.offset);
        let mut out = String::with_capacity(32);
        let (date, hour, minute, second) = (t.date(), t.hour(), t.minute(), t.second());
        let _ = write!(out, "{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day());
        let _ = write!(out, "T{hour:02}:{minute:02}:{second:02}");
        let millis = now_ms.rem_euclid(1000);
        if self.format != Format::Default && millis != 0 {
            let fraction = format!("{millis:03}");
            let _ = write!(out, ".{}", fraction.trim_end_matches('0'));
        }
        let minutes = self.offset.whole_minutes();
        if minutes == 0 {
            out.push('Z');
        } else {
            let sign = if minutes < 0 { '-' } else { '+' };
            let _ = write!(out, "{sign}{:02}:{:02}", minutes.abs() / 60, minutes.abs() % 60);
        }
        out
    }
}

fn text_line(fields: &Fields, level: &str, time: &str) -> String {
    let mut out = format!("time=\"{time}\" level={level} msg=");
    text_value(&mut out, &fields.message);
    for (name, value) in &fields.others {
        let _ = write!(out, " {name}=");
        match value {
            Value::String(text) => text_value(&mut out, text),
            other => text_value(&mut out, &other.to_string()),
        }
    }
    out.push('\n');
    out
}

/// Bare when it is made of harmless characters only, else quoted as Go's `%q` does.
fn text_value(out: &mut String, text: &str) {
    let harmless = |b: u8| b.is_ascii_alphanumeric() || b"-._/@^+".contains(&b);
    if text.bytes().all(harmless) {
        out.push_str(text);
        return;
    }
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            // Marks that turn text around would let a client forge what a reader sees.
            c if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}') =>
            {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

fn json_line(mut fields: Fields, level: &'static str, time: String) -> String {
    fields.others.insert("level".into(), level.into());
    fields.others.insert("msg".into(), std::mem::take(&mut fields.message).into());
    fields.others.insert("time".into(), time.into());
    let plain = serde_json::to_string(&fields.others).unwrap_or_default();
    // Go's encoder writes these as escapes, so that a log line can stand in a web page.
    let mut out = String::with_capacity(plain.len() + 16);
    for c in plain.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('\n');
    out
}
