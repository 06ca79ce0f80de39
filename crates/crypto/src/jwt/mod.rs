//! JWT-SVIDs and WIT-SVIDs: signing, and validation by their standards.

mod sign;
mod verify;
mod wit;

pub use sign::{JwtAuthoritySigner, JwtSvidClaims, sign_jwt_svid};
pub use verify::{
    JwtError, JwtKeySource, JwtKeys, JwtSvid, LEEWAY_SECONDS, TOKEN_BYTES_MAX, jwt_svid_times, verify_jwt_svid,
};
pub use wit::{WitAuthoritySigner, WitError, WitSvid, WitSvidClaims, verify_wit_svid, wit_key_algorithm};
