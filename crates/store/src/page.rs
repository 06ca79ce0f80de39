//! Paging: a token is the decimal row ID of the last row of the page before, as SPIRE's is.

use crate::StoreError;

/// Which part of a list is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Empty for the first page; else what the page before gave.
    pub token: String,
    /// At most this many items; 0 is refused.
    pub size: u32,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<T> {
    /// In the order of their creation.
    pub items: Vec<T>,
    /// Asks for the next page; empty when no page was asked for, or after the last item (a page with items always has
    /// one, so the last page that a client sees may be empty).
    pub next_page_token: String,
}

impl Page {
    /// The row ID after which the page starts.
    pub fn after(&self) -> Result<i64, StoreError> {
        if self.size == 0 {
            return Err(StoreError::InvalidArgument("cannot paginate with pagesize = 0".into()));
        }
        if self.token.is_empty() {
            return Ok(0);
        }
        match self.token.parse::<u64>().ok().and_then(|id| i64::try_from(id).ok()) {
            Some(id) => Ok(id),
            None => Err(StoreError::InvalidArgument(format!("could not parse token '{}'", self.token))),
        }
    }
}

impl<T> Listed<T> {
    /// `last` is the row ID of the last row that was read, also when that row is not among the items.
    pub fn new(items: Vec<T>, page: Option<&Page>, last: Option<i64>) -> Self {
        let next_page_token = match (page, last) {
            (Some(_), Some(id)) => id.to_string(),
            _ => String::new(),
        };
        Self { items, next_page_token }
    }
}
