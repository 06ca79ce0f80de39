//! Rows, read by position.

use super::time::parse_time;
use crate::StoreError;
use finial_core::UnixSeconds;
use sqlx::mysql::{MySqlRow, MySqlTypeInfo};
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{Decode, MySql, Postgres, Sqlite, Type, TypeInfo, ValueRef};
use time::OffsetDateTime;

/// One row. Values are taken as stored: SQLite columns have no fixed type, and old rows hold NULLs, which are read as
/// the empty value.
pub(crate) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
    MySql(MySqlRow),
}

impl Row {
    fn get<'r, T>(&'r self, at: usize) -> Result<Option<T>, StoreError>
    where
        T: Decode<'r, Sqlite> + Decode<'r, Postgres> + Decode<'r, MySql>,
        T: Type<Sqlite> + Type<Postgres> + Type<MySql>,
    {
        use sqlx::Row as _;
        let value = match self {
            Self::Sqlite(row) => row.try_get_unchecked(at),
            Self::Postgres(row) => row.try_get_unchecked(at),
            Self::MySql(row) => row.try_get_unchecked(at),
        };
        // The row's fault, not the database's.
        value.map_err(|e| StoreError::BadRow { what: format!("column {at}"), cause: e.to_string() })
    }

    pub(crate) fn text(&self, at: usize) -> Result<String, StoreError> {
        Ok(self.str(at)?.to_owned())
    }

    /// The same without a copy.
    pub(crate) fn str(&self, at: usize) -> Result<&str, StoreError> {
        Ok(self.get::<&str>(at)?.unwrap_or_default())
    }

    pub(crate) fn int(&self, at: usize) -> Result<i64, StoreError> {
        if let Self::MySql(row) = self
            && is_unsigned(row, at)?
        {
            use sqlx::Row as _;
            let value = row.try_get_unchecked::<Option<u64>, _>(at)?.unwrap_or_default();
            return i64::try_from(value)
                .map_err(|e| StoreError::BadRow { what: format!("number {value}"), cause: e.to_string() });
        }
        Ok(self.get::<i64>(at)?.unwrap_or_default())
    }

    pub(crate) fn flag(&self, at: usize) -> Result<bool, StoreError> {
        match self {
            Self::Postgres(_) => Ok(self.get::<bool>(at)?.unwrap_or_default()),
            _ => Ok(self.int(at)? != 0),
        }
    }

    pub(crate) fn blob(&self, at: usize) -> Result<&[u8], StoreError> {
        Ok(self.get::<&[u8]>(at)?.unwrap_or_default())
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
        if !matches!(self, Self::Sqlite(_)) {
            return self.get::<OffsetDateTime>(at);
        }
        let Some(text) = self.get::<&str>(at)? else { return Ok(None) };
        match parse_time(text) {
            Some(time) => Ok(Some(time)),
            None => Err(StoreError::BadRow { what: format!("time {text:?}"), cause: "not a time".into() }),
        }
    }
}

/// The driver reads a number as signed whatever the column is.
fn is_unsigned(row: &MySqlRow, at: usize) -> Result<bool, StoreError> {
    use sqlx::Row as _;
    let value = row.try_get_raw(at)?;
    let kind: &MySqlTypeInfo = &value.type_info();
    Ok(kind.name().ends_with("UNSIGNED"))
}
