//! Whom to trust as a server whose certificate is not SPIFFE's business.

use crate::https::system_roots;
use finial_core::Secret;
use finial_crypto::web::{ByName, is_root_itself};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::sync::Arc;
use webpki::{EndEntityCert, KeyUsage};

/// How a server's certificate is judged.
#[derive(Clone, PartialEq, Eq)]
pub enum Trust {
    /// Not at all.
    Anyone,
    /// Whoever has a certificate for servers of this CA (PEM), whatever its name.
    Issued(Vec<u8>),
    /// Who has one of this CA (PEM) for the name that we connect to.
    Named(Vec<u8>),
    /// Who has one for the name that we connect to, of a CA that this machine trusts for the web.
    System,
}

/// A client's certificate chain and key, both PEM.
pub struct Identity {
    /// The chain, its own certificate first.
    pub certificate: Vec<u8>,
    /// The key.
    pub key: Secret<Vec<u8>>,
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.key.expose() == other.key.expose()
    }
}

/// A configuration for HTTPS to what messages call `server`.
///
/// # Errors
/// The CA, the certificate or the key cannot be used.
pub fn client_config(trust: &Trust, identity: Option<&Identity>, server: &str) -> Result<ClientConfig, String> {
    let bad_ca = |e: &dyn std::fmt::Display| format!("unable to parse {server} CA: {e}");
    let roots = |pem| roots(pem).map_err(|e| bad_ca(&e));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
    let named = |roots: RootCertStore| ByName::new(roots, provider.clone()).map(Arc::new).map_err(|e| bad_ca(&e));
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::Named(pem) => named(roots(pem)?)?,
        Trust::System => match system_roots() {
            // Nobody is trusted then, and who is asked without TLS is none the worse.
            none if none.is_empty() => {
                tracing::warn!("This machine has no usable web roots: no {server} can be trusted");
                Arc::new(Unnamed { roots: Some(none), provider })
            }
            roots => named(roots)?,
        },
        Trust::Issued(pem) => Arc::new(Unnamed { roots: Some(roots(pem)?), provider }),
        Trust::Anyone => Arc::new(Unnamed { roots: None, provider }),
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let Some(identity) = identity else { return Ok(builder.with_no_client_auth()) };
    let bad = |e: &dyn std::fmt::Display| format!("unable to load keypair: {e}");
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(&identity.certificate).collect::<Result<_, _>>().map_err(|e| bad(&e))?;
    if chain.is_empty() {
        return Err(bad(&"no certificate in the PEM data"));
    }
    let key = PrivateKeyDer::from_pem_slice(identity.key.expose()).map_err(|e| bad(&e))?;
    builder.with_client_auth_cert(chain, key).map_err(|e| bad(&e))
}

/// The certificates in this PEM text.
pub(crate) fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        roots.add(certificate.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    }
    if roots.is_empty() {
        return Err("no PEM blocks".to_owned());
    }
    Ok(roots)
}

/// Judges by the roots alone; without roots, nothing but that the peer has the key.
#[derive(Debug)]
struct Unnamed {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unnamed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(roots) = &self.roots {
            let certificate = EndEntityCert::try_from(end_entity).map_err(refuse)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            let usage = KeyUsage::server_auth();
            match certificate.verify_for_usage(algorithms, &roots.roots, intermediates, now, usage, None, None) {
                Err(webpki::Error::CaUsedAsEndEntity) if is_root_itself(end_entity, roots, now) => {}
                verified => drop(verified.map_err(refuse)?),
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn refuse(error: webpki::Error) -> Error {
    Error::InvalidCertificate(match error {
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}
