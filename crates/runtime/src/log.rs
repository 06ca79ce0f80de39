//! Logs in the forms SPIRE writes: text (`time=… level=info msg=… key=value`) and JSON, fields in order of their names.
//!
//! The front is `tracing`: `tracing::info!(subsystem_name = "endpoints", %address, "Starting Server APIs")`. Only events
//! count; spans are ignored, so that a log line costs nothing but itself. Of other crates' events only warnings and errors
//! are written. A field named `fields` may hold further fields whose names are only known at run time:
//! `name 0x1f value 0x1e name 0x1f value`.

mod format;

use finial_core::{Clock, SystemClock, UnixSeconds};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use time::UtcOffset;
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

/// Levels as SPIRE's Logger API names and orders them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Nothing of ours is that bad: silences the log.
    Panic = 0,
    /// The same.
    Fatal = 1,
    /// Something failed.
    Error = 2,
    /// Something is odd.
    Warning = 3,
    /// What happens.
    Info = 4,
    /// How it happens.
    Debug = 5,
    /// Every step.
    Trace = 6,
}

impl Level {
    /// All, from the gravest.
    pub const ALL: [Self; 7] =
        [Self::Panic, Self::Fatal, Self::Error, Self::Warning, Self::Info, Self::Debug, Self::Trace];

    /// The name that lines carry.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::Fatal => "fatal",
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    /// Parses a name in any case; `warn` is `warning`.
    pub fn parse(text: &str) -> Option<Self> {
        if text.eq_ignore_ascii_case("warn") {
            return Some(Self::Warning);
        }
        Self::ALL.into_iter().find(|level| level.as_str().eq_ignore_ascii_case(text))
    }

    fn of(stored: &AtomicU8) -> Self {
        let number = stored.load(Ordering::Relaxed);
        Self::ALL.into_iter().find(|level| *level as u8 == number).unwrap_or(Self::Info)
    }

    fn filter(self) -> LevelFilter {
        match self {
            Self::Panic | Self::Fatal => LevelFilter::OFF,
            Self::Error => LevelFilter::ERROR,
            Self::Warning => LevelFilter::WARN,
            Self::Info => LevelFilter::INFO,
            Self::Debug => LevelFilter::DEBUG,
            Self::Trace => LevelFilter::TRACE,
        }
    }
}

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `key=value`, times to the second: SPIRE's form when nothing is configured.
    #[default]
    Default,
    /// `key=value`, times with fractions (`TEXT`).
    Text,
    /// One JSON object a line, times with fractions (`JSON`).
    Json,
}

/// A point in time as a field: `tracing::info!(expiration = %log::Time(not_after), …)`. Text lines show it as Go prints times
/// (`2026-11-23 22:09:27 +0000 UTC`), JSON lines as RFC 3339, both in local time.
#[derive(Clone, Copy, Debug)]
pub struct Time(pub UnixSeconds);

/// Marks the text form for the formatter, which knows how times are to look.
const TIME_MARK: char = '\u{1d}';

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{TIME_MARK}{}", self.0)
    }
}

/// Marks a value with two forms.
const LITERAL_MARK: char = '\u{1c}';

/// What no text from outside may contain in a field named at run time: it would make fields, or forms, of its own.
pub const FIELD_MARKS: [char; 4] = [LITERAL_MARK, TIME_MARK, '\u{1e}', '\u{1f}'];

/// A number, a boolean or another JSON value as the value of a field named at run time, with the form that text lines show.
pub fn literal(json: impl std::fmt::Display, text: impl std::fmt::Display) -> String {
    format!("{LITERAL_MARK}{json}{LITERAL_MARK}{text}")
}

/// Where and how to log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Events below this are dropped.
    pub level: Level,
    /// How lines look.
    pub format: Format,
    /// Appended to, created with mode 0640; none = standard output.
    pub file: Option<PathBuf>,
    /// Adds `file` and `func` to each line.
    pub source_location: bool,
}

