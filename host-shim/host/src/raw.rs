//! The types of the host's C API: the source of `include/kvhook_host.h`, with the functions in `c_api`.
//!
//! The rules are those of `kvhook.h`: structs begin with `struct_size` and grow at their end, arrays are
//! pointer, count and stride, text is UTF-8 with a length, nothing that one side allocated is freed by the
//! other, no callback may unwind or throw.

use core::ffi::c_void;
use kvhook_abi::raw::*;

/// What a function of the host answers: `KVHOOK_OK` or one of `KVHOOK_ERR_*`. Numbers never move.
pub type KvhookStatus = i32;
/// Success.
pub const KVHOOK_OK: KvhookStatus = 0;

/// No such file.
pub const KVHOOK_ERR_FILE_MISSING: KvhookStatus = 100;
/// The file cannot be read.
pub const KVHOOK_ERR_FILE_UNREADABLE: KvhookStatus = 101;
/// The path is outside the allowed folders.
pub const KVHOOK_ERR_PATH_NOT_ALLOWED: KvhookStatus = 102;
/// The path goes through a symbolic link.
pub const KVHOOK_ERR_PATH_IS_LINK: KvhookStatus = 103;
/// The file changed between check and load.
pub const KVHOOK_ERR_FILE_CHANGED: KvhookStatus = 104;
/// Not an ELF shared library.
pub const KVHOOK_ERR_NOT_ELF: KvhookStatus = 105;
/// Built for another processor or system.
pub const KVHOOK_ERR_WRONG_ARCHITECTURE: KvhookStatus = 106;
/// The content's SHA-256 is not the pinned one.
pub const KVHOOK_ERR_CHECKSUM: KvhookStatus = 107;
/// The private copy could not be written.
pub const KVHOOK_ERR_COPY: KvhookStatus = 108;
/// The dynamic loader refused it.
pub const KVHOOK_ERR_DLOPEN: KvhookStatus = 109;
/// It exports no `kvh_plugin_entry_v1`.
pub const KVHOOK_ERR_NO_ENTRY: KvhookStatus = 110;
/// Another major version of the ABI.
pub const KVHOOK_ERR_WRONG_MAJOR: KvhookStatus = 111;
/// It requires a newer minor version than this host's.
pub const KVHOOK_ERR_NEWER_MINOR: KvhookStatus = 112;
/// A struct has another layout than any that this host knows.
pub const KVHOOK_ERR_LAYOUT: KvhookStatus = 113;
/// A function that must be there is null.
pub const KVHOOK_ERR_NULL_FUNCTION: KvhookStatus = 114;
/// The entry is not usable: null, too small, id not UTF-8 or empty.
pub const KVHOOK_ERR_BAD_ENTRY: KvhookStatus = 115;
/// The metadata section is missing or not readable.
pub const KVHOOK_ERR_METADATA: KvhookStatus = 116;
/// A model's config names a path; only bare names are taken from a model.
pub const KVHOOK_ERR_MODEL_PATH: KvhookStatus = 117;
/// Safe mode: the environment says that no plugin is loaded.
pub const KVHOOK_ERR_SAFE_MODE: KvhookStatus = 118;

/// The `kv_plugin` form or an arm's spec is not valid.
pub const KVHOOK_ERR_SPEC: KvhookStatus = 150;
/// The plugin refused its config string.
pub const KVHOOK_ERR_CONFIG: KvhookStatus = 151;
/// The instance needs what the engine does not offer.
pub const KVHOOK_ERR_NEED_NOT_OFFERED: KvhookStatus = 152;
/// The plugin's `create` or `needs` failed.
pub const KVHOOK_ERR_CREATE: KvhookStatus = 153;
/// The plugin panicked while it was created.
pub const KVHOOK_ERR_CREATE_PANIC: KvhookStatus = 154;
/// This model, device or dtype is not supported, by a plugin or by the host.
pub const KVHOOK_ERR_UNSUPPORTED: KvhookStatus = 155;

