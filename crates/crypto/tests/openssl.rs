//! What we issue, as OpenSSL sees it. Skipped, loudly, where there is no `openssl` and nobody promised that everything is
//! there (`FINIAL_REAL_SPIRE`, which `./test` sets).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use finial_core::{KeyType, SpiffeId, TrustDomain};
use finial_crypto::*;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

/// Within the lifetimes of OpenSSL's own clock: `-attime` fixes it for `verify`.
const NOW: i64 = 1_800_000_000;

fn openssl(dir: &Path, args: &[&str]) -> Option<Output> {
    match Command::new("openssl").args(args).current_dir(dir).output() {
        Ok(output) => Some(output),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            assert!(std::env::var_os("FINIAL_REAL_SPIRE").is_none(), "openssl is not installed");
            // not eprintln: what tests print is only shown when they fail
            let _ = writeln!(std::io::stderr(), "\nSKIPPED: no openssl on this machine");
            None
        }
        Err(e) => panic!("openssl: {e}"),
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

async fn authority(key_type: KeyType) -> X509Ca {
    let template = CaTemplate {
        subject: &DistinguishedName::ca_default(),
        trust_domain: &TrustDomain::parse("example.org").unwrap(),
        not_before: NOW - 10,
        not_after: NOW + 86_400,
        serial: SerialNumber::random(),
    };
    X509Ca::self_sign(Arc::new(PrivateKey::generate(key_type).unwrap()), &template).await.unwrap()
}

#[tokio::test]
async fn openssl_verifies_and_prints_what_we_issue() {
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let dir = tempfile::tempdir().unwrap();
        let ca = authority(key_type).await;
        let middle_key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let middle_subject = ca.subject().unwrap().with_organizational_unit("DOWNSTREAM-1");
        let template = CaTemplate {
            subject: &middle_subject,
            trust_domain: &TrustDomain::parse("example.org").unwrap(),
            not_before: NOW - 10,
            not_after: NOW + 7200,
            serial: SerialNumber::random(),
        };
        let middle_der = ca.issue_ca(middle_key.public_key(), &template).await.unwrap();
        let middle = X509Ca::new(Arc::new(middle_key), middle_der.clone(), vec![middle_der.clone()]).unwrap();
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let leaf = SvidTemplate {
            id: &SpiffeId::parse("spiffe://example.org/web").unwrap(),
            public_key: key.public_key(),
            subject: &DistinguishedName::svid_default().with_common_name("web.example.org"),
            dns_names: &["web.example.org".into(), "*.web.example.org".into()],
            not_before: NOW - 10,
            not_after: NOW + 3600,
            serial: SerialNumber::new(0x0102_0304),
        };
        let direct = ca.issue_svid(&leaf).await.unwrap();
        let below = middle.issue_svid(&leaf).await.unwrap();
        for (name, der) in [("root", ca.certificate()), ("middle", &middle_der), ("direct", &direct), ("below", &below)]
        {
            std::fs::write(dir.path().join(name), pem::encode("CERTIFICATE", der)).unwrap();
        }
        let at = NOW.to_string();
        let verify = ["verify", "-x509_strict", "-attime", &at, "-CAfile", "root"];
        let Some(output) = openssl(dir.path(), &[&verify[..], &["direct"]].concat()) else { return };
        assert!(output.status.success(), "{key_type}: {}", text(&output));
        let output = openssl(dir.path(), &[&verify[..], &["-untrusted", "middle", "below"]].concat()).unwrap();
        assert!(output.status.success(), "{key_type}: {}", text(&output));
        let purpose = ["-purpose", "sslserver", "direct"];
        assert!(openssl(dir.path(), &[&verify[..], &purpose].concat()).unwrap().status.success());

        let printed = text(&openssl(dir.path(), &["x509", "-in", "direct", "-noout", "-text"]).unwrap());
        for line in [
            "Version: 3 (0x2)",
            "Serial Number: 16909060 (0x1020304)",
            "Subject: C = US, O = SPIRE, CN = web.example.org",
            "X509v3 Key Usage: critical\n                Digital Signature, Key Encipherment, Key Agreement\n",
            "X509v3 Extended Key Usage: \n                TLS Web Server Authentication, TLS Web Client Authentication\n",
            "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
            "X509v3 Subject Alternative Name: \n                DNS:web.example.org, DNS:*.web.example.org, URI:spiffe://example.org/web\n",
            "X509v3 Subject Key Identifier:",
            "X509v3 Authority Key Identifier:",
            "Not Before: Jan 15 07:59:50 2027 GMT",
            "Not After : Jan 15 09:00:00 2027 GMT",
        ] {
            assert!(printed.contains(line), "{line:?} is missing in\n{printed}");
        }
        let printed = text(&openssl(dir.path(), &["x509", "-in", "root", "-noout", "-text"]).unwrap());
        for line in [
            "X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign\n",
            "X509v3 Basic Constraints: critical\n                CA:TRUE\n",
            "URI:spiffe://example.org\n",
            &format!("serialNumber = {}", ca.parsed().serial_decimal()),
        ] {
            assert!(printed.contains(line), "{line:?} is missing in\n{printed}");
        }
    }
}

