//! Google Cloud: where tokens come from, and what is asked of its services.

mod cas;
mod storage;
mod token;

pub use cas::Cas;
pub use storage::{CloudStorage, GcsBundle};

use crate::world::{Failure, Remote};
use finial_net::rest::Answer;
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Complaint {
    error: Details,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    message: String,
    status: String,
    errors: Vec<Reason>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Reason {
    reason: String,
}

/// What was answered, unless it is a no.
fn good(remote: &Remote, answer: Answer) -> Result<Answer, Failure> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let Complaint { error } = serde_json::from_slice(&answer.body).unwrap_or_default();
    let reason = error.errors.into_iter().next().map(|first| first.reason).filter(|reason| !reason.is_empty());
    Err(remote.refused(answer.status, reason.unwrap_or(error.status), &error.message))
}

#[cfg(test)]
mod tests;
