//! What comes back from above, and what is gone there.

use super::*;

#[tokio::test]
async fn a_root_that_others_may_have_revoked_is_not_added_again() {
    // What was lost before it came does not count there, and its number says nothing.
    for (lost, others) in [(0, 0), (0, 1), (0, 2), (2, 1), (2, 3)] {
        let (world, switch, _) = below_upstream().await;
        let mut process = world.start().await;
        let standby = world.bundle().unwrap();
        process.feed.publish(Bundle { sequence_number: standby.sequence_number + lost, ..standby.clone() });
        world.memory.data.lock().unwrap().bundles.get_mut("example.org").unwrap().sequence_number += lost;
        let second = Arc::new(Upstream::new().await);
        let root = super::super::super::journal::hex(&second.ca.subject_key_id());
        *switch.now.lock().unwrap() = second;
        let prepared = process.manager.obey(Order::Prepare(X509)).await.unwrap();
        process.manager.obey(Order::Activate(X509, prepared.authority_id)).await.unwrap();
        assert!(has(&world.bundle().unwrap(), &root));
        // Others may have added it there, and revoked it: with the third change, if it was the first.
        let number = standby.sequence_number + 1 + others;
        fails_over_to(&world, &process, Some(Bundle { sequence_number: number, ..standby })).await;
        *switch.now.lock().unwrap() = Arc::new(Upstream::new().await);
        process.manager.check().await.unwrap();
        assert!(!has(&world.bundle().unwrap(), &root), "{lost} {others}");
        let standing = process.manager.standings(X509, &world.bundle().unwrap()).0;
        assert_eq!(standing, Some(Standing::Good), "{lost} {others}");
    }
}

#[tokio::test]
async fn a_key_that_is_known_above_may_have_been_added_and_revoked_by_others() {
    for above in [None, Some(Vec::new())] {
        let (world, switch, _) = below_upstream().await;
        switch.jwt.lock().unwrap().clone_from(&above);
        let mut process = world.start().await;
        let mut standby = world.bundle().unwrap();
        // Two changes are lost, then the key comes.
        world.memory.data.lock().unwrap().bundles.get_mut("example.org").unwrap().sequence_number += 2;
        process.feed.refresh(&trust_domain()).await.unwrap();
        let prepared = process.manager.obey(Order::Prepare(Jwt)).await.unwrap().authority_id;
        process.manager.obey(Order::Activate(Jwt, prepared.clone())).await.unwrap();
        standby.sequence_number += 3;
        fails_over_to(&world, &process, Some(standby)).await;
        process.manager.check().await.unwrap();
        assert_eq!(has(&world.bundle().unwrap(), &prepared), above.is_none(), "{above:?}");
        assert_eq!(process.manager.standings(Jwt, &world.bundle().unwrap()).0, Some(Standing::Good));
    }
}

#[tokio::test]
async fn the_end_of_an_outage_brings_back_nothing_that_was_revoked_here() {
    let (world, switch, _) = below_upstream().await;
    *switch.jwt.lock().unwrap() = Some(Vec::new());
    let mut process = world.start().await;
    let root = world.bundle().unwrap().x509_authorities;
    let told = [key(&process.jwt_id().unwrap(), false), key("revoked", false), key("lost", false)];
    tell(&mut process, &root, &told).await;
    for step in [TaintStep::Taint, TaintStep::Revoke] {
        elsewhere(&world, &process, Jwt, step, "revoked").await;
    }
    let whole = world.bundle().unwrap();
    let mut without = whole.clone();
    without.jwt_authorities.retain(|key| key.key_id != "lost");
    for there in [whole, without] {
        fails_over_to(&world, &process, Some(there)).await;
        process.manager.check().await.unwrap();
        process.manager.check().await.unwrap();
        tell(&mut process, &root, &told).await;
        let bundle = world.bundle().unwrap();
        assert!(!has(&bundle, "revoked") && has(&bundle, "lost"), "{bundle:?}");
    }
}

#[tokio::test]
async fn an_own_key_that_was_revoked_here_does_not_come_back_from_above_after_a_restart() {
    let (world, switch, _) = below_upstream().await;
    *switch.jwt.lock().unwrap() = Some(Vec::new());
    let mut process = world.start().await;
    let root = world.bundle().unwrap().x509_authorities;
    let first = process.jwt_id().unwrap();
    let prepared = process.manager.obey(Order::Prepare(Jwt)).await.unwrap().authority_id;
    process.manager.obey(Order::Activate(Jwt, prepared)).await.unwrap();
    process.manager.obey(Order::Taint(Jwt, first.clone())).await.unwrap();
    process.manager.obey(Order::Revoke(Jwt, first.clone())).await.unwrap();
    let known = switch.jwt.lock().unwrap().clone().unwrap();
    assert!(known.iter().any(|key| key.key_id == first), "it is known above");
    let mut process = world.load().await.unwrap();
    tell(&mut process, &root, &known).await;
    assert!(!has(&world.bundle().unwrap(), &first), "told");
    process.manager.obey(Order::Prepare(Jwt)).await.unwrap();
    assert!(!has(&world.bundle().unwrap(), &first), "in the answer to another key");
    // A server below publishes one of its own.
    let heard = process.feed.heard();
    let kept = crate::authority::with_new(key("below", false), Some(known), &heard, crate::publish::Name::jwt);
    assert_eq!(kept.iter().map(|key| key.key_id.as_str()).collect::<Vec<_>>(), ["below"]);
}

