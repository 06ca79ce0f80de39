//! Callers who take as much as they can: 10,000 streams, nothing read, requests without end. The others notice nothing.

use super::harness::{DEADLINE, Running, World, next, secure, until, within};
use finial_proto::workload::{JwtsvidRequest, X509svidRequest};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Semaphore;
use tokio::time::Instant;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// The code of a connection's end for one that asks too much.
const ENHANCE_YOUR_CALM: u32 = 11;

/// HTTP/2 by hand: what no library would do.
struct Raw {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// Asks for X.509-SVIDs.
fn call(stream: u32) -> Vec<u8> {
    let field = |name: &str, value: &str| {
        let length = |text: &str| u8::try_from(text.len()).unwrap();
        [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let block = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":path", "/SpiffeWorkloadAPI/FetchX509SVID"),
        field(":authority", "localhost"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
        field("workload.spiffe.io", "true"),
    ]
    .concat();
    [frame(HEADERS, 4, stream, &block), frame(DATA, 1, stream, &[0; 5])].concat()
}

impl Raw {
    async fn connect(socket: &Path) -> Self {
        let (read, mut write) = UnixStream::connect(socket).await.unwrap().into_split();
        let hello = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat();
        write.write_all(&hello).await.unwrap();
        Self { read, write }
    }

    /// Sends as much of it as is taken, before `until`; whether that was all.
    async fn send(&mut self, bytes: &[u8], until: Instant) -> bool {
        tokio::time::timeout_at(until, self.write.write_all(bytes)).await.is_ok_and(|sent| sent.is_ok())
    }
}

/// The next frame: kind, flags, stream, payload. None = hung up.
async fn frame_from(read: &mut OwnedReadHalf) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    read.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; usize::try_from(length).unwrap()];
    read.read_exact(&mut payload).await.ok()?;
    Some((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
}

/// What came of a connection.
#[derive(Debug, Default)]
struct Fate {
    /// Pings that were answered, each in its turn.
    pongs: u64,
    /// Settings that were acknowledged.
    settings: usize,
    /// The last stream that was answered.
    last_answered: u32,
    /// The last stream that was looked at, and why there are to be no more.
    goodbye: Option<(u32, u32)>,
    /// It ended before the last ping was answered.
    hung_up: bool,
}

/// What is answered to a ping that comes last.
const LAST: &[u8; 8] = b"the last";

/// Reads until the last ping is answered, or there is no more.
async fn fate(read: &mut OwnedReadHalf) -> Fate {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut fate = Fate::default();
    while let Some((kind, flags, stream, payload)) = frame_from(read).await {
        match (kind, flags) {
            (PING, 1) if payload == LAST => return fate,
            (PING, 1) => {
                assert_eq!(payload, fate.pongs.to_be_bytes(), "in order");
                fate.pongs += 1;
            }
            (SETTINGS, 1) => fate.settings += 1,
            (GOAWAY, _) => fate.goodbye = Some((number(&payload[..4]), number(&payload[4..8]))),
            (HEADERS, _) => fate.last_answered = fate.last_answered.max(stream),
            _ => {}
        }
    }
    fate.hung_up = true;
    fate
}

/// Other workloads get what is theirs, and what changes.
async fn others_are_served(world: &World, agent: &Running, number: usize) {
    let path = format!("/served{number}");
    world.entry(&format!("served{number}"), &path, &["test:any"]);
    let mut stream = agent.x509().await.unwrap();
    while !next(&mut stream).await.unwrap().svids.iter().any(|svid| svid.spiffe_id == format!("spiffe://td{path}")) {}
    let request = JwtsvidRequest { audience: vec!["a".into()], spiffe_id: format!("spiffe://td{path}") };
    within(agent.client().fetch_jwtsvid(secure(request))).await.unwrap();
}

#[tokio::test]
async fn ten_thousand_streams_are_held_and_let_go() {
    const CONNECTIONS: usize = 20;
    const EACH: usize = 500;
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| agent.client()).collect();
    let opening: FuturesUnordered<_> = clients
        .iter()
        .flat_map(|client| (0..EACH).map(|_| client.clone()))
        .map(|mut client| async move {
            let mut stream = client.fetch_x509svid(secure(X509svidRequest {})).await.unwrap().into_inner();
            assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);
            stream
        })
        .collect();
    let streams: Vec<_> = tokio::time::timeout(DEADLINE * 3, opening.collect()).await.expect("10,000 streams");
    assert_eq!(streams.len(), CONNECTIONS * EACH);
    others_are_served(&world, &agent, 1).await;
    drop((streams, clients));
    others_are_served(&world, &agent, 2).await;
    agent.stop().await;
}

#[tokio::test]
async fn more_streams_than_a_connection_may_have_are_refused_and_the_first_ones_go_on() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let Raw { mut read, mut write } = Raw::connect(&agent.socket).await;
    let until = Instant::now() + DEADLINE;
    let calls: Vec<u8> = (0..10_000_u32).flat_map(|number| call(2 * number + 1)).collect();
    // Reads while it sends, or both would wait for the other.
    let sending = world.supervisor.spawner().spawn("flood", async move {
        let _ = tokio::time::timeout_at(until, write.write_all(&calls)).await;
        write
    });
    let (mut refused, mut answered) = (0, 0);
    while refused < 9_000
        && let Some((kind, _, _, _)) = within(frame_from(&mut read)).await
    {
        refused += usize::from(kind == RST_STREAM);
        answered += usize::from(kind == DATA);
        if kind == GOAWAY {
            break; // so far, and no further: that is an answer, too
        }
    }
    assert!(answered <= 1_000 && refused > 0, "{answered} answered, {refused} refused");
    others_are_served(&world, &agent, 1).await;
    drop(within(sending).await);
    agent.stop().await;
}

