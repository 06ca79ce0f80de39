//! Credential composers.

use crate::Plugin;
use async_trait::async_trait;
use finial_core::{ErrorKind, SpiffeId};
use finial_crypto::{Extension, NameParts, Oid};
use finial_plugin::{CredentialComposer, Holder, PluginError, X509CaAttributes, X509SvidAttributes};
use finial_proto::plugin::credential_composer as wire;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct};
use serde_json::{Map, Number, Value};
use std::time::Duration;

/// The caller may be less patient.
const DEADLINE: Duration = Duration::from_secs(30);
/// Claims inside of claims inside of claims.
const DEPTH_MAX: usize = 32;
/// Up to here every integer is a number of the wire, which are all fractions.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A credential composer that is an external plugin. It need not have all methods, and an answer need not have attributes:
/// then they stay as they were.
pub struct ExternalCredentialComposer(pub Plugin);

/// An answer that may be missing; whose fault a bad one is.
fn answered<A>(answer: Result<A, PluginError>) -> Result<Option<A>, PluginError> {
    match answer {
        Err(error) if error.kind == ErrorKind::Unimplemented => Ok(None),
        answer => answer.map(Some),
    }
}

fn invalid(what: &str, why: &str) -> PluginError {
    PluginError::internal(format!("plugin returned invalid {what} attributes: {why}"))
}

#[async_trait]
impl CredentialComposer for ExternalCredentialComposer {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn server_x509_ca(&self, attributes: X509CaAttributes) -> Result<X509CaAttributes, PluginError> {
        let request = wire::ComposeServerX509caRequest { attributes: Some(ca_to_wire(&attributes)) };
        let answer = answered(self.0.call("ComposeServerX509CA", request, DEADLINE).await)?;
        match answer.and_then(|a: wire::ComposeServerX509caResponse| a.attributes) {
            Some(composed) => ca_from_wire(composed).map_err(|why| invalid("X509CA", &why)),
            None => Ok(attributes),
        }
    }

    async fn server_x509_svid(&self, attributes: X509SvidAttributes) -> Result<X509SvidAttributes, PluginError> {
        let request = wire::ComposeServerX509svidRequest { attributes: Some(svid_to_wire(&attributes)) };
        let answer = answered(self.0.call("ComposeServerX509SVID", request, DEADLINE).await)?;
        svid(attributes, answer.and_then(|a: wire::ComposeServerX509svidResponse| a.attributes))
    }

    async fn agent_x509_svid(
        &self,
        holder: Holder<'_>,
        attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        let request = wire::ComposeAgentX509svidRequest {
            attributes: Some(svid_to_wire(&attributes)),
            spiffe_id: holder.id.as_str().to_owned(),
            public_key: holder.public_key.spki_der().to_vec().into(),
        };
        let answer = answered(self.0.call("ComposeAgentX509SVID", request, DEADLINE).await)?;
        svid(attributes, answer.and_then(|a: wire::ComposeAgentX509svidResponse| a.attributes))
    }

    async fn workload_x509_svid(
        &self,
        holder: Holder<'_>,
        attributes: X509SvidAttributes,
    ) -> Result<X509SvidAttributes, PluginError> {
        let request = wire::ComposeWorkloadX509svidRequest {
            attributes: Some(svid_to_wire(&attributes)),
            spiffe_id: holder.id.as_str().to_owned(),
            public_key: holder.public_key.spki_der().to_vec().into(),
        };
        let answer = answered(self.0.call("ComposeWorkloadX509SVID", request, DEADLINE).await)?;
        svid(attributes, answer.and_then(|a: wire::ComposeWorkloadX509svidResponse| a.attributes))
    }

