//! Values into Rust types through serde, with HCL's rules: a key may occur several times (the last scalar counts,
//! objects add up, lists are joined), keys of structs are compared without regard to case, whole numbers may be quoted
//! and texts may be bare numbers.

use crate::number::parse_int;
use crate::value::{Item, Kind, Pos, Value, same_key};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use std::cell::RefCell;

/// Why a text could not be read, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("At {pos}: {message}")]
pub struct Error {
    /// Where.
    pub pos: Pos,
    /// Why, without the place.
    pub message: String,
}

/// A key that the target type does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    /// The keys that lead to the object that holds it; empty at the top. Positions in lists are written `[0]`.
    pub section: Vec<String>,
    /// The key.
    pub key: String,
    /// Where it stands.
    pub pos: Pos,
    /// The keys that are known there.
    pub known: &'static [&'static str],
}

impl Value {
    /// This value as `T`. Unknown keys are ignored.
    ///
    /// # Errors
    /// A value has a type that cannot be taken for what `T` wants; the error names line and column.
    pub fn parse_into<T: DeserializeOwned>(&self) -> Result<T, Error> {
        self.parse_reporting().map(|(value, _)| value)
    }

    /// As [`Self::parse_into`], and the keys that `T` does not know. Quoted keys of HCL are not reported: HCL takes
    /// them for labels.
    ///
    /// # Errors
    /// As [`Self::parse_into`].
    pub fn parse_reporting<T: DeserializeOwned>(&self) -> Result<(T, Vec<Unused>), Error> {
        let context = Context::default();
        let value = T::deserialize(Node { values: vec![self], pos: self.pos, context: &context })?;
        Ok((value, context.unused.into_inner()))
    }
}

/// The value as `T`: see [`Value::parse_into`].
///
/// # Errors
/// As [`Value::parse_into`].
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Error> {
    value.parse_into()
}

/// What serde makes fail without knowing where; [`Context::placed`] adds the place.
impl serde::de::Error for Error {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self { pos: Pos::default(), message: message.to_string() }
    }
}

#[derive(Default)]
struct Context {
    path: RefCell<Vec<String>>,
    unused: RefCell<Vec<Unused>>,
}

impl Context {
    fn error(&self, pos: Pos, what: &str) -> Error {
        let mut message = String::from("root");
        for part in self.path.borrow().iter() {
            if !part.starts_with('[') {
                message.push('.');
            }
            message.push_str(part);
        }
        Error { pos, message: format!("{message}: {what}") }
    }

    fn placed(&self, error: Error, pos: Pos) -> Error {
        if error.pos == Pos::default() { self.error(pos, &error.message) } else { error }
    }

    fn within<T>(&self, part: String, pos: Pos, read: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.path.borrow_mut().push(part);
        let result = read().map_err(|e| self.placed(e, pos));
        self.path.borrow_mut().pop();
        result
    }
}

/// All values that one key was given. Never empty.
#[derive(Clone)]
struct Node<'a> {
    values: Vec<&'a Value>,
    pos: Pos,
    context: &'a Context,
}

impl<'a> Node<'a> {
    fn last(&self) -> Result<&'a Value, Error> {
        self.values.last().copied().ok_or_else(|| self.context.error(self.pos, "a value is missing"))
    }

    fn fail<T>(&self, want: &str) -> Result<T, Error> {
        let value = self.last()?;
        let got = match &value.kind {
            Kind::Null => "null".into(),
            Kind::Bool(b) => b.to_string(),
            Kind::Int(i) => i.to_string(),
            Kind::Float(f) => f.to_string(),
            Kind::String(s) if s.chars().count() <= 40 => format!("{s:?}"),
            Kind::String(_) => "a text".into(),
            Kind::List(_) => "a list".into(),
            Kind::Object(_) => "a block".into(),
        };
        Err(self.context.error(value.pos, &format!("expected {want}, found {got}")))
    }

    /// The items of all objects, those in lists included: JSON writes repeated blocks as lists.
    fn items(&self, want: &str) -> Result<Vec<&'a Item>, Error> {
        let mut items = Vec::new();
        for value in &self.values {
            match &value.kind {
                Kind::Object(o) => items.extend(&o.items),
                Kind::List(list) if list.iter().all(|v| v.as_object().is_some()) => {
                    items.extend(list.iter().filter_map(Value::as_object).flat_map(|o| &o.items));
                }
                _ => return Node { values: vec![value], ..self.clone() }.fail(want),
            }
        }
        Ok(items)
    }

    fn int(&self) -> Result<i64, Error> {
        match &self.last()?.kind {
            Kind::Int(i) => Ok(*i),
            Kind::String(s) => parse_int(s).map_or_else(|| self.fail("a whole number"), Ok),
            _ => self.fail("a whole number"),
        }
    }

    fn text(&self) -> Result<String, Error> {
        match &self.last()?.kind {
            Kind::String(s) => Ok(s.clone()),
            Kind::Int(i) => Ok(i.to_string()),
            Kind::Null => Ok(String::new()),
            _ => self.fail("a text"),
        }
    }

    fn unsigned(&self) -> Result<u64, Error> {
        u64::try_from(self.int()?).or_else(|_| self.fail("a number that is not negative"))
    }

    fn float(&self) -> Result<f64, Error> {
        match &self.last()?.kind {
            Kind::Float(f) => Ok(*f),
            #[allow(clippy::cast_precision_loss)]
            Kind::Int(i) => Ok(*i as f64),
            _ => self.fail("a number"),
        }
    }
}

