//! Tokens into a [`Value`] tree. Error texts are those of `hashicorp/hcl` v1.

use crate::de::Error;
use crate::lexer::{Lexer, Literal, Token};
use crate::value::{Item, Kind, Object, Pos, Value};

/// How deep objects and lists may nest.
pub(crate) const DEPTH_MAX: usize = 100;

pub(crate) fn parse_hcl(text: &str) -> Result<Value, Error> {
    let text = text.replace("\r\n", "\n");
    let mut lexer = Lexer::new(&text);
    let (token, pos) = lexer.next()?;
    let mut parser = Parser { lexer, token, pos, depth: 0 };
    let object = parser.items(false)?;
    Ok(Value { pos: Pos { line: 1, column: 1 }, kind: Kind::Object(object) })
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    token: Token,
    pos: Pos,
    depth: usize,
}

struct Key {
    text: String,
    pos: Pos,
    bare: bool,
}

impl Parser<'_> {
    fn advance(&mut self) -> Result<Token, Error> {
        let (token, pos) = self.lexer.next()?;
        self.pos = pos;
        Ok(std::mem::replace(&mut self.token, token))
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Error> {
        Err(Error { pos: self.pos, message: message.into() })
    }

    fn enter(&mut self) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return self.fail(format!("nested deeper than {DEPTH_MAX} levels"));
        }
        Ok(())
    }

    /// Items up to the closing brace, or to the end of the text.
    fn items(&mut self, in_braces: bool) -> Result<Object, Error> {
        let mut object = Object::default();
        loop {
            match self.token {
                Token::Eof => break,
                Token::RightBrace if in_braces => break,
                _ => object.items.push(self.item()?),
            }
            if self.token == Token::Comma {
                self.advance()?;
            }
        }
        Ok(object)
    }

    fn item(&mut self) -> Result<Item, Error> {
        let keys = self.keys()?;
        let value = match self.token {
            Token::Assign => {
                self.advance()?;
                self.value()?
            }
            Token::LeftBrace => self.object()?,
            _ => {
                let names: Vec<String> =
                    keys.iter().map(|k| if k.bare { k.text.clone() } else { format!("{:?}", k.text) }).collect();
                return self
                    .fail(format!("key '{}' expected start of object ('{{') or assignment ('=')", names.join(" ")));
            }
        };
        // `a "b" { }` is `a { b { } }`.
        let mut keys = keys.into_iter().rev();
        let Some(last) = keys.next() else { return self.fail("no object keys found!") };
        let wrap = |key: Key, value: Value| Item { key: key.text, pos: key.pos, bare: key.bare, value };
        Ok(keys.fold(wrap(last, value), |inner, key| {
            let value = Value { pos: inner.pos, kind: Kind::Object(Object { items: vec![inner] }) };
            wrap(key, value)
        }))
    }

    fn keys(&mut self) -> Result<Vec<Key>, Error> {
        let mut keys: Vec<Key> = Vec::new();
        loop {
            let pos = self.pos;
            match &self.token {
                Token::Ident(text) => keys.push(Key { text: text.clone(), pos, bare: true }),
                Token::Literal(Kind::String(text), Literal::String) => {
                    keys.push(Key { text: text.clone(), pos, bare: false });
                }
                Token::Assign if keys.is_empty() => return self.fail("no object keys found!"),
                Token::Assign if keys.len() > 1 => return self.fail("nested object expected: LBRACE got: ASSIGN"),
                Token::LeftBrace if keys.is_empty() => return self.fail("expected: IDENT | STRING got: LBRACE"),
                Token::Assign | Token::LeftBrace | Token::Eof => return Ok(keys),
                Token::RightBrace if !keys.is_empty() => return Ok(keys),
                other => {
                    return self.fail(format!("expected: IDENT | STRING | ASSIGN | LBRACE got: {}", other.name()));
                }
            }
            if keys.len() > DEPTH_MAX {
                return self.fail(format!("nested deeper than {DEPTH_MAX} levels"));
            }
            self.advance()?;
        }
    }

    fn value(&mut self) -> Result<Value, Error> {
        let pos = self.pos;
        match &self.token {
            Token::Literal(kind, _) => {
                let kind = kind.clone();
                self.advance()?;
                Ok(Value { pos, kind })
            }
            Token::LeftBrace => self.object(),
            Token::LeftBracket => self.list(),
            Token::Eof => self.fail("expected a value, got: EOF"),
            Token::Ident(text) => self.fail(format!("Unknown token: {pos} IDENT {text}")),
            other => self.fail(format!("Unknown token: {pos} {}", other.name())),
        }
    }

    fn object(&mut self) -> Result<Value, Error> {
        self.enter()?;
        let pos = self.pos;
        self.advance()?;
        let object = self.items(true)?;
        if self.token != Token::RightBrace {
            return self.fail(format!("object expected closing RBRACE got: {}", self.token.name()));
        }
        self.advance()?;
        self.depth -= 1;
        Ok(Value { pos, kind: Kind::Object(object) })
    }

    fn list(&mut self) -> Result<Value, Error> {
        self.enter()?;
        let pos = self.pos;
        self.advance()?;
        let mut list = Vec::new();
        let mut need_comma = false;
        loop {
            match &self.token {
                Token::Comma => {
                    self.advance()?;
                    need_comma = false;
                }
                Token::RightBracket => {
                    self.advance()?;
                    self.depth -= 1;
                    return Ok(Value { pos, kind: Kind::List(list) });
                }
                other if need_comma => {
                    let name = other.name();
                    return self.fail(format!("error parsing list, expected comma or list end, got: {name}"));
                }
                Token::Literal(..) | Token::LeftBrace | Token::LeftBracket => {
                    list.push(self.value()?);
                    need_comma = true;
                }
                other => {
                    let name = other.name();
                    return self.fail(format!("unexpected token while parsing list: {name}"));
                }
            }
        }
    }
}
