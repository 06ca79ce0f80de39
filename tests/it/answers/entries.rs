//! The Entry service.

use super::{Answers, ask, ask_list, id, ids, of_servers, selector, show};
use finial_net::client::uds_channel;
use finial_proto::server::entry::{self as entries, entry_client::EntryClient};
use finial_proto::types::{self, EntryMask, SelectorMatch};
use testkit::{Server, ServerOptions};
use tonic::Response;
use tonic::transport::Channel;

fn good_entry(id_: &str) -> types::Entry {
    types::Entry {
        id: id_.into(),
        spiffe_id: id("example.org", &format!("/{id_}")),
        parent_id: id("example.org", "/parent"),
        selectors: vec![selector("a", "b")],
        ..Default::default()
    }
}

/// Good entries with one thing changed each. Not among them, as Finial means to answer otherwise: IDs of more than 2,048
/// bytes, DNS names with characters that no DNS name has (both refused), the same selector or DNS name twice (taken as one),
/// and DNS names out of order (kept as they were given).
fn odd_entries(prefix: &str) -> Vec<types::Entry> {
    let mut odd: Vec<types::Entry> = Vec::new();
    let base = |odd: &Vec<types::Entry>| good_entry(&format!("{prefix}{}", odd.len()));
    for spiffe_id in ids() {
        odd.push(types::Entry { spiffe_id, ..base(&odd) });
    }
    for parent_id in ids().into_iter().filter(|i| i.as_ref().is_none_or(|i| !i.path.ends_with("nobody"))) {
        odd.push(types::Entry { parent_id, ..base(&odd) });
    }
    for selectors in [
        vec![],
        vec![selector("", "x")],
        vec![selector("x", "")],
        vec![selector("x:y", "z")],
        vec![selector("x", "y:z")],
    ] {
        odd.push(types::Entry { selectors, ..base(&odd) });
    }
    for name in [
        "",
        " ",
        "a",
        "A.b",
        "a.b.",
        ".a",
        "a..b",
        "-a.b",
        "a-.b",
        "a_b.c",
        "*",
        "*.a",
        "a.*",
        "*.*.a",
        "*a.b",
        "1.2.3.4",
        "ü.b",
        "ab--c.d",
        &"a".repeat(63),
        &"a".repeat(64),
        &"a.".repeat(127),
        &("a.".repeat(126) + "a"),
    ] {
        odd.push(types::Entry { dns_names: vec![name.into()], ..base(&odd) });
    }
    for names in [&["*.b", "a.b"][..], &["*.b", "b"]] {
        odd.push(types::Entry { dns_names: names.iter().map(|n| (*n).into()).collect(), ..base(&odd) });
    }
    for ttl in [-1, i32::MIN, i32::MAX] {
        odd.push(types::Entry { x509_svid_ttl: ttl, ..base(&odd) });
        odd.push(types::Entry { jwt_svid_ttl: ttl, ..base(&odd) });
    }
    for name in ["", "no body", "nobody", "spiffe://nobody", "example.org", "spiffe://nobody/x"] {
        odd.push(types::Entry { federates_with: vec![name.into()], ..base(&odd) });
    }
    for hint in ["h".repeat(1024), "h".repeat(1025), "ü".repeat(513)] {
        odd.push(types::Entry { hint, ..base(&odd) });
    }
    for id_ in ["a b", "ü", "a/b", &"i".repeat(255), &"i".repeat(256)] {
        odd.push(types::Entry { id: id_.into(), ..base(&odd) });
    }
    for expires_at in [-1, 1, 253_402_300_800] {
        odd.push(types::Entry { expires_at, ..base(&odd) });
    }
    odd.push(types::Entry { revision_number: 7, created_at: 7, ..base(&odd) });
    odd
}

#[test]
fn entries() {
    of_servers(&ServerOptions::default(), odd);
}

