//! Requests as policies written for SPIRE know them: the JSON that Go's `encoding/json` makes of its generated structs, which
//! is not protobuf's JSON form. Original field names; unset fields left out; enum values and 64-bit numbers as numbers; a
//! `oneof` under its Go name, and below it the chosen field under its Go name.

use crate::PolicyError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, MapKey, MessageDescriptor, ReflectMessage as _, Value,
};
use serde_json::{Map, Value as Json};
use std::collections::HashMap;

/// The request message of every method.
pub(crate) struct Messages(HashMap<String, MessageDescriptor>);

impl Messages {
    pub(crate) fn load() -> Result<Self, PolicyError> {
        let pool =
            DescriptorPool::decode(finial_proto::DESCRIPTORS).map_err(|e| PolicyError::Request(e.to_string()))?;
        let methods = pool.services().flat_map(|service| {
            let name = service.full_name().to_owned();
            service.methods().map(move |m| (format!("/{name}/{}", m.name()), m.input())).collect::<Vec<_>>()
        });
        Ok(Self(methods.collect()))
    }

    /// The request of `method` as JSON.
    pub(crate) fn json(&self, method: &str, bytes: &[u8]) -> Result<Json, PolicyError> {
        let unknown = || PolicyError::Request(format!("{method} is not in the contracts"));
        let descriptor = self.0.get(method).ok_or_else(unknown)?.clone();
        let message = DynamicMessage::decode(descriptor, bytes).map_err(|e| PolicyError::Request(e.to_string()))?;
        Ok(object(&message))
    }
}

fn object(message: &DynamicMessage) -> Json {
    let descriptor = message.descriptor();
    let in_oneof = |f: &FieldDescriptor| f.containing_oneof().is_some_and(|oneof| !oneof.is_synthetic());
    let plain = descriptor.fields().filter(|f| !in_oneof(f) && message.has_field(f));
    let mut out: Map<String, Json> = plain.map(|f| (f.name().to_owned(), json(&message.get_field(&f)))).collect();
    for oneof in descriptor.oneofs().filter(|oneof| !oneof.is_synthetic()) {
        let chosen = oneof.fields().find(|f| message.has_field(f));
        let value = chosen
            .map_or(Json::Null, |f| Json::Object(Map::from_iter([(go_name(f.name()), json(&message.get_field(&f)))])));
        out.insert(go_name(oneof.name()), value);
    }
    Json::Object(out)
}

fn json(value: &Value) -> Json {
    match value {
        Value::Bool(v) => (*v).into(),
        Value::I32(v) | Value::EnumNumber(v) => (*v).into(),
        Value::I64(v) => (*v).into(),
        Value::U32(v) => (*v).into(),
        Value::U64(v) => (*v).into(),
        Value::F32(v) => f64::from(*v).into(),
        Value::F64(v) => (*v).into(),
        Value::String(v) => v.as_str().into(),
        Value::Bytes(v) => STANDARD.encode(v).into(),
        Value::Message(v) => object(v),
        Value::List(list) => list.iter().map(json).collect::<Vec<_>>().into(),
        Value::Map(map) => Json::Object(map.iter().map(|(key, value)| (key_text(key), json(value))).collect()),
    }
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(v) => v.to_string(),
        MapKey::I32(v) => v.to_string(),
        MapKey::I64(v) => v.to_string(),
        MapKey::U32(v) => v.to_string(),
        MapKey::U64(v) => v.to_string(),
        MapKey::String(v) => v.clone(),
    }
}

/// `bundle_endpoint_profile` is `BundleEndpointProfile` to Go.
fn go_name(name: &str) -> String {
    let capital = |word: &str| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect::<String>()
    };
    name.split('_').map(capital).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use finial_proto::server::agent::{ListAgentsRequest, list_agents_request::Filter};
    use finial_proto::server::entry::BatchCreateEntryRequest;
    use finial_proto::server::svid::NewDownstreamX509caRequest;
    use finial_proto::server::trustdomain::BatchCreateFederationRelationshipRequest;
    use finial_proto::types::{Entry, FederationRelationship, SelectorMatch, Spiffeid};
    use finial_proto::types::{HttpsspiffeProfile, federation_relationship::BundleEndpointProfile};
    use serde_json::json;

    fn shown(method: &str, request: &impl prost::Message) -> Json {
        Messages::load().unwrap().json(method, &request.encode_to_vec()).unwrap()
    }

    #[test]
    fn requests_look_as_go_prints_them() {
        let id = |path: &str| Spiffeid { trust_domain: "td".into(), path: path.into() };
        let entry =
            Entry { spiffe_id: Some(id("/a")), x509_svid_ttl: 60, expires_at: 5, admin: true, ..Entry::default() };
        let request = BatchCreateEntryRequest { entries: vec![entry], output_mask: None };
        assert_eq!(
            shown("/spire.api.server.entry.v1.Entry/BatchCreateEntry", &request),
            json!({"entries": [{"spiffe_id": {"trust_domain": "td", "path": "/a"}, "x509_svid_ttl": 60,
                                "expires_at": 5, "admin": true}]})
        );
        let filter = Filter {
            by_banned: Some(false),
            by_selector_match: Some(SelectorMatch { selectors: vec![], r#match: 1 }),
            ..Filter::default()
        };
        let request = ListAgentsRequest { filter: Some(filter), ..Default::default() };
        assert_eq!(
            shown("/spire.api.server.agent.v1.Agent/ListAgents", &request),
            json!({"filter": {"by_selector_match": {"match": 1}, "by_banned": {}}}),
            "a wrapper is a struct to Go, its false is left out"
        );
        let request = NewDownstreamX509caRequest { csr: vec![1, 2].into(), preferred_ttl: 0 };
        assert_eq!(shown("/spire.api.server.svid.v1.SVID/NewDownstreamX509CA", &request), json!({"csr": "AQI="}));
    }

    #[test]
    fn a_oneof_stands_under_its_go_name() {
        let relationship = |bundle_endpoint_profile| FederationRelationship {
            trust_domain: "td".into(),
            bundle_endpoint_profile,
            ..Default::default()
        };
        let spiffe = HttpsspiffeProfile { endpoint_spiffe_id: "spiffe://td/x".into() };
        let request = BatchCreateFederationRelationshipRequest {
            federation_relationships: vec![
                relationship(Some(BundleEndpointProfile::HttpsSpiffe(spiffe))),
                relationship(None),
            ],
            output_mask: None,
        };
        let method = "/spire.api.server.trustdomain.v1.TrustDomain/BatchCreateFederationRelationship";
        assert_eq!(
            shown(method, &request),
            json!({"federation_relationships": [
                {"trust_domain": "td",
                 "BundleEndpointProfile": {"HttpsSpiffe": {"endpoint_spiffe_id": "spiffe://td/x"}}},
                {"trust_domain": "td", "BundleEndpointProfile": null},
            ]})
        );
    }
}
