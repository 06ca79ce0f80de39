//! The authority's door: our own HTTPS client, with its limits, under instant-acme.

use bytes::Bytes;
use finial_net::rest::{Client, Limits};
use http::header::{CONTENT_TYPE, USER_AGENT};
use http::uri::{PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::ClientConfig;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

const LIMITS: Limits = Limits { time: Duration::from_secs(30), body: 1 << 20 };

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
            // Ours names who asks.
            head.headers.remove(USER_AGENT);
            let client = client(&head.uri, tls).map_err(|e| Error::Other(e.into()))?;
            let path = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
            let answer = client.send(head.method, path, &head.headers, body, LIMITS).await;
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

/// Of who is asked for this URL: one of the web alone, over TLS (RFC 8555 section 6.1).
fn client(uri: &Uri, tls: Arc<ClientConfig>) -> Result<Client, String> {
    let authority = uri.authority().filter(|_| uri.scheme() == Some(&Scheme::HTTPS));
    let authority = authority.ok_or_else(|| format!("{:?} is not an https URL with a host", uri.to_string()))?;
    Client::to(&format!("https://{authority}"), tls)
}
