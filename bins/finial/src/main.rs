//! Finial.
fn main() {}
