//! Sinks that are sent each measurement: StatsD and DogStatsD, over UDP.

use super::names::sanitize;
use super::store::Kind;
use crate::Spawner;
use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// Lines that wait to be sent; more are dropped, as a measurement must hold up nothing.
const LINES_MAX: usize = 4096;
/// Largest datagram, in bytes: what fits one Ethernet frame.
const DATAGRAM_BYTES_MAX: usize = 1400;
/// How long lines wait for others to share their datagram.
const GATHER: Duration = Duration::from_millis(100);

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Values of labels are parts of the name: `spire_server.svid.rotate.OK.vm:1.000000|c`.
    Statsd,
    /// Labels are tags: `spire_server.svid.rotate:1|c|#status:OK,host:vm`.
    DogStatsd,
}

/// Where lines go.
pub(super) struct Sink {
    form: Form,
    lines: mpsc::Sender<String>,
}

impl Sink {
    /// Sends to `address` (`host:port`) until shutdown.
    pub(super) async fn open(form: Form, address: &str, spawner: &Spawner) -> std::io::Result<Self> {
        let to = tokio::net::lookup_host(address).await?.next();
        let to = to.ok_or_else(|| std::io::Error::other(format!("lookup {address}: no such host")))?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(to).await?;
        let (lines, waiting) = mpsc::channel(LINES_MAX);
        let shutdown = spawner.shutdown();
        spawner.service("metrics", async move {
            tokio::select! {
                () = send(socket, waiting) => {}
                () = shutdown.cancelled() => {}
            }
            Ok::<(), Infallible>(())
        });
        Ok(Self { form, lines })
    }

    pub(super) fn put<'a>(
        &self,
        kind: Kind,
        prefix: &str,
        key: &str,
        value: f64,
        labels: impl Iterator<Item = (&'a str, &'a str)>,
    ) {
        // Full: the network or the sink is too slow.
        let _ = self.lines.try_send(line(self.form, kind, prefix, key, value, labels));
    }
}

fn line<'a>(
    form: Form,
    kind: Kind,
    prefix: &str,
    key: &str,
    value: f64,
    labels: impl Iterator<Item = (&'a str, &'a str)>,
) -> String {
    let plain = |text: &str| text.replace([':', ' ', '\n', '|'], "_");
    let mut out = plain(&format!("{prefix}.{key}"));
    let kind_name = match kind {
        Kind::Gauge => "g",
        Kind::Counter => "c",
        Kind::Summary => "ms",
    };
    match form {
        Form::Statsd => {
            for (_, value) in labels {
                let _ = write!(out, ".{}", plain(&sanitize(value)));
            }
            let _ = write!(out, ":{value:.6}|{kind_name}");
        }
        Form::DogStatsd => {
            let _ = match kind {
                Kind::Summary => write!(out, ":{value:.6}|{kind_name}"),
                Kind::Gauge | Kind::Counter => write!(out, ":{value}|{kind_name}"),
            };
            for (index, (name, value)) in labels.enumerate() {
                let (name, value) = (plain(&sanitize(name)), plain(&sanitize(value)));
                let (start, colon) = (if index == 0 { "|#" } else { "," }, if value.is_empty() { "" } else { ":" });
                let _ = write!(out, "{start}{name}{colon}{value}");
            }
        }
    }
    out
}

async fn send(socket: UdpSocket, mut waiting: mpsc::Receiver<String>) {
    let mut datagram = String::new();
    let mut next = waiting.recv().await;
    while let Some(line) = next {
        if !datagram.is_empty() && datagram.len() + 1 + line.len() > DATAGRAM_BYTES_MAX {
            // Nobody may listen; the next are sent all the same.
            let _ = socket.send(datagram.as_bytes()).await;
            datagram.clear();
        }
        datagram.push_str(&line);
        datagram.push('\n');
        next = match tokio::time::timeout(GATHER, waiting.recv()).await {
            Ok(next) => next,
            Err(_) => {
                let _ = socket.send(datagram.as_bytes()).await;
                datagram.clear();
                waiting.recv().await
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Metrics, Settings};
    use super::*;
    use crate::Supervisor;

    #[tokio::test]
    async fn measurements_are_sent_as_they_are_made() {
        let supervisor = Supervisor::default();
        let receiver = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = receiver.local_addr().expect("an address").to_string();
        for (form, expected) in [
            (
                Form::Statsd,
                "spire_server.svid.rotate.OK.vm:1.000000|c\nspire_server.started.1_15_3.vm:1.000000|g\n\
                 spire_server.x.elapsed_time.vm:2.500000|ms\n",
            ),
            (
                Form::DogStatsd,
                "spire_server.svid.rotate:1|c|#status:OK,host:vm\nspire_server.started:1|g|#version:1_15_3,host:vm\n\
                 spire_server.x.elapsed_time:2.500000|ms|#host:vm\n",
            ),
        ] {
            let settings = Settings { prefix: "spire_server".into(), host: Some("vm".into()), ..Settings::default() };
            let metrics = Metrics::new(settings);
            metrics.push_to(form, &address, &supervisor.spawner()).await.expect("opens");
            metrics.count("svid.rotate", 1.0, &[("status", "OK")]);
            metrics.gauge("started", 1.0, &[("version", "1.15.3")]);
            metrics.sample("x.elapsed_time", 2.5, &[]);
            let (mut got, mut datagram) = (String::new(), [0; 2048]);
            while got.len() < expected.len() {
                let received = tokio::time::timeout(Duration::from_secs(20), receiver.recv(&mut datagram)).await;
                let bytes = received.expect("in time").expect("receives");
                got.push_str(std::str::from_utf8(&datagram[..bytes]).expect("text"));
            }
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn no_label_breaks_out_of_its_line() {
        let labels = [("a b", "x|c\ny:1"), ("empty", "")];
        let line = line(Form::DogStatsd, Kind::Counter, "p", "k:1|g", 1.0, labels.into_iter());
        assert_eq!(line.matches('\n').count(), 0, "{line}");
        assert_eq!(line, "p.k_1_g:1|c|#a_b:x_c_y_1,empty");
    }
}
