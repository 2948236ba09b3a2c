//! The host between an engine and its plugins: loads, checks, commits, falls back, measures.
