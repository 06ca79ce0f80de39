//! The agent alone.
fn main() {}
