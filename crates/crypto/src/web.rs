//! TLS to servers of the web: verified by roots of the web and by name.

use crate::tls::{KeyExchange, Time};
use crate::x509::Certificate;
use finial_core::{Clock, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, VerifierBuilderError, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
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

/// Whether this is one of the roots itself, in its time, and for servers: who names a server's own certificate as a root means that
/// server, also if the certificate says that it is a CA's, as `openssl req -x509` makes it. Go sees it so.
pub fn is_root_itself(leaf: &CertificateDer<'_>, roots: &RootCertStore, now: UnixTime) -> bool {
    let (Ok(own), Ok(certificate)) = (webpki::anchor_from_trusted_cert(leaf), Certificate::parse(leaf.as_ref())) else {
        return false;
    };
    // Who has the key of a root may sign another certificate of its name anyway.
    let is_root = |root: &TrustAnchor<'_>| {
        root.subject == own.subject
            && root.subject_public_key_info == own.subject_public_key_info
            && root.name_constraints.is_none() // which only a chain is held against
    };
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let is_in_time = (certificate.not_before()..=certificate.not_after()).contains(&now);
    let purposes = certificate.extended_key_usage();
    let is_for_servers = !purposes.present || purposes.server_auth || purposes.any;
    is_in_time && is_for_servers && roots.roots.iter().any(is_root)
}

/// Verifies by roots and name, as rustls does; a root may be the server's own certificate.
#[derive(Debug)]
pub struct ByName {
    chains: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
}

impl ByName {
    /// By these roots.
    ///
    /// # Errors
    /// There are none.
    pub fn new(roots: RootCertStore, provider: Arc<CryptoProvider>) -> Result<Self, VerifierBuilderError> {
        let roots = Arc::new(roots);
        Ok(Self { chains: WebPkiServerVerifier::builder_with_provider(roots.clone(), provider).build()?, roots })
    }
}

impl ServerCertVerifier for ByName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.chains.verify_server_cert(leaf, intermediates, name, ocsp, now) {
            Err(Error::InvalidCertificate(CertificateError::Other(OtherError(cause))))
                if matches!(cause.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
                    && is_root_itself(leaf, &self.roots, now) =>
            {
                verify_server_name(&ParsedCertificate::try_from(leaf)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// A client's configuration for the web: TLS 1.2 and 1.3, no client certificate, no resumption, and no ALPN.
pub fn web_client_config(
    exchange: KeyExchange,
    roots: RootCertStore,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, Error> {
    let provider = exchange.provider();
    let inner = ByName::new(roots, provider.clone());
    let inner = inner.map_err(|e| Error::General(format!("this machine has no usable web roots: {e}")))?;
    let mut config = ClientConfig::builder_with_details(provider, Arc::new(Time(clock)))
        .with_protocol_versions(exchange.versions())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(WebVerifier(inner)))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Verifies as [`ByName`] does, and says so when the server is one that SPIFFE would verify.
#[derive(Debug)]
struct WebVerifier(ByName);

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
