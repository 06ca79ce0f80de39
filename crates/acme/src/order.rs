//! One order: account, challenge, certificate.

use crate::error::{ACCOUNT, AcmeError, problem_text};
use crate::http::Door;
use crate::identity::Name;
use crate::kept::{Held, Kept};
use crate::{AcmeSettings, DIRECTORY_DEFAULT};
use finial_core::Clock;
use finial_crypto::tls::KeyExchange;
use finial_crypto::web::web_client_config;
use finial_crypto::{PrivateKey, acme_challenge_certificate, create_csr, pem};
use finial_net::https::system_roots;
use finial_runtime::Spawner;
use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, Key, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;
use std::time::Duration;

/// How long an authority may think.
const PATIENCE: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(200)).timeout(Duration::from_secs(90));
/// Longest time for an order as a whole.
const ORDER_TIME: Duration = Duration::from_secs(300);

/// Asks an authority.
pub(crate) struct Buyer {
    pub(crate) settings: AcmeSettings,
    pub(crate) kept: Kept,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) spawner: Spawner,
}

impl Buyer {
    pub(crate) fn directory(&self) -> &str {
        let url = self.settings.directory_url.as_str();
        if url.is_empty() { DIRECTORY_DEFAULT } else { url }
    }

    fn failed(&self, error: instant_acme::Error, what: &str) -> AcmeError {
        AcmeError::of(error, self.directory(), what)
    }

    /// Gets a certificate and keeps it. `name` answers the authority meanwhile.
    pub(crate) async fn buy(&self, domain: &str, name: &Arc<Name>) -> Result<Held, AcmeError> {
        let ordered = tokio::time::timeout(ORDER_TIME, self.order(domain, name)).await;
        self.end(domain, name).await;
        let away = |_| AcmeError::Away { directory: self.directory().to_owned(), cause: "it takes too long".into() };
        let held = ordered.unwrap_or_else(|elapsed| Err(AcmeError::Spent(Box::new(away(elapsed)))))?;
        // It is good even if nobody will remember it.
        if let Err(error) = self.kept.put(domain, &held).await {
            tracing::error!(subsystem_name = self.settings.subsystem, %domain, %error, "The new certificate cannot be kept");
        }
        Ok(held)
    }

    /// No challenge is open any more.
    pub(crate) async fn end(&self, domain: &str, name: &Name) {
        name.challenge.clear();
        self.kept.remove_token(domain).await;
    }

    async fn order(&self, domain: &str, name: &Arc<Name>) -> Result<Held, AcmeError> {
        let account = self.account().await?;
        let identifiers = [Identifier::Dns(domain.to_owned())];
        let ordered = account.new_order(&NewOrder::new(&identifiers)).await;
        let mut order = ordered.map_err(|e| self.failed(e, domain))?;
        self.answer(&mut order, domain, name).await?;
        let finished = self.finish(order, domain).await;
        finished.map_err(|error| AcmeError::Spent(Box::new(error)))
    }

    async fn finish(&self, mut order: Order, domain: &str) -> Result<Held, AcmeError> {
        let key = self.kept.key(domain).await?;
        let bad_key = |cause| AcmeError::Key { name: domain.to_owned(), cause };
        let csr = create_csr(&key, None, None, &[domain.to_owned()]).await.map_err(|e| bad_key(e.to_string()))?;
        order.finalize_csr(&csr).await.map_err(|e| self.failed(e, domain))?;
        let chain = order.poll_certificate(&PATIENCE).await.map_err(|e| self.failed(e, domain))?;
        let answer = |cause| AcmeError::Answer { directory: self.directory().to_owned(), cause };
        let chain = pem::certificates(chain.as_bytes()).map_err(|e| answer(e.to_string()))?;
        Held::new(chain, key, domain).map_err(answer)
    }

