//! The connection to the server above. It lives half as long as the SVID with which it was opened, and is opened anew, with an
//! SVID and roots just fetched, when a call over it fails: whatever was rotated or replaced meanwhile is known then. Without an
//! agent to give another SVID it goes on to that one's end.

use super::identity::{self, Roots};
use super::rpc_failure;
use finial_core::{Clock, SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::tls::{KeyExchange, PeerPolicy, ServerAuth, client_config_with};
use finial_net::client::tls_channel;
use finial_plugin::PluginError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// How long the server above may take for one answer.
const DEADLINE: Duration = Duration::from_secs(8);
/// How long an agent that gave no new SVID is left alone while the one before holds.
const AGAIN_SECONDS: i64 = 60;

/// Where the server above is, and who this one is there.
pub(super) struct Link {
    pub(super) address: String,
    pub(super) socket: PathBuf,
    pub(super) trust_domain: TrustDomain,
    pub(super) exchange: KeyExchange,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) open: Mutex<Option<Connection>>,
}

#[derive(Clone)]
pub(super) struct Connection {
    channel: Channel,
    id: SpiffeId,
    others: usize,
    renew_at: UnixSeconds,
    not_after: UnixSeconds,
}

#[cfg(test)]
impl Connection {
    /// Its SVID is to be renewed.
    pub(super) fn is_half_over(&mut self) {
        self.renew_at = 0;
    }
}

/// What a new SVID, new roots or another connection may mend.
fn may_be_stale(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unauthenticated | Code::PermissionDenied | Code::Unknown)
}

impl Link {
    /// Makes a call; `what` it is stands before the error.
    pub(super) async fn call<T, F>(&self, what: &str, call: impl Fn(Channel) -> F) -> Result<T, PluginError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let within = async |connection: &Connection| {
            let late = |_| Status::deadline_exceeded(format!("no answer within {} s", DEADLINE.as_secs()));
            tokio::time::timeout(DEADLINE, call(connection.channel.clone())).await.map_err(late)?
        };
        let (mut connection, is_new) = self.connection(what).await?;
        let mut answer = within(&connection).await;
        if !is_new && answer.as_ref().is_err_and(may_be_stale) {
            if let Some(open) = self.open.lock().await.as_mut() {
                // It stays until there is another: the agent may be away.
                open.renew_at = 0;
            }
            connection = self.connection(what).await?.0;
            answer = within(&connection).await;
        }
        answer.map(Response::into_inner).map_err(|status| self.failed(what, &connection, &status))
    }

    fn failed(&self, what: &str, Connection { id, others, .. }: &Connection, status: &Status) -> PluginError {
        let mut error = rpc_failure(&format!("{what}: upstream server {}", self.address), status);
        if status.code() == Code::PermissionDenied {
            // The flag makes CAs of all that an entry fits: not of one that was not meant.
            error.message.push_str(&match others {
                0 => format!("; this server is {id} there, whose entry needs the downstream flag"),
                _ => format!(
                    "; this server has {} SVIDs there and is {id}: its process must fit the selectors of one entry \
                     alone, the one with the downstream flag",
                    others + 1
                ),
            });
        }
        error
    }

    /// The connection, and whether it was opened just now.
    async fn connection(&self, what: &str) -> Result<(Connection, bool), PluginError> {
        let mut open = self.open.lock().await;
        let now = self.clock.now();
        if let Some(connection) = open.as_ref().filter(|connection| now < connection.renew_at) {
            return Ok((connection.clone(), false));
        }
        let old = open.as_mut().filter(|old| now < old.not_after);
        match (self.connect(now, old.is_some()).await, old) {
            (Ok(connection), _) => {
                *open = Some(connection.clone());
                Ok((connection, true))
            }
            // The agent is away. What it gave last still holds.
            (Err(error), Some(old)) => {
                old.renew_at = now.saturating_add(AGAIN_SECONDS).min(old.not_after);
                tracing::warn!(%error, "No new SVID for the upstream server; the one before is used while it lasts");
                Ok((old.clone(), false))
            }
            (Err(error), None) => Err(PluginError { message: format!("{what}: {}", error.message), ..error }),
        }
    }

    /// With a new SVID; `holds`: there is one that can still be used.
    async fn connect(&self, now: UnixSeconds, holds: bool) -> Result<Connection, PluginError> {
        let identity = identity::fetch(&self.socket, &self.trust_domain, holds).await?;
        let server = ServerAuth::Spiffe {
            bundles: Arc::new(Roots(self.trust_domain.clone(), identity.roots)),
            policy: PeerPolicy::Exact(self.trust_domain.server_id()),
        };
        let tls = client_config_with(self.exchange, Some(Arc::new(identity.tls)), server, self.clock.clone());
        let tls = tls.map_err(|e| PluginError::internal(format!("error applying TLS policy: {e}")))?;
        let half = identity.not_after.saturating_sub(now) / 2;
        Ok(Connection {
            channel: tls_channel(&self.address, Arc::new(tls)),
            id: identity.id,
            others: identity.others,
            renew_at: now.saturating_add(half),
            not_after: identity.not_after,
        })
    }
}
