//! JSON into a [`Value`] tree. Trailing commas are taken, as HCL's reader takes them.

use crate::de::Error;
use crate::lexer::Cursor;
use crate::number::parse_int;
use crate::parser::DEPTH_MAX;
use crate::value::{Item, Kind, Object, Value};

pub(crate) fn parse_json(text: &str) -> Result<Value, Error> {
    let mut parser = Json { cursor: Cursor::new(text), depth: 0 };
    parser.space();
    let value = parser.value()?;
    parser.space();
    if parser.cursor.peek().is_some() {
        return parser.cursor.fail("unexpected text after the JSON object");
    }
    Ok(value)
}

struct Json<'a> {
    cursor: Cursor<'a>,
    depth: usize,
}

impl Json<'_> {
    fn space(&mut self) {
        self.cursor.take_while(|c| c.is_whitespace() || c == '\u{feff}');
    }

    fn value(&mut self) -> Result<Value, Error> {
        let pos = self.cursor.pos();
        let kind = match self.cursor.peek() {
            Some('{') => self.nested(Self::object)?,
            Some('[') => self.nested(Self::list)?,
            Some('"') => Kind::String(self.string()?),
            Some(c) if c.is_ascii_digit() || c == '-' => self.number()?,
            Some(c) if c.is_ascii_alphabetic() => match self.cursor.take_while(|c| c.is_ascii_alphanumeric()) {
                "true" => Kind::Bool(true),
                "false" => Kind::Bool(false),
                "null" => Kind::Null,
                word => return Err(Error { pos, message: format!("unexpected {word:?} in JSON") }),
            },
            Some(c) => return self.cursor.fail(&format!("unexpected {c:?} in JSON")),
            None => return self.cursor.fail("unexpected end of JSON"),
        };
        Ok(Value { pos, kind })
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Kind, Error>) -> Result<Kind, Error> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return self.cursor.fail(&format!("nested deeper than {DEPTH_MAX} levels"));
        }
        self.cursor.next();
        let kind = read(self)?;
        self.depth -= 1;
        Ok(kind)
    }

    fn object(&mut self) -> Result<Kind, Error> {
        let mut object = Object::default();
        loop {
            self.space();
            let pos = self.cursor.pos();
            match self.cursor.peek() {
                Some('}') => {
                    self.cursor.next();
                    return Ok(Kind::Object(object));
                }
                Some('"') => {
                    let key = self.string()?;
                    self.space();
                    if self.cursor.peek() != Some(':') {
                        return self.cursor.fail("expected ':' after a JSON key");
                    }
                    self.cursor.next();
                    self.space();
                    object.items.push(Item { key, pos, bare: true, value: self.value()? });
                }
                _ => return self.cursor.fail("expected a JSON key in quotes or '}'"),
            }
            self.separator('}')?;
        }
    }

    fn list(&mut self) -> Result<Kind, Error> {
        let mut list = Vec::new();
        loop {
            self.space();
            if self.cursor.peek() == Some(']') {
                self.cursor.next();
                return Ok(Kind::List(list));
            }
            list.push(self.value()?);
            self.separator(']')?;
        }
    }

    fn separator(&mut self, end: char) -> Result<(), Error> {
        self.space();
        match self.cursor.peek() {
            Some(',') => {
                self.cursor.next();
                Ok(())
            }
            Some(c) if c == end => Ok(()),
            _ => self.cursor.fail(&format!("expected ',' or '{end}' in JSON")),
        }
    }

    fn number(&mut self) -> Result<Kind, Error> {
        let pos = self.cursor.pos();
        let text = self.cursor.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
        let bad = || Error { pos, message: format!("illegal number {text}") };
        if text.contains(['.', 'e', 'E']) {
            return Ok(Kind::Float(text.parse().ok().filter(|f: &f64| f.is_finite()).ok_or_else(bad)?));
        }
        Ok(Kind::Int(parse_int(text).ok_or_else(bad)?))
    }

    fn string(&mut self) -> Result<String, Error> {
        self.cursor.next();
        let mut out = String::new();
        loop {
            let Some(c) = self.cursor.peek() else { return self.cursor.fail("literal not terminated") };
            match c {
                '"' => {
                    self.cursor.next();
                    return Ok(out);
                }
                '\n' | '\0' => return self.cursor.fail("literal not terminated"),
                '\\' => {
                    self.cursor.next();
                    out.push(self.escape()?);
                }
                c => {
                    out.push(c);
                    self.cursor.next();
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, Error> {
        let c = match self.cursor.peek() {
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some(c @ ('"' | '\\' | '/')) => c,
            Some('u') => {
                self.cursor.next();
                return self.unicode();
            }
            _ => return self.cursor.fail("illegal char escape"),
        };
        self.cursor.next();
        Ok(c)
    }

    fn unicode(&mut self) -> Result<char, Error> {
        let first = self.four_digits()?;
        if (0xD800..0xDC00).contains(&first) && self.cursor.rest().starts_with("\\u") {
            self.cursor.next();
            self.cursor.next();
            let second = self.four_digits()?;
            if (0xDC00..0xE000).contains(&second) {
                let code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
                return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            return self.cursor.fail("illegal char escape");
        }
        Ok(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn four_digits(&mut self) -> Result<u32, Error> {
        let mut value = 0;
        for _ in 0..4 {
            let Some(digit) = self.cursor.peek().and_then(|c| c.to_digit(16)) else {
                return self.cursor.fail("illegal char escape");
            };
            value = value * 16 + digit;
            self.cursor.next();
        }
        Ok(value)
    }
}
