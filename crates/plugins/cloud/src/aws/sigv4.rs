//! AWS Signature Version 4.

use aws_lc_rs::hmac;
use finial_core::{Secret, UnixSeconds};
use finial_crypto::{hex, sha256_hex};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const STAMP: &[BorrowedFormatItem<'_>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// What a request is signed with.
#[derive(Debug)]
pub(super) struct Keys {
    /// Names the key.
    pub(super) id: String,
    /// The key.
    pub(super) secret: Secret<String>,
    /// Goes with a key that is only good for a while.
    pub(super) token: Option<Secret<String>>,
}

/// Of which service a request is good, and when.
pub(super) struct Scope<'a> {
    pub(super) region: &'a str,
    pub(super) service: &'a str,
    /// As [`stamp`] writes it.
    pub(super) stamp: &'a str,
}

/// What of a request is signed.
pub(super) struct Request<'a> {
    pub(super) method: &'a str,
    /// Encoded as the service wants it for signing, which is not always as it is sent.
    pub(super) path: &'a str,
    /// Sorted and encoded.
    pub(super) query: &'a str,
    /// Names in lower case; `host` and `x-amz-date` are among them. All are signed.
    pub(super) headers: &'a BTreeMap<String, String>,
    /// SHA-256 of the body, in hexadecimal.
    pub(super) body_hash: &'a str,
}

/// The time as AWS writes it.
pub(super) fn stamp(now: UnixSeconds) -> String {
    let time = OffsetDateTime::from_unix_timestamp(now).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(STAMP).unwrap_or_default()
}

/// What `Authorization` has to say.
pub(super) fn authorization(request: &Request<'_>, scope: &Scope<'_>, keys: &Keys) -> String {
    let signed = request.headers.keys().map(String::as_str).collect::<Vec<_>>().join(";");
    let headers: String = request.headers.iter().map(|(name, value)| format!("{name}:{}\n", trimmed(value))).collect();
    let Request { method, path, query, body_hash, .. } = request;
    let canonical = format!("{method}\n{path}\n{query}\n{headers}\n{signed}\n{body_hash}");
    let day = scope.stamp.split('T').next().unwrap_or_default();
    let within = format!("{day}/{}/{}/aws4_request", scope.region, scope.service);
    let to_sign = format!("{ALGORITHM}\n{}\n{within}\n{}", scope.stamp, sha256_hex(canonical.as_bytes()));
    let first = Secret::new(format!("AWS4{}", keys.secret.expose()));
    let mut key = mac(first.expose().as_bytes(), day);
    for part in [scope.region, scope.service, "aws4_request"] {
        key = mac(key.as_ref(), part);
    }
    let signature = hex(mac(key.as_ref(), &to_sign).as_ref());
    format!("{ALGORITHM} Credential={}/{within}, SignedHeaders={signed}, Signature={signature}", keys.id)
}

fn mac(key: &[u8], text: &str) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes())
}

/// Runs of spaces count as one.
fn trimmed(value: &str) -> String {
    value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::encode_path;

    fn signature(
        (method, path, query): (&str, &str, &str),
        headers: &[(&str, &str)],
        scope: &Scope<'_>,
        keys: (&str, &str),
    ) -> String {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let keys = Keys { id: keys.0.into(), secret: Secret::new(keys.1.into()), token: None };
        // S3 alone has the hash of the body in a header.
        let body_hash = sha256_hex(b"");
        let hash: &BTreeMap<String, String> = &headers;
        let body_hash = hash.get("x-amz-content-sha256").unwrap_or(&body_hash);
        let request = Request { method, path, query, headers: &headers, body_hash };
        let said = authorization(&request, scope, &keys);
        said.rsplit_once('=').unwrap().1.to_owned()
    }

    /// From the test suite that AWS publishes for Signature Version 4.
    #[test]
    fn it_signs_as_the_published_test_suite_has_it() {
        let scope = Scope { region: "us-east-1", service: "service", stamp: &stamp(1_440_938_160) };
        assert_eq!(scope.stamp, "20150830T123600Z");
        let keys = ("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY");
        let usual = [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
        let token = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTf\
                     lfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvl\
                     Rd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx\
                     3iSIlTJabIQwj2ICCR/oLxBA==";
        let with_token = [usual.as_slice(), &[("x-amz-security-token", token)]].concat();
        for (request, headers, want) in [
            (("GET", "/", ""), &usual[..], "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
            (
                ("GET", "/", "Param1=value1&Param2=value2"),
                &usual[..],
                "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
            ),
            (
                ("GET", &encode_path("/\u{1234}"), ""),
                &usual[..],
                "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85",
            ),
            (
                ("GET", &encode_path("/example space/"), ""),
                &usual[..],
                "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741",
            ),
            (("POST", "/", ""), &with_token[..], "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead"),
        ] {
            assert_eq!(signature(request, headers, &scope, keys), want, "{request:?}");
        }
    }

    /// From the examples of S3's own documentation.
    #[test]
    fn it_signs_as_s3_documents_it() {
        let scope = Scope { region: "us-east-1", service: "s3", stamp: "20130524T000000Z" };
        let keys = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
        let put = [
            ("date", "Fri, 24 May 2013 00:00:00 GMT"),
            ("host", "examplebucket.s3.amazonaws.com"),
            ("x-amz-content-sha256", &sha256_hex(b"Welcome to Amazon S3.")),
            ("x-amz-date", "20130524T000000Z"),
            ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
        ];
        let path = encode_path("/test$file.text");
        let want = "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd";
        assert_eq!(signature(("PUT", &path, ""), &put, &scope, keys), want);
        let lifecycle = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("x-amz-content-sha256", &sha256_hex(b"")),
            ("x-amz-date", "20130524T000000Z"),
        ];
        let want = "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543";
        assert_eq!(signature(("GET", "/", "lifecycle="), &lifecycle, &scope, keys), want);
    }
}
