//! What the kernel says of another process.

use crate::fleet::Error;

/// A process by its ID.
pub(crate) struct Process(pub(crate) u32);

impl Process {
    fn status(&self, field: &str) -> Result<u64, Error> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)).ok_or("no such field")?;
        Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").trim().parse()?)
    }

    /// Anonymous memory, in KiB: what it has allocated and touched.
    pub(crate) fn anonymous_kib(&self) -> Result<u64, Error> {
        self.status("RssAnon")
    }

    /// The most resident memory since [`Process::reset_peak`], in KiB.
    pub(crate) fn peak_kib(&self) -> Result<u64, Error> {
        self.status("VmHWM")
    }

    /// Forgets the peak; without the right to do so it stays the peak of the process's life.
    pub(crate) fn reset_peak(&self) {
        let _ = std::fs::write(format!("/proc/{}/clear_refs", self.0), "5");
    }

    /// Seconds of CPU so far.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, Error> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let rest = text.rsplit_once(") ").ok_or("no name")?.1;
        let mut ticks = rest.split(' ').skip(11).take(2);
        let mut next = || ticks.next().ok_or("no ticks")?.parse::<u64>().map_err(Error::from);
        Ok((next()? + next()?) as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}
