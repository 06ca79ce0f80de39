//! The sealed cache against all that may have become of its file.

use super::content::{Contents, Restored};
use super::key::{SealingKey, Source};
use super::seal::{self, Binding, ITEM_BYTES_MAX, OpenError, Sealer};
use super::{FILE_NAME, SealedCache};
use crate::cache::testing::{bundle, entry, svid, wit};
use crate::cache::{Bundles, Cache, CachedJwt, Change};
use crate::entry::WorkloadEntry;
use finial_config::{AgentSettings, Bootstrap, OfflineCache};
use finial_core::{EntryId, SpiffeId, SystemClock, TrustDomain};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// SVIDs of `testing::svid` end at 2000.
const NOW: i64 = 1_000;

fn settings(dir: &Path) -> AgentSettings {
    let mut settings = AgentSettings::minimal(
        TrustDomain::parse("td").unwrap(),
        ([127, 0, 0, 1], 1).into(),
        Bootstrap::Insecure,
        dir.join("data"),
    );
    std::fs::create_dir_all(&settings.data_dir).unwrap();
    settings.offline_cache = OfflineCache::HostKey;
    settings.offline_cache_host_key_path = dir.join("host.key");
    host_key(&settings.offline_cache_host_key_path, 1);
    settings
}

fn host_key(path: &Path, byte: u8) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, [byte; 4096]).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o400)).unwrap();
}

fn agent() -> SpiffeId {
    SpiffeId::parse("spiffe://td/spire/agent/join_token/a").unwrap()
}

/// A cache with `entries` entries, every third without an SVID, two bundles and a token.
fn contents(entries: usize) -> Contents {
    let clock = Arc::new(SystemClock);
    let (cache, mut writer) = Cache::new(bundle("td", &["k1"]), 0, clock);
    let all: Vec<WorkloadEntry> = (0..entries)
        .map(|i| {
            let mut entry = entry(&format!("e{i:05}"), &format!("spiffe://td/w{i}"), &["unix:uid:1", "unix:gid:2"]);
            entry.federates_with = vec![TrustDomain::parse("other").unwrap()];
            (entry.admin, entry.downstream, entry.hint) = (i % 2 == 0, i % 5 == 0, format!("h{i}"));
            (entry.revision_number, entry.jwt_svid_include_jti) = (i as i64, i % 7 == 0);
            entry
        })
        .collect();
    let svids = all.iter().enumerate().filter(|(i, _)| i % 3 != 2);
    let svids = svids.map(|(i, e)| (e.id.clone(), Arc::new(svid(e, i as u8)))).collect();
    let entries: Vec<_> = all.into_iter().map(Arc::new).collect();
    let federated = BTreeMap::from([(TrustDomain::parse("other").unwrap(), bundle("other", &["o1"]))]);
    let own = cache.snapshot().bundles.own.clone();
    let bundles = Some(Bundles { own, federated });
    writer.publish(Change { entries: Some(entries), bundles, svids, ..Change::default() });
    for (i, record) in cache.snapshot().records.iter().enumerate() {
        record.last_used_ms.store(i as i64, Ordering::Relaxed);
    }
    let jwt = |token: &str, expires_at| {
        let jwt = CachedJwt {
            id: SpiffeId::parse("spiffe://td/w0").unwrap(),
            token: token.into(),
            key_id: "k1".into(),
            audience: vec!["b".into(), "a".into()],
            entry_id: EntryId::parse("e00000").unwrap(),
            issued_at: 900,
            expires_at,
            rotate_at_ms: 950_000,
        };
        (Arc::new(jwt), 5)
    };
    let wits = cache.snapshot().records.iter().take(2).map(|r| (r.entry.id.clone(), Arc::new(wit(&r.entry)))).collect();
    let jwts = vec![jwt("t", 1_500), jwt("old", NOW)];
    Contents { snapshot: cache.snapshot(), jwts, wits, last_sync: 990, now: NOW }
}

