//! What is wrong with a file: all of it at once, each with its place and what to do.

use crate::{AgentSettings, LogSettings, PluginConfig, ServerSettings};
use finial_core::TrustDomain;
use finial_hcl::{Pos, Value};
use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What, in SPIRE's words where SPIRE has any.
    pub message: String,
    /// Where in the file; None if nothing stands there or a flag set it.
    pub pos: Option<Pos>,
    /// What to do.
    pub hint: Option<String>,
}

impl Problem {
    /// What, where in `file`, and what to do: a line each.
    pub fn text(&self, file: &Path) -> String {
        let mut text = self.message.clone();
        if let Some(pos) = self.pos {
            text.push_str(&format!("\n  at {}:{pos}", file.display()));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("\n  hint: {hint}"));
        }
        text
    }
}

/// A file that cannot be used. Prints every problem.
#[derive(Clone, Debug, Default)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong; never empty.
    pub problems: Vec<Problem>,
    /// What the log should say before the error.
    pub notices: Vec<Notice>,
    /// How to log it, as far as it is known.
    pub log: LogSettings,
    /// The plugins, as far as they could be read, so that what is wrong with them can be told as well; None if there
    /// are none to be read.
    pub plugins: Option<Vec<PluginConfig>>,
    /// The trust domain, if it could be read.
    pub trust_domain: Option<TrustDomain>,
    /// The settings, so that what is not supported of them can be told as well; None if the file could not be read.
    pub readable: Option<Readable>,
}

/// Settings of a file that cannot be used. What is wrong has its default, and the trust domain may be none of the file's.
#[derive(Clone, Debug)]
pub enum Readable {
    /// A server's.
    Server(Box<Loaded<ServerSettings>>),
    /// An agent's.
    Agent(Box<Loaded<AgentSettings>>),
    /// Another program's, of which all is supported.
    Other,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                write!(f, "\nalso: ")?;
            }
            f.write_str(&problem.text(&self.file))?;
        }
        Ok(())
    }
}

/// Something the log should say about a file that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A warning.
    Warn(String),
    /// A warning with `alert=true alert_type=deprecated_config`.
    Deprecated(String),
    /// An information.
    Info(String),
    /// An error, `Unknown configuration detected`, with these fields.
    Unknown {
        /// Field `section`.
        section: String,
        /// Field `keys`: sorted, joined by `,`.
        keys: String,
    },
}

/// Settings and what the log should say about them.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The settings.
    pub settings: T,
    /// What to log, in order.
    pub notices: Vec<Notice>,
    /// The file as it was read.
    pub(crate) root: Value,
}

impl<T> Loaded<T> {
    /// Something to be said of the key that `path` leads to, with its place if it is written in the file.
    pub fn problem(&self, path: &[&str], message: impl Into<String>, hint: &str) -> Problem {
        let hint = (!hint.is_empty()).then(|| hint.into());
        Problem { message: message.into(), pos: self.root.find_pos(path), hint }
    }
}
