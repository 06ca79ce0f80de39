//! HCL version 1 and JSON, as Go's `hashicorp/hcl` v1 reads them: the language of SPIRE's configuration files.
//!
//! Use: [`parse`] gives a [`Value`] tree with positions; [`Value::parse_into`] turns it, or any part of it such as a
//! plugin's `plugin_data`, into your own `#[derive(Deserialize)]` struct with HCL's weak typing (`"8081"` is a number,
//! `1` is a text and a bool, one block is a list of one). Give structs `#[serde(default)]`: absent keys keep defaults.
//! Keys that the struct does not know are ignored by `parse_into` and listed by [`Value::parse_reporting`]. [`yaml`] reads YAML into the same tree.

mod de;
mod json;
mod lexer;
mod number;
mod parser;
mod print;
mod value;
pub mod yaml;

pub use de::{Error, Unused, from_value};
pub use value::{Item, Kind, Object, Pos, Value};

/// Reads HCL, or JSON if the first character that is not white space is `{`.
///
/// # Errors
/// The text is neither; the error names line and column.
pub fn parse(text: &str) -> Result<Value, Error> {
    if text.trim_start().starts_with('{') { json::parse_json(text) } else { parser::parse_hcl(text) }
}
