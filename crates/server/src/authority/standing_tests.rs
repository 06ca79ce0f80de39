use super::super::minted_tests::Upstream;
use super::super::{AuthorityStore, Order, TaintStep};
use super::*;
use crate::testing::{HOUR, Process, World, trust_domain};
use AuthorityKind::{Jwt, Wit, X509};
use finial_core::{KeyType, X509Authority};
use finial_plugin::{MintedX509Ca, PluginError, UpstreamAuthorities, UpstreamAuthority};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const KINDS: [AuthorityKind; 3] = [X509, Jwt, Wit];

fn world() -> World {
    let mut world = World::new();
    world.settings.wit_key_type = Some(KeyType::EcP256);
    world
}

fn active(process: &Process, kind: AuthorityKind) -> String {
    let states = process.authorities.states();
    let slots = match kind {
        X509 => &states.x509,
        Jwt => &states.jwt,
        Wit => &states.wit,
    };
    slots.current.clone().filter(|s| s.status == Status::Active).unwrap().authority_id
}

/// As another server does it; this one hears of it.
async fn elsewhere(world: &World, process: &Process, kind: AuthorityKind, step: TaintStep, id: &str) {
    world.memory.mark_authority(&trust_domain(), kind, step, id).await.unwrap();
    process.feed.refresh(&trust_domain()).await.unwrap();
}

fn shows_taint(process: &Process) -> bool {
    let bundle = &process.feed.own().unwrap().bundle;
    let keys = bundle.jwt_authorities.iter().chain(&bundle.wit_authorities);
    bundle.x509_authorities.iter().any(|a| a.tainted) || keys.into_iter().any(|k| k.tainted)
}

#[tokio::test]
async fn what_another_server_taints_is_replaced_before_agents_hear_of_it() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let first = active(&process, kind);
        elsewhere(&world, &process, kind, TaintStep::Taint, &first).await;
        assert!(!shows_taint(&process), "{kind}: agents would renew, and get the same again");
        process.manager.check().await.unwrap();
        let second = active(&process, kind);
        assert_ne!(second, first);
        assert!(shows_taint(&process), "{kind}: now they can move off");
        assert_eq!(process.feed.own().unwrap().bundle, world.bundle().unwrap());
        process.manager.check().await.unwrap();
        assert_eq!(active(&process, kind), second, "{kind}: and that is it");
        assert_eq!(active(&world.load().await.unwrap(), kind), second);
    }
}

#[tokio::test]
async fn an_authority_that_the_bundle_lost_is_replaced_while_the_server_runs() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let first = active(&process, kind);
        elsewhere(&world, &process, kind, TaintStep::Taint, &first).await;
        elsewhere(&world, &process, kind, TaintStep::Revoke, &first).await;
        process.manager.check().await.unwrap();
        assert_ne!(active(&process, kind), first);
    }
}

/// The datastore is another one now; this server hears of it.
async fn fails_over_to(world: &World, process: &Process, bundle: Option<Bundle>) {
    {
        let bundles = &mut world.memory.data.lock().unwrap().bundles;
        match bundle {
            Some(bundle) => bundles.insert("example.org".into(), bundle),
            None => bundles.remove("example.org"),
        };
    }
    process.feed.start_anew();
    process.feed.reload().await.unwrap();
}

#[tokio::test]
async fn what_a_failover_took_from_the_bundle_is_added_again() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let before = world.bundle().unwrap();
        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        process.manager.obey(Order::Activate(kind, prepared.clone())).await.unwrap();
        let next = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        let whole = world.bundle().unwrap();
        // The second and the third are lost; the first one signs no more.
        fails_over_to(&world, &process, Some(before.clone())).await;
        assert_eq!(process.feed.own().unwrap().stored(), &before, "{kind}: what is lost is not known");
        process.manager.check().await.unwrap();
        assert_eq!(active(&process, kind), prepared, "{kind}: what it signed holds");
        assert_eq!(world.bundle().unwrap(), Bundle { sequence_number: before.sequence_number + 1, ..whole.clone() });
        assert_eq!(process.feed.own().unwrap().stored(), &world.bundle().unwrap());
        let calls = world.calls();
        process.manager.check().await.unwrap();
        assert_eq!(world.calls(), calls, "{kind}: once is enough");
        // Everything is lost, the journal and its row, too, and the datastore takes nothing at first.
        let journals = std::mem::take(&mut world.memory.data.lock().unwrap().journals);
        fails_over_to(&world, &process, None).await;
        world.fail_all(true);
        assert!(process.manager.check().await.is_err());
        world.fail_all(false);
        process.manager.check().await.unwrap();
        let standings = process.manager.standings(kind, &world.bundle().unwrap());
        assert_eq!(standings, (Some(Standing::Good), Some(Standing::Good)), "{kind}");
        let states = process.manager.slots(kind);
        assert_eq!([states.current, states.next].map(|s| s.unwrap().authority_id), [prepared, next]);
        assert_eq!(world.memory.data.lock().unwrap().journals, journals, "{kind}");
    }
}

