//! When the sealed cache is written: soon after a change, many changes at once, and no more often than its size allows.

use super::{Contents, SUBSYSTEM};
use crate::Context;
use crate::cache::Cache;
use crate::status::AgentStatus;
use std::sync::Arc;
use std::time::Duration;

/// Changes within this time are written together.
const GATHER: Duration = Duration::from_millis(200);
/// Between two writes, at least.
const PAUSE: Duration = Duration::from_secs(1);
/// On average no more than this is written, bytes a second: 10,000 SVIDs are 20 MiB.
const BYTES_PER_SECOND: u64 = 128 << 10;

/// Keeps the cache on disk until shutdown, and once more then.
pub(crate) async fn keep(context: Arc<Context>, cache: Arc<Cache>, status: Arc<AgentStatus>) {
    // What it begins with is worth a write, too: with no entries there may never be a change.
    let mut begun = false;
    loop {
        let changed = async {
            if std::mem::replace(&mut begun, true) {
                cache.changed().await;
            }
        };
        let shutdown = tokio::select! {
            () = changed => tokio::select! {
                () = tokio::time::sleep(GATHER) => false,
                () = context.shutdown.cancelled() => true,
            },
            () = context.shutdown.cancelled() => true,
        };
        let bytes = write(&context, &cache, &status, false).await;
        if shutdown {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE + Duration::from_secs(bytes / BYTES_PER_SECOND)) => {}
            () = context.shutdown.cancelled() => {}
        }
    }
}

/// Writes all of it for the next agent, and nothing from then on.
pub(crate) async fn write_last(context: &Arc<Context>, cache: &Cache, status: &AgentStatus) {
    context.sealed.hand();
    write(context, cache, status, true).await;
}

async fn write(context: &Arc<Context>, cache: &Cache, status: &AgentStatus, last: bool) -> u64 {
    if !context.sealed.is_on(last) {
        return 0;
    }
    let Some(agent) = status.id() else { return 0 };
    let contents = Contents {
        snapshot: cache.snapshot(),
        jwts: cache.jwt.all(),
        wits: cache.wit.all(),
        last_sync: status.last_sync(),
        now: context.clock.now(),
    };
    let for_write = context.clone();
    let written = context.spawner.blocking(move || for_write.sealed.save(&agent, &contents, last)).await;
    match written {
        Ok(Ok(0)) => 0,
        Ok(Ok(bytes)) => {
            tracing::debug!(subsystem_name = SUBSYSTEM, bytes, "Sealed cache written");
            bytes
        }
        Ok(Err(error)) => {
            tracing::warn!(subsystem_name = SUBSYSTEM, %error, "Could not write the sealed cache");
            0
        }
        Err(_) => 0, // the panic was said
    }
}
