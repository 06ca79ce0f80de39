//! What every long-running program of Finial needs besides its purpose: tasks that are watched and drained, signals, logs,
//! metrics, health, rate limits and backoff.
//!
//! Nothing outside this crate spawns tasks: [`Supervisor`] does, and whoever needs tasks gets its [`Spawner`].
//! Metrics are a value ([`Metrics`]) that is handed down, not a global, so that a server and an agent in one process
//! keep theirs apart; a disabled one costs a branch. Settings here are plain values: `cli` fills them from the configuration.

mod backoff;
mod errno;
pub mod files;
pub mod health;
pub mod http;
pub mod log;
mod places;
mod rate;
mod signals;
mod supervisor;
pub mod telemetry;

pub use backoff::Backoff;
pub use errno::{errno_text, listen_text};
pub use places::{Place, Places};
pub use rate::{RateLimited, RateLimiter};
pub use signals::signals;
pub use supervisor::{BoxError, Shutdown, Spawner, Supervisor, TaskFailure};
pub use telemetry::Metrics;
