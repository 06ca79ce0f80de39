//! Several servers on one database: what each has in memory is what the database holds, whoever wrote it, in whatever
//! order it was committed, and after every outage.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub
)]

mod lab;
mod order;
mod outage;
mod together;
mod until;
