use super::*;
use crate::testing::{HOUR, START, World};
use finial_runtime::Supervisor;

#[tokio::test]
async fn the_own_svid_is_renewed_past_half_its_life_and_after_the_clock_went_back() {
    let world = World::new();
    let process = world.start().await;
    let issuer = Arc::new(world.issuer(&process.authorities));
    let supervisor = Supervisor::default();
    let svid = ServerSvid::new(issuer, KeyType::EcP256, world.clock.clone(), Metrics::disabled(), supervisor.spawner());
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
    let issuer = Arc::new(world.issuer(&process.authorities));
    let supervisor = Supervisor::default();
    let clock = world.clock.clone();
    let svid = ServerSvid::new(issuer, KeyType::Rsa2048, clock, Metrics::disabled(), supervisor.spawner());
    svid.rotate().await.unwrap();
    let before = svid.state().unwrap().chain.clone();
    world.clock.advance(48 * HOUR);
    assert!(svid.rotate().await.is_err(), "the authority has expired");
    svid.check().await;
    assert_eq!(svid.state().unwrap().chain, before);
}
