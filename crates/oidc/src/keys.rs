//! The last key set, and how fresh it is.

use bytes::Bytes;
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
    /// Whether each key says what it is for.
    say_use: bool,
}

#[derive(Default)]
struct State {
    set: Option<Arc<KeySet>>,
    /// When the source last said what the keys are.
    heard: Option<UnixSeconds>,
}

/// The document of the keys.
pub(crate) struct KeySet {
    keys: Vec<Map<String, Value>>,
    /// The document, JSON.
    pub(crate) document: Bytes,
    /// When it came to be like this.
    pub(crate) changed: UnixSeconds,
}

impl KeySet {
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl Keys {
    /// Nothing is known yet. `say_use`: each key says `"use": "sig"`.
    pub fn new(clock: Arc<dyn Clock>, say_use: bool) -> Self {
        let began = clock.now();
        Self { state: Arc::default(), clock, began, say_use }
    }

    /// Takes the JWT keys of a bundle; those that cannot be written are left out and named in the log. Those that are
    /// tainted stay: tokens that they signed are out there until the authority is revoked.
    pub fn set(&self, bundle: &Bundle) {
        let mut keys = Vec::new();
        for authority in &bundle.jwt_authorities {
            match self.jwk(&authority.public_key, &authority.key_id) {
                Ok(jwk) => keys.push(jwk),
                Err(error) => tracing::warn!(%error, kid = authority.key_id, "Malformed public key in bundle"),
            }
        }
        let now = self.clock.now();
        self.with(|state| {
            if state.set.as_ref().is_none_or(|set| set.keys != keys) {
                // Two spaces, as SPIRE indents it; JSON values are always written.
                let document = serde_json::to_vec_pretty(&serde_json::json!({ "keys": keys })).unwrap_or_default();
                state.set = Some(Arc::new(KeySet { keys, document: document.into(), changed: now }));
            }
            state.heard = Some(now);
        });
    }

    pub(crate) fn get(&self) -> Option<Arc<KeySet>> {
        self.with(|state| state.set.clone())
    }

    /// Seconds since the source last spoke, or since the beginning; and whether it ever did.
    pub(crate) fn age(&self) -> (i64, bool) {
        let now = self.clock.now();
        self.with(|state| (now - state.heard.unwrap_or(self.began), state.heard.is_some()))
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn jwk(&self, public_key: &[u8], key_id: &str) -> Result<Map<String, Value>, KeyError> {
        let key = PublicKey::from_spki(public_key)?;
        let mut jwk = Map::new();
        if self.say_use {
            jwk.insert("use".into(), "sig".into());
        }
        for (name, value) in public_key_to_jwk(&key, Some(key_id)) {
            // go-jose's order: alg stands before the parts of the key.
            if matches!(name.as_str(), "x" | "n") {
                jwk.insert("alg".into(), key.default_algorithm().jwa().into());
            }
            jwk.insert(name, value);
        }
        Ok(jwk)
    }
}
