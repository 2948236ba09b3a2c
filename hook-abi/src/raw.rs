//! The contract: every type, constant and function pointer that crosses the boundary.
//!
//! This file is the one source of `include/kvhook.h`. It holds plain C data only: the safe side is in
//! the modules beside it. Rules that every item keeps:
//!
//! * A struct that carries arguments begins with `struct_size`, grows only at its end and has no
//!   implicit padding. Whoever fills it writes the size that it knows; whoever reads it tests with
//!   `KVH_HAS` (C) or [`has_field`](crate::has_field) (Rust) before it reads a field that came later.
//! * A struct without `struct_size` is embedded in others and frozen. So is every table of functions:
//!   a change makes a new id.
//! * An array is pointer, count and byte stride; elements may be larger than the reader's struct.
//! * Text is UTF-8, pointer and length, not terminated, and borrowed for the call unless said otherwise.
//! * Outputs are allocated by the host, and written only within the host's `struct_size`.
//! * No function may unwind or throw through the boundary.
//!
//! Each function says, in this order: the thread that calls it; whether calls on one instance are
//! serial; until when its pointers are valid; which statuses it returns.

use core::ffi::{c_char, c_void};

/// Major version of the ABI. It is part of the entry symbol's name.
pub const KVH_ABI_MAJOR: u32 = 1;
/// Minor version of the ABI. It grows when a struct gains fields or a hook point is added.
pub const KVH_ABI_MINOR: u32 = 0;

/// What a function of the ABI answers: one of the `KVH_OK` and `KVH_ERR_*` constants. Numbers never move.
pub type KvhStatus = i32;
/// Success.
pub const KVH_OK: KvhStatus = 0;
/// An argument is null, too small or out of range.
pub const KVH_ERR_INVALID_ARGUMENT: KvhStatus = 1;
/// The config string is not valid for this plugin.
pub const KVH_ERR_CONFIG: KvhStatus = 2;
/// The model, device, dtype or layout is not supported.
pub const KVH_ERR_UNSUPPORTED: KvhStatus = 3;
/// Memory was refused.
pub const KVH_ERR_OUT_OF_MEMORY: KvhStatus = 4;
/// The plugin panicked. The instance is poisoned from now on.
pub const KVH_ERR_PANIC: KvhStatus = 5;
/// The instance panicked earlier and answers nothing any more.
pub const KVH_ERR_POISONED: KvhStatus = 6;
/// The plugin failed in a way of its own; the error buffer says how.
pub const KVH_ERR_INTERNAL: KvhStatus = 7;
/// A device call failed.
pub const KVH_ERR_DEVICE: KvhStatus = 8;

/// Borrowed UTF-8 text, not terminated. `data` may be null when `length` is 0.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhStr {
    /// First byte.
    pub data: *const c_char,
    /// Bytes.
    pub length: usize,
}

/// A buffer for text that the caller owns and the callee fills: an error, a reason. The callee writes at
/// most `capacity` bytes of whole UTF-8 characters, no terminator, and sets `length`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhText {
    /// `sizeof(KvhText)` as the caller knows it.
    pub struct_size: usize,
    /// First byte; may be null when `capacity` is 0.
    pub data: *mut c_char,
    /// Bytes that may be written.
    pub capacity: usize,
    /// Bytes that were written.
    pub length: usize,
}

/// Elements that the reader may only read. Element `i` stands at `data + i * stride` bytes.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhArray {
    /// First element; may be null when `count` is 0.
    pub data: *const c_void,
    /// Number of elements.
    pub count: u64,
    /// Bytes from one element to the next; at least the element's `struct_size`.
    pub stride: u64,
}

/// Elements that the callee fills. As [`KvhArray`].
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhArrayMut {
    /// First element; may be null when `count` is 0.
    pub data: *mut c_void,
    /// Number of elements.
    pub count: u64,
    /// Bytes from one element to the next; at least the element's `struct_size`.
    pub stride: u64,
}

/// Ordinary memory. The device types are DLPack's.
pub const KVH_DEVICE_CPU: i32 = 1;
/// Memory of a CUDA device.
pub const KVH_DEVICE_CUDA: i32 = 2;

/// A device, as DLPack's `DLDevice`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhDevice {
    /// `KVH_DEVICE_*`.
    pub device_type: i32,
    /// Ordinal of the device; 0 on the CPU.
    pub device_id: i32,
}