#[tokio::test]
async fn what_was_revoked_is_not_added_again_by_a_failover() {
    for kind in KINDS {
        // The server saw the taint, or neither that nor the revocation.
        for saw in [true, false] {
            let world = world();
            let mut process = world.start().await;
            let first = active(&process, kind);
            world.memory.mark_authority(&trust_domain(), kind, TaintStep::Taint, &first).await.unwrap();
            if saw {
                process.feed.refresh(&trust_domain()).await.unwrap();
            }
            world.memory.mark_authority(&trust_domain(), kind, TaintStep::Revoke, &first).await.unwrap();
            let mut revoked = world.bundle().unwrap();
            revoked.sequence_number -= u64::from(saw);
            fails_over_to(&world, &process, Some(revoked)).await;
            process.manager.check().await.unwrap();
            assert_ne!(active(&process, kind), first, "{kind}");
            let standing = process.manager.standings(kind, &world.bundle().unwrap()).0;
            assert_eq!(standing, Some(Standing::Good));
            let bundle = world.bundle().unwrap();
            let keys = bundle.jwt_authorities.iter().chain(&bundle.wit_authorities).map(|key| key.key_id.clone());
            let roots = bundle.x509_authorities.iter().filter_map(|root| {
                let root = Certificate::parse(root.der.clone()).unwrap();
                root.subject_key_id().map(super::super::journal::hex)
            });
            assert!(keys.chain(roots).all(|id| id != first), "{kind}: revoked is revoked");
        }
    }
}

/// What the bundle has of it: roots by their subject key IDs.
fn has(bundle: &Bundle, id: &str) -> bool {
    let mut keys = bundle.jwt_authorities.iter().chain(&bundle.wit_authorities);
    let mut roots = bundle.x509_authorities.iter().filter_map(|root| {
        let root = Certificate::parse(root.der.clone()).unwrap();
        root.subject_key_id().map(super::super::journal::hex)
    });
    keys.any(|key| key.key_id == id) || roots.any(|root| root == id)
}

#[tokio::test]
async fn what_was_revoked_at_a_standby_that_is_behind_is_not_added_again() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let first = active(&process, kind);
        // The standby has seen all of this server, and not what others wrote since.
        let standby = world.bundle().unwrap();
        let theirs = Bundle { sequence_number: standby.sequence_number + 10, ..standby };
        process.feed.publish(theirs);
        world.memory.mark_authority(&trust_domain(), kind, TaintStep::Taint, &first).await.unwrap();
        world.memory.mark_authority(&trust_domain(), kind, TaintStep::Revoke, &first).await.unwrap();
        fails_over_to(&world, &process, world.bundle()).await;
        // The decision holds, although the journal there is written over before the bundle could be.
        for at in 0..8 {
            world.fail(Some((at, crate::testing::Lost::Request)));
            let _ = process.manager.check().await;
        }
        world.fail(None);
        process.manager.check().await.unwrap();
        assert_ne!(active(&process, kind), first, "{kind}");
        assert!(!has(&world.bundle().unwrap(), &first), "{kind}: revoked is revoked");
        assert_eq!(process.manager.standings(kind, &world.bundle().unwrap()).0, Some(Standing::Good));
    }
}

