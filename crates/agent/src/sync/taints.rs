//! X.509 authorities that are not to be used any more, and which SVIDs that concerns.
//!
//! A server that still signs with such an authority would give the same again: it is asked once, and what it answers counts as
//! known. But a taint can be taken back, and come again later: then it is asked again.

/// Their key IDs, each with the round in which it became known.
#[derive(Debug, Default)]
pub(crate) struct Taints {
    round: u32,
    keys: Vec<(Vec<u8>, u32)>,
}

impl Taints {
    /// These are all, from now on.
    pub(crate) fn set(&mut self, keys: impl IntoIterator<Item = Vec<u8>>) {
        let (round, known) = (self.round.saturating_add(1), std::mem::take(&mut self.keys));
        let since = |key: &Vec<u8>| known.iter().find(|(known, _)| known == key).map_or(round, |(_, since)| *since);
        self.keys = keys.into_iter().map(|key| (since(&key), key)).map(|(since, key)| (key, since)).collect();
        self.round = round;
    }

    /// The present round: what is issued now was issued in spite of all that is known.
    pub(crate) fn round(&self) -> u32 {
        self.round
    }

    /// Whether one of these keys became tainted after that round.
    pub(crate) fn concern<K: AsRef<[u8]>>(&self, signed_by: &[K], issued_in: u32) -> bool {
        let is_new = |key: &K| self.keys.iter().any(|(known, since)| known == key.as_ref() && *since > issued_in);
        signed_by.iter().any(is_new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_issued_in_spite_of_a_taint_is_left_alone_until_the_taint_comes_again() {
        let (mut taints, key) = (Taints::default(), vec![1]);
        let concerns = |taints: &Taints, issued_in| taints.concern(&[[1u8]], issued_in);
        assert!(!concerns(&taints, 0));
        taints.set([key.clone()]);
        let round = taints.round();
        assert!(concerns(&taints, 0) && !concerns(&taints, round));
        taints.set([key.clone(), vec![2]]);
        assert!(!concerns(&taints, round), "another's taint changes nothing");
        assert!(taints.concern(&[[2u8]], round));
        taints.set([]);
        assert!(!concerns(&taints, 0));
        taints.set([key]);
        assert!(concerns(&taints, round));
    }
}
