use super::*;
use finial_core::SystemClock;

fn of(data: &str) -> Result<CertManager, String> {
    let context =
        PluginContext { trust_domain: TrustDomain::parse("example.org").unwrap(), clock: Arc::new(SystemClock) };
    CertManager::new(&finial_hcl::parse(data).unwrap(), &context).map_err(|e| e.to_string())
}

#[test]
fn what_is_missing_is_named_and_the_rest_has_defaults() {
    let refused = |data| of(data).err().unwrap();
    assert_eq!(refused("issuer_name = \"i\""), "plugin configuration has empty namespace property");
    assert_eq!(refused("namespace = \"n\""), "plugin configuration has empty issuer_name property");
    let plugin = of("namespace = \"n\"\nissuer_name = \"i\"").unwrap();
    assert_eq!(plugin.issuer, json!({"name": "i", "kind": "Issuer", "group": "cert-manager.io"}));
    let request = plugin.request(b"csr", 3600);
    assert_eq!(request["spec"]["duration"], "3600s");
    assert_eq!(request["metadata"]["labels"], json!({"cert-manager.spiffe.io/trust-domain": "example.org"}));
    assert_eq!(plugin.request(b"csr", 0)["spec"]["duration"], Value::Null);
}

#[test]
fn an_answer_is_known_by_its_conditions() {
    let of = |kind: &str, status: &str, reason: &str| json!({"status": {"conditions": [{"type": kind, "status": status, "reason": reason, "message": "why"}]}});
    let said =
        |request: &Value| answer(request, "CertificateRequest n/x").map(|answer| answer.unwrap_err().to_string());
    let denied = of("Denied", "True", "Policy");
    assert_eq!(said(&denied).unwrap(), "request has been denied: CertificateRequest n/x: why");
    let failed = of("Ready", "False", "Failed");
    assert_eq!(said(&failed).unwrap(), "request has failed: CertificateRequest n/x: why");
    let pending = of("Ready", "False", "Pending");
    assert!(said(&pending).is_none() && !is_done(&pending));
    assert!(is_done(&denied) && is_done(&failed) && is_done(&of("Ready", "True", "Issued")));
    let signed =
        |certificate: &str, ca: &str| json!({"status": {"certificate": to_base64(certificate.as_bytes()), "ca": ca}});
    assert_eq!(said(&signed("x", "")).unwrap(), "no upstream CA root returned from request");
    assert!(said(&signed("x", "eA==")).unwrap().starts_with("failed to parse certificate: "));
    assert!(said(&json!({"status": {"certificate": "?", "ca": "x"}})).unwrap().ends_with("it is not base64"));
}