#[tokio::test]
async fn what_was_made_after_a_backup_is_added_again_however_much_others_added_there() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let backup = {
            let data = world.memory.data.lock().unwrap();
            (data.bundles.clone(), data.journals.clone())
        };
        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        process.manager.obey(Order::Activate(kind, prepared.clone())).await.unwrap();
        // This one did not see it come.
        let mut process = world.load().await.unwrap();
        let bundle = {
            let mut data = world.memory.data.lock().unwrap();
            data.journals = backup.1;
            let mut bundle = backup.0.get("example.org").cloned().unwrap();
            bundle.sequence_number += 100;
            bundle
        };
        fails_over_to(&world, &process, Some(bundle)).await;
        // An order comes first, and writes the journal.
        process.manager.obey(Order::Prepare(Wit)).await.unwrap();
        for at in 0..4 {
            // Whatever does not work at first.
            world.fail(Some((at, crate::testing::Lost::Request)));
            let _ = process.manager.heed_bundle().await;
        }
        world.fail(None);
        process.manager.check().await.unwrap();
        assert_eq!(active(&process, kind), prepared, "{kind}: what it signed holds");
        assert!(has(&world.bundle().unwrap(), &prepared), "{kind}");
        assert_eq!(world.memory.data.lock().unwrap().journals.len(), 1, "{kind}: the row is the same");
        assert_eq!(active(&world.load().await.unwrap(), kind), prepared);
    }
}

#[tokio::test]
async fn after_a_failover_no_order_writes_over_the_journal_of_another_server() {
    let world = world();
    let mut process = world.start().await;
    world.beside("other-", 0).start().await;
    // There the other one came first.
    let theirs = {
        let journals = &mut world.memory.data.lock().unwrap().journals;
        let theirs = finial_store::CaJournal { id: 1, ..journals[&2].clone() };
        *journals = [(1, theirs.clone())].into();
        theirs
    };
    process.feed.start_anew();
    process.manager.obey(Order::Prepare(X509)).await.unwrap();
    let journals = world.memory.data.lock().unwrap().journals.clone();
    assert_eq!((journals.len(), &journals[&1]), (2, &theirs));
    assert_eq!(active(&world.load().await.unwrap(), X509), active(&process, X509));
}

#[tokio::test]
async fn a_feed_that_is_behind_makes_nobody_rotate() {
    let world = world();
    let mut process = world.start().await;
    let before = KINDS.map(|kind| active(&process, kind));
    let mut behind = Bundle::empty(trust_domain());
    behind.sequence_number = u64::MAX;
    process.feed.publish(behind);
    process.manager.check().await.unwrap();
    assert_eq!(KINDS.map(|kind| active(&process, kind)), before);
}

#[tokio::test]
async fn a_prepared_authority_that_was_tainted_is_never_activated() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        elsewhere(&world, &process, kind, TaintStep::Taint, &prepared).await;
        let signs = active(&process, kind);
        process.manager.check().await.unwrap();
        assert_eq!(active(&process, kind), signs);
        world.clock.advance(21 * HOUR);
        process.manager.check().await.unwrap();
        world.clock.advance(300);
        process.manager.check().await.unwrap();
        assert!(![&signs, &prepared].contains(&&active(&process, kind)), "{kind}");
    }
}

#[tokio::test]
async fn while_the_key_manager_is_away_the_tainted_one_goes_on_and_is_replaced_then() {
    let world = World::new();
    let mut process = world.start().await;
    let first = active(&process, X509);
    elsewhere(&world, &process, X509, TaintStep::Taint, &first).await;
    world.fail_all(true);
    assert!(process.manager.check().await.is_err());
    assert_eq!(process.x509_id(), Some(first.clone()));
    assert!(!shows_taint(&process));
    world.fail_all(false);
    process.manager.check().await.unwrap();
    assert_ne!(process.x509_id(), Some(first));
}

/// An upstream authority that can be replaced by another.
struct Switch {
    now: Mutex<Arc<Upstream>>,
    minted: AtomicUsize,
    /// JWT keys that are known above; none where it knows nothing of them.
    jwt: Mutex<Option<Vec<JwtAuthority>>>,
    told: tokio::sync::watch::Sender<UpstreamAuthorities>,
    /// How long an answer takes.
    thinks: Mutex<Duration>,
}

#[async_trait::async_trait]
impl UpstreamAuthority for Switch {
    fn name(&self) -> &str {
        "switch"
    }

    async fn mint_x509_ca(&self, csr: &[u8], ttl_seconds: i64) -> Result<MintedX509Ca, PluginError> {
        self.minted.fetch_add(1, Ordering::Relaxed);
        let now = self.now.lock().unwrap().clone();
        now.mint_x509_ca(csr, ttl_seconds).await
    }

    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Vec<JwtAuthority>, PluginError> {
        let mut known = self.jwt.lock().unwrap();
        let unknown = || PluginError::new(finial_core::ErrorKind::Unimplemented, "no");
        let keys = known.as_mut().ok_or_else(unknown)?;
        keys.push(key.clone());
        Ok(keys.clone())
    }

