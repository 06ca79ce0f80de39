//! HCL text into tokens. The rules, and the wording of errors, are those of `hashicorp/hcl` v1.

use crate::de::Error;
use crate::number::parse_int;
use crate::value::{Kind, Pos};

/// One token. Literals carry their value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    Eof,
    Ident(String),
    Literal(Kind, Literal),
    LeftBracket,
    RightBracket,
    LeftBrace,
    RightBrace,
    Comma,
    Period,
    Assign,
    Add,
    Sub,
}

/// How a literal was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Literal {
    Number,
    Float,
    Bool,
    String,
    Heredoc,
}

impl Token {
    /// The name that error texts use.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Eof => "EOF",
            Self::Ident(_) => "IDENT",
            Self::Literal(_, Literal::Number) => "NUMBER",
            Self::Literal(_, Literal::Float) => "FLOAT",
            Self::Literal(_, Literal::Bool) => "BOOL",
            Self::Literal(_, Literal::String) => "STRING",
            Self::Literal(_, Literal::Heredoc) => "HEREDOC",
            Self::LeftBracket => "LBRACK",
            Self::RightBracket => "RBRACK",
            Self::LeftBrace => "LBRACE",
            Self::RightBrace => "RBRACE",
            Self::Comma => "COMMA",
            Self::Period => "PERIOD",
            Self::Assign => "ASSIGN",
            Self::Add => "ADD",
            Self::Sub => "SUB",
        }
    }
}

/// Walks through a text, counting lines and columns.
pub(crate) struct Cursor<'a> {
    rest: std::str::Chars<'a>,
    pos: Pos,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { rest: text.chars(), pos: Pos { line: 1, column: 1 } }
    }

    /// Where the next character stands.
    pub(crate) fn pos(&self) -> Pos {
        self.pos
    }

    pub(crate) fn rest(&self) -> &'a str {
        self.rest.as_str()
    }

    pub(crate) fn peek(&self) -> Option<char> {
        self.rest.clone().next()
    }

    pub(crate) fn peek_second(&self) -> Option<char> {
        self.rest.clone().nth(1)
    }

    pub(crate) fn next(&mut self) -> Option<char> {
        let c = self.rest.next()?;
        if c == '\n' {
            self.pos.line = self.pos.line.saturating_add(1);
            self.pos.column = 1;
        } else {
            self.pos.column = self.pos.column.saturating_add(1);
        }
        Some(c)
    }

    pub(crate) fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let before = self.rest.as_str();
        while self.peek().is_some_and(&keep) {
            self.next();
        }
        before.get(..before.len() - self.rest.as_str().len()).unwrap_or_default()
    }

    pub(crate) fn fail<T>(&self, message: &str) -> Result<T, Error> {
        Err(Error { pos: self.pos, message: message.into() })
    }
}

