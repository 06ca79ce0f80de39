//! Bytes from whoever connects.

/// The header of the PROXY protocol.
pub fn proxy_header(data: &[u8]) {
    if let Err(error) = finial_net::proxy::parse_header(data) {
        assert!(!error.to_string().is_empty());
    }
}
