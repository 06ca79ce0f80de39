//! SIGINT and SIGTERM end the program in order; SIGUSR2 reopens the log file; SIGUSR1 and SIGHUP do not kill it, whoever listens for
//! them.

use crate::log::LogHandle;
use crate::{Shutdown, Spawner};
use tokio::signal::unix::{SignalKind, signal};

/// Listens for signals until `shutdown`: the first SIGINT or SIGTERM triggers it. With `log`, SIGUSR2 reopens the log file.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn signals(spawner: &Spawner, shutdown: Shutdown, log: Option<LogHandle>) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut reload = signal(SignalKind::user_defined1())?;
    let mut reopen = signal(SignalKind::user_defined2())?;
    spawner.service("signals", async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => shutdown.trigger(),
                _ = terminate.recv() => shutdown.trigger(),
                // Who does something then listens for it, too.
                _ = hangup.recv() => {}
                _ = reload.recv() => {}
                _ = reopen.recv() => {
                    if let Some(Err(error)) = log.as_ref().map(LogHandle::reopen) {
                        tracing::error!(%error, "Failed to reopen the log file");
                    }
                }
                () = shutdown.cancelled() => return Ok::<(), std::io::Error>(()),
            }
        }
    });
    Ok(())
}
