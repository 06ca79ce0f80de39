//! A limited number of places, of which nobody may take all.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The places. `K` says whose one is: a user ID, an address.
#[derive(Debug)]
pub struct Places<K> {
    all: usize,
    each: usize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    total: usize,
    by_key: HashMap<K, usize>,
}

impl<K: Clone + Eq + Hash> Places<K> {
    /// `all` places, of which `each` may have so many.
    pub fn new(all: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { all, each, taken: Mutex::new(Taken { total: 0, by_key: HashMap::new() }) })
    }

    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, unless all are taken or `key` has as many as one may have.
    pub fn take(self: &Arc<Self>, key: K) -> Option<Place<K>> {
        self.count(key, self.each)
    }

    /// A place for one who may have as many as there are, because he speaks for others.
    pub fn take_for_others(self: &Arc<Self>, key: K) -> Option<Place<K>> {
        self.count(key, usize::MAX)
    }

    fn count(self: &Arc<Self>, key: K, each: usize) -> Option<Place<K>> {
        let mut taken = self.taken();
        let own = taken.by_key.get(&key).copied().unwrap_or_default();
        if taken.total >= self.all || own >= each {
            return None;
        }
        taken.total += 1;
        taken.by_key.insert(key.clone(), own + 1);
        Some(Place { places: self.clone(), key })
    }
}

/// A place; given back on drop.
#[derive(Debug)]
pub struct Place<K: Clone + Eq + Hash> {
    places: Arc<Places<K>>,
    key: K,
}

impl<K: Clone + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.total -= 1;
        if let Some(count) = taken.by_key.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.by_key.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_in_all_and_for_each_and_given_back() {
        let places = Places::new(3, 2);
        let first = places.take(1).unwrap();
        let second = places.take(1).unwrap();
        assert!(places.take(1).is_none(), "nobody can take all");
        drop((second, places.take_for_others(1).expect("but one who speaks for others can")));
        let _second = places.take(1).unwrap();
        let other = places.take(2).unwrap();
        assert!(places.take(3).is_none() && places.take_for_others(1).is_none(), "full");
        drop(other);
        drop(first);
        assert!(places.take(1).is_some());
        assert_eq!(places.taken().by_key.len(), 1, "no leftovers");
    }
}
