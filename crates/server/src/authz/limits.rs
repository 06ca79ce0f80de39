//! Rate limits per caller address. A call waits for its turn, as long as its own deadline allows.

use super::methods::RateGroup;
use finial_config::RateLimitSettings;
use finial_core::ErrorKind;
use finial_core::Fault;
use finial_runtime::{RateLimited, RateLimiter};
use std::net::IpAddr;
use std::time::Duration;

/// Addresses remembered per group; beyond that, idle ones are forgotten, and then newcomers are refused.
const ADDRESSES_MAX: usize = 16 * 1024;
/// How long a call without a deadline waits at most.
const WAIT_MAX: Duration = Duration::from_secs(60);

type Limiter = Option<RateLimiter<IpAddr>>;

/// One limiter per group; `None` where the configuration switched it off.
pub(crate) struct Limits {
    attest: Limiter,
    sign_x509: Limiter,
    sign_jwt: Limiter,
    sign_wit: Limiter,
    publish_key: Limiter,
    post_status: Limiter,
}

impl Limits {
    pub(crate) fn new(settings: RateLimitSettings) -> Self {
        let limiter = |on: bool, per_second| on.then(|| RateLimiter::new(per_second, ADDRESSES_MAX));
        Self {
            attest: limiter(settings.attestation, 1),
            sign_x509: limiter(settings.signing, 500),
            sign_jwt: limiter(settings.signing, 500),
            sign_wit: limiter(settings.signing, 500),
            publish_key: limiter(true, 500),
            post_status: limiter(true, 10),
        }
    }

    fn of(&self, group: RateGroup) -> Option<&RateLimiter<IpAddr>> {
        match group {
            RateGroup::Unlimited => None,
            RateGroup::Attest => self.attest.as_ref(),
            RateGroup::SignX509 => self.sign_x509.as_ref(),
            RateGroup::SignJwt => self.sign_jwt.as_ref(),
            RateGroup::SignWit => self.sign_wit.as_ref(),
            RateGroup::PublishKey => self.publish_key.as_ref(),
            RateGroup::PostStatus => self.post_status.as_ref(),
        }
    }

    /// Whether calls of the group are limited at all.
    pub(crate) fn are_on_for(&self, group: RateGroup) -> bool {
        self.of(group).is_some()
    }

    /// Takes `count` turns of `group` for `address`, waiting at most until the call's deadline.
    pub(crate) async fn take(
        &self,
        group: RateGroup,
        address: IpAddr,
        count: usize,
        remaining: Option<Duration>,
    ) -> Result<(), Fault> {
        let Some(limiter) = self.of(group) else { return Ok(()) };
        let asked = u32::try_from(count).unwrap_or(u32::MAX);
        let wait_max = remaining.unwrap_or(WAIT_MAX).min(WAIT_MAX);
        limiter.acquire(&address, asked, wait_max).await.map_err(|refused| {
            let message = match refused {
                RateLimited::OverBurst { .. } => refused.to_string(),
                RateLimited::TooLate => format!("rate: Wait(n={count}) would exceed context deadline"),
            };
            Fault::new(ErrorKind::Exhausted, message)
        })
    }
}