    async fn workload_jwt_svid(
        &self,
        id: &SpiffeId,
        claims: Map<String, Value>,
    ) -> Result<Map<String, Value>, PluginError> {
        let attributes = wire::JwtsvidAttributes { claims: Some(claims_to_wire(&claims)) };
        let request =
            wire::ComposeWorkloadJwtsvidRequest { attributes: Some(attributes), spiffe_id: id.as_str().to_owned() };
        let answer = answered(self.0.call("ComposeWorkloadJWTSVID", request, DEADLINE).await)?;
        match answer.and_then(|a: wire::ComposeWorkloadJwtsvidResponse| a.attributes) {
            Some(composed) => claims_from_wire(composed.claims.unwrap_or_default(), 0)
                .ok_or_else(|| invalid("JWTSVID", "claims: a number that JSON does not have, or too many levels")),
            None => Ok(claims),
        }
    }
}

fn svid(
    attributes: X509SvidAttributes,
    composed: Option<wire::X509svidAttributes>,
) -> Result<X509SvidAttributes, PluginError> {
    let Some(composed) = composed else { return Ok(attributes) };
    let read = || {
        Ok(X509SvidAttributes {
            subject: name_from_wire(composed.subject)?,
            dns_names: composed.dns_sans,
            extra_extensions: extensions_from_wire(composed.extra_extensions)?,
        })
    };
    read().map_err(|why: String| invalid("X509SVID", &why))
}

fn svid_to_wire(attributes: &X509SvidAttributes) -> wire::X509svidAttributes {
    wire::X509svidAttributes {
        subject: Some(name_to_wire(&attributes.subject)),
        dns_sans: attributes.dns_names.clone(),
        extra_extensions: extensions_to_wire(&attributes.extra_extensions),
    }
}

fn ca_to_wire(attributes: &X509CaAttributes) -> wire::X509caAttributes {
    wire::X509caAttributes {
        subject: Some(name_to_wire(&attributes.subject)),
        policy_identifiers: attributes.policies.iter().map(Oid::to_string).collect(),
        extra_extensions: extensions_to_wire(&attributes.extra_extensions),
    }
}

fn ca_from_wire(attributes: wire::X509caAttributes) -> Result<X509CaAttributes, String> {
    let policies = attributes.policy_identifiers.iter().map(|id| oid("policy identifiers", id));
    Ok(X509CaAttributes {
        subject: name_from_wire(attributes.subject)?,
        policies: policies.collect::<Result<_, _>>()?,
        extra_extensions: extensions_from_wire(attributes.extra_extensions)?,
    })
}

fn oid(what: &str, text: &str) -> Result<Oid, String> {
    Oid::parse(text).map_err(|_| format!("{what}: invalid OID: {text:?}"))
}

fn name_to_wire(name: &NameParts) -> wire::DistinguishedName {
    let extra =
        |(id, value): &(Oid, String)| wire::AttributeTypeAndValue { oid: id.to_string(), string_value: value.clone() };
    wire::DistinguishedName {
        country: name.country.clone(),
        organization: name.organization.clone(),
        organizational_unit: name.organizational_unit.clone(),
        locality: name.locality.clone(),
        province: name.province.clone(),
        street_address: name.street_address.clone(),
        postal_code: name.postal_code.clone(),
        serial_number: name.serial_number.clone(),
        common_name: name.common_name.clone(),
        extra_names: name.extra_names.iter().map(extra).collect(),
    }
}

fn name_from_wire(name: Option<wire::DistinguishedName>) -> Result<NameParts, String> {
    let name = name.ok_or("subject: cannot be empty")?;
    let extra = |one: wire::AttributeTypeAndValue| Ok((oid("subject: extra names", &one.oid)?, one.string_value));
    Ok(NameParts {
        country: name.country,
        organization: name.organization,
        organizational_unit: name.organizational_unit,
        locality: name.locality,
        province: name.province,
        street_address: name.street_address,
        postal_code: name.postal_code,
        serial_number: name.serial_number,
        common_name: name.common_name,
        extra_names: name.extra_names.into_iter().map(extra).collect::<Result<_, String>>()?,
    })
}

fn extensions_to_wire(extensions: &[Extension]) -> Vec<wire::X509Extension> {
    let one = |e: &Extension| wire::X509Extension {
        oid: e.id.to_string(),
        value: e.value.clone().into(),
        critical: e.critical,
    };
    extensions.iter().map(one).collect()
}