#[tokio::test]
async fn openssl_accepts_our_csrs_and_keys_and_we_accept_its() {
    let dir = tempfile::tempdir().unwrap();
    for key_type in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let key = PrivateKey::generate(key_type).unwrap();
        let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
        let csr = create_csr(&key, None, Some(&id), &["a.example".into()]).await.unwrap();
        std::fs::write(dir.path().join("csr"), pem::encode("CERTIFICATE REQUEST", &csr)).unwrap();
        std::fs::write(dir.path().join("key"), pem::encode_private_key(key.pkcs8_der().expose()).expose()).unwrap();
        let Some(output) = openssl(dir.path(), &["req", "-in", "csr", "-verify", "-noout", "-text"]) else { return };
        let printed = text(&output);
        assert!(
            output.status.success() && printed.contains("DNS:a.example, URI:spiffe://example.org/web"),
            "{printed}"
        );
        let output = openssl(dir.path(), &["pkey", "-in", "key", "-pubout"]).unwrap();
        assert_eq!(pem::public_key(&output.stdout).unwrap(), *key.public_key());
    }
    let genkeys: [&[&str]; 5] = [
        &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "k"],
        &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521", "-out", "k"],
        &["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072", "-out", "k"],
        &["ecparam", "-name", "secp384r1", "-genkey", "-out", "k"],
        &["genrsa", "-traditional", "-out", "k", "2048"],
    ];
    for generate in genkeys {
        assert!(openssl(dir.path(), generate).unwrap().status.success());
        let key = pem::private_key(&std::fs::read(dir.path().join("k")).unwrap()).unwrap();
        // OpenSSL signs requests with SHA-256 whatever the curve.
        let request = ["req", "-new", "-key", "k", "-subj", "/C=US/O=x/CN=y", "-outform", "DER", "-out", "c"];
        let uri = ["-addext", "subjectAltName=URI:spiffe://example.org/x"];
        assert!(openssl(dir.path(), &[&request[..], &uri].concat()).unwrap().status.success());
        let csr = Csr::parse(&std::fs::read(dir.path().join("c")).unwrap()).unwrap();
        assert_eq!(csr.public_key(), key.public_key());
        assert_eq!(csr.verify_proof_of_possession(), Ok(()), "{generate:?}");
        assert_eq!(csr.subject().unwrap().to_string(), "CN=y,O=x,C=US");
        assert_eq!(&*csr.uri_sans()[0], "spiffe://example.org/x");
    }
    for (kind, option, want) in
        [("EC", "ec_paramgen_curve:secp224r1", "P-224"), ("RSA", "rsa_keygen_bits:1024", "1024")]
    {
        assert!(
            openssl(dir.path(), &["genpkey", "-algorithm", kind, "-pkeyopt", option, "-out", "k"])
                .unwrap()
                .status
                .success()
        );
        let request = ["req", "-new", "-key", "k", "-subj", "/CN=y", "-outform", "DER", "-out", "c"];
        assert!(openssl(dir.path(), &request).unwrap().status.success());
        let error = Csr::parse(&std::fs::read(dir.path().join("c")).unwrap()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
        assert!(pem::private_key(&std::fs::read(dir.path().join("k")).unwrap()).is_err());
    }
    let verify_pss = [
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-subj", "/CN=pss", "-outform", "DER", "-out",
        "c",
    ];
    let pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-1"];
    assert!(openssl(dir.path(), &[&verify_pss[..], &pss].concat()).unwrap().status.success());
    assert!(Certificate::parse(std::fs::read(dir.path().join("c")).unwrap()).unwrap().is_self_signed());
}

