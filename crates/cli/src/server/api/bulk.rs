//! Many items in one command: sent in batches that any server takes, with a word on how far it is.

use crate::context::{Context, Io};
use crate::rpc::RpcError;
use tokio::time::{Duration, Instant};

/// Items a batch.
const ITEMS_MAX: usize = 500;
/// Encoded bytes a batch, a single larger item aside: servers take requests of 4 MiB.
const BYTES_MAX: usize = 1 << 20;
/// How often a terminal is told, and how often a log is.
const TERMINAL_EVERY: Duration = Duration::from_millis(100);
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Cuts the items into batches; no items are one empty batch, as SPIRE sends it.
pub(crate) fn batches<T>(items: Vec<T>, bytes: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut all = vec![Vec::new()];
    let mut filled = 0;
    for item in items {
        let size = bytes(&item);
        if let Some(batch) = all.last()
            && !batch.is_empty()
            && (batch.len() >= ITEMS_MAX || filled + size > BYTES_MAX)
        {
            all.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(batch) = all.last_mut() {
            batch.push(item);
        }
    }
    all
}

/// How far a command is. A terminal sees one line that changes; others a line now and then.
pub(crate) struct Progress {
    io: Io,
    /// What is done to what: `created`, `entries`.
    verb: &'static str,
    things: &'static str,
    total: usize,
    done: usize,
    failed: usize,
    started: Instant,
    said: Instant,
    /// Whether a line of it stands at the end of the terminal.
    shown: bool,
    /// Whether anything was said at all.
    spoke: bool,
}

impl Progress {
    pub(crate) fn new(cx: &Context, verb: &'static str, things: &'static str, total: usize) -> Self {
        let now = Instant::now();
        let (io, started, said) = (cx.io.clone(), now, now);
        Self { io, verb, things, total, done: 0, failed: 0, started, said, shown: false, spoke: false }
    }

    /// A batch was answered.
    pub(crate) fn add(&mut self, succeeded: usize, failed: usize) {
        self.done += succeeded;
        self.failed += failed;
    }

    /// Says how far it is, if it is time to.
    pub(crate) fn say(&mut self) {
        let every = if self.io.is_terminal() { TERMINAL_EVERY } else { LOG_EVERY };
        if self.said.elapsed() < every || self.done + self.failed >= self.total {
            return;
        }
        self.said = Instant::now();
        self.spoke = true;
        if self.io.is_terminal() {
            self.shown = true;
            self.io.err(&format!("\r\x1b[K{}", self.text()));
        } else {
            self.io.err(&format!("{}\n", self.text()));
        }
    }

    fn text(&self) -> String {
        let Self { verb, things, total, done, failed, .. } = self;
        let rate = (done + failed) as u128 * 1000 / self.started.elapsed().as_millis().max(1);
        let failed = if *failed > 0 { format!(", {failed} failed") } else { String::new() };
        format!("{verb} {done} of {total} {things}{failed}, {rate} a second")
    }

    /// Takes the line off the terminal, before anything else is printed.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            self.io.err("\r\x1b[K");
        }
    }

    /// The last word, if there was one before.
    pub(crate) fn end(&mut self) {
        self.clear();
        if self.spoke {
            self.io.err(&format!("{}\n", self.text()));
        }
    }

    /// A call failed: what is known of the items is said before the error is.
    pub(crate) fn stopped(&mut self, error: RpcError) -> anyhow::Error {
        self.clear();
        let Self { verb, things, total, done, failed, .. } = self;
        if *done + *failed == 0 && *total <= ITEMS_MAX {
            return error.into();
        }
        let rest = *total - *done - *failed;
        self.io.err(&format!(
            "Stopped: {done} of {total} {things} were {verb}, {failed} failed, the other {rest} were not answered for \
             (up to {ITEMS_MAX} of them may be {verb} all the same)\n"
        ));
        error.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goflag::Flags;
    use proptest::prelude::*;

    #[tokio::test(start_paused = true)]
    async fn a_log_is_told_now_and_then_and_at_the_end() {
        let (io, _, stderr) = Io::captured(Vec::new(), |_| None);
        let cx = Context { flags: Flags::default(), io };
        let mut progress = Progress::new(&cx, "created", "entries", 2000);
        progress.add(500, 0);
        progress.say();
        assert_eq!(stderr.text(), "");
        tokio::time::advance(Duration::from_secs(10)).await;
        progress.add(499, 1);
        progress.say();
        progress.say();
        assert_eq!(stderr.text(), "created 999 of 2000 entries, 1 failed, 100 a second\n");
        progress.add(1000, 0);
        progress.end();
        assert!(
            stderr.text().ends_with("\ncreated 1999 of 2000 entries, 1 failed, 200 a second\n"),
            "{}",
            stderr.text()
        );
    }

    #[test]
    fn nothing_is_one_batch() {
        assert_eq!(batches(Vec::<u8>::new(), |_| 1), [Vec::<u8>::new()]);
    }

    proptest! {
        #[test]
        fn batches_keep_all_in_order_within_their_limits(sizes in prop::collection::vec(0..(2 * BYTES_MAX / 100), 1..1500)) {
            let batches = batches(sizes.clone(), |size| *size);
            prop_assert_eq!(batches.concat(), sizes);
            for batch in &batches {
                prop_assert!(!batch.is_empty() && batch.len() <= ITEMS_MAX);
                prop_assert!(batch.len() == 1 || batch.iter().sum::<usize>() <= BYTES_MAX);
            }
        }
    }
}
