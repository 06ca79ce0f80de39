use super::*;

const METHOD: Method<'static> = Method { destination: "a.b", path: "/a", interface: "a.b", member: "C" };

/// A connection past the authentication, and its other end.
fn pair() -> (Bus, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    (Bus { stream: ours, serial: 0 }, theirs)
}

/// What a call gives when the bus sends these bytes and hangs up.
async fn told(bytes: &[u8]) -> Result<Body, BusError> {
    let (mut bus, mut theirs) = pair();
    let talk = async {
        // It may stop to listen before all is said.
        let _ = theirs.write_all(bytes).await;
        let _ = theirs.shutdown().await;
        let mut rest = Vec::new();
        let _ = theirs.read_to_end(&mut rest).await;
    };
    let call = async {
        let result = bus.call(METHOD, Arguments::None).await;
        drop(bus);
        result
    };
    tokio::join!(call, talk).0
}

/// A message with these fields (each a code, a type and a number or a text) and this body.
fn message(kind: u8, fields: &[(u8, &str, u32, &str)], body: &[u8]) -> Vec<u8> {
    let mut list = Vec::new();
    for (code, signature, number, text) in fields {
        pad(&mut list, 8);
        list.extend([*code, 1, signature.as_bytes()[0], 0]);
        match *signature {
            "u" => put_number(&mut list, *number),
            "g" => {
                list.push(text.len() as u8);
                list.extend(text.as_bytes());
                list.push(0);
            }
            _ => put_text(&mut list, text),
        }
    }
    let mut message = vec![b'l', kind, 0, 1];
    put_number(&mut message, body.len() as u32);
    put_number(&mut message, 99);
    put_number(&mut message, list.len() as u32);
    message.extend(list);
    pad(&mut message, 8);
    message.extend(body);
    message
}

fn answer(signature: &str, body: &[u8]) -> Vec<u8> {
    message(METHOD_RETURN, &[(REPLY_SERIAL, "u", 1, ""), (SIGNATURE, "g", 0, signature)], body)
}

fn text_body(text: &str) -> Vec<u8> {
    let mut body = Vec::new();
    put_text(&mut body, text);
    body
}

#[tokio::test]
async fn only_the_answer_to_the_question_counts() {
    let signal = message(4, &[(PATH, "o", 0, "/x"), (MEMBER, "s", 0, "NameAcquired")], b"");
    let late = message(METHOD_RETURN, &[(REPLY_SERIAL, "u", 77, "")], b"");
    let right = answer("s", &text_body("yes"));
    let got = told(&[signal.clone(), late, right].concat()).await.expect("answers");
    assert_eq!(got.text().expect("a string"), "yes");
    let error = told(&signal.repeat(1000)).await.err().expect("fails");
    assert_eq!(error.to_string(), "the bus sent too many messages that nobody asked for");
}

#[tokio::test]
async fn errors_are_told_in_the_words_of_who_answered() {
    let fields = [(REPLY_SERIAL, "u", 1, ""), (ERROR_NAME, "s", 0, "a.Bad"), (SIGNATURE, "g", 0, "s")];
    let error = told(&message(ERROR, &fields, &text_body("no such thing"))).await.err().expect("fails");
    assert_eq!(error.to_string(), "no such thing");
    let error = told(&message(ERROR, &fields[..2], b"")).await.err().expect("fails");
    assert_eq!(error.to_string(), "a.Bad");
}

#[tokio::test]
async fn what_is_no_message_is_refused_by_its_size_before_it_is_read() {
    let mut huge = answer("s", b"");
    huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut long = answer("s", b"");
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut old = answer("s", b"");
    old[3] = 0;
    let odd_field = message(METHOD_RETURN, &[(REPLY_SERIAL, "u", 1, ""), (9, "a", 0, "")], b"");
    let call = message(METHOD_CALL, &[(REPLY_SERIAL, "u", 1, "")], b"");
    for (bytes, expected) in [
        (huge, "the bus sent too large a message"),
        (long, "the bus sent too large a message"),
        (old, "the bus sent another version of the protocol"),
        (b"HTTP/1.1 400 Bad Request".to_vec(), "the bus sent what is no message"),
        (odd_field, "the bus sent a header field of an unknown type"),
        (call, "the bus sent an answer that is none"),
    ] {
        let error = told(&bytes).await.err().expect("fails");
        assert_eq!(error.to_string(), expected);
    }
    let whole = answer("s", &text_body("yes"));
    for end in 0..whole.len() {
        assert!(matches!(told(&whole[..end]).await, Err(BusError::Connection(_))), "{end}");
    }
}

