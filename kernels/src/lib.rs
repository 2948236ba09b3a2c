//! What plugins and host compute with: one function per operation.
