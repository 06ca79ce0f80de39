//! A statement and its values, before it is known which database will run it.

use super::{Dialect, Moment};
use finial_core::UnixSeconds;
use std::borrow::Cow;
use std::fmt::Write;

/// At most this many values in one statement; the least that a database takes is SQLite's 32,766.
const VALUES_MAX: usize = 16_000;
/// Up to this many rows a statement is kept prepared; larger ones differ too much to meet again.
const PREPARED_ROWS_MAX: usize = 8;

/// One value of a statement.
#[derive(Clone, Debug)]
pub(crate) enum Value<'q> {
    Int(i64),
    Bool(bool),
    Text(Cow<'q, str>),
    Blob(Option<Cow<'q, [u8]>>),
    Time(Option<Moment>),
}

impl From<i64> for Value<'_> {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<i32> for Value<'_> {
    fn from(value: i32) -> Self {
        Self::Int(value.into())
    }
}

impl From<u32> for Value<'_> {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl From<bool> for Value<'_> {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl<'q> From<&'q str> for Value<'q> {
    fn from(value: &'q str) -> Self {
        Self::Text(value.into())
    }
}

impl<'q> From<&'q String> for Value<'q> {
    fn from(value: &'q String) -> Self {
        Self::Text(value.as_str().into())
    }
}

impl From<String> for Value<'_> {
    fn from(value: String) -> Self {
        Self::Text(value.into())
    }
}

impl<'q> From<&'q [u8]> for Value<'q> {
    fn from(value: &'q [u8]) -> Self {
        Self::Blob(Some(value.into()))
    }
}

impl From<Option<Vec<u8>>> for Value<'_> {
    fn from(value: Option<Vec<u8>>) -> Self {
        Self::Blob(value.map(Cow::Owned))
    }
}

impl From<Moment> for Value<'_> {
    fn from(value: Moment) -> Self {
        Self::Time(Some(value))
    }
}

impl From<Option<Moment>> for Value<'_> {
    fn from(value: Option<Moment>) -> Self {
        Self::Time(value)
    }
}

/// A statement with `?` for each of its values. The text is ours, never a caller's; what callers send is a value.
#[derive(Clone, Debug)]
pub(crate) struct Query<'q> {
    pub(super) text: Cow<'static, str>,
    pub(super) values: Vec<Value<'q>>,
    pub(super) persistent: bool,
}

impl<'q> Query<'q> {
    /// A statement that is kept prepared.
    pub(crate) fn new(text: impl Into<Cow<'static, str>>) -> Self {
        Self { text: text.into(), values: Vec::new(), persistent: true }
    }

    /// One that is not worth keeping: its text is hardly ever the same again.
    pub(crate) fn once(text: impl Into<Cow<'static, str>>) -> Self {
        Self { persistent: false, ..Self::new(text) }
    }

