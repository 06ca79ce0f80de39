//! Many entries in one command: batches, and a server that goes away in between.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use finial_cli::Io;
use finial_proto::server::entry::entry_server::{Entry as EntryApi, EntryServer};
use finial_proto::server::entry::*;
use finial_proto::types::{Entry, Status as ItemStatus};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tonic::{Request, Response, Status};

/// Takes this many batches, then fails; refuses entries named `bad`.
#[derive(Clone)]
struct Fake {
    batches: Arc<Mutex<Vec<usize>>>,
    takes: usize,
}

fn refused(name: &str) -> ItemStatus {
    let bad = name.ends_with("bad");
    ItemStatus { code: if bad { 3 } else { 0 }, message: if bad { "no".into() } else { "OK".into() } }
}

#[tonic::async_trait]
impl EntryApi for Fake {
    async fn batch_create_entry(
        &self,
        request: Request<BatchCreateEntryRequest>,
    ) -> Result<Response<BatchCreateEntryResponse>, Status> {
        let entries = request.into_inner().entries;
        let mut batches = self.batches.lock().unwrap();
        if batches.len() == self.takes {
            return Err(Status::unavailable("gone"));
        }
        batches.push(entries.len());
        let result = |entry: Entry| {
            let status = refused(&entry.spiffe_id.as_ref().unwrap().path);
            let entry = (status.code == 0).then_some(entry);
            batch_create_entry_response::Result { status: Some(status), entry }
        };
        let results = entries.into_iter().map(result).collect();
        Ok(Response::new(BatchCreateEntryResponse { results }))
    }

    async fn count_entries(&self, _: Request<CountEntriesRequest>) -> Result<Response<CountEntriesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_entries(&self, _: Request<ListEntriesRequest>) -> Result<Response<ListEntriesResponse>, Status> {
        Ok(Response::new(ListEntriesResponse::default()))
    }

    async fn get_entry(&self, _: Request<GetEntryRequest>) -> Result<Response<Entry>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn batch_update_entry(
        &self,
        _: Request<BatchUpdateEntryRequest>,
    ) -> Result<Response<BatchUpdateEntryResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn batch_delete_entry(
        &self,
        _: Request<BatchDeleteEntryRequest>,
    ) -> Result<Response<BatchDeleteEntryResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_authorized_entries(
        &self,
        _: Request<GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type SyncAuthorizedEntriesStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<SyncAuthorizedEntriesResponse, Status>> + Send>>;

    async fn sync_authorized_entries(
        &self,
        _: Request<tonic::Streaming<SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// A server on a socket; it lives as long as the runtime.
fn serve(folder: &Path, fake: Fake) -> (tokio::runtime::Runtime, PathBuf) {
    let socket = folder.join("s");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = {
        let _inside = runtime.enter();
        tokio::net::UnixListener::bind(&socket).unwrap()
    };
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    runtime
        .spawn(tonic::transport::Server::builder().add_service(EntryServer::new(fake)).serve_with_incoming(incoming));
    (runtime, socket)
}

fn create(takes: usize, file: &str, more: &[&str]) -> (u8, String, String, Vec<usize>) {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake { batches: Arc::default(), takes };
    let (_runtime, socket) = serve(folder.path(), fake.clone());
    let (io, stdout, stderr) = Io::captured(file.as_bytes().to_vec(), |_| None);
    let args = [&["entry", "create", "-socketPath", socket.to_str().unwrap(), "-data", "-"], more].concat();
    let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    let code = finial_cli::spire_server().main(&args, &io);
    let batches = fake.batches.lock().unwrap().clone();
    (code, stdout.text(), stderr.text(), batches)
}

fn file(count: usize, bad: usize) -> String {
    let entry = |n: usize| {
        let name = if n == bad { "bad".to_owned() } else { n.to_string() };
        format!(
            r#"{{"spiffe_id":"spiffe://a/{name}","parent_id":"spiffe://a/p","selectors":[{{"type":"n","value":"{n}"}}]}}"#
        )
    };
    format!(r#"{{"entries":[{}]}}"#, (0..count).map(entry).collect::<Vec<_>>().join(","))
}

#[test]
fn a_large_file_goes_in_batches_and_what_failed_is_said() {
    let (code, stdout, stderr, batches) = create(usize::MAX, &file(1203, 700), &[]);
    assert_eq!((code, batches), (1, vec![500, 500, 203]));
    assert_eq!(stdout.matches("Entry ID").count(), 1202);
    let want = "Failed to create the following entry (code: InvalidArgument, msg: \"no\"):\nEntry ID                : (none)\nSPIFFE ID               : spiffe://a/bad\n";
    assert!(stderr.starts_with(want), "{stderr}");
    assert!(stderr.ends_with("Error: failed to create one or more entries\n"), "{stderr}");
    let (code, stdout, stderr, _) = create(usize::MAX, &file(1203, 700), &["-output", "json"]);
    let results: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, results["results"].as_array().unwrap().len(), stderr.as_str()), (0, 1203, ""));
}

#[test]
fn a_server_that_goes_away_leaves_no_doubt_about_what_was_done() {
    let (code, stdout, stderr, _) = create(2, &file(100_000, 3), &[]);
    assert_eq!((code, stdout.matches("Entry ID").count()), (1, 999));
    let (_, end) = stderr.split_once("Stopped: ").unwrap();
    assert_eq!(
        end,
        "999 of 100000 entries were created, 1 failed, the other 99000 were not answered for (up to 500 of them may be created all the same)\nError: rpc error: code = Unavailable desc = gone\n"
    );
    // one batch that fails is told as SPIRE tells it
    let (code, stdout, stderr, _) = create(0, &file(3, 9), &[]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (1, "", "Error: rpc error: code = Unavailable desc = gone\n"));
}
