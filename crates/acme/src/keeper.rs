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
use tokio::time::Instant;

/// The clock may be set, and others may put a certificate into the folder: it is looked at this often.
const NAP_MAX: Duration = Duration::from_secs(600);
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
            bought: None,
            rest_until: None,
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
    /// The last that was bought, whether or not it can be presented yet.
    bought: Option<Held>,
    /// Not before this is asked again.
    rest_until: Option<Instant>,
    away: Backoff,
    refused: Backoff,
}

impl Keeper {
    /// Takes what is kept, or was bought, if it is later than what is presented.
    async fn look(&mut self) {
        let kept = self.buyer.kept.certificate(&self.domain).await;
        for found in kept.into_iter().chain(self.bought.clone()) {
            let later = self.held.as_ref().is_none_or(|(held, _)| found.not_after > held.not_after);
            if later && found.is_valid_at(self.buyer.clock.now()) {
                self.present(found);
            }
        }
    }

    fn present(&mut self, held: Held) {
        let subsystem_name = self.buyer.settings.subsystem;
        match self.name.certificate.set(&held.chain, &held.key) {
            Ok(()) => self.held = Some((held.clone(), due(&held))),
            Err(error) => {
                tracing::error!(subsystem_name, domain = %self.domain, %error, "The certificate cannot be presented");
            }
        }
    }

