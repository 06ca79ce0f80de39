//! The two documents, and who may ask for them.

use crate::keys::Keys;
use bytes::Bytes;
use finial_config::OidcEndpoint;
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// RFC 9110 section 5.6.7.
const HTTP_DATE: &[BorrowedFormatItem<'static>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
const NEVER_CACHED: [(HeaderName, &str); 3] = [
    (header::CACHE_CONTROL, "no-cache, no-store, must-revalidate"),
    (header::PRAGMA, "no-cache"),
    (header::EXPIRES, "0"),
];

/// Answers requests.
pub(crate) struct Documents {
    keys: Keys,
    endpoint: OidcEndpoint,
    /// Whether requests come over TLS.
    tls: bool,
}

/// OpenID Connect Discovery 1.0, section 3: what is required, and what is true of a trust domain.
#[derive(Serialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
    authorization_endpoint: &'static str,
    response_types_supported: [&'static str; 1],
    subject_types_supported: [&'static str; 1],
    id_token_signing_alg_values_supported: [&'static str; 3],
}

impl Documents {
    /// `tls` tells whether the requests that will be answered come over TLS.
    pub(crate) fn new(keys: Keys, endpoint: OidcEndpoint, tls: bool) -> Self {
        Self { keys, endpoint, tls }
    }

    /// Answers `GET <prefix>/.well-known/openid-configuration` and `GET <prefix>/keys`.
    pub(crate) fn respond(&self, request: &Parts) -> Response<Full<Bytes>> {
        if self.endpoint.log_requests {
            let user_agent = text(&request.headers, header::USER_AGENT.as_str()).unwrap_or_default();
            tracing::debug!(method = %request.method, url = %request.uri, "user-agent" = user_agent, "Incoming request");
        }
        let path = request.uri.path();
        let answer = if path == self.path("/.well-known/openid-configuration") {
            Self::discovery
        } else if path == self.path("/keys") {
            Self::key_set
        } else {
            return error(StatusCode::NOT_FOUND, "404 page not found");
        };
        let mut response = match request.method {
            Method::GET => answer(self, request),
            _ => error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"),
        };
        // Browsers' relying parties read them too; there is nothing secret in public keys.
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        response
    }

    /// A path below the prefix.
    fn path(&self, path: &str) -> String {
        join(&self.endpoint.documents.path_prefix, path)
    }

    fn discovery(&self, request: &Parts) -> Response<Full<Bytes>> {
        let headers = &request.headers;
        let asked = text(headers, "x-forwarded-host").or_else(|| text(headers, "host"));
        let asked = asked.or_else(|| request.uri.authority().map(http::uri::Authority::as_str)).unwrap_or_default();
        let domain = domain_of(asked);
        if !domain.is_some_and(|domain| self.endpoint.domains.iter().any(|d| d == domain)) {
            let domain = domain.unwrap_or(asked);
            return error(StatusCode::BAD_REQUEST, &format!("domain {domain:?} is not allowed"));
        }
        let secure =
            self.tls || !self.endpoint.documents.allow_insecure_scheme || forwarded_proto(headers) == Some("https");
        let own = format!("{}://{asked}", if secure { "https" } else { "http" });
        let issuer = self.endpoint.documents.issuer.clone();
        let jwks_uri = match (&self.endpoint.documents.jwks_uri, &issuer) {
            (Some(uri), _) => uri.clone(),
            (None, Some(issuer)) => beside(issuer),
            (None, None) => format!("{own}{}", self.path("/keys")),
        };
        let prefix = match self.endpoint.documents.path_prefix.as_str() {
            "/" => "",
            prefix => prefix,
        };
        let document = serde_json::to_vec_pretty(&Discovery {
            issuer: issuer.unwrap_or_else(|| format!("{own}{prefix}")),
            jwks_uri,
            authorization_endpoint: "",
            response_types_supported: ["id_token"],
            subject_types_supported: ["public"],
            id_token_signing_alg_values_supported: ["RS256", "ES256", "ES384"],
        });
        match document {
            Ok(document) => json(document.into()),
            Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "failed to marshal document"),
        }
    }

    fn key_set(&self, request: &Parts) -> Response<Full<Bytes>> {
        let Some(set) = self.keys.get() else {
            return error(StatusCode::INTERNAL_SERVER_ERROR, "document not available");
        };
        if set.is_empty() {
            return error(StatusCode::NOT_IMPLEMENTED, "jwt not supported/enabled in this service");
        }
        let changed = OffsetDateTime::from_unix_timestamp(set.changed).ok();
        let changed = changed.and_then(|at| at.format(HTTP_DATE).ok()).and_then(|at| HeaderValue::from_str(&at).ok());
        let mut response = json(set.document.clone());
        if changed.is_some() && request.headers.get(header::IF_MODIFIED_SINCE) == changed.as_ref() {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.body_mut() = Full::default();
        }
        let headers = response.headers_mut();
        if let Some(changed) = changed {
            headers.insert(header::LAST_MODIFIED, changed);
        }
        for (name, value) in NEVER_CACHED {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// A path below a prefix that may end with a slash, or not begin with one.
fn join(prefix: &str, path: &str) -> String {
    let prefix = prefix.trim_matches('/');
    if prefix.is_empty() { path.to_owned() } else { format!("/{prefix}{path}") }
}

/// The keys beside an issuer's URL: `https://host/path` becomes `https://host/path/keys`.
fn beside(issuer: &str) -> String {
    let bare = issuer.split(['?', '#']).next().unwrap_or_default();
    format!("{}/keys", bare.trim_end_matches('/'))
}

/// The name in `name`, `name:port` or `[address]:port`. Anything else would become part of URLs whose host is another.
fn domain_of(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            (address, if after.is_empty() { None } else { Some(after.strip_prefix(':')?) })
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    port.is_none_or(|port| port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

/// What a proxy says of the scheme that it was asked by: RFC 7239, and the headers before it.
fn forwarded_proto(headers: &HeaderMap) -> Option<&'static str> {
    let said = text(headers, "x-forwarded-proto").or_else(|| text(headers, "x-forwarded-scheme"));
    let of_forwarded = || {
        let forwarded = text(headers, "forwarded")?.to_ascii_lowercase();
        let (_, proto) = forwarded.split_once("proto=")?;
        Some(proto.trim_start_matches('"').split([';', ',', '"']).next()?.trim().to_owned())
    };
    match said.map(str::to_ascii_lowercase).or_else(of_forwarded)?.as_str() {
        "https" => Some("https"),
        _ => Some("http"),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())
}

fn json(document: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(document));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// As Go's `http.Error`.
pub(crate) fn error(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    let mut response: Response<Full<Bytes>> = finial_runtime::http::Answer::text(status, line).into();
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;
