//! Benchmarks that gate on ratios within one run.
