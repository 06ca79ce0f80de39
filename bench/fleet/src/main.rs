//! Load of a whole fleet on one server: holds a real TLS connection for each of many agents and measures the server.
//!
//! What is simulated: the agents have joined by token, each with an SVID and a connection of its own, over which it holds the
//! stream of changes as a Finial agent does. They share one key and one CSR, so that making keys does not load the machine;
//! they have no caches and no workloads. Server and fleet share the machine, so that times hold for both together.

#![allow(clippy::print_stdout)] // it is a report

mod fleet;
mod proc;

use fleet::{Error, Fleet};
use proc::Process;
use std::time::{Duration, Instant};

/// What to do; see [`USAGE`].
struct Options {
    address: String,
    socket: String,
    trust_domain: String,
    pid: u32,
    agents: usize,
    idle: Duration,
    writes: usize,
    csrs: usize,
    batch: usize,
}

const USAGE: &str = "usage: fleet --address HOST:PORT --socket PATH --trust-domain NAME --pid PID [--agents 10000] \
                     [--idle SECONDS, 30] [--writes 5] [--csrs 100000] [--batch CSRS, 500]\n\
                     The server must run without `ratelimit { attestation }` and `ratelimit { signing }`.";

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Error> {
        let mut options = Self {
            address: String::new(),
            socket: String::new(),
            trust_domain: String::new(),
            pid: 0,
            agents: 10_000,
            idle: Duration::from_secs(30),
            writes: 5,
            csrs: 100_000,
            batch: 500,
        };
        while let Some(name) = words.next() {
            let value = words.next().ok_or(USAGE)?;
            match name.as_str() {
                "--address" => options.address = value,
                "--socket" => options.socket = value,
                "--trust-domain" => options.trust_domain = value,
                "--pid" => options.pid = value.parse()?,
                "--agents" => options.agents = value.parse()?,
                "--idle" => options.idle = Duration::from_secs(value.parse()?),
                "--writes" => options.writes = value.parse()?,
                "--csrs" => options.csrs = value.parse()?,
                "--batch" => options.batch = value.parse::<usize>()?.max(1),
                _ => return Err(USAGE.into()),
            }
        }
        if options.address.is_empty()
            || options.socket.is_empty()
            || options.trust_domain.is_empty()
            || options.pid == 0
        {
            return Err(USAGE.into());
        }
        Ok(options)
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let options = Options::parse(std::env::args().skip(1))?;
    let server = Process(options.pid);
    let at_start = server.anonymous_kib()?;
    let mut fleet = Fleet::new(&options.address, &options.socket, &options.trust_domain).await?;

    let begun = Instant::now();
    fleet.attest(options.agents).await?;
    let joined = server.anonymous_kib()?;
    println!("{} agents joined in {:.1} s", options.agents, begun.elapsed().as_secs_f64());
    println!("server: {at_start} KiB anonymous at start, {joined} KiB with these agents");

    let begun = Instant::now();
    fleet.connect().await?;
    println!("{} agents listen after {:.1} s", options.agents, begun.elapsed().as_secs_f64());
    settle().await;
    let listening = server.anonymous_kib()?;
    let each = listening.saturating_sub(joined) as f64 / options.agents as f64;
    println!("server: {listening} KiB anonymous, {each:.1} KiB per connected agent");

    let (cpu, begun) = (server.cpu_seconds()?, Instant::now());
    tokio::time::sleep(options.idle).await;
    let share = (server.cpu_seconds()? - cpu) / begun.elapsed().as_secs_f64() * 100.0;
    println!(
        "idle for {} s: {share:.2} % of a core, {} agents still listen",
        options.idle.as_secs(),
        fleet.listening()
    );

    for n in 0..options.writes {
        let cpu = server.cpu_seconds()?;
        let mut heard = fleet.write(n).await?;
        heard.sort_unstable();
        let at =
            |share: f64| heard.get((heard.len() as f64 * share) as usize).or(heard.last()).copied().unwrap_or_default();
        println!(
            "an entry for all of them: told after {:?} (half), {:?} (99 %), {:?} (last of {}); {:.2} s of server CPU",
            at(0.5),
            at(0.99),
            at(1.0),
            heard.len(),
            server.cpu_seconds()? - cpu,
        );
    }
    settle().await;

    server.reset_peak();
    let (before, cpu, begun) = (server.anonymous_kib()?, server.cpu_seconds()?, Instant::now());
    let herd = fleet.herd(options.csrs, options.batch).await?;
    println!(
        "{} CSRs at once in batches of {}: {} issued and {} refused in {:.1} s, {:.1} s of server CPU",
        options.csrs,
        options.batch,
        herd.issued,
        herd.failed,
        begun.elapsed().as_secs_f64(),
        server.cpu_seconds()? - cpu,
    );
    println!("server: {before} KiB anonymous before, {} KiB resident at the peak", server.peak_kib()?);
    println!(
        "the quarter that ends first had its SVIDs after {:?} on average, the last quarter after {:?}",
        herd.first_quarter, herd.last_quarter
    );
    Ok(())
}

/// Lets the server come to rest.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(5)).await;
}