    /// Whether it is kept prepared.
    pub(crate) fn keep(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    /// The value of the next `?`.
    pub(crate) fn bind(mut self, value: impl Into<Value<'q>>) -> Self {
        self.values.push(value.into());
        self
    }

    /// Appends text; each `?` in it needs a [`Query::bind`].
    pub(crate) fn push(&mut self, text: &str) -> &mut Self {
        self.text.to_mut().push_str(text);
        self
    }

    /// Appends a value.
    pub(crate) fn push_bind(&mut self, value: impl Into<Value<'q>>) -> &mut Self {
        self.push("?");
        self.values.push(value.into());
        self
    }

    /// Appends values as `(?, ?, …)`.
    pub(crate) fn push_list(&mut self, values: impl IntoIterator<Item = impl Into<Value<'q>>>) -> &mut Self {
        self.push("(");
        for (i, value) in values.into_iter().enumerate() {
            self.push(if i == 0 { "" } else { ", " }).push_bind(value);
        }
        self.push(")")
    }

    /// Appends ` AND column = value`, where upper and lower case differ also on MySQL, whose index does not tell them
    /// apart.
    pub(crate) fn and_equals(&mut self, dialect: Dialect, column: &str, value: &'q str) -> &mut Self {
        self.push(" AND ").equals(dialect, column, value)
    }

    /// Appends `column = value`, as [`Query::and_equals`].
    pub(crate) fn equals(&mut self, dialect: Dialect, column: &str, value: &'q str) -> &mut Self {
        self.push(column).push(" = ").push_bind(value);
        if dialect == Dialect::MySql {
            self.push(" AND BINARY ").push(column).push(" = ").push_bind(value);
        }
        self
    }

    /// Appends a comparison of a time column with a whole second. SQLite's rows may carry any offset (SPIRE writes the
    /// machine's), so comparing its text would be wrong.
    pub(crate) fn push_time(
        &mut self,
        dialect: Dialect,
        column: &str,
        operator: &str,
        seconds: UnixSeconds,
    ) -> &mut Self {
        match dialect {
            Dialect::Sqlite => {
                self.push(&format!("CAST(strftime('%s', {column}) AS INTEGER) {operator} ")).push_bind(seconds)
            }
            _ => self.push(&format!("{column} {operator} ")).push_bind(Moment::seconds(seconds)),
        }
    }

    /// The text with the placeholders of the database.
    pub(super) fn text_for(text: Cow<'static, str>, dialect: Dialect) -> Cow<'static, str> {
        if dialect != Dialect::Postgres || !text.contains('?') {
            return text;
        }
        let mut numbered = String::with_capacity(text.len() + 64);
        for (i, part) in text.split('?').enumerate() {
            if i > 0 {
                // writing into a string cannot fail
                let _ = write!(numbered, "${i}");
            }
            numbered.push_str(part);
        }
        numbered.into()
    }
}

/// The insertion of rows with as few statements as may be, for [`super::Conn::execute_all`]. `into` is
/// `table (column, …)`, with `N` columns.
pub(crate) fn insert_rows<'q, const N: usize>(
    into: &str,
    rows: impl IntoIterator<Item = [Value<'q>; N]>,
) -> Vec<Query<'q>> {
    let mut rows = rows.into_iter().peekable();
    let mut queries = Vec::new();
    while rows.peek().is_some() {
        queries.push(rows_query(into, rows.by_ref().take((VALUES_MAX / N).max(1))));
    }
    queries
}

/// The same as one statement, which the caller may add to.
pub(crate) fn rows_query<'q, const N: usize>(into: &str, rows: impl IntoIterator<Item = [Value<'q>; N]>) -> Query<'q> {
    let mut query = Query::new(format!("INSERT INTO {into} VALUES "));
    let mut count = 0;
    for row in rows {
        query.push(if count == 0 { "" } else { ", " }).push_list(row);
        count += 1;
    }
    query.keep(count <= PREPARED_ROWS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_numbered_for_postgresql_only() {
        let text = "SELECT a FROM b WHERE c = ? AND d IN (?, ?)";
        assert_eq!(Query::text_for(text.into(), Dialect::Sqlite), text);
        assert_eq!(Query::text_for(text.into(), Dialect::MySql), text);
        let numbered = "SELECT a FROM b WHERE c = $1 AND d IN ($2, $3)";
        assert_eq!(Query::text_for(text.into(), Dialect::Postgres), numbered);
    }

    #[test]
    fn rows_become_one_statement() {
        let query = rows_query("t (a, b)", [["x".into(), 1_i64.into()], ["y".into(), 2_i64.into()]]);
        assert_eq!(query.text, "INSERT INTO t (a, b) VALUES (?, ?), (?, ?)");
        assert_eq!((query.values.len(), query.persistent), (4, true));
        let many = rows_query("t (a)", (0..9_i64).map(|n| [n.into()]));
        assert!(!many.persistent);
    }

    #[test]
    fn mysql_is_told_that_case_matters() {
        let mut query = Query::new("SELECT 1 FROM t WHERE 1 = 1");
        query.and_equals(Dialect::MySql, "t.a", "x");
        assert_eq!(query.text, "SELECT 1 FROM t WHERE 1 = 1 AND t.a = ? AND BINARY t.a = ?");
        assert_eq!(query.values.len(), 2);
    }
}