enum Sink {
    Stdout,
    File(PathBuf, Mutex<File>),
    Writer(Mutex<Box<dyn Write + Send>>),
}

struct Shared {
    level: AtomicU8,
    launch: AtomicU8,
    sink: Sink,
}

/// Changes the log while it runs. Clones share one log.
#[derive(Clone)]
pub struct LogHandle(Arc<Shared>);

impl LogHandle {
    /// The level now.
    pub fn level(&self) -> Level {
        Level::of(&self.0.level)
    }

    /// The level at start, or of the last reload.
    pub fn launch_level(&self) -> Level {
        Level::of(&self.0.launch)
    }

    /// Changes the level as if the program had started with it.
    pub fn relaunch(&self, level: Level) {
        self.0.launch.store(level as u8, Ordering::Relaxed);
        self.set_level(level);
    }

    /// Changes the level, for all that follows.
    pub fn set_level(&self, level: Level) {
        self.0.level.store(level as u8, Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    /// Closes and opens the log file again, after it was rotated away.
    ///
    /// # Errors
    /// When the file cannot be opened; the old one stays in use.
    pub fn reopen(&self) -> io::Result<()> {
        if let Sink::File(path, file) = &self.0.sink {
            *file.lock().unwrap_or_else(PoisonError::into_inner) = open(path)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LogHandle").field(&self.level()).finish()
    }
}

fn open(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// Installs the log for the whole process. Call it once, and before threads start, as it asks for the local time zone.
///
/// # Errors
/// When the file cannot be opened, or a log is installed already.
pub fn init(settings: &Settings) -> io::Result<LogHandle> {
    let sink = match &settings.file {
        Some(path) => Sink::File(path.clone(), Mutex::new(open(path)?)),
        None => Sink::Stdout,
    };
    let (subscriber, handle) = build(settings, sink, Arc::new(SystemClock));
    tracing::subscriber::set_global_default(subscriber).map_err(io::Error::other)?;
    log_panics();
    Ok(handle)
}

/// Panics are bugs; they go where the rest goes, besides standard error.
fn log_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload();
        let said = said.downcast_ref::<&str>().copied().or_else(|| said.downcast_ref::<String>().map(String::as_str));
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(error = said.unwrap_or("no message"), place, "Panicked");
        default(info);
    }));
}

/// The same log into `writer` and with a given clock, not installed: for tests and `tracing::subscriber::with_default`.
pub fn with_writer(
    settings: &Settings,
    writer: Box<dyn Write + Send>,
    clock: Arc<dyn Clock>,
) -> (impl Subscriber + Send + Sync, LogHandle) {
    build(settings, Sink::Writer(Mutex::new(writer)), clock)
}

fn build(settings: &Settings, sink: Sink, clock: Arc<dyn Clock>) -> (Log, LogHandle) {
    let shared = Arc::new(Shared {
        level: AtomicU8::new(settings.level as u8),
        launch: AtomicU8::new(settings.level as u8),
        sink,
    });
    let offset = UtcOffset::current_local_offset().unwrap_or(UtcOffset::UTC);
    let style = format::Style { format: settings.format, source_location: settings.source_location, offset };
    let handle = LogHandle(shared);
    (Log { handle: handle.clone(), style, clock }, handle)
}

struct Log {
    handle: LogHandle,
    style: format::Style,
    clock: Arc<dyn Clock>,
}

impl Log {
    /// Our own crates speak at all levels; libraries only when something is wrong.
    fn is_of_interest(metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && (metadata.target().starts_with("finial") || *metadata.level() <= tracing::Level::WARN)
    }
}

