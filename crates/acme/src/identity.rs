//! What is presented to whom.

use crate::kept;
use finial_core::Clock;
use finial_crypto::tls::{KeyExchange, TlsIdentity, server_config_with};
use finial_net::tls::ALPN_ACME;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Error, ServerConfig};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a file is looked at for those who come with the authority's protocol: it comes as soon as the file is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Certificates by name. Who asks for another name, or none, gets no handshake.
pub struct AcmeIdentity {
    names: HashMap<String, Arc<Name>>,
    /// Others who share it may have an open challenge.
    dir: Option<PathBuf>,
}

/// One name.
#[derive(Default)]
pub(crate) struct Name {
    /// For clients.
    pub(crate) certificate: TlsIdentity,
    /// For the authority, while it asks.
    pub(crate) challenge: TlsIdentity,
    /// What another process would answer, and when that was looked at: whoever comes can have it looked at.
    elsewhere: Mutex<Option<(Instant, Option<Arc<TlsIdentity>>)>>,
}

impl Name {
    fn elsewhere(&self, dir: &Path, domain: &str) -> Option<Arc<TlsIdentity>> {
        let mut looked = self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        match &*looked {
            Some((at, found)) if at.elapsed() < LOOK_EVERY => found.clone(),
            _ => {
                let found = kept::token(dir, domain).map(Arc::new);
                *looked = Some((Instant::now(), found.clone()));
                found
            }
        }
    }
}

impl AcmeIdentity {
    pub(crate) fn new(domains: &[String], dir: Option<PathBuf>) -> Self {
        let names = domains.iter().map(|name| (name.to_ascii_lowercase(), Arc::default())).collect();
        Self { names, dir }
    }

    /// A server's configuration that presents it, to authorities too.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn server_config(self: Arc<Self>, exchange: KeyExchange, clock: Arc<dyn Clock>) -> Result<ServerConfig, Error> {
        let mut config = server_config_with(exchange, self, None, clock)?;
        config.alpn_protocols.push(ALPN_ACME.to_vec());
        Ok(config)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = (&String, &Arc<Name>)> {
        self.names.iter()
    }
}

impl std::fmt::Debug for AcmeIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names.keys()).finish()
    }
}

impl ResolvesServerCert for AcmeIdentity {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let domain = hello.server_name()?.to_ascii_lowercase();
        let name = self.names.get(&domain)?;
        // An authority offers that one protocol and nothing else.
        let is_authority = hello.alpn().is_some_and(|protocols| protocols.eq([ALPN_ACME]));
        if !is_authority {
            return ResolvesServerCert::resolve(&name.certificate, hello);
        }
        if rustls::client::ResolvesClientCert::has_certs(&name.challenge) {
            return ResolvesServerCert::resolve(&name.challenge, hello);
        }
        ResolvesServerCert::resolve(&*name.elsewhere(self.dir.as_deref()?, &domain)?, hello)
    }
}
