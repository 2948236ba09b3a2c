//! The reference engine: a Llama-architecture GGUF with caches that a plugin may compress.
