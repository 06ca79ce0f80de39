//! Who gets signatures first when more are asked for than can be made: those whose SVIDs end soonest.
//!
//! A fleet that comes back after an outage asks for everything at once. So many batches are worked on at a time, which
//! bounds what answers take; the others wait with nothing but their requests, the nearest expiry first, and none is refused
//! but those of an agent that sends more before it has its answers.

use finial_core::UnixSeconds;
use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Batches that one agent may have here. SPIRE's agents and ours send one after the other.
const PER_AGENT_MAX: usize = 8;
/// Batches that are worked on at a time, for each core: keys in memory need no more than one, remote ones answer late.
const PER_CORE: usize = 16;

/// The queue before the signer.
pub struct SigningQueue {
    width: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: usize,
    waiting: BinaryHeap<Waiting>,
    came: u64,
    by_agent: HashMap<Box<str>, usize>,
}

struct Waiting {
    expiry: UnixSeconds,
    /// Among equals, who came first.
    number: u64,
    call: oneshot::Sender<Slot>,
}

impl Ord for Waiting {
    /// The greatest is the most urgent.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.expiry, other.number).cmp(&(self.expiry, self.number))
    }
}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Waiting {}

/// A place at work; the next one's when dropped.
struct Slot(Option<Arc<SigningQueue>>);

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(queue) = self.0.take() else { return };
        loop {
            let next = {
                let mut state = queue.lock();
                let next = state.waiting.pop();
                if next.is_none() {
                    state.running = state.running.saturating_sub(1);
                }
                next
            };
            let Some(next) = next else { return };
            match next.call.send(Slot(Some(queue.clone()))) {
                Ok(()) => return,
                Err(mut slot) => slot.0 = None, // it has gone away; the place is still to be given
            }
        }
    }
}

/// A batch that is counted for its agent.
struct Counted(Arc<SigningQueue>, Box<str>);

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if let Some(count) = state.by_agent.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                state.by_agent.remove(&self.1);
            }
        }
    }
}

/// Leave to work on a batch, for as long as it is held.
pub struct SigningTurn {
    _slot: Slot,
    _counted: Counted,
}

/// The agent has too many batches here already.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{PER_AGENT_MAX} requests of this agent are being answered; wait for one of them")]
pub struct TooMany;

impl SigningQueue {
    /// Works on as many batches at a time as suits this machine.
    pub fn new() -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::of_width(cores.saturating_mul(PER_CORE))
    }

    fn of_width(width: usize) -> Arc<Self> {
        Arc::new(Self { width, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is the turn of a batch of which the first SVID ends at `expiry`. Who gives up waiting leaves nothing
    /// behind; how long to wait is the caller's to say.
    ///
    /// # Errors
    /// When the agent has too many batches here.
    pub async fn turn(self: &Arc<Self>, agent: &str, expiry: UnixSeconds) -> Result<SigningTurn, TooMany> {
        let counted = self.count(agent)?;
        let waiting = {
            let mut state = self.lock();
            if state.running < self.width {
                state.running += 1;
                None
            } else {
                let (call, called) = oneshot::channel();
                state.came += 1;
                let number = state.came;
                if state.waiting.len() > 2 * state.by_agent.len() * PER_AGENT_MAX {
                    state.waiting.retain(|w| !w.call.is_closed()); // they gave up
                }
                state.waiting.push(Waiting { expiry, number, call });
                Some(called)
            }
        };
        let slot = match waiting {
            None => Slot(Some(self.clone())),
            // The sender is dropped only after it has sent.
            Some(called) => called.await.unwrap_or(Slot(None)),
        };
        Ok(SigningTurn { _slot: slot, _counted: counted })
    }

    fn count(self: &Arc<Self>, agent: &str) -> Result<Counted, TooMany> {
        let mut state = self.lock();
        match state.by_agent.get_mut(agent) {
            Some(count) if *count >= PER_AGENT_MAX => return Err(TooMany),
            Some(count) => *count += 1,
            None => {
                state.by_agent.insert(agent.into(), 1);
            }
        }
        Ok(Counted(self.clone(), agent.into()))
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
