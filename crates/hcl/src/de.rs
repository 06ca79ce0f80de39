//! Values into Rust types through serde.

use crate::value::{Pos, Value};
use serde::de::DeserializeOwned;

/// Why a text could not be read, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("At {pos}: {message}")]
pub struct Error {
    /// Where.
    pub pos: Pos,
    /// Why, without the place.
    pub message: String,
}

/// A key that the target type does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    /// The keys that lead to the object that holds it; empty at the top.
    pub section: Vec<String>,
    /// The key.
    pub key: String,
    /// Where it stands.
    pub pos: Pos,
}

impl Value {
    /// This value as `T`. Unknown keys are ignored.
    ///
    /// # Errors
    /// A value has a type that cannot be taken for what `T` wants; the error names line and column.
    pub fn parse_into<T: DeserializeOwned>(&self) -> Result<T, Error> {
        self.parse_reporting().map(|(value, _)| value)
    }

    /// As [`Self::parse_into`], and the keys that `T` does not know.
    ///
    /// # Errors
    /// As [`Self::parse_into`].
    pub fn parse_reporting<T: DeserializeOwned>(&self) -> Result<(T, Vec<Unused>), Error> {
        todo!()
    }
}

/// The value as `T`: see [`Value::parse_into`].
///
/// # Errors
/// As [`Value::parse_into`].
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Error> {
    value.parse_into()
}
