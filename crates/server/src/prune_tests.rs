use super::*;
use crate::authority::AuthorityStore;
use crate::testing::{HOUR, START, trust_domain};
use finial_core::{
    AgentRecord, Bundle, Entry, JoinToken, JwtAuthority, ManualClock, Selector, SelectorSet, TrustDomain,
};
use finial_store::{EntryFilter, StoreSettings};
use std::sync::Mutex;

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl PruneListener for Heard {
    fn entries_pruned(&self, ids: &[EntryId]) {
        self.0.lock().unwrap().extend(ids.iter().map(ToString::to_string));
    }
    fn agents_pruned(&self, ids: &[SpiffeId]) {
        self.0.lock().unwrap().extend(ids.iter().map(ToString::to_string));
    }
}

struct Fixture {
    store: Store,
    clock: Arc<ManualClock>,
    heard: Arc<Heard>,
    pruner: Pruner,
    _supervisor: finial_runtime::Supervisor,
}

async fn fixture() -> Fixture {
    let clock = Arc::new(ManualClock::at(START));
    let store = Store::open(StoreSettings::memory(), clock.clone()).await.unwrap();
    let feed = BundleFeed::open(Arc::new(store.clone()) as Arc<dyn AuthorityStore>, trust_domain()).await.unwrap();
    let settings = PruneSettings {
        events_older_than_seconds: 12 * HOUR,
        agents: Some(finial_config::PruneAgentsSettings {
            expired_for: Duration::from_secs(3600),
            batch_size: 1000,
            non_reattestable: true,
        }),
    };
    let heard = Arc::new(Heard::default());
    let supervisor = finial_runtime::Supervisor::default();
    let turn = Turn::new(supervisor.spawner());
    let pruner = Pruner::new(settings, store.clone(), turn, feed, clock.clone(), Metrics::disabled(), heard.clone());
    Fixture { store, clock, heard, pruner, _supervisor: supervisor }
}

fn selectors() -> SelectorSet {
    SelectorSet::new(vec![Selector::new("unix", "uid:1").unwrap()])
}

fn entry(name: &str, expires_at: i64) -> Entry {
    let td = trust_domain();
    Entry {
        expires_at,
        ..Entry::new(
            EntryId::parse(name).unwrap(),
            SpiffeId::new(&td, &format!("/{name}")).unwrap(),
            td.agent_id("join_token/x").unwrap(),
            selectors(),
        )
    }
}

#[tokio::test]
async fn each_job_removes_what_has_expired_and_tells() {
    let f = fixture().await;
    f.store.create_entries(vec![entry("never", 0), entry("soon", START + 10)]).await.unwrap();
    f.store.create_join_token(&JoinToken { token: "t".into(), expires_at: START + 60 }, None).await.unwrap();
    let agent = AgentRecord {
        id: trust_domain().agent_id("join_token/t").unwrap(),
        attestation_type: "join_token".into(),
        serial_number: "1".into(),
        expires_at: START + 60,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: false,
        agent_version: String::new(),
        selectors: selectors(),
    };
    f.store.create_or_update_node(&agent).await.unwrap();
    for job in Job::ALL {
        // The bundle cannot be pruned as there is none; nothing else has expired.
        let _ = f.pruner.job(job, f.clock.now()).await;
    }
    assert!(f.heard.0.lock().unwrap().is_empty());
    f.clock.advance(3000);
    f.pruner.run_job(Job::Entries).await;
    assert_eq!(*f.heard.0.lock().unwrap(), ["soon"]);
    assert_eq!(f.store.count_entries(&EntryFilter::default()).await.unwrap(), 1);
    f.pruner.run_job(Job::Agents).await;
    f.pruner.run_job(Job::JoinTokens).await;
    assert_eq!(f.heard.0.lock().unwrap().len(), 1, "an hour after the end, not before");
    assert!(f.store.fetch_join_token("t").await.unwrap().is_some(), "late comers are told that it has expired");
    f.clock.advance(24 * HOUR);
    f.pruner.run_job(Job::Agents).await;
    f.pruner.run_job(Job::JoinTokens).await;
    assert_eq!(f.heard.0.lock().unwrap()[1], "spiffe://example.org/spire/agent/join_token/t");
    assert!(f.store.fetch_join_token("t").await.unwrap().is_none());
}

#[tokio::test]
async fn authorities_leave_the_bundle_a_day_after_their_end() {
    let f = fixture().await;
    let key = finial_crypto::PrivateKey::generate(finial_core::KeyType::EcP256).unwrap();
    let jwt = |name: &str, expires_at| JwtAuthority {
        key_id: name.into(),
        public_key: key.public_key().spki_der().clone(),
        expires_at,
        tainted: false,
    };
    let world = crate::testing::World::new();
    let process = world.start().await;
    let mut bundle: Bundle = world.bundle().unwrap();
    bundle.x509_authorities.truncate(1);
    bundle.jwt_authorities = vec![jwt("old", START + 10), jwt("new", START + 90 * 24 * HOUR)];
    f.store.append_bundle(&bundle).await.unwrap();
    f.pruner.feed.refresh(&TrustDomain::parse("example.org").unwrap()).await.unwrap();
    let keys = || f.pruner.feed.own().unwrap().bundle.jwt_authorities.len();
    f.clock.advance(24 * HOUR);
    f.pruner.run_job(Job::Bundle).await;
    assert_eq!(keys(), 2);
    f.clock.advance(11);
    f.pruner.run_job(Job::Bundle).await;
    assert_eq!(keys(), 1, "in the feed as well");
    // Nothing usable would be left of the X.509 authorities: refused.
    f.clock.advance(30 * 24 * HOUR);
    f.pruner.run_job(Job::Bundle).await;
    assert_eq!(f.pruner.feed.own().unwrap().bundle.x509_authorities.len(), 1);
    drop(process);
}

#[tokio::test]
async fn a_clock_that_was_wrong_for_a_while_costs_nothing() {
    let f = fixture().await;
    tokio::time::pause();
    let mut seen = (Instant::now(), f.clock.now_ms());
    tokio::time::advance(MINUTE).await;
    f.clock.advance(60);
    assert!(!f.pruner.clock_jumped(&mut seen, Instant::now()));
    f.clock.advance(365 * 24 * HOUR);
    assert!(f.pruner.clock_jumped(&mut seen, Instant::now()));
    assert!(!f.pruner.clock_jumped(&mut seen, Instant::now()), "the new time is taken from then on");
    f.clock.advance(-365 * 24 * HOUR);
    assert!(f.pruner.clock_jumped(&mut seen, Instant::now()));
}
