//! The method table: one row per RPC of the server, saying who may call it and which rate limit counts it.
//!
//! A row also makes a type below [`method`], and handlers can only be written against the [`Permit`](super::Permit) of
//! that type, which nothing but the gate's check hands out. A test walks the contracts and fails for an RPC without a row.

use finial_policy::Verdict;

/// Who may call a method; a set of classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who(u8);

impl Who {
    /// Everyone, without a client certificate too.
    pub const ANYONE: Self = Self(1);
    /// Callers on the local socket.
    pub const LOCAL: Self = Self(2);
    /// IDs of `admin_ids`, and IDs of entries with the admin flag.
    pub const ADMIN: Self = Self(4);
    /// IDs of entries with the downstream flag.
    pub const DOWNSTREAM: Self = Self(8);
    /// Attested agents whose SVID is the current one.
    pub const AGENT: Self = Self(16);
    const MANAGER: Self = Self(2 | 4);
    const READER: Self = Self(2 | 4 | 16);

    /// Those whom a policy's verdict names.
    pub(super) fn of(verdict: Verdict) -> Self {
        let classes = [
            (verdict.allow, Self::ANYONE),
            (verdict.allow_if_local, Self::LOCAL),
            (verdict.allow_if_admin, Self::ADMIN),
            (verdict.allow_if_downstream, Self::DOWNSTREAM),
            (verdict.allow_if_agent, Self::AGENT),
        ];
        Self(classes.iter().filter(|(on, _)| *on).fold(0, |set, (_, class)| set | class.0))
    }

    /// Whether the set holds `class`.
    pub fn includes(self, class: Self) -> bool {
        self.0 & class.0 != 0
    }
}

/// Which limit counts a method. Limits are per caller, and only for calls over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RateGroup {
    /// Not limited.
    Unlimited,
    /// One attestation a second.
    Attest,
    /// 500 X.509 signatures a second, shared by all methods that take CSRs.
    SignX509,
    /// 500 JWT-SVIDs a second.
    SignJwt,
    /// 500 WIT-SVIDs a second.
    SignWit,
    /// 500 published keys a second.
    PublishKey,
    /// Ten status reports a second.
    PostStatus,
}

/// One row of the table.
#[derive(Debug, PartialEq, Eq)]
pub struct MethodRow {
    /// The service as the log names it, such as `agent.v1.Agent`.
    pub service: &'static str,
    /// The method, such as `AttestAgent`.
    pub name: &'static str,
    /// The full gRPC path, such as `/spire.api.server.agent.v1.Agent/AttestAgent`.
    pub path: &'static str,
    /// Who may call it.
    pub who: Who,
    /// What limits it.
    pub rate: RateGroup,
}

/// The type of a method: ties a handler to its row.
pub trait Method: Send + Sync + 'static {
    /// The row.
    const ROW: &'static MethodRow;
}

macro_rules! methods {
    ($($service:literal as $short:literal { $($name:ident $who:ident $rate:ident,)* })*) => {
        /// One type per row of the table.
        pub mod method {
            use super::{Method, MethodRow, RateGroup, Who};
            $($(
                #[doc = concat!("`/", $service, "/", stringify!($name), "`.")]
                pub struct $name;
                impl Method for $name {
                    const ROW: &'static MethodRow = &MethodRow {
                        service: $short,
                        name: stringify!($name),
                        path: concat!("/", $service, "/", stringify!($name)),
                        who: Who::$who,
                        rate: RateGroup::$rate,
                    };
                }
            )*)*
        }

        /// The whole table.
        pub static TABLE: &[&MethodRow] = &[$($(<method::$name as Method>::ROW,)*)*];
    };
}