#[tokio::test]
async fn a_root_that_was_revoked_above_while_nobody_listened_is_left_and_goes() {
    for restarted in [false, true] {
        let (world, switch, _) = below_upstream().await;
        let mut process = world.start().await;
        let first = world.bundle().unwrap().x509_authorities;
        let second = Arc::new(Upstream::new().await);
        let new = X509Authority { der: second.ca.certificate().clone(), tainted: false };
        if !restarted {
            tell(&mut process, &first, &[]).await;
        } else {
            process = world.load().await.unwrap();
        }
        let (own, mut operators) = (process.x509_id(), Upstream::new().await.roots);
        let operators = X509Authority { der: operators.remove(0), tainted: false };
        let more = Bundle { x509_authorities: vec![operators.clone()], ..Bundle::empty(trust_domain()) };
        world.memory.append_bundle(&more).await.unwrap();
        *switch.now.lock().unwrap() = second;
        tell(&mut process, std::slice::from_ref(&new), &[]).await;
        process.manager.check().await.unwrap();
        assert_ne!(process.x509_id(), own, "restarted: {restarted}");
        assert_eq!(world.bundle().unwrap().x509_authorities.len(), 3, "agents have a minute to move off");
        world.clock.advance(60);
        process.manager.check().await.unwrap();
        let left = world.bundle().unwrap().x509_authorities;
        assert!(
            left.contains(&new) && left.contains(&operators) && left.len() == 2,
            "what never came from above stays"
        );
    }
}

#[tokio::test]
async fn what_is_gone_above_stays_for_a_minute_whichever_server_looks() {
    for restarted in [false, true] {
        let (world, switch, root) = below_upstream().await;
        let other = world.beside("other-", 0);
        let (mut one, mut two) = (world.start().await, other.start().await);
        let first = world.bundle().unwrap().x509_authorities;
        let told = [key("gone", false), key("other", false)];
        tell(&mut one, &first, &told).await;
        tell(&mut two, &first, &told).await;
        let second = Arc::new(Upstream::new().await);
        let new = X509Authority { der: second.ca.certificate().clone(), tainted: false };
        *switch.now.lock().unwrap() = second;
        tell(&mut one, std::slice::from_ref(&new), &told[1..]).await;
        if restarted {
            one = world.load().await.unwrap();
            tell(&mut one, std::slice::from_ref(&new), &told[1..]).await;
        } else {
            tell(&mut two, std::slice::from_ref(&new), &told[1..]).await;
        }
        let stays = |what: &str| {
            assert!(has(&world.bundle().unwrap(), &root), "{what}, restarted: {restarted}");
            assert!(has(&world.bundle().unwrap(), "gone"), "{what}, restarted: {restarted}");
        };
        stays("at first sight");
        for clock in [&world.clock, &other.clock] {
            clock.advance(59);
        }
        one.manager.check().await.unwrap();
        two.manager.check().await.unwrap();
        stays("before its time");
        for clock in [&world.clock, &other.clock] {
            clock.advance(1);
        }
        one.manager.check().await.unwrap();
        two.manager.check().await.unwrap();
        for gone in [&*root, "gone"] {
            assert!(!has(&world.bundle().unwrap(), gone), "{gone}, restarted: {restarted}");
        }
        assert!(has(&world.bundle().unwrap(), &one.jwt_id().unwrap()), "restarted: {restarted}");
    }
}

#[tokio::test]
async fn after_a_restart_only_tainted_keys_of_others_leave_and_only_where_keys_are_known_above() {
    for known in [false, true] {
        let (world, switch, _) = below_upstream().await;
        *switch.jwt.lock().unwrap() = known.then(Vec::new);
        let mut process = world.start().await;
        let root = world.bundle().unwrap().x509_authorities;
        let first = process.jwt_id().unwrap();
        let keys =
            Bundle { jwt_authorities: vec![key("good", false), key("tainted", true)], ..Bundle::empty(trust_domain()) };
        world.memory.append_bundle(&keys).await.unwrap();
        let prepared = process.manager.obey(Order::Prepare(Jwt)).await.unwrap().authority_id;
        process.manager.obey(Order::Activate(Jwt, prepared)).await.unwrap();
        process.manager.obey(Order::Taint(Jwt, first.clone())).await.unwrap();
        let mut process = world.load().await.unwrap();
        let told = if known { vec![key("other", false)] } else { Vec::new() };
        for _ in 0..2 {
            tell(&mut process, &root, &told).await;
            world.clock.advance(60);
        }
        let bundle = world.bundle().unwrap();
        assert!(has(&bundle, "good") && has(&bundle, &first), "{known}: {bundle:?}");
        assert_eq!(has(&bundle, "tainted"), !known);
    }
}

#[tokio::test]
async fn an_own_root_from_before_there_was_an_upstream_authority_is_revoked_by_operators_alone() {
    let mut world = World::new();
    let own = world.start().await.x509_id().unwrap();
    let (_, switch, _) = below_upstream().await;
    world.upstream = Some(switch.clone());
    let mut process = world.load().await.unwrap();
    elsewhere(&world, &process, X509, TaintStep::Taint, &own).await;
    process.manager.check().await.unwrap();
    let above = X509Authority { der: switch.now.lock().unwrap().ca.certificate().clone(), tainted: false };
    for _ in 0..2 {
        tell(&mut process, std::slice::from_ref(&above), &[]).await;
        world.clock.advance(61);
    }
    process.manager.check().await.unwrap();
    assert!(has(&world.bundle().unwrap(), &own));
}
