//! What a plugin writes becomes lines of our log. Plugins made with SPIRE's SDK write hclog's JSON to their standard error;
//! anything else is passed on as it is, at the level that its beginning tells.

use finial_runtime::log::{FIELD_MARKS, literal};
use serde_json::Value;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;

/// Longer lines are cut.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// A plugin may write this many lines in a second; what is more is counted only.
const LINES_PER_SECOND: u32 = 1000;

/// Reads lines, each cut at [`LINE_BYTES_MAX`], until there are no more or the reader fails.
pub(crate) async fn lines(reader: &mut (impl AsyncRead + Unpin), mut each: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 8 * 1024];
    let mut splitter = Splitter::default();
    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
        splitter.take(buffer.get(..count).unwrap_or_default(), &mut each);
    }
    splitter.finish(&mut each);
}

/// Makes lines of pieces.
#[derive(Default)]
pub(crate) struct Splitter(Vec<u8>);

impl Splitter {
    pub(crate) fn take(&mut self, piece: &[u8], each: &mut impl FnMut(&[u8])) {
        for part in piece.split_inclusive(|b| *b == b'\n') {
            let room = LINE_BYTES_MAX.saturating_sub(self.0.len());
            self.0.extend(part.iter().take(room));
            if part.ends_with(b"\n") {
                self.finish(each);
            }
        }
    }

    pub(crate) fn finish(&mut self, each: &mut impl FnMut(&[u8])) {
        let line = self.0.trim_ascii_end();
        if !line.is_empty() {
            each(line);
        }
        self.0.clear();
    }
}

/// The log of one plugin.
pub(crate) struct PluginLog {
    name: String,
    kind: String,
    subsystem: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A panic is being told, which takes many lines.
    panics: bool,
    last: String,
    second: Option<Instant>,
    lines: u32,
}

/// An entry to be written.
#[derive(Debug, PartialEq)]
struct Entry {
    level: tracing::Level,
    message: String,
    fields: String,
}

impl PluginLog {
    /// For the plugin of that name and kind, whose program is called `program`.
    pub(crate) fn new(name: &str, kind: &str, program: &str) -> Self {
        Self { name: name.into(), kind: kind.into(), subsystem: format!("{name}.{program}"), state: Mutex::default() }
    }

    /// What it wrote last; of a panic, the first line.
    pub(crate) fn last(&self) -> String {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).last.clone()
    }

    /// Takes a line.
    pub(crate) fn line(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let (entry, dropped) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let panicked = state.panics;
            let entry = json_entry(&text).unwrap_or_else(|| plain_entry(&text, &mut state.panics));
            if !panicked {
                state.last = entry.message.chars().take(500).collect();
            }
            let now = Instant::now();
            if state.second.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
                let dropped = state.lines.saturating_sub(LINES_PER_SECOND);
                (state.second, state.lines) = (Some(now), 1);
                (entry, dropped)
            } else {
                state.lines = state.lines.saturating_add(1);
                if state.lines > LINES_PER_SECOND {
                    return;
                }
                (entry, 0)
            }
        };
        if dropped > 0 {
            let message = format!("The plugin writes too much: {dropped} lines were left out of the log");
            self.write(&Entry { level: tracing::Level::WARN, message, fields: String::new() });
        }
        self.write(&entry);
    }

    fn write(&self, entry: &Entry) {
        macro_rules! at {
            ($level:ident) => {
                tracing::$level!(
                    subsystem_name = self.subsystem,
                    external = true,
                    plugin_name = self.name,
                    plugin_type = self.kind,
                    fields = entry.fields,
                    "{}",
                    entry.message
                )
            };
        }
        match entry.level {
            tracing::Level::ERROR => at!(error),
            tracing::Level::WARN => at!(warn),
            tracing::Level::INFO => at!(info),
            tracing::Level::DEBUG => at!(debug),
            tracing::Level::TRACE => at!(trace),
        }
    }
}

