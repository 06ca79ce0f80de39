//! Conformance suites: what every implementation of a trait must do, each one macro line in the implementation's tests.
//!
//! They assert, as tests do; nothing but tests calls them.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod ca;
mod credentials;
mod publish;
mod upstream;

pub use credentials::{same_question_same_answer, usual_credentials_stay_usable};
pub use publish::{BundlePublisherFixture, NotifierFixture, ReadRoots, publishes_the_last_bundle, tells_of_the_bundle};
pub use upstream::{UpstreamAuthorityFixture, bad_csrs_are_refused, mints_authorities};

use crate::{AgentNodeAttestor, AttestVerdict, Challenger, KeyManager, PluginError, ServerNodeAttestor};
use async_trait::async_trait;
use finial_core::{ErrorKind, KeyType};
use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;

/// Runs a test's future on a runtime of its own.
pub fn run<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(test)
}

/// The suite for key managers. `$make` is an expression that gives a new, empty `Arc<dyn KeyManager>`.
#[macro_export]
macro_rules! key_manager_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn keys_sign_and_are_found_by_name() {
                $crate::conformance::run($crate::conformance::keys_sign_and_are_found_by_name($make));
            }
            #[test]
            fn generating_again_replaces_and_spares_handed_out_signers() {
                $crate::conformance::run($crate::conformance::generating_again_replaces($make));
            }
            #[test]
            fn bad_requests_are_refused() {
                $crate::conformance::run($crate::conformance::bad_key_requests_are_refused($make));
            }
            #[test]
            fn concurrent_generation_loses_no_key() {
                $crate::conformance::run($crate::conformance::concurrent_generation_loses_no_key($make));
            }
        }
    };
}

/// Each key type can be made, found by its name and used; all are listed in order.
pub async fn keys_sign_and_are_found_by_name(manager: Arc<dyn KeyManager>) {
    assert!(manager.keys().await.expect("lists").is_empty(), "a new key manager is empty");
    assert!(manager.key("x509-CA-A").await.expect("asks").is_none());
    let types = [("d", KeyType::EcP256), ("c", KeyType::EcP384), ("b", KeyType::Rsa2048), ("a", KeyType::Rsa4096)];
    for (id, key_type) in types {
        let made = manager.generate_key(id, key_type).await.expect("generates");
        assert_eq!(made.public_key().key_type(), Some(key_type));
        let found = manager.key(id).await.expect("asks").expect("is there");
        assert_eq!(found.public_key(), made.public_key());
        let algorithm = found.public_key().default_algorithm();
        let signature = found.sign(algorithm, b"message").await.expect("signs");
        made.public_key().verify(algorithm, b"message", &signature).expect("verifies");
        made.public_key().verify(algorithm, b"other", &signature).expect_err("another message does not verify");
    }
    let names: Vec<_> = manager.keys().await.expect("lists").into_iter().map(|(id, _)| id).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
}

/// A name holds one key; who has the old signer can go on with it.
pub async fn generating_again_replaces(manager: Arc<dyn KeyManager>) {
    let old = manager.generate_key("k", KeyType::EcP256).await.expect("generates");
    let new = manager.generate_key("k", KeyType::EcP384).await.expect("generates again");
    assert!(old.public_key() != new.public_key());
    let found = manager.key("k").await.expect("asks").expect("is there");
    assert_eq!(found.public_key(), new.public_key());
    assert_eq!(manager.keys().await.expect("lists").len(), 1);
    let algorithm = old.public_key().default_algorithm();
    let signature = old.sign(algorithm, b"m").await.expect("the old signer still signs");
    old.public_key().verify(algorithm, b"m", &signature).expect("with the old key");
}

/// No key without a name.
pub async fn bad_key_requests_are_refused(manager: Arc<dyn KeyManager>) {
    let error = manager.generate_key("", KeyType::EcP256).await.err().expect("needs a name");
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert!(error.message.contains("key id is required"), "{error}");
    assert!(manager.keys().await.expect("lists").is_empty());
}

