//! When to ask: at once where there is nothing, well before the end, and later again after a failure.

use crate::identity::Name;
use crate::kept::{Held, Kept};
use crate::order::Buyer;
use crate::{AcmeError, AcmeIdentity, AcmeSettings, KeyStore, is_public_name};
use finial_core::{Clock, UnixSeconds};
use finial_runtime::{Backoff, Shutdown, Spawner};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// The clock may be set: it is looked at this often.
const NAP_MAX: Duration = Duration::from_secs(3600);
/// After an authority that did not answer.
const AWAY: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(600)];
/// After a refusal: authorities count those (five an hour for a name with Let's Encrypt).
const REFUSED: [Duration; 2] = [Duration::from_secs(150), Duration::from_secs(6 * 3600)];
/// After a refusal because of too many questions.
const RATE_LIMITED: Duration = Duration::from_secs(3600);
/// While another process asks.
const ELSEWHERE: Duration = Duration::from_secs(5);

/// Presents what is kept, and keeps it current until shutdown. Does not wait for the authority: a name has no handshakes
/// before its first certificate.
pub async fn start(
    settings: AcmeSettings,
    keys: Option<Arc<dyn KeyStore>>,
    clock: Arc<dyn Clock>,
    spawner: &Spawner,
) -> Arc<AcmeIdentity> {
    let subsystem_name = settings.subsystem;
    let (public, others): (Vec<_>, Vec<_>) = settings.domains.iter().cloned().partition(|name| is_public_name(name));
    for domain in others {
        tracing::warn!(subsystem_name, %domain, "No ACME authority can certify this name; it is not served over HTTPS");
    }
    if !settings.tos_accepted {
        tracing::warn!(
            subsystem_name,
            "ACME Terms of Service have not been accepted. See the `tos_accepted` configurable"
        );
    }
    let identity = Arc::new(AcmeIdentity::new(&public, settings.cache_dir.clone()));
    let kept = Kept::new(settings.cache_dir.clone(), keys, spawner.clone());
    let buyer = Arc::new(Buyer { settings, kept, clock, spawner: spawner.clone() });
    let turn = Arc::new(Mutex::new(()));
    for (domain, name) in identity.names() {
        let mut keeper = Keeper {
            domain: domain.clone(),
            name: name.clone(),
            buyer: buyer.clone(),
            turn: turn.clone(),
            held: None,
            away: Backoff::new(AWAY[0], AWAY[1]).shape(2.0, 0.25),
            refused: Backoff::new(REFUSED[0], REFUSED[1]).shape(2.0, 0.25),
        };
        keeper.look().await;
        let shutdown = spawner.shutdown();
        spawner.service("acme", async move {
            keeper.run(shutdown).await;
            Ok::<(), Infallible>(())
        });
    }
    identity
}

struct Keeper {
    domain: String,
    name: Arc<Name>,
    buyer: Arc<Buyer>,
    /// One order at a time.
    turn: Arc<Mutex<()>>,
    /// What is presented, and when to ask for the next.
    held: Option<(Held, UnixSeconds)>,
    away: Backoff,
    refused: Backoff,
}

impl Keeper {
    /// Takes what is kept, if it is later than what is presented.
    async fn look(&mut self) {
        let Some(found) = self.buyer.kept.certificate(&self.domain).await else { return };
        let later = self.held.as_ref().is_none_or(|(held, _)| found.not_after > held.not_after);
        if later && found.is_valid_at(self.buyer.clock.now()) {
            self.present(found);
        }
    }

    fn present(&mut self, held: Held) -> bool {
        let subsystem_name = self.buyer.settings.subsystem;
        if let Err(error) = self.name.certificate.set(&held.chain, &held.key) {
            tracing::error!(subsystem_name, domain = %self.domain, %error, "The certificate cannot be presented");
            return false;
        }
        let due = due(&held);
        self.held = Some((held, due));
        due > self.buyer.clock.now()
    }

    async fn run(mut self, shutdown: Shutdown) {
        loop {
            let wait = match self.left() {
                Some(left) => left,
                None => self.renew().await,
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait.min(NAP_MAX)) => {}
            }
        }
    }

    /// Until the next is due.
    fn left(&self) -> Option<Duration> {
        let (_, due) = self.held.as_ref()?;
        u64::try_from(due - self.buyer.clock.now()).ok().filter(|left| *left > 0).map(Duration::from_secs)
    }

    /// Asks, and says how long to wait then.
    async fn renew(&mut self) -> Duration {
        let turn = self.turn.clone();
        let _turn = turn.lock().await;
        let subsystem_name = self.buyer.settings.subsystem;
        let bought = match self.buyer.kept.lock().await {
            Ok(_lock) => {
                // Another process with the same folder may have been faster.
                self.look().await;
                if let Some(left) = self.left() {
                    return left;
                }
                self.buyer.buy(&self.domain, &self.name).await
            }
            Err(error) => Err(error),
        };
        let error = match bought {
            Ok(held) => {
                let (domain, until) = (&self.domain, date(held.not_after));
                tracing::info!(subsystem_name, %domain, %until, "Certificate obtained from the ACME authority");
                let lasts = self.present(held);
                if lasts {
                    self.away.reset();
                    self.refused.reset();
                    return Duration::ZERO;
                }
                let cause = "its certificates end before they can be renewed".to_owned();
                AcmeError::Answer { directory: self.buyer.directory().to_owned(), cause }
            }
            Err(AcmeError::Elsewhere) => return ELSEWHERE,
            Err(error) => error,
        };
        let wait = match &error {
            AcmeError::Refused { is_rate_limit, .. } => {
                self.refused.next_wait().max(if *is_rate_limit { RATE_LIMITED } else { Duration::ZERO })
            }
            AcmeError::Terms(_) | AcmeError::Challenge { .. } => self.refused.next_wait(),
            _ => self.away.next_wait(),
        };
        let (domain, retry_in_seconds) = (&self.domain, wait.as_secs());
        match &self.held {
            Some((held, _)) => {
                let until = date(held.not_after);
                tracing::error!(subsystem_name, %domain, %error, retry_in_seconds, %until, "No new certificate; the last one is kept");
            }
            None => {
                tracing::error!(subsystem_name, %domain, %error, retry_in_seconds, "No certificate yet; handshakes are refused")
            }
        }
        wait
    }
}

/// When to ask for the next: when a third of its time is left, spread so that servers that began together do not ask together.
fn due(held: &Held) -> UnixSeconds {
    let third = u64::try_from((held.not_after - held.not_before) / 3).unwrap_or_default();
    let third = Duration::from_secs(third);
    let before = Backoff::new(third, third).shape(1.0, 0.1).next_wait();
    held.not_after - i64::try_from(before.as_secs()).unwrap_or_default()
}

fn date(at: UnixSeconds) -> String {
    let format = &time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from_unix_timestamp(at).ok().and_then(|t| t.format(format).ok()).unwrap_or_default()
}