/// An argument is null, too small or out of range.
pub const KVHOOK_ERR_INVALID_ARGUMENT: KvhookStatus = 200;
/// No live sequence has this uid.
pub const KVHOOK_ERR_UNKNOWN_UID: KvhookStatus = 201;
/// No arm has this name.
pub const KVHOOK_ERR_UNKNOWN_ARM: KvhookStatus = 202;
/// No ticket has this number.
pub const KVHOOK_ERR_UNKNOWN_TICKET: KvhookStatus = 203;
/// The verdict is not there yet.
pub const KVHOOK_ERR_NOT_READY: KvhookStatus = 204;
/// The ticket was dropped.
pub const KVHOOK_ERR_DROPPED: KvhookStatus = 205;
/// The rows given are too few.
pub const KVHOOK_ERR_NO_ROOM: KvhookStatus = 206;
/// A layer's layout is not one that the row formula describes, or differs from the model's.
pub const KVHOOK_ERR_VIEW: KvhookStatus = 207;
/// Memory was refused.
pub const KVHOOK_ERR_OUT_OF_MEMORY: KvhookStatus = 208;
/// The sequence cannot be forked: its plugin keeps state for it.
pub const KVHOOK_ERR_FORK_REFUSED: KvhookStatus = 209;
/// A defect of the host itself.
pub const KVHOOK_ERR_INTERNAL: KvhookStatus = 210;
/// A text buffer is too small; its `length` says what is needed.
pub const KVHOOK_ERR_BUFFER_TOO_SMALL: KvhookStatus = 211;
/// A device's driver reports an error, which may come from any work before: the context may be lost.
pub const KVHOOK_ERR_DEVICE: KvhookStatus = 212;

/// Why a sequence stays as it is: `KVH_REASON_*`, or one of these.
pub type KvhookReason = i32;
/// A hook returned an error.
pub const KVHOOK_REASON_PLUGIN_ERROR: KvhookReason = 100;
/// A hook panicked; the instance is poisoned.
pub const KVHOOK_REASON_PANIC: KvhookReason = 101;
/// The instance was poisoned before.
pub const KVHOOK_REASON_POISONED: KvhookReason = 102;
/// An index is out of range, descending or repeated.
pub const KVHOOK_REASON_BAD_INDEX: KvhookReason = 103;
/// A count is zero, above the bound, or below it where that was not declared.
pub const KVHOOK_REASON_BAD_COUNT: KvhookReason = 104;
/// A position of a rewrite is out of range or descending.
pub const KVHOOK_REASON_BAD_POSITION: KvhookReason = 105;
/// The plan is malformed: unknown kind, null arrays, lent rows missing.
pub const KVHOOK_REASON_BAD_PLAN: KvhookReason = 106;
/// Memory was refused.
pub const KVHOOK_REASON_OUT_OF_MEMORY: KvhookReason = 107;
/// Another rank failed or kept.
pub const KVHOOK_REASON_OTHER_RANK: KvhookReason = 108;
/// The sequence was freed, cut, forked, preempted or reset before commit.
pub const KVHOOK_REASON_DROPPED: KvhookReason = 109;
/// The arm was disabled, by the operator or by its guard, or all are: safe mode.
pub const KVHOOK_REASON_DISABLED: KvhookReason = 110;
/// The sequence is shorter than the arm's `min_tokens`.
pub const KVHOOK_REASON_MIN_TOKENS: KvhookReason = 111;
/// A device's driver reported an error.
pub const KVHOOK_REASON_DEVICE: KvhookReason = 112;
/// The arm is a shadow: its plan was made and checked, and is not carried out.
pub const KVHOOK_REASON_SHADOW: KvhookReason = 113;

/// A host. All functions may be called from any thread unless they say otherwise.
pub struct KvhookHost {
    _private: (),
}

/// What the engine gives to the host. Every callback may be called from any thread that calls the host.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KvhookCallbacks {
    /// `sizeof(KvhookCallbacks)` as the engine knows it.
    pub struct_size: usize,
    /// Handed back to every callback.
    pub context: *mut c_void,
    /// Takes a log message, borrowed during the call. Null: nothing is logged.
    pub log: Option<unsafe extern "C" fn(context: *mut c_void, record: *const KvhLogRecord)>,
    /// The lowest importance that is wanted, `KVH_LOG_*`. Null: `KVH_LOG_INFO`.
    pub log_max_level: Option<unsafe extern "C" fn(context: *mut c_void) -> i32>,
    /// Memory of a rank's device, in the stream's order; null when it is refused. Null function: the
    /// host's own heap (CPU only). It must not wait for the device.
    pub allocate: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            rank: u32,
            bytes: u64,
            alignment: u64,
            stream: *mut c_void,
        ) -> *mut c_void,
    >,
    /// Gives it back, in the stream's order. Must be there when `allocate` is.
    pub free: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            rank: u32,
            data: *mut c_void,
            bytes: u64,
            alignment: u64,
            stream: *mut c_void,
        ),
    >,
}

