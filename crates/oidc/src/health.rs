//! Answers to probes: whether the keys are fresh.

use crate::documents::error;
use crate::keys::Keys;
use bytes::Bytes;
use finial_config::OidcHealth;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use http_body_util::Full;
use std::time::Duration;

/// Keys may be at least this old.
const THRESHOLD_MIN: Duration = Duration::from_secs(180);

pub(crate) struct Probes {
    keys: Keys,
    paths: OidcHealth,
    /// How old the keys may be.
    threshold_seconds: i64,
}

impl Probes {
    pub(crate) fn new(keys: Keys, paths: OidcHealth, poll_interval: Duration) -> Self {
        // Five polls may fail. SPIRE means that, too, but lets one interval pass where five are more than the least.
        let threshold = poll_interval.saturating_mul(5).max(THRESHOLD_MIN);
        Self { keys, paths, threshold_seconds: i64::try_from(threshold.as_secs()).unwrap_or(i64::MAX) }
    }

    pub(crate) fn respond(&self, request: &Parts) -> Response<Full<Bytes>> {
        let (age, known) = self.keys.age();
        let fresh = age < self.threshold_seconds;
        let path = request.uri.path();
        let well = if path == self.paths.ready_path {
            known && fresh
        } else if path == self.paths.live_path {
            fresh
        } else {
            return error(StatusCode::NOT_FOUND, "404 page not found");
        };
        if request.method != Method::GET {
            return error(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
        }
        let mut response = Response::new(Full::default());
        if !well {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        response
    }
}