fn assert_same(restored: &Restored, contents: &Contents) {
    let records = &contents.snapshot.records;
    assert_eq!(restored.entries.len(), records.len());
    for record in records.iter() {
        assert_eq!(restored.entries[&record.entry.id], record.entry);
        let svid = restored.svids.iter().find(|(id, _)| *id == record.entry.id).map(|(_, svid)| svid);
        let (Some(now), Some(then)) = (svid, &record.svid) else {
            assert!(svid.is_none() && record.svid.is_none());
            continue;
        };
        assert_eq!((&now.id, &now.chain, &now.key), (&then.id, &then.chain, &then.key));
        assert_eq!((now.not_after, now.rotate_at_ms), (then.not_after, then.rotate_at_ms), "its moment was drawn once");
        assert_eq!((now.revision_number, now.created_at), (then.revision_number, then.created_at));
        assert_eq!(now.signed_by, then.signed_by);
        let used = restored.used.iter().find(|(id, _)| *id == record.entry.id).unwrap().1;
        assert_eq!(used, record.last_used_ms.load(Ordering::Relaxed));
    }
    let bundles = restored.bundles().unwrap();
    assert_eq!(bundles.own.bundle, contents.snapshot.bundles.own.bundle);
    assert_eq!(bundles.federated.len(), contents.snapshot.bundles.federated.len());
    let tokens: Vec<_> = restored.jwts.iter().map(|(_, jwt, asked)| (jwt.token.as_str(), *asked)).collect();
    assert_eq!(tokens, [("t", 5)], "one that ended is not kept");
    assert_eq!(*restored.jwts[0].1, *contents.jwts[0].0);
    assert_eq!(restored.wits.len(), contents.wits.len());
    for ((id, now), (id_then, then)) in restored.wits.iter().zip(&contents.wits) {
        assert_eq!((id, &now.id, &now.token, now.key.expose()), (id_then, &then.id, &then.token, then.key.expose()));
        assert_eq!((now.expires_at, now.rotate_at_ms, &now.key_id), (then.expires_at, then.rotate_at_ms, &then.key_id));
        assert_eq!((now.revision_number, now.created_at), (then.revision_number, then.created_at));
    }
    assert_eq!(restored.last_sync, 990);
}

#[test]
fn what_is_kept_is_there_again_and_private() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    let cache = SealedCache::at(&settings, "m1".into());
    assert!(cache.load(&agent(), NOW).is_none(), "nothing was kept yet");
    for entries in [0, 1, 7, 1000] {
        let contents = contents(entries);
        let bytes = cache.save(&agent(), &contents, false).unwrap();
        let path = settings.data_dir.join(FILE_NAME);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (bytes, 0o600));
        // As after a restart.
        let again = SealedCache::at(&settings, "m1".into());
        assert_same(&again.load(&agent(), NOW).unwrap(), &contents);
        let raw = std::fs::read(&path).unwrap();
        assert!(!raw.windows(11).any(|w| w == b"spiffe://td"), "nothing is readable");
    }
}

#[test]
fn what_has_ended_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let cache = SealedCache::at(&settings(dir.path()), "m1".into());
    cache.save(&agent(), &contents(3), false).unwrap();
    let later = cache.load(&agent(), 2_000).unwrap();
    assert_eq!((later.svids.len(), later.jwts.len(), later.wits.len(), later.ended), (0, 0, 0, 5));
    assert_eq!(later.entries.len(), 3, "the entries are what they were");
}

/// As one is kept that was made when the entry had another ID.
#[test]
fn an_svid_of_another_id_than_its_entrys_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let cache = SealedCache::at(&settings(dir.path()), "m1".into());
    let mut contents = contents(2);
    let mut snapshot = (*contents.snapshot).clone();
    let mut records = snapshot.records.to_vec();
    records[0].svid = records[1].svid.clone();
    snapshot.records = records.into();
    contents.snapshot = Arc::new(snapshot);
    cache.save(&agent(), &contents, false).unwrap();
    let restored = cache.load(&agent(), NOW).unwrap();
    let served: Vec<_> = restored.svids.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!((restored.entries.len(), served), (2, vec!["e00001"]));
}

#[test]
fn a_copy_is_useless_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    let here = SealedCache::at(&settings, "m1".into());
    here.save(&agent(), &contents(3), false).unwrap();
    let foreign = |cache: &SealedCache, id: &SpiffeId| match cache.read(cache.key.as_ref().unwrap(), id, NOW) {
        Err(OpenError::Foreign) => assert!(cache.load(id, NOW).is_none(), "said, and ignored"),
        other => panic!("{:?}", other.err()),
    };
    foreign(&SealedCache::at(&settings, "m2".into()), &agent());
    foreign(&here, &SpiffeId::parse("spiffe://td/spire/agent/join_token/b").unwrap());
    host_key(&settings.offline_cache_host_key_path, 2);
    foreign(&SealedCache::at(&settings, "m1".into()), &agent());
    host_key(&settings.offline_cache_host_key_path, 1);
    settings.trust_domain = TrustDomain::parse("td2").unwrap();
    foreign(&SealedCache::at(&settings, "m1".into()), &agent());
    settings.trust_domain = TrustDomain::parse("td").unwrap();
    assert!(SealedCache::at(&settings, "m1".into()).load(&agent(), NOW).is_some(), "back home it is good");
    settings.offline_cache = OfflineCache::Off;
    assert!(SealedCache::at(&settings, "m1".into()).load(&agent(), NOW).is_none(), "by choice");
}

