use super::super::testing::{DEADLINE, Sleeper, eventually, values};
use super::*;
use std::process::Command;
use testkit::systemd::SystemBus;

fn attestor(bus: &SystemBus) -> Systemd {
    // The first address is of a kind that we do not know; the second leads nowhere.
    Systemd::at(format!("tcp:host=localhost,port=1;unix:path=/nonexistent;{},guid=1f", bus.address()))
}

fn sleeper() -> Sleeper {
    let sleeper = Sleeper::start(&mut Command::new("sleep"));
    eventually("sleep runs", || {
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", sleeper.pid())).ok()?;
        (comm == "sleep\n").then_some(())
    });
    sleeper
}

async fn is_known(attestor: &Systemd, sleeper: &Sleeper) {
    let expected = ["id:sleep.service".to_owned(), "fragment_path:/lib/systemd/system/sleep.service".to_owned()];
    assert_eq!(values(attestor, &sleeper.peer()).await, expected.into());
}

async fn refusal(attestor: &Systemd, sleeper: &Sleeper) -> String {
    attestor.attest(&sleeper.peer()).await.expect_err("fails").to_string()
}

#[tokio::test]
async fn the_unit_of_a_process_is_told_to_many_at_once() {
    let Some(bus) = SystemBus::start("good") else { return };
    let (attestor, sleeper) = (attestor(&bus), sleeper());
    is_known(&attestor, &sleeper).await;
    let all = at_once(&attestor, &sleeper, 64).await;
    assert_eq!(all.len(), 64);
    assert!(all.iter().all(|answer| answer.len() == 2), "{all:?}");
    tell_how_soon(&attestor, &sleeper).await;
    // Of a process that is gone the manager knows nothing; the connection stays good.
    let mut gone = Sleeper::start(&mut Command::new("sleep"));
    gone.0.kill().expect("kills");
    gone.0.wait().expect("waits");
    let pid = gone.pid();
    let expected = format!("failed to get unit by pid {pid}: PID {pid} does not belong to any loaded unit.");
    assert_eq!(refusal(&attestor, &gone).await, expected);
    assert!(attestor.bus.lock().await.is_some(), "the connection is kept");
    is_known(&attestor, &sleeper).await;
}

/// How long an attestation takes; told, not asserted.
async fn tell_how_soon(attestor: &Systemd, sleeper: &Sleeper) {
    let mut times = Vec::new();
    for _ in 0..200 {
        let began = std::time::Instant::now();
        is_known(attestor, sleeper).await;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    eprintln!("systemd: an attestation takes {:?}, the slowest but one of 200 {:?}", times[100], times[198]);
}

/// What as many answers say, all of them asked for before the first is waited for.
async fn at_once(attestor: &Systemd, sleeper: &Sleeper, count: usize) -> Vec<Vec<Selector>> {
    let peer = sleeper.peer();
    let mut asked: Vec<_> = (0..count).map(|_| attestor.attest(&peer)).collect();
    let mut answers = Vec::new();
    std::future::poll_fn(|cx| {
        asked.retain_mut(|one| match one.as_mut().poll(cx) {
            std::task::Poll::Ready(answer) => {
                answers.push(answer.expect("attests"));
                false
            }
            std::task::Poll::Pending => true,
        });
        if asked.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    answers
}

#[tokio::test]
async fn a_bus_that_is_started_again_is_used_again_at_once() {
    let Some(mut bus) = SystemBus::start("good") else { return };
    let (attestor, sleeper) = (attestor(&bus), sleeper());
    is_known(&attestor, &sleeper).await;
    bus.end();
    let error = refusal(&attestor, &sleeper).await;
    assert!(error.starts_with("failed to open dbus connection: No such file or directory"), "{error}");
    bus.begin("good");
    is_known(&attestor, &sleeper).await;
    // Also when nobody asked meanwhile.
    bus.end();
    bus.begin("good");
    is_known(&attestor, &sleeper).await;
}

#[tokio::test]
async fn a_bus_or_a_manager_that_hangs_costs_no_more_than_the_deadline() {
    let Some(mut bus) = SystemBus::start("hang") else { return };
    let sleeper = sleeper();
    let attestor = Systemd { deadline: Duration::from_millis(300), ..attestor(&bus) };
    let expected = format!("failed to get unit by pid {}: systemd did not answer over D-Bus in time", sleeper.pid());
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the manager hangs");
    assert!(attestor.bus.lock().await.is_none(), "nobody waits on this connection again");
    bus.manage(Some("good"));
    let attestor = Systemd { deadline: DEADLINE, ..attestor };
    is_known(&attestor, &sleeper).await;
    bus.freeze(true);
    let attestor = Systemd { deadline: Duration::from_millis(300), ..attestor };
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the bus hangs, on a connection");
    assert_eq!(refusal(&attestor, &sleeper).await, expected, "the bus hangs, and lets nobody in");
    bus.freeze(false);
    let attestor = Systemd { deadline: DEADLINE, ..attestor };
    is_known(&attestor, &sleeper).await;
}

#[tokio::test]
async fn a_manager_that_lies_or_is_away_is_no_unit() {
    let Some(mut bus) = SystemBus::start("number") else { return };
    let (attestor, sleeper) = (attestor(&bus), sleeper());
    let expected = "Returned value for Id was not a string: it has the type \"u\"";
    assert_eq!(refusal(&attestor, &sleeper).await, expected);
    bus.manage(Some("huge"));
    let error = refusal(&attestor, &sleeper).await;
    assert_eq!(error, "error getting value for Id: the bus sent too large a message");
    assert!(attestor.bus.lock().await.is_none(), "what is left of it is never read");
    bus.manage(None);
    let error = refusal(&attestor, &sleeper).await;
    assert!(error.contains("org.freedesktop.systemd1 was not provided by any .service files"), "{error}");
    bus.manage(Some("good"));
    is_known(&attestor, &sleeper).await;
}