/// Keys made at the same time are all there afterwards.
pub async fn concurrent_generation_loses_no_key(manager: Arc<dyn KeyManager>) {
    let make = |id: &'static str| {
        let manager = manager.clone();
        async move { manager.generate_key(id, KeyType::EcP256).await.map(drop) }
    };
    let (a, b, c, d) = tokio::join!(make("a"), make("b"), make("c"), make("d"));
    for made in [a, b, c, d] {
        made.expect("generates");
    }
    assert_eq!(manager.keys().await.expect("lists").len(), 4);
}

/// Both halves of a node attestor, and some who pretend.
pub struct NodeAttestorFixture {
    /// The server's half.
    pub server: Arc<dyn ServerNodeAttestor>,
    /// The agent's half with genuine evidence.
    pub agent: Arc<dyn AgentNodeAttestor>,
    /// What the server must find out about it; the order of selectors counts not.
    pub expected: AttestVerdict,
    /// Agents that must be refused: what is wrong with each, and the kind of the refusal.
    pub impostors: Vec<(&'static str, Arc<dyn AgentNodeAttestor>, ErrorKind)>,
    /// Whether the server asks a challenge. Then a replayed answer must be refused.
    pub challenges: bool,
}

/// The suite for node attestors, agent half against server half. `$make` gives a [`conformance::NodeAttestorFixture`].
///
/// [`conformance::NodeAttestorFixture`]: crate::conformance::NodeAttestorFixture
#[macro_export]
macro_rules! node_attestor_conformance {
    ($make:expr) => {
        mod conformance {
            use super::*;

            #[test]
            fn genuine_evidence_is_accepted_again_and_again() {
                $crate::conformance::run($crate::conformance::genuine_evidence_is_accepted($make));
            }
            #[test]
            fn impostors_are_refused() {
                $crate::conformance::run($crate::conformance::impostors_are_refused($make));
            }
            #[test]
            fn replayed_and_altered_answers_are_refused() {
                $crate::conformance::run($crate::conformance::replayed_and_altered_answers_are_refused($make));
            }
            #[test]
            fn garbage_is_refused_by_both_halves() {
                $crate::conformance::run($crate::conformance::garbage_is_refused($make));
            }
        }
    };
}

/// How the agent's end behaves, and what it saw.
struct Wire<'a> {
    session: Option<&'a mut dyn crate::AttestSession>,
    canned: VecDeque<Vec<u8>>,
    alter: fn(Vec<u8>) -> Vec<u8>,
    challenges: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
}

#[async_trait]
impl Challenger for Wire<'_> {
    async fn challenge(&mut self, challenge: Vec<u8>) -> Result<Vec<u8>, PluginError> {
        self.challenges.push(challenge.clone());
        let answer = match (self.canned.pop_front(), self.session.as_mut()) {
            (Some(canned), _) => canned,
            (None, Some(session)) => session.respond(&challenge).await?,
            (None, None) => return Err(PluginError::new(ErrorKind::Unavailable, "the agent is gone")),
        };
        let answer = (self.alter)(answer);
        self.answers.push(answer.clone());
        Ok(answer)
    }
}

struct Attempt {
    verdict: Result<AttestVerdict, PluginError>,
    payload: Vec<u8>,
    challenges: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
}

async fn attempt(
    server: &dyn ServerNodeAttestor,
    agent: &dyn AgentNodeAttestor,
    canned: Vec<Vec<u8>>,
    alter: fn(Vec<u8>) -> Vec<u8>,
) -> Attempt {
    let mut session = agent.begin().await.expect("begins");
    let payload = session.payload().to_vec();
    let session: &mut dyn crate::AttestSession = session.as_mut();
    let mut wire = Wire { session: Some(session), canned: canned.into(), alter, challenges: vec![], answers: vec![] };
    let verdict = server.attest(&payload, &mut wire).await;
    Attempt { verdict, payload, challenges: wire.challenges, answers: wire.answers }
}

fn as_it_is(answer: Vec<u8>) -> Vec<u8> {
    answer
}