/// Signed integers. The codes are DLPack's.
pub const KVH_DTYPE_INT: u8 = 0;
/// Unsigned integers.
pub const KVH_DTYPE_UINT: u8 = 1;
/// IEEE floating point.
pub const KVH_DTYPE_FLOAT: u8 = 2;
/// bfloat16.
pub const KVH_DTYPE_BFLOAT: u8 = 4;

/// An element type, as DLPack's `DLDataType`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvhDtype {
    /// `KVH_DTYPE_*`.
    pub code: u8,
    /// Bits of one element.
    pub bits: u8,
    /// 1: no vector types are used.
    pub lanes: u16,
}

/// A tensor with the layout of DLPack's `DLTensor`. Strides count elements and are never null.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhTensor {
    /// Start of the allocation.
    pub data: *mut c_void,
    /// Where the data lies.
    pub device: KvhDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: KvhDtype,
    /// `ndim` sizes.
    pub shape: *mut i64,
    /// `ndim` strides, in elements.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// The K rows or the V rows of one layer of one sequence. Frozen. Row of token `t` and head `h`:
///
/// `base + block(t / block_size, h) * stride_block + (t % block_size) * stride_token + h * stride_head`
///
/// with `block` and `block_size` from the [`KvhLayer`]; a contiguous cache has `block_size` 0 and
/// `row(t, h) = base + t * stride_token + h * stride_head`. All strides are bytes.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhRows {
    /// Start; null when the layer has no such rows.
    pub base: *mut c_void,
    /// Bytes from one block to the next.
    pub stride_block: i64,
    /// Bytes from one token of a block to the next.
    pub stride_token: i64,
    /// Bytes from one KV head to the next.
    pub stride_head: i64,
    /// Bytes from one channel of a row to the next.
    pub stride_element: i64,
    /// Channels of a row.
    pub head_dim: u32,
    /// Element type: f32, f16, bf16, or one that an extension names.
    pub dtype: KvhDtype,
}

/// A block table. Frozen. Entry `i` for head `h` stands at element `h * stride_head + i`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhBlockTable {
    /// Entries in device memory. Null: contiguous, or blocks numbered 0, 1, 2, ...
    pub data: *const c_void,
    /// Elements from one head's entries to the next; 0: heads share them.
    pub stride_head: i64,
    /// Entries for each head. Entries behind the last row are not read.
    pub count: u32,
    /// i32, u32 or i64.
    pub dtype: KvhDtype,
}

/// Positions of the rows of one layer. Frozen. Row `t` of head `h`, for `t < count`, stands for position
/// `data[h * stride_head + t]`; a later row `t` for `next_position - (length - t)`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhPositions {
    /// Device memory; null when `count` is 0: nothing was ever dropped.
    pub data: *const u32,
    /// Elements from one head's positions to the next; 0: heads agree.
    pub stride_head: i64,
    /// Rows that the table covers.
    pub count: u64,
}

/// Every token is visible to every later one.
pub const KVH_LAYER_FULL: i32 = 0;
/// Only the last `window` tokens are visible.
pub const KVH_LAYER_SLIDING_WINDOW: i32 = 1;
/// Rows are latent vectors from which K and V are made (MLA).
pub const KVH_LAYER_LATENT: i32 = 2;
/// A recurrent state, no rows.
pub const KVH_LAYER_LINEAR: i32 = 3;
/// The layer has no cache on this rank.
pub const KVH_LAYER_NONE: i32 = 4;

/// V lies inside the K rows: moving K moves V.
pub const KVH_LAYER_FLAG_V_INSIDE_K: u32 = 1;

/// One layer of one sequence, on one rank.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhLayer {
    /// `sizeof(KvhLayer)` as the host knows it.
    pub struct_size: usize,
    /// Index of the layer in the model.
    pub layer: u32,
    /// `KVH_LAYER_*`. Only full layers are planned unless the plugin says that it understands others.
    pub kind: i32,
    /// `KVH_LAYER_FLAG_*`.
    pub flags: u32,
    /// Tokens that a sliding window sees; 0 otherwise.
    pub window: u32,
    /// Layer whose cache this one reads; -1: its own.
    pub shared_with: i32,
    /// KV heads of this rank.
    pub kv_heads: u32,
    /// Tokens of a block; 0: contiguous.
    pub block_size: u32,
    /// Zero.
    pub reserved0: u32,
    /// Rows that are stored now, the same for every head.
    pub length: u64,
    /// K, with RoPE applied.
    pub k: KvhRows,
    /// V.
    pub v: KvhRows,
    /// Where the blocks are, for K and V.
    pub table: KvhBlockTable,
    /// Which position each row stands for.
    pub positions: KvhPositions,
}

