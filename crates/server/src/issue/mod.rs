//! The one place that signs SVIDs: template, validation, signature, record.
//!
//! A hot path: with keys in memory nothing here awaits, locks or spawns, and the work is one signature plus the encoding.
//! Every issue and every refusal passes `Issuer::record`, which is where an audit trail will be written.

mod composed;
mod downstream;
mod queue;
mod ttl;
mod wit;

pub use downstream::IssuedCa;
pub use ttl::{go_duration, ttl_warnings};
pub(crate) use wit::WIT_TTL_SECONDS;
pub use wit::WitRequest;

pub use queue::{SigningQueue, SigningTurn};

use crate::authority::plan::BACKDATE_SECONDS;
use crate::authority::{ActiveJwt, ActiveX509, Authorities};
use crate::compose::Composers;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use finial_core::{Clock, ErrorKind, SpiffeId, TrustDomain, UnixSeconds};
use finial_crypto::{DistinguishedName, JwtSvidClaims, NameParts, PublicKey, SerialNumber, SignError, SvidTemplate};
use finial_plugin::PluginError;
use finial_runtime::Metrics;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long a signature by a remote key may take.
const SIGN_SECONDS: u64 = 30;

/// Why an SVID was not issued. The texts are SPIRE's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// There is no X.509 authority yet.
    #[error("X509 CA is not available for signing")]
    NoX509Authority,
    /// There is no JWT authority (yet).
    #[error("JWT key is not available for signing")]
    NoJwtAuthority,
    /// There is no WIT authority (yet).
    #[error("WIT key is not available for signing")]
    NoWitAuthority,
    /// The ID is not one of the trust domain.
    #[error("invalid {svid} ID: {id:?} is not a member of trust domain {trust_domain:?}{reason}", id = id.as_str(), trust_domain = trust_domain.as_str())]
    NotMember {
        /// `X509-SVID`, `JWT-SVID` or `WIT-SVID`.
        svid: &'static str,
        /// The ID.
        id: SpiffeId,
        /// The trust domain of this server.
        trust_domain: TrustDomain,
        /// `; path is empty`, or nothing.
        reason: &'static str,
    },
    /// A JWT-SVID without an audience.
    #[error("invalid JWT-SVID audience: cannot be empty")]
    NoAudience,
    /// The authority has expired, so what it signs would be too.
    #[error("invalid {svid}: already expired as of {}", Rfc3339(*at))]
    Expired {
        /// `X509-SVID`, `JWT-SVID` or `WIT-SVID`.
        svid: &'static str,
        /// When it ended.
        at: UnixSeconds,
    },
    /// The certificate was not made.
    #[error("failed to sign X509 SVID: {0}")]
    X509(#[from] finial_crypto::IssueError),
    /// A credential composer is against it.
    #[error("{0}")]
    Compose(#[source] PluginError),
    /// What composers made of it is not what it was to be.
    #[error("{0}")]
    Composed(String),
    /// The same of a downstream authority.
    #[error("invalid downstream X509 CA: invalid X509 CA: {0}")]
    BadDownstreamCa(&'static str),
    /// The certificate of a downstream authority was not made.
    #[error("unable to create downstream X509 CA: {0}")]
    DownstreamCa(#[source] finial_crypto::IssueError),
    /// The downstream authority would have ended already.
    #[error("invalid downstream X509 CA: invalid X509 CA: already expired as of {}", Rfc3339(*.0))]
    ExpiredCa(UnixSeconds),
    /// The token was not made.
    #[error("unable to sign JWT SVID: {0}")]
    Jwt(#[from] SignError),
    /// The key did not answer.
    #[error("signing took longer than {SIGN_SECONDS} s")]
    Timeout,
}

impl IssueError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoX509Authority | Self::NoJwtAuthority | Self::NoWitAuthority => ErrorKind::Unavailable,
            Self::Expired { .. } | Self::ExpiredCa(_) => ErrorKind::Unavailable,
            Self::NotMember { .. } | Self::NoAudience => ErrorKind::InvalidArgument,
            Self::Compose(e) => e.kind,
            Self::Composed(_) | Self::BadDownstreamCa(_) => ErrorKind::Internal,
            Self::X509(e) | Self::DownstreamCa(e) => e.kind(),
            Self::Jwt(e) => e.kind(),
            Self::Timeout => ErrorKind::Timeout,
        }
    }
}

/// A time as RFC 3339 text in UTC, written only when it is shown.
pub(crate) struct Rfc3339(pub(crate) UnixSeconds);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = time::OffsetDateTime::from_unix_timestamp(self.0)
            .ok()
            .and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok());
        match text {
            Some(text) => f.write_str(&text),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Before the serial number that an agent's SVID follows, in an organizational unit of its subject.
const FOLLOWS: &str = "FOLLOWS-";

/// The serial numbers that an agent's SVID says it follows. Only authorities write them: no agent chooses its subject.
pub(crate) fn follows(certificate: &finial_crypto::Certificate) -> Box<[Box<str>]> {
    let Ok(subject) = certificate.subject() else { return Box::default() };
    let units = subject.parts().organizational_unit.iter();
    units.filter_map(|unit| unit.strip_prefix(FOLLOWS)).map(Into::into).collect()
}

/// What SVIDs are like unless a request says otherwise. Lifetimes are seconds.
#[derive(Clone, Debug)]
pub struct IssuerSettings {
    /// Of which trust domain.
    pub trust_domain: TrustDomain,
    /// Of X.509-SVIDs (`default_x509_svid_ttl`), also of the server's own.
    pub x509_svid_ttl_seconds: i64,
    /// Of agents (`agent_ttl`).
    pub agent_svid_ttl_seconds: i64,
    /// Of JWT-SVIDs (`default_jwt_svid_ttl`).
    pub jwt_svid_ttl_seconds: i64,
    /// The `iss` claim; `None` = left out.
    pub jwt_issuer: Option<String>,
    /// The `iss` claim of WIT-SVIDs; `None` = left out.
    pub wit_issuer: Option<String>,
    /// Of downstream authorities that ask for none (`ca_ttl`).
    pub ca_ttl_seconds: i64,
}

impl IssuerSettings {
    /// From the server's settings.
    pub fn of(settings: &finial_config::ServerSettings) -> Self {
        let seconds = |d: Duration| i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
        Self {
            trust_domain: settings.trust_domain.clone(),
            x509_svid_ttl_seconds: seconds(settings.x509_svid_ttl),
            agent_svid_ttl_seconds: seconds(settings.agent_ttl.unwrap_or(settings.x509_svid_ttl)),
            jwt_svid_ttl_seconds: seconds(settings.jwt_svid_ttl),
            jwt_issuer: settings.jwt_issuer.clone(),
            wit_issuer: settings.wit_issuer.clone(),
            ca_ttl_seconds: seconds(settings.ca_ttl),
        }
    }
}

/// An X.509-SVID that is wanted for a workload.
pub struct X509Request<'a> {
    /// Whose.
    pub id: &'a SpiffeId,
    /// The key to certify; the caller has verified that the requester holds it.
    pub public_key: &'a PublicKey,
    /// DNS SANs; the first becomes the common name.
    pub dns_names: &'a [String],
    /// Lifetime in seconds; 0 or less = the default.
    pub ttl_seconds: i64,
    /// The subject (Mint honours the CSR's); `None` or empty = the default.
    pub subject: Option<&'a DistinguishedName>,
}