    async fn next_authorities(&self) -> Result<UpstreamAuthorities, PluginError> {
        let thinks = *self.thinks.lock().unwrap();
        tokio::time::sleep(thinks).await;
        let mut told = self.told.subscribe();
        told.wait_for(|told| *told != UpstreamAuthorities::default()).await.unwrap();
        Ok(self.told.send_replace(UpstreamAuthorities::default()))
    }
}

fn roots(x509: Vec<X509Authority>) -> UpstreamAuthorities {
    UpstreamAuthorities { x509, ..Default::default() }
}

async fn below_upstream() -> (World, Arc<Switch>, String) {
    let mut world = World::new();
    let first = Arc::new(Upstream::new().await);
    let id = super::super::journal::hex(&first.ca.subject_key_id());
    let switch = Arc::new(Switch {
        now: Mutex::new(first),
        minted: AtomicUsize::new(0),
        jwt: Mutex::default(),
        told: Default::default(),
        thinks: Mutex::default(),
    });
    world.upstream = Some(switch.clone());
    (world, switch, id)
}

#[tokio::test]
async fn a_tainted_upstream_authority_is_left_as_soon_as_there_is_another() {
    let (world, switch, root) = below_upstream().await;
    let mut process = world.start().await;
    let first = process.x509_id();
    elsewhere(&world, &process, X509, TaintStep::Taint, &root).await;
    process.manager.check().await.unwrap();
    assert_eq!(process.x509_id(), first, "a new one below the same root would be no better");
    assert_eq!(switch.minted.load(Ordering::Relaxed), 2);
    for _ in 0..100 {
        process.manager.check().await.unwrap();
        world.clock.advance(5);
    }
    let tried = switch.minted.load(Ordering::Relaxed);
    assert!((4..=9).contains(&tried), "500 s: after 10, 20, 40, 80, 160 s, not each time: {tried}");
    assert!(!shows_taint(&process));
    *switch.now.lock().unwrap() = Arc::new(Upstream::new().await);
    world.clock.advance(HOUR);
    process.manager.check().await.unwrap();
    assert_ne!(process.x509_id(), first);
    assert!(shows_taint(&process));
}

#[tokio::test]
async fn an_upstream_authority_is_tainted_and_revoked_once_nothing_that_signs_hangs_from_it() {
    let (world, switch, root) = below_upstream().await;
    let mut process = world.start().await;
    let refused = |error: super::super::OrderError| error.to_string();
    let own = process.x509_id().unwrap();
    let error = process.manager.obey(Order::Taint(X509, own.clone())).await.unwrap_err();
    assert_eq!(refused(error), "local authority can't be tainted if there is an upstream authority");
    let error = process.manager.obey(Order::Revoke(X509, own)).await.unwrap_err();
    assert_eq!(refused(error), "local authority can't be revoked if there is an upstream authority");
    for (id, why) in [
        ("", "no subject key ID provided"),
        (&*root, "unable to use upstream authority singing current authority"),
        ("00", "upstream authority didn't sign the old local authority"),
    ] {
        let error = process.manager.obey(Order::TaintUpstream(id.into())).await.unwrap_err();
        assert_eq!(refused(error), format!("provided subject key id is not valid: {why}"));
        let error = process.manager.obey(Order::RevokeUpstream(id.into())).await.unwrap_err();
        assert_eq!(refused(error), format!("invalid subject key ID: {why}"));
    }
    *switch.now.lock().unwrap() = Arc::new(Upstream::new().await);
    let prepared = process.manager.obey(Order::Prepare(X509)).await.unwrap();
    let error = process.manager.obey(Order::TaintUpstream(prepared.upstream_authority_id)).await.unwrap_err();
    let why = "only upstream authorities signing an old authority can be used";
    assert_eq!(refused(error), format!("provided subject key id is not valid: {why}"));
    process.manager.obey(Order::Activate(X509, prepared.authority_id)).await.unwrap();
    let error = process.manager.obey(Order::RevokeUpstream(root.clone())).await.unwrap_err();
    let why = "it is not possible to revoke an untainted root CA";
    assert_eq!(refused(error), format!("failed to revoke X.509 upstream authority: {why}"));
    process.manager.obey(Order::TaintUpstream(root.clone())).await.unwrap();
    assert!(shows_taint(&process));
    process.manager.obey(Order::RevokeUpstream(root)).await.unwrap();
    assert_eq!(world.bundle().unwrap().x509_authorities.len(), 1);
    process.manager.check().await.unwrap();
}