/// Plain text.
pub const KVH_SEGMENT_TEXT: u32 = 0;
/// Entries made from an image.
pub const KVH_SEGMENT_IMAGE: u32 = 1;

/// A stretch of the prompt. Frozen. Segments are ascending and do not overlap; what none covers is text.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhSegment {
    /// `KVH_SEGMENT_*`.
    pub kind: u32,
    /// Zero.
    pub reserved0: u32,
    /// Position of its first token.
    pub start: u64,
    /// Tokens.
    pub length: u64,
}

/// A range of rows. Frozen.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhRange {
    /// First row.
    pub start: u64,
    /// Rows.
    pub length: u64,
}

/// One sequence, on one rank.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhSequence {
    /// `sizeof(KvhSequence)` as the host knows it.
    pub struct_size: usize,
    /// Name of the sequence; never used again.
    pub uid: u64,
    /// Commits so far.
    pub epoch: u64,
    /// Position of the next token: tokens seen so far, kept or not.
    pub next_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// Leading rows that other sequences use too.
    pub shared_rows: u64,
    /// How many of the prompt's last queries `before_attention` has seen.
    pub queries_seen: u64,
    /// Axes of a position (3 for multimodal RoPE, else 1). The host's tables hold the token's index.
    pub position_axes: u32,
    /// Zero.
    pub reserved0: u32,
    /// `KvhSegment` elements.
    pub segments: KvhArray,
    /// `KvhLayer` elements, one for each layer of the model, in order.
    pub layers: KvhArray,
}

/// Rotation pairs channel `c` with `c + rotary_dim / 2` (Hugging Face).
pub const KVH_ROPE_HALF_SPLIT: i32 = 0;
/// Rotation pairs channel `2 c` with `2 c + 1` (GGUF's `llama`).
pub const KVH_ROPE_INTERLEAVED: i32 = 1;
/// No rotary positions.
pub const KVH_ROPE_NONE: i32 = 2;

/// What stays the same for one layer of a model, on one rank.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhLayerInfo {
    /// `sizeof(KvhLayerInfo)` as the host knows it.
    pub struct_size: usize,
    /// `KVH_LAYER_*`.
    pub kind: i32,
    /// `KVH_LAYER_FLAG_*`.
    pub flags: u32,
    /// Tokens that a sliding window sees; 0 otherwise.
    pub window: u32,
    /// Layer whose cache this one reads; -1: its own.
    pub shared_with: i32,
    /// KV heads of this rank.
    pub kv_heads: u32,
    /// Query heads of this rank.
    pub q_heads: u32,
    /// Channels of a K row.
    pub k_head_dim: u32,
    /// Channels of a V row.
    pub v_head_dim: u32,
}

/// The model as one rank sees it.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhModel {
    /// `sizeof(KvhModel)` as the host knows it.
    pub struct_size: usize,
    /// Name of the model, for messages.
    pub name: KvhStr,
    /// This rank.
    pub rank: u32,
    /// Ranks.
    pub ranks: u32,
    /// KV heads of the whole model.
    pub total_kv_heads: u32,
    /// The whole model's index of this rank's first KV head.
    pub first_kv_head: u32,
    /// Where this rank's cache lies.
    pub device: KvhDevice,
    /// Element type of the cache.
    pub cache_dtype: KvhDtype,
    /// Axes of a position.
    pub position_axes: u32,
    /// Longest sequence that the model takes, in tokens.
    pub max_positions: u64,
    /// RoPE base; 0 when `rope_frequencies` gives them.
    pub rope_base: f64,
    /// Inverse frequencies, `rotary_dim / 2` of them; null: from the base. Valid as long as the instance.
    pub rope_frequencies: *const f32,
    /// Channels that are rotated.
    pub rotary_dim: u32,
    /// `KVH_ROPE_*`.
    pub rope_pairing: i32,
    /// `KvhLayerInfo` elements, one for each layer.
    pub layers: KvhArray,
}

