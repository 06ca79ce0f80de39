//! Rate limits per caller: by the SPIFFE ID that the caller's certificate proves, else by its address. A call waits for its
//! turn, as long as its own deadline allows.
//!
//! SPIRE counts by address alone, so that agents behind one gateway or load balancer take each other's turns. The rates are
//! SPIRE's. Strangers and members are kept apart: no crowd of addresses can push a member out of memory.

use super::methods::RateGroup;
use super::peer::Peer;
use crate::live::LiveSettings;
use finial_core::{ErrorKind, Fault, SpiffeId};
use finial_runtime::{RateLimited, RateLimiter};
use std::net::IpAddr;
use std::time::Duration;

/// Addresses remembered per group; beyond that, idle ones are forgotten, and then newcomers are refused.
const ADDRESSES_MAX: usize = 16 * 1024;
/// IDs remembered per group: a bucket is only kept while its caller is in debt, which few of a large fleet are at a time.
const MEMBERS_MAX: usize = 128 * 1024;
/// How long a call without a deadline waits at most.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// One rate, for each caller.
struct Limiter {
    members: RateLimiter<SpiffeId>,
    addresses: RateLimiter<IpAddr>,
}

impl Limiter {
    fn new(per_second: u32) -> Self {
        Self {
            members: RateLimiter::new(per_second, MEMBERS_MAX),
            addresses: RateLimiter::new(per_second, ADDRESSES_MAX),
        }
    }

    async fn acquire(&self, peer: &Peer, count: u32, wait_max: Duration) -> Result<(), RateLimited> {
        match (peer.id(), peer.ip()) {
            (Some(id), _) => self.members.acquire(id, count, wait_max).await,
            (None, Some(ip)) => self.addresses.acquire(&ip.to_canonical(), count, wait_max).await,
            // Who reaches the local socket is trusted with more than that.
            (None, None) => Ok(()),
        }
    }
}

/// One limiter per group.
pub(crate) struct Limits {
    live: LiveSettings,
    attest: Limiter,
    sign_x509: Limiter,
    sign_jwt: Limiter,
    sign_wit: Limiter,
    publish_key: Limiter,
    post_status: Limiter,
}

impl Limits {
    pub(crate) fn new(live: LiveSettings) -> Self {
        Self {
            live,
            attest: Limiter::new(1),
            sign_x509: Limiter::new(500),
            sign_jwt: Limiter::new(500),
            sign_wit: Limiter::new(500),
            publish_key: Limiter::new(500),
            post_status: Limiter::new(10),
        }
    }

    /// The group's limiter, unless the configuration has switched it off.
    fn of(&self, group: RateGroup) -> Option<&Limiter> {
        let on = self.live.now().rate_limit;
        match group {
            RateGroup::Unlimited => None,
            RateGroup::Attest => on.attestation.then_some(&self.attest),
            RateGroup::SignX509 => on.signing.then_some(&self.sign_x509),
            RateGroup::SignJwt => on.signing.then_some(&self.sign_jwt),
            RateGroup::SignWit => on.signing.then_some(&self.sign_wit),
            RateGroup::PublishKey => Some(&self.publish_key),
            RateGroup::PostStatus => Some(&self.post_status),
        }
    }

    /// Whether calls of the group are limited at all.
    pub(crate) fn are_on_for(&self, group: RateGroup) -> bool {
        self.of(group).is_some()
    }

    /// Takes `count` turns of `group` for the caller, waiting at most until the call's deadline.
    pub(crate) async fn take(
        &self,
        group: RateGroup,
        peer: &Peer,
        count: usize,
        remaining: Option<Duration>,
    ) -> Result<(), Fault> {
        let Some(limiter) = self.of(group) else { return Ok(()) };
        let asked = u32::try_from(count).unwrap_or(u32::MAX);
        let wait_max = remaining.unwrap_or(WAIT_MAX).min(WAIT_MAX);
        limiter.acquire(peer, asked, wait_max).await.map_err(|refused| {
            let message = match refused {
                RateLimited::OverBurst { .. } => refused.to_string(),
                RateLimited::TooLate => format!("rate: Wait(n={count}) would exceed context deadline"),
            };
            Fault::new(ErrorKind::Exhausted, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::peer::{Identity, LocalProcess};
    use super::*;
    use crate::live::Live;
    use finial_config::RateLimitSettings;

    fn member(name: &str, address: &str) -> Peer {
        let id = SpiffeId::parse(&format!("spiffe://example.org/spire/agent/{name}")).unwrap();
        let identity =
            Identity::Svid { id, serial: "1".into(), not_after: i64::MAX, follows: Box::default(), issuer: 0 };
        Peer::Remote { address: address.parse().unwrap(), identity }
    }

    fn stranger(address: &str) -> Peer {
        Peer::Remote { address: address.parse().unwrap(), identity: Identity::None }
    }

    async fn take(limits: &Limits, group: RateGroup, peer: &Peer, count: usize) -> bool {
        limits.take(group, peer, count, Some(Duration::ZERO)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn agents_behind_one_address_each_have_their_own_limit() {
        let limits = Limits::new(LiveSettings::new(Live::default()));
        let (one, two) = (member("one", "10.0.0.1:1000"), member("two", "10.0.0.1:1001"));
        assert!(take(&limits, RateGroup::SignX509, &one, 500).await);
        assert!(!take(&limits, RateGroup::SignX509, &one, 1).await, "its own limit holds");
        assert!(take(&limits, RateGroup::SignX509, &two, 500).await, "another agent behind the same address");
        let moved = member("one", "10.0.0.2:1000");
        assert!(!take(&limits, RateGroup::SignX509, &moved, 1).await, "another address is no way out");
        assert!(take(&limits, RateGroup::SignJwt, &one, 500).await, "each kind of signature has its own");
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_are_limited_by_address() {
        let limits = Limits::new(LiveSettings::new(Live::default()));
        assert!(take(&limits, RateGroup::Attest, &stranger("10.0.0.1:1"), 1).await);
        assert!(!take(&limits, RateGroup::Attest, &stranger("10.0.0.1:2"), 1).await);
        assert!(!take(&limits, RateGroup::Attest, &stranger("[::ffff:10.0.0.1]:3"), 1).await, "the same host");
        assert!(take(&limits, RateGroup::Attest, &stranger("10.0.0.2:1"), 1).await);
        assert!(take(&limits, RateGroup::Attest, &member("one", "10.0.0.1:4"), 1).await, "members are not strangers");
        let local = Peer::Local(LocalProcess::default());
        for _ in 0..3 {
            assert!(take(&limits, RateGroup::Attest, &local, 1).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn limits_are_switched_while_running() {
        let live = LiveSettings::new(Live::default());
        let limits = Limits::new(live.clone());
        let one = member("one", "10.0.0.1:1000");
        assert!(!take(&limits, RateGroup::SignX509, &one, 501).await);
        let off = RateLimitSettings { attestation: false, signing: false };
        assert!(live.set(Live { rate_limit: off, ..Live::default() }));
        assert!(take(&limits, RateGroup::SignX509, &one, 5000).await);
        assert!(!limits.are_on_for(RateGroup::Attest));
        assert!(limits.are_on_for(RateGroup::PostStatus), "the two keys switch their two groups only");
        assert!(live.set(Live::default()));
        assert!(!live.set(Live::default()), "nothing changed");
        assert!(!take(&limits, RateGroup::SignX509, &one, 501).await);
    }
}
