//! Bundles as streams send them, made once for all streams.

use crate::publish::{BundleFeed, PublishedBundle};
use finial_proto::convert::bundle_to_proto;
use finial_proto::{digest, types};
use prost::Message;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// One bundle.
pub(super) struct WireBundle {
    of: Arc<PublishedBundle>,
    pub(super) proto: types::Bundle,
    /// Differs when the content does; the same at all servers.
    pub(super) version: u64,
}

impl WireBundle {
    fn new(of: &Arc<PublishedBundle>) -> Self {
        let proto = bundle_to_proto(&of.bundle);
        let version = digest::of_bytes(&proto.encode_to_vec());
        Self { of: of.clone(), proto, version }
    }
}

/// By bare trust domain name.
pub(super) type Made = BTreeMap<Box<str>, Arc<WireBundle>>;

/// All bundles.
pub(super) struct WireBundles {
    feed: Arc<BundleFeed>,
    seen: watch::Receiver<u64>,
    /// With the number of the change after which it was made.
    made: Mutex<(Option<u64>, Arc<Made>)>,
}

impl WireBundles {
    pub(super) fn new(feed: Arc<BundleFeed>) -> Self {
        Self { seen: feed.changes(), feed, made: Mutex::default() }
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.feed.changes()
    }

    /// The own trust domain's bare name.
    pub(super) fn own(&self) -> &str {
        self.feed.trust_domain().as_str()
    }

    /// As they are now.
    pub(super) fn now(&self) -> Arc<Made> {
        let number = *self.seen.borrow();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0 != Some(number) {
            let all = self.feed.all();
            let fresh = all.iter().map(|(name, bundle)| {
                let known = made.1.get(name).filter(|known| Arc::ptr_eq(&known.of, bundle));
                (name.clone(), known.map_or_else(|| Arc::new(WireBundle::new(bundle)), Arc::clone))
            });
            *made = (Some(number), Arc::new(fresh.collect()));
        }
        made.1.clone()
    }
}