/// The engine calls `before_attention`.
pub const KVH_CAN_QUERIES: u64 = 1 << 0;
/// The engine can show every query of a prompt (no prefix hit at all).
pub const KVH_CAN_ALL_QUERIES: u64 = 1 << 1;
/// Lengths may differ between layers.
pub const KVH_CAN_LAYER_COUNTS: u64 = 1 << 2;
/// Counts may depend on the data (below the bound), in every layer and head.
pub const KVH_CAN_DATA_COUNTS: u64 = 1 << 3;
/// A plugin may keep state for a sequence (the engine does not fork sequences).
pub const KVH_CAN_STATE: u64 = 1 << 4;
/// The host lends rows for a rewrite.
pub const KVH_CAN_REWRITE: u64 = 1 << 5;
/// The next token's position may change at commit (re-rotated or compacted positions).
pub const KVH_CAN_MOVE_POSITIONS: u64 = 1 << 6;
/// The engine calls `on_grown` while a sequence is decoded.
pub const KVH_CAN_GROWN: u64 = 1 << 7;

/// What the engine offers to an instance.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhOffers {
    /// `sizeof(KvhOffers)` as the host knows it.
    pub struct_size: usize,
    /// `KVH_CAN_*` bits.
    pub can: u64,
    /// Most queries of a prompt's end that the engine can show; 0 without `KVH_CAN_QUERIES`.
    pub max_window_queries: u32,
    /// Tokens of a block; 0: contiguous.
    pub block_size: u32,
}

/// Prefill: the tokens of a prompt.
pub const KVH_PHASE_PREFILL: u32 = 1;
/// Decode: one token for each sequence.
pub const KVH_PHASE_DECODE: u32 = 2;

/// What an instance needs, with its config and this model. The host fills `struct_size`, zeroes the rest
/// and lends `layer_mask`; the plugin fills what it needs. A need that is not offered is an error at load.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhNeeds {
    /// `sizeof(KvhNeeds)` as the host knows it.
    pub struct_size: usize,
    /// `KVH_CAN_*` bits that must be offered.
    pub must: u64,
    /// Phases (`KVH_PHASE_*` bits) in which `before_attention` is called; 0: never.
    pub before_attention_phases: u32,
    /// How many of a prompt's last queries it wants; `UINT32_MAX`: all of them.
    pub window_queries: u32,
    /// Call `on_grown` each time a sequence has grown by so many tokens; 0: never.
    pub grown_every: u64,
    /// Sequences shorter than this are not shown; 0: all are.
    pub min_tokens: u64,
    /// Bit `l % 64` of word `l / 64`: call `before_attention` for layer `l`. All ones when called.
    pub layer_mask: *mut u64,
    /// Words of `layer_mask`.
    pub layer_mask_words: u64,
}

/// The plugin chose to keep, or nothing was asked.
pub const KVH_REASON_NONE: i32 = 0;
/// The sequence is too short for this config.
pub const KVH_REASON_TOO_SHORT: i32 = 1;
/// Compressing would free nothing.
pub const KVH_REASON_NO_GAIN: i32 = 2;
/// Too few queries of the prompt were seen.
pub const KVH_REASON_QUERIES_MISSING: i32 = 3;
/// No rows were to be had.
pub const KVH_REASON_NO_ROOM: i32 = 4;
/// The layout, dtype or layer kind is not one that the plugin takes.
pub const KVH_REASON_UNSUPPORTED: i32 = 5;
/// Another one; the plan's message says which.
pub const KVH_REASON_OTHER: i32 = 6;

/// Keep everything.
pub const KVH_PLAN_KEEP: i32 = 0;
/// Keep some rows, unchanged.
pub const KVH_PLAN_SELECT: i32 = 1;
/// Replace the rows by new ones, which stand in lent rows.
pub const KVH_PLAN_REWRITE: i32 = 2;

/// The keys are rotated for new positions: `next_position` of the plan counts.
pub const KVH_PLAN_FLAG_MOVED_POSITIONS: u32 = 1;

