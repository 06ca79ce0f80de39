//! The queue before the signer.

use super::*;
use futures::FutureExt;
use futures::future::BoxFuture;
use proptest::prelude::*;

type Entering = BoxFuture<'static, Result<SigningTurn, TooMany>>;

/// Asks for a turn and says whether it came at once.
fn ask(queue: &Arc<SigningQueue>, agent: &str, expiry: i64) -> (Entering, Option<SigningTurn>) {
    let (queue, agent) = (queue.clone(), agent.to_owned());
    let mut entering: Entering = Box::pin(async move { queue.turn(&agent, expiry).await });
    let now = entering.as_mut().now_or_never();
    (entering, now.map(Result::unwrap))
}

#[test]
fn the_nearest_expiry_goes_first_and_among_equals_the_first_who_came() {
    let queue = SigningQueue::of_width(1);
    let mut at_work = ask(&queue, "a", 900).1;
    assert!(at_work.is_some());
    let mut waiting: Vec<_> = [300, 100, 200, 100].iter().map(|e| (*e, ask(&queue, "b", *e).0)).collect();
    let mut order = Vec::new();
    while !waiting.is_empty() {
        drop(at_work.take());
        let turn = waiting.iter_mut().enumerate().find_map(|(at, (_, w))| Some((at, w.now_or_never()?)));
        let (at, turn) = turn.expect("somebody's turn");
        at_work = Some(turn.unwrap());
        order.push(waiting.remove(at).0);
    }
    assert_eq!(order, [100, 100, 200, 300]);
}

#[test]
fn an_agent_that_does_not_wait_for_its_answers_is_refused_and_others_are_not() {
    let queue = SigningQueue::of_width(1);
    let kept: Vec<_> = (0..PER_AGENT_MAX).map(|_| ask(&queue, "greedy", 1)).collect();
    assert!(queue.turn("greedy", 1).now_or_never().is_some_and(|r| r.err() == Some(TooMany)));
    assert!(queue.turn("modest", 1).now_or_never().is_none(), "it waits");
    drop(kept);
    assert!(ask(&queue, "greedy", 1).1.is_some());
    assert!(queue.lock().by_agent.len() <= 1);
}

#[derive(Clone, Debug)]
enum Step {
    Ask(i64),
    GiveUp(usize),
    Finish(usize),
}

proptest! {
    /// Whoever gives up when, places are never lost and never given twice.
    #[test]
    fn as_many_work_as_may_whenever_somebody_waits(
        width in 1usize..4,
        steps in proptest::collection::vec(
            prop_oneof![
                3 => (0i64..5).prop_map(Step::Ask),
                1 => (0usize..9).prop_map(Step::GiveUp),
                2 => (0usize..9).prop_map(Step::Finish),
            ],
            0..60,
        ),
    ) {
        let queue = SigningQueue::of_width(width);
        let (mut working, mut waiting): (Vec<SigningTurn>, Vec<Entering>) = (Vec::new(), Vec::new());
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Ask(expiry) => match ask(&queue, &format!("agent{n}"), expiry) {
                    (_, Some(turn)) => working.push(turn),
                    (entering, None) => waiting.push(entering),
                },
                // Called or not, it is not polled again.
                Step::GiveUp(at) if at < waiting.len() => drop(waiting.remove(at)),
                Step::Finish(at) if at < working.len() => drop(working.remove(at)),
                _ => {}
            }
            prop_assert!(working.len() <= width);
        }
        let mut left = Vec::new();
        for mut entering in waiting {
            match entering.as_mut().now_or_never() {
                Some(turn) => working.push(turn.unwrap()),
                None => left.push(entering),
            }
        }
        prop_assert!(working.len() <= width);
        prop_assert!(left.is_empty() || working.len() == width, "{} work, {} wait", working.len(), left.len());
        drop(working);
        drop(left);
        prop_assert_eq!(queue.lock().running, 0);
        prop_assert!(queue.lock().by_agent.is_empty());
    }
}
