//! Federation relationships: from where the bundles of other trust domains are fetched. The bundle itself is stored with
//! the other bundles, and stays when the relationship goes.

use crate::bundles;
use crate::sql::{Conn, Moment, Query, Row};
use crate::store::transact;
use crate::{Listed, Page, Store, StoreError};
use finial_core::{Bundle, EndpointProfile, SpiffeId, TrustDomain};

/// A relationship with another trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FederationRelationship {
    /// The other trust domain.
    pub trust_domain: TrustDomain,
    /// Where its bundle is fetched.
    pub bundle_endpoint_url: String,
    /// How that endpoint proves who it is.
    pub profile: EndpointProfile,
    /// Its bundle, if it is known. When it is written, `None` leaves a stored bundle as it is.
    pub bundle: Option<Bundle>,
}

/// Which parts of a relationship an update replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FederationMask {
    /// Where the bundle is fetched.
    pub bundle_endpoint_url: bool,
    /// How the endpoint proves who it is.
    pub bundle_endpoint_profile: bool,
    /// The bundle.
    pub trust_domain_bundle: bool,
}

impl FederationMask {
    /// Everything.
    pub const ALL: Self = Self { bundle_endpoint_url: true, bundle_endpoint_profile: true, trust_domain_bundle: true };
}

const SELECT: &str = "SELECT f.id, f.trust_domain, f.bundle_endpoint_url, f.bundle_endpoint_profile, \
    f.endpoint_spiffe_id, b.trust_domain, b.data FROM federated_trust_domains f \
    LEFT JOIN bundles b ON b.trust_domain = 'spiffe://' || f.trust_domain";

/// Profile and ID of the endpoint, as the columns have them.
fn columns(profile: &EndpointProfile) -> (&'static str, &str) {
    let endpoint_id = match profile {
        EndpointProfile::HttpsWeb => "",
        EndpointProfile::HttpsSpiffe { endpoint_id } => endpoint_id.as_str(),
    };
    (profile.name(), endpoint_id)
}

impl Store {
    /// Stores a new relationship and, in the same transaction, the bundle that comes with it. `AlreadyExists` when there
    /// is one with this trust domain. Returns it with the bundle as stored.
    pub async fn create_federation_relationship(
        &self,
        relationship: &FederationRelationship,
    ) -> Result<FederationRelationship, StoreError> {
        let now = self.now();
        let (profile, endpoint_id) = columns(&relationship.profile);
        transact!(self, |tx| {
            if let Some(bundle) = &relationship.bundle {
                bundles::set(&mut tx, bundle, now).await?;
            }
            let query = Query::new(
                "INSERT INTO federated_trust_domains (created_at, updated_at, trust_domain, bundle_endpoint_url, \
                 bundle_endpoint_profile, endpoint_spiffe_id, implicit) VALUES (?, ?, ?, ?, ?, ?, ?)",
            );
            let query = query.bind(now).bind(now).bind(relationship.trust_domain.as_str());
            let query = query.bind(&relationship.bundle_endpoint_url).bind(profile).bind(endpoint_id).bind(false);
            tx.execute(query).await?;
            tx.set_news();
            stored(&mut tx, &relationship.trust_domain).await
        })
    }

    /// One relationship with its bundle.
    pub async fn fetch_federation_relationship(
        &self,
        trust_domain: &TrustDomain,
    ) -> Result<Option<FederationRelationship>, StoreError> {
        let query = Query::new(format!("{SELECT} WHERE f.trust_domain = ?")).bind(trust_domain.as_str());
        self.connection().await?.optional(query).await?.as_ref().map(from_row).transpose()
    }

    /// The relationships with their bundles. One that cannot be read is logged and left out.
    pub async fn list_federation_relationships(
        &self,
        page: Option<&Page>,
    ) -> Result<Listed<FederationRelationship>, StoreError> {
        let (found, last) = self.relationships(page).await?;
        Ok(Listed::new(found.into_iter().map(|(_, relationship)| relationship).collect(), page, last))
    }

    /// All relationships with their row IDs, which pages go by, in their order; without their bundles.
    pub async fn federation_rows(&self) -> Result<Vec<(i64, FederationRelationship)>, StoreError> {
        let (mut found, _) = self.relationships(None).await?;
        found.iter_mut().for_each(|(_, relationship)| relationship.bundle = None);
        Ok(found)
    }