#[test]
fn a_host_key_that_is_gone_leaves_the_agent_without_a_cache_and_running() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    SealedCache::at(&settings, "m1".into()).save(&agent(), &contents(3), false).unwrap();
    std::fs::remove_file(&settings.offline_cache_host_key_path).unwrap();
    let cache = SealedCache::at(&settings, "m1".into());
    assert!(!cache.is_on(false) && cache.load(&agent(), NOW).is_none());
    assert_eq!(cache.save(&agent(), &contents(3), false).unwrap(), 0);
}

#[test]
fn forgotten_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    let cache = SealedCache::at(&settings, "m1".into());
    cache.save(&agent(), &contents(3), false).unwrap();
    cache.forget();
    assert!(!settings.data_dir.join(FILE_NAME).exists() && !cache.is_on(false));
    cache.save(&agent(), &contents(3), false).unwrap();
    assert!(!settings.data_dir.join(FILE_NAME).exists(), "also when it was being written");
}

/// Killed while it writes beside, before the move, or after it: the old file or the new one.
#[test]
fn killed_at_any_step_of_writing_there_is_one_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    let path = settings.data_dir.join(FILE_NAME);
    let (old, new) = (contents(2), contents(4));
    let save = |contents: &Contents| SealedCache::at(&settings, "m1".into()).save(&agent(), contents, false).unwrap();
    save(&new);
    let whole = std::fs::read(&path).unwrap();
    save(&old);
    let beside = finial_runtime::files::beside(&path);
    for cut in (0..=whole.len()).step_by(97).chain([whole.len()]) {
        std::fs::write(&beside, &whole[..cut]).unwrap();
        assert_same(&SealedCache::at(&settings, "m1".into()).load(&agent(), NOW).unwrap(), &old);
    }
    std::fs::rename(&beside, &path).unwrap();
    assert_same(&SealedCache::at(&settings, "m1".into()).load(&agent(), NOW).unwrap(), &new);
    // What was left beside is no hindrance, whoever may read or write it.
    std::fs::write(&beside, "left").unwrap();
    save(&old);
    assert_same(&SealedCache::at(&settings, "m1".into()).load(&agent(), NOW).unwrap(), &old);
    assert!(!beside.exists());
}

#[test]
fn a_folder_in_its_place_or_a_huge_file_is_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    let path = settings.data_dir.join(FILE_NAME);
    let cache = SealedCache::at(&settings, "m1".into());
    std::fs::create_dir(&path).unwrap();
    assert!(cache.load(&agent(), NOW).is_none() && cache.save(&agent(), &contents(1), false).is_err());
    std::fs::remove_dir(&path).unwrap();
    std::fs::File::create(&path).unwrap().set_len(super::BYTES_MAX + 1).unwrap();
    assert!(matches!(cache.read(cache.key.as_ref().unwrap(), &agent(), NOW), Err(OpenError::TooLarge(_))));
    std::fs::write(&path, "FINSEAL9 of a later version").unwrap();
    assert!(matches!(cache.read(cache.key.as_ref().unwrap(), &agent(), NOW), Err(OpenError::OtherVersion)));
}

fn key() -> SealingKey {
    SealingKey::new(Source::Host, vec![3; 32])
}

fn binding() -> Binding {
    Binding { machine_id: "m".into(), trust_domain: TrustDomain::parse("td").unwrap(), agent_id: agent() }
}

fn sealed(items: &[Vec<u8>]) -> Vec<u8> {
    let mut sealer = Sealer::new(Vec::new(), &key(), &binding()).unwrap();
    for item in items {
        assert!(sealer.item(item.len(), |frame| frame.extend_from_slice(item)).unwrap());
    }
    sealer.finish().unwrap().0
}

fn opened(file: &[u8]) -> Result<Vec<Vec<u8>>, OpenError> {
    let mut items = Vec::new();
    seal::open(file, &key(), &binding(), |item| {
        items.push(item.to_vec());
        true
    })?;
    Ok(items)
}

#[test]
fn every_bit_counts_and_every_length() {
    let file = sealed(&[b"one".to_vec(), b"two".to_vec()]);
    assert_eq!(opened(&file).unwrap(), [b"one", b"two"]);
    for at in 0..file.len() {
        for bit in 0..8 {
            let mut bad = file.clone();
            bad[at] ^= 1 << bit;
            assert!(opened(&bad).is_err(), "bit {bit} of byte {at}");
        }
        assert!(opened(&file[..at]).is_err(), "cut at {at}");
    }
    for more in [&b"x"[..], &[0; 4], &[0; 20], &file] {
        assert!(opened(&[&file, more].concat()).is_err(), "with something behind it");
    }
}

