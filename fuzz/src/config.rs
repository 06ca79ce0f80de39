//! Configuration text from outside.

/// HCL or JSON.
pub fn hcl(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = finial_hcl::parse(text) {
        assert!(!error.to_string().is_empty());
    }
}