    /// The relationships of a page with their row IDs, and the last of these.
    async fn relationships(
        &self,
        page: Option<&Page>,
    ) -> Result<(Vec<(i64, FederationRelationship)>, Option<i64>), StoreError> {
        let mut query = Query::new(format!("{SELECT} WHERE f.id > "));
        query.push_bind(page.map_or(Ok(0), Page::after)?).push(" ORDER BY f.id");
        if let Some(page) = page {
            query.push(" LIMIT ").push_bind(page.size);
        }
        let rows = self.connection().await?.all(query).await?;
        let last = rows.last().map(|row| row.int(0)).transpose()?;
        let mut items = Vec::with_capacity(rows.len());
        for row in &rows {
            match from_row(row) {
                Ok(relationship) => items.push((row.int(0)?, relationship)),
                Err(error @ StoreError::BadRow { .. }) => {
                    tracing::warn!(%error, "Invalid federation relationship in the datastore; left out");
                }
                Err(error) => return Err(error),
            }
        }
        Ok((items, last))
    }

    /// Replaces the masked parts of a relationship and, if the mask says so and there is one, the bundle. `NotFound`
    /// when there is no such relationship. Returns the whole result.
    pub async fn update_federation_relationship(
        &self,
        relationship: &FederationRelationship,
        mask: FederationMask,
    ) -> Result<FederationRelationship, StoreError> {
        let now = self.now();
        transact!(self, |tx| {
            update(&mut tx, relationship, mask, now).await?;
            stored(&mut tx, &relationship.trust_domain).await
        })
    }

    /// Deletes a relationship; the bundle stays. `NotFound` when there is none.
    pub async fn delete_federation_relationship(&self, trust_domain: &TrustDomain) -> Result<(), StoreError> {
        transact!(self, |tx| {
            tx.set_news();
            let query = Query::new("DELETE FROM federated_trust_domains WHERE trust_domain = ?");
            match tx.execute(query.bind(trust_domain.as_str())).await? {
                0 => Err(StoreError::NotFound),
                _ => Ok(()),
            }
        })
    }
}

async fn update(
    conn: &mut Conn,
    new: &FederationRelationship,
    mask: FederationMask,
    now: Moment,
) -> Result<(), StoreError> {
    conn.set_news();
    let (profile, endpoint_id) = columns(&new.profile);
    let mut query = Query::new("UPDATE federated_trust_domains SET updated_at = ?").bind(now);
    if mask.bundle_endpoint_url {
        query.push(", bundle_endpoint_url = ").push_bind(&new.bundle_endpoint_url);
    }
    if mask.bundle_endpoint_profile {
        query.push(", bundle_endpoint_profile = ").push_bind(profile);
        // the ID of an endpoint that needs none stays, as in SPIRE, which never reads it
        if !endpoint_id.is_empty() {
            query.push(", endpoint_spiffe_id = ").push_bind(endpoint_id);
        }
    }
    query.push(" WHERE trust_domain = ").push_bind(new.trust_domain.as_str());
    if conn.execute(query).await? == 0 {
        return Err(StoreError::Missing("unable to fetch federation relationship: record not found".into()));
    }
    if let Some(bundle) = new.bundle.as_ref().filter(|_| mask.trust_domain_bundle) {
        bundles::set(conn, bundle, now).await?;
    }
    Ok(())
}

async fn stored(conn: &mut Conn, trust_domain: &TrustDomain) -> Result<FederationRelationship, StoreError> {
    let query = Query::new(format!("{SELECT} WHERE f.trust_domain = ?")).bind(trust_domain.as_str());
    from_row(&conn.one(query).await?)
}

fn from_row(row: &Row) -> Result<FederationRelationship, StoreError> {
    let name = row.str(1)?;
    let bad = |cause: String| StoreError::BadRow { what: format!("federation relationship with {name:?}"), cause };
    let profile = match row.str(3)? {
        "https_web" => EndpointProfile::HttpsWeb,
        "https_spiffe" => {
            let endpoint_id = SpiffeId::parse(row.str(4)?)
                .map_err(|e| bad(format!("unable to parse bundle endpoint SPIFFE ID: {e}")))?;
            EndpointProfile::HttpsSpiffe { endpoint_id }
        }
        other => return Err(bad(format!("unknown bundle endpoint profile type: {other:?}"))),
    };
    let bundle = match row.str(5)? {
        "" => None,
        id => Some(bundles::from_blob(id, row.blob(6)?)?),
    };
    Ok(FederationRelationship {
        trust_domain: TrustDomain::parse(name).map_err(|e| bad(e.to_string()))?,
        bundle_endpoint_url: row.text(2)?,
        profile,
        bundle,
    })
}
