use super::*;
use crate::authority::AuthorityStore;
use crate::testing::{HOUR, START, trust_domain};
use finial_core::{
    AgentRecord, Bundle, Entry, JoinToken, JwtAuthority, ManualClock, Selector, SelectorSet, TrustDomain,
};
use finial_store::StoreSettings;
use std::sync::Mutex;

#[derive(Default)]
struct Heard(Mutex<Vec<String>>, Mutex<HashSet<SpiffeId>>);

impl PruneListener for Heard {
    fn entries_pruned(&self, ids: &[EntryId]) {
        self.0.lock().unwrap().extend(ids.iter().map(ToString::to_string));
    }
    fn agents_pruned(&self, ids: &[SpiffeId]) {
        self.0.lock().unwrap().extend(ids.iter().map(ToString::to_string));
    }
    fn agents_in_use(&self) -> HashSet<SpiffeId> {
        self.1.lock().unwrap().clone()
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

fn agent(name: &str, expires_at: i64) -> AgentRecord {
    AgentRecord {
        id: trust_domain().agent_id(&format!("join_token/{name}")).unwrap(),
        attestation_type: "join_token".into(),
        serial_number: "1".into(),
        expires_at,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: false,
        agent_version: String::new(),
        selectors: selectors(),
    }
}

#[tokio::test]
async fn each_job_removes_what_has_expired_and_tells() {
    let f = fixture().await;
    f.store.create_entries(vec![entry("never", 0), entry("soon", START + 10)]).await.unwrap();
    f.store.create_join_token(&JoinToken { token: "t".into(), expires_at: START + 60 }, None).await.unwrap();
    f.store.create_or_update_node(&agent("t", START + 60)).await.unwrap();
    for job in Job::ALL {
        // The bundle cannot be pruned as there is none; nothing else has expired.
        let _ = f.pruner.job(job, f.clock.now()).await;
    }
    assert!(f.heard.0.lock().unwrap().is_empty());
    f.clock.advance(3000);
    f.pruner.run_job(Job::Entries).await;
    assert_eq!(*f.heard.0.lock().unwrap(), ["soon"]);
    assert_eq!(f.store.entries_after(0, 10).await.unwrap().0.len(), 1);
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
async fn an_agent_with_an_svid_that_is_not_stored_or_not_used_yet_stays() {
    let f = fixture().await;
    for name in ["gone", "held", "renewed"] {
        f.store.create_or_update_node(&agent(name, START + 60)).await.unwrap();
    }
    let id = |name: &str| agent(name, 0).id;
    f.heard.1.lock().unwrap().insert(id("held"));
    f.store.renew_node(&id("renewed"), &["1".into()], "2", START + 10 * HOUR).await.unwrap();
    f.clock.advance(3 * HOUR);
    f.pruner.run_job(Job::Agents).await;
    let gone = || std::mem::take(&mut *f.heard.0.lock().unwrap());
    assert_eq!(gone(), [id("gone").to_string()]);
    f.heard.1.lock().unwrap().clear();
    f.pruner.run_job(Job::Agents).await;
    assert_eq!(gone(), [id("held").to_string()]);
    f.clock.advance(9 * HOUR);
    f.pruner.run_job(Job::Agents).await;
    assert_eq!(gone(), [id("renewed").to_string()]);
}

#[tokio::test]
async fn those_that_stay_leave_room_for_others_in_a_batch() {
    let mut f = fixture().await;
    f.pruner.settings.agents.as_mut().unwrap().batch_size = 1;
    for name in ["held", "gone"] {
        f.store.create_or_update_node(&agent(name, START + 60)).await.unwrap();
    }
    f.heard.1.lock().unwrap().insert(agent("held", 0).id);
    f.clock.advance(3 * HOUR);
    f.pruner.run_job(Job::Agents).await;
    assert_eq!(*f.heard.0.lock().unwrap(), [agent("gone", 0).id.to_string()]);
}

/// Steps through minutes, with a wall clock.
struct Minutes(Agenda, Instant, i64, Option<Instant>);

impl Minutes {
    fn every(job: Job) -> Duration {
        if job == Job::Agents { 60 * MINUTE } else { 5 * MINUTE }
    }

    fn new() -> Self {
        let now = Instant::now();
        Self(Agenda::new(Self::every, now, START * 1000), now, START * 1000, None)
    }

    fn next(&mut self, count: u32, is_away: bool) -> Vec<Job> {
        let mut jobs = Vec::new();
        for _ in 0..count {
            self.1 += MINUTE;
            self.2 += 60_000;
            self.3 = is_away.then_some(self.1).or(self.3);
            jobs.extend(self.0.next(Self::every, self.1, self.2, self.3));
        }
        jobs
    }

    fn set_clock(&mut self, seconds: i64) {
        self.2 += seconds * 1000;
    }
}

#[test]
fn after_an_outage_agents_have_time_to_show_their_renewed_svids() {
    let mut minutes = Minutes::new();
    assert!(!minutes.next(50, false).contains(&Job::Agents));
    assert!(!minutes.next(30, true).contains(&Job::Agents), "due, and nobody could store a renewal");
    let after = minutes.next(9, false);
    assert!(!after.contains(&Job::Agents) && after.contains(&Job::Entries), "{after:?}");
    assert!(minutes.next(1, false).contains(&Job::Agents), "no hour later");
    assert!(!minutes.next(59, false).contains(&Job::Agents));
    assert!(minutes.next(1, false).contains(&Job::Agents));
}

#[tokio::test]
async fn an_outage_between_two_looks_of_the_pruner_is_one() {
    let f = fixture().await;
    let link = f.pruner.turn.link();
    assert_eq!(link.last_away(), None);
    link.set_away(&StoreError::Busy(1));
    assert!(link.set_back() && !link.is_away());
    let mut minutes = Minutes::new();
    minutes.next(54, false);
    minutes.3 = link.last_away().map(|_| minutes.1 + MINUTE / 2);
    assert!(!minutes.next(10, false).contains(&Job::Agents));
    assert!(minutes.next(1, false).contains(&Job::Agents));
}

#[test]
fn a_clock_that_was_wrong_for_a_while_costs_nothing() {
    let mut minutes = Minutes::new();
    assert_eq!(minutes.next(4, false), []);
    minutes.set_clock(365 * 24 * HOUR);
    assert_eq!(minutes.next(5, false), [], "left out");
    assert_eq!(minutes.next(1, false).len(), 5, "the new time is taken from then on");
    minutes.next(4, false);
    minutes.set_clock(-365 * 24 * HOUR);
    assert_eq!(minutes.next(1, false), []);
}