fn extensions_from_wire(extensions: Vec<wire::X509Extension>) -> Result<Vec<Extension>, String> {
    let one = |e: wire::X509Extension| {
        Ok(Extension { id: oid("extra extensions", &e.oid)?, critical: e.critical, value: e.value.into() })
    };
    extensions.into_iter().map(one).collect()
}

fn claims_to_wire(claims: &Map<String, Value>) -> Struct {
    Struct { fields: claims.iter().map(|(name, value)| (name.clone(), value_to_wire(value))).collect() }
}

fn value_to_wire(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(values) => Kind::ListValue(ListValue { values: values.iter().map(value_to_wire).collect() }),
        Value::Object(fields) => Kind::StructValue(claims_to_wire(fields)),
    };
    prost_types::Value { kind: Some(kind) }
}

fn claims_from_wire(claims: Struct, depth: usize) -> Option<Map<String, Value>> {
    claims.fields.into_iter().map(|(name, value)| Some((name, value_from_wire(value, depth)?))).collect()
}

/// Integers come as fractions and become integers again: verifiers refuse times that are written otherwise.
fn value_from_wire(value: prost_types::Value, depth: usize) -> Option<Value> {
    if depth > DEPTH_MAX {
        return None;
    }
    Some(match value.kind.unwrap_or(Kind::NullValue(0)) {
        Kind::NullValue(_) => Value::Null,
        Kind::BoolValue(value) => Value::Bool(value),
        Kind::NumberValue(number) if number.fract() == 0.0 && number.abs() <= EXACT_MAX => {
            Value::Number((number as i64).into())
        }
        Kind::NumberValue(number) => Value::Number(Number::from_f64(number)?),
        Kind::StringValue(text) => Value::String(text),
        Kind::ListValue(list) => {
            Value::Array(list.values.into_iter().map(|v| value_from_wire(v, depth + 1)).collect::<Option<_>>()?)
        }
        Kind::StructValue(fields) => Value::Object(claims_from_wire(fields, depth + 1)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn back(claims: Value) -> Option<Value> {
        claims_from_wire(claims_to_wire(claims.as_object().unwrap()), 0).map(Value::Object)
    }

    #[test]
    fn claims_come_back_as_they_went() {
        let claims = json!({
            "exp": 1_800_000_300, "half": 0.5, "below": -3, "list": ["a", null, true, {"deep": [1.25e30]}], "text": "hé"
        });
        assert_eq!(back(claims.clone()).unwrap(), claims);
    }

    #[test]
    fn what_json_has_not_is_refused() {
        let number = |number| prost_types::Value { kind: Some(Kind::NumberValue(number)) };
        for bad in [f64::NAN, f64::INFINITY] {
            let claims = Struct { fields: [("x".to_owned(), number(bad))].into() };
            assert!(claims_from_wire(claims, 0).is_none());
        }
        let mut deep = json!(1);
        for _ in 0..=DEPTH_MAX {
            deep = json!([deep]);
        }
        assert!(back(json!({ "x": deep })).is_none());
    }

    #[test]
    fn attributes_come_back_as_they_went_and_bad_ones_are_named() {
        let id = |text| Oid::parse(text).unwrap();
        let attributes = X509CaAttributes {
            subject: NameParts {
                country: vec!["US".into()],
                organizational_unit: vec!["a".into(), "b".into()],
                serial_number: "7".into(),
                extra_names: vec![(id("2.5.4.45"), "x".into())],
                ..NameParts::default()
            },
            policies: vec![id("1.2.3")],
            extra_extensions: vec![Extension { id: id("1.2.4"), critical: true, value: vec![5, 0] }],
        };
        let wire = ca_to_wire(&attributes);
        assert_eq!(ca_from_wire(wire.clone()).unwrap(), attributes);
        let refused = ca_from_wire(wire::X509caAttributes { subject: None, ..wire.clone() });
        assert_eq!(refused.unwrap_err(), "subject: cannot be empty");
        let refused = ca_from_wire(wire::X509caAttributes { policy_identifiers: vec!["1.x".into()], ..wire });
        assert_eq!(refused.unwrap_err(), "policy identifiers: invalid OID: \"1.x\"");
    }
}
