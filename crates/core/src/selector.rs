//! Selectors: what an attestor found out about a node or a workload, as `type:value`.

use std::fmt;

/// One attested fact, such as `unix:uid:1000` (type `unix`, value `uid:1000`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// The attestor that states it; never empty, never with a colon.
    pub kind: String,
    /// What it states; never empty, may hold colons.
    pub value: String,
}

/// What is wrong with a selector, in SPIRE's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// The type is empty.
    #[error("missing selector type")]
    MissingType,
    /// A type with a colon could not be told from its value.
    #[error("selector type contains ':'")]
    ColonInType,
    /// The value is empty.
    #[error("missing selector value")]
    MissingValue,
    /// The text form has no colon.
    #[error("selector \"type:value\" needs a ':' between type and value")]
    NoColon,
}

impl Selector {
    /// Checks and joins the two halves.
    pub fn new(kind: impl Into<String>, value: impl Into<String>) -> Result<Self, SelectorError> {
        let (kind, value) = (kind.into(), value.into());
        if kind.is_empty() {
            return Err(SelectorError::MissingType);
        }
        if kind.contains(':') {
            return Err(SelectorError::ColonInType);
        }
        if value.is_empty() {
            return Err(SelectorError::MissingValue);
        }
        Ok(Self { kind, value })
    }

    /// Parses `type:value`, split at the first colon.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let (kind, value) = text.split_once(':').ok_or(SelectorError::NoColon)?;
        Self::new(kind, value)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.value)
    }
}

/// A set of selectors: sorted, without duplicates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SelectorSet(Vec<Selector>);

impl SelectorSet {
    /// Sorts and removes duplicates.
    pub fn new(mut selectors: Vec<Selector>) -> Self {
        selectors.sort();
        selectors.dedup();
        Self(selectors)
    }

    /// The selectors in order.
    pub fn as_slice(&self) -> &[Selector] {
        &self.0
    }

    /// Whether the set holds no selector.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it holds `selector`.
    pub fn contains(&self, selector: &Selector) -> bool {
        self.0.binary_search(selector).is_ok()
    }

    /// Whether each of these is also in `other`. The empty set is a subset of every set.
    pub fn is_subset_of(&self, other: &Self) -> bool {
        self.0.iter().all(|s| other.contains(s))
    }

    /// Iterates in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Selector> {
        self.0.iter()
    }

    /// Gives the sorted vector back.
    pub fn into_vec(self) -> Vec<Selector> {
        self.0
    }
}

impl FromIterator<Selector> for SelectorSet {
    fn from_iter<I: IntoIterator<Item = Selector>>(iter: I) -> Self {
        Self::new(iter.into_iter().collect())
    }
}
impl<'a> IntoIterator for &'a SelectorSet {
    type Item = &'a Selector;
    type IntoIter = std::slice::Iter<'a, Selector>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

/// How a set given in a filter must relate to the set of an entry or agent (SPIRE's `MatchBehavior`, same numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatchBehavior {
    /// The same set (0).
    Exact,
    /// All of the entry's are among the given (1).
    Subset,
    /// All of the given are among the entry's (2).
    Superset,
    /// At least one is shared (3).
    Any,
}

impl MatchBehavior {
    /// Whether `have` (the entry's or agent's own, sorted or not) matches `given` (the filter's).
    pub fn matches<T: PartialEq>(self, have: &[T], given: &[T]) -> bool {
        let within = |a: &[T], b: &[T]| a.iter().all(|x| b.contains(x));
        match self {
            Self::Exact => within(have, given) && within(given, have),
            Self::Subset => within(have, given),
            Self::Superset => within(given, have),
            Self::Any => have.iter().any(|x| given.contains(x)),
        }
    }
}