/// Asks for all of the above.
pub(super) async fn odd(server: &Server) -> Answers {
    let mut client = EntryClient::new(uds_channel(server.socket()));
    let mut answers = Answers::new();
    let mask = EntryMask { created_at: false, ..all_of_entry() };
    let create = |entry| entries::BatchCreateEntryRequest { entries: vec![entry], output_mask: Some(mask) };
    for entry in odd_entries("c") {
        ask!(answers, client.batch_create_entry, create(entry));
    }
    let good = good_entry("good");
    ask!(
        answers,
        client.batch_create_entry,
        create(good.clone()),
        create(good.clone()),
        create(types::Entry { id: "other-id".into(), ..good.clone() }),
        create(types::Entry { spiffe_id: id("example.org", "/else"), ..good.clone() }),
        entries::BatchCreateEntryRequest::default(),
    );
    let update = |entry, input_mask| entries::BatchUpdateEntryRequest {
        entries: vec![entry],
        input_mask,
        output_mask: Some(mask),
    };
    for entry in odd_entries("u") {
        let entry = types::Entry { id: "good".into(), ..entry };
        ask!(answers, client.batch_update_entry, update(entry, None));
    }
    let only = |set: fn(&mut EntryMask)| {
        let mut mask = EntryMask::default();
        set(&mut mask);
        Some(mask)
    };
    for mask in [
        only(|_| ()),
        only(|m| m.spiffe_id = true),
        only(|m| m.parent_id = true),
        only(|m| m.selectors = true),
        only(|m| m.dns_names = true),
        only(|m| m.federates_with = true),
        only(|m| m.hint = true),
        only(|m| m.revision_number = true),
        only(|m| m.x509_svid_ttl = true),
        only(|m| m.store_svid = true),
        only(|m| m.additional_attributes = true),
    ] {
        ask!(
            answers,
            client.batch_update_entry,
            update(types::Entry { id: "good".into(), ..Default::default() }, mask)
        );
    }
    ask!(
        answers,
        client.batch_update_entry,
        update(types::Entry::default(), None),
        update(types::Entry { id: String::new(), ..good.clone() }, None),
        update(types::Entry { id: "none".into(), ..good.clone() }, None),
        update(types::Entry { store_svid: true, dns_names: vec!["x".into()], ..good.clone() }, None),
    );
    let ids = |ids: &[&str]| ids.iter().map(|i| (*i).to_owned()).collect();
    ask!(answers, client.get_entry, entries::GetEntryRequest::default(), get("none", None), get("good", Some(mask)));
    listed(&mut client, &mut answers).await;
    ask!(
        answers,
        client.batch_delete_entry,
        entries::BatchDeleteEntryRequest::default(),
        entries::BatchDeleteEntryRequest { ids: ids(&["", "none", "good", "good"]) },
    );
    ask!(answers, client.get_authorized_entries, entries::GetAuthorizedEntriesRequest::default());
    let none = tokio_stream::empty::<entries::SyncAuthorizedEntriesRequest>();
    answers.push(("sync".into(), show(client.sync_authorized_entries(none).await.map(|_| Response::new(())))));
    answers
}

async fn listed(client: &mut EntryClient<Channel>, answers: &mut Answers) {
    for filter in filters() {
        let list = |page_token: &str, page_size| entries::ListEntriesRequest {
            filter: Some(filter.clone()),
            output_mask: Some(EntryMask::default()),
            page_size,
            page_token: page_token.into(),
        };
        ask_list!(answers, client.list_entries, entries, list("", 0));
        ask!(answers, client.count_entries, counting(Some(filter.clone())));
    }
    for (page_token, page_size) in
        [("x", 2), ("-1", 2), ("99999999", 2), ("99999999999999999999999", 2), ("", -1), ("x", 0)]
    {
        let page_token = page_token.to_owned();
        let request = entries::ListEntriesRequest {
            page_token,
            page_size,
            output_mask: Some(EntryMask::default()),
            filter: None,
        };
        ask_list!(answers, client.list_entries, entries, request);
    }
}

fn get(id: &str, output_mask: Option<EntryMask>) -> entries::GetEntryRequest {
    entries::GetEntryRequest { id: id.into(), output_mask }
}

fn all_of_entry() -> EntryMask {
    EntryMask {
        spiffe_id: true,
        parent_id: true,
        selectors: true,
        x509_svid_ttl: true,
        federates_with: true,
        admin: true,
        downstream: true,
        expires_at: true,
        dns_names: true,
        revision_number: true,
        store_svid: true,
        jwt_svid_ttl: true,
        hint: true,
        created_at: true,
        additional_attributes: true,
    }
}

fn filters() -> Vec<entries::list_entries_request::Filter> {
    use entries::list_entries_request::Filter;
    let mut filters = vec![Filter::default()];
    filters.extend(ids().into_iter().flatten().map(|i| Filter { by_spiffe_id: Some(i), ..Default::default() }));
    filters.extend(ids().into_iter().flatten().map(|i| Filter { by_parent_id: Some(i), ..Default::default() }));
    for r#match in [0, 1, 2, 3] {
        for selectors in [vec![], vec![selector("", "x")], vec![selector("a", "b")], vec![selector("a:b", "c")]] {
            let by_selectors = Some(SelectorMatch { selectors, r#match });
            filters.push(Filter { by_selectors, ..Default::default() });
        }
        for names in [&[][..], &["no td"], &["nobody"]] {
            let trust_domains = names.iter().map(|n| (*n).to_owned()).collect();
            let by_federates_with = Some(types::FederatesWithMatch { trust_domains, r#match });
            filters.push(Filter { by_federates_with, ..Default::default() });
        }
    }
    filters.push(Filter { by_hint: Some(String::new()), ..Default::default() });
    filters.push(Filter { by_hint: Some("h".into()), by_downstream: Some(true), ..Default::default() });
    filters
}

/// The same filter, to count by.
pub(super) fn counting(filter: Option<entries::list_entries_request::Filter>) -> entries::CountEntriesRequest {
    let filter = filter.map(|f| entries::count_entries_request::Filter {
        by_spiffe_id: f.by_spiffe_id,
        by_parent_id: f.by_parent_id,
        by_selectors: f.by_selectors,
        by_federates_with: f.by_federates_with,
        by_hint: f.by_hint,
        by_downstream: f.by_downstream,
    });
    entries::CountEntriesRequest { filter }
}