#[tokio::test]
async fn values_are_what_their_signature_says_or_nothing() {
    let of = async |signature: &str, body: &[u8]| told(&answer(signature, body)).await.expect("an answer");
    assert_eq!(of("o", &text_body("/a/b_2e")).await.object_path().expect("a path"), "/a/b_2e");
    for bad in ["", "a", "/a b", "/a\n", "/ä"] {
        assert!(of("o", &text_body(bad)).await.object_path().is_err(), "{bad}");
    }
    assert!(of("s", &text_body("/a")).await.object_path().is_err());
    assert!(of("o", &text_body("/a")).await.text().is_err());
    assert!(of("", b"").await.text().is_err());
    let variant = [&b"\x01s\0\0"[..], &text_body("v")].concat();
    assert_eq!(of("v", &variant).await.text_in_variant().expect("a variant"), Ok("v".to_owned()));
    assert_eq!(of("v", b"\x01u\0\0\x07\0\0\0").await.text_in_variant().expect("a variant"), Err("u".to_owned()));
    assert!(of("s", &text_body("x")).await.text_in_variant().is_err());
    // Lengths that lead beyond the end.
    assert!(of("s", b"\xff\xff\xff\xffx\0").await.text().is_err());
    assert!(of("v", b"\xffs").await.text_in_variant().is_err());
    assert!(of("s", b"\x01\0\0\0\xff\0").await.text().is_err(), "not UTF-8");
}

#[tokio::test]
async fn who_is_not_let_in_or_is_held_up_says_so() {
    let enter = async |said: &[u8]| {
        let (bus, mut theirs) = pair();
        theirs.write_all(said).await.expect("writes");
        theirs.shutdown().await.expect("ends");
        Bus::enter(bus.stream).await.expect_err("does not get in").to_string()
    };
    assert_eq!(enter(b"REJECTED ANONYMOUS\r\n").await, "the bus refused the authentication: REJECTED ANONYMOUS");
    assert_eq!(enter(&b"x".repeat(5000)).await, "the bus sent too long a line");
    assert!(!enter(b"OK 1").await.is_empty());
    let error = Bus::connect("tcp:host=a;nonce-tcp:;").await.expect_err("unknown");
    assert_eq!(error.to_string(), "no usable address in \"tcp:host=a;nonce-tcp:;\"");
}

#[test]
fn addresses_name_files_or_abstract_sockets() {
    let path = |address| socket_path(address).map(|p| p.into_string().expect("is text"));
    assert_eq!(path("unix:path=/run/a%20b,guid=1").as_deref(), Some("/run/a b"));
    assert_eq!(path("unix:guid=1,path=/x").as_deref(), Some("/x"));
    assert_eq!(path("unix:abstract=/x").as_deref(), Some("\0/x"));
    for other in [
        "",
        "unix:",
        "unix:runtime=yes",
        "tcp:host=a",
        "unix:path=/%",
        "unix:path=/%4",
        "unix:path=/%zz",
        "unix:path=/%+f",
        "unix:path=%ä",
    ] {
        assert_eq!(path(other), None, "{other}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn any_bytes_are_answered(order in proptest::bool::ANY, fields in proptest::collection::vec(0u8..12, 0..80), body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40), signature in "[svogua]{0,2}") {
        let mut message = Message { kind: 2, answers: None, error: None, body: Body { signature, bytes: body, big_endian: order } };
        let _ = message.take_fields(&mut Reader { bytes: &fields, at: 0, big_endian: order });
        let _ = (message.body.text(), message.body.object_path(), message.body.text_in_variant());
    }
}