/// How to make a host.
#[repr(C)]
pub struct KvhookHostConfig {
    /// `sizeof(KvhookHostConfig)` as the engine knows it.
    pub struct_size: usize,
    /// Name and version of the engine, for messages.
    pub engine: KvhStr,
    /// Copied.
    pub callbacks: *const KvhookCallbacks,
    /// `KvhModel` elements, one for each rank of this process. Copied.
    pub models: KvhArray,
    /// What the engine offers. Copied.
    pub offers: *const KvhOffers,
    /// `KvhStr` elements: folders in which plugins are looked up and from which paths are allowed, in order. Empty:
    /// `KVHOOK_PLUGIN_PATH`, or `deps` in the program's folder, that folder and `../lib/kvhook/plugins` beside it.
    pub plugin_folders: KvhArray,
    /// Folder for private copies, made with mode 0700. Empty: `kvhook/plugins` in the user's cache folder.
    pub copy_folder: KvhStr,
}

/// The operator wrote it: paths inside the allowed folders are honoured.
pub const KVHOOK_SOURCE_OPERATOR: i32 = 0;
/// It came with a model: only bare names are honoured.
pub const KVHOOK_SOURCE_MODEL: i32 = 1;

/// An arm: a plugin with a config.
#[repr(C)]
pub struct KvhookArm {
    /// `sizeof(KvhookArm)` as the engine knows it.
    pub struct_size: usize,
    /// Name of the arm; letters, digits, `.`, `_`, `-`; not `none`.
    pub name: KvhStr,
    /// A bare name, looked up as `libkvhook_<name>.so` in the folders, or a path.
    pub plugin: KvhStr,
    /// Config string of the plugin.
    pub config: KvhStr,
    /// Pinned SHA-256 of the file, 64 hexadecimal digits; empty: not pinned.
    pub sha256: KvhStr,
    /// Layers to compress, as in `0-3,8`; empty: all.
    pub layers: KvhStr,
    /// Sequences shorter than this are kept; 0: none.
    pub min_tokens: u64,
    /// Share of the sequences that name no arm, relative to the other arms' weights.
    pub weight: f64,
    /// `KVHOOK_SOURCE_*`.
    pub source: i32,
    /// Zero.
    pub reserved0: u32,
}

/// A sequence that begins.
#[repr(C)]
pub struct KvhookBegin {
    /// `sizeof(KvhookBegin)` as the engine knows it.
    pub struct_size: usize,
    /// What the arm is chosen by when `arm` is empty: the same key, the same arm. Empty: the uid.
    pub key: KvhStr,
    /// Name of an arm; `none`: no arm; empty: by weight.
    pub arm: KvhStr,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// `KvhSegment` elements. Copied.
    pub segments: KvhArray,
}

/// What the host wants for a sequence.
#[repr(C)]
pub struct KvhookSequence {
    /// `sizeof(KvhookSequence)` as the engine knows it.
    pub struct_size: usize,
    /// Name of the sequence in every later call. 0: no arm took it, nothing needs to be called.
    pub uid: u64,
    /// The longest cached prefix that the engine may use, in tokens; later tokens must be computed, so
    /// that the plugin sees their queries.
    pub max_prefix_hit: u64,
    /// Phases in which `kvhook_before_attention` is wanted: `KVH_PHASE_*` bits.
    pub before_attention_phases: u32,
    /// 1: the sequence may be compressed when its prompt is done.
    pub on_prefill_done: u32,
    /// Ask again each time the sequence has grown by so many tokens; 0: never.
    pub grown_every: u64,
}

/// The prompt is complete.
pub const KVHOOK_EVENT_PREFILL_DONE: i32 = 1;
/// The sequence has grown.
pub const KVHOOK_EVENT_GROWN: i32 = 2;

