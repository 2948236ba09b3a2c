//! Names that both sides look up: hook points, services, the entry symbol, the metadata section.

/// The one symbol that a plugin exports. The major version is part of the name.
pub const KVH_ENTRY_SYMBOL: &str = "kvh_plugin_entry_v1";
/// The ELF section that holds a plugin's metadata.
pub const KVH_META_SECTION: &str = ".kvh_meta";
/// The symbol of the optional deep layout check between Rust and Rust.
pub const KVH_RUST_LAYOUT_SYMBOL: &str = "kvh_rust_layout_v1";

/// Hook point: once for each sequence, when its prompt's KV is complete. [`KvhOnPrefillDone1`](crate::raw::KvhOnPrefillDone1).
pub const KVH_ON_PREFILL_DONE_1: &str = "kvh.on_prefill_done/1";
/// Hook point: each time a sequence has grown. [`KvhOnGrown1`](crate::raw::KvhOnGrown1).
pub const KVH_ON_GROWN_1: &str = "kvh.on_grown/1";
/// Hook point: once for each layer and step. [`KvhBeforeAttention1`](crate::raw::KvhBeforeAttention1).
pub const KVH_BEFORE_ATTENTION_1: &str = "kvh.before_attention/1";
/// Hook point: when a sequence's KV goes away. [`KvhOnFree1`](crate::raw::KvhOnFree1).
pub const KVH_ON_FREE_1: &str = "kvh.on_free/1";

/// Service: log messages. [`KvhLog1`](crate::raw::KvhLog1).
pub const KVH_LOG_1: &str = "kvh.log/1";
/// Service: memory. [`KvhMemory1`](crate::raw::KvhMemory1).
pub const KVH_MEMORY_1: &str = "kvh.memory/1";
/// Service: rows for a rewrite. [`KvhRows1`](crate::raw::KvhRows1).
pub const KVH_ROWS_1: &str = "kvh.rows/1";

/// Every id with the name of its constant, in the header's order.
pub const IDS: &[(&str, &str)] = &[
    ("KVH_ON_PREFILL_DONE_1", KVH_ON_PREFILL_DONE_1),
    ("KVH_ON_GROWN_1", KVH_ON_GROWN_1),
    ("KVH_BEFORE_ATTENTION_1", KVH_BEFORE_ATTENTION_1),
    ("KVH_ON_FREE_1", KVH_ON_FREE_1),
    ("KVH_LOG_1", KVH_LOG_1),
    ("KVH_MEMORY_1", KVH_MEMORY_1),
    ("KVH_ROWS_1", KVH_ROWS_1),
];
