//! Durations as Go writes and reads them: `1h30m`, `300ms`. Used by configuration files and flags.

use std::time::Duration;

const UNITS: [(&str, i128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a duration; the result is in nanoseconds and may be negative.
///
/// # Errors
/// In the wording of Go's `time.ParseDuration`.
pub fn parse_go_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {text:?}");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number_len = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(number_len);
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_len);
        rest = after;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(invalid());
        }
        if unit.is_empty() {
            return Err(format!("time: missing unit in duration {text:?}"));
        }
        let Some((_, scale)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("time: unknown unit {unit:?} in duration {text:?}"));
        };
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
        total = whole.checked_mul(*scale).and_then(|part| total.checked_add(part)).ok_or_else(invalid)?;
        let mut place = *scale;
        for digit in fraction.bytes() {
            place /= 10;
            total += i128::from(digit - b'0') * place;
        }
    }
    i64::try_from(if negative { -total } else { total }).map_err(|_| invalid())
}

/// A duration as Go prints it: `1h0m0s`, `1.5s`, `300ms`, `0s`.
pub fn format_go_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".into();
    }
    let fraction = |nanos: u128, unit: u128, name: &str| {
        let rest = nanos % unit;
        let width = unit.ilog10() as usize;
        let digits = format!("{rest:0width$}");
        let digits = digits.trim_end_matches('0');
        let whole = nanos / unit;
        if rest == 0 { format!("{whole}{name}") } else { format!("{whole}.{digits}{name}") }
    };
    match nanos {
        n if n < 1_000 => format!("{n}ns"),
        n if n < 1_000_000 => fraction(n, 1_000, "µs"),
        n if n < 1_000_000_000 => fraction(n, 1_000_000, "ms"),
        n => {
            let seconds = fraction(n % 60_000_000_000, 1_000_000_000, "s");
            let minutes = n / 60_000_000_000;
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, m) => format!("{m}m{seconds}"),
                (h, m) => format!("{h}h{m}m{seconds}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_and_refuses_as_go_does() {
        for (text, want) in [
            ("0", Ok(0)),
            ("5s", Ok(5_000_000_000)),
            ("1h30m", Ok(5_400_000_000_000)),
            ("1.5s", Ok(1_500_000_000)),
            (".5s", Ok(500_000_000)),
            ("-1m", Ok(-60_000_000_000)),
            ("1µs", Ok(1_000)),
            ("", Err("time: invalid duration \"\"")),
            ("5", Err("time: missing unit in duration \"5\"")),
            ("5x", Err("time: unknown unit \"x\" in duration \"5x\"")),
            ("x", Err("time: invalid duration \"x\"")),
            ("1d", Err("time: unknown unit \"d\" in duration \"1d\"")),
            ("9999999999h", Err("time: invalid duration \"9999999999h\"")),
        ] {
            assert_eq!(parse_go_duration(text), want.map_err(String::from), "{text}");
        }
        assert_eq!(format_go_duration(Duration::from_secs(86_400)), "24h0m0s");
        assert_eq!(format_go_duration(Duration::from_micros(3_100)), "3.1ms");
        assert_eq!(format_go_duration(Duration::from_millis(90_500)), "1m30.5s");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(nanos in 0..i64::MAX) {
            let text = format_go_duration(Duration::from_nanos(nanos.unsigned_abs()));
            prop_assert_eq!(parse_go_duration(&text), Ok(nanos));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), odd in "[0-9.hmsµun+-]{0,12}") {
            let _ = (parse_go_duration(&text), parse_go_duration(&odd));
        }
    }
}
