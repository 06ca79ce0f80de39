//! How long a connection lives, by a clock that only goes on while nobody has anything to do.

use super::*;
use finial_runtime::Supervisor;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::service::service_fn;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

/// A client on a connection whose server end is served.
struct Scene {
    client: SendRequest<Body>,
    /// Calls of `/long` and `/stream` end with `true`.
    finish: watch::Sender<bool>,
    served: JoinHandle<()>,
    supervisor: Supervisor,
}

impl Scene {
    async fn new() -> Self {
        let supervisor = Supervisor::default();
        let (spawner, shutdown) = (supervisor.spawner(), supervisor.shutdown());
        let (near, far) = tokio::io::duplex(1 << 16);
        let finish = watch::Sender::new(false);
        let streams = Streams::default();
        let (wait, counted) = (finish.clone(), streams.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let (mut wait, counted) = (wait.subscribe(), counted.clone());
            async move {
                let path = request.uri().path().to_owned();
                let _held = (path == "/stream").then(|| counted.hold());
                if path != "/quick" {
                    let _ = wait.wait_for(|done| *done).await;
                }
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        });
        let builder = http2::Builder::new(Calls(spawner.clone()));
        let serve = async move { one(&builder, far, service, &streams, &shutdown).await };
        let served = spawner.spawn("server", serve);
        let (client, connection) = handshake(Calls(spawner.clone()), TokioIo::new(near)).await.unwrap();
        drop(spawner.spawn("client", async { drop(connection.await) }));
        Self { client, finish, served, supervisor }
    }

    fn call(&mut self, path: &str) -> impl Future<Output = bool> + Send + 'static {
        let request = Request::get(format!("http://server{path}")).body(Body::empty()).unwrap();
        let answer = self.client.send_request(request);
        async { answer.await.is_ok() }
    }

    /// A call that goes on meanwhile.
    fn begin(&mut self, path: &str) -> JoinHandle<bool> {
        let call = self.call(path);
        self.supervisor.spawner().spawn("call", call)
    }

    /// How long it takes until new calls have to go elsewhere.
    async fn asked_to_leave(&mut self) -> Duration {
        let begun = Instant::now();
        while self.call("/quick").await {
            tokio::time::sleep(SECOND).await;
        }
        begun.elapsed()
    }
}

fn around(seconds: u64) -> std::ops::RangeInclusive<u64> {
    seconds * 9 / 10..=seconds * 11 / 10 + 1
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_asked_to_end_after_three_minutes_and_its_calls_go_on() {
    let mut scene = Scene::new().await;
    let long = scene.begin("/long");
    let after = scene.asked_to_leave().await;
    assert!(around(180).contains(&after.as_secs()), "{after:?}");
    tokio::time::sleep(GRACE - 10 * SECOND).await;
    scene.finish.send_replace(true);
    assert!(long.await.unwrap(), "what had begun is answered");
    scene.served.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_without_an_end_is_cut_off_at_last() {
    let mut scene = Scene::new().await;
    let long = scene.begin("/long");
    scene.asked_to_leave().await;
    let asked = Instant::now();
    scene.served.await.unwrap();
    let after = asked.elapsed();
    assert!((GRACE - 2 * SECOND..=GRACE).contains(&after), "{after:?}");
    assert!(!long.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn one_with_an_agents_stream_lives_for_an_hour_and_one_whose_stream_has_ended_does_not() {
    let mut scene = Scene::new().await;
    let _stream = scene.begin("/stream");
    let after = scene.asked_to_leave().await;
    assert!(around(180 + 3600).contains(&after.as_secs()), "{after:?}");

    let mut scene = Scene::new().await;
    let stream = scene.begin("/stream");
    assert!(scene.call("/quick").await);
    scene.finish.send_replace(true);
    assert!(stream.await.unwrap());
    let after = scene.asked_to_leave().await;
    assert!(around(180).contains(&after.as_secs()), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_asks_at_once() {
    let mut scene = Scene::new().await;
    let long = scene.begin("/long");
    assert!(scene.call("/quick").await);
    scene.supervisor.shutdown().trigger();
    assert!(scene.asked_to_leave().await <= SECOND);
    scene.finish.send_replace(true);
    assert!(long.await.unwrap());
    scene.served.await.unwrap();
}

#[test]
fn connections_that_began_together_do_not_end_together() {
    let mut ages: Vec<_> = (0..200).map(|_| spread(AGE)).collect();
    assert!(ages.iter().all(|age| (AGE.mul_f64(0.9)..AGE.mul_f64(1.1)).contains(age)));
    ages.sort_unstable();
    ages.dedup();
    assert!(ages.len() > 20, "{ages:?}");
}
