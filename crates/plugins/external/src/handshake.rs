//! The one line that a plugin writes first: `1|1|unix|/path|grpc`, core version, version, network, address, protocol; a
//! certificate and whether connections share a socket may follow, of which SPIRE asks for neither.

use std::net::SocketAddr;
use std::path::PathBuf;

/// The version of go-plugin's own protocol.
const CORE_VERSION: &str = "1";
/// The version that SPIRE's plugins speak.
pub(crate) const VERSION: &str = "1";

/// Where a plugin listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// Reads the line.
///
/// # Errors
/// It is not such a line, or of another version or protocol; the texts are go-plugin's where it has one.
pub(crate) fn parse(line: &str) -> Result<Address, String> {
    let line = line.trim();
    let mut parts = line.split('|');
    let (Some(core), Some(version), Some(network), Some(address)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        let shown: String = line.chars().take(200).collect();
        return Err(format!(
            "Unrecognized remote plugin message: {shown:?}. This usually means that the program is not a SPIRE plugin, \
             or writes to its standard output before it serves"
        ));
    };
    if core != CORE_VERSION {
        return Err(format!(
            "incompatible core API version with plugin. Plugin version: {core}, Core version: {CORE_VERSION}; build the \
             plugin again with a go-plugin of this version"
        ));
    }
    if version != VERSION {
        return Err(format!("incompatible API version with plugin. Plugin version: {version}, Client versions: [1]"));
    }
    match parts.next().unwrap_or("netrpc") {
        "grpc" => {}
        other => return Err(format!("unsupported plugin protocol {other:?}. Supported: [grpc]")),
    }
    if parts.next().is_some_and(|certificate| !certificate.is_empty()) {
        return Err("the plugin wants TLS, which SPIRE's plugins do not use".into());
    }
    match network {
        "unix" if address.starts_with('/') => Ok(Address::Unix(address.into())),
        "unix" => Err(format!("the plugin listens on {address:?}, which is no absolute path")),
        "tcp" => match address.parse::<SocketAddr>() {
            // What goes over it is not encrypted.
            Ok(at) if at.ip().is_loopback() => Ok(Address::Tcp(at)),
            Ok(at) => Err(format!("the plugin listens on {at}, which is not of this machine alone")),
            Err(error) => Err(format!("the plugin listens on {address:?}: {error}")),
        },
        other => Err(format!("unknown address type: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_line_says_where_the_plugin_listens() {
        assert_eq!(parse("1|1|unix|/tmp/plugin1|grpc"), Ok(Address::Unix("/tmp/plugin1".into())));
        assert_eq!(parse(" 1|1|unix|/tmp/plugin1|grpc|\r\n"), Ok(Address::Unix("/tmp/plugin1".into())));
        assert_eq!(parse("1|1|tcp|127.0.0.1:7|grpc||false"), Ok(Address::Tcp("127.0.0.1:7".parse().unwrap())));
        for (line, why) in [
            ("", "Unrecognized remote plugin message"),
            ("Listening...", "Unrecognized remote plugin message: \"Listening...\""),
            ("2|1|unix|/x|grpc", "incompatible core API version"),
            ("1|2|unix|/x|grpc", "incompatible API version"),
            ("1|1|unix|/x", "unsupported plugin protocol \"netrpc\""),
            ("1|1|unix|x|grpc", "no absolute path"),
            ("1|1|pipe|/x|grpc", "unknown address type: pipe"),
            ("1|1|tcp|example.org:1|grpc", "example.org"),
            ("1|1|tcp|10.0.0.1:1|grpc", "not of this machine"),
            ("1|1|unix|/x|grpc|MIIB", "TLS"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
        assert!(parse(&"x".repeat(100_000)).unwrap_err().len() < 500);
    }

    proptest! {
        #[test]
        fn garbage_does_no_harm(line in "(1\\|){0,3}.{0,40}") {
            let _ = parse(&line);
        }
    }
}
