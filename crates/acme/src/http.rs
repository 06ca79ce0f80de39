//! The authority's door: our own HTTPS client, with its limits, under instant-acme.

use bytes::Bytes;
use finial_net::https::{self, FetchLimits};
use http::header::{CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::ClientConfig;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

const LIMITS: FetchLimits = FetchLimits { time: Duration::from_secs(30), body: 1 << 20 };

/// Asks over a connection of its own each time: an order has a dozen questions, every other month.
pub(crate) struct Door(pub(crate) Arc<ClientConfig>);

impl HttpClient for Door {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let tls = self.0.clone();
        Box::pin(async move {
            let (mut head, body) = request.into_parts();
            let body = body.collect().await.map_err(|e| Error::Other(e.into()))?.to_bytes();
            let ours = HeaderValue::from_static(concat!("finial/", env!("CARGO_PKG_VERSION")));
            head.headers.insert(USER_AGENT, ours);
            let answer = https::send(Request::from_parts(head, body), tls, LIMITS).await;
            let answer = answer.map_err(|e| Error::Other(Box::new(e)))?;
            // Errors of ACME say what is wrong; those of a proxy on the way, or of a path that leads nowhere, do not.
            let kind = answer.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
            if !answer.status.is_success() && !kind.contains("json") {
                return Err(Error::Other(format!("HTTP status {}", answer.status).into()));
            }
            let mut response = Response::new(Full::new(answer.body));
            (*response.status_mut(), *response.headers_mut()) = (answer.status, answer.headers);
            Ok(BytesResponse::from(response))
        })
    }
}
