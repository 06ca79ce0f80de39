//! Whether the datastore can be reached, as the last look at it told; asked before anybody waits for it.

use finial_store::StoreError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Why the datastore is away.
#[derive(Clone, Debug)]
struct Away {
    what: String,
    detail: String,
    advice: &'static str,
}

/// The way to the datastore. One that nobody watches counts as open.
#[derive(Debug)]
pub struct Link {
    away: watch::Sender<Option<Away>>,
    failed_at: Mutex<Option<Instant>>,
    followed: AtomicBool,
    look: Notify,
    /// How many looks have begun.
    begun: AtomicU64,
    /// The number of the last look that went well.
    well: watch::Sender<u64>,
}

/// How long a caller waits for a look.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(5);

impl Default for Link {
    fn default() -> Self {
        Self {
            away: watch::Sender::new(None),
            failed_at: Mutex::default(),
            followed: AtomicBool::new(false),
            look: Notify::new(),
            begun: AtomicU64::new(0),
            well: watch::Sender::new(0),
        }
    }
}

impl Link {
    /// Whether the datastore did not answer the last time.
    pub fn is_away(&self) -> bool {
        self.away.borrow().is_some()
    }

    /// When the datastore was away last: now, or when a look failed last.
    pub(crate) fn last_away(&self) -> Option<Instant> {
        if self.is_away() {
            return Some(Instant::now());
        }
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to tell who wants to write now; nothing while the datastore answers.
    pub fn refusal(&self) -> Option<StoreError> {
        self.away.borrow().as_ref().map(|away| StoreError::Unavailable {
            what: away.what.clone(),
            detail: away.detail.clone(),
            advice: away.advice,
        })
    }

    /// Waits until the datastore is away, and says why.
    pub async fn lost(&self) -> StoreError {
        let mut away = self.away.subscribe();
        loop {
            if let Some(refusal) = self.refusal() {
                return refusal;
            }
            if away.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether what others write, and what was written with an uncertain end, is found out by following.
    pub fn is_followed(&self) -> bool {
        self.followed.load(Ordering::Relaxed)
    }

    /// Somebody follows from now on.
    pub(crate) fn set_followed(&self) {
        self.followed.store(true, Ordering::Relaxed);
    }

    /// Asks for a look at the datastore soon.
    pub fn wake(&self) {
        self.look.notify_one();
    }

    /// Waits for a look that begins after this call, so that memory knows what was committed before it; those who ask
    /// together share one. `false` when nobody else writes, so that memory knows everything as it is.
    ///
    /// # Errors
    /// The datastore is away, or does not answer in time.
    pub async fn look_again(&self) -> Result<bool, StoreError> {
        if !self.is_followed() {
            return Ok(false);
        }
        let begun = self.looks_begun();
        let mut well = self.well.subscribe();
        self.wake();
        let looked = async {
            tokio::select! {
                refusal = self.lost() => Err(refusal),
                _ = well.wait_for(|nth| *nth > begun) => Ok(true),
            }
        };
        match tokio::time::timeout(LOOK_AGAIN_MAX, looked).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Busy(LOOK_AGAIN_MAX.as_secs())),
        }
    }

    pub(super) fn looks_begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    pub(super) fn begin_look(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(super) fn went_well(&self, nth: u64) {
        self.well.send_replace(nth);
    }

    /// The number of the last look that went well.
    pub(super) fn last_well(&self) -> u64 {
        *self.well.borrow()
    }

    /// Waits until somebody asks for a look.
    pub(crate) async fn woken(&self) {
        self.look.notified().await;
    }

    /// The last look failed. Returns whether that is new.
    pub(crate) fn set_away(&self, error: &StoreError) -> bool {
        let away = match error {
            StoreError::Unavailable { what, detail, advice } => {
                Away { what: what.clone(), detail: detail.clone(), advice }
            }
            error => {
                let text = error.to_string();
                let detail = text.strip_prefix("datastore-sql: ").unwrap_or(&text).to_owned();
                Away {
                    what: "the database".into(),
                    detail: format!("does not serve ({detail})"),
                    advice: "see its log",
                }
            }
        };
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.away.send_replace(Some(away)).is_none()
    }

    /// The last look went well. Returns whether the datastore was away before.
    pub(crate) fn set_back(&self) -> bool {
        self.is_away() && self.away.send_replace(None).is_some()
    }
}
