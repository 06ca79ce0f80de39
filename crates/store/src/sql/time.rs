//! Moments, and the text in which SQLite keeps them.

use finial_core::UnixSeconds;
use time::{OffsetDateTime, UtcOffset};

/// A moment, in milliseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) i64);

impl Moment {
    /// A whole second.
    pub(crate) fn seconds(seconds: UnixSeconds) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Seconds, rounded to the nearest, as SPIRE serves `created_at`.
    pub(crate) fn rounded(self) -> UnixSeconds {
        self.0.saturating_add(500).div_euclid(1000)
    }

    /// The same for the drivers.
    pub(crate) fn utc(self) -> OffsetDateTime {
        let nanoseconds = i128::from(self.0) * 1_000_000;
        OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }
}

/// Time as SPIRE's driver writes it: `2026-11-22 22:03:30.846+00:00`, without trailing zeros.
pub(crate) fn time_text(moment: Moment) -> String {
    let t = moment.utc();
    let (date, time) = (t.date(), t.time());
    let mut text = format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    );
    if time.millisecond() != 0 {
        text.push_str(format!(".{:03}", time.millisecond()).trim_end_matches('0'));
    }
    text.push_str("+00:00");
    text
}

/// Reads the forms that SPIRE's driver reads: blank or `T` between date and time, fraction and offset optional.
pub(crate) fn parse_time(text: &str) -> Option<OffsetDateTime> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u16>().ok();
    let small = |range: std::ops::Range<usize>| u8::try_from(number(range)?).ok();
    let month = time::Month::try_from(small(5..7)?).ok()?;
    let date = time::Date::from_calendar_date(i32::from(number(0..4)?), month, small(8..10)?).ok()?;
    let mut rest = text.get(19..)?;
    let mut nanoseconds = 0u32;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let padded: String = fraction.get(..digits)?.chars().chain("000000000".chars()).take(9).collect();
        nanoseconds = padded.parse().ok()?;
        rest = fraction.get(digits..)?;
    }
    let clock = time::Time::from_hms_nano(small(11..13)?, small(14..16)?, small(17..19)?, nanoseconds).ok()?;
    let offset = match rest.trim() {
        "" | "Z" => UtcOffset::UTC,
        signed => {
            let sign = if signed.starts_with('-') { -1 } else { 1 };
            let (hours, minutes) = signed.get(1..)?.split_once(':')?;
            UtcOffset::from_hms(sign * hours.parse::<i8>().ok()?, sign * minutes.parse::<i8>().ok()?, 0).ok()?
        }
    };
    Some(date.with_time(clock).assume_offset(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_time_as_spire_does() {
        assert_eq!(time_text(Moment(1_795_385_010_846)), "2026-11-22 22:03:30.846+00:00");
        assert_eq!(time_text(Moment(1_795_385_010_800)), "2026-11-22 22:03:30.8+00:00");
        assert_eq!(time_text(Moment::seconds(2_000_000_000)), "2033-05-18 03:33:20+00:00");
    }

    #[test]
    fn reads_every_form_of_time() {
        for (text, seconds) in [
            ("2026-11-22 22:03:30.846227032+00:00", 1_795_385_010),
            ("2026-11-22 23:03:30+01:00", 1_795_385_010),
            ("2026-11-22 17:33:30.5-04:30", 1_795_385_010),
            ("2026-11-22T22:03:30Z", 1_795_385_010),
            ("2026-11-22 22:03:30", 1_795_385_010),
            ("0001-01-01 00:00:00+00:00", -62_135_596_800),
        ] {
            assert_eq!(parse_time(text).map(|t| t.unix_timestamp()), Some(seconds), "{text}");
        }
        for text in ["", "now", "2026-13-22 22:03:30", "2026-11-22 22:03", "2026-11-22 22:03:30+x", "äöüäöüäöüäöüäöü"]
        {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }
}
