//! The proof of possession: who can sign both nonces holds the key.

use super::{Answer, Bytes, Challenge, EcdsaAnswer, NONCE_BYTES, Nonce, RsaAnswer};
use aws_lc_rs::digest::{Digest, SHA256, SHA384, digest};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA256_ASN1,
    ECDSA_P521_SHA256_ASN1_SIGNING, EcdsaKeyPair, RSA_PSS_2048_8192_SHA256, RsaParameters, RsaPssSaltLength,
    UnparsedPublicKey, VerificationAlgorithm,
};
use finial_crypto::{PrivateKey, PublicKey, SignatureAlgorithm, random_bytes};

/// SPIRE's agents sign with the longest salt that fits.
static RSA_PSS_LONG_SALT: RsaParameters = RSA_PSS_2048_8192_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);

/// What kind of proof a key allows.
enum KeyKind {
    Rsa,
    P256,
    P384,
    P521,
}

fn kind_of(key: &PublicKey) -> KeyKind {
    match key.default_algorithm() {
        SignatureAlgorithm::EcdsaP256Sha256 => KeyKind::P256,
        SignatureAlgorithm::EcdsaP384Sha384 => KeyKind::P384,
        SignatureAlgorithm::EcdsaP521Sha512 => KeyKind::P521,
        _ => KeyKind::Rsa,
    }
}

/// A challenge that fits the key.
pub(super) fn challenge(key: &PublicKey) -> Challenge {
    let nonce = Some(Nonce { nonce: Bytes(random_bytes::<NONCE_BYTES>().to_vec()) });
    match kind_of(key) {
        KeyKind::Rsa => Challenge { rsa_signature: nonce, ecdsa_signature: None },
        _ => Challenge { rsa_signature: None, ecdsa_signature: nonce },
    }
}

/// Both nonces, the challenger's first.
fn combined(challenge: &Bytes, answer: &Bytes) -> Result<Vec<u8>, &'static str> {
    if challenge.0.len() != NONCE_BYTES {
        return Err("invalid challenge nonce");
    }
    if answer.0.len() != NONCE_BYTES {
        return Err("invalid response nonce");
    }
    Ok([challenge.0.as_slice(), answer.0.as_slice()].concat())
}

/// The agent's answer.
pub(super) fn answer(key: &PrivateKey, challenge: &Challenge) -> Result<Answer, String> {
    let nonce = Bytes(random_bytes::<NONCE_BYTES>().to_vec());
    if let KeyKind::Rsa = kind_of(key.public_key()) {
        let challenge = challenge.rsa_signature.as_ref().ok_or("expecting RSA challenge")?;
        let message = combined(&challenge.nonce, &nonce)?;
        let signature = key.sign_now(SignatureAlgorithm::RsaPssSha256, &message).map_err(|e| e.to_string())?;
        let rsa_signature = Some(RsaAnswer { nonce, signature: Bytes(signature) });
        return Ok(Answer { rsa_signature, ecdsa_signature: None });
    }
    let challenge = challenge.ecdsa_signature.as_ref().ok_or("expecting ECDSA challenge")?;
    let message = combined(&challenge.nonce, &nonce)?;
    let signature = sign_ecdsa_sha256(key, &message)?;
    let (r, s) = split(&signature).ok_or("signature is malformed")?;
    let ecdsa_signature = Some(EcdsaAnswer { nonce, r: Bytes(r.to_vec()), s: Bytes(s.to_vec()) });
    Ok(Answer { rsa_signature: None, ecdsa_signature })
}

/// ECDSA with SHA-256 on any curve, as the protocol wants it, as ASN.1 DER.
fn sign_ecdsa_sha256(key: &PrivateKey, message: &[u8]) -> Result<Vec<u8>, String> {
    let failed = |_| "signing failed".to_owned();
    let pkcs8 = key.pkcs8_der();
    let signature = match kind_of(key.public_key()) {
        KeyKind::P384 => {
            // There is no P-384 with SHA-256 to sign with. A digest is but a number to ECDSA: SHA-256's with zeros in front,
            // given as one of SHA-384's length, is the same number.
            let hash = digest(&SHA256, message);
            let padded = [&[0; 16][..], hash.as_ref()].concat();
            let padded = Digest::import_less_safe(&padded, &SHA384).map_err(failed)?;
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, pkcs8.expose());
            pair.map_err(|e| e.to_string())?.sign_digest(&padded).map_err(failed)?
        }
        KeyKind::P521 => {
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P521_SHA256_ASN1_SIGNING, pkcs8.expose());
            let pair = pair.map_err(|e| e.to_string())?;
            pair.sign(&aws_lc_rs::rand::SystemRandom::new(), message).map_err(failed)?
        }
        _ => {
            return key.sign_now(SignatureAlgorithm::EcdsaP256Sha256, message).map_err(|e| e.to_string());
        }
    };
    Ok(signature.as_ref().to_vec())
}

