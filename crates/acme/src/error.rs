//! Why there is no certificate, and who has to do something about it.

use finial_core::ErrorKind;
use instant_acme::Problem;
use std::path::PathBuf;

/// Why no certificate was obtained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcmeError {
    /// Nobody answers there.
    #[error("the ACME authority at {directory} does not answer: {cause}")]
    Away {
        /// Whom we asked.
        directory: String,
        /// What happened.
        cause: String,
    },
    /// The authority answers, but not as ACME has it.
    #[error("what answers at {directory} is no ACME authority that we understand: {cause}")]
    Answer {
        /// Whom we asked.
        directory: String,
        /// What is wrong.
        cause: String,
    },
    /// The operator has not agreed.
    #[error("ACME Terms of Service have not been accepted. See the `tos_accepted` configurable ({0})")]
    Terms(String),
    /// The authority does not want to.
    #[error("the ACME authority at {directory} refuses {what}: {problem}")]
    Refused {
        /// Whom we asked.
        directory: String,
        /// What we asked for.
        what: String,
        /// What it said.
        problem: String,
        /// It has had enough of us for a while.
        is_rate_limit: bool,
    },
    /// The authority did not find our answer under the name.
    #[error(
        "the ACME authority could not see that {domain} is ours: {problem}; port 443 of {domain} must lead to this endpoint, without \
         anything between that terminates TLS"
    )]
    Challenge {
        /// The name.
        domain: String,
        /// What it said.
        problem: String,
    },
    /// Nothing can be kept there.
    #[error("{path}: {cause}", path = path.display())]
    Cache {
        /// Which file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The private key cannot be had or used.
    #[error("key {name:?}: {cause}")]
    Key {
        /// Which one.
        name: String,
        /// Why not.
        cause: String,
    },
    /// After the authority has counted a certificate.
    #[error("{0}")]
    Spent(#[source] Box<AcmeError>),
    /// Another process that keeps its certificates in the same folder is asking.
    #[error("another process asks for certificates with the same folder")]
    Elsewhere,
}

impl AcmeError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Away { .. } | Self::Answer { .. } | Self::Elsewhere => ErrorKind::Unavailable,
            Self::Terms(_) | Self::Challenge { .. } => ErrorKind::FailedPrecondition,
            Self::Refused { is_rate_limit: true, .. } => ErrorKind::Exhausted,
            Self::Refused { .. } => ErrorKind::Denied,
            Self::Cache { .. } | Self::Key { .. } => ErrorKind::Internal,
            Self::Spent(error) => error.kind(),
        }
    }

    /// Whether the authority has counted the attempt: then many of them exhaust its patience.
    pub(crate) fn counts(&self) -> bool {
        matches!(
            self,
            Self::Spent(_) | Self::Terms(_) | Self::Challenge { .. } | Self::Refused { .. } | Self::Answer { .. }
        )
    }

    /// Of an answer to a question for `what`.
    pub(crate) fn of(error: instant_acme::Error, directory: &str, what: &str) -> Self {
        let directory = directory.to_owned();
        match error {
            instant_acme::Error::Api(problem) => Self::refused(&problem, directory, what),
            instant_acme::Error::Other(cause) => Self::Away { directory, cause: cause.to_string() },
            instant_acme::Error::Timeout(_) => Self::Away { directory, cause: format!("no decision about {what} yet") },
            other => Self::Answer { directory, cause: other.to_string() },
        }
    }

    fn refused(problem: &Problem, directory: String, what: &str) -> Self {
        let is = |name: &str| problem.r#type.as_deref().is_some_and(|t| t.strip_prefix(TYPES) == Some(name));
        let text = problem_text(problem);
        if is("userActionRequired") || (what == ACCOUNT && text.contains("terms of service")) {
            return Self::Terms(text);
        }
        if is("serverInternal") || is("badNonce") {
            return Self::Away { directory, cause: text };
        }
        let is_rate_limit = is("rateLimited");
        Self::Refused { directory, what: what.to_owned(), problem: text, is_rate_limit }
    }
}

/// What is asked for first.
pub(crate) const ACCOUNT: &str = "the account";
const TYPES: &str = "urn:ietf:params:acme:error:";
/// So much of what an authority says is shown.
const PROBLEM_CHARS: usize = 400;

/// What an authority says, in one line.
pub(crate) fn problem_text(problem: &Problem) -> String {
    let kind = problem.r#type.as_deref().map_or("no reason given", |t| t.strip_prefix(TYPES).unwrap_or(t));
    let detail = problem.detail.as_deref().unwrap_or_default();
    let text: String = format!("{detail} ({kind})").trim().replace(char::is_control, " ");
    text.chars().take(PROBLEM_CHARS).collect()
}
