//! Who is at the other end of a connection, found out once when it opens and shared by all its calls.

use finial_core::{SpiffeId, UnixSeconds};
use finial_crypto::Certificate;
use finial_proto::digest::of_bytes;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

/// What tonic hands to each call of a connection.
pub type Connection = Arc<Peer>;

/// The other end.
#[derive(Debug)]
pub enum Peer {
    /// A process on this machine, on the local socket.
    Local(LocalProcess),
    /// Someone over TCP and TLS.
    Remote {
        /// From where.
        address: SocketAddr,
        /// As whom.
        identity: Identity,
    },
}

/// A local caller, as the audit log names it.
#[derive(Debug, Default)]
pub struct LocalProcess {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Its program, when it could be read (only looked up for the audit log and the policy).
    pub path: Option<PathBuf>,
}

/// What the verified client certificate says.
#[derive(Debug)]
pub enum Identity {
    /// There was none.
    None,
    /// An X.509-SVID, verified in the handshake.
    Svid {
        /// The one URI SAN.
        id: SpiffeId,
        /// Serial number, decimal.
        serial: String,
        /// When it ends.
        not_after: UnixSeconds,
        /// The serial numbers that an agent's SVID says it follows; mostly none. See [`crate::issue::follows`].
        follows: Box<[Box<str>]>,
        /// The digest of the ID of the authority that signed it; 0 if it does not say.
        issuer: u64,
    },
    /// A certificate that names nobody; the text says why.
    Unusable(String),
}

impl Identity {
    /// Reads a leaf certificate that the TLS handshake has verified.
    pub fn of_leaf(der: &[u8]) -> Self {
        let certificate = match Certificate::parse(der) {
            Ok(certificate) => certificate,
            Err(error) => return Self::Unusable(format!("client certificate is malformed: {error}")),
        };
        let uri = match certificate.uri_sans() {
            [] => return Self::Unusable("client certificate has no URI SAN".into()),
            [uri] => uri,
            _ => return Self::Unusable("client certificate has more than one URI SAN".into()),
        };
        match SpiffeId::parse(uri) {
            Ok(id) => Self::Svid {
                serial: certificate.serial_decimal(),
                not_after: certificate.not_after(),
                issuer: certificate.authority_key_id().map_or(0, |id| of_bytes(finial_crypto::hex(id).as_bytes())),
                follows: if id.is_agent() { crate::issue::follows(&certificate) } else { Box::default() },
                id,
            },
            Err(error) => Self::Unusable(format!("client certificate has a malformed URI SAN: {error}")),
        }
    }
}

impl Peer {
    /// Whether it came through the local socket.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Its SPIFFE ID.
    pub fn id(&self) -> Option<&SpiffeId> {
        match self {
            Self::Remote { identity: Identity::Svid { id, .. }, .. } => Some(id),
            _ => None,
        }
    }

    /// An agent, with the digest of the ID of the authority that signed its SVID.
    pub(crate) fn agent(&self) -> Option<(&SpiffeId, u64)> {
        match self {
            Self::Remote { identity: Identity::Svid { id, issuer, .. }, .. } if id.is_agent() => Some((id, *issuer)),
            _ => None,
        }
    }

    /// Its address, by which calls are limited.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Remote { address, .. } => Some(address.ip()),
            Self::Local(_) => None,
        }
    }
}
