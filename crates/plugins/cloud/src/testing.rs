//! Parts for tests.

use crate::world::World;
use finial_core::{Clock, KeyType, ManualClock, SystemClock, TrustDomain};
use finial_crypto::{CaTemplate, DistinguishedName, PrivateKey, SerialNumber, X509Ca, create_ca_csr};
use finial_hcl::Value;
use finial_net::rest::Trust;
use finial_plugin::PluginContext;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The time of contract tests.
pub(crate) const NOW: i64 = 1_700_000_000;

/// At [`NOW`], with that environment and nothing else.
pub(crate) fn world(env: &[(&str, &str)]) -> World {
    world_at(Arc::new(ManualClock::at(NOW)), env)
}

/// The same with the machine's clock, for real parts.
pub(crate) fn world_now(env: &[(&str, &str)]) -> World {
    world_at(Arc::new(SystemClock), env)
}

pub(crate) fn world_at(clock: Arc<dyn Clock>, env: &[(&str, &str)]) -> World {
    let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    World::with(Arc::new(move |name| env.get(name).cloned()), clock, &Trust::Anyone).unwrap()
}

pub(crate) fn context_at(clock: Arc<dyn Clock>) -> PluginContext {
    PluginContext { trust_domain: TrustDomain::parse("example.org").unwrap(), clock }
}

pub(crate) fn context() -> PluginContext {
    context_at(Arc::new(ManualClock::at(NOW)))
}

pub(crate) fn data(text: &str) -> Value {
    finial_hcl::parse(text).unwrap()
}

/// A root with its key.
pub(crate) async fn root(now: i64) -> (X509Ca, PrivateKey) {
    let key = PrivateKey::generate(KeyType::EcP384).unwrap();
    let template = CaTemplate {
        subject: &DistinguishedName::of(&["US"], &["UPSTREAM"], ""),
        trust_domain: &TrustDomain::parse("local").unwrap(),
        not_before: now - 10,
        not_after: now + 1_000_000,
        serial: SerialNumber::random(),
    };
    (X509Ca::self_sign(Arc::new(key.clone()), &template).await.unwrap(), key)
}

/// What a server asks an upstream authority to sign.
pub(crate) async fn csr(key: &PrivateKey) -> Vec<u8> {
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    create_ca_csr(key, &DistinguishedName::ca_default().with_serial_number("42"), &trust_domain).await.unwrap()
}
