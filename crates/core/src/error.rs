//! What kind of failure an error is. Each library error has a `kind()`; the edges turn kinds into gRPC or HTTP codes.

/// Failures by what the caller can do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request is malformed: mend it.
    InvalidArgument,
    /// The thing does not exist.
    NotFound,
    /// The thing exists already.
    AlreadyExists,
    /// The state of the system forbids it now.
    FailedPrecondition,
    /// The caller is known and may not.
    Denied,
    /// The caller is not known.
    Unauthenticated,
    /// A limit was reached.
    Exhausted,
    /// Something we need is away: try again.
    Unavailable,
    /// It took too long.
    Timeout,
    /// Known, and not offered.
    Unimplemented,
    /// Our own fault.
    Internal,
}

/// An error for a caller: a kind, one public sentence in SPIRE's wording, and a private cause that only the log sees.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What kind it is.
    pub kind: ErrorKind,
    /// What the caller may read.
    pub message: String,
    /// What only the log may say.
    #[source]
    pub cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Fault {
    /// A fault without a private cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), cause: None }
    }

    /// Adds the private cause.
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }
}
