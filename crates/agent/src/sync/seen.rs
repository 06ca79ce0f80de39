//! Our word to the server that we have a bundle of the trust domain: whoever replaces authorities waits for it.
//!
//! Only what the stream brought is confirmed, so that SPIRE's servers, which have no stream, are never called. A task of its own
//! does it: nobody waits for it, and of several bundles the last counts.

use super::client::ServerLink;
use finial_runtime::{Backoff, Shutdown};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::Code;

/// Between two attempts, at first and at most, spread so that not all agents come at once.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// After so many it is left: the next stream says what we have, too.
const ATTEMPTS_MAX: u32 = 5;

/// Of the bundle that is in use and was not told of yet.
pub(super) type Seen = watch::Sender<Option<u64>>;

/// Tells the server of each number, until shutdown or until nobody is there any more who sends some.
pub(super) async fn confirm(link: Arc<ServerLink>, mut seen: watch::Receiver<Option<u64>>, shutdown: Shutdown) {
    let mut unsupported_by = None;
    loop {
        tokio::select! {
            changed = seen.changed() => if changed.is_err() { return },
            () = shutdown.cancelled() => return,
        }
        let mut backoff = Backoff::new(WAIT.0, WAIT.1).shape(2.0, 0.9);
        for _ in 0..ATTEMPTS_MAX {
            let (Some(number), generation) = (*seen.borrow_and_update(), link.generation()) else { break };
            // An older server stays one for as long as the connection lasts.
            if unsupported_by == Some(generation) {
                break;
            }
            let told = tokio::select! {
                told = link.bundle_seen(number) => told,
                () = shutdown.cancelled() => return,
            };
            match told {
                Ok(()) => break,
                Err(error) if error.status.code() == Code::Unimplemented => {
                    unsupported_by = Some(generation);
                    break;
                }
                Err(error) => {
                    tracing::debug!(subsystem_name = super::SUBSYSTEM, %error, sequence_number = number, "Could not tell the server that its bundle is in use");
                    if error.status.code() == Code::PermissionDenied {
                        break;
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_wait()) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }
}