impl Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if Self::is_of_interest(metadata) && *metadata.level() <= self.handle.level().filter() {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        Self::is_of_interest(metadata) && *metadata.level() <= self.handle.level().filter()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.handle.level().filter())
    }

    fn event(&self, event: &Event<'_>) {
        let line = self.style.line(event, self.clock.now_ms());
        // A log that cannot be written has nowhere to say so.
        let _ = match &self.handle.0.sink {
            Sink::Stdout => io::stdout().lock().write_all(line.as_bytes()),
            Sink::File(_, file) => file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes()),
            Sink::Writer(writer) => writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes()),
        };
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::ManualClock;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panics").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn settings(format: Format) -> Settings {
        Settings { level: Level::Info, format, file: None, source_location: false }
    }

    fn logged(settings: &Settings, act: impl FnOnce(&LogHandle)) -> String {
        let buffer = Buffer::default();
        let clock = Arc::new(ManualClock::at(1_795_385_367));
        let (subscriber, handle) = with_writer(settings, Box::new(buffer.clone()), clock);
        tracing::subscriber::with_default(subscriber, || act(&handle));
        let bytes = buffer.0.lock().expect("no panics").clone();
        String::from_utf8(bytes).expect("log lines are UTF-8")
    }

    /// The expected lines follow those of SPIRE 1.15.3 (`Configured`, `Configured plugin`, `Successfully rotated X.509 CA`).
    #[test]
    fn lines_are_those_of_spire() {
        let act = |_: &LogHandle| {
            tracing::info!(version = "1.15.3", data_dir = "/tmp/data", admin_ids = "[]", "Configured");
            tracing::info!(reconfigurable = false, plugin_name = "disk", external = false, "Configured plugin");
            tracing::warn!(error = %"a \"b\"\n\u{1}é", ttl = 86399.5f64, port = 28988, msg = "x", "Odd <a>&b");
            tracing::debug!("not shown");
        };
        let text = logged(&settings(Format::Default), act);
        assert_eq!(
            text,
            concat!(
                "time=\"2026-11-22T22:09:27Z\" level=info msg=Configured admin_ids=\"[]\" data_dir=/tmp/data version=1.15.3\n",
                "time=\"2026-11-22T22:09:27Z\" level=info msg=\"Configured plugin\" external=false plugin_name=disk reconfigurable=false\n",
                "time=\"2026-11-22T22:09:27Z\" level=warning msg=\"Odd <a>&b\" error=\"a \\\"b\\\"\\n\\x01é\" fields.msg=x port=28988 ttl=86399.5\n",
            )
        );
        let json = logged(&settings(Format::Json), act);
        assert_eq!(
            json,
            concat!(
                r#"{"admin_ids":"[]","data_dir":"/tmp/data","level":"info","msg":"Configured","time":"2026-11-22T22:09:27Z","version":"1.15.3"}"#,
                "\n",
                r#"{"external":false,"level":"info","msg":"Configured plugin","plugin_name":"disk","reconfigurable":false,"time":"2026-11-22T22:09:27Z"}"#,
                "\n",
                r#"{"error":"a \"b\"\n\u0001é","fields.msg":"x","level":"warning","msg":"Odd \u003ca\u003e\u0026b","port":28988,"time":"2026-11-22T22:09:27Z","ttl":86399.5}"#,
                "\n",
            )
        );
    }

    #[test]
    fn times_look_as_go_prints_them() {
        let act = |_: &LogHandle| tracing::info!(expiration = %Time(1_795_471_767), "prepared");
        let text = logged(&settings(Format::Text), act);
        assert!(text.ends_with("expiration=\"2026-11-23 22:09:27 +0000 UTC\"\n"), "{text}");
        let json = logged(&settings(Format::Json), act);
        assert!(json.starts_with("{\"expiration\":\"2026-11-23T22:09:27Z\","), "{json}");
    }

    #[test]
    fn fields_may_be_named_at_run_time() {
        let fields = "spiffe_id\u{1f}spiffe://a/b\u{1e}level\u{1f}x\u{1e}empty\u{1f}";
        let text = logged(&settings(Format::Text), |_| tracing::info!(fields, r#type = "audit", "API accessed"));
        let expected = "msg=\"API accessed\" empty= fields.level=x spiffe_id=\"spiffe://a/b\" type=audit\n";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn fields_named_at_run_time_may_have_types() {
        let fields = format!("ttl\u{1f}{}\u{1e}status_code\u{1f}{}", literal(60, 60), literal(5, "NotFound"));
        let act = |_: &LogHandle| tracing::info!(fields, "API accessed");
        let text = logged(&settings(Format::Text), act);
        assert!(text.ends_with("msg=\"API accessed\" status_code=NotFound ttl=60\n"), "{text}");
        let json = logged(&settings(Format::Json), act);
        assert!(json.contains("\"status_code\":5,") && json.contains("\"ttl\":60}"), "{json}");
    }

    proptest::proptest! {
        /// Whatever a client sends into a log line: one line, and JSON gives it back as it was.
        #[test]
        fn no_text_breaks_out_of_its_line(text in ".{0,64}", raw in proptest::collection::vec(proptest::prelude::any::<char>(), 0..16)) {
            let text = text + &raw.into_iter().collect::<String>();
            let act = |_: &LogHandle| tracing::info!(spiffe_id = text, "message");
            let line = logged(&settings(Format::Text), act);
            proptest::prop_assert_eq!(line.matches('\n').count(), 1, "{}", line);
            proptest::prop_assert!(!line.trim_end_matches('\n').chars().any(char::is_control), "{}", line);
            let line = logged(&settings(Format::Json), act);
            let parsed: serde_json::Value = serde_json::from_str(&line).expect("is JSON");
            if !text.starts_with([TIME_MARK, LITERAL_MARK]) {
                proptest::prop_assert_eq!(parsed["spiffe_id"].as_str(), Some(text.as_str()));
            }
        }
    }

    #[test]
    fn the_level_changes_at_run_time_and_libraries_only_warn() {
        let text = logged(&settings(Format::Text), |handle| {
            tracing::debug!("one");
            handle.set_level(Level::Debug);
            tracing::debug!("two");
            tracing::debug!(target: "h2::codec", "three");
            tracing::error!(target: "h2::codec", "four");
            handle.set_level(Level::Fatal);
            tracing::error!("five");
            handle.set_level(handle.launch_level());
            tracing::info!("six");
            handle.relaunch(Level::Error);
            handle.set_level(Level::Debug);
            handle.set_level(handle.launch_level());
            tracing::info!("seven");
        });
        let words: Vec<_> = text.lines().filter_map(|l| l.rsplit_once("msg=")).map(|(_, w)| w).collect();
        assert_eq!(words, ["two", "four", "six"]);
    }

    #[test]
    fn the_source_is_named_when_asked() {
        let settings = Settings { source_location: true, ..settings(Format::Text) };
        let text = logged(&settings, |_| tracing::info!("here"));
        assert!(text.contains(" file=\"log.rs:"), "{text}");
        assert!(text.contains("func=\"finial_runtime::log::tests\""), "{text}");
    }

    #[test]
    fn a_rotated_file_is_opened_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let sink = Sink::File(path.clone(), Mutex::new(open(&path).expect("opens")));
        let (subscriber, handle) = build(&settings(Format::Text), sink, Arc::new(ManualClock::at(0)));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("first");
            std::fs::rename(&path, folder.path().join("log.1")).expect("rotates");
            tracing::info!("still the old one");
            handle.reopen().expect("reopens");
            tracing::info!("second");
        });
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("exists");
        assert_eq!(read("log.1").lines().count(), 2);
        assert!(read("log").contains("msg=second"));
    }

    #[test]
    fn levels_have_names() {
        for level in Level::ALL {
            assert_eq!(Level::parse(&level.as_str().to_uppercase()), Some(level));
        }
        assert_eq!(Level::parse("warn"), Some(Level::Warning));
        assert_eq!(Level::parse("loud"), None);
    }
}
