use super::*;
use crate::testing::{HOUR, Lost, Process, START, World};
use AuthorityKind::{Jwt, Wit, X509};
use finial_core::KeyType;

const KINDS: [AuthorityKind; 3] = [X509, Jwt, Wit];

fn world() -> World {
    let mut world = World::new();
    world.settings.wit_key_type = Some(KeyType::EcP256);
    world
}

fn ids(process: &Process, kind: AuthorityKind) -> [Option<(String, Status)>; 2] {
    let slots = process.manager.slots(kind);
    [slots.current, slots.next].map(|s| s.map(|s| (s.authority_id, s.status)))
}

async fn refused(process: &mut Process, order: Order) -> (ErrorKind, String) {
    let error = process.manager.obey(order).await.expect_err("is refused");
    (error.kind, error.to_string())
}

fn invalid(text: &str) -> (ErrorKind, String) {
    (ErrorKind::InvalidArgument, text.into())
}

/// What the bundle has of a kind, by ID, with whether it is tainted.
fn in_bundle(world: &World, kind: AuthorityKind) -> Vec<(String, bool)> {
    let bundle = world.bundle().unwrap();
    match kind.tokens() {
        Some(tokens) => tokens.of(&bundle).iter().map(|k| (k.key_id.clone(), k.tainted)).collect(),
        None => {
            let id = |der: &std::sync::Arc<[u8]>| {
                let certificate = finial_crypto::Certificate::parse(der.clone()).unwrap();
                super::super::journal::hex(certificate.subject_key_id().unwrap())
            };
            bundle.x509_authorities.iter().map(|a| (id(&a.der), a.tainted)).collect()
        }
    }
}

#[tokio::test]
async fn each_kind_is_prepared_activated_tainted_and_revoked_by_order() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let [Some((first, Status::Active)), None] = ids(&process, kind) else { panic!("one signs") };
        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap();
        assert_eq!((prepared.status, prepared.expires_at), (Status::Prepared, START + 24 * HOUR));
        let second = prepared.authority_id.clone();
        assert_eq!(in_bundle(&world, kind), [(first.clone(), false), (second.clone(), false)]);
        let activated = process.manager.obey(Order::Activate(kind, second.clone())).await.unwrap();
        assert_eq!(activated, AuthorityState { status: Status::Active, ..prepared });
        let expected = [Some((second.clone(), Status::Active)), Some((first.clone(), Status::Old))];
        assert_eq!(ids(&process, kind), expected);
        assert_eq!(ids(&world.load().await.unwrap(), kind), expected, "{kind}: a restart finds the same");
        let signs = match kind {
            X509 => process.x509_id(),
            Jwt => process.jwt_id(),
            Wit => process.authorities.wit().map(|w| w.signer.key_id().to_owned()),
        };
        assert_eq!(signs.as_ref(), Some(&second));
        let tainted = process.manager.obey(Order::Taint(kind, first.clone())).await.unwrap();
        // As in SPIRE, where only X.509 authorities are told in full.
        assert_eq!(tainted.expires_at, if kind == X509 { START + 24 * HOUR } else { 0 });
        assert_eq!(in_bundle(&world, kind), [(first.clone(), true), (second.clone(), false)]);
        let published = process.feed.own().unwrap().bundle.clone();
        assert_eq!(Some(published), world.bundle(), "all who read the feed know");
        let revoked = process.manager.obey(Order::Revoke(kind, first.clone())).await.unwrap();
        assert_eq!((revoked.authority_id.as_str(), revoked.expires_at), (first.as_str(), 0));
        assert_eq!(in_bundle(&world, kind), [(second.clone(), false)]);
        assert_eq!(process.feed.own().unwrap().bundle, world.bundle().unwrap());
        let [current, old] = ids(&world.load().await.unwrap(), kind);
        assert_eq!((current, old), (Some((second, Status::Active)), None), "{kind}: revoked ones do not come back");
    }
}

/// Perhaps of a server that is no more, or of one below.
#[tokio::test]
async fn keys_of_other_servers_can_be_tainted_and_revoked() {
    for kind in [Jwt, Wit] {
        let world = world();
        let gone = world.beside("gone ", 0).start().await;
        let mut process = world.start().await;
        let ([Some((theirs, _)), _], [Some((own, _)), _]) = (ids(&gone, kind), ids(&process, kind)) else {
            panic!("both sign")
        };
        process.manager.obey(Order::Taint(kind, theirs.clone())).await.unwrap();
        assert_eq!(in_bundle(&world, kind), [(theirs.clone(), true), (own.clone(), false)]);
        process.manager.obey(Order::Revoke(kind, theirs)).await.unwrap();
        assert_eq!(in_bundle(&world, kind), [(own, false)]);
    }
}

