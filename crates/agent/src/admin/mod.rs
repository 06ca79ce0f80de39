//! The admin socket: what the agent says of itself, and its log level. Who may connect is up to the socket's permissions.

mod debug;
mod logger;

pub(crate) use debug::DebugApi;
pub(crate) use logger::LoggerApi;