    async fn run(mut self, shutdown: Shutdown) {
        loop {
            let mut wait = self.wait();
            if wait.is_zero() {
                let renewed = tokio::select! {
                    () = shutdown.cancelled() => None,
                    rest = self.renew() => Some(rest),
                };
                let Some(rest) = renewed else { return self.buyer.end(&self.domain, &self.name).await };
                self.rest_until = Some(Instant::now() + rest);
                wait = self.wait();
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            if self.left().is_none() {
                self.look().await;
            }
        }
    }

    /// Until something is to be done or looked at again; nothing if it is time to ask.
    fn wait(&self) -> Duration {
        let rest = self.rest_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        self.left().unwrap_or(rest).min(NAP_MAX)
    }

    /// Until the next is due.
    fn left(&self) -> Option<Duration> {
        let (_, due) = self.held.as_ref()?;
        u64::try_from(due - self.buyer.clock.now()).ok().filter(|left| *left > 0).map(Duration::from_secs)
    }

    /// Asks, and says how long to rest then.
    async fn renew(&mut self) -> Duration {
        let turn = self.turn.clone();
        let _turn = turn.lock().await;
        let bought = match self.buyer.kept.lock().await {
            Ok(_lock) => {
                // Another process with the same folder may have been faster.
                self.look().await;
                if self.left().is_some() {
                    return Duration::ZERO;
                }
                self.buyer.buy(&self.domain, &self.name).await
            }
            Err(error) => Err(error),
        };
        match bought.and_then(|held| self.take(held)) {
            Ok(()) => {
                self.away.reset();
                self.refused.reset();
                Duration::ZERO
            }
            Err(AcmeError::Elsewhere) => ELSEWHERE,
            Err(error) => self.rest_after(&error),
        }
    }

    /// Presents what was bought, if that makes sense. It is remembered in any case: a clock that is wrong may be set.
    fn take(&mut self, held: Held) -> Result<(), AcmeError> {
        let (subsystem_name, domain, until) = (self.buyer.settings.subsystem, &self.domain, date(held.not_after));
        tracing::info!(subsystem_name, %domain, %until, "Certificate obtained from the ACME authority");
        self.bought = Some(held.clone());
        let answer = |cause: String| AcmeError::Answer { directory: self.buyer.directory().to_owned(), cause };
        if !held.is_valid_at(self.buyer.clock.now()) {
            let (from, now) = (date(held.not_before), date(self.buyer.clock.now()));
            return Err(answer(format!(
                "its certificate is valid from {from} to {until}, and it is {now} here: which clock is wrong?"
            )));
        }
        let short = answer(format!("its certificate ends {until}, before it can be renewed"));
        self.present(held);
        if self.left().is_some() { Ok(()) } else { Err(short) }
    }

    fn rest_after(&mut self, error: &AcmeError) -> Duration {
        let (subsystem_name, domain) = (self.buyer.settings.subsystem, &self.domain);
        let rest = match error {
            AcmeError::Refused { is_rate_limit: true, .. } => self.refused.next_wait().max(RATE_LIMITED),
            error if error.counts() => self.refused.next_wait(),
            _ => self.away.next_wait(),
        };
        let retry_in_seconds = rest.as_secs();
        match &self.held {
            Some((held, _)) => {
                let until = date(held.not_after);
                tracing::error!(subsystem_name, %domain, %error, retry_in_seconds, %until, "No new certificate; the last one is kept");
            }
            None => {
                tracing::error!(subsystem_name, %domain, %error, retry_in_seconds, "No certificate yet; handshakes are refused")
            }
        }
        rest
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

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::{KeyType, ManualClock};
    use finial_crypto::{PrivateKey, acme_challenge_certificate};
    use finial_runtime::Supervisor;

    const DOMAIN: &str = "a.example.test";
    const NOW: i64 = 1_800_000_000;
    const DAY: i64 = 86_400;

    fn held_from(now: i64) -> Held {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let certificate = acme_challenge_certificate(&key, DOMAIN, &[7; 32], now).unwrap();
        Held::new(vec![certificate], key, DOMAIN).unwrap()
    }

    fn keeper(clock: &Arc<ManualClock>, dir: Option<std::path::PathBuf>) -> Keeper {
        let spawner = Supervisor::new(Shutdown::new()).spawner();
        let settings = AcmeSettings {
            directory_url: "https://localhost:1/dir".into(),
            email: String::new(),
            tos_accepted: true,
            domains: vec![DOMAIN.into()],
            cache_dir: dir.clone(),
            subsystem: "test",
        };
        let kept = Kept::new(dir, None, spawner.clone());
        Keeper {
            domain: DOMAIN.into(),
            name: Arc::default(),
            buyer: Arc::new(Buyer { settings, kept, clock: clock.clone(), spawner }),
            turn: Arc::default(),
            held: None,
            bought: None,
            rest_until: None,
            away: Backoff::new(AWAY[0], AWAY[1]).shape(2.0, 0.25),
            refused: Backoff::new(REFUSED[0], REFUSED[1]).shape(2.0, 0.25),
        }
    }

    #[tokio::test]
    async fn what_a_clock_that_is_wrong_cannot_use_is_used_when_it_is_right() {
        let clock = Arc::new(ManualClock::at(NOW));
        let mut keeper = keeper(&clock, None);
        let error = keeper.take(held_from(NOW + 2 * DAY)).unwrap_err();
        assert!(error.to_string().contains("which clock is wrong?"), "{error}");
        assert!(keeper.held.is_none());
        // No order after order: authorities give so many certificates in a week.
        let rests: Vec<_> = (0..4).map(|_| keeper.rest_after(&error)).collect();
        assert!(rests[0] >= REFUSED[0] / 2 && rests[3] > rests[0] * 3, "{rests:?}");
        keeper.look().await;
        assert!(keeper.held.is_none());
        clock.advance(2 * DAY);
        keeper.look().await;
        assert!(keeper.held.is_some() && keeper.left().is_some());
    }

    #[tokio::test]
    async fn only_what_costs_the_authority_nothing_is_asked_for_again_soon() {
        let mut keeper = keeper(&Arc::new(ManualClock::at(NOW)), None);
        let (directory, cause) = ("d".to_owned(), "c".to_owned());
        let away = || AcmeError::Away { directory: directory.clone(), cause: cause.clone() };
        assert!(keeper.rest_after(&away()) < Duration::from_secs(10));
        assert!(keeper.rest_after(&AcmeError::Spent(Box::new(away()))) > REFUSED[0] / 2);
        let what = "w".to_owned();
        let limited = AcmeError::Refused { directory, what, problem: cause, is_rate_limit: true };
        assert!(keeper.rest_after(&limited) >= RATE_LIMITED);
    }

    #[tokio::test]
    async fn what_is_kept_is_presented_again_and_one_process_asks_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(NOW));
        let mut keeper = keeper(&clock, Some(folder.path().join("acme")));
        let held = held_from(NOW);
        keeper.buyer.kept.put(DOMAIN, &held).await.unwrap();
        keeper.look().await;
        assert_eq!(keeper.held.as_ref().map(|(held, _)| &held.chain), Some(&held.chain));
        let due = keeper.held.as_ref().unwrap().1;
        let third = (held.not_after - held.not_before) / 3;
        assert!((held.not_after - due - third).abs() <= third / 10 + 1, "{due}");
        // What is broken, or of another name, is as good as nothing.
        let file = folder.path().join("acme").join(DOMAIN);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(keeper.buyer.kept.certificate("b.example.test").await.is_none());
        for bad in ["", "nonsense", text.split("-----BEGIN CERT").next().unwrap(), &text[200..]] {
            std::fs::write(&file, bad).unwrap();
            assert!(keeper.buyer.kept.certificate(DOMAIN).await.is_none(), "{bad}");
        }
        let lock = keeper.buyer.kept.lock().await.unwrap();
        assert!(matches!(keeper.buyer.kept.lock().await, Err(AcmeError::Elsewhere)));
        drop(lock);
        keeper.buyer.kept.lock().await.unwrap();
    }
}
