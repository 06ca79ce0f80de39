//! Azure: how requests to storage are signed, where tokens come from, and the bundle publisher.

mod blob;
mod shared_key;
mod token;

pub use blob::Blob;

#[cfg(test)]
mod tests;
