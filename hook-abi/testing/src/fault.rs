//! What a plugin answers with, or does, instead of what it should.

use kvhook_abi::raw::KvhStatus;

/// Why a call failed: the plugin refused, or it broke the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The plugin answered with an error. It may be meant: a bad config, an unsupported layout.
    #[error("status {status}: {message}")]
    Refused {
        /// `KVH_ERR_*`.
        status: KvhStatus,
        /// The plugin's words.
        message: String,
    },
    /// The plugin has no such hook point, or its table has no such function.
    #[error("the plugin does not implement `{hook}`")]
    NotImplemented {
        /// Id of the hook point, or name of the function.
        hook: &'static str,
    },
    /// `create` failed and wrote its output all the same.
    #[error("`create` failed and wrote `*instance`; it is written on success only")]
    InstanceWritten,
    /// Bytes of a cache differ after a call.
    #[error("{tensor} of layer {layer} was written at byte {at} ({sequence}); a plugin never writes into the cache")]
    CacheWritten {
        /// `K` or `V`.
        tensor: &'static str,
        /// Index of the layer.
        layer: usize,
        /// Bytes from its first one; negative before it.
        at: i64,
        /// The sequence, in words.
        sequence: String,
    },
    /// A guard band of lent memory was written.
    #[error("{what} was written at byte {at}, outside its {bytes} bytes")]
    Outside {
        /// What was lent.
        what: String,
        /// Bytes from its first one; negative before it.
        at: i64,
        /// Bytes that were lent.
        bytes: usize,
    },
    /// Bytes of a struct behind those that the plugin knows were written.
    #[error("an element of `{array}` was written behind the struct that the plugin knows")]
    TailWritten {
        /// Name of the array.
        array: &'static str,
    },
    /// A field that the host fills was changed.
    #[error("`{field}` is {found}; the host filled in {expected} and a plugin leaves it")]
    HostField {
        /// Name of the field.
        field: &'static str,
        /// What stands there now.
        found: u64,
        /// What the host wrote.
        expected: u64,
    },
    /// A request for memory that the contract does not allow.
    #[error("a request for memory: {what}")]
    Allocation {
        /// What is wrong with it.
        what: String,
    },
    /// A bound above the length.
    #[error("`bound` says {bound} rows for layer {layer}, which has {length}")]
    Bound {
        /// Index of the layer.
        layer: usize,
        /// The plugin's bound.
        bound: u64,
        /// Rows of the layer.
        length: u64,
    },
    /// A plan for a sequence of which `bound` said that it is kept.
    #[error("a plan though `bound` says keep (reason {reason})")]
    Unannounced {
        /// `KVH_REASON_*`.
        reason: i32,
    },
    /// A plan that keeps another number of rows than its bound.
    #[error("layer {layer} keeps {count} rows; its bound is {bound}")]
    Count {
        /// Index of the layer.
        layer: usize,
        /// Rows of the plan.
        count: u64,
        /// The plugin's bound.
        bound: u64,
    },
    /// A part of a plan that cannot be read.
    #[error("the plan of layer {layer}: {what}")]
    Plan {
        /// Index of the layer.
        layer: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A kind of plan or flags that do not exist.
    #[error("a plan of kind {kind} with flags {flags}: there is no such kind, or the flag is not its own")]
    Kind {
        /// `KVH_PLAN_*`.
        kind: i32,
        /// `KVH_PLAN_FLAG_*`.
        flags: u32,
    },
    /// A text that is not UTF-8, or longer than its buffer.
    #[error("a text of {length} bytes in a buffer of {capacity}: not UTF-8, or longer than its buffer")]
    Text {
        /// Bytes that the plugin says it wrote.
        length: usize,
        /// Bytes of the buffer.
        capacity: usize,
    },
    /// A rule of [`conformance`](crate::conformance) is broken in another way.
    #[error("{what}")]
    Broken {
        /// What was found, and what was expected.
        what: String,
    },
}