/// Reads tokens from a text whose line ends are `\n`.
pub(crate) struct Lexer<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Lexer<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { cursor: Cursor::new(text) }
    }

    /// The next token that is not a comment, and where it begins.
    pub(crate) fn next(&mut self) -> Result<(Token, Pos), Error> {
        loop {
            self.cursor.take_while(|c| matches!(c, ' ' | '\t' | '\n' | '\r'));
            let pos = self.cursor.pos();
            let token = match self.cursor.peek() {
                None => Token::Eof,
                Some('#' | '/') => {
                    self.skip_comment()?;
                    continue;
                }
                Some('"') => Token::Literal(Kind::String(self.string()?), Literal::String),
                Some('<') => Token::Literal(Kind::String(self.heredoc()?), Literal::Heredoc),
                Some(c) if c.is_ascii_digit() => self.number(pos)?,
                Some('-') if self.cursor.peek_second().is_some_and(|c| c.is_ascii_digit()) => self.number(pos)?,
                Some('.') if self.cursor.peek_second().is_some_and(|c| c.is_ascii_digit()) => self.number(pos)?,
                Some(c) if c.is_alphabetic() || c == '_' => {
                    let is_part = |c: char| c.is_alphabetic() || c.is_numeric() || matches!(c, '_' | '-' | '.');
                    match self.cursor.take_while(is_part) {
                        "true" => Token::Literal(Kind::Bool(true), Literal::Bool),
                        "false" => Token::Literal(Kind::Bool(false), Literal::Bool),
                        ident => Token::Ident(ident.into()),
                    }
                }
                Some(c) => {
                    let token = match c {
                        '[' => Token::LeftBracket,
                        ']' => Token::RightBracket,
                        '{' => Token::LeftBrace,
                        '}' => Token::RightBrace,
                        ',' => Token::Comma,
                        '.' => Token::Period,
                        '=' => Token::Assign,
                        '+' => Token::Add,
                        '-' => Token::Sub,
                        '\0' => return self.cursor.fail("unexpected null character (0x00)"),
                        _ => return self.cursor.fail("illegal char"),
                    };
                    self.cursor.next();
                    token
                }
            };
            return Ok((token, pos));
        }
    }

    fn skip_comment(&mut self) -> Result<(), Error> {
        let start = self.cursor.next();
        match (start, self.cursor.peek()) {
            (Some('#'), _) | (_, Some('/')) => {
                self.cursor.take_while(|c| c != '\n');
            }
            (_, Some('*')) => {
                self.cursor.next();
                loop {
                    match self.cursor.next() {
                        Some('*') if self.cursor.peek() == Some('/') => break,
                        Some(_) => {}
                        None => return self.cursor.fail("comment not terminated"),
                    }
                }
                self.cursor.next();
            }
            _ => return self.cursor.fail("expected '/' for comment"),
        }
        Ok(())
    }

    fn number(&mut self, pos: Pos) -> Result<Token, Error> {
        let text = self.cursor.rest();
        let minus = usize::from(text.starts_with('-'));
        let body = text.get(minus..).unwrap_or_default();
        let digits = |s: &str| s.bytes().take_while(u8::is_ascii_digit).count();
        let (len, float) = if body.starts_with("0x") || body.starts_with("0X") {
            let hex = body.bytes().skip(2).take_while(u8::is_ascii_hexdigit).count();
            if hex == 0 {
                return self.cursor.fail("illegal hexadecimal number");
            }
            (2 + hex, false)
        } else {
            let mut len = digits(body);
            let mut float = false;
            if body.as_bytes().get(len) == Some(&b'.') {
                len += 1;
                len += digits(body.get(len..).unwrap_or_default());
                float = true;
            }
            if matches!(body.as_bytes().get(len), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(body.as_bytes().get(len + 1), Some(b'+' | b'-')));
                let exponent = digits(body.get(len + 1 + sign..).unwrap_or_default());
                if exponent == 0 {
                    return self.cursor.fail("illegal exponent");
                }
                len += 1 + sign + exponent;
                float = true;
            }
            (len, float)
        };
        let token = text.get(..minus + len).unwrap_or_default();
        for _ in 0..token.len() {
            self.cursor.next();
        }
        let out_of_range = || Error { pos, message: format!("illegal number {token}") };
        if float {
            let value: f64 = token.parse().map_err(|_| out_of_range())?;
            return Ok(Token::Literal(Kind::Float(value), Literal::Float));
        }
        Ok(Token::Literal(Kind::Int(parse_int(token).ok_or_else(out_of_range)?), Literal::Number))
    }

    /// A quoted text. What stands in `${ }` is kept as it is, quotes and escapes included.
    fn string(&mut self) -> Result<String, Error> {
        self.cursor.next();
        let mut out = String::new();
        let mut braces = 0_u32;
        loop {
            let Some(c) = self.cursor.peek() else { return self.cursor.fail("literal not terminated") };
            if c == '\0' {
                return self.cursor.fail("unexpected null character (0x00)");
            }
            if braces > 0 {
                match c {
                    '{' => braces = braces.saturating_add(1),
                    '}' => braces -= 1,
                    _ => {}
                }
                out.push(c);
                self.cursor.next();
                continue;
            }
            match c {
                '\n' => return self.cursor.fail("literal not terminated"),
                '"' => {
                    self.cursor.next();
                    return Ok(out);
                }
                '\\' => {
                    self.cursor.next();
                    out.push(self.escape()?);
                    continue;
                }
                '$' if self.cursor.peek_second() == Some('{') => {
                    self.cursor.next();
                    out.push('$');
                    braces = 1;
                    out.push('{');
                }
                c => out.push(c),
            }
            self.cursor.next();
        }
    }

    fn escape(&mut self) -> Result<char, Error> {
        let Some(c) = self.cursor.peek() else { return self.cursor.fail("literal not terminated") };
        if let '0'..='7' = c {
            return self.digits(8, 3);
        }
        let simple = match c {
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\u{b}',
            '\\' | '"' => c,
            'x' | 'u' | 'U' => {
                self.cursor.next();
                return self.digits(
                    16,
                    if c == 'x' {
                        2
                    } else if c == 'u' {
                        4
                    } else {
                        8
                    },
                );
            }
            _ => return self.cursor.fail("illegal char escape"),
        };
        self.cursor.next();
        Ok(simple)
    }

    fn digits(&mut self, base: u32, count: u32) -> Result<char, Error> {
        let mut value = 0_u32;
        for _ in 0..count {
            let Some(digit) = self.cursor.peek().and_then(|c| c.to_digit(base)) else {
                return self.cursor.fail("illegal char escape");
            };
            value = value.saturating_mul(base).saturating_add(digit);
            self.cursor.next();
        }
        match char::from_u32(value) {
            Some(c) if base == 16 || value <= 255 => Ok(c),
            _ => self.cursor.fail("illegal char escape"),
        }
    }

    /// `<<END` or `<<-END`: the lines up to one that holds only `END`. With `-`, the indentation of that line is taken
    /// off every line if all have it.
    fn heredoc(&mut self) -> Result<String, Error> {
        self.cursor.next();
        if self.cursor.peek() != Some('<') {
            return self.cursor.fail("heredoc expected second '<', didn't see it");
        }
        self.cursor.next();
        let unindent = self.cursor.peek() == Some('-');
        if unindent {
            self.cursor.next();
        }
        let anchor = self.cursor.take_while(|c| c.is_alphabetic() || c.is_numeric() || c == '_');
        match self.cursor.peek() {
            None => return self.cursor.fail("heredoc not terminated"),
            Some('\n') if anchor.is_empty() => return self.cursor.fail("zero-length heredoc anchor"),
            Some('\n') => self.cursor.next(),
            Some(_) => return self.cursor.fail("invalid characters in heredoc anchor"),
        };
        let mut lines: Vec<&str> = Vec::new();
        loop {
            let line = self.cursor.take_while(|c| c != '\n');
            if self.cursor.next().is_none() {
                return self.cursor.fail("heredoc not terminated");
            }
            let trimmed = line.trim_end_matches('\r');
            if let Some(indent) = trimmed.strip_suffix(anchor)
                && indent.chars().all(char::is_whitespace)
            {
                return Ok(join_heredoc(&lines, indent, unindent));
            }
            lines.push(line);
        }
    }
}

fn join_heredoc(lines: &[&str], indent: &str, unindent: bool) -> String {
    let strip = unindent && lines.iter().all(|l| l.starts_with(indent));
    let mut out = String::new();
    for line in lines {
        out.push_str(if strip { line.strip_prefix(indent).unwrap_or(line) } else { line });
        out.push('\n');
    }
    // What stands before the end marker belongs to the text of a plain heredoc.
    if !unindent {
        out.push_str(indent);
    }
    out
}
