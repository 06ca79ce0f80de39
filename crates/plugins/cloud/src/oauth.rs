//! What Google and Azure share of OAuth 2.0 (RFC 6749): a request for a token, and what comes of it.

use crate::world::{Failure, Remote, form, patiently};
use bytes::Bytes;
use finial_core::{Secret, UnixSeconds};
use http::Method;
use serde::{Deserialize, Deserializer};

/// A token, and when it ends.
#[derive(Deserialize)]
pub(crate) struct Token {
    #[serde(deserialize_with = "finial_plugin::secret")]
    access_token: Secret<String>,
    /// Azure's metadata service writes it as a text.
    #[serde(default, deserialize_with = "number")]
    expires_in: Option<i64>,
    #[serde(default, deserialize_with = "number")]
    expires_on: Option<i64>,
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i64),
        Text(String),
    }
    Ok(match Either::deserialize(from)? {
        Either::Number(number) => Some(number),
        Either::Text(text) => text.parse().ok(),
    })
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Complaint {
    error: String,
    error_description: String,
}

impl Token {
    pub(crate) fn dated(self, now: UnixSeconds) -> (Secret<String>, UnixSeconds) {
        let ends = self.expires_in.map(|seconds| now.saturating_add(seconds)).or(self.expires_on);
        (self.access_token, ends.unwrap_or(now))
    }
}

/// The answer to a form with these fields.
pub(crate) async fn granted(remote: &Remote, path: &str, fields: &[(&str, &str)]) -> Result<Token, Failure> {
    asked(remote, Method::POST, path, &[("content-type", "application/x-www-form-urlencoded")], form(fields)).await
}

/// The answer of a metadata service.
pub(crate) async fn of_machine(remote: &Remote, path: &str, header: (&str, &str)) -> Result<Token, Failure> {
    asked(remote, Method::GET, path, &[header], String::new()).await
}

async fn asked(
    remote: &Remote,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> Result<Token, Failure> {
    let body = Bytes::from(body);
    patiently(|| async {
        let answer = remote.ask(method.clone(), path, headers, body.clone()).await?;
        if answer.status.is_success() {
            return remote.json(&answer);
        }
        let Complaint { error, error_description } = serde_json::from_slice(&answer.body).unwrap_or_default();
        Err(remote.refused(answer.status, error, &error_description))
    })
    .await
}
