use super::*;
use std::os::unix::fs::PermissionsExt;

/// Written by spire-server 1.15.3 (throw-away keys of a test server).
const SPIRE_FILE: &str = include_str!("../../testdata/keys-of-spire-1.15.3.json");

/// A new key manager in a folder that outlives the test.
fn fresh() -> Arc<dyn KeyManager> {
    let folder = tempfile::tempdir().expect("a folder").keep();
    Arc::new(Disk::open(folder.join("keys.json")).expect("opens"))
}

finial_plugin::key_manager_conformance!(fresh());

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys.json");
    (folder, path)
}

#[tokio::test]
async fn a_file_of_spire_is_read_and_written_back_byte_for_byte() {
    let (_folder, path) = folder();
    fs::write(&path, SPIRE_FILE).expect("writes");
    let disk = Disk::open(path.clone()).expect("reads SPIRE's file");
    let ids: Vec<_> = disk.keys().await.expect("lists").into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, ["JWT-Signer-A", "x509-CA-A"]);
    store(&path, &disk.keys.snapshot()).expect("writes");
    assert_eq!(fs::read_to_string(&path).expect("reads"), SPIRE_FILE);
}

#[tokio::test]
async fn keys_survive_a_restart_and_the_file_is_private() {
    let (folder, path) = folder();
    let disk = Disk::open(path.clone()).expect("opens");
    let key = disk.generate_key("x509-CA-A", KeyType::EcP256).await.expect("generates");
    disk.generate_key("JWT-Signer-A", KeyType::Rsa2048).await.expect("generates");
    let again = Disk::open(path.clone()).expect("opens again");
    let found = again.key("x509-CA-A").await.expect("asks").expect("is there");
    assert_eq!(found.public_key(), key.public_key());
    let mode = fs::metadata(&path).expect("exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let files = fs::read_dir(folder.path()).expect("lists").count();
    assert_eq!(files, 1, "no temporary file is left");
}

#[tokio::test]
async fn what_lies_in_the_place_of_the_temporary_file_does_not_get_the_keys() {
    let (folder, path) = folder();
    let (temporary, elsewhere) = (folder.path().join("keys.json.tmp"), folder.path().join("elsewhere"));
    let disk = Disk::open(path.clone()).expect("opens");
    fs::write(&temporary, "left behind").expect("writes");
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o644)).expect("opens it to all");
    disk.generate_key("a", KeyType::EcP256).await.expect("generates");
    assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
    std::os::unix::fs::symlink(&elsewhere, &temporary).expect("links");
    disk.generate_key("b", KeyType::EcP256).await.expect("generates");
    assert!(!elsewhere.exists());
    assert!(fs::symlink_metadata(&path).expect("exists").is_file());
}

#[test]
fn a_corrupt_file_is_named_with_the_place_and_what_to_do() {
    let (_folder, path) = folder();
    let cases = [
        ("{\n\t\"keys\": {\n\t\t\"a\": \"MIGH!\"\n", ":3:", "unable to parse key \"a\""),
        ("{\n\t\"keys\": {\n\t\t\"a\": \"AAAA\"\n\t}\n}", ":3:", "unable to parse key \"a\""),
        ("{\n\t\"keys\": {\n\t\t\"a\": 7\n\t}\n}", ":3:", "key \"a\" as base64 text"),
        ("{\"keys\": ", ":1:9:", "EOF"),
        ("", ":1:0:", "EOF"),
        ("\0\0\0\0", ":1:1:", "expected value"),
    ];
    for (content, place, what) in cases {
        fs::write(&path, content).expect("writes");
        let error = Disk::open(path.clone()).err().expect("is refused").to_string();
        assert!(error.contains(&format!("{}{place}", path.display())), "{error}");
        assert!(error.contains(what) && error.contains("Restore the file from a backup"), "{error}");
        assert!(!error.contains("MIGH"), "no key material in errors: {error}");
    }
    for empty in ["{}", "{\"keys\":null}", "{\"keys\":{}}"] {
        fs::write(&path, empty).expect("writes");
        assert!(Disk::open(path.clone()).is_ok(), "{empty}");
    }
}

#[test]
fn a_file_that_is_too_large_or_not_readable_is_refused() {
    let (folder, path) = folder();
    fs::write(&path, vec![b' '; FILE_BYTES_MAX as usize + 1]).expect("writes");
    let error = Disk::open(path).err().expect("is refused").to_string();
    assert!(error.contains("larger than"), "{error}");
    let error = Disk::open(folder.path().to_owned()).err().expect("is refused").to_string();
    assert!(error.contains("unable to read keys file"), "{error}");
}

#[tokio::test]
async fn a_key_that_cannot_be_written_is_not_handed_out() {
    let (folder, path) = folder();
    let disk = Disk::open(path.clone()).expect("opens");
    disk.generate_key("a", KeyType::EcP256).await.expect("generates");
    let before = fs::read(&path).expect("reads");
    // A folder where the temporary file should be: writing fails, whoever we are.
    fs::create_dir(folder.path().join("keys.json.tmp")).expect("makes a folder");
    let error = disk.generate_key("a", KeyType::EcP256).await.err().expect("fails").to_string();
    assert!(error.contains("unable to write entries") && error.contains("keys.json"), "{error}");
    disk.generate_key("b", KeyType::EcP256).await.err().expect("fails");
    assert!(disk.key("b").await.expect("asks").is_none());
    assert_eq!(fs::read(&path).expect("reads"), before, "the old file stays");
}

#[test]
fn configuration_is_checked() {
    let parse = |text: &str| finial_hcl::parse(text).expect("is HCL");
    let error = Disk::for_server(&parse("")).err().expect("is refused").to_string();
    assert_eq!(error, "keys_path is required");
    let error = Disk::for_agent(&parse("")).err().expect("is refused").to_string();
    assert_eq!(error, "directory must be configured");
    let (folder, path) = folder();
    fs::write(&path, "").expect("writes");
    let error = Disk::for_agent(&parse(&format!("directory = \"{}\"", path.display()))).err().expect("is refused");
    assert!(error.to_string().starts_with("directory validation failed: "), "{error}");
    let new = folder.path().join("new/deep");
    Disk::for_agent(&parse(&format!("directory = \"{}\"", new.display()))).expect("makes the directory");
    assert_eq!(fs::metadata(&new).expect("exists").permissions().mode() & 0o777, 0o700);
}
