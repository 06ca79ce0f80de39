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
        name.challenge.clear();
        self.kept.remove_token(domain).await;
        let away = |_| AcmeError::Away { directory: self.directory().to_owned(), cause: "it takes too long".into() };
        let held = ordered.unwrap_or_else(|elapsed| Err(away(elapsed)))?;
        // It is good even if nobody will remember it.
        if let Err(error) = self.kept.put(domain, &held).await {
            tracing::error!(subsystem_name = self.settings.subsystem, %domain, %error, "The new certificate cannot be kept");
        }
        Ok(held)
    }

    async fn order(&self, domain: &str, name: &Arc<Name>) -> Result<Held, AcmeError> {
        let account = self.account().await?;
        let identifiers = [Identifier::Dns(domain.to_owned())];
        let ordered = account.new_order(&NewOrder::new(&identifiers)).await;
        let mut order = ordered.map_err(|e| self.failed(e, domain))?;
        self.answer(&mut order, domain, name).await?;
        let key = self.kept.key(domain).await?;
        let bad_key = |cause| AcmeError::Key { name: domain.to_owned(), cause };
        let csr = create_csr(&key, None, None, &[domain.to_owned()]).await.map_err(|e| bad_key(e.to_string()))?;
        order.finalize_csr(&csr).await.map_err(|e| self.failed(e, domain))?;
        let chain = order.poll_certificate(&PATIENCE).await.map_err(|e| self.failed(e, domain))?;
        let answer = |cause| AcmeError::Answer { directory: self.directory().to_owned(), cause };
        let chain = pem::certificates(chain.as_bytes()).map_err(|e| answer(e.to_string()))?;
        let held = Held::new(chain, key, domain).map_err(answer)?;
        if !held.is_valid_at(self.clock.now()) {
            let cause = "its certificate is not valid now: do the clocks differ?".to_owned();
            return Err(answer(cause));
        }
        Ok(held)
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
        if let Some(key) = self.kept.account_key().await? {
            let key = account_key(&key).map_err(failed)?;
            // An authority that does not know the key yet would take this as consent.
            let found = if self.settings.tos_accepted {
                builder().create_from_key(key, directory).await
            } else {
                builder().from_key(key, directory).await
            };
            return found.map(|(account, _)| account).map_err(failed);
        }
        if !self.settings.tos_accepted {
            // Only the authority knows whether it has terms.
            let asked = self.register(builder(), directory).await;
            return asked.map_err(failed);
        }
        let key = account_key(&self.kept.new_account_key().await?).map_err(failed)?;
        let (account, _) = builder().create_from_key(key, directory).await.map_err(failed)?;
        let contact = format!("mailto:{}", self.settings.email);
        if !self.settings.email.is_empty() {
            account.update_contacts(&[&contact]).await.map_err(failed)?;
        }
        Ok(account)
    }

    /// An account without consent, whose key is not kept.
    async fn register(
        &self,
        builder: instant_acme::AccountBuilder,
        directory: String,
    ) -> Result<Account, instant_acme::Error> {
        let contact = format!("mailto:{}", self.settings.email);
        let contacts = [contact.as_str()];
        let contact = if self.settings.email.is_empty() { &contacts[..0] } else { &contacts[..] };
        let new = NewAccount { contact, terms_of_service_agreed: false, only_return_existing: false };
        builder.create(&new, directory, None).await.map(|(account, _)| account)
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
        self.kept.put_token(domain, &key, &certificate).await
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
