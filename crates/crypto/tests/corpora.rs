//! The fuzz targets' bodies on stable: every committed seed as it is, and mangled in ways that are the same each time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "../../../fuzz/src/crypto.rs"]
#[allow(unreachable_pub)]
mod bodies;

use std::path::Path;

/// The shape of a body.
type Body = fn(&[u8]);

/// A small generator whose numbers are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

fn mangle(seed: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=numbers.below(3) {
        let at = numbers.below(bytes.len());
        match numbers.below(5) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0x00, 0x7f, 0x80, 0xff, b'.', b'"'][numbers.below(6)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, numbers.below(256) as u8),
            _ => {
                let end = (at + numbers.below(40)).min(bytes.len());
                let piece = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

fn replay(name: &str, body: Body, rounds: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|f| f.unwrap().path()).collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
    // For a long run: FINIAL_FUZZ_FACTOR=1000 (and another start with it).
    let factor: usize = std::env::var("FINIAL_FUZZ_FACTOR").ok().and_then(|f| f.parse().ok()).unwrap_or(1);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ factor as u64);
    for path in seeds {
        let seed = std::fs::read(&path).unwrap();
        body(&seed);
        (0..rounds * factor).for_each(|_| body(&mangle(&seed, &mut numbers)));
    }
}

#[test]
fn csr() {
    replay("csr", bodies::csr, 300);
}

#[test]
fn certificate() {
    replay("certificate", bodies::certificate, 300);
}

#[test]
fn jwt() {
    replay("jwt", bodies::jwt, 1000);
}

#[test]
fn bundle() {
    replay("bundle", bodies::bundle, 300);
}

#[test]
fn spiffe_id() {
    replay("spiffe_id", bodies::spiffe_id, 1000);
}

#[test]
fn pem() {
    replay("pem", bodies::pem, 200);
}

/// Seeds that must be read to their end, so that a corpus of rubbish does not pass for a good one.
#[test]
fn good_seeds_are_good() {
    let read =
        |file: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(file)).unwrap();
    for name in ["ec", "rsa", "openssl-p384"] {
        finial_crypto::Csr::parse(&read(&format!("csr/{name}"))).unwrap().verify_proof_of_possession().unwrap();
    }
    for name in ["root", "leaf", "intermediate", "openssl-rsa"] {
        finial_crypto::Certificate::parse(read(&format!("certificate/{name}"))).unwrap();
    }
    let td = finial_core::TrustDomain::parse("example.org").unwrap();
    let bundle = finial_crypto::bundle::bundle_from_json(&td, &read("bundle/full")).unwrap();
    assert!(!bundle.x509_authorities.is_empty() && !bundle.jwt_authorities.is_empty());
    assert!(finial_crypto::jwt_svid_times(std::str::from_utf8(&read("jwt/es256")).unwrap()).is_ok());
}