/// Nothing is to be done; `reason` says why.
pub const KVHOOK_DECISION_KEEP: i32 = 0;
/// Prepare it; the rows may be moved in place.
pub const KVHOOK_DECISION_IN_PLACE: i32 = 1;
/// Prepare it with fresh rows: rows that stay are shared or published.
pub const KVHOOK_DECISION_FRESH: i32 = 2;

/// A question before any data is read: is there something to compress, and how many rows does it take?
#[repr(C)]
pub struct KvhookAsk {
    /// `sizeof(KvhookAsk)` as the engine knows it.
    pub struct_size: usize,
    /// The sequence.
    pub uid: u64,
    /// `KVHOOK_EVENT_*`.
    pub event: i32,
    /// Zero.
    pub reserved0: u32,
    /// `uint64_t` elements: rows stored in each layer.
    pub lengths: KvhArray,
    /// Position of the next token.
    pub next_position: u64,
    /// Leading rows that others use, or wait to use: they are not freed, and not written.
    pub shared_rows: u64,
    /// Leading rows that are published for others to find: they are not written.
    pub published_rows: u64,
}

/// The answer.
#[repr(C)]
pub struct KvhookAnswer {
    /// `sizeof(KvhookAnswer)` as the engine knows it.
    pub struct_size: usize,
    /// `KVHOOK_DECISION_*`.
    pub decision: i32,
    /// Why it is a keep.
    pub reason: KvhookReason,
    /// `uint64_t` elements, lent by the engine: the most rows that each layer keeps. The tokens that are
    /// appended before commit come on top.
    pub counts: KvhArrayMut,
}

/// One sequence of a prepare, on one rank.
#[repr(C)]
pub struct KvhookPrepareSequence {
    /// `sizeof(KvhookPrepareSequence)` as the engine knows it.
    pub struct_size: usize,
    /// The sequence.
    pub uid: u64,
    /// `KVHOOK_EVENT_*`.
    pub event: i32,
    /// 1: fresh rows will be given at commit; 0: in place.
    pub fresh: u32,
    /// `KvhLayer` elements: the rows as they are; `positions` is the host's to fill and is ignored.
    pub layers: KvhArray,
    /// Position of the next token.
    pub next_position: u64,
    /// As in `KvhookAsk`.
    pub shared_rows: u64,
    /// As in `KvhookAsk`.
    pub published_rows: u64,
    /// Out: the ticket; 0: kept, `reason` says why. The same on every rank.
    pub ticket: u64,
    /// Out: why it is kept.
    pub reason: KvhookReason,
    /// Zero.
    pub reserved1: u32,
}

/// Some rank's device has not written its verdict, or has not prepared yet.
pub const KVHOOK_VERDICT_PENDING: i32 = 0;
/// Every rank agrees: commit on each.
pub const KVHOOK_VERDICT_READY: i32 = 1;
/// The sequence stays as it is.
pub const KVHOOK_VERDICT_DROPPED: i32 = 2;

/// Rows move to the front of the sequence's own rows.
pub const KVHOOK_MOVE_IN_PLACE: i32 = 1;
/// Rows are copied to the fresh rows.
pub const KVHOOK_MOVE_FRESH: i32 = 2;
/// Nothing moves: some blocks leave the table. Fresh rows, if any, are not used.
pub const KVHOOK_MOVE_TABLE: i32 = 3;

/// The state of a ticket.
#[repr(C)]
pub struct KvhookVerdict {
    /// `sizeof(KvhookVerdict)` as the engine knows it.
    pub struct_size: usize,
    /// `KVHOOK_VERDICT_*`.
    pub verdict: i32,
    /// Why it was dropped.
    pub reason: KvhookReason,
    /// How the rows move, when ready: `KVHOOK_MOVE_*`, the same on every rank.
    pub movement: i32,
    /// 1: rows are rewritten, so a commit to fresh rows needs them for every layer; 0: a layer that keeps all its rows may
    /// have none.
    pub rewrites: u32,
    /// Rows of each layer when the ticket was made: tokens from there on are appended behind what is kept.
    pub planned_position: u64,
    /// `uint64_t` elements, lent by the engine: rows that each layer keeps of those that were planned.
    pub counts: KvhArrayMut,
}

