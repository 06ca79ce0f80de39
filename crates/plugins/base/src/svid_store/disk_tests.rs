use super::*;
use finial_core::{ErrorKind as Kind, Secret, SpiffeId};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

fn store(folder: &Path) -> Disk {
    Disk::new(&finial_hcl::parse(&format!("directory = \"{}\"", folder.display())).unwrap()).unwrap()
}

fn svid(mark: u8) -> StoredSvid {
    StoredSvid {
        spiffe_id: SpiffeId::parse("spiffe://example.org/db").unwrap(),
        cert_chain: vec![vec![mark; 3].into(), vec![9; 3].into()],
        private_key: Secret::new(vec![mark; 4]),
        bundle: vec![vec![8; 3].into()],
        federated_bundles: BTreeMap::from([("other.test".to_owned(), vec![vec![7; 3].into()])]),
        expires_at: 1,
    }
}

fn at(name: &str) -> Vec<String> {
    vec![format!("name:{name}")]
}

fn listed(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[tokio::test]
async fn an_svid_is_a_folder_of_files_for_the_owner_only() {
    let top = tempfile::tempdir().unwrap();
    let folder = top.path().join("made/svids");
    let store = store(&folder);
    store.put(&svid(1), &at("db")).await.unwrap();
    let db = folder.join("db");
    let mut files: Vec<_> = fs::read_dir(&db).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["bundle.pem", "federated_bundle.other.test.pem", "svid.key", "svid.pem"]);
    for file in &files {
        assert_eq!(fs::metadata(db.join(file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    for folder in [&db, &folder] {
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
    }
    let read = |file| fs::read_to_string(db.join(file)).unwrap();
    assert_eq!(read("svid.pem"), pem::encode("CERTIFICATE", &[1; 3]) + &pem::encode("CERTIFICATE", &[9; 3]));
    assert_eq!(read("svid.key"), pem::encode("PRIVATE KEY", &[1; 4]));
    assert_eq!(read("bundle.pem"), pem::encode("CERTIFICATE", &[8; 3]));
    assert_eq!(read("federated_bundle.other.test.pem"), pem::encode("CERTIFICATE", &[7; 3]));
}

#[tokio::test]
async fn it_is_replaced_in_one_step_and_nothing_is_left_of_the_one_before() {
    let top = tempfile::tempdir().unwrap();
    let store = store(top.path());
    for name in ["db", "db.2"] {
        store.put(&svid(1), &at(name)).await.unwrap();
    }
    // Who has the folder open keeps a whole SVID.
    let open = File::open(top.path().join("db")).unwrap();
    // What a crash left in the middle of storing.
    fs::create_dir(top.path().join(".db@dead")).unwrap();
    symlink(".db@dead", top.path().join(".db@dead.link")).unwrap();
    store.put(&svid(2), &at("db")).await.unwrap();
    drop(open);
    assert!(fs::read_to_string(top.path().join("db/svid.key")).unwrap() == pem::encode("PRIVATE KEY", &[2; 4]));
    assert_eq!(listed(top.path()), 4, "a link and a folder for each");
    store.delete(&at("db")).await.unwrap();
    assert_eq!(listed(top.path()), 2);
    assert!(top.path().join("db.2/svid.pem").exists(), "the other is spared");
    store.delete(&at("db")).await.unwrap();
}

#[tokio::test]
async fn a_late_write_does_not_replace_what_is_stored_after_it() {
    let top = tempfile::tempdir().unwrap();
    let store = store(top.path());
    let (go, held) = std::sync::mpsc::channel();
    let old = files(&svid(1));
    let late = store.blocking("store an SVID", move |directory| {
        let _ = held.recv();
        write(directory, "db", &old)
    });
    assert!(tokio::time::timeout(std::time::Duration::ZERO, late).await.is_err(), "given up");
    assert!(store.turn.try_lock().is_err(), "and still at it");
    let (svid, db) = (svid(2), at("db"));
    let (stored, ()) = tokio::join!(store.put(&svid, &db), async { go.send(()).unwrap() });
    stored.unwrap();
    assert!(fs::read_to_string(top.path().join("db/svid.key")).unwrap() == pem::encode("PRIVATE KEY", &[2; 4]));
    assert_eq!(listed(top.path()), 2);
}

#[tokio::test]
async fn what_names_no_folder_of_ours_is_refused() {
    let top = tempfile::tempdir().unwrap();
    let store = store(&top.path().join("svids"));
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    for name in ["", "../up", "a/b", ".hidden", "..", "a@b", "a b", "\u{0}", &long] {
        let error = store.put(&svid(1), &at(name)).await.unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument, "{name:?}: {error}");
        assert_eq!(store.delete(&at(name)).await.unwrap_err().kind, Kind::InvalidArgument);
    }
    for metadata in [vec![], vec!["dir:x".to_owned()], [at("a"), at("b")].concat()] {
        assert_eq!(store.put(&svid(1), &metadata).await.unwrap_err().kind, Kind::InvalidArgument);
    }
    store.delete(&at("never-stored")).await.unwrap();
    assert_eq!(listed(top.path()), 0);

    fs::create_dir_all(top.path().join("svids/theirs")).unwrap();
    fs::write(top.path().join("svids/theirs/file"), "").unwrap();
    let error = store.put(&svid(1), &at("theirs")).await.unwrap_err();
    assert!(error.message.contains("is not ours"), "{error}");
    store.delete(&at("theirs")).await.unwrap();
    assert!(top.path().join("svids/theirs/file").exists());

    assert_eq!(Disk::new(&Value::empty()).err().unwrap().message, "directory is required");
}
