//! The last key set, and how fresh it is.

use finial_core::{Bundle, Clock, UnixSeconds};
use finial_crypto::bundle::public_key_to_jwk;
use finial_crypto::{KeyError, PublicKey};
use serde_json::{Map, Value};
use std::sync::{Arc, Mutex, PoisonError};

/// The last key set of a source. Clones share it.
#[derive(Clone)]
pub struct Keys {
    state: Arc<Mutex<State>>,
    clock: Arc<dyn Clock>,
    /// When this began.
    began: UnixSeconds,
}

#[derive(Default)]
struct State {
    set: Option<Arc<KeySet>>,
    /// When the source last said what the keys are.
    heard: Option<UnixSeconds>,
    /// The source tells each change by itself, so that no word means no change.
    told: bool,
}

/// Keys as JWKs, without `use`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KeySet {
    pub(crate) keys: Vec<Map<String, Value>>,
    /// When it came to be like this.
    pub(crate) changed: UnixSeconds,
}

impl Keys {
    /// Nothing is known yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let began = clock.now();
        Self { state: Arc::default(), clock, began }
    }

    /// Takes the JWT keys of a bundle; those that cannot be written are left out and named in the log. Those that are
    /// tainted stay: tokens that they signed are out there until the authority is revoked.
    pub fn set(&self, bundle: &Bundle) {
        let mut keys = Vec::new();
        for authority in &bundle.jwt_authorities {
            match jwk(&authority.public_key, &authority.key_id) {
                Ok(jwk) => keys.push(jwk),
                Err(error) => tracing::warn!(%error, kid = authority.key_id, "Malformed public key in bundle"),
            }
        }
        let now = self.clock.now();
        self.with(|state| {
            if state.set.as_ref().is_none_or(|set| set.keys != keys) {
                state.set = Some(Arc::new(KeySet { keys, changed: now }));
            }
            state.heard = Some(now);
        });
    }

    /// Whether the source now tells changes by itself.
    pub fn told(&self, told: bool) {
        let now = self.clock.now();
        self.with(|state| {
            if state.told && !told {
                state.heard = Some(now);
            }
            state.told = told;
        });
    }

    pub(crate) fn get(&self) -> Option<Arc<KeySet>> {
        self.with(|state| state.set.clone())
    }

    /// Seconds since the source last spoke, or since the beginning; and whether it ever did.
    pub(crate) fn age(&self) -> (i64, bool) {
        let now = self.clock.now();
        self.with(|state| match state.heard {
            Some(_) if state.told => (0, true),
            Some(heard) => (now - heard, true),
            None => (now - self.began, false),
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn jwk(public_key: &[u8], key_id: &str) -> Result<Map<String, Value>, KeyError> {
    let key = PublicKey::from_spki(public_key)?;
    let mut jwk = Map::new();
    for (name, value) in public_key_to_jwk(&key, Some(key_id)) {
        // go-jose's order: alg stands before the parts of the key.
        if matches!(name.as_str(), "x" | "n") {
            jwk.insert("alg".into(), key.default_algorithm().jwa().into());
        }
        jwk.insert(name, value);
    }
    Ok(jwk)
}
