//! Envoy's secret discovery service, version 3: [`discovery`] has the requests and answers, [`tls`] the secrets in them,
//! [`secret`] the service.

use bytes::Bytes;
use prost::{Message, Name};
use std::fmt;
use zeroize::Zeroizing;

generated!(
    /// Who asks, and where bytes come from.
    core, "envoy_core"
);
generated!(
    /// Version numbers.
    types, "envoy_type"
);
generated!(
    /// Requests and answers.
    discovery, "envoy_discovery"
);
generated!(
    /// Secrets.
    tls, "envoy_tls"
);

/// The service.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
pub mod secret {
    include!("gen/envoy_secret.rs");
    /// The server half, whose answers are [`crate::encoded::Encoded`].
    pub mod server {
        include!("gen/envoy_secret_server.rs");
        pub use secret_discovery_service_server::{SecretDiscoveryService, SecretDiscoveryServiceServer};
    }
}

/// A message of any kind (`google.protobuf.Any`), whose bytes are wiped when the last clone goes if it was made by
/// [`Any::secret`].
#[derive(Clone, PartialEq, Eq, Hash, Message)]
#[prost(skip_debug)]
pub struct Any {
    /// Which message: `type.googleapis.com/` and its full name.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message, encoded.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Only the length: the bytes may hold a private key.
impl fmt::Debug for Any {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Any({}, {} bytes)", self.type_url, self.value.len())
    }
}

impl Any {
    /// Holds `message`.
    pub fn new<T: Name>(message: &T) -> Self {
        Self { type_url: T::type_url(), value: message.encode_to_vec().into() }
    }

    /// Holds `message`, in which there are secrets.
    pub fn secret<T: Name>(message: &T) -> Self {
        let bytes = Zeroizing::new(message.encode_to_vec());
        Self { type_url: T::type_url(), value: Bytes::from_owner(bytes) }
    }

    /// What it holds; `None` if that is not a `T`.
    pub fn open<T: Name + Default>(&self) -> Option<T> {
        (self.type_url == T::type_url()).then(|| T::decode(self.value.clone()).ok())?
    }
}

/// Gives a message its name, as in the contract.
macro_rules! named {
    ($package:literal: $($message:ty => $name:literal),* $(,)?) => {$(
        impl Name for $message {
            const NAME: &'static str = $name;
            const PACKAGE: &'static str = $package;

            fn type_url() -> String {
                concat!("type.googleapis.com/", $package, ".", $name).to_owned()
            }
        }
    )*};
}

named! {
    "envoy.extensions.transport_sockets.tls.v3":
    tls::Secret => "Secret",
    tls::CertificateValidationContext => "CertificateValidationContext",
    tls::SpiffeCertValidatorConfig => "SPIFFECertValidatorConfig",
}

impl core::DataSource {
    /// These bytes themselves.
    pub fn inline(bytes: Bytes) -> Self {
        Self { specifier: Some(core::data_source::Specifier::InlineBytes(bytes)) }
    }

    /// The bytes in it; none if they are elsewhere.
    pub fn bytes(&self) -> &[u8] {
        match &self.specifier {
            Some(core::data_source::Specifier::InlineBytes(bytes)) => bytes,
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_comes_out_as_it_went_in_and_is_not_printed() {
        let certificate = tls::TlsCertificate {
            certificate_chain: None,
            private_key: Some(core::DataSource::inline(Bytes::from_static(b"sesame"))),
        };
        let r#type = Some(tls::secret::Type::TlsCertificate(certificate));
        let secret = tls::Secret { name: "default".into(), r#type };
        let any = Any::secret(&secret);
        assert_eq!(any.type_url, "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret");
        assert_eq!(any.open::<tls::Secret>().as_ref(), Some(&secret));
        assert_eq!(any.open::<tls::CertificateValidationContext>(), None);
        let answer = discovery::DiscoveryResponse { resources: vec![any], ..Default::default() };
        let bytes = format!("{:?}", b"sesame".as_slice());
        for text in [format!("{secret:?}"), format!("{answer:?}")] {
            assert!(!text.contains("sesame") && !text.contains(&bytes), "{text}");
        }
    }
}
