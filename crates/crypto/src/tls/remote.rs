//! Handshakes with keys that sign elsewhere, in a plugin or a KMS. rustls asks for a signature and cannot wait for one, so
//! that the thread must: it has to be one that may, which [`patiently`] says.

use crate::key::SignatureAlgorithm as A;
use crate::signer::Signer;
use rustls::sign::{self, SigningKey};
use rustls::{Error, SignatureScheme};
use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long the key may take. Whoever waits at the other end is not more patient.
const DEADLINE: Duration = Duration::from_secs(10);

/// What goes with which key; the first that the peer takes is used.
const SCHEMES: [(SignatureScheme, A); 9] = [
    (SignatureScheme::ECDSA_NISTP256_SHA256, A::EcdsaP256Sha256),
    (SignatureScheme::ECDSA_NISTP384_SHA384, A::EcdsaP384Sha384),
    (SignatureScheme::ECDSA_NISTP521_SHA512, A::EcdsaP521Sha512),
    (SignatureScheme::RSA_PSS_SHA256, A::RsaPssSha256),
    (SignatureScheme::RSA_PSS_SHA384, A::RsaPssSha384),
    (SignatureScheme::RSA_PSS_SHA512, A::RsaPssSha512),
    (SignatureScheme::RSA_PKCS1_SHA256, A::RsaPkcs1Sha256),
    (SignatureScheme::RSA_PKCS1_SHA384, A::RsaPkcs1Sha384),
    (SignatureScheme::RSA_PKCS1_SHA512, A::RsaPkcs1Sha512),
];

thread_local! {
    static PATIENT: Cell<bool> = const { Cell::new(false) };
}

/// Does a step of a handshake on a thread that keeps nobody waiting: signatures may be waited for meanwhile.
pub fn patiently<T>(step: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            PATIENT.set(self.0);
        }
    }
    let _before = Before(PATIENT.replace(true));
    step()
}

/// A key that signs elsewhere, as rustls knows keys.
pub(super) struct RemoteKey(pub(super) Arc<dyn Signer>);

impl std::fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RemoteKey")
    }
}

impl SigningKey for RemoteKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn sign::Signer>> {
        let fits = |(scheme, algorithm): &&(SignatureScheme, A)| {
            offered.contains(scheme) && self.0.public_key().supports(*algorithm)
        };
        let (scheme, algorithm) = *SCHEMES.iter().find(fits)?;
        Some(Box::new(RemoteSigner { key: self.0.clone(), scheme, algorithm }))
    }

    fn algorithm(&self) -> rustls::SignatureAlgorithm {
        match self.0.public_key().supports(A::RsaPssSha256) {
            true => rustls::SignatureAlgorithm::RSA,
            false => rustls::SignatureAlgorithm::ECDSA,
        }
    }
}

/// One signature to come.
struct RemoteSigner {
    key: Arc<dyn Signer>,
    scheme: SignatureScheme,
    algorithm: A,
}

impl std::fmt::Debug for RemoteSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RemoteSigner({:?})", self.scheme)
    }
}

impl sign::Signer for RemoteSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        if !PATIENT.get() {
            // Waiting here could keep the key from answering.
            return Err(Error::General("the key signs elsewhere, and this thread cannot wait for it".into()));
        }
        match wait_for(self.key.sign(self.algorithm, message)) {
            Some(signed) => signed.map_err(|e| Error::General(format!("the key does not sign: {e}"))),
            None => Err(Error::General(format!("the key did not sign within {} s", DEADLINE.as_secs()))),
        }
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks this thread.
fn wait_for<T>(future: impl Future<Output = T>) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let (mut future, until) = (pin!(future), Instant::now() + DEADLINE);
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(done);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}
