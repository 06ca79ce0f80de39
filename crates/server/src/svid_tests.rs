use super::*;
use crate::authority::{AuthorityKind, AuthorityStore, TaintStep};
use crate::testing::{HOUR, Process, START, World, trust_domain};
use finial_runtime::Supervisor;

fn of(world: &World, process: &Process, supervisor: &Supervisor, key_type: KeyType) -> Arc<ServerSvid> {
    let issuer = Arc::new(world.issuer(&process.authorities));
    let (feed, clock) = (process.feed.clone(), world.clock.clone());
    ServerSvid::new(issuer, feed, key_type, clock, Metrics::disabled(), supervisor.spawner())
}

#[tokio::test]
async fn the_own_svid_moves_off_an_authority_that_anyone_tainted() {
    let world = World::new();
    let mut process = world.start().await;
    let supervisor = Supervisor::default();
    let svid = of(&world, &process, &supervisor, KeyType::EcP256);
    svid.check().await;
    let chain = || svid.state().unwrap().chain.clone();
    let (first, old) = (chain(), process.x509_id().unwrap());
    world.memory.mark_authority(&trust_domain(), AuthorityKind::X509, TaintStep::Taint, &old).await.unwrap();
    process.feed.refresh(&trust_domain()).await.unwrap();
    svid.check().await;
    assert_eq!(chain(), first, "nothing better signs yet");
    process.manager.check().await.unwrap();
    assert_ne!(process.x509_id(), Some(old));
    svid.check().await;
    let second = chain();
    assert_ne!(second, first);
    svid.check().await;
    assert_eq!(chain(), second, "once is enough");
}

#[tokio::test]
async fn the_own_svid_is_renewed_past_half_its_life_and_after_the_clock_went_back() {
    let world = World::new();
    let process = world.start().await;
    let supervisor = Supervisor::default();
    let svid = of(&world, &process, &supervisor, KeyType::EcP256);
    assert!(svid.state().is_none());
    svid.check().await;
    let first = svid.state().unwrap();
    assert_eq!((first.not_before, first.not_after), (START - 10, START + HOUR));
    let leaf = |state: &ServerSvidState| state.chain[0].clone();
    // Half of 3610 s from START - 10 on.
    for (advance, renewed) in [(1795, false), (1, true), (-1796 - 10, true), (5, false)] {
        let before = leaf(&svid.state().unwrap());
        world.clock.advance(advance);
        svid.check().await;
        assert_eq!(leaf(&svid.state().unwrap()) != before, renewed, "{advance}");
    }
}

#[tokio::test]
async fn without_an_authority_the_old_svid_stays() {
    let world = World::new();
    let process = world.start().await;
    let supervisor = Supervisor::default();
    let svid = of(&world, &process, &supervisor, KeyType::Rsa2048);
    svid.rotate().await.unwrap();
    let before = svid.state().unwrap().chain.clone();
    world.clock.advance(48 * HOUR);
    assert!(svid.rotate().await.is_err(), "the authority has expired");
    svid.check().await;
    assert_eq!(svid.state().unwrap().chain, before);
}
