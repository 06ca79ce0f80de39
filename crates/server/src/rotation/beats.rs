//! Who is still there: a server's word counts as new when it is seen to change here, whatever any clock says.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Within such a time every server of ours that runs has taken an order up. (One of SPIRE's never does.)
const TAKE_UP: Duration = Duration::from_secs(15);
/// A server of which nothing new was seen for so long is not waited for.
const SILENT: Duration = Duration::from_secs(30);

/// An order, and the server of a journal; 0 for the order itself.
type Of = (i64, i64);

/// What was seen of orders and of those who carry them out, and since when that is so.
#[derive(Default)]
pub(crate) struct Beats(Mutex<HashMap<Of, (i64, Instant)>>);

impl Beats {
    fn lock(&self) -> MutexGuard<'_, HashMap<Of, (i64, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn same_for(&self, of: Of, seen: i64) -> Duration {
        let now = Instant::now();
        let mut all = self.lock();
        let (last, since) = all.entry(of).or_insert((seen, now));
        if *last != seen {
            (*last, *since) = (seen, now);
        }
        since.elapsed()
    }

    /// Whether this server, which wrote last at that time by its clock, is there as far as is seen here.
    pub(crate) fn is_there(&self, order: i64, journal: i64, wrote_at: i64) -> bool {
        self.same_for((order, journal), wrote_at) < SILENT
    }

    /// Whether a server that runs may not have taken up yet the order that began at that time.
    pub(crate) fn is_new(&self, order: i64, began_at: i64) -> bool {
        self.same_for((order, 0), began_at) < TAKE_UP
    }

    /// Forgets all but these orders.
    pub(crate) fn keep(&self, orders: &[i64]) {
        self.lock().retain(|(order, _), _| orders.contains(order));
    }
}
