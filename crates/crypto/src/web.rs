//! TLS to servers of the web: verified by roots of the web and by name.

use crate::tls::{KeyExchange, Time};
use crate::x509::Certificate;
use finial_core::{Clock, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;

/// A server that was to be verified by name shows an X509-SVID instead.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{cause}")]
pub struct NotWebButSpiffe {
    /// Whose SVID it is, if it is genuine: nothing was verified.
    pub claimed: SpiffeId,
    /// What the verification by name found.
    pub cause: Error,
}

impl NotWebButSpiffe {
    /// If that is why a handshake failed.
    pub fn of(error: &Error) -> Option<&Self> {
        match error {
            Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => cause.downcast_ref(),
            _ => None,
        }
    }
}

/// A client's configuration for the web: TLS 1.2 and 1.3, no client certificate, no resumption, and no ALPN.
pub fn web_client_config(
    exchange: KeyExchange,
    roots: RootCertStore,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, Error> {
    let provider = exchange.provider();
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let inner = inner.map_err(|e| Error::General(format!("this machine has no usable web roots: {e}")))?;
    let mut config = ClientConfig::builder_with_details(provider, Arc::new(Time(clock)))
        .with_protocol_versions(exchange.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(WebVerifier(inner)))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Verifies as rustls does, and says so when the server is one that SPIFFE would verify.
#[derive(Debug)]
struct WebVerifier(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for WebVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0.verify_server_cert(leaf, intermediates, name, ocsp, now).map_err(|cause| {
            let certificate = Certificate::parse(leaf.as_ref()).ok();
            let uri = certificate.as_ref().and_then(|c| c.uri_sans().first());
            match uri.and_then(|uri| SpiffeId::parse(uri).ok()) {
                Some(claimed) => {
                    let told = NotWebButSpiffe { claimed, cause };
                    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(told))))
                }
                None => cause,
            }
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
