//! Who fetched which version of our bundle from the bundle endpoint: to be looked at while authorities are replaced.

use finial_core::UnixSeconds;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// So many are remembered; of more, those that came last.
const PEERS_MAX: usize = 256;
/// Who has not come for so long, in seconds, has gone: nobody's refresh hint is longer in practice.
const KEPT_SECONDS: i64 = 3600;
/// Most of what a program says of itself.
const USER_AGENT_CHARS_MAX: usize = 80;

/// Somebody who fetches our bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerSeen {
    /// Where from.
    pub(crate) address: IpAddr,
    /// What the program calls itself, without control characters; not to be trusted.
    pub(crate) user_agent: String,
    /// Of the bundle that it got last.
    pub(crate) sequence_number: u64,
    /// When that was.
    pub(crate) seen_at: UnixSeconds,
}

/// All of them, by address and program. Anybody may ask at the endpoint, so that it is bounded.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<HashMap<(IpAddr, String), (u64, UnixSeconds)>>);

impl Peers {
    fn lock(&self) -> MutexGuard<'_, HashMap<(IpAddr, String), (u64, UnixSeconds)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody was sent the bundle of this number.
    pub(crate) fn note(&self, address: IpAddr, user_agent: &str, sequence_number: u64, now: UnixSeconds) {
        let user_agent = user_agent.chars().filter(|c| !c.is_control()).take(USER_AGENT_CHARS_MAX).collect();
        let mut peers = self.lock();
        let key = (address.to_canonical(), user_agent);
        if peers.len() >= PEERS_MAX && !peers.contains_key(&key) {
            let oldest = peers.iter().min_by_key(|(_, (_, seen_at))| *seen_at).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| peers.remove(&oldest));
        }
        peers.insert(key, (sequence_number, now));
    }

    /// Those who came within the last hour, by address.
    pub(crate) fn list(&self, now: UnixSeconds) -> Vec<PeerSeen> {
        let mut peers = self.lock();
        peers.retain(|_, (_, seen_at)| now.saturating_sub(*seen_at) < KEPT_SECONDS);
        let seen = peers.iter().map(|((address, user_agent), (sequence_number, seen_at))| PeerSeen {
            address: *address,
            user_agent: user_agent.clone(),
            sequence_number: *sequence_number,
            seen_at: *seen_at,
        });
        let mut seen: Vec<_> = seen.collect();
        seen.sort_by(|a, b| (a.address, &a.user_agent).cmp(&(b.address, &b.user_agent)));
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn address(number: u32) -> IpAddr {
        Ipv4Addr::from(number).into()
    }

    #[test]
    fn the_last_that_each_got_counts_for_an_hour() {
        let peers = Peers::default();
        peers.note(address(1), "spire\u{1b}[2J", 4, 100);
        peers.note(address(2), "", 4, 150);
        peers.note(address(1), "spire\u{1b}[2J", 5, 200);
        let first = PeerSeen { address: address(1), user_agent: "spire[2J".into(), sequence_number: 5, seen_at: 200 };
        let second = PeerSeen { address: address(2), user_agent: String::new(), sequence_number: 4, seen_at: 150 };
        assert_eq!(peers.list(201), [first.clone(), second]);
        assert_eq!(peers.list(150 + KEPT_SECONDS), [first], "and then it has gone");
        assert!(peers.list(200 + KEPT_SECONDS).is_empty());
    }

    #[test]
    fn many_strangers_push_out_those_who_came_first_only() {
        let peers = Peers::default();
        for number in 0..2000 {
            peers.note(address(number), &"x".repeat(9000), 1, i64::from(number));
        }
        let left = peers.list(2000);
        assert_eq!(left.len(), PEERS_MAX);
        assert!(left.iter().all(|peer| peer.seen_at >= 2000 - 256 && peer.user_agent.len() == USER_AGENT_CHARS_MAX));
    }
}