macro_rules! scalars {
    ($($method:ident $read:ident $visit:ident;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let value = self.$read()?;
            let pos = self.last()?.pos;
            visitor.$visit(value).map_err(|e| self.context.placed(e, pos))
        }
    )*};
}

impl<'de> Deserializer<'de> for Node<'de> {
    type Error = Error;

    scalars! {
        deserialize_i8 int visit_i64;
        deserialize_i16 int visit_i64;
        deserialize_i32 int visit_i64;
        deserialize_i64 int visit_i64;
        deserialize_u8 unsigned visit_u64;
        deserialize_u16 unsigned visit_u64;
        deserialize_u32 unsigned visit_u64;
        deserialize_u64 unsigned visit_u64;
        deserialize_f32 float visit_f64;
        deserialize_f64 float visit_f64;
        deserialize_char text visit_string;
        deserialize_str text visit_string;
        deserialize_string text visit_string;
        deserialize_identifier text visit_string;
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.last()?.kind {
            Kind::Null => visitor.visit_unit(),
            Kind::Bool(b) => visitor.visit_bool(*b),
            Kind::Int(i) => visitor.visit_i64(*i),
            Kind::Float(f) => visitor.visit_f64(*f),
            Kind::String(s) => visitor.visit_str(s),
            Kind::List(_) => self.deserialize_seq(visitor),
            Kind::Object(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.last()?.kind {
            Kind::Bool(b) => visitor.visit_bool(*b),
            _ => self.fail("true or false without quotes"),
        }
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_byte_buf(self.text()?.into_bytes())
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut elements = Vec::new();
        for value in &self.values {
            match &value.kind {
                Kind::List(list) => elements.extend(list),
                Kind::Object(_) => elements.push(value),
                _ => return Node { values: vec![value], ..self }.fail("a list"),
            }
        }
        visitor.visit_seq(Elements { elements: elements.into_iter().enumerate(), context: self.context })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let mut entries: Vec<Entry<'de>> = Vec::new();
        for item in self.items("a block")? {
            match entries.iter_mut().find(|e| e.key == item.key) {
                Some(entry) => entry.values.push(&item.value),
                None => entries.push(Entry { key: &item.key, pos: item.pos, values: vec![&item.value] }),
            }
        }
        visitor.visit_map(Entries { entries: entries.into_iter(), current: None, context: self.context })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let items = self.items("a block")?;
        let mut entries: Vec<Entry<'de>> = Vec::new();
        for item in items {
            let exact = fields.iter().find(|f| **f == item.key);
            match exact.or_else(|| fields.iter().find(|f| same_key(f, &item.key))) {
                Some(field) => match entries.iter_mut().find(|e| e.key == *field) {
                    Some(entry) => entry.values.push(&item.value),
                    None => entries.push(Entry { key: field, pos: item.pos, values: vec![&item.value] }),
                },
                None if item.bare => self.context.unused.borrow_mut().push(Unused {
                    section: self.context.path.borrow().clone(),
                    key: item.key.clone(),
                    pos: item.pos,
                    known: fields,
                }),
                None => {}
            }
        }
        visitor.visit_map(Entries { entries: entries.into_iter(), current: None, context: self.context })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let pos = self.last()?.pos;
        let text = self.text()?;
        visitor.visit_enum(text.into_deserializer()).map_err(|e: Error| self.context.placed(e, pos))
    }
}

struct Entry<'a> {
    key: &'a str,
    pos: Pos,
    values: Vec<&'a Value>,
}

struct Entries<'a> {
    entries: std::vec::IntoIter<Entry<'a>>,
    current: Option<Entry<'a>>,
    context: &'a Context,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.current = self.entries.next();
        match &self.current {
            Some(entry) => {
                let key: serde::de::value::StrDeserializer<'_, Error> = entry.key.into_deserializer();
                seed.deserialize(key).map(Some)
            }
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some(entry) = self.current.take() else {
            return Err(self.context.error(Pos::default(), "a value is missing"));
        };
        let node = Node { values: entry.values, pos: entry.pos, context: self.context };
        self.context.within(entry.key.into(), entry.pos, || seed.deserialize(node))
    }
}

struct Elements<'a> {
    elements: std::iter::Enumerate<std::vec::IntoIter<&'a Value>>,
    context: &'a Context,
}

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some((index, value)) = self.elements.next() else { return Ok(None) };
        let node = Node { values: vec![value], pos: value.pos, context: self.context };
        self.context.within(format!("[{index}]"), value.pos, || seed.deserialize(node)).map(Some)
    }
}
