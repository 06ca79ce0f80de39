//! Tells plugins of the trust domain's bundle: notifiers when the server begins and at each change, bundle publishers also in
//! between, so that what failed, or what somebody else changed, is made good.

use crate::plugin_host::within;
use crate::publish::BundleFeed;
use finial_core::Bundle;
use finial_plugin::{BundlePublisher, Notifier, PluginError, PluginKind, ServerPlugins};
use finial_runtime::Shutdown;
use futures::future::{join_all, join3};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a plugin may take for one bundle.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often publishers are asked when nothing has changed.
const REFRESH: Duration = Duration::from_secs(30);

/// One notifier or more would not have the server begin.
#[derive(Debug, thiserror::Error)]
#[error("one or more notifiers returned an error: {}", self.texts())]
pub struct NotifyError(Vec<PluginError>);

impl NotifyError {
    fn texts(&self) -> String {
        self.0.iter().map(PluginError::to_string).collect::<Vec<_>>().join("\n")
    }
}

/// Who is to be told.
pub(crate) struct Told {
    notifiers: Vec<Arc<dyn Notifier>>,
    publishers: Vec<Arc<dyn BundlePublisher>>,
    feed: Arc<BundleFeed>,
    /// What the notifiers were told last.
    last: Option<Bundle>,
}

impl Told {
    pub(crate) fn new(plugins: &ServerPlugins, feed: Arc<BundleFeed>) -> Self {
        let (notifiers, publishers) = (plugins.notifiers.clone(), plugins.bundle_publishers.clone());
        Self { notifiers, publishers, feed, last: None }
    }

    /// Tells notifiers that the server begins. They may be against it.
    pub(crate) async fn begin(&mut self) -> Result<(), NotifyError> {
        self.last = own(&self.feed);
        match &self.last {
            Some(bundle) => notify(&self.notifiers, true, |notifier| notifier.bundle_loaded(bundle)).await,
            None => Ok(()),
        }
    }

    /// Tells everybody, until shutdown.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let Self { notifiers, publishers, feed, last } = self;
        let publishing = join_all(publishers.iter().map(|publisher| publish(&**publisher, &feed)));
        let attending = join_all(notifiers.iter().map(|notifier| notifier.attend()));
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = join3(follow(&notifiers, &feed, last), publishing, attending) => {}
        }
    }
}

/// The own bundle as the datastore has it.
fn own(feed: &BundleFeed) -> Option<Bundle> {
    feed.own().map(|own| own.stored().clone())
}

/// Waits for a change of any bundle.
async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        // Nothing changes any more.
        std::future::pending::<()>().await;
    }
}

/// Never ends. What failed is told again after a while: SPIRE's server waits for the next change, which may be days away.
async fn follow(notifiers: &[Arc<dyn Notifier>], feed: &BundleFeed, mut last: Option<Bundle>) {
    let mut changes = feed.changes();
    // What changed before this began to listen is told now.
    changes.mark_changed();
    let mut failed = false;
    loop {
        if failed {
            let _ = tokio::time::timeout(REFRESH, changed(&mut changes)).await;
        } else {
            changed(&mut changes).await;
        }
        let bundle = own(feed);
        if bundle == last && !failed {
            continue;
        }
        failed = false;
        if let Some(bundle) = &bundle
            && let Err(error) = notify(notifiers, false, |notifier| notifier.bundle_updated(bundle)).await
        {
            tracing::warn!(subsystem_name = "ca_manager", %error, "Failed to notify on bundle update");
            failed = true;
        }
        last = bundle;
    }
}

async fn notify<'a, F>(
    notifiers: &'a [Arc<dyn Notifier>],
    advise: bool,
    tell: impl Fn(&'a dyn Notifier) -> F,
) -> Result<(), NotifyError>
where
    F: Future<Output = Result<(), PluginError>>,
{
    let event = if advise { "bundle loaded" } else { "bundle updated" };
    let told = join_all(notifiers.iter().map(async |notifier| {
        let result = within(DEADLINE, (PluginKind::Notifier, notifier.name()), tell(&**notifier)).await;
        let (subsystem_name, notifier) = ("ca_manager", notifier.name());
        match &result {
            Ok(()) => tracing::debug!(subsystem_name, notifier, event, "Notifier handled event"),
            Err(error) if advise => {
                tracing::error!(subsystem_name, notifier, event, %error, "Notifier failed to handle event")
            }
            Err(error) => tracing::warn!(subsystem_name, notifier, event, %error, "Notifier failed to handle event"),
        }
        result
    }));
    let errors: Vec<_> = told.await.into_iter().filter_map(Result::err).collect();
    if errors.is_empty() { Ok(()) } else { Err(NotifyError(errors)) }
}

/// Never ends. Each publisher goes its own pace: one that hangs keeps no other waiting.
async fn publish(publisher: &dyn BundlePublisher, feed: &BundleFeed) {
    let mut changes = feed.changes();
    let whose = (PluginKind::BundlePublisher, publisher.name());
    loop {
        changes.mark_unchanged();
        let bundle = own(feed);
        if let Some(bundle) = &bundle
            && let Err(error) = within(DEADLINE, whose, publisher.publish(bundle)).await
        {
            let name = publisher.name();
            tracing::error!(subsystem_name = "bundle_publishing", BundlePublisher = name, %error, "Failed to publish bundle");
        }
        let another = async {
            while own(feed) == bundle {
                changed(&mut changes).await;
            }
        };
        let _ = tokio::time::timeout(REFRESH, another).await;
    }
}

#[cfg(test)]
#[path = "notify_tests.rs"]
mod tests;