methods! {
    "spire.api.server.svid.v1.SVID" as "svid.v1.SVID" {
        MintX509SVID MANAGER Unlimited,
        MintJWTSVID MANAGER Unlimited,
        MintWITSVID MANAGER Unlimited,
        BatchNewX509SVID AGENT SignX509,
        NewJWTSVID AGENT SignJwt,
        BatchNewWITSVID AGENT SignWit,
        NewDownstreamX509CA DOWNSTREAM SignX509,
    }
    "spire.api.server.bundle.v1.Bundle" as "bundle.v1.Bundle" {
        GetBundle ANYONE Unlimited,
        AppendBundle MANAGER Unlimited,
        PublishJWTAuthority DOWNSTREAM PublishKey,
        PublishWITAuthority DOWNSTREAM PublishKey,
        CountBundles MANAGER Unlimited,
        ListFederatedBundles MANAGER Unlimited,
        GetFederatedBundle READER Unlimited,
        BatchCreateFederatedBundle MANAGER Unlimited,
        BatchUpdateFederatedBundle MANAGER Unlimited,
        BatchSetFederatedBundle MANAGER Unlimited,
        BatchDeleteFederatedBundle MANAGER Unlimited,
    }
    "spire.api.server.entry.v1.Entry" as "entry.v1.Entry" {
        CountEntries MANAGER Unlimited,
        ListEntries MANAGER Unlimited,
        GetEntry MANAGER Unlimited,
        BatchCreateEntry MANAGER Unlimited,
        BatchUpdateEntry MANAGER Unlimited,
        BatchDeleteEntry MANAGER Unlimited,
        GetAuthorizedEntries AGENT Unlimited,
        SyncAuthorizedEntries AGENT Unlimited,
    }
    "spire.api.server.agent.v1.Agent" as "agent.v1.Agent" {
        CountAgents MANAGER Unlimited,
        ListAgents MANAGER Unlimited,
        GetAgent MANAGER Unlimited,
        DeleteAgent MANAGER Unlimited,
        BanAgent MANAGER Unlimited,
        AttestAgent ANYONE Attest,
        RenewAgent AGENT SignX509,
        PostStatus AGENT PostStatus,
        CreateJoinToken MANAGER Unlimited,
    }
    "spire.api.server.trustdomain.v1.TrustDomain" as "trustdomain.v1.TrustDomain" {
        ListFederationRelationships MANAGER Unlimited,
        GetFederationRelationship MANAGER Unlimited,
        BatchCreateFederationRelationship MANAGER Unlimited,
        BatchUpdateFederationRelationship MANAGER Unlimited,
        BatchDeleteFederationRelationship MANAGER Unlimited,
        RefreshBundle MANAGER Unlimited,
    }
    "spire.api.server.localauthority.v1.LocalAuthority" as "localauthority.v1.LocalAuthority" {
        GetJWTAuthorityState MANAGER Unlimited,
        PrepareJWTAuthority MANAGER Unlimited,
        ActivateJWTAuthority MANAGER Unlimited,
        TaintJWTAuthority MANAGER Unlimited,
        RevokeJWTAuthority MANAGER Unlimited,
        GetX509AuthorityState MANAGER Unlimited,
        PrepareX509Authority MANAGER Unlimited,
        ActivateX509Authority MANAGER Unlimited,
        TaintX509Authority MANAGER Unlimited,
        TaintX509UpstreamAuthority MANAGER Unlimited,
        RevokeX509Authority MANAGER Unlimited,
        RevokeX509UpstreamAuthority MANAGER Unlimited,
        GetWITAuthorityState MANAGER Unlimited,
        PrepareWITAuthority MANAGER Unlimited,
        ActivateWITAuthority MANAGER Unlimited,
        TaintWITAuthority MANAGER Unlimited,
        RevokeWITAuthority MANAGER Unlimited,
    }
    "spire.api.server.logger.v1.Logger" as "Logger" {
        GetLogger LOCAL Unlimited,
        SetLogLevel LOCAL Unlimited,
        ResetLogLevel LOCAL Unlimited,
    }
    "spire.api.server.debug.v1.Debug" as "debug.v1.Debug" {
        GetInfo LOCAL Unlimited,
    }
    "finial.server.sync.v1.AgentSync" as "sync.v1.AgentSync" {
        WatchAuthorized AGENT Unlimited,
        BundleSeen AGENT PostStatus,
    }
    "finial.server.rotation.v1.Rotation" as "rotation.v1.Rotation" {
        BeginRotation MANAGER Unlimited,
        GetRotation MANAGER Unlimited,
        AdvanceRotation MANAGER Unlimited,
        TakeBackRotation MANAGER Unlimited,
        WatchRotation MANAGER Unlimited,
    }
    "grpc.health.v1.Health" as "Health" {
        Check LOCAL Unlimited,
        List LOCAL Unlimited,
        Watch LOCAL Unlimited,
    }
}

/// Our own methods, each with that of SPIRE's which a custom policy is asked about in its place: the stream tells an agent nothing
/// else than the call would, and an order to all servers is one to each.
pub(super) static LIKE_SPIRES: &[(&MethodRow, &MethodRow)] = &[
    (method::WatchAuthorized::ROW, method::SyncAuthorizedEntries::ROW),
    (method::BundleSeen::ROW, method::SyncAuthorizedEntries::ROW),
    (method::BeginRotation::ROW, method::PrepareX509Authority::ROW),
    (method::GetRotation::ROW, method::GetX509AuthorityState::ROW),
    (method::AdvanceRotation::ROW, method::RevokeX509Authority::ROW),
    (method::TakeBackRotation::ROW, method::ActivateX509Authority::ROW),
    (method::WatchRotation::ROW, method::GetX509AuthorityState::ROW),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_five_rows_of_spire_and_seven_of_ours_each_path_once() {
        let mut paths: Vec<_> = TABLE.iter().map(|row| row.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), 72);
        assert_eq!(TABLE.len(), 72);
    }

    /// Every `rpc` of every contract that the server speaks has a row; a new RPC fails here until it gets one.
    #[test]
    fn every_rpc_of_the_contracts_has_a_row() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto");
        let mut found = 0;
        let mut folders = vec![std::path::PathBuf::from(root)];
        while let Some(folder) = folders.pop() {
            for item in std::fs::read_dir(folder).unwrap() {
                let path = item.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "proto") {
                    found += check_contract(&std::fs::read_to_string(&path).unwrap());
                }
            }
        }
        assert_eq!(found, TABLE.len() - 1, "all but Health.List, which is newer than the contract we serve");
    }

    fn check_contract(text: &str) -> usize {
        let mut package = "";
        let mut service = "";
        let mut found = 0;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("package ") {
                package = rest.trim_end_matches(';').trim();
            } else if let Some(rest) = line.strip_prefix("service ") {
                service = rest.trim_end_matches('{').trim();
            } else if let Some(rest) = line.strip_prefix("rpc ")
                && (package.starts_with("spire.api.server.")
                    || package.starts_with("finial.server.")
                    || package == "grpc.health.v1")
            {
                let rpc = rest.split('(').next().unwrap().trim();
                let path = format!("/{package}.{service}/{rpc}");
                assert!(TABLE.iter().any(|row| row.path == path), "no row for {path}");
                found += 1;
            }
        }
        found
    }
}