/// One layer of a plan. The host fills `struct_size`, zeroes the rest; the plugin fills one of `ranges`
/// and `indices` for a select, `positions` for a rewrite. A layer whose bound is its length may be left zeroed in
/// a select: it is kept whole. Pointers must stay valid until the ticket is committed or dropped: use ticket memory.
/// Arrays are device memory, except `ranges`: host memory, read before the hook's caller goes on.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhLayerPlan {
    /// `sizeof(KvhLayerPlan)` as the host knows it.
    pub struct_size: usize,
    /// Rows that each head keeps: the bound, or fewer where plugin and engine declare that.
    pub count: u32,
    /// Elements of `ranges`.
    pub range_count: u32,
    /// Rows to keep, strictly ascending: head `h`'s `i`-th at `indices[h * index_stride_head + i]`.
    pub indices: *const u32,
    /// Elements from one head's indices to the next; 0: heads share them.
    pub index_stride_head: i64,
    /// Rows to keep for all heads, as ascending ranges in host memory; their lengths add up to `count`.
    pub ranges: *const KvhRange,
    /// Rewrite: the position that each new row stands for, ascending for each head.
    pub positions: *const u32,
    /// Elements from one head's positions to the next; 0: heads agree.
    pub position_stride_head: i64,
}

/// A plan for one sequence. The host fills `struct_size`, `layers` and `message` and zeroes the rest, which
/// is a keep.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhPlan {
    /// `sizeof(KvhPlan)` as the host knows it.
    pub struct_size: usize,
    /// `KVH_PLAN_*`.
    pub kind: i32,
    /// Why it is a keep: `KVH_REASON_*`.
    pub reason: i32,
    /// `KVH_PLAN_FLAG_*`.
    pub flags: u32,
    /// Zero.
    pub reserved0: u32,
    /// Position of the next token; read only with `KVH_PLAN_FLAG_MOVED_POSITIONS`.
    pub next_position: u64,
    /// `KvhLayerPlan` elements, one for each layer of the sequence, in order.
    pub layers: KvhArrayMut,
    /// Room for a sentence about the reason.
    pub message: *mut KvhText,
}

/// One call of a hook: the handle for memory and lent rows. Valid during the call only.
#[cfg_attr(feature = "abi-stable", repr(C), derive(abi_stable::StableAbi))]
pub struct KvhCall {
    _private: (),
}

/// The plugin's own state of one instance.
#[cfg_attr(feature = "abi-stable", repr(C), derive(abi_stable::StableAbi))]
pub struct KvhInstance {
    _private: (),
}

/// The host's own state behind its services.
#[cfg_attr(feature = "abi-stable", repr(C), derive(abi_stable::StableAbi))]
pub struct KvhHostState {
    _private: (),
}

/// Arguments of `bound`: all that a bound may depend on, besides config and model.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhBoundArgs {
    /// `sizeof(KvhBoundArgs)` as the host knows it.
    pub struct_size: usize,
    /// Name of the sequence.
    pub uid: u64,
    /// Commits so far.
    pub epoch: u64,
    /// Position of the next token.
    pub next_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// `uint64_t` elements: rows stored in each layer.
    pub lengths: KvhArray,
    /// `KvhSegment` elements.
    pub segments: KvhArray,
}

/// Answer of `bound`. `counts` is lent with each layer's length in it.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhBoundOut {
    /// `sizeof(KvhBoundOut)` as the host knows it.
    pub struct_size: usize,
    /// `uint64_t` elements: the most rows that each layer keeps. All equal to the lengths: keep.
    pub counts: KvhArrayMut,
    /// Why nothing would be gained: `KVH_REASON_*`.
    pub reason: i32,
    /// Zero.
    pub reserved0: u32,
}

/// Arguments of `on_prefill_done` and `on_grown`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhPrepareArgs {
    /// `sizeof(KvhPrepareArgs)` as the host knows it.
    pub struct_size: usize,
    /// For memory and lent rows.
    pub call: *mut KvhCall,
    /// `KvhSequence` elements.
    pub sequences: KvhArray,
    /// The engine's stream, or null on the CPU. Enqueue here, do not synchronise.
    pub stream: *mut c_void,
}

/// Answer of `on_prefill_done` and `on_grown`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhPrepareOut {
    /// `sizeof(KvhPrepareOut)` as the host knows it.
    pub struct_size: usize,
    /// `KvhPlan` elements, one for each sequence, in order.
    pub plans: KvhArrayMut,
}