/// A commit on one rank.
#[repr(C)]
pub struct KvhookCommit {
    /// `sizeof(KvhookCommit)` as the engine knows it.
    pub struct_size: usize,
    /// The ticket.
    pub ticket: u64,
    /// `KvhLayer` elements: the rows as they are now, appended ones included.
    pub layers: KvhArray,
    /// `KvhLayer` elements: fresh rows with room for what is kept and what was appended; empty: in place.
    pub fresh: KvhArray,
    /// Position of the next token.
    pub next_position: u64,
    /// The engine's stream, or null on the CPU.
    pub stream: *mut c_void,
    /// `uint64_t` elements, lent by the engine. Out: rows of each layer after the commit.
    pub lengths: KvhArrayMut,
    /// Out: position of the next token after the commit.
    pub new_next_position: u64,
}

/// Blocks that a table keeps in one layer. The layer's new table is the old entries of `blocks`, in order.
#[repr(C)]
pub struct KvhookTableEdit {
    /// `sizeof(KvhookTableEdit)` as the engine knows it.
    pub struct_size: usize,
    /// Ordinals of the kept blocks of those that were planned; blocks that came later follow unchanged.
    pub blocks: *const u32,
    /// Number of them.
    pub count: u64,
}

/// `before_attention` of one layer of one step, on one rank.
#[repr(C)]
pub struct KvhookStep {
    /// `sizeof(KvhookStep)` as the engine knows it.
    pub struct_size: usize,
    /// Index of the layer.
    pub layer: u32,
    /// Zero.
    pub reserved0: u32,
    /// Queries `[tokens, q_heads, head_dim]`, with RoPE applied.
    pub q: *const KvhTensor,
    /// New keys `[tokens, kv_heads, head_dim]`, with RoPE applied.
    pub k: *const KvhTensor,
    /// New values `[tokens, kv_heads, v_head_dim]`.
    pub v: *const KvhTensor,
    /// `KvhStepSequence` elements, of any arm or none (uid 0); the host shows each instance its own.
    pub sequences: KvhArray,
    /// The engine's stream, or null on the CPU.
    pub stream: *mut c_void,
}

/// Number of buckets of a histogram of times: below 1, 2, 4, ... microseconds; the last takes the rest.
pub const KVHOOK_TIME_BUCKETS: usize = 24;

/// Times of one hook.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KvhookTimes {
    /// Calls.
    pub calls: u64,
    /// Nanoseconds in all.
    pub total_ns: u64,
    /// The longest call, in nanoseconds.
    pub max_ns: u64,
    /// Calls below `2^i` microseconds and not below `2^(i-1)`.
    pub buckets: [u64; KVHOOK_TIME_BUCKETS],
}

/// How often sequences stayed as they were for one reason. Frozen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KvhookReasonCount {
    /// The reason.
    pub reason: KvhookReason,
    /// Zero.
    pub reserved0: u32,
    /// How often.
    pub count: u64,
}

/// Figures of one arm since the host was made.
#[repr(C)]
pub struct KvhookFigures {
    /// `sizeof(KvhookFigures)` as the engine knows it.
    pub struct_size: usize,
    /// Sequences that began on the arm.
    pub sequences: u64,
    /// Sequences that are live now.
    pub live: u64,
    /// Commits.
    pub commits: u64,
    /// Rows before, summed over commits, ranks, layers and heads (a K and its V are one).
    pub entries_before: u64,
    /// Rows after.
    pub entries_after: u64,
    /// Bytes of those rows before.
    pub bytes_before: u64,
    /// Bytes after.
    pub bytes_after: u64,
    /// Bytes that the engine said it got back (`kvhook_freed`).
    pub bytes_freed: u64,
    /// Fallbacks of every reason.
    pub fallbacks: u64,
    /// `KvhookReasonCount` elements, lent by the engine; none if `count` is 0. Out: those that are not zero, by
    /// reason, as many as fit; `count` says how many were written.
    pub reasons: KvhArrayMut,
    /// `bound`, `on_prefill_done`, `on_grown`, `before_attention`, `on_free`, and the host's commit.
    pub bound: KvhookTimes,
    /// See `bound`.
    pub on_prefill_done: KvhookTimes,
    /// See `bound`.
    pub on_grown: KvhookTimes,
    /// See `bound`.
    pub before_attention: KvhookTimes,
    /// See `bound`.
    pub on_free: KvhookTimes,
    /// See `bound`.
    pub commit: KvhookTimes,
}
