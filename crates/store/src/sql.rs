//! What depends on the database at hand: types, time text, row access. Another database changes this file, not the others.

use crate::StoreError;
use finial_core::UnixSeconds;
use sqlx::{Row, Sqlite};
use time::{OffsetDateTime, UtcOffset};

pub(crate) type Db = Sqlite;
pub(crate) type Conn = sqlx::SqliteConnection;
pub(crate) type DbRow = sqlx::sqlite::SqliteRow;

/// Takes the write lock at once: a transaction that reads first and writes later could fail in between.
pub(crate) const BEGIN_WRITE: &str = "BEGIN IMMEDIATE";
/// All statements until its end see one moment.
pub(crate) const BEGIN_READ: &str = "BEGIN";
pub(crate) const COMMIT: &str = "COMMIT";
pub(crate) const ROLLBACK: &str = "ROLLBACK";

/// Asks for the version of the database itself.
pub(crate) const DB_VERSION: &str = "SELECT sqlite_version()";

/// At most this many values in one `IN` list or multi-row insert.
pub(crate) const LIST_MAX: usize = 500;

/// The moment in a time column as seconds since the epoch. Rows may carry any offset (SPIRE writes the machine's), so
/// comparing the text would be wrong.
pub(crate) fn seconds_of(column: &str) -> String {
    format!("CAST(strftime('%s', {column}) AS INTEGER)")
}

/// Time as SPIRE's driver writes it: `2026-11-22 22:03:30.846+00:00`, without trailing zeros.
pub(crate) fn time_text(milliseconds: i64) -> String {
    let nanoseconds = i128::from(milliseconds) * 1_000_000;
    let t = OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
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

/// Whole seconds as time text.
pub(crate) fn seconds_text(seconds: UnixSeconds) -> String {
    time_text(seconds.saturating_mul(1000))
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

/// Reads columns by position. Values are taken as stored: SQLite columns have no fixed type, and old rows hold NULLs.
pub(crate) struct Columns<'r>(pub(crate) &'r DbRow);

impl Columns<'_> {
    pub(crate) fn text(&self, at: usize) -> Result<String, StoreError> {
        Ok(self.0.try_get_unchecked::<Option<String>, _>(at)?.unwrap_or_default())
    }

    pub(crate) fn int(&self, at: usize) -> Result<i64, StoreError> {
        Ok(self.0.try_get_unchecked::<Option<i64>, _>(at)?.unwrap_or_default())
    }

    pub(crate) fn flag(&self, at: usize) -> Result<bool, StoreError> {
        Ok(self.int(at)? != 0)
    }

    pub(crate) fn blob(&self, at: usize) -> Result<Vec<u8>, StoreError> {
        Ok(self.0.try_get_unchecked::<Option<Vec<u8>>, _>(at)?.unwrap_or_default())
    }

    /// Seconds, cut off; 0 for NULL.
    pub(crate) fn seconds(&self, at: usize) -> Result<UnixSeconds, StoreError> {
        Ok(self.time(at)?.map_or(0, |t| t.unix_timestamp()))
    }

    /// Seconds, rounded to the nearest, as SPIRE serves `created_at`; 0 for NULL.
    pub(crate) fn seconds_rounded(&self, at: usize) -> Result<UnixSeconds, StoreError> {
        Ok(self.time(at)?.map_or(0, |t| t.unix_timestamp() + i64::from(t.nanosecond() >= 500_000_000)))
    }

    fn time(&self, at: usize) -> Result<Option<OffsetDateTime>, StoreError> {
        let Some(text) = self.0.try_get_unchecked::<Option<String>, _>(at)? else { return Ok(None) };
        match parse_time(&text) {
            Some(time) => Ok(Some(time)),
            None => Err(StoreError::BadRow { what: format!("time {text:?}"), cause: "not a time".into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_time_as_spire_does() {
        assert_eq!(time_text(1_795_385_010_846), "2026-11-22 22:03:30.846+00:00");
        assert_eq!(time_text(1_795_385_010_800), "2026-11-22 22:03:30.8+00:00");
        assert_eq!(seconds_text(2_000_000_000), "2033-05-18 03:33:20+00:00");
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
