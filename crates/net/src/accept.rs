//! What a listener does about its own errors: it waits and goes on.

use std::io;
use std::time::Duration;

const WAIT_MIN: Duration = Duration::from_millis(5);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Waits longer with each failed `accept` in a row. The usual failure is to have no file descriptors left; asking again
/// at once would burn the CPU that closing connections needs.
#[derive(Default)]
pub(crate) struct AcceptBackoff {
    wait: Option<Duration>,
}

impl AcceptBackoff {
    /// Takes note of what `accept` said and returns what to serve, after a wait if nothing.
    pub(crate) async fn note<T>(&mut self, accepted: io::Result<T>) -> Option<T> {
        match accepted {
            Ok(connection) => {
                self.wait = None;
                Some(connection)
            }
            Err(error) if is_of_the_connection(&error) => None,
            Err(error) => {
                let wait = self.wait.map_or(WAIT_MIN, |w| (w * 2).min(WAIT_MAX));
                self.wait = Some(wait);
                tracing::warn!(%error, wait_ms = wait.as_millis(), "Cannot accept connections; trying again");
                tokio::time::sleep(wait).await;
                None
            }
        }
    }
}

/// Whether the error belongs to one connection that went away, not to the listener.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn waits_grow_to_a_second_and_end_with_success() {
        let mut backoff = AcceptBackoff::default();
        let no_files = || Err::<(), _>(io::Error::from_raw_os_error(rustix::io::Errno::MFILE.raw_os_error()));
        let start = Instant::now();
        for _ in 0..20 {
            assert!(backoff.note(no_files()).await.is_none());
        }
        assert!(start.elapsed() > Duration::from_secs(10), "no busy loop");
        assert_eq!(backoff.wait, Some(WAIT_MAX));
        assert!(backoff.note(Ok(())).await.is_some());
        let start = Instant::now();
        assert!(backoff.note(Err::<(), _>(io::ErrorKind::ConnectionAborted.into())).await.is_none());
        assert_eq!(start.elapsed(), Duration::ZERO, "a vanished client costs no wait");
    }
}