/// A root with a key of this kind, an authority below it on this curve, and a leaf that this signed with this hash.
fn chain_of_others(dir: &Path, root: &[&str], curve: &str, hash: &str) -> Option<Vec<Arc<[u8]>>> {
    const AUTHORITY: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n";
    const LEAF: &str = "keyUsage=critical,digitalSignature\nsubjectAltName=URI:spiffe://example.org/web\n";
    let run = |args: &[&str]| {
        let output = openssl(dir, args)?;
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        Some(())
    };
    let own = ["-nodes", "-days", "900", "-subj", "/CN=root", "-addext", "keyUsage=critical,keyCertSign"];
    run(&[&["req", "-x509", "-keyout", "root.key", "-out", "root"], root, &own[..]].concat())?;
    let curve = format!("ec_paramgen_curve:{curve}");
    for (name, issuer, extensions) in [("middle", "root", AUTHORITY), ("leaf", "middle", LEAF)] {
        let [subject, key, extfile, issuer_key] =
            [format!("/CN={name}"), format!("{name}.key"), format!("{name}.ext"), format!("{issuer}.key")];
        std::fs::write(dir.join(&extfile), extensions).unwrap();
        let request = ["req", "-newkey", "ec", "-nodes", "-out", "csr", "-pkeyopt", &curve, "-subj", &subject];
        run(&[&request[..], &["-keyout", &key]].concat())?;
        let sign =
            ["x509", "-req", "-in", "csr", "-days", "900", "-set_serial", "7", "-out", name, "-extfile", &extfile];
        let by: &[&str] = if name == "leaf" { &[hash] } else { &[] };
        run(&[&sign[..], &["-CA", issuer, "-CAkey", &issuer_key], by].concat())?;
    }
    let read = |name| pem::certificates(&std::fs::read(dir.join(name)).unwrap()).unwrap().remove(0);
    Some(["leaf", "middle", "root"].map(read).to_vec())
}

#[test]
fn chains_with_keys_and_hashes_of_other_authorities_are_verified() {
    let root = ["-newkey", "ed25519"];
    for (curve, hash) in [("P-256", "-sha256"), ("P-256", "-sha512"), ("P-384", "-sha512")] {
        let dir = tempfile::tempdir().unwrap();
        let Some(chain) = chain_of_others(dir.path(), &root, curve, hash) else { return };
        let now = Certificate::parse(chain[0].clone()).unwrap().not_before();
        let roots = TrustRoots::new([&chain[2]]).unwrap();
        let id = verify_x509_svid(&chain[..2], &roots, now);
        assert_eq!(id.as_ref().map(SpiffeId::as_str), Ok("spiffe://example.org/web"), "{curve} {hash}");
        let other = authority_blocking();
        assert_eq!(
            verify_x509_svid(&chain[..2], &TrustRoots::new([&other]).unwrap(), now),
            Err(VerifyError::UnknownAuthority)
        );
    }
}

fn authority_blocking() -> Arc<[u8]> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(authority(KeyType::EcP256)).certificate().clone()
}

#[test]
fn a_root_with_an_ed25519_key_is_in_bundle_documents() {
    use bundle::{BundleError, BundleFormat, bundle_from_json, bundle_to_json};
    let dir = tempfile::tempdir().unwrap();
    let Some(chain) = chain_of_others(dir.path(), &["-newkey", "ed25519"], "P-256", "-sha256") else { return };
    let mut bundle = finial_core::Bundle::empty(TrustDomain::parse("example.org").unwrap());
    bundle.x509_authorities = vec![finial_core::X509Authority { der: chain[2].clone(), tainted: false }];
    let text = bundle_to_json(&bundle, BundleFormat::SPIFFE);
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let key = &document["keys"][0];
    let members: Vec<&str> = key.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        (&members[..], &key["kty"], &key["crv"]),
        (&["use", "kty", "crv", "x", "x5c"][..], &"OKP".into(), &"Ed25519".into())
    );
    assert_eq!(bundle_from_json(&bundle.trust_domain, text.as_bytes()).unwrap(), bundle);
    // Keys as RFC 8037 writes them, and the key of the certificate.
    let with = |x: &str| {
        let mut document = document.clone();
        document["keys"][0]["x"] = x.into();
        bundle_from_json(&bundle.trust_domain, document.to_string().as_bytes())
    };
    assert_eq!(with(&"A".repeat(43)), Err(BundleError::KeyMismatch(0)));
    assert_eq!(with("AAAA"), Err(BundleError::Key { index: 0, cause: KeyError::Malformed }));
}
