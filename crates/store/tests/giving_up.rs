//! Callers that go away while the datastore works for them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, clippy::print_stdout)]

mod common;

use common::{Lab, NOW, agent};
use finial_core::{AgentRecord, JoinToken};
use std::future::poll_fn;
use std::task::Poll;

on_every_database!(a_caller_that_gives_up_leaves_no_transaction);

/// A caller that gives up half-way leaves nothing behind, neither half a change nor a transaction.
async fn a_caller_that_gives_up_leaves_no_transaction(lab: Lab) {
    let Some(store) = lab.open().await else { return };
    let (mut undone, mut done, mut ended) = (0, 0, false);
    for polls in 0_i32..48 {
        let token = JoinToken { token: format!("t{polls}"), expires_at: NOW + 60 };
        store.create_join_token(&token, None).await.unwrap();
        let record =
            AgentRecord { selectors: Default::default(), ..agent(&format!("/spire/agent/join_token/t{polls}")) };
        {
            let mut attesting = std::pin::pin!(store.attest_by_join_token(&token.token, &record, NOW));
            let mut left = polls;
            let mut finished = false;
            poll_fn(|cx| {
                left -= 1;
                if left < 0 {
                    return Poll::Ready(());
                }
                attesting.as_mut().poll(cx).map(|_| finished = true)
            })
            .await;
            ended |= finished;
        }
        let unused = store.fetch_join_token(&token.token).await.unwrap().is_some();
        let agent = store.fetch_node(&record.id).await.unwrap();
        assert_eq!(agent.is_none(), unused, "both or neither, after {polls} polls");
        *(if unused { &mut undone } else { &mut done }) += 1;
    }
    assert!(undone > 0 && done > 0 && ended, "given up before and after: {undone}, {done}");
}
