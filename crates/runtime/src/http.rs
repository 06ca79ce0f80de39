//! The small HTTP server behind metrics and health.
