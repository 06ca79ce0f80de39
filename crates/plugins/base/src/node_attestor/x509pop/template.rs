//! `agent_path_template`: the path of an agent's SPIFFE ID below `/spire/agent`.
//!
//! A small part of Go's template language: text, and fields in `{{ }}`. Functions and pipelines are refused at start.

/// A parsed template.
#[derive(Debug, PartialEq)]
pub(super) struct Template(Vec<Part>);

#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    Field(String),
}

/// Fields that every certificate has. `URISanSelectors.<key>` is known as well, and must be there when it is used.
const FIELDS: [&str; 5] = ["PluginName", "TrustDomain", "Fingerprint", "SerialNumberHex", "Subject.CommonName"];

impl Template {
    /// Parses, and checks that it uses nothing that is not supported.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (inside, after) = after.split_once("}}").ok_or("unclosed {{")?;
            let trimmed = inside.trim();
            let name = trimmed.strip_prefix('.').unwrap_or_default();
            let known =
                FIELDS.contains(&name) || name.strip_prefix("URISanSelectors.").is_some_and(|key| !key.is_empty());
            if !known || name.contains(char::is_whitespace) {
                let fields = FIELDS.map(|f| format!(".{f}")).join(", ");
                return Err(format!("{{{{{inside}}}}} is not supported: use {fields} or .URISanSelectors.KEY"));
            }
            parts.push(Part::Text(before.to_owned()));
            parts.push(Part::Field(name.to_owned()));
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self(parts))
    }

    /// Fills the fields in.
    pub(super) fn fill(&self, value_of: impl Fn(&str) -> Option<String>) -> Result<String, String> {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Field(name) => out.push_str(&value_of(name).ok_or(format!("map has no entry for key {name:?}"))?),
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_filled_in_and_anything_else_is_refused_at_start() {
        let template = Template::parse("/{{ .PluginName }}/{{.URISanSelectors.rack}}/x").expect("parses");
        let fill = |name: &str| name.ends_with("rack").then(|| "r1".to_owned()).or(Some("x509pop".to_owned()));
        assert_eq!(template.fill(fill).as_deref(), Ok("/x509pop/r1/x"));
        assert!(template.fill(|name| (name == "PluginName").then(String::new)).is_err());
        for bad in
            ["/{{ .PluginName", "/{{ .PluginName | upper }}", "/{{ upper .PluginName }}", "/{{ .NotAField }}", "/{{}}"]
        {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
    }
}