#[tokio::test]
async fn orders_that_make_no_sense_are_refused_in_spires_words() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let [Some((active, _)), _] = ids(&process, kind) else { panic!("one signs") };
        let unexpected = invalid("unexpected authority ID");
        let none = invalid("no authority ID provided");
        assert_eq!(refused(&mut process, Order::Activate(kind, String::new())).await, none);
        assert_eq!(refused(&mut process, Order::Activate(kind, active.clone())).await, unexpected);
        assert_eq!(refused(&mut process, Order::Taint(kind, String::new())).await, none);
        assert_eq!(refused(&mut process, Order::Taint(kind, "00".into())).await, unexpected);
        let current = invalid("unable to taint current local authority");
        assert_eq!(refused(&mut process, Order::Taint(kind, active.clone())).await, current);
        let current = invalid("invalid authority ID: unable to use current authority");
        assert_eq!(refused(&mut process, Order::Revoke(kind, active.clone())).await, current);
        let none = invalid("invalid authority ID: no authority ID provided");
        assert_eq!(refused(&mut process, Order::Revoke(kind, String::new())).await, none);
        let unknown = match kind {
            X509 => invalid("invalid authority ID: only Old local authority can be revoked"),
            _ => invalid(&format!("invalid authority ID: no {kind} authority found with provided authority ID")),
        };
        assert_eq!(refused(&mut process, Order::Revoke(kind, "00".into())).await, unknown);

        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        let status = "only Old local authorities can be tainted: unsupported local authority status: PREPARED";
        assert_eq!(refused(&mut process, Order::Taint(kind, prepared.clone())).await, invalid(status));
        let status = match kind {
            X509 => invalid("invalid authority ID: only Old local authority can be revoked"),
            _ => invalid("invalid authority ID: unable to use a prepared key"),
        };
        assert_eq!(refused(&mut process, Order::Revoke(kind, prepared.clone())).await, status);

        process.manager.obey(Order::Activate(kind, prepared)).await.unwrap();
        let message = "only Prepared authorities can be activated: unsupported local authority status: OLD";
        let old = refused(&mut process, Order::Activate(kind, active.clone())).await;
        assert_eq!(old, (ErrorKind::Internal, message.into()));
        let refusal = match kind {
            X509 => "failed to revoke X.509 authority: it is not possible to revoke an untainted root CA".to_owned(),
            _ => format!("failed to revoke {kind} authority: it is not possible to revoke an untainted key"),
        };
        assert_eq!(refused(&mut process, Order::Revoke(kind, active.clone())).await, (ErrorKind::Internal, refusal));
        process.manager.obey(Order::Taint(kind, active.clone())).await.unwrap();
        let (kind_of, again) = refused(&mut process, Order::Taint(kind, active.clone())).await;
        assert_eq!(kind_of, ErrorKind::Internal);
        assert!(again.starts_with(&format!("failed to taint {kind} authority: ")), "{again}");
        assert!(again.ends_with("already tainted"), "{again}");
    }
}

#[tokio::test]
async fn without_an_upstream_authority_none_can_be_tainted_and_with_one_only_that() {
    let world = World::new();
    let mut process = world.start().await;
    let none = (ErrorKind::FailedPrecondition, "upstream authority is not configured".into());
    assert_eq!(refused(&mut process, Order::TaintUpstream("00".into())).await, none);
    assert_eq!(refused(&mut process, Order::RevokeUpstream("00".into())).await, none);
}

#[tokio::test]
async fn another_servers_key_can_be_revoked_once_it_is_tainted() {
    let world = world();
    let mut process = world.start().await;
    let key = finial_core::JwtAuthority {
        key_id: "others".into(),
        public_key: vec![1].into(),
        expires_at: START + HOUR,
        tainted: true,
    };
    world.memory.data.lock().unwrap().bundles.get_mut("example.org").unwrap().jwt_authorities.push(key);
    process.manager.obey(Order::Revoke(Jwt, "others".into())).await.unwrap();
    assert!(in_bundle(&world, Jwt).iter().all(|(id, _)| id != "others"));
}

