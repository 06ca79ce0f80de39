//! `plugins { }`: what is to be loaded, in the order it was written.

use finial_hcl::{Pos, Value};
use std::path::PathBuf;

/// One plugin as configured.
#[derive(Clone, Debug)]
pub struct PluginConfig {
    /// The kind: `KeyManager`, `NodeAttestor`, `DataStore`, `WorkloadAttestor`, …
    pub kind: String,
    /// The name, such as `disk`.
    pub name: String,
    /// `enabled`, default true.
    pub enabled: bool,
    /// Its own configuration.
    pub data: PluginData,
    /// `plugin_cmd`: the program of an external plugin; None: built in.
    pub command: Option<PathBuf>,
    /// `plugin_args`.
    pub args: Vec<String>,
    /// `plugin_checksum`: SHA-256 of the program, hex; empty: not checked.
    pub checksum: String,
    /// Where its block stands in the file; None if it comes from no file.
    pub pos: Option<Pos>,
}

/// Two are equal if they say the same; where they stand does not matter (a comment above moves them).
impl PartialEq for PluginConfig {
    fn eq(&self, other: &Self) -> bool {
        let Self { kind, name, enabled, data, command, args, checksum, pos: _ } = self;
        (kind, name, enabled, data) == (&other.kind, &other.name, &other.enabled, &other.data)
            && (command, args, checksum) == (&other.command, &other.args, &other.checksum)
    }
}

/// Where a plugin's own configuration comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum PluginData {
    /// `plugin_data`, or an empty object if there is none.
    Inline(Value),
    /// `plugin_data_file`: HCL or JSON, read again on SIGUSR1.
    File(PathBuf),
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            kind: String::new(),
            name: String::new(),
            enabled: true,
            data: PluginData::Inline(Value::empty()),
            command: None,
            args: Vec::new(),
            checksum: String::new(),
            pos: None,
        }
    }
}

/// A `plugin_data_file` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PluginDataError {
    /// It cannot be read.
    #[error("unable to read plugin data file {path:?}: {error}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is not HCL.
    #[error("unable to decode plugin data file {path:?}: {error}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: finial_hcl::Error,
    },
}

impl PluginConfig {
    /// A built-in plugin with inline data, for code and tests that make settings without a file.
    pub fn inline(kind: &str, name: &str, data: Value) -> Self {
        Self { kind: kind.into(), name: name.into(), data: PluginData::Inline(data), ..Self::default() }
    }

    /// The plugin's own configuration as text, for external plugins; None if there is none. Reads the file of
    /// [`PluginData::File`], whatever it holds.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load_text(&self) -> Result<Option<String>, PluginDataError> {
        match &self.data {
            PluginData::Inline(value) => Ok(Some(value.to_hcl()).filter(|text| !text.is_empty())),
            PluginData::File(path) => std::fs::read_to_string(path)
                .map(Some)
                .map_err(|error| PluginDataError::Read { path: path.clone(), error }),
        }
    }

    /// The plugin's own configuration; reads the file of [`PluginData::File`].
    ///
    /// # Errors
    /// The file cannot be read or is not HCL.
    pub fn load_data(&self) -> Result<Value, PluginDataError> {
        match &self.data {
            PluginData::Inline(value) => Ok(value.clone()),
            PluginData::File(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| PluginDataError::Read { path: path.clone(), error })?;
                finial_hcl::parse(&text).map_err(|error| PluginDataError::Parse { path: path.clone(), error })
            }
        }
    }
}
