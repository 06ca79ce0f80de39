//! Calls on the API server, each with its limits.

use crate::kubeconfig::Place;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use finial_core::ErrorKind;
use finial_net::rest::{Client, Limits};
use finial_plugin::PluginError;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use std::time::Duration;

/// What one call may cost. A list of webhooks has the certificates of each.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), body: 16 << 20 };
/// What a part of a path holds as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_');

pub(crate) const JSON: &str = "application/json";
pub(crate) const APPLY: &str = "application/apply-patch+yaml";
pub(crate) const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// A part of a path or query.
pub(crate) fn segment(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

pub(crate) fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// What the API server, or the way to it, has against a call.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub(crate) status: Option<StatusCode>,
    pub(crate) text: String,
}

impl ApiError {
    /// As an error whose message begins so.
    pub(crate) fn during(self, what: &str) -> PluginError {
        let kind = match self.status {
            Some(StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED) => ErrorKind::Denied,
            Some(StatusCode::NOT_FOUND) => ErrorKind::NotFound,
            Some(status) if !status.is_server_error() && status != StatusCode::TOO_MANY_REQUESTS => ErrorKind::Internal,
            _ => ErrorKind::Unavailable,
        };
        PluginError::new(kind, format!("{what}: {}", self.text))
    }
}

/// An API server, with the files as they were when this was made.
pub(crate) struct Api {
    client: Client,
    headers: HeaderMap,
}

impl Api {
    /// Reads the files, on a thread where that delays nobody.
    pub(crate) async fn open(place: &Place) -> Result<Self, ApiError> {
        let failed = |text| ApiError { status: None, text };
        let place = place.clone();
        let read = tokio::task::spawn_blocking(move || place.connect()).await;
        let (client, token) = read.map_err(|e| failed(e.to_string()))?.map_err(failed)?;
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(JSON));
        if let Some(token) = token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| failed("the token is not one line of text".into()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(Self { client, headers })
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.call(Method::GET, path, JSON, None).await
    }

    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        form: &'static str,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let mut headers = self.headers.clone();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(form));
        let bytes = body.map(|body| body.to_string()).unwrap_or_default().into();
        let whence = format!("{method} {}{path}", self.client.target());
        let answer = self.client.send(method, path, &headers, bytes, LIMITS).await;
        let answer = answer.map_err(|e| ApiError { status: None, text: format!("{whence}: {e}") })?;
        let parsed = serde_json::from_slice::<Value>(&answer.body);
        if !answer.status.is_success() {
            let said = parsed.ok().and_then(|said| Some(said.get("message")?.as_str()?.to_owned()));
            let said = said.unwrap_or_else(|| format!("{whence}: {}", answer.status));
            return Err(ApiError { status: Some(answer.status), text: said.chars().take(500).collect() });
        }
        let bad = |e| ApiError { status: Some(answer.status), text: format!("{whence}: the answer is not JSON: {e}") };
        parsed.map_err(bad)
    }
}

/// A text in an object.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The objects of a list.
pub(crate) fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.get("items").and_then(Value::as_array).into_iter().flatten()
}
