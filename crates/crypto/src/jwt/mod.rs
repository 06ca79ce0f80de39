//! JWT-SVIDs: signing, and validation by the JWT-SVID standard.

mod sign;
mod verify;

pub use sign::{JwtAuthoritySigner, JwtSvidClaims, sign_jwt_svid};
pub use verify::{
    JwtError, JwtKeySource, JwtKeys, JwtSvid, LEEWAY_SECONDS, TOKEN_BYTES_MAX, jwt_svid_times, verify_jwt_svid,
};
