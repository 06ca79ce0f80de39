//! Policies of the kinds that SPIRE's users write, and what becomes of bad ones.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // all of it is test

use finial_policy::{Input, Policy, PolicyError, Verdict};
use finial_proto::server::entry::BatchCreateEntryRequest;
use finial_proto::types::{Entry, Spiffeid};
use prost::Message as _;

/// All five false unless a rule says otherwise.
const HEAD: &str = r#"
package spire
result = {
  "allow": allow,
  "allow_if_admin": allow_if_admin,
  "allow_if_local": allow_if_local,
  "allow_if_downstream": allow_if_downstream,
  "allow_if_agent": allow_if_agent,
}
default allow = false
default allow_if_admin = false
default allow_if_local = false
default allow_if_downstream = false
default allow_if_agent = false
"#;

fn policy(rules: &str, data: Option<&str>) -> Result<Policy, PolicyError> {
    Policy::parse(&format!("{HEAD}\n{rules}"), data)
}

const CREATE: &str = "/spire.api.server.entry.v1.Entry/BatchCreateEntry";
const NOBODY: Verdict = Verdict {
    allow: false,
    allow_if_admin: false,
    allow_if_local: false,
    allow_if_downstream: false,
    allow_if_agent: false,
};

fn creation(paths: &[&str]) -> Vec<u8> {
    let entry = |path: &&str| Entry {
        spiffe_id: Some(Spiffeid { trust_domain: "example.org".into(), path: (*path).into() }),
        ..Entry::default()
    };
    BatchCreateEntryRequest { entries: paths.iter().map(entry).collect(), output_mask: None }.encode_to_vec()
}

/// Who may make entries below which path: the usual reason for a policy.
#[test]
fn namespaces_by_caller_with_data() {
    let rules = r#"
        allow = true if {
            input.full_method == "/spire.api.server.entry.v1.Entry/BatchCreateEntry"
            some space in data.spaces
            space.user == input.caller
            every entry in input.req.entries { regex.match(space.prefix, entry.spiffe_id.path) }
        }"#;
    let data = r#"{"spaces": [{"user": "spiffe://example.org/finance", "prefix": "^/finance/"},
                              {"user": "spiffe://example.org/hr", "prefix": "^/hr/"}]}"#;
    let policy = policy(rules, Some(data)).unwrap();
    let allowed = |caller: &str, paths: &[&str]| {
        let request = creation(paths);
        let call = Input { caller, full_method: CREATE, request: Some(&request), ..Input::default() };
        policy.judge(call).unwrap().allow
    };
    assert!(allowed("spiffe://example.org/finance", &["/finance/a", "/finance/b"]));
    assert!(!allowed("spiffe://example.org/finance", &["/finance/a", "/hr/b"]));
    assert!(allowed("spiffe://example.org/hr", &["/hr/b"]));
    assert!(!allowed("", &["/hr/b"]));
}

#[test]
fn the_callers_program_and_streams_without_a_request() {
    let rules = r#"
        allow_if_local = true if input.caller_file_path == "/usr/bin/registrar"
        allow_if_agent = true if is_null(input.req)
        allow_if_admin = true if net.cidr_contains("10.0.0.0/8", "10.1.2.3")
        allow_if_downstream = true if glob.match("/spire.api.server.*/*", ["/"], input.full_method)"#;
    let policy = policy(rules, None).unwrap();
    let call = Input { caller_file_path: "/usr/bin/registrar", full_method: "/x/y", ..Input::default() };
    let expected = Verdict { allow_if_local: true, allow_if_agent: true, allow_if_admin: true, ..NOBODY };
    assert_eq!(policy.judge(call).unwrap(), expected);
    let request = creation(&[]);
    let call = Input { full_method: CREATE, request: Some(&request), ..Input::default() };
    assert_eq!(policy.judge(call).unwrap(), Verdict { allow_if_admin: true, allow_if_downstream: true, ..NOBODY });
}

/// What SPIRE says in the same situations.
#[test]
fn bad_policies_are_refused_at_start() {
    let message = |result: Result<Policy, PolicyError>| result.unwrap_err().to_string();
    let sample = "authpolicy engine failed to validate on sample test inputs: policy is misconfigured: ";
    let lacking = Policy::parse("package spire\nresult = {\"allow\": true}", None);
    assert_eq!(message(lacking), format!("{sample}policy: result did not contain \"allow_if_admin\" bool value"));
    let odd = Policy::parse("package spire\nresult = [1]", None);
    assert_eq!(message(odd), format!("{sample}unexpected type in evaluating policy result expression"));
    let silent = Policy::parse("package spire\nresult = {\"allow\": true} if input.caller == \"x\"", None);
    assert_eq!(message(silent), format!("{sample}policy: no matching policies found"));
    let text = HEAD.replace("default allow = false", "allow = \"yes\"");
    assert_eq!(
        message(Policy::parse(&text, None)),
        format!("{sample}policy: result did not contain \"allow\" bool value")
    );
    assert!(message(policy("", Some("[1]"))).starts_with("error decoding JSON databindings: "));
    assert!(message(policy("allow = true {", None)).contains("spire.rego"), "says where");
    // Rego v0 is not taken, as SPIRE does not.
    assert!(policy("allow = true { input.caller == \"x\" }", None).is_err());
    // Two answers to one question are none.
    assert!(
        policy("allow_if_agent = true if input.full_method\nallow_if_agent = false if input.full_method", None)
            .is_err()
    );
    assert!(Policy::parse("package other\nresult = 1", None).is_err());
    assert!(Policy::parse("", None).is_err());
    let missing = Policy::load("/nonexistent/policy.rego".as_ref(), None);
    assert!(message(missing).starts_with("open /nonexistent/policy.rego: "));
}

/// OPA takes what a builtin refuses for undefined; a policy must not fail on what a caller sends.
#[test]
fn a_builtin_that_refuses_its_argument_is_undefined() {
    let rules = "allow = true if regex.match(input.caller, \"abc\")";
    let policy = policy(rules, None).unwrap();
    let of = |caller: &str| policy.judge(Input { caller, full_method: "/x/y", ..Input::default() }).unwrap().allow;
    assert!(of("^abc$"));
    assert!(!of("("));
}

#[test]
fn an_endless_policy_ends_in_a_refusal() {
    let rules = r#"
        allow_if_agent = true if {
            input.caller == "slow"
            numbers.range(1, 30000)[_] * numbers.range(1, 30000)[_] == -1
        }"#;
    let policy = policy(rules, None).unwrap();
    let call = |caller| Input { caller, full_method: "/x/y", ..Input::default() };
    assert_eq!(policy.judge(call("quick")).unwrap(), NOBODY);
    let error = policy.judge(call("slow")).unwrap_err();
    assert!(error.to_string().contains("limit=100000000ns"), "{error}");
}

/// Neither true nor undefined, which `not` would turn into true.
#[test]
fn a_call_that_needs_a_builtin_that_is_not_there_is_refused() {
    let calls = ["time.now_ns() > 0", "http.send({\"url\": \"x\"}).status_code == 200", "io.jwt.decode(input.caller)"];
    for call in calls.into_iter().flat_map(|call| [call.to_owned(), format!("not {call}")]) {
        let policy = policy(&format!("allow = true if {{ input.caller == \"x\"; {call} }}"), None).unwrap();
        let judge = |caller| policy.judge(Input { caller, full_method: "/x/y", ..Input::default() });
        assert_eq!(judge("y").unwrap(), NOBODY);
        let error = judge("x").unwrap_err();
        assert!(error.to_string().contains("could not find function"), "{call}: {error}");
    }
}