/// The prompt's last token is in this call.
pub const KVH_STEP_PROMPT_ENDS: u32 = 1;

/// One sequence's part of a step.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhStepSequence {
    /// `sizeof(KvhStepSequence)` as the host knows it.
    pub struct_size: usize,
    /// Name of the sequence.
    pub uid: u64,
    /// Its first token in the batch: index on the first axis of the tensors.
    pub first_token: u64,
    /// Its tokens in this step.
    pub tokens: u64,
    /// Position of its first token.
    pub first_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// `KVH_STEP_*`.
    pub flags: u32,
    /// `KVH_PHASE_*`.
    pub phase: u32,
    /// This layer's rows before the step's K and V are written.
    pub cache: *const KvhLayer,
}

/// Arguments of `before_attention`. It looks and writes nothing of the engine's.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhBeforeAttentionArgs {
    /// `sizeof(KvhBeforeAttentionArgs)` as the host knows it.
    pub struct_size: usize,
    /// For memory.
    pub call: *mut KvhCall,
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
    /// `KvhStepSequence` elements: those of the batch that the instance asked for.
    pub sequences: KvhArray,
    /// The engine's stream, or null on the CPU. Enqueue here, do not synchronise.
    pub stream: *mut c_void,
}

/// The sequence was finished.
pub const KVH_FREE_FINISHED: i32 = 0;
/// Its request was cancelled.
pub const KVH_FREE_CANCELLED: i32 = 1;
/// It was preempted and will be computed again, under another uid.
pub const KVH_FREE_PREEMPTED: i32 = 2;
/// The whole cache was reset.
pub const KVH_FREE_RESET: i32 = 3;

/// Arguments of `on_free`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhOnFreeArgs {
    /// `sizeof(KvhOnFreeArgs)` as the host knows it.
    pub struct_size: usize,
    /// Name of the sequence.
    pub uid: u64,
    /// `KVH_FREE_*`.
    pub reason: i32,
    /// Zero.
    pub reserved0: u32,
    /// The engine's stream, or null on the CPU.
    pub stream: *mut c_void,
}

/// Hook point `kvh.on_prefill_done/1`: once for each sequence, when its prompt's KV is complete.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhOnPrefillDone1 {
    /// The most that a plan keeps for each layer; every rank must give the same answer.
    /// Thread: any. Serial for each instance. Pointers are valid during the call.
    /// Returns `KVH_OK`, `KVH_ERR_INVALID_ARGUMENT`, `KVH_ERR_INTERNAL`, `KVH_ERR_PANIC`, `KVH_ERR_POISONED`.
    pub bound: Option<
        unsafe extern "C" fn(
            instance: *mut KvhInstance,
            args: *const KvhBoundArgs,
            out: *mut KvhBoundOut,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
    /// Plans for one or several sequences. All layers are at hand; nothing of the cache may be written.
    /// Thread: the rank's. Serial for each instance. Pointers are valid during the call; what a plan
    /// points to must be valid until commit or drop.
    /// Returns `KVH_OK`, or any `KVH_ERR_*`: then every sequence of the call is kept.
    pub on_prefill_done: Option<
        unsafe extern "C" fn(
            instance: *mut KvhInstance,
            args: *const KvhPrepareArgs,
            out: *mut KvhPrepareOut,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
}

/// Hook point `kvh.on_grown/1`: each time a sequence has grown by `grown_every` tokens.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhOnGrown1 {
    /// As `bound` of [`KvhOnPrefillDone1`].
    pub bound: Option<
        unsafe extern "C" fn(
            instance: *mut KvhInstance,
            args: *const KvhBoundArgs,
            out: *mut KvhBoundOut,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
    /// As `on_prefill_done` of [`KvhOnPrefillDone1`].
    pub on_grown: Option<
        unsafe extern "C" fn(
            instance: *mut KvhInstance,
            args: *const KvhPrepareArgs,
            out: *mut KvhPrepareOut,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
}

/// Hook point `kvh.before_attention/1`: once for each layer and step, before the layer's K and V are written.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhBeforeAttention1 {
    /// Looks at queries, keys and values.
    /// Thread: the rank's. Serial for each instance. Pointers are valid during the call.
    /// Returns `KVH_OK`, or any `KVH_ERR_*`: then the call's sequences are kept uncompressed.
    pub before_attention: Option<
        unsafe extern "C" fn(
            instance: *mut KvhInstance,
            args: *const KvhBeforeAttentionArgs,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
}

/// Hook point `kvh.on_free/1`: when a sequence's KV goes away.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhOnFree1 {
    /// Drops what the plugin kept. Called exactly once for each sequence that any hook was called for.
    /// Thread: any. Serial for each instance. Pointers are valid during the call.
    /// Returns `KVH_OK`, or any `KVH_ERR_*`, which is logged.
    pub on_free: Option<
        unsafe extern "C" fn(instance: *mut KvhInstance, args: *const KvhOnFreeArgs, error: *mut KvhText) -> KvhStatus,
    >,
}

/// The most important messages.
pub const KVH_LOG_ERROR: i32 = 1;
/// Something that an operator should look at.
pub const KVH_LOG_WARN: i32 = 2;
/// What happened.
pub const KVH_LOG_INFO: i32 = 3;
/// For a plugin's author.
pub const KVH_LOG_DEBUG: i32 = 4;
/// Everything.
pub const KVH_LOG_TRACE: i32 = 5;

/// One log message.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhLogRecord {
    /// `sizeof(KvhLogRecord)` as the writer knows it.
    pub struct_size: usize,
    /// `KVH_LOG_*`.
    pub level: i32,
    /// Line in `file`; 0: not known.
    pub line: u32,
    /// Where it comes from: the plugin's module.
    pub target: KvhStr,
    /// The message, with its fields formatted in.
    pub message: KvhStr,
    /// Source file; may be empty.
    pub file: KvhStr,
}

