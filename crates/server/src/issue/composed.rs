//! Credentials in which plugins have a say: composed, signed, and held against the standards before anyone sees them.

use super::{FOLLOWS, IssueError, IssuedJwt, Issuer, Purpose, deadline};
use crate::authority::{ActiveJwt, ActiveX509};
use crate::compose::{Whose, check_claims, check_svid};
use finial_crypto::{Certificate, DistinguishedName, JwtSvidClaims, SvidTemplate};
use finial_plugin::{Holder, X509SvidAttributes};
use serde_json::Value;
use std::sync::Arc;

impl Issuer {
    pub(super) async fn sign_composed(
        &self,
        authority: &ActiveX509,
        purpose: Purpose,
        template: SvidTemplate<'_>,
    ) -> Result<Arc<[u8]>, IssueError> {
        let holder = Holder { id: template.id, public_key: template.public_key };
        let (whose, named) = match purpose {
            Purpose::Server => (Whose::Server, "server"),
            Purpose::Agent => (Whose::Agent(holder), "agent"),
            _ => (Whose::Workload(holder), "workload"),
        };
        let attributes = X509SvidAttributes {
            subject: template.subject.parts().clone(),
            dns_names: template.dns_names.to_vec(),
            extra_extensions: Vec::new(),
        };
        let mut composed = self.composers.x509_svid(whose, attributes).await.map_err(IssueError::Compose)?;
        if purpose == Purpose::Agent {
            keep_what_it_follows(template.subject, &mut composed);
        }
        let subject = DistinguishedName::new(composed.subject);
        let template = SvidTemplate { subject: &subject, dns_names: &composed.dns_names, ..template };
        let leaf = deadline(authority.ca.issue_svid_with(&template, &composed.extra_extensions)).await??;
        let spoilt = |why: String| IssueError::Composed(format!("invalid {named} X509-SVID: invalid X509-SVID: {why}"));
        let parsed = Certificate::parse(leaf.clone()).map_err(|e| spoilt(e.to_string()))?;
        check_svid(&parsed, template.id).map_err(spoilt)?;
        Ok(leaf)
    }

    pub(super) async fn sign_composed_jwt(
        &self,
        authority: &ActiveJwt,
        claims: &JwtSvidClaims<'_>,
    ) -> Result<IssuedJwt, IssueError> {
        let spoilt = |why: String| IssueError::Composed(format!("invalid JWT-SVID {why}"));
        let Ok(Value::Object(usual)) = serde_json::to_value(claims) else {
            return Err(spoilt("claims cannot be written".into()));
        };
        let composed = self.composers.jwt_svid(claims.sub, usual).await.map_err(IssueError::Compose)?;
        let (issued_at, expires_at) = check_claims(&composed, claims.sub, self.clock.now()).map_err(spoilt)?;
        self.authorities.signs_jwt(expires_at);
        let token = deadline(authority.signer.sign_claims(&composed)).await??;
        Ok(IssuedJwt { token, issued_at, expires_at })
    }
}

/// By these units an agent is known while its SVID is not stored: they are the server's alone to write.
fn keep_what_it_follows(usual: &DistinguishedName, composed: &mut X509SvidAttributes) {
    composed.subject.settle_units();
    let units = &mut composed.subject.organizational_unit;
    units.retain(|unit| !unit.starts_with(FOLLOWS));
    let follows = usual.parts().organizational_unit.iter().filter(|unit| unit.starts_with(FOLLOWS));
    units.extend(follows.cloned());
}

#[cfg(test)]
#[path = "composed_tests.rs"]
mod tests;
