//! Callers that go away while the datastore works for them.

mod common;

use common::{NOW, agent, clock};
use finial_core::{AgentRecord, JoinToken};
use finial_store::{Store, StoreSettings};
use std::future::poll_fn;
use std::task::Poll;

/// A caller that gives up half-way leaves nothing behind, neither half a change nor a transaction.
#[tokio::test]
async fn a_caller_that_gives_up_leaves_no_transaction() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(StoreSettings::file(folder.path().join("db")), clock()).await.unwrap();
    let (mut undone, mut done) = (0, 0);
    for polls in 0_i32..16 {
        let token = JoinToken { token: format!("t{polls}"), expires_at: NOW + 60 };
        store.create_join_token(&token, None).await.unwrap();
        let record =
            AgentRecord { selectors: Default::default(), ..agent(&format!("/spire/agent/join_token/t{polls}")) };
        {
            let mut attesting = std::pin::pin!(store.attest_by_join_token(&token.token, &record, NOW));
            let mut left = polls;
            poll_fn(|cx| {
                left -= 1;
                if left < 0 { Poll::Ready(()) } else { attesting.as_mut().poll(cx).map(drop) }
            })
            .await;
        }
        let unused = store.consume_join_token(&token.token).await.unwrap().is_some();
        let agent = store.fetch_node(&record.id).await.unwrap();
        assert_eq!(agent.is_none(), unused, "both or neither, after {polls} polls");
        *(if unused { &mut undone } else { &mut done }) += 1;
    }
    assert!(undone > 0 && done > 0, "given up before and after: {undone}, {done}");
}
