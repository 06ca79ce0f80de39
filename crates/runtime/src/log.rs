//! Logs in the two forms SPIRE writes: text (`time=… level=info msg=… key=value`) and JSON.

use std::path::PathBuf;

/// Levels as SPIRE's Logger API names them.
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

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `key=value`, times to the second (SPIRE's form when nothing is configured).
    #[default]
    Default,
    /// `key=value`, times with fractions (`TEXT`).
    Text,
    /// One JSON object a line, times with fractions (`JSON`).
    Json,
}

/// Where and how to log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Events above this are dropped.
    pub level: Level,
    /// How lines look.
    pub format: Format,
    /// Appended to, created with mode 0640; none = standard output.
    pub file: Option<PathBuf>,
    /// Adds `file` and `func` to each line.
    pub source_location: bool,
}

/// Changes the log while it runs. Clones share one log.
#[derive(Clone, Debug)]
pub struct LogHandle(());

/// Installs the log for the whole process; call it once, before threads start (it asks for the local time zone).
///
/// # Errors
/// When the file cannot be opened, or a log is installed already.
pub fn init(_settings: &Settings) -> std::io::Result<LogHandle> {
    todo!()
}

impl LogHandle {
    /// The level now.
    pub fn level(&self) -> Level {
        todo!()
    }
    /// The level at start.
    pub fn launch_level(&self) -> Level {
        todo!()
    }
    /// Changes the level.
    pub fn set_level(&self, _level: Level) {
        todo!()
    }
    /// Closes and opens the log file again, after it was rotated away.
    ///
    /// # Errors
    /// When the file cannot be opened; the old one stays in use.
    pub fn reopen(&self) -> std::io::Result<()> {
        todo!()
    }
}