/// A JWT-SVID that is wanted.
pub struct JwtRequest<'a> {
    /// Whose.
    pub id: &'a SpiffeId,
    /// For whom; empty ones are dropped, and one must remain.
    pub audience: &'a [String],
    /// Lifetime in seconds; 0 or less = the default.
    pub ttl_seconds: i64,
    /// With a `jti`.
    pub include_jti: bool,
}

/// An X.509-SVID that was issued.
#[derive(Clone, Debug)]
pub struct IssuedX509 {
    /// Leaf, then what must follow it on the wire; DER each.
    pub chain: Vec<Arc<[u8]>>,
    /// Of the leaf; prints in decimal.
    pub serial: SerialNumber,
    /// Of the leaf.
    pub not_before: UnixSeconds,
    /// Of the leaf.
    pub not_after: UnixSeconds,
}

/// A JWT-SVID or WIT-SVID that was issued.
#[derive(Clone, Debug)]
pub struct IssuedJwt {
    /// In compact serialization.
    pub token: String,
    /// `iat`
    pub issued_at: UnixSeconds,
    /// `exp`
    pub expires_at: UnixSeconds,
}

/// For whom something is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Server,
    Agent,
    Workload,
    Downstream,
}

/// What was issued, for the record.
enum Issued<'a> {
    X509(&'a IssuedX509, &'a [String]),
    Jwt(&'a IssuedJwt, &'a [String]),
    Wit(&'a IssuedJwt),
    Ca(&'a IssuedCa),
}

/// Issues SVIDs. Shared by all who need it.
pub struct Issuer {
    settings: IssuerSettings,
    authorities: Authorities,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    composers: Composers,
    subject: DistinguishedName,
    server_id: SpiffeId,
}

impl Issuer {
    /// Signs with whatever authorities are active at the time.
    pub fn new(settings: IssuerSettings, authorities: Authorities, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        let server_id = settings.trust_domain.server_id();
        let (composers, subject) = (Composers::default(), DistinguishedName::svid_default());
        Self { settings, authorities, clock, metrics, composers, subject, server_id }
    }

    /// The same where others have a say in what credentials say.
    pub fn with_composers(self, composers: Composers) -> Self {
        Self { composers, ..self }
    }

    /// The authorities that sign.
    pub fn authorities(&self) -> &Authorities {
        &self.authorities
    }

    /// An X.509-SVID for a workload: by an entry, or minted.
    pub async fn workload_x509_svid(&self, request: &X509Request<'_>) -> Result<IssuedX509, IssueError> {
        self.x509(Purpose::Workload, request).await
    }

    /// An X.509-SVID for an agent.
    pub async fn agent_x509_svid(&self, id: &SpiffeId, public_key: &PublicKey) -> Result<IssuedX509, IssueError> {
        let ttl_seconds = self.settings.agent_svid_ttl_seconds;
        self.x509(Purpose::Agent, &X509Request { id, public_key, dns_names: &[], ttl_seconds, subject: None }).await
    }

    /// The same for an agent whose SVID cannot be stored now: its subject says which ones it follows, so that any server
    /// that knows the agent by one of them knows it by this one, too. All are named, as those that were given out in the
    /// same outage are stored one after the other. See docs/adr/0008.
    pub async fn agent_x509_svid_following(
        &self,
        id: &SpiffeId,
        public_key: &PublicKey,
        serials: &[Box<str>],
    ) -> Result<IssuedX509, IssueError> {
        let organizational_unit = serials.iter().map(|serial| format!("{FOLLOWS}{serial}")).collect();
        let subject = DistinguishedName::new(NameParts { organizational_unit, ..self.subject.parts().clone() });
        let ttl_seconds = self.settings.agent_svid_ttl_seconds;
        let subject = Some(&subject);
        self.x509(Purpose::Agent, &X509Request { id, public_key, dns_names: &[], ttl_seconds, subject }).await
    }

    /// An X.509-SVID for this server.
    pub async fn server_x509_svid(&self, public_key: &PublicKey) -> Result<IssuedX509, IssueError> {
        let request = X509Request { id: &self.server_id, public_key, dns_names: &[], ttl_seconds: 0, subject: None };
        self.x509(Purpose::Server, &request).await
    }

    /// A JWT-SVID for a workload.
    pub async fn jwt_svid(&self, request: &JwtRequest<'_>) -> Result<IssuedJwt, IssueError> {
        let audience = match request.audience.iter().any(String::is_empty) {
            true => Cow::Owned(request.audience.iter().filter(|a| !a.is_empty()).cloned().collect::<Vec<_>>()),
            false => Cow::Borrowed(request.audience),
        };
        let result = self.sign_jwt(request, &audience).await;
        self.record(Purpose::Workload, request.id, result.as_ref().map(|svid| Issued::Jwt(svid, &audience)));
        result
    }

    /// Whether an X.509-SVID can be signed now. What is signed for the test is thrown away.
    pub async fn self_test(&self) -> Result<(), IssueError> {
        let authority = self.authorities.x509().ok_or(IssueError::NoX509Authority)?;
        let public_key = authority.ca.signer().public_key().clone();
        let request =
            X509Request { id: &self.server_id, public_key: &public_key, dns_names: &[], ttl_seconds: 0, subject: None };
        self.sign_x509(&authority, None, &request).await.map(drop)
    }

    async fn x509(&self, purpose: Purpose, request: &X509Request<'_>) -> Result<IssuedX509, IssueError> {
        let result = match self.authorities.x509() {
            Some(authority) => self.sign_x509(&authority, Some(purpose), request).await,
            None => Err(IssueError::NoX509Authority),
        };
        self.record(purpose, request.id, result.as_ref().map(|svid| Issued::X509(svid, request.dns_names)));
        result
    }

    /// Without a purpose nobody has a say.
    async fn sign_x509(
        &self,
        authority: &ActiveX509,
        purpose: Option<Purpose>,
        request: &X509Request<'_>,
    ) -> Result<IssuedX509, IssueError> {
        self.check_member("X509-SVID", request.id)?;
        let default_ttl = self.settings.x509_svid_ttl_seconds;
        let (now, not_after) =
            self.lifetime("X509-SVID", request.ttl_seconds, default_ttl, authority.ca.not_after())?;
        let subject = request.subject.filter(|s| !s.is_empty()).unwrap_or(&self.subject);
        let subject = match request.dns_names.first() {
            Some(name) => Cow::Owned(subject.with_common_name(name)),
            None => Cow::Borrowed(subject),
        };
        let (not_before, serial) = (now - BACKDATE_SECONDS, SerialNumber::random());
        let template = SvidTemplate {
            id: request.id,
            public_key: request.public_key,
            subject: &subject,
            dns_names: request.dns_names,
            not_before,
            not_after,
            serial,
        };
        let leaf = match purpose.filter(|_| !self.composers.is_empty()) {
            Some(purpose) => self.sign_composed(authority, purpose, template).await?,
            None => match authority.ca.issue_svid_now(&template) {
                Some(result) => result?,
                None => deadline(authority.ca.issue_svid(&template)).await??,
            },
        };
        Ok(IssuedX509 { chain: authority.ca.chain_of(leaf), serial, not_before, not_after })
    }

    async fn sign_jwt(&self, request: &JwtRequest<'_>, audience: &[String]) -> Result<IssuedJwt, IssueError> {
        let authority: Arc<ActiveJwt> = self.authorities.jwt().ok_or(IssueError::NoJwtAuthority)?;
        self.check_member("JWT-SVID", request.id)?;
        if audience.is_empty() {
            return Err(IssueError::NoAudience);
        }
        let default_ttl = self.settings.jwt_svid_ttl_seconds;
        let (issued_at, expires_at) =
            self.lifetime("JWT-SVID", request.ttl_seconds, default_ttl, authority.not_after)?;
        self.authorities.signs_jwt(expires_at);
        let jti = request.include_jti.then(|| BASE64_URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4().as_bytes()));
        let claims = JwtSvidClaims {
            sub: request.id,
            aud: audience,
            exp: expires_at,
            iat: issued_at,
            iss: self.settings.jwt_issuer.as_deref(),
            jti: jti.as_deref(),
        };
        if !self.composers.is_empty() {
            return self.sign_composed_jwt(&authority, &claims).await;
        }
        let token = match authority.signer.sign_now(&claims) {
            Some(result) => result?,
            None => deadline(authority.signer.sign(&claims)).await??,
        };
        Ok(IssuedJwt { token, issued_at, expires_at })
    }

    /// Now, and the end of an SVID: now plus its lifetime, but never after its authority's end.
    fn lifetime(
        &self,
        svid: &'static str,
        ttl_seconds: i64,
        default_seconds: i64,
        authority_end: UnixSeconds,
    ) -> Result<(UnixSeconds, UnixSeconds), IssueError> {
        let now = self.clock.now();
        let ttl = if ttl_seconds > 0 { ttl_seconds } else { default_seconds };
        let end = now.saturating_add(ttl).min(authority_end);
        if end <= now { Err(IssueError::Expired { svid, at: end }) } else { Ok((now, end)) }
    }

    fn check_member(&self, svid: &'static str, id: &SpiffeId) -> Result<(), IssueError> {
        let trust_domain = &self.settings.trust_domain;
        let reason = match (id.is_member_of(trust_domain), id.path().is_empty()) {
            (true, false) => return Ok(()),
            (true, true) => "; path is empty",
            (false, _) => "",
        };
        Err(IssueError::NotMember { svid, id: id.clone(), trust_domain: trust_domain.clone(), reason })
    }

    /// Every issue and every refusal passes here.
    fn record(&self, purpose: Purpose, id: &SpiffeId, outcome: Result<Issued<'_>, &IssueError>) {
        match outcome {
            Ok(Issued::X509(svid, dns_names)) => {
                self.metrics.count("server_ca.sign.x509_svid", 1.0, &[]);
                tracing::debug!(
                    spiffe_id = %id,
                    expiration = %Rfc3339(svid.not_after),
                    serial_num = %svid.serial,
                    dns_name = dns_names.first().map(String::as_str),
                    purpose = ?purpose,
                    "Signed X509 SVID"
                );
            }
            Ok(Issued::Jwt(svid, audience)) => {
                self.metrics.count("server_ca.sign.jwt_svid", 1.0, &[]);
                tracing::debug!(
                    spiffe_id = %id,
                    expiration = %Rfc3339(svid.expires_at),
                    audience = ?audience,
                    "Server CA successfully signed JWT SVID"
                );
            }
            Ok(Issued::Wit(svid)) => {
                tracing::debug!(
                    spiffe_id = %id,
                    expiration = %Rfc3339(svid.expires_at),
                    "Server CA successfully signed WIT-SVID"
                );
            }
            Ok(Issued::Ca(ca)) => {
                self.metrics.count("server_ca.sign.x509_ca_svid", 1.0, &[]);
                tracing::debug!(
                    spiffe_id = %id,
                    trust_domain_id = %self.settings.trust_domain,
                    expiration = %Rfc3339(ca.not_after),
                    "Signed X509 CA SVID"
                );
            }
            // The API says it at the level that SPIRE does.
            Err(error) => tracing::debug!(spiffe_id = %id, %error, purpose = ?purpose, "SVID not issued"),
        }
    }
}

async fn deadline<T>(sign: impl Future<Output = T>) -> Result<T, IssueError> {
    tokio::time::timeout(Duration::from_secs(SIGN_SECONDS), sign).await.map_err(|_| IssueError::Timeout)
}

#[cfg(test)]
mod tests;