/// Twice, with the same verdict; challenges differ.
pub async fn genuine_evidence_is_accepted(fixture: NodeAttestorFixture) {
    let sorted = |mut verdict: AttestVerdict| {
        verdict.selectors.sort();
        verdict
    };
    let expected = sorted(fixture.expected);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let done = attempt(&*fixture.server, &*fixture.agent, vec![], as_it_is).await;
        assert_eq!(sorted(done.verdict.expect("is accepted")), expected);
        assert_eq!(!done.challenges.is_empty(), fixture.challenges);
        for challenge in done.challenges {
            assert!(!seen.contains(&challenge), "a challenge was used twice");
            seen.push(challenge);
        }
    }
}

/// Each of them, with the kind that belongs to it.
pub async fn impostors_are_refused(fixture: NodeAttestorFixture) {
    for (what, impostor, kind) in fixture.impostors {
        let refusal = attempt(&*fixture.server, &*impostor, vec![], as_it_is).await.verdict;
        let Err(error) = refusal else { panic!("{what}: was accepted") };
        assert_eq!(error.kind, kind, "{what}: {error}");
    }
}

/// Answers of an earlier attempt, and answers with a bit turned or the end cut off, prove nothing.
pub async fn replayed_and_altered_answers_are_refused(fixture: NodeAttestorFixture) {
    if !fixture.challenges {
        return;
    }
    let first = attempt(&*fixture.server, &*fixture.agent, vec![], as_it_is).await;
    first.verdict.expect("is accepted");
    let replayed = attempt(&*fixture.server, &*fixture.agent, first.answers, as_it_is).await;
    let error = replayed.verdict.expect_err("a replayed answer is refused");
    assert_eq!(error.kind, ErrorKind::Denied, "{error}");
    let cut: fn(Vec<u8>) -> Vec<u8> = |answer| answer[..answer.len() / 2].to_vec();
    let empty: fn(Vec<u8>) -> Vec<u8> = |_| Vec::new();
    let turned: fn(Vec<u8>) -> Vec<u8> = |mut answer| {
        // Within the longest run of base64, which is or belongs to the signature: swap one letter for another.
        let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
        let (mut longest, mut start) = (0..0, 0);
        for at in 0..=answer.len() {
            if at == answer.len() || !letter(answer[at]) {
                if at - start >= longest.len() {
                    longest = start..at;
                }
                start = at + 1;
            }
        }
        let at = (longest.start + longest.end) / 2;
        answer[at] = if answer[at] == b'A' { b'B' } else { b'A' };
        answer
    };
    for alter in [cut, empty, turned] {
        let altered = attempt(&*fixture.server, &*fixture.agent, vec![], alter).await;
        let error = altered.verdict.expect_err("an altered answer is refused");
        assert!(matches!(error.kind, ErrorKind::Denied | ErrorKind::InvalidArgument), "{error}");
    }
}

/// Neither half accepts or panics on what is not of its protocol.
pub async fn garbage_is_refused(fixture: NodeAttestorFixture) {
    let genuine = attempt(&*fixture.server, &*fixture.agent, vec![], as_it_is).await.payload;
    let mut samples: Vec<Vec<u8>> = [&b""[..], b"\0", b"null", b"{}", b"[]", b"\"x\"", b"{\"certificates\":null}"]
        .into_iter()
        .map(<[u8]>::to_vec)
        .collect();
    samples.push(vec![0xff; 70_000]);
    samples.push([b"[".repeat(5_000), b"]".repeat(5_000)].concat());
    samples.extend((1..8).map(|part| genuine[..genuine.len() * part / 8].to_vec()));
    for garbage in samples {
        let nobody =
            Wire { session: None, canned: VecDeque::new(), alter: as_it_is, challenges: vec![], answers: vec![] };
        let mut nobody = nobody;
        let refusal = fixture.server.attest(&garbage, &mut nobody).await;
        let error = refusal.expect_err("garbage is refused");
        assert!(matches!(error.kind, ErrorKind::InvalidArgument | ErrorKind::Denied), "{error}");
        let mut session = fixture.agent.begin().await.expect("begins");
        session.respond(&garbage).await.expect_err("a garbage challenge is refused");
    }
}
