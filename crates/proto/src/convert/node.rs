//! Agents, and the claims of a token.

use super::{ConvertError, id_from_proto, id_to_proto, selectors_from_proto, selectors_to_proto};
use crate::types;
use finial_core::AgentRecord;
use prost_types::{ListValue, Struct, Value, value::Kind};

/// The whole agent; see [`mask_agent`].
pub fn agent_to_proto(agent: &AgentRecord) -> types::Agent {
    types::Agent {
        id: Some(id_to_proto(&agent.id)),
        attestation_type: agent.attestation_type.clone(),
        x509svid_serial_number: agent.serial_number.clone(),
        x509svid_expires_at: agent.expires_at,
        selectors: selectors_to_proto(&agent.selectors),
        banned: agent.is_banned(),
        can_reattest: agent.can_reattest,
        agent_version: agent.agent_version.clone(),
    }
}

/// What the wire tells of an agent; the renewed serial stays the server's secret.
pub fn agent_from_proto(agent: &types::Agent) -> Result<AgentRecord, ConvertError> {
    Ok(AgentRecord {
        id: id_from_proto(agent.id.as_ref())?,
        attestation_type: agent.attestation_type.clone(),
        serial_number: agent.x509svid_serial_number.clone(),
        expires_at: agent.x509svid_expires_at,
        new_serial_number: String::new(),
        new_expires_at: 0,
        can_reattest: agent.can_reattest,
        agent_version: agent.agent_version.clone(),
        selectors: selectors_from_proto(&agent.selectors)?,
    })
}

/// Clears what the mask does not name. The ID always stays.
pub fn mask_agent(agent: &mut types::Agent, mask: &types::AgentMask) {
    macro_rules! clear {
        ($($field:ident),*) => {$( if !mask.$field { agent.$field = Default::default(); } )*};
    }
    clear!(
        attestation_type,
        x509svid_serial_number,
        x509svid_expires_at,
        selectors,
        banned,
        can_reattest,
        agent_version
    );
}

/// The claims of a validated token as the Workload API answers them. protobuf has only floating-point numbers.
pub fn json_to_struct(claims: &serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct { fields: claims.iter().map(|(name, value)| (name.clone(), json_to_value(value))).collect() }
}

fn json_to_value(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(*b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or(f64::NAN)),
        serde_json::Value::String(s) => Kind::StringValue(s.clone()),
        serde_json::Value::Array(items) => {
            Kind::ListValue(ListValue { values: items.iter().map(json_to_value).collect() })
        }
        serde_json::Value::Object(map) => Kind::StructValue(json_to_struct(map)),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_core::{Selector, SelectorSet, SpiffeId};

    #[test]
    fn agents_convert_and_mask() {
        let mut record = AgentRecord {
            id: SpiffeId::parse("spiffe://td/spire/agent/a").unwrap(),
            attestation_type: "x509pop".into(),
            serial_number: "12".into(),
            expires_at: 7,
            new_serial_number: String::new(),
            new_expires_at: 0,
            can_reattest: true,
            agent_version: "1".into(),
            selectors: SelectorSet::new(vec![Selector::parse("a:b").unwrap()]),
        };
        let wire = agent_to_proto(&record);
        assert!(!wire.banned);
        assert_eq!(agent_from_proto(&wire).unwrap(), record);
        record.serial_number.clear();
        let mut wire = agent_to_proto(&record);
        assert!(wire.banned);
        mask_agent(&mut wire, &types::AgentMask::default());
        assert_eq!(wire, types::Agent { id: wire.id.clone(), ..Default::default() });
    }

    #[test]
    fn claims_keep_their_shape() {
        let claims = serde_json::json!({"aud": ["x", "y"], "exp": 12, "n": null, "o": {"b": true}, "s": "t"});
        let fields = json_to_struct(claims.as_object().unwrap()).fields;
        assert_eq!(fields["exp"].kind, Some(Kind::NumberValue(12.0)));
        assert_eq!(fields["n"].kind, Some(Kind::NullValue(0)));
        let Some(Kind::ListValue(aud)) = &fields["aud"].kind else { panic!("aud") };
        assert_eq!(aud.values.len(), 2);
        let Some(Kind::StructValue(o)) = &fields["o"].kind else { panic!("o") };
        assert_eq!(o.fields["b"].kind, Some(Kind::BoolValue(true)));
    }
}
