//! What HCL and JSON texts become, which texts are refused and where, and that nothing makes the reader panic.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use finial_hcl::{Item, Kind, Object, Pos, Value, parse};
use proptest::prelude::*;
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
struct Config {
    server: Option<Server>,
    plugins: BTreeMap<String, BTreeMap<String, Plugin>>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
struct Server {
    trust_domain: String,
    bind_port: u16,
    debug: bool,
    admin_ids: Vec<String>,
    factor: f64,
    sinks: Vec<Sink>,
    note: Option<String>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
struct Sink {
    address: String,
    env: String,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
struct Plugin {
    enabled: Option<bool>,
    plugin_data: Option<BTreeMap<String, String>>,
}

fn read(text: &str) -> Config {
    parse(text).unwrap().parse_into().unwrap()
}

const HCL: &str = r#"
# one kind of comment
// another
/* and
   another */
server {
    trust_domain = "example.org" # behind a value
    bind_port = "8081"
    debug = true
    admin_ids = [
        "spiffe://a/b", // one
        "spiffe://c/d",
    ]
    factor = 1.5
    sinks = [{ address = "x", env = "y" }, { address = "z" }]
}
plugins {
    KeyManager "memory" { plugin_data = {} }
    NodeAttestor "join_token" {
        plugin_data { }
        enabled = false
    }
    NodeAttestor "x509pop" { plugin_data { size = 7 } }
}
"#;

const JSON: &str = r#" {
  "server": {"trust_domain": "example.org", "bind_port": 8081, "debug": true, "factor": 1.5,
    "admin_ids": ["spiffe:\/\/a\/b", "spiffe://c/d",],
    "sinks": [{"address": "x", "env": "y"}, {"address": "z"}], "unknown": null },
  "plugins": {
    "KeyManager": {"memory": {"plugin_data": {}}},
    "NodeAttestor": [{"join_token": {"plugin_data": {}, "enabled": false}}, {"x509pop": {"plugin_data": {"size": 7}}}]
  }
} "#;

#[test]
fn hcl_and_json_say_the_same() {
    let config = read(HCL);
    assert_eq!(config, read(JSON));
    let server = config.server.unwrap();
    assert_eq!(server.bind_port, 8081);
    assert_eq!(server.admin_ids, ["spiffe://a/b", "spiffe://c/d"]);
    assert_eq!(server.sinks.len(), 2);
    assert_eq!(config.plugins["NodeAttestor"]["join_token"].enabled, Some(false));
    assert_eq!(config.plugins["NodeAttestor"]["x509pop"].plugin_data.as_ref().unwrap()["size"], "7");
    assert_eq!(read(&HCL.replace('\n', "\r\n")), read(JSON));
}

#[test]
fn blocks_of_one_name_add_up_and_the_last_value_counts() {
    let config = read(
        "server { bind_port = 1\n bind_port = 2 }\nserver { TRUST_DOMAIN = \"td\" sinks { address = \"a\" } sinks { address = \"b\" env = \"c\" } }",
    );
    let server = config.server.unwrap();
    assert_eq!((server.bind_port, server.trust_domain.as_str()), (2, "td"));
    assert_eq!(server.sinks.iter().map(|s| s.address.as_str()).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn strings() {
    for (text, want) in [
        (r#""a\tb\n\"c\"\\""#, "a\tb\n\"c\"\\"),
        (r#""\x41\u00e9\U0001F600\101""#, "Aé😀A"),
        (r#""${env "x"} y""#, "${env \"x\"} y"),
        ("\"${\n}\"", "${\n}"),
        ("<<EOF\none\n  two\nEOF\n", "one\n  two\n"),
        ("<<-EOF\n    one\n      two\n    EOF\n", "one\n  two\n"),
        ("<<-EOF\n  one\n two\n    EOF\n", "  one\n two\n"),
        ("<<EOF\nEOF\n", ""),
    ] {
        let value = parse(&format!("a = {text}")).unwrap();
        assert_eq!(value.find(&["a"]).and_then(Value::as_str), Some(want), "{text}");
    }
    let value = parse(r#"{"a": "\ud83d\ude00\/\u00e9"}"#).unwrap();
    assert_eq!(value.find(&["a"]).and_then(Value::as_str), Some("😀/é"));
}

#[test]
fn numbers() {
    for (text, want) in [
        ("0x10", Kind::Int(16)),
        ("017", Kind::Int(15)),
        ("-3", Kind::Int(-3)),
        ("1.25", Kind::Float(1.25)),
        ("2e3", Kind::Float(2000.0)),
        ("-.5", Kind::Float(-0.5)),
    ] {
        let Ok(value) = parse(&format!("a = {text}")) else {
            assert_eq!(text, "-.5", "HCL wants a digit after the sign");
            continue;
        };
        assert_eq!(value.find(&["a"]).unwrap().kind, want, "{text}");
    }
}

#[test]
fn refuses_and_says_where() {
    for (text, want) in [
        ("server {", "At 1:9: object expected closing RBRACE got: EOF"),
        ("server", "At 1:7: key 'server' expected start of object ('{') or assignment ('=')"),
        ("a \"b\" c", "At 1:8: key 'a \"b\" c' expected start of object ('{') or assignment ('=')"),
        ("server { a }", "At 1:12: key 'a' expected start of object ('{') or assignment ('=')"),
        ("a = ", "At 1:5: expected a value, got: EOF"),
        ("a b = 1", "At 1:5: nested object expected: LBRACE got: ASSIGN"),
        ("= 1", "At 1:1: no object keys found!"),
        ("{} x", "At 1:4: unexpected text after the JSON object"),
        ("a = b", "At 1:5: Unknown token: 1:5 IDENT b"),
        ("a = \"x", "At 1:7: literal not terminated"),
        ("a = \"x\ny\"", "At 1:7: literal not terminated"),
        ("a = \"\\q\"", "At 1:7: illegal char escape"),
        ("a = [1 2]", "At 1:8: error parsing list, expected comma or list end, got: NUMBER"),
        ("a = [=]", "At 1:6: unexpected token while parsing list: ASSIGN"),
        ("a = <<EOF\nx\n", "At 3:1: heredoc not terminated"),
        ("/* x", "At 1:5: comment not terminated"),
        ("é = 1\n  @", "At 2:3: illegal char"),
        ("a = 99999999999999999999", "At 1:5: illegal number 99999999999999999999"),
        ("a = 089", "At 1:5: illegal number 089"),
        ("{\"a\": tru}", "At 1:7: unexpected \"tru\" in JSON"),
        ("{\"a\" 1}", "At 1:6: expected ':' after a JSON key"),
        ("{\"a\": 1", "At 1:8: expected ',' or '}' in JSON"),
        ("{a: 1}", "At 1:2: expected a JSON key in quotes or '}'"),
    ] {
        assert_eq!(parse(text).map(|_| ()).unwrap_err().to_string(), want, "{text}");
    }
    for (open, close) in [("a = [", "]"), ("a {", "}"), ("{\"a\":[", "]}")] {
        let text = format!("{}{}", open.repeat(5000).replace("]a = [", "["), close.repeat(5000));
        assert!(parse(&text).is_err());
    }
    let deep = format!("a = {}{}", "[".repeat(5000), "]".repeat(5000));
    assert_eq!(parse(&deep).unwrap_err().to_string(), "At 1:105: nested deeper than 100 levels");
    let deep = format!("{}{{}}", "a ".repeat(5000));
    assert!(parse(&deep).unwrap_err().to_string().ends_with("nested deeper than 100 levels"));
}

#[test]
fn type_errors_say_where_and_what() {
    for (text, want) in [
        ("server {\n  bind_port = \"x\"\n}", "At 2:15: root.server.bind_port: expected a whole number, found \"x\""),
        (
            "server { bind_port = 70000 }",
            "At 1:22: root.server.bind_port: invalid value: integer `70000`, expected u16",
        ),
        (
            "server { bind_port = -1 }",
            "At 1:22: root.server.bind_port: expected a number that is not negative, found -1",
        ),
        (
            "server { debug = \"true\" }",
            "At 1:18: root.server.debug: expected true or false without quotes, found \"true\"",
        ),
        ("server { admin_ids = \"x\" }", "At 1:22: root.server.admin_ids: expected a list, found \"x\""),
        ("server { admin_ids = [true] }", "At 1:23: root.server.admin_ids[0]: expected a text, found true"),
        ("server = 1", "At 1:10: root.server: expected a block, found 1"),
        (
            "server { sinks = [{address = {}}] }",
            "At 1:30: root.server.sinks[0].address: expected a text, found a block",
        ),
        ("server { trust_domain = 1.5 }", "At 1:25: root.server.trust_domain: expected a text, found 1.5"),
    ] {
        assert_eq!(parse(text).unwrap().parse_into::<Config>().unwrap_err().to_string(), want);
    }
}

#[test]
fn unknown_keys_are_listed_with_their_place() {
    let value =
        parse("top = 1\nserver {\n  bind_prot = 1\n  \"quoted\" = 2\n  sinks = [{ adress = \"x\" }]\n}").unwrap();
    let (_, unused) = value.parse_reporting::<Config>().unwrap();
    let found: Vec<String> = unused.iter().map(|u| format!("{}/{}@{}", u.section.join("/"), u.key, u.pos)).collect();
    assert_eq!(found, ["/top@1:1", "server/bind_prot@3:3", "server/sinks/[0]/adress@5:14"]);
}

#[test]
fn finds_positions() {
    let value = parse("server { a = 1 }\nserver {\n  b { c = 2 }\n}").unwrap();
    assert_eq!(value.find_pos(&["server", "b", "c"]), Some(Pos { line: 3, column: 7 }));
    assert_eq!(value.find_pos(&["server", "a"]), Some(Pos { line: 1, column: 10 }));
    assert_eq!(value.find_pos(&["server", "x"]), None);
}

fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}

fn print(value: &Value, json: bool) -> String {
    match &value.kind {
        Kind::Null => "null".into(),
        Kind::Bool(b) => b.to_string(),
        Kind::Int(i) => i.to_string(),
        Kind::Float(f) => format!("{f:?}"),
        Kind::String(s) => quote(s),
        Kind::List(l) => format!("[{}]", l.iter().map(|v| print(v, json)).collect::<Vec<_>>().join(", ")),
        Kind::Object(o) if json => format!(
            "{{{}}}",
            o.items
                .iter()
                .map(|i| format!("{}: {}", quote(&i.key), print(&i.value, json)))
                .collect::<Vec<_>>()
                .join(",\n")
        ),
        Kind::Object(o) => format!("{{\n{}}}", items(o)),
    }
}

fn items(object: &Object) -> String {
    object
        .items
        .iter()
        .map(|i| {
            let sign = if i.value.as_object().is_some() && i.key.len() % 2 == 0 { "" } else { "=" };
            format!("{} {sign} {}\n", quote(&i.key), print(&i.value, false))
        })
        .collect()
}

fn values() -> impl Strategy<Value = Value> {
    let value = |kind| Value { pos: Pos::default(), kind };
    let leaf = prop_oneof![
        any::<bool>().prop_map(Kind::Bool),
        any::<i64>().prop_map(Kind::Int),
        (-1e9..1e9_f64).prop_map(Kind::Float),
        "[^\0${]{0,12}".prop_map(Kind::String),
    ]
    .prop_map(value);
    let object = |inner| {
        prop::collection::vec(("[^\0${]{0,8}", inner), 0..4).prop_map(|items| {
            let items =
                items.into_iter().map(|(key, value)| Item { key, pos: Pos::default(), bare: false, value }).collect();
            Value { pos: Pos::default(), kind: Kind::Object(Object { items }) }
        })
    };
    let nested = leaf.prop_recursive(4, 32, 4, move |inner| {
        prop_oneof![prop::collection::vec(inner.clone(), 0..4).prop_map(move |l| value(Kind::List(l))), object(inner),]
    });
    object(nested.boxed())
}

proptest! {
    #[test]
    fn what_is_printed_is_read_back(value in values()) {
        prop_assert_eq!(&parse(&print(&value, true)).unwrap(), &value);
        prop_assert_eq!(&parse(&items(value.as_object().unwrap())).unwrap(), &value);
    }

    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        if let Ok(value) = parse(&text) {
            let _ = value.parse_reporting::<Config>();
        }
    }

    #[test]
    fn no_mix_of_hcl_parts_makes_it_panic(parts in prop::collection::vec(prop::sample::select(vec![
        "server", " ", "{", "}", "[", "]", "=", ",", "\"", "\\", "\n", "<<E\n", "E\n", "<<-", "$", "${", "1", "0x", "-", ".", "e", "#", "/*", "*/", "//",
        "true", "null", ":", "é", "\0", "\r\n", "sinks", "bind_port", "plugins",
    ]), 0..40)) {
        let text = parts.concat();
        for text in [text.clone(), format!("{{{text}")] {
            if let Ok(value) = parse(&text) {
                let _ = value.parse_reporting::<Config>();
            }
        }
    }
}

/// Not part of the suite: reads every file named in `FINIAL_HCL_FILES` (separated by `:`).
#[test]
fn reads_the_files_it_is_pointed_at() {
    let mut failures = Vec::new();
    for path in std::env::var("FINIAL_HCL_FILES").unwrap_or_default().split(':').filter(|p| !p.is_empty()) {
        let text = std::fs::read_to_string(path).unwrap();
        if let Err(error) = parse(&text) {
            failures.push(format!("{path}: {error}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