/// hclog's form, if it is that.
fn json_entry(text: &str) -> Option<Entry> {
    let Ok(Value::Object(mut entry)) = serde_json::from_str(text) else { return None };
    let level = match entry.remove("@level")?.as_str()? {
        "error" => tracing::Level::ERROR,
        "warn" => tracing::Level::WARN,
        "info" => tracing::Level::INFO,
        "debug" => tracing::Level::DEBUG,
        "trace" => tracing::Level::TRACE,
        _ => return None,
    };
    let message = entry.remove("@message").and_then(|m| Some(m.as_str()?.to_owned())).unwrap_or_default();
    if let Some(time) = entry.remove("@timestamp") {
        entry.insert("timestamp".into(), time);
    }
    let mut fields = String::new();
    // What tells whose line it is stays ours.
    let taken = ["subsystem_name", "external", "plugin_name", "plugin_type"];
    for (name, value) in entry.iter().filter(|(name, _)| !taken.contains(&name.as_str())) {
        let shown = match value {
            Value::String(text) => text.replace(FIELD_MARKS, " "),
            other => literal(other, other).replace(['\u{1e}', '\u{1f}'], " "),
        };
        let separator = if fields.is_empty() { "" } else { "\u{1e}" };
        let _ = write!(fields, "{separator}{}\u{1f}{shown}", name.replace(FIELD_MARKS, " "));
    }
    Some(Entry { level, message, fields })
}

fn plain_entry(text: &str, panics: &mut bool) -> Entry {
    let begins = |with: &str| text.starts_with(with);
    *panics |= begins("panic: ") || begins("fatal error: ");
    let level = match () {
        () if *panics || begins("[ERROR]") => tracing::Level::ERROR,
        () if begins("[WARN]") => tracing::Level::WARN,
        () if begins("[INFO]") => tracing::Level::INFO,
        () if begins("[TRACE]") => tracing::Level::TRACE,
        () => tracing::Level::DEBUG,
    };
    Entry { level, message: text.to_owned(), fields: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hclog_lines_keep_level_message_and_fields() {
        let line = r#"{"@level":"warn","@message":"hm","@module":"m","@timestamp":"2026-01-01T00:00:00.000000Z","n":2,"s":"a\u001fb\u001e","plugin_name":"another"}"#;
        let entry = json_entry(line).unwrap();
        assert_eq!((entry.level, entry.message.as_str()), (tracing::Level::WARN, "hm"));
        let fields: Vec<&str> = entry.fields.split('\u{1e}').collect();
        let number = format!("n\u{1f}{}", literal(2, 2));
        let time = "timestamp\u{1f}2026-01-01T00:00:00.000000Z";
        assert_eq!(fields.len(), 4, "{fields:?}");
        for field in ["@module\u{1f}m", &number, "s\u{1f}a b ", time] {
            assert!(fields.contains(&field), "{field:?} in {fields:?}");
        }
        for other in ["{}", "[]", "5", "{\"@level\":7}", "{\"a\":1}", "{\"@level\":\"loud\"}"] {
            assert_eq!(json_entry(other), None, "{other}");
        }
    }

    #[test]
    fn other_lines_say_their_level_and_a_panic_goes_on_to_the_end() {
        let mut panics = false;
        let mut level = |text| plain_entry(text, &mut panics).level;
        assert_eq!(level("[WARN] x"), tracing::Level::WARN);
        assert_eq!(level("hello"), tracing::Level::DEBUG);
        assert_eq!(level("panic: x"), tracing::Level::ERROR);
        assert_eq!(level("goroutine 1:"), tracing::Level::ERROR);
    }

    #[tokio::test]
    async fn lines_are_split_and_cut() {
        let long = "x".repeat(3 * LINE_BYTES_MAX);
        let text = format!("a\r\n\n{long}\nlast");
        let mut seen = Vec::new();
        lines(&mut text.as_bytes(), |line| seen.push(line.to_vec())).await;
        assert_eq!(seen.len(), 3);
        assert_eq!((&seen[0][..], seen[1].len(), &seen[2][..]), (&b"a"[..], LINE_BYTES_MAX, &b"last"[..]));
    }
}