/// Service `kvh.log/1`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhLog1 {
    /// The lowest importance that is wanted: `KVH_LOG_*`, 0 for nothing. Thread: any, concurrently.
    pub max_level: Option<unsafe extern "C" fn(host: *mut KvhHostState) -> i32>,
    /// Takes a message; the record is borrowed during the call. Thread: any, concurrently.
    pub write: Option<unsafe extern "C" fn(host: *mut KvhHostState, record: *const KvhLogRecord)>,
}

/// Until the work that this call enqueued is done.
pub const KVH_MEMORY_CALL: u32 = 0;
/// Until the ticket that this call makes for the sequence is committed or dropped.
pub const KVH_MEMORY_TICKET: u32 = 1;
/// Until the sequence's `on_free` has returned.
pub const KVH_MEMORY_SEQUENCE: u32 = 2;

/// A request for memory on the instance's device.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhAllocation {
    /// `sizeof(KvhAllocation)` as the plugin knows it.
    pub struct_size: usize,
    /// `KVH_MEMORY_*`.
    pub kind: u32,
    /// Zero.
    pub reserved0: u32,
    /// Index of the sequence in the call; for ticket and sequence memory.
    pub sequence: u64,
    /// Bytes; at least 1.
    pub bytes: u64,
    /// A power of two, at most 4096.
    pub alignment: u64,
}

/// Service `kvh.memory/1`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhMemory1 {
    /// Lends memory; the host frees it, in the stream's order, at the end of its kind's life.
    /// Thread: the one that called the hook, during the call.
    /// Returns `KVH_OK`, `KVH_ERR_INVALID_ARGUMENT`, `KVH_ERR_OUT_OF_MEMORY`.
    pub allocate: Option<
        unsafe extern "C" fn(
            host: *mut KvhHostState,
            call: *mut KvhCall,
            request: *const KvhAllocation,
            out: *mut *mut c_void,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
}

/// Service `kvh.rows/1`: rows for a rewrite.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhRows1 {
    /// Lends, for each layer of a sequence, as many rows as the bound says. The plugin gives an array of
    /// `KvhLayer` elements with `struct_size` filled; the host fills the rest (`length`: rows lent).
    /// Thread: the one that called `on_prefill_done` or `on_grown`, during the call. The rows are valid
    /// until the ticket is committed (they become the sequence's) or dropped.
    /// Returns `KVH_OK`, `KVH_ERR_INVALID_ARGUMENT`, `KVH_ERR_OUT_OF_MEMORY`, `KVH_ERR_UNSUPPORTED`.
    pub lend: Option<
        unsafe extern "C" fn(
            host: *mut KvhHostState,
            call: *mut KvhCall,
            sequence: u64,
            layers: KvhArrayMut,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
}