#[tokio::test]
async fn an_outage_is_told_as_such_and_leaves_everything_as_it_was() {
    for kind in KINDS {
        let world = world();
        let mut process = world.start().await;
        let prepared = process.manager.obey(Order::Prepare(kind)).await.unwrap().authority_id;
        process.manager.obey(Order::Activate(kind, prepared.clone())).await.unwrap();
        let [_, Some((old, _))] = ids(&process, kind) else { panic!("there is an old one") };
        let before = world.bundle();
        world.fail_all(true);
        let (kind_of, message) = refused(&mut process, Order::Taint(kind, old.clone())).await;
        assert_eq!(kind_of, ErrorKind::Unavailable, "{message}");
        let (_, message) = refused(&mut process, Order::Prepare(kind)).await;
        assert!(message.starts_with(&format!("failed to prepare {kind} authority: ")), "{message}");
        world.fail_all(false);
        assert_eq!(world.bundle(), before);
        assert_eq!(ids(&process, kind)[0], Some((prepared, Status::Active)));
        process.manager.obey(Order::Taint(kind, old)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_takes_orders_and_after_it_ended_nobody_waits() {
    let world = World::new();
    let process = world.start().await;
    let control = process.manager.control();
    let shutdown = finial_runtime::Shutdown::new();
    let act = async {
        let prepared = control.order(Order::Prepare(X509)).await.unwrap();
        let activated = control.order(Order::Activate(X509, prepared.authority_id.clone())).await.unwrap();
        assert_eq!(activated.authority_id, prepared.authority_id);
        shutdown.trigger();
    };
    tokio::join!(process.manager.run(shutdown.clone()), act);
    let error = control.order(Order::Prepare(X509)).await.unwrap_err();
    assert_eq!((error.kind, error.to_string()), (ErrorKind::Unavailable, "server is shutting down".into()));
}

/// Replaces the authority that signs, by orders, until it is out of the bundle; with a fault on the way, after which the
/// process may be gone. Returns how many calls that took.
async fn replace(kind: AuthorityKind, fault: Option<(usize, Lost)>, crash: bool) -> usize {
    let world = world();
    let mut process = world.start().await;
    let place = format!("{kind} {fault:?} crash {crash}");
    let [Some((first, _)), _] = ids(&process, kind) else { panic!("{place}: one signs") };
    world.fail(fault);
    for _ in 0..12 {
        let before = ids(&process, kind);
        let known = in_bundle(&world, kind).into_iter().find(|(id, _)| *id == first);
        let order = match (before, known) {
            (_, None) => break,
            ([Some((current, _)), Some((next, Status::Prepared))], _) if current == first => {
                Order::Activate(kind, next)
            }
            ([Some((current, _)), _], _) if current == first => Order::Prepare(kind),
            (_, Some((_, false))) => Order::Taint(kind, first.clone()),
            (_, Some((_, true))) => Order::Revoke(kind, first.clone()),
        };
        let failed = process.manager.obey(order).await.is_err();
        if crash && (failed || world.fault_fired()) {
            process = match world.load().await {
                Ok(loaded) => loaded,
                Err(_) => world.load().await.expect("a single fault"),
            };
        }
        let _ = process.manager.check().await;
        super::super::manager_tests::assert_verifiable(&world, &process, &place);
    }
    let calls = world.calls();
    assert!(in_bundle(&world, kind).iter().all(|(id, _)| *id != first), "{place}: it never came to its end");
    process.manager.check().await.expect("the fault is over");
    let [Some((second, Status::Active)), _] = ids(&process, kind) else { panic!("{place}: one signs") };
    assert_ne!(second, first);
    let [Some((again, Status::Active)), _] = ids(&world.load().await.unwrap(), kind) else { panic!("{place}: lost") };
    assert_eq!(again, second, "{place}: a restart finds another");
    calls
}

#[tokio::test]
async fn a_server_killed_at_any_step_of_a_rotation_by_hand_loses_nothing() {
    for kind in KINDS {
        let calls = replace(kind, None, false).await;
        assert!(calls >= 8, "{calls}");
        for crash in [false, true] {
            for lost in [Lost::Request, Lost::Answer] {
                for at in 0..calls {
                    replace(kind, Some((at, lost)), crash).await;
                }
            }
        }
    }
}