#[tokio::test]
async fn jwt_keys_are_made_known_above_where_that_is_possible() {
    let (world, switch, _) = below_upstream().await;
    let above = JwtAuthority { key_id: "above".into(), public_key: vec![1].into(), expires_at: 0, tainted: false };
    *switch.jwt.lock().unwrap() = Some(vec![above]);
    let process = world.start().await;
    let ids = |keys: &[JwtAuthority]| keys.iter().map(|k| k.key_id.clone()).collect::<Vec<_>>();
    let expected = ["above".to_owned(), process.jwt_id().unwrap()];
    assert_eq!(ids(switch.jwt.lock().unwrap().as_ref().unwrap()), expected);
    assert_eq!(ids(&world.bundle().unwrap().jwt_authorities), expected, "and what is known there is known here");
}

#[tokio::test(start_paused = true)]
async fn the_upstream_authority_tells_of_its_roots_itself() {
    let (world, switch, first_id) = below_upstream().await;
    let process = world.start().await;
    let (feed, authorities) = (process.feed.clone(), process.authorities.clone());
    let first_ca = process.x509_id();
    let root = |upstream: &Upstream, tainted| X509Authority { der: upstream.ca.certificate().clone(), tainted };
    let second = Arc::new(Upstream::new().await);
    let first = switch.now.lock().unwrap().clone();
    *switch.now.lock().unwrap() = second.clone();
    let shutdown = finial_runtime::Shutdown::new();
    let until = async |what: &str, done: &dyn Fn(&Bundle) -> bool| {
        let mut changes = feed.changes();
        let wait = async {
            while !feed.own().is_some_and(|own| done(&own.bundle)) {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), wait).await.expect(what);
    };
    let act = async {
        switch.told.send_replace(roots(vec![root(&first, false), root(&second, false)]));
        until("the new root is known", &|bundle| bundle.x509_authorities.contains(&root(&second, false))).await;
        switch.told.send_replace(roots(vec![root(&first, true), root(&second, false)]));
        until("the old one is tainted", &|bundle| bundle.x509_authorities.iter().any(|a| a.tainted)).await;
        let active = authorities.x509().unwrap();
        assert_ne!(Some(&active.authority_id), first_ca.as_ref(), "another signs before anyone hears of the taint");
        assert_ne!(active.upstream_authority_id, first_id);
        switch.told.send_replace(roots(vec![root(&second, false)]));
        let gone = |bundle: &Bundle| bundle.x509_authorities.iter().all(|a| a.der != *first.ca.certificate());
        until("the old one is gone", &gone).await;
        shutdown.trigger();
    };
    tokio::join!(process.manager.run(shutdown.clone()), act);
}

/// While an order is open the manager wakes each second.
#[tokio::test(start_paused = true)]
async fn an_upstream_authority_that_takes_its_time_is_heard_whatever_else_there_is_to_do() {
    let (world, switch, _) = below_upstream().await;
    *switch.thinks.lock().unwrap() = Duration::from_secs(5);
    let process = world.start().await;
    let (feed, domain) = (process.feed.clone(), process.manager.parts.domain.clone());
    let first = switch.now.lock().unwrap().ca.certificate().clone();
    let second = Upstream::new().await.ca.certificate().clone();
    let root = |der| X509Authority { der, tainted: false };
    switch.told.send_replace(roots(vec![root(first), root(second.clone())]));
    let shutdown = finial_runtime::Shutdown::new();
    let act = async {
        let is_known = || feed.own().is_some_and(|own| own.bundle.x509_authorities.iter().any(|a| a.der == second));
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            domain.wake();
        }
        assert!(is_known());
        shutdown.trigger();
    };
    tokio::join!(process.manager.run(shutdown.clone()), act);
}

#[tokio::test]
async fn roots_that_could_not_be_stored_are_stored_later() {
    let (world, _, _) = below_upstream().await;
    let mut process = world.start().await;
    let more = Upstream::new().await;
    let root = X509Authority { der: more.ca.certificate().clone(), tainted: false };
    let first = world.bundle().unwrap().x509_authorities.remove(0);
    process.manager.news.told = Some(roots(vec![first, root.clone()]));
    world.fail_all(true);
    assert!(process.manager.check().await.is_err());
    world.fail_all(false);
    process.manager.check().await.unwrap();
    assert!(world.bundle().unwrap().x509_authorities.contains(&root));
    let before = world.calls();
    process.manager.check().await.unwrap();
    assert_eq!(world.calls(), before, "once is enough");
}

