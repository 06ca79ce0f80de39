//! The tree that a configuration text becomes: order and positions kept, types as written.

use std::fmt;

/// Where something stands in the text. Lines and columns count from 1; columns count characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pos {
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value with the place where it begins.
#[derive(Clone, Debug, Default)]
pub struct Value {
    /// Where it begins.
    pub pos: Pos,
    /// What it is.
    pub kind: Kind,
}

/// What a value is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// JSON `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// A quoted text or a heredoc, unescaped.
    String(String),
    /// `[a, b]`.
    List(Vec<Value>),
    /// `{ key = value }` or a block.
    Object(Object),
}

impl Default for Kind {
    fn default() -> Self {
        Self::Object(Object::default())
    }
}

/// An ordered list of items. A key may occur several times: blocks of one name add up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object {
    /// The items, in the order of the text.
    pub items: Vec<Item>,
}

/// One `key = value`, or one block. `a "b" { }` is item `a` holding an object with the one item `b`.
#[derive(Clone, Debug)]
pub struct Item {
    /// The key, unquoted.
    pub key: String,
    /// Where the key begins.
    pub pos: Pos,
    /// Whether the key stands without quotes, or in JSON. HCL takes unknown quoted keys for labels.
    pub bare: bool,
    /// The value.
    pub value: Value,
}

/// Two items are equal if they say the same; where and how they are written does not matter.
impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key && self.value == other.value
    }
}

/// Two values are equal if they say the same; where they stand does not matter.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
    }
}

impl Value {
    /// An empty object, as an absent `plugin_data` means.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The object inside, if it is one.
    pub fn as_object(&self) -> Option<&Object> {
        match &self.kind {
            Kind::Object(o) => Some(o),
            _ => None,
        }
    }

    /// The text inside, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match &self.kind {
            Kind::String(s) => Some(s),
            _ => None,
        }
    }

    /// The last value found by following `path` through objects, keys matched as [`Object::all`] does.
    pub fn find(&self, path: &[&str]) -> Option<&Value> {
        self.find_item(path).map(|i| &i.value)
    }

    /// Where the key at the end of `path` stands.
    pub fn find_pos(&self, path: &[&str]) -> Option<Pos> {
        self.find_item(path).map(|i| i.pos)
    }

    fn find_item(&self, path: &[&str]) -> Option<&Item> {
        let (first, rest) = path.split_first()?;
        match &self.kind {
            Kind::Object(o) => o.find_item(first, rest),
            Kind::List(l) => l.iter().rev().filter_map(Value::as_object).find_map(|o| o.find_item(first, rest)),
            _ => None,
        }
    }
}

impl Object {
    fn find_item(&self, first: &str, rest: &[&str]) -> Option<&Item> {
        let mut found = self.items.iter().rev().filter(|i| same_key(&i.key, first));
        if rest.is_empty() { found.next() } else { found.find_map(|i| i.value.find_item(rest)) }
    }

    /// The items of this key. HCL compares keys without regard to case.
    pub fn all<'a>(&'a self, key: &'a str) -> impl DoubleEndedIterator<Item = &'a Item> + 'a {
        self.items.iter().filter(move |i| same_key(&i.key, key))
    }
}

/// Whether two keys are the same to HCL.
pub(crate) fn same_key(a: &str, b: &str) -> bool {
    a == b || a.to_lowercase() == b.to_lowercase()
}