    async fn account(&self) -> Result<Account, AcmeError> {
        let roots = self.spawner.blocking(system_roots).await.unwrap_or_else(|_| rustls::RootCertStore::empty());
        let away = |cause: String| AcmeError::Away { directory: self.directory().to_owned(), cause };
        let tls =
            web_client_config(KeyExchange::default(), roots, self.clock.clone()).map_err(|e| away(e.to_string()))?;
        let tls = Arc::new(tls);
        let builder = || Account::builder_with_http(Box::new(Door(tls.clone())));
        let directory = self.directory().to_owned();
        let failed = |e| self.failed(e, ACCOUNT);
        let known = self.kept.account_key().await?;
        let account = match (known, self.settings.tos_accepted) {
            (Some(key), true) => builder().create_from_key(account_key(&key).map_err(failed)?, directory).await,
            // An authority that does not know the key yet would take more as consent.
            (Some(key), false) => builder().from_key(account_key(&key).map_err(failed)?, directory).await,
            (None, true) => {
                let key = self.kept.new_account_key().await?;
                let made = builder().create_from_key(account_key(&key).map_err(failed)?, directory).await;
                let made = made.map_err(failed)?;
                self.kept.put_account_key(key).await?;
                Ok(made)
            }
            (None, false) => {
                // Only the authority knows whether it has terms.
                let new = NewAccount { contact: &[], terms_of_service_agreed: false, only_return_existing: false };
                let (account, credentials) = builder().create(&new, directory, None).await.map_err(failed)?;
                let key = PrivateKey::from_pkcs8(credentials.private_key().secret_pkcs8_der());
                let key = key.map_err(|e| AcmeError::Key { name: ACCOUNT.into(), cause: e.to_string() })?;
                self.kept.put_account_key(key).await?;
                Ok((account, credentials))
            }
        };
        let (account, _) = account.map_err(failed)?;
        // Each time: it may have changed.
        let contact = format!("mailto:{}", self.settings.email);
        if !self.settings.email.is_empty() {
            account.update_contacts(&[&contact]).await.map_err(failed)?;
        }
        Ok(account)
    }

    /// Shows the authority that the name is ours.
    async fn answer(&self, order: &mut Order, domain: &str, name: &Arc<Name>) -> Result<(), AcmeError> {
        let failed = |e| self.failed(e, domain);
        let mut list = order.authorizations();
        while let Some(next) = list.next().await {
            let mut authorization = next.map_err(failed)?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let mut challenge = authorization.challenge(ChallengeType::TlsAlpn01).ok_or_else(|| AcmeError::Answer {
                directory: self.directory().to_owned(),
                cause: "it does not offer the challenge tls-alpn-01".into(),
            })?;
            self.show(domain, name, challenge.key_authorization().digest().as_ref()).await?;
            challenge.set_ready().await.map_err(failed)?;
        }
        match order.poll_ready(&PATIENCE).await {
            Ok(OrderStatus::Ready) => Ok(()),
            Err(error @ (instant_acme::Error::Other(_) | instant_acme::Error::Timeout(_))) => Err(failed(error)),
            decided => Err(match (self.why_not(order, domain).await, decided) {
                (Some(why), _) => why,
                (None, Err(error)) => failed(error),
                (None, Ok(status)) => {
                    let problem = format!("the order is {status:?}");
                    AcmeError::Challenge { domain: domain.to_owned(), problem }
                }
            }),
        }
    }

    async fn show(&self, domain: &str, name: &Arc<Name>, digest: &[u8]) -> Result<(), AcmeError> {
        let bad =
            |e: finial_crypto::SignError| AcmeError::Key { name: format!("{domain}+token"), cause: e.to_string() };
        let key = PrivateKey::generate(finial_core::KeyType::EcP256).map_err(bad)?;
        let certificate = acme_challenge_certificate(&key, domain, digest, self.clock.now()).map_err(bad)?;
        name.challenge.set(std::slice::from_ref(&certificate), &key).map_err(bad)?;
        // This process can answer, whoever else cannot.
        if let Err(error) = self.kept.put_token(domain, &key, &certificate).await {
            tracing::warn!(subsystem_name = self.settings.subsystem, %domain, %error, "Others cannot answer the challenge");
        }
        Ok(())
    }

    /// What the authority found when it looked.
    async fn why_not(&self, order: &mut Order, domain: &str) -> Option<AcmeError> {
        let mut list = order.authorizations();
        while let Some(Ok(mut authorization)) = list.next().await {
            let state = authorization.refresh().await.ok()?;
            if let Some(problem) = state.challenges.iter().find_map(|c| c.error.as_ref()) {
                return Some(AcmeError::Challenge { domain: domain.to_owned(), problem: problem_text(problem) });
            }
        }
        None
    }
}

fn account_key(key: &PrivateKey) -> Result<(Key, PrivateKeyDer<'static>), instant_acme::Error> {
    let pkcs8 = key.pkcs8_der();
    let der = PrivatePkcs8KeyDer::from(pkcs8.expose().clone());
    Ok((Key::from_pkcs8_der(der.clone_key())?, PrivateKeyDer::Pkcs8(der)))
}
