//! Moments as Go's `time.Time` prints itself: `2033-05-18 03:33:20 +0000 UTC`.

use finial_core::UnixSeconds;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};

const FORM: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute]");

/// In UTC.
pub(crate) fn utc(seconds: UnixSeconds) -> String {
    text(seconds, UtcOffset::UTC, "UTC")
}

/// In the machine's time zone. Zones are named by their offset where Go knows an abbreviation, except UTC.
pub(crate) fn local(seconds: UnixSeconds) -> String {
    let at = moment(seconds);
    let offset = UtcOffset::local_offset_at(at).unwrap_or(UtcOffset::UTC);
    if offset.is_utc() {
        return utc(seconds);
    }
    let (hours, minutes, _) = offset.as_hms();
    let sign = if offset.is_negative() { '-' } else { '+' };
    let name = match minutes.unsigned_abs() {
        0 => format!("{sign}{:02}", hours.unsigned_abs()),
        minutes => format!("{sign}{:02}{minutes:02}", hours.unsigned_abs()),
    };
    text(seconds, offset, &name)
}

/// As RFC 3339, in UTC: `2033-05-18T03:33:20Z`.
pub(crate) fn rfc3339(seconds: UnixSeconds) -> String {
    moment(seconds).format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

/// Whether a text has the form `2006-01-02 15:04:05 -0700 -07`, and what is wrong if not.
pub(crate) fn check_filter(text: &str) -> Result<(), String> {
    const FILTER: &[BorrowedFormatItem<'_>] = format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute] "
    );
    let layout = "2006-01-02 15:04:05 -0700 -07";
    let cannot = || format!("parsing time {text:?} as {layout:?}: cannot parse {text:?} as \"2006\"");
    // the second offset repeats the hours of the first
    let (head, zone) = text.rsplit_once(' ').ok_or_else(cannot)?;
    let zone_ok = zone.len() == 3 && zone.starts_with(['+', '-']) && zone.bytes().skip(1).all(|b| b.is_ascii_digit());
    match OffsetDateTime::parse(&format!("{head} "), FILTER) {
        Ok(_) if zone_ok => Ok(()),
        _ => Err(cannot()),
    }
}

fn moment(seconds: UnixSeconds) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn text(seconds: UnixSeconds, offset: UtcOffset, zone: &str) -> String {
    let moment = moment(seconds).to_offset(offset).format(FORM).unwrap_or_default();
    format!("{moment} {zone}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_go_does() {
        assert_eq!(utc(2_000_000_000), "2033-05-18 03:33:20 +0000 UTC");
        assert_eq!(rfc3339(2_000_000_000), "2033-05-18T03:33:20Z");
        assert_eq!(
            text(2_000_000_000, UtcOffset::from_hms(5, 30, 0).unwrap(), "+0530"),
            "2033-05-18 09:03:20 +0530 +0530"
        );
    }

    #[test]
    fn knows_the_form_of_the_filter() {
        assert_eq!(check_filter("2033-05-18 03:33:20 +0000 +00"), Ok(()));
        assert_eq!(check_filter("2033-05-18 03:33:20 -0430 -04"), Ok(()));
        for bad in
            ["", "tomorrow", "2033-05-18 03:33:20", "2033-05-18 03:33:20 +0000 UTC", "2033-13-18 03:33:20 +0000 +00"]
        {
            assert!(check_filter(bad).is_err(), "{bad}");
        }
    }
}