#[tokio::test]
async fn one_that_never_reads_holds_nobody_up_and_is_hung_up_on() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let mut raw = Raw::connect(&agent.socket).await;
    let until = Instant::now() + DEADLINE;
    // It says that it would take more than there is.
    let most = (u32::MAX >> 1).to_be_bytes();
    let windows = [
        frame(SETTINGS, 0, 0, &[&[0, 4], &most[..]].concat()),
        frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes()),
    ];
    assert!(raw.send(&windows.concat(), until).await);
    let calls: Vec<u8> = (0..900_u32).flat_map(|number| call(2 * number + 1)).collect();
    assert!(raw.send(&calls, until).await, "the calls are taken");
    for number in 0..20 {
        others_are_served(&world, &agent, number).await;
    }
    // As long as it lives it gets what it does not read; so it is not let live.
    tokio::time::pause();
    let hung_up = async { while frame_from(&mut raw.read).await.is_some() {} };
    tokio::time::sleep(Duration::from_secs(120)).await;
    tokio::time::resume();
    within(hung_up).await;
    agent.stop().await;
}

#[tokio::test]
async fn floods_of_calls_that_are_given_up_end_the_connection_and_those_of_pings_and_settings_are_answered() {
    const CALLS: u32 = 20_000;
    const MANY: usize = 100_000;
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let cancelled = |number: u32| [call(2 * number + 1), frame(RST_STREAM, 0, 2 * number + 1, &[0, 0, 0, 8])].concat();
    let floods: [Vec<u8>; 4] = [
        (0..CALLS).flat_map(cancelled).collect(),
        (0..MANY as u64).flat_map(|number| frame(PING, 0, 0, &number.to_be_bytes())).collect(),
        frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]).repeat(MANY),
        frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(MANY),
    ];
    for (number, flood) in floods.iter().enumerate() {
        let Raw { mut read, mut write } = Raw::connect(&agent.socket).await;
        let all = [&flood[..], &frame(PING, 0, 0, LAST)].concat();
        let others = others_are_served(&world, &agent, number);
        // Others are served meanwhile.
        let flooding = async { tokio::join!(write.write_all(&all), fate(&mut read)) };
        let ((sent, fate), ()) = tokio::join!(within(flooding), others);
        if number == 0 {
            let (last, why) = fate.goodbye.unwrap_or_else(|| panic!("{fate:?}"));
            assert_eq!(why, ENHANCE_YOUR_CALM, "{fate:?}");
            assert!(fate.hung_up && fate.last_answered <= last && last < 2 * CALLS, "{fate:?}");
            continue;
        }
        assert!(sent.is_ok() && !fate.hung_up && fate.goodbye.is_none(), "{fate:?}");
        assert_eq!(fate.pongs, if number == 1 { MANY as u64 } else { 0 }, "each is answered");
        assert_eq!(fate.settings, 1 + if number == 2 { MANY } else { 0 }, "each is acknowledged, the first ones too");
        // The connection is as good as any.
        write.write_all(&call(1)).await.unwrap();
        while within(frame_from(&mut read)).await.expect("it goes on").0 != DATA {}
    }
    // Many calls at once by one caller, all of them answered.
    let client = agent.client();
    let calls: FuturesUnordered<_> = (0..2_000)
        .map(|_| {
            let mut client = client.clone();
            async move {
                let request = JwtsvidRequest { audience: vec!["a".into()], spiffe_id: "spiffe://td/web".into() };
                client.fetch_jwtsvid(secure(request)).await.unwrap();
            }
        })
        .collect();
    let before = world.server.calls("NewJWTSVID");
    within(calls.collect::<Vec<()>>()).await;
    assert_eq!(world.server.calls("NewJWTSVID"), before + 1, "the server is asked once");
    until("the agent is well", || !agent.has_ended()).await;
    agent.stop().await;
}

#[tokio::test]
async fn many_calls_at_once_attest_their_caller_once() {
    let world = World::new().await;
    world.entry("e1", "/web", &["test:any"]);
    let agent = world.started().await;
    let permits = Arc::new(Semaphore::new(0));
    *world.attestor.slow.lock().unwrap() = Some(permits.clone());
    let mut raw = Raw::connect(&agent.socket).await;
    let calls: Vec<u8> = (0..500_u32).flat_map(|number| call(2 * number + 1)).collect();
    // The answer to the ping comes when all calls before it were taken.
    let sent = [calls, frame(PING, 0, 0, LAST)].concat();
    assert!(raw.send(&sent, Instant::now() + DEADLINE).await);
    while within(frame_from(&mut raw.read)).await.unwrap().0 != PING {}
    permits.add_permits(10_000);
    let mut answered = 0;
    while answered < 500 {
        // Headers do not count against the window.
        answered += usize::from(within(frame_from(&mut raw.read)).await.unwrap().0 == HEADERS);
    }
    assert_eq!(world.attestor.asked.load(Ordering::SeqCst), 1);
    agent.stop().await;
}
