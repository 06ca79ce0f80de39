//! The process itself as Go's Prometheus client describes one: dashboards and alarms made for SPIRE ask by these names.

use super::store::number_text;
use std::fmt::Write;
use std::fs;

/// The kernel's unit of CPU and start times in `/proc`, per second: the same on every machine that Linux runs on here.
const TICKS_PER_SECOND: f64 = 100.0;

/// All that `/proc` tells now, in Prometheus' text form; what cannot be read is left out.
pub(super) fn render() -> String {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (stat, status, limits) = (text("/proc/self/stat"), text("/proc/self/status"), text("/proc/self/limits"));
    let (machine, network) = (text("/proc/stat"), text("/proc/self/net/netstat"));
    let cpu = stat_field(&stat, 14).zip(stat_field(&stat, 15)).map(|(user, system)| (user + system) / TICKS_PER_SECOND);
    let boot = machine.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<f64>().ok());
    let start = stat_field(&stat, 22).zip(boot).map(|(ticks, boot)| boot + ticks / TICKS_PER_SECOND);
    let mut out = String::new();
    for (name, kind, help, value) in [
        ("cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", cpu),
        ("max_fds", "gauge", "Maximum number of open file descriptors.", limit(&limits, "Max open files")),
        (
            "network_receive_bytes_total",
            "counter",
            "Number of bytes received by the process over the network.",
            octets(&network, "InOctets"),
        ),
        (
            "network_transmit_bytes_total",
            "counter",
            "Number of bytes sent by the process over the network.",
            octets(&network, "OutOctets"),
        ),
        ("open_fds", "gauge", "Number of open file descriptors.", open_fds()),
        ("resident_memory_bytes", "gauge", "Resident memory size in bytes.", bytes(&status, "VmRSS:")),
        ("start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", start),
        ("virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", bytes(&status, "VmSize:")),
        (
            "virtual_memory_max_bytes",
            "gauge",
            "Maximum amount of virtual memory available in bytes.",
            limit(&limits, "Max address space"),
        ),
    ] {
        let Some(value) = value else { continue };
        let (name, value) = (format!("process_{name}"), number_text(value));
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    out
}

/// By proc(5)'s numbers, from 3 on. The second field is the program's name, which may hold blanks and brackets.
fn stat_field(stat: &str, number: usize) -> Option<f64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// A line of `/proc/self/status`, which counts in kB.
fn bytes(status: &str, name: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_ascii_whitespace().next()?.parse::<f64>().ok().map(|kb| kb * 1024.0)
}

/// The soft limit; what has none is shown as the largest number, as Go's client does.
fn limit(limits: &str, name: &str) -> Option<f64> {
    let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX as f64) } else { soft.parse().ok() }
}

/// A column of the two lines `IpExt:`, names above values.
fn octets(netstat: &str, name: &str) -> Option<f64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("IpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_ascii_whitespace().position(|n| n == name)?;
    values.split_ascii_whitespace().nth(at)?.parse().ok()
}

/// Kernels since 6.2 tell the number as the folder's size; older ones say 0, and it is counted.
fn open_fds() -> Option<f64> {
    let folder = "/proc/self/fd";
    match fs::metadata(folder).ok()?.len() {
        0 => fs::read_dir(folder).ok().map(|open| open.count() as f64),
        count => Some(count as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_described() {
        let text = render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("process_{name} ")));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("number")
        };
        assert!(value("open_fds") >= 3.0 && value("max_fds") >= value("open_fds"), "{text}");
        assert!(value("resident_memory_bytes") > 100_000.0, "{text}");
        assert!(value("virtual_memory_bytes") >= value("resident_memory_bytes"), "{text}");
        assert!(value("virtual_memory_max_bytes") >= value("virtual_memory_bytes"), "{text}");
        assert!(value("start_time_seconds") > 1_700_000_000.0 && value("cpu_seconds_total") >= 0.0, "{text}");
        assert!(value("network_receive_bytes_total") >= 0.0 && value("network_transmit_bytes_total") >= 0.0, "{text}");
    }

    #[test]
    fn a_programs_name_does_not_move_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 120 30 0 0 20 0 9 0 4711 1 2";
        assert_eq!(stat_field(stat, 14), Some(120.0));
        assert_eq!(stat_field(stat, 22), Some(4711.0));
        assert_eq!(stat_field("7 (a", 14), None);
        let netstat = "TcpExt: A B\nTcpExt: 1 2\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 17 18\n";
        assert_eq!((octets(netstat, "InOctets"), octets(netstat, "OutOctets")), (Some(17.0), Some(18.0)));
        assert_eq!(
            limit("Max address space  unlimited  unlimited  bytes\n", "Max address space"),
            Some(u64::MAX as f64)
        );
    }
}