/// The host, as a plugin sees it. Valid as long as the instance.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhHost {
    /// `sizeof(KvhHost)` as the host knows it.
    pub struct_size: usize,
    /// To be handed back to every service.
    pub state: *mut KvhHostState,
    /// Major version that the host speaks.
    pub abi_major: u32,
    /// Minor version that the host speaks.
    pub abi_minor: u32,
    /// Name and version of the host, for messages.
    pub name: KvhStr,
    /// A frozen table by its id (`KVH_LOG_1`, ...), or null. Valid as long as the instance.
    /// Thread: any, concurrently.
    pub service: Option<unsafe extern "C" fn(state: *mut KvhHostState, id: KvhStr) -> *const c_void>,
}

/// Arguments of `create`.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhCreateArgs {
    /// `sizeof(KvhCreateArgs)` as the host knows it.
    pub struct_size: usize,
    /// The host. Valid as long as the instance.
    pub host: *const KvhHost,
    /// The model. Valid during the call.
    pub model: *const KvhModel,
    /// What the engine offers. Valid during the call.
    pub offers: *const KvhOffers,
    /// The config: JSON, or `key=value,key=value`; empty for the defaults. Valid during the call.
    pub config: KvhStr,
}

/// The layout of one generation of one struct, as its author compiled it. Frozen.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
#[derive(Clone, Copy)]
pub struct KvhFingerprint {
    /// Name of the struct.
    pub name: KvhStr,
    /// Generation: 1, 2, ...; each adds fields at the end.
    pub generation: u32,
    /// Zero.
    pub reserved0: u32,
    /// `KVH_FINGERPRINT_<name>_<generation>`.
    pub value: u64,
}

/// A plugin. Static, frozen; reading it runs no code of the plugin's.
#[repr(C)]
#[cfg_attr(feature = "abi-stable", derive(abi_stable::StableAbi))]
pub struct KvhPluginEntry {
    /// `sizeof(KvhPluginEntry)`.
    pub struct_size: usize,
    /// Major version that the plugin was built with.
    pub abi_major: u32,
    /// Minor version that the plugin was built with.
    pub abi_minor: u32,
    /// Oldest minor of a host that the plugin works with.
    pub required_host_minor: u32,
    /// Zero.
    pub reserved0: u32,
    /// Short name, as in a config: `truncate`.
    pub id: KvhStr,
    /// Version of the plugin.
    pub version: KvhStr,
    /// `KvhFingerprint` elements: every generation of every struct that the plugin knows.
    pub fingerprints: KvhArray,
    /// Makes an instance for one model and one rank. Everything that can be checked is checked here.
    /// Thread: any. Instances are independent. `*instance` is written only on `KVH_OK`.
    /// Returns `KVH_OK`, `KVH_ERR_CONFIG`, `KVH_ERR_UNSUPPORTED`, or any other `KVH_ERR_*`.
    pub create: Option<
        unsafe extern "C" fn(
            args: *const KvhCreateArgs,
            instance: *mut *mut KvhInstance,
            error: *mut KvhText,
        ) -> KvhStatus,
    >,
    /// Ends an instance; threads that it made are joined. Thread: any, no other call is running.
    pub destroy: Option<unsafe extern "C" fn(instance: *mut KvhInstance)>,
    /// What the instance needs. Called once, right after `create`. Thread: the same.
    /// Returns `KVH_OK`, or any `KVH_ERR_*`.
    pub needs: Option<
        unsafe extern "C" fn(instance: *mut KvhInstance, needs: *mut KvhNeeds, error: *mut KvhText) -> KvhStatus,
    >,
    /// A frozen table by its id (`KVH_ON_PREFILL_DONE_1`, ...), or null: not implemented. Thread: any,
    /// concurrently; the answer is static.
    pub hook: Option<unsafe extern "C" fn(id: KvhStr) -> *const c_void>,
}

/// Type of the one exported symbol, `kvh_plugin_entry_v1`. Returns a static, never null. Thread: any.
pub type KvhPluginEntryFn = unsafe extern "C" fn() -> *const KvhPluginEntry;