fn key(key_id: &str, tainted: bool) -> JwtAuthority {
    JwtAuthority { key_id: key_id.into(), public_key: vec![1].into(), expires_at: 0, tainted }
}

fn jwt_ids(world: &World) -> Vec<(String, bool)> {
    world.bundle().unwrap().jwt_authorities.iter().map(|k| (k.key_id.clone(), k.tainted)).collect()
}

async fn tell(process: &mut Process, x509: &[X509Authority], jwt: &[JwtAuthority]) {
    let (x509, jwt) = (x509.to_vec(), jwt.to_vec());
    process.manager.news.told = Some(UpstreamAuthorities { x509, jwt, ..Default::default() });
    process.manager.check().await.unwrap();
}

#[tokio::test]
async fn keys_known_above_are_known_here_and_leave_as_they_leave_there() {
    let (world, switch, _) = below_upstream().await;
    *switch.jwt.lock().unwrap() = Some(Vec::new());
    let mut process = world.start().await;
    let root = world.bundle().unwrap().x509_authorities;
    let own = key(&process.jwt_id().unwrap(), false);
    let before = process.jwt_id();
    tell(&mut process, &root, &[own.clone(), key("sibling", false)]).await;
    assert!(jwt_ids(&world).contains(&("sibling".into(), false)));
    world.memory.mark_authority(&trust_domain(), Jwt, TaintStep::Taint, "sibling").await.unwrap();
    world.memory.mark_authority(&trust_domain(), Jwt, TaintStep::Revoke, "sibling").await.unwrap();
    tell(&mut process, &root, &[own.clone(), key("sibling", false), key("other", false)]).await;
    assert!(jwt_ids(&world).iter().all(|(id, _)| id != "sibling"), "revoked here, it does not come back");
    tell(&mut process, &root, &[own.clone(), key("other", true)]).await;
    assert!(jwt_ids(&world).contains(&("other".into(), true)));
    tell(&mut process, &root, std::slice::from_ref(&own)).await;
    assert!(jwt_ids(&world).iter().all(|(id, _)| id != "other"), "tainted before it was revoked");
    // What above lost of this server's own keys (a backup) is told there again, and nothing is left for it; another server
    // of the datastore does the same with its own.
    tell(&mut process, &root, &[own.clone(), key("brother", false)]).await;
    switch.jwt.lock().unwrap().replace(Vec::new());
    let jwt = vec![key("another", false)];
    process.manager.news.told =
        Some(UpstreamAuthorities { x509: root.clone(), jwt, put_back: true, ..Default::default() });
    process.manager.check().await.unwrap();
    let published = switch.jwt.lock().unwrap().clone().unwrap();
    assert!(published.iter().any(|k| k.key_id == own.key_id), "{published:?}");
    assert_eq!(process.jwt_id(), before);
    assert!(jwt_ids(&world).contains(&(own.key_id, false)));
    assert!(jwt_ids(&world).contains(&("brother".into(), false)));
}

/// Its taint was never heard of here, as the way up was cut.
#[tokio::test]
async fn an_own_key_that_was_revoked_above_is_left_and_not_told_there_again() {
    let (world, switch, _) = below_upstream().await;
    *switch.jwt.lock().unwrap() = Some(Vec::new());
    let mut process = world.start().await;
    let root = world.bundle().unwrap().x509_authorities;
    let leaked = process.jwt_id().unwrap();
    tell(&mut process, &root, &[key(&leaked, false), key("sibling", false)]).await;
    switch.jwt.lock().unwrap().replace(Vec::new());
    tell(&mut process, &root, &[key("sibling", false)]).await;
    assert_ne!(process.jwt_id().unwrap(), leaked);
    let published = |id: &str| switch.jwt.lock().unwrap().iter().flatten().any(|k| k.key_id == id);
    assert!(published(&process.jwt_id().unwrap()) && !published(&leaked));
    assert!(jwt_ids(&world).contains(&(leaked.clone(), true)), "all have the time to leave it");
    world.clock.advance(61);
    process.manager.check().await.unwrap();
    assert!(jwt_ids(&world).iter().all(|(id, _)| *id != leaked));
}

#[path = "above_tests.rs"]
mod above;
