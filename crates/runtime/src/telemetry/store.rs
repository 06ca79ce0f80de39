//! The numbers themselves.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// What a number means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Summary,
}

/// Quantiles cover this much time, as SPIRE's do; sum and count cover all.
const WINDOW: Duration = Duration::from_secs(10);
/// Samples kept for quantiles, per series.
const SAMPLES_MAX: usize = 256;
/// Label values come from outside in places; more series than this are not taken in.
const SERIES_MAX: usize = 10_000;

enum Series {
    Number(f64),
    Summary { sum: f64, count: u64, recent: VecDeque<(Instant, f64)> },
}

struct Family {
    kind: Kind,
    series: BTreeMap<String, Series>,
}

/// Families by name, series by label text.
#[derive(Default)]
pub(super) struct Store {
    families: BTreeMap<String, Family>,
    series_count: usize,
}

impl Store {
    pub(super) fn put(&mut self, kind: Kind, name: String, labels: String, value: f64) {
        let family = self.families.entry(name).or_insert_with(|| Family { kind, series: BTreeMap::new() });
        if family.kind != kind {
            return; // one name, one kind: else the scraper would refuse everything
        }
        if !family.series.contains_key(&labels) {
            if self.series_count >= SERIES_MAX {
                return;
            }
            self.series_count += 1;
        }
        let series = family.series.entry(labels).or_insert_with(|| match kind {
            Kind::Counter | Kind::Gauge => Series::Number(0.0),
            Kind::Summary => Series::Summary { sum: 0.0, count: 0, recent: VecDeque::new() },
        });
        match series {
            Series::Number(number) if kind == Kind::Counter => *number += value,
            Series::Number(number) => *number = value,
            Series::Summary { sum, count, recent } => {
                *sum += value;
                *count += 1;
                if recent.len() >= SAMPLES_MAX {
                    recent.pop_front();
                }
                recent.push_back((Instant::now(), value));
            }
        }
    }

    pub(super) fn render(&mut self) -> String {
        let mut out = String::new();
        for (name, family) in &mut self.families {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Summary => "summary",
            };
            let _ = writeln!(out, "# HELP {name} {name}\n# TYPE {name} {kind}");
            for (labels, series) in &mut family.series {
                render_series(&mut out, name, labels, series);
            }
        }
        out
    }
}

fn render_series(out: &mut String, name: &str, labels: &str, series: &mut Series) {
    let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    match series {
        Series::Number(number) => {
            let _ = writeln!(out, "{name}{braces} {}", number_text(*number));
        }
        Series::Summary { sum, count, recent } => {
            while recent.front().is_some_and(|(at, _)| at.elapsed() > WINDOW) {
                recent.pop_front();
            }
            let mut sorted: Vec<f64> = recent.iter().map(|(_, value)| *value).collect();
            sorted.sort_by(f64::total_cmp);
            let comma = if labels.is_empty() { "" } else { "," };
            for quantile in [0.5, 0.9, 0.99] {
                let rank = (quantile * sorted.len() as f64).ceil() as usize;
                let value = sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN);
                let value = number_text(value);
                let _ = writeln!(out, "{name}{{{labels}{comma}quantile=\"{quantile}\"}} {value}");
            }
            let _ = writeln!(out, "{name}_sum{braces} {}", number_text(*sum));
            let _ = writeln!(out, "{name}_count{braces} {count}");
        }
    }
}

/// As Prometheus' Go client writes numbers (shortest `%g`): with an exponent of at least two digits below 1e-4 and from 1e6 on.
pub(super) fn number_text(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let Ok(exponent) = exponent.parse::<i32>() else { return scientific };
    if (-4..6).contains(&exponent) {
        return format!("{value}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_go_writes_them() {
        for (value, text) in [
            (1.0, "1"),
            (0.0, "0"),
            (86_399.429_687_5, "86399.4296875"),
            (1_795_471_767.0, "1.795471767e+09"),
            (1_000_000.0, "1e+06"),
            (123_456.0, "123456"),
            (0.000_01, "1e-05"),
            (-2.5, "-2.5"),
        ] {
            assert_eq!(number_text(value), text);
        }
    }

    #[test]
    fn series_are_limited() {
        let mut store = Store::default();
        for i in 0..SERIES_MAX + 10 {
            store.put(Kind::Counter, "n".to_owned(), format!("a=\"{i}\""), 1.0);
        }
        store.put(Kind::Gauge, "n".to_owned(), "a=\"0\"".to_owned(), 7.0);
        let text = store.render();
        assert_eq!(text.lines().count(), SERIES_MAX + 2);
        assert!(text.contains("n{a=\"0\"} 1\n"), "a gauge does not overwrite a counter");
    }
}
