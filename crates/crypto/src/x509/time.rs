//! X.509 times: UTCTime up to 2049, GeneralizedTime after (RFC 5280 section 4.1.2.5).

use crate::der::{self, Reader};
use finial_core::UnixSeconds;

/// Seconds of 9999-12-31T23:59:59Z, the last time that can be written.
const LAST: i64 = 253_402_300_799;
/// Seconds of 0000-01-01T00:00:00Z, the first.
const FIRST: i64 = -62_167_219_200;

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // March is the first month, so that the leap day is the last of its year.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let of_era = shifted.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Year, month and day of days since 1970-01-01.
fn date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

fn days_of_month(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Reads a Time.
pub(crate) fn read(reader: &mut Reader<'_>) -> Option<UnixSeconds> {
    let element = reader.any()?;
    let year_digits = match element.tag {
        der::UTC_TIME => 2,
        der::GENERALIZED_TIME => 4,
        _ => return None,
    };
    let (digits, zulu) = element.content.split_at_checked(year_digits + 10)?;
    if zulu != b"Z" || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        Some(digits.get(from..to)?.iter().fold(0, |n, d| n * 10 + i64::from(d - b'0')))
    };
    let two = |at: usize| number(year_digits + at, year_digits + at + 2);
    let year = match (year_digits, number(0, year_digits)?) {
        (4, year) => year,
        (_, year) if year < 50 => 2000 + year,
        (_, year) => 1900 + year,
    };
    let (month, day, hour, minute, second) = (two(0)?, two(2)?, two(4)?, two(6)?, two(8)?);
    let valid = (1..=12).contains(&month) && (1..=days_of_month(year, month)).contains(&day);
    if !valid || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    Some(days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Writes a Time; what cannot be written is cut to the nearest that can.
pub(crate) fn put(out: &mut Vec<u8>, time: UnixSeconds) {
    let time = time.clamp(FIRST, LAST);
    let (year, month, day) = date(time.div_euclid(86_400));
    let second = time.rem_euclid(86_400);
    let utc = (1950..2050).contains(&year);
    let (tag, length) = if utc { (der::UTC_TIME, 13) } else { (der::GENERALIZED_TIME, 15) };
    der::put_header(out, tag, length);
    if !utc {
        put_two(out, year / 100);
    }
    for part in [year % 100, month, day, second / 3600, second / 60 % 60, second % 60] {
        put_two(out, part);
    }
    out.push(b'Z');
}

fn put_two(out: &mut Vec<u8>, n: i64) {
    out.push(b'0' + (n / 10) as u8);
    out.push(b'0' + (n % 10) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(time: i64) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, time);
        out
    }

    #[test]
    fn the_kind_of_time_follows_the_year() {
        assert_eq!(&written(0)[2..], b"700101000000Z");
        assert_eq!(&written(951_782_400)[2..], b"000229000000Z");
        assert_eq!(&written(2_524_607_999)[2..], b"491231235959Z");
        assert_eq!(&written(2_524_608_000)[2..], b"20500101000000Z");
        assert_eq!(&written(i64::MAX)[2..], b"99991231235959Z");
    }

    #[test]
    fn times_that_do_not_exist_are_refused() {
        for text in ["230229000000Z", "231301000000Z", "230100000000Z", "230101240000Z", "230101006000Z", "2301010000Z"]
        {
            let mut der = Vec::new();
            der::put(&mut der, der::UTC_TIME, text.as_bytes());
            assert_eq!(read(&mut Reader::new(&der)), None, "{text}");
        }
        let mut der = Vec::new();
        der::put(&mut der, der::UTC_TIME, b"230101000000+0000");
        assert_eq!(read(&mut Reader::new(&der)), None);
    }

    proptest! {
        #[test]
        fn times_round_trip(time in FIRST..=LAST) {
            prop_assert_eq!(read(&mut Reader::new(&written(time))), Some(time));
        }
    }
}
