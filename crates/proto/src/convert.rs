//! Conversions between the wire and `finial_core`.
