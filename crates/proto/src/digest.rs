//! Whether two sets of entries are the same, told by a few numbers: what `finial.server.sync.v1` compares.
//!
//! Not against forgery: who could make two entries collide decides what entries there are.

/// Most buckets that a request may have.
pub const BUCKETS_MAX: usize = 1 << 16;
/// Entries that share a bucket, about: all of them are sent again when one differs.
const PER_BUCKET: usize = 8;

/// Sums of the digests of entries, bucket by bucket. The number of buckets is a power of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests(Vec<u64>);

/// splitmix64's last step: each bit of `x` changes half of the result's.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The digest of an entry's ID, whose lowest bits name its bucket.
pub fn id_digest(id: &str) -> u64 {
    mix(id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
}

/// A 64-bit digest of any bytes, to tell whether they changed.
pub fn of_bytes(bytes: &[u8]) -> u64 {
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)))
}

/// In which of `buckets` (a power of two) the entry is.
pub fn bucket_of(id: &str, buckets: usize) -> usize {
    let low = usize::try_from(id_digest(id) & 0xffff_ffff).unwrap_or_default();
    low & buckets.saturating_sub(1)
}

impl Digests {
    /// Of nothing, in `buckets`, which is rounded up to a power of two within 1 and [`BUCKETS_MAX`].
    pub fn new(buckets: usize) -> Self {
        Self(vec![0; buckets.clamp(1, BUCKETS_MAX).next_power_of_two()])
    }

    /// For about so many entries.
    pub fn sized_for(entries: usize) -> Self {
        Self::new(entries / PER_BUCKET)
    }

    /// As they came; `None` if their number is not a power of two within [`BUCKETS_MAX`].
    pub fn received(sums: Vec<u64>) -> Option<Self> {
        (sums.len().is_power_of_two() && sums.len() <= BUCKETS_MAX).then_some(Self(sums))
    }

    /// Adds an entry.
    pub fn add(&mut self, id: &str, revision_number: i64, created_at: i64) {
        let id = id_digest(id);
        let entry = mix(mix(id ^ revision_number.cast_unsigned()) ^ created_at.cast_unsigned());
        let low = usize::try_from(id & 0xffff_ffff).unwrap_or_default();
        let mask = self.0.len().saturating_sub(1);
        if let Some(sum) = self.0.get_mut(low & mask) {
            *sum = sum.wrapping_add(entry);
        }
    }

    /// How many buckets there are.
    pub fn buckets(&self) -> usize {
        self.0.len()
    }

    /// The sums.
    pub fn into_inner(self) -> Vec<u64> {
        self.0
    }

    /// Which buckets differ; both have the same number.
    pub fn differing(&self, other: &Self) -> Vec<u32> {
        let pairs = self.0.iter().zip(&other.0).enumerate();
        pairs.filter(|(_, (a, b))| a != b).filter_map(|(at, _)| u32::try_from(at).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The contract's words, for who implements it elsewhere.
    #[test]
    fn the_numbers_are_those_of_the_contract() {
        assert_eq!(id_digest(""), mix(0xcbf2_9ce4_8422_2325));
        assert_eq!(id_digest("e1"), id_digest("e1"));
        let mut digests = Digests::new(1);
        digests.add("e1", 3, 5);
        assert_eq!(digests.into_inner(), [mix(mix(id_digest("e1") ^ 3) ^ 5)]);
    }

    #[test]
    fn only_powers_of_two_are_received() {
        assert!(Digests::received(vec![]).is_none());
        assert!(Digests::received(vec![0; 3]).is_none());
        assert!(Digests::received(vec![0; 4]).is_some());
        assert!(Digests::received(vec![0; 2 * BUCKETS_MAX]).is_none());
        assert_eq!(Digests::sized_for(0).buckets(), 1);
        assert_eq!(Digests::sized_for(usize::MAX).buckets(), BUCKETS_MAX);
    }

    proptest! {
        /// What differs lies in differing buckets, and nothing differs between equal sets, whatever their order.
        #[test]
        fn buckets_differ_exactly_where_entries_do(
            ours in proptest::collection::btree_map("[a-c]{1,3}", (0i64..3, 0i64..3), 0..40),
            theirs in proptest::collection::btree_map("[a-c]{1,3}", (0i64..3, 0i64..3), 0..40),
            size in 0usize..40,
        ) {
            let sums = |set: &BTreeMap<String, (i64, i64)>, reversed: bool| {
                let mut digests = Digests::new(size);
                let add = |(id, (r, c)): (&String, &(i64, i64))| digests.add(id, *r, *c);
                if reversed { set.iter().rev().for_each(add) } else { set.iter().for_each(add) }
                digests
            };
            prop_assert_eq!(sums(&ours, false), sums(&ours, true));
            let differing = sums(&ours, false).differing(&sums(&theirs, false));
            let mut expected: Vec<u32> = ours.keys().chain(theirs.keys())
                .filter(|id| ours.get(*id) != theirs.get(*id))
                .map(|id| bucket_of(id, Digests::new(size).buckets()) as u32)
                .collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(differing, expected);
        }
    }
}
