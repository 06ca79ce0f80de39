//! The token: fetched by logging in, renewed while Vault allows it, fetched again when it does not.

use crate::api::{Api, Failure, aside, read};
use crate::config::{Auth, Settings};
use finial_core::{ErrorKind, Secret};
use finial_plugin::{PluginError, secret};
use http::Method;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;
use zeroize::Zeroizing;

/// Shortest wait between two renewals.
const RENEWAL_MIN: Duration = Duration::from_secs(1);

/// A token, and how long it lasts.
pub(crate) struct Session {
    pub(crate) token: Secret<String>,
    is_renewable: bool,
    /// Nothing: it never ends.
    lease: Duration,
    since: Instant,
}

impl Session {
    /// When it is to be renewed, or replaced; never, if it does not end.
    fn due(&self) -> Option<Instant> {
        (!self.lease.is_zero()).then(|| self.since + self.lease * 2 / 3)
    }

    fn is_fresh(&self) -> bool {
        self.due().is_none_or(|due| Instant::now() < due)
    }

    fn has_ended(&self) -> bool {
        !self.lease.is_zero() && self.since.elapsed() >= self.lease
    }
}

#[derive(Deserialize)]
struct LoggedIn {
    auth: Grant,
}

#[derive(Deserialize)]
struct Grant {
    #[serde(deserialize_with = "secret")]
    client_token: Secret<String>,
    #[serde(default)]
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

#[derive(Deserialize)]
struct LookedUp {
    data: TokenData,
}

#[derive(Deserialize)]
struct TokenData {
    #[serde(default)]
    ttl: u64,
    #[serde(default)]
    renewable: bool,
}

impl From<LoggedIn> for Session {
    fn from(LoggedIn { auth }: LoggedIn) -> Self {
        Self {
            token: auth.client_token,
            is_renewable: auth.renewable,
            lease: Duration::from_secs(auth.lease_duration),
            since: Instant::now(),
        }
    }
}

/// The session of the moment. Those who need one at once share one log-in.
#[derive(Default)]
pub(crate) struct Sessions {
    current: Mutex<Option<Arc<Session>>>,
    begun: Notify,
}

impl Sessions {
    /// One that is good; by logging in, if there is none.
    pub(crate) async fn get(&self, settings: &Settings, api: &Api) -> Result<Arc<Session>, PluginError> {
        let mut current = self.current.lock().await;
        if let Some(session) = current.as_ref().filter(|session| session.is_fresh()) {
            return Ok(session.clone());
        }
        let old = current.take().filter(|old| old.is_renewable && !old.has_ended());
        let renewed = match &old {
            Some(old) => renew(api, old).await.ok(),
            None => None,
        };
        let session = Arc::new(match renewed {
            Some(session) => session,
            None => log_in(settings, api).await?,
        });
        *current = Some(session.clone());
        self.begun.notify_one();
        Ok(session)
    }

    /// Vault refused this one.
    pub(crate) async fn forget(&self, refused: &Arc<Session>) {
        let mut current = self.current.lock().await;
        current.take_if(|current| Arc::ptr_eq(current, refused));
    }

    /// Renews what there is in time, for ever: a token that was given to us is never given again.
    pub(crate) async fn keep(&self, settings: &Arc<Settings>) -> std::convert::Infallible {
        loop {
            let due = self.current.lock().await.as_ref().filter(|s| s.is_renewable).and_then(|s| s.due());
            let Some(due) = due else {
                self.begun.notified().await;
                continue;
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = self.begun.notified() => continue,
            }
            if let Some(wait) = self.renew_now(settings).await {
                tokio::time::sleep(wait.max(RENEWAL_MIN)).await;
            }
        }
    }

    /// How long to wait before the next attempt, if this one failed.
    async fn renew_now(&self, settings: &Arc<Settings>) -> Option<Duration> {
        let mut current = self.current.lock().await;
        let old = current.clone().filter(|session| !session.is_fresh())?;
        let renewed = match Api::open(settings).await {
            Ok(api) => renew(&api, &old).await,
            Err(error) => Err(Failure::Other(error.kind, error.message)),
        };
        match renewed {
            Ok(session) => {
                tracing::debug!(lease_seconds = session.lease.as_secs(), "Vault token renewed");
                *current = Some(Arc::new(session));
                Some(RENEWAL_MIN)
            }
            Err(failure) if matches!(failure, Failure::Refused(_)) || old.has_ended() => {
                tracing::error!(
                    error = failure.text(),
                    "Failed to renew the Vault token; the next signature begins with a log-in"
                );
                *current = None;
                None
            }
            Err(failure) => {
                tracing::warn!(error = failure.text(), "Failed to renew the Vault token; tried again until it ends");
                Some(old.lease / 10)
            }
        }
    }
}

async fn renew(api: &Api, old: &Session) -> Result<Session, Failure> {
    let body = Zeroizing::new(b"{}".to_vec());
    let renewed: LoggedIn = api.call(Method::PUT, "auth/token/renew-self", Some(&old.token), body).await?;
    Ok(renewed.into())
}

async fn log_in(settings: &Settings, api: &Api) -> Result<Session, PluginError> {
    let (mount, body) = match &settings.auth {
        Auth::Token(token) => return look_up(api, token).await,
        Auth::Cert { mount, role, .. } => (mount, json!({"name": role})),
        Auth::AppRole { mount, id, secret } => (mount, json!({"role_id": id, "secret_id": secret.expose()})),
        Auth::K8s { mount, role, token } => {
            let token = token.clone();
            let jwt = aside(move || read(&token, "Kubernetes service account token")).await?;
            let jwt = String::from_utf8_lossy(jwt.expose());
            (mount, json!({"role": role, "jwt": jwt.trim()}))
        }
    };
    let path = format!("auth/{}/login", mount.trim_matches('/'));
    let body = Zeroizing::new(body.to_string().into_bytes());
    let answer: Result<LoggedIn, _> = api.call(Method::PUT, &path, None, body).await;
    match answer {
        Ok(logged_in) if !logged_in.auth.client_token.expose().is_empty() => Ok(logged_in.into()),
        Ok(_) => Err(PluginError::internal("authentication is successful, but could not get token")),
        // Vault answers 400 to a wrong role or secret.
        Err(Failure::Refused(text) | Failure::Other(ErrorKind::Internal, text)) => {
            Err(PluginError::new(ErrorKind::Unauthenticated, format!("authentication failed {path}: {text}")))
        }
        Err(failure) => Err(failure.during(&format!("authentication failed {path}"))),
    }
}

/// A token that was given to us: how long it lasts.
async fn look_up(api: &Api, token: &Secret<String>) -> Result<Session, PluginError> {
    let answer: Result<LookedUp, _> =
        api.call(Method::GET, "auth/token/lookup-self", Some(token), Zeroizing::default()).await;
    let data = answer.map_err(|failure| failure.during("token lookup failed"))?.data;
    let lease = Duration::from_secs(data.ttl);
    Ok(Session { token: token.clone(), is_renewable: data.renewable, lease, since: Instant::now() })
}
