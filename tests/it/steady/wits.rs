//! WIT-SVIDs at a steady rate. No library speaks of them yet: the Workload API is asked directly.

use super::{Domain, FLOW, STEPS, Standing, Traffic};
use crate::answers::with_header;
use crate::wit::{keys, next};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use finial_core::{Clock, SystemClock};
use finial_crypto::verify_wit_svid;
use finial_net::client::uds_channel;
use finial_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use finial_proto::workload::{WitBundlesRequest, WitsvidRequest};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use testkit::eventually_within;
use tokio::time::MissedTickBehavior;

/// How often each agent is asked.
const PACE: Duration = Duration::from_millis(200);

/// What one of those who ask has seen.
#[derive(Default)]
struct Seen {
    tokens: u64,
    /// Which keys signed, in order.
    issuers: Vec<String>,
    /// The keys of the newest bundle.
    trusted: Vec<String>,
}

/// Asks each agent for tokens and for bundles, and verifies the tokens of all by each one's bundle.
pub(super) struct Wits {
    seen: Vec<Arc<Mutex<Seen>>>,
    asking: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Wits {
    pub(super) fn of(domain: &Domain) -> Self {
        let domain_id = domain.id();
        let stop = Arc::new(AtomicBool::new(false));
        let seen: Vec<Arc<Mutex<Seen>>> = domain.agents.iter().map(|_| Arc::default()).collect();
        let sockets: Vec<PathBuf> = domain.agents.iter().map(|agent| agent.socket()).collect();
        let asking = seen.iter().enumerate().map(|(at, seen)| {
            // The tokens of one agent are verified by the bundle of the next.
            let (own, other) = (sockets[at].clone(), sockets[(at + 1) % sockets.len()].clone());
            let (seen, stop, domain) = (seen.clone(), stop.clone(), domain_id.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(ask(own, other, &domain, &seen, &stop));
            })
        });
        Self { asking: asking.collect(), seen, stop }
    }

    fn everywhere(&self, what: &str, enough: impl Fn(&Seen) -> bool) {
        for (seen, asking) in self.seen.iter().zip(&self.asking) {
            eventually_within(FLOW, what, || {
                assert!(!asking.is_finished(), "a WIT-SVID was not to be had or did not verify");
                let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let told = format!("{} tokens, of {:?}; {:?} are trusted", seen.tokens, seen.issuers, seen.trusted);
                if enough(&seen) { Ok(()) } else { Err(told) }
            });
        }
    }

    /// As [`super::replace`] does with the other kinds.
    pub(super) fn replace(&self, domain: &Domain, traffic: &Traffic) {
        let old = domain.authorities("wit", Standing::Active);
        let mut new = Vec::new();
        for step in STEPS {
            domain.order("wit", step);
            match step.0 {
                "prepare" => {
                    new = domain.authorities("wit", Standing::Prepared);
                    self.everywhere("the new keys are trusted", |seen| new.iter().all(|id| seen.trusted.contains(id)));
                }
                "activate" => {}
                "taint" => {
                    let of_new = |seen: &Seen| seen.issuers.last().is_some_and(|id| new.contains(id));
                    self.everywhere("tokens are signed by the new keys", of_new);
                }
                _ => self.everywhere("the old keys are gone", |seen| old.iter().all(|id| !seen.trusted.contains(id))),
            }
            traffic.goes_on();
        }
    }

    pub(super) fn finish(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        for asking in self.asking {
            asking.join().expect("all WIT-SVIDs verify");
        }
        let seen = self.seen.iter().map(|seen| seen.lock().unwrap_or_else(PoisonError::into_inner).tokens);
        let _ = writeln!(std::io::stderr(), "\n{what}: WIT-SVIDs {}, denied 0", seen.sum::<u64>());
    }
}

/// The ID of the key that signed a token, by its header.
fn key_id(token: &str) -> String {
    let header = token.split('.').next().unwrap_or_default();
    let header = URL_SAFE_NO_PAD.decode(header).expect("a header");
    let header: serde_json::Value = serde_json::from_slice(&header).expect("JSON");
    header["kid"].as_str().unwrap_or_default().to_owned()
}

async fn ask(own: PathBuf, other: PathBuf, domain: &str, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut own = SpiffeWorkloadApiClient::new(uds_channel(own));
    let mut other = SpiffeWorkloadApiClient::new(uds_channel(other));
    let mut tick = tokio::time::interval(PACE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
        let svids = own.fetch_witsvid(with_header("workload", WitsvidRequest::default())).await.expect("WIT-SVIDs");
        let svids = next(&mut svids.into_inner()).await.svids;
        let bundles = other.fetch_wit_bundles(with_header("workload", WitBundlesRequest {})).await.expect("bundles");
        let bundles = next(&mut bundles.into_inner()).await.bundles;
        let (names, trusted) = keys(&bundles[domain]);
        let trusted = Arc::new(trusted);
        let wit = svids.first().expect("a WIT-SVID");
        if let Err(error) = verify_wit_svid(&wit.wit_svid, |_| Some(trusted.clone()), SystemClock.now()) {
            panic!("{error}: {} is not of {names:?}", key_id(&wit.wit_svid));
        }
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.tokens += 1;
        seen.trusted = names;
        let issuer = key_id(&wit.wit_svid);
        if seen.issuers.last() != Some(&issuer) {
            seen.issuers.push(issuer);
        }
    }
}