#[test]
fn frames_cannot_be_left_out_swapped_or_taken_from_another_file() {
    let items: Vec<Vec<u8>> = (0..4u8).map(|i| vec![i; 70_000]).collect();
    let (file, other) = (sealed(&items), sealed(&items));
    let header = 41;
    let frame = 4 + 4 + 70_000 + 16;
    let part = |file: &[u8], i: usize| file[header + i * frame..header + (i + 1) * frame].to_vec();
    let last = file[header + 4 * frame..].to_vec();
    assert_eq!(opened(&file).unwrap(), items);
    let build = |parts: &[Vec<u8>]| [file[..header].to_vec(), parts.concat()].concat();
    let parts: Vec<_> = (0..4).map(|i| part(&file, i)).collect();
    let with =
        |order: &[usize]| build(&order.iter().map(|i| parts[*i].clone()).chain([last.clone()]).collect::<Vec<_>>());
    assert!(opened(&with(&[0, 1, 2, 3])).is_ok());
    for order in [&[0, 1, 3][..], &[1, 0, 2, 3], &[0, 1, 2, 2], &[0, 1, 2, 3, 3], &[]] {
        assert!(opened(&with(order)).is_err(), "{order:?}");
    }
    assert!(opened(&build(&parts)).is_err(), "without the last one");
    let mut mixed = parts.clone();
    mixed[2] = part(&other, 2);
    mixed.push(last);
    assert!(opened(&build(&mixed)).is_err(), "another file has another key");
}

/// A buffer that grows leaves keys behind.
#[test]
fn what_was_opened_is_in_one_place_only() {
    let file = sealed(&[66_000, 70_000, 200_000, ITEM_BYTES_MAX].map(|length| vec![1; length]));
    let (mut places, mut held) = (std::collections::BTreeSet::new(), Vec::new());
    seal::open(file.as_slice(), &key(), &binding(), |item| {
        places.insert(item.as_ptr().addr());
        held.push(item.to_vec()); // so that none can grow where it is
        true
    })
    .unwrap();
    assert_eq!((held.len(), places.len()), (4, 1));
}

#[test]
fn an_item_that_is_too_large_is_left_out() {
    let mut sealer = Sealer::new(Vec::new(), &key(), &binding()).unwrap();
    assert!(!sealer.item(ITEM_BYTES_MAX + 1, |_| unreachable!()).unwrap());
    assert!(sealer.item(ITEM_BYTES_MAX, |frame| frame.resize(frame.len() + ITEM_BYTES_MAX, 1)).unwrap());
    let file = sealer.finish().unwrap().0;
    assert_eq!(opened(&file).unwrap()[0].len(), ITEM_BYTES_MAX);
}

#[test]
fn a_cache_that_is_full_keeps_what_can_be_served() {
    let contents = contents(30);
    let mut sealer = Sealer::new(Vec::new(), &key(), &binding()).unwrap();
    // Room for about two thirds.
    let left_out = super::content::write(&mut sealer, &contents, 2_500).unwrap();
    let file = sealer.finish().unwrap().0;
    assert!(left_out > 0 && file.len() < 2_700, "{left_out} {}", file.len());
    let mut restored = Restored::default();
    seal::open(file.as_slice(), &key(), &binding(), |item| restored.take(item, &binding().trust_domain, NOW)).unwrap();
    assert_eq!(restored.svids.len(), restored.entries.len(), "those with SVIDs go first");
    assert!(restored.own.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever was done to the file: all of it, or an error; never a panic, never another content.
    #[test]
    fn a_damaged_file_is_refused(
        items in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40_000), 0..6),
        at in any::<proptest::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<proptest::sample::Index>(),
        insert in proptest::collection::vec(any::<u8>(), 1..40),
    ) {
        let file = sealed(&items);
        prop_assert_eq!(&opened(&file).unwrap(), &items);
        let mut flipped = file.clone();
        let place = at.index(file.len());
        flipped[place] = byte;
        prop_assert_eq!(opened(&flipped).is_ok(), byte == file[place]);
        prop_assert!(opened(&file[..cut.index(file.len())]).is_err());
        let mut longer = file.clone();
        longer.splice(place..place, insert);
        prop_assert!(longer == file || opened(&longer).is_err());
    }

    /// What is inside was authenticated, but a later version may have written it.
    #[test]
    fn items_that_make_no_sense_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        Restored::default().take(&bytes, &TrustDomain::parse("td").unwrap(), NOW);
    }

    #[test]
    fn garbage_is_no_file(bytes in proptest::collection::vec(any::<u8>(), 0..500), ours: bool) {
        let file = if ours { [b"FINSEAL1\x01".to_vec(), bytes].concat() } else { bytes };
        prop_assert!(opened(&file).is_err());
    }
}