/// Checks the agent's answer.
pub(super) fn verify(key: &PublicKey, challenge: &Challenge, answer: &Answer) -> Result<(), &'static str> {
    if let KeyKind::Rsa = kind_of(key) {
        let challenge = challenge.rsa_signature.as_ref().ok_or("expecting RSA challenge")?;
        let answer = answer.rsa_signature.as_ref().ok_or("expecting RSA response")?;
        let message = combined(&challenge.nonce, &answer.nonce)?;
        let holds = |parameters: &'static RsaParameters| {
            UnparsedPublicKey::new(parameters, key.spki_der()).verify(&message, &answer.signature.0).is_ok()
        };
        return if holds(&RSA_PSS_2048_8192_SHA256) || holds(&RSA_PSS_LONG_SALT) {
            Ok(())
        } else {
            Err("RSA signature verify failed")
        };
    }
    let challenge = challenge.ecdsa_signature.as_ref().ok_or("expecting ECDSA challenge")?;
    let answer = answer.ecdsa_signature.as_ref().ok_or("expecting ECDSA response")?;
    let message = combined(&challenge.nonce, &answer.nonce)?;
    let algorithm: &'static dyn VerificationAlgorithm = match kind_of(key) {
        KeyKind::P384 => &ECDSA_P384_SHA256_ASN1,
        KeyKind::P521 => &ECDSA_P521_SHA256_ASN1,
        _ => &ECDSA_P256_SHA256_ASN1,
    };
    let failed = "ECDSA signature verify failed";
    let signature = join(&answer.r.0, &answer.s.0).ok_or(failed)?;
    UnparsedPublicKey::new(algorithm, key.spki_der()).verify(&message, &signature).map_err(|_| failed)
}

/// Octets of the largest number in a signature: P-521 has 66.
const NUMBER_BYTES_MAX: usize = 66;

/// `SEQUENCE { r INTEGER, s INTEGER }` of two big endian numbers.
fn join(r: &[u8], s: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(2 * NUMBER_BYTES_MAX + 6);
    for number in [r, s] {
        let zeros = number.iter().take_while(|b| **b == 0).count();
        let digits = number.get(zeros..)?;
        if digits.is_empty() || digits.len() > NUMBER_BYTES_MAX {
            return None;
        }
        let pad = digits.first().is_some_and(|b| b & 0x80 != 0);
        body.extend([2, u8::try_from(digits.len() + usize::from(pad)).ok()?]);
        body.extend(pad.then_some(0));
        body.extend(digits);
    }
    let length = u8::try_from(body.len()).ok()?;
    let header: &[u8] = if length < 0x80 { &[0x30, length] } else { &[0x30, 0x81, length] };
    Some([header, &body].concat())
}

/// The two numbers, without leading zeros.
fn split(signature: &[u8]) -> Option<(&[u8], &[u8])> {
    let body = match signature {
        [0x30, 0x81, _, body @ ..] | [0x30, 0..=0x7f, body @ ..] => body,
        _ => return None,
    };
    let number = |from: &'_ [u8]| -> Option<usize> { from.get(1).map(|l| usize::from(*l) + 2) };
    let end = number(body)?;
    let (first, second) = (body.get(2..end)?, body.get(end..)?);
    let second = second.get(2..number(second)?)?;
    let trim = |digits: &'_ [u8]| digits.iter().take_while(|b| **b == 0).count();
    Some((first.get(trim(first)..)?, second.get(trim(second)..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_numbers_survive_and_any_bytes_are_answered(
            r in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..70),
            s in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..70),
        ) {
            let strip = |n: &[u8]| n.iter().copied().skip_while(|b| *b == 0).collect::<Vec<_>>();
            match join(&r, &s) {
                Some(der) => {
                    let (first, second) = split(&der).expect("what was joined can be split");
                    proptest::prop_assert_eq!((first, second), (&*strip(&r), &*strip(&s)));
                }
                None => proptest::prop_assert!([&r, &s].iter().any(|n| !(1..=NUMBER_BYTES_MAX).contains(&strip(n).len()))),
            }
            let _ = split(&r);
        }
    }

    #[test]
    fn numbers_survive_the_way_through_der() {
        let long = [0xff; 66];
        for (r, s) in [(&[1u8][..], &[0x80][..]), (&[0x7f, 0], &long), (&long, &long)] {
            let der = join(r, s).expect("fits");
            assert_eq!(split(&der), Some((r, s)));
        }
        assert!(join(&[], &[1]).is_none() && join(&[0, 0], &[1]).is_none() && join(&[1; 67], &[1]).is_none());
        for bad in [&b""[..], &[0x30], &[0x30, 0], &[0x30, 3, 2, 9, 1], &[0x31, 0, 0]] {
            assert!(split(bad).is_none());
        }
    }
}
