//! Views of a sequence and its layers. They borrow the host's memory for the call.

use core::marker::PhantomData;

#[cfg(feature = "cuda")]
use kvhook_kernels::cuda;
use kvhook_kernels::{BlockTable, Dtype, IndexKind, Layout, Rows};

use crate::boundary::{Structs, Values};
use crate::error::PluginError;
use crate::offers::LayerKind;
use crate::raw::*;

/// One sequence, on one rank.
#[derive(Clone, Copy)]
pub struct SequenceView<'a> {
    raw: RawSequence,
    segments: Values<'a, KvhSegment>,
    layers: Structs<'a, KvhLayer>,
    on_cpu: bool,
}

/// The plain numbers of a [`KvhSequence`].
#[derive(Clone, Copy)]
struct RawSequence {
    uid: u64,
    epoch: u64,
    next_position: u64,
    prompt_length: u64,
    shared_rows: u64,
    queries_seen: u64,
    position_axes: u32,
}

impl<'a> SequenceView<'a> {
    /// # Safety
    /// The sequence's arrays are what the contract says, during `'a`.
    pub(crate) unsafe fn new(raw: &KvhSequence, on_cpu: bool) -> Result<Self, PluginError> {
        // SAFETY: passed on from the caller.
        let (segments, layers) =
            unsafe { (Values::new(raw.segments, "sequence.segments")?, Structs::new(raw.layers, "sequence.layers")?) };
        let raw = RawSequence {
            uid: raw.uid,
            epoch: raw.epoch,
            next_position: raw.next_position,
            prompt_length: raw.prompt_length,
            shared_rows: raw.shared_rows,
            queries_seen: raw.queries_seen,
            position_axes: raw.position_axes,
        };
        Ok(Self { raw, segments, layers, on_cpu })
    }

    /// Name of the sequence; never used again.
    pub fn uid(&self) -> u64 {
        self.raw.uid
    }

    /// Commits so far.
    pub fn epoch(&self) -> u64 {
        self.raw.epoch
    }

    /// Position of the next token: tokens seen so far, kept or not.
    pub fn next_position(&self) -> u64 {
        self.raw.next_position
    }

    /// Tokens of the prompt.
    pub fn prompt_length(&self) -> u64 {
        self.raw.prompt_length
    }

    /// Leading rows that other sequences use too.
    pub fn shared_rows(&self) -> u64 {
        self.raw.shared_rows
    }

    /// How many of the prompt's last queries `before_attention` has seen.
    pub fn queries_seen(&self) -> u64 {
        self.raw.queries_seen
    }

    /// Axes of a position: 3 for multimodal RoPE, else 1.
    pub fn position_axes(&self) -> u32 {
        self.raw.position_axes
    }

    /// Stretches of the prompt that have a kind, ascending; what none covers is text.
    pub fn segments(&self) -> Segments<'a> {
        Segments(self.segments)
    }

    /// Number of layers of the model.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Layer `index`.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] when there is no such layer or the host described it badly.
    pub fn layer(&self, index: usize) -> Result<LayerView<'a>, PluginError> {
        let raw = self.layers.get(index)?;
        Ok(LayerView::new(raw, self.raw.next_position, self.on_cpu).of_sequence(self.raw.uid))
    }

    /// All layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = Result<LayerView<'a>, PluginError>> + use<'a> {
        let this = *self;
        (0..this.layer_count()).map(move |index| this.layer(index))
    }
}

/// Stretches of a prompt.
#[derive(Clone, Copy)]
pub struct Segments<'a>(pub(crate) Values<'a, KvhSegment>);

/// Kind of a stretch of a prompt: `KVH_SEGMENT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Plain text.
    Text,
    /// Entries made from an image.
    Image,
    /// A kind that this version does not know.
    Unknown(u32),
}

/// A stretch of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its kind.
    pub kind: SegmentKind,
    /// Position of its first token.
    pub start: u64,
    /// Tokens.
    pub length: u64,
}

impl<'a> Segments<'a> {
    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + use<'a> {
        self.0.iter().map(|raw| Segment {
            kind: match raw.kind {
                KVH_SEGMENT_TEXT => SegmentKind::Text,
                KVH_SEGMENT_IMAGE => SegmentKind::Image,
                other => SegmentKind::Unknown(other),
            },
            start: raw.start,
            length: raw.length,
        })
    }

    /// Kind of the token at `position`; what no segment covers is text.
    pub fn kind_at(&self, position: u64) -> SegmentKind {
        self.iter()
            .find(|segment| position >= segment.start && position - segment.start < segment.length)
            .map_or(SegmentKind::Text, |segment| segment.kind)
    }
}

/// One layer of one sequence, on one rank.
#[derive(Clone, Copy)]
pub struct LayerView<'a> {
    raw: RawLayer,
    uid: Option<u64>,
    next_position: u64,
    on_cpu: bool,
    queries: Option<Queries<'a>>,
    marker: PhantomData<&'a KvhLayer>,
}

/// The plain fields of a [`KvhLayer`].
#[derive(Clone, Copy)]
struct RawLayer {
    layer: u32,
    kind: i32,
    flags: u32,
    window: u32,
    shared_with: i32,
    kv_heads: u32,
    block_size: u32,
    length: u64,
    k: KvhRows,
    v: KvhRows,
    table: KvhBlockTable,
    positions: KvhPositions,
}

// SAFETY: the view only describes memory that nobody writes while the hook that lent it runs, on whatever thread.
unsafe impl Send for LayerView<'_> {}
// SAFETY: as above.
unsafe impl Sync for LayerView<'_> {}

impl<'a> LayerView<'a> {
    /// A layer in ordinary memory, for whoever made its description: hosts and tests.
    ///
    /// # Safety
    /// What `raw` points to is as the contract says during `'a`.
    pub unsafe fn from_raw(raw: KvhLayer, next_position: u64) -> Self {
        Self::new(raw, next_position, true)
    }

    pub(crate) fn new(raw: KvhLayer, next_position: u64, on_cpu: bool) -> Self {
        let raw = RawLayer {
            layer: raw.layer,
            kind: raw.kind,
            flags: raw.flags,
            window: raw.window,
            shared_with: raw.shared_with,
            kv_heads: raw.kv_heads,
            block_size: raw.block_size,
            length: raw.length,
            k: raw.k,
            v: raw.v,
            table: raw.table,
            positions: raw.positions,
        };
        Self { raw, uid: None, next_position, on_cpu, queries: None, marker: PhantomData }
    }

    /// The same view, which knows its sequence.
    pub(crate) fn of_sequence(mut self, uid: u64) -> Self {
        self.uid = Some(uid);
        self
    }

    /// The same view, with the last queries of the sequence.
    pub(crate) fn with_queries(mut self, queries: Queries<'a>) -> Self {
        self.queries = Some(queries);
        self
    }

    /// Index of the layer in the model.
    pub fn index(&self) -> usize {
        self.raw.layer as usize
    }

    /// Name of the sequence; `None` for a view of [`Self::from_raw`].
    pub fn uid(&self) -> Option<u64> {
        self.uid
    }

    /// Position of the sequence's next token: tokens seen so far, kept or not.
    pub fn next_position(&self) -> u64 {
        self.next_position
    }

    /// What its cache holds.
    pub fn kind(&self) -> LayerKind {
        self.raw.kind.into()
    }

    /// Whether V lies inside the K rows: moving K moves V.
    pub fn v_inside_k(&self) -> bool {
        self.raw.flags & KVH_LAYER_FLAG_V_INSIDE_K != 0
    }

    /// Tokens that a sliding window sees; 0 otherwise.
    pub fn window(&self) -> usize {
        self.raw.window as usize
    }

    /// Layer whose cache this one reads.
    pub fn shared_with(&self) -> Option<usize> {
        usize::try_from(self.raw.shared_with).ok()
    }

    /// Whether plans are made for this layer: its tokens see everything and its cache is its own.
    pub fn is_planned(&self) -> bool {
        self.kind() == LayerKind::Full && self.shared_with().is_none()
    }

    /// KV heads of this rank.
    pub fn kv_heads(&self) -> usize {
        self.raw.kv_heads as usize
    }

    /// Tokens of a block; 0: contiguous.
    pub fn block_size(&self) -> usize {
        self.raw.block_size as usize
    }

    /// Rows that are stored now, the same for every head.
    pub fn length(&self) -> usize {
        self.raw.length as usize
    }

    /// K rows, `[kv_heads, length, head_dim]`, with RoPE applied. Only for reading, and only during the call: a
    /// [`Rows`] is a description like a pointer, which the compiler cannot tie to the call.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when there are no such rows, they lie on a device, or their dtype or layout is
    /// not one that the CPU kernels read.
    pub fn k(&self) -> Result<Rows, PluginError> {
        self.rows("K", &self.raw.k)
    }

    /// V rows, as [`Self::k`].
    ///
    /// # Errors
    /// As [`Self::k`].
    pub fn v(&self) -> Result<Rows, PluginError> {
        self.rows("V", &self.raw.v)
    }

    fn rows(&self, what: &str, raw: &KvhRows) -> Result<Rows, PluginError> {
        if !self.on_cpu {
            let why = "the rows lie on a device; this accessor reads ordinary memory".into();
            return Err(self.refuse(what, why));
        }
        let (layout, table) = self.describe(what, raw)?;
        // SAFETY: the contract makes `length` rows of each head, and the table behind them, readable during the
        // call, and nobody writes them meanwhile.
        unsafe { Rows::new(raw.base.cast(), layout, table) }.map_err(|error| self.refuse(what, error.to_string()))
    }

    fn refuse(&self, what: &str, why: String) -> PluginError {
        PluginError::Unsupported(format!("layer {}, {what}: {why}", self.index()))
    }

    /// Layout and block table of K or V, as the kernels name them.
    fn describe(&self, what: &str, raw: &KvhRows) -> Result<(Layout, Option<BlockTable>), PluginError> {
        let refuse = |why: String| self.refuse(what, why);
        if raw.base.is_null() && self.raw.length > 0 {
            return Err(refuse("there are no rows".into()));
        }
        let dtype = dtype(raw.dtype).ok_or_else(|| refuse(format!("dtype {}", dtype_name(raw.dtype))))?;
        let layout = Layout {
            dtype,
            head_dim: raw.head_dim as usize,
            kv_heads: self.kv_heads(),
            capacity: self.length(),
            stride_element: raw.stride_element as isize,
            stride_block: raw.stride_block as isize,
            stride_token: raw.stride_token as isize,
            stride_head: raw.stride_head as isize,
            block_size: self.block_size(),
        };
        let table = if self.raw.block_size == 0 || self.raw.table.data.is_null() {
            None
        } else {
            Some(BlockTable {
                data: self.raw.table.data.cast(),
                kind: index_kind(self.raw.table.dtype)
                    .ok_or_else(|| refuse(format!("block table of dtype {}", dtype_name(self.raw.table.dtype))))?,
                stride_head: self.raw.table.stride_head as isize,
                blocks: self.raw.table.count as usize,
            })
        };
        Ok((layout, table))
    }

    /// K rows on a CUDA device, as [`Self::k`]: for work that is enqueued during the call.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when there are no such rows, they lie in ordinary memory, or their dtype or layout
    /// is not one that the CUDA kernels read.
    #[cfg(feature = "cuda")]
    pub fn k_device(&self) -> Result<cuda::Rows, PluginError> {
        self.device_rows("K", &self.raw.k)
    }

    /// V rows on a CUDA device, as [`Self::k_device`].
    ///
    /// # Errors
    /// As [`Self::k_device`].
    #[cfg(feature = "cuda")]
    pub fn v_device(&self) -> Result<cuda::Rows, PluginError> {
        self.device_rows("V", &self.raw.v)
    }

    /// Positions of the rows on a CUDA device, for work that is enqueued during the call.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when the layer lies in ordinary memory; [`PluginError::InvalidArgument`] when the host
    /// described them badly.
    #[cfg(feature = "cuda")]
    pub fn positions_device(&self) -> Result<cuda::plan::Positions, PluginError> {
        if self.on_cpu {
            let why = "they lie in ordinary memory; this accessor is for a device".into();
            return Err(self.refuse("positions", why));
        }
        let KvhPositions { data, stride_head, count } = self.raw.positions;
        let invalid = |problem: String| PluginError::InvalidArgument(format!("layer {}: {problem}", self.index()));
        let stride_head = usize::try_from(stride_head).map_err(|_| invalid("a negative stride of positions".into()))?;
        let count = count as usize;
        let covered = if count == 0 { 0 } else { self.kv_heads().saturating_sub(1) * stride_head + count };
        // SAFETY: the contract makes `count` positions of each head readable for work enqueued during the call.
        let table =
            unsafe { cuda::DeviceSlice::new(data as u64, covered) }.map_err(|error| invalid(error.to_string()))?;
        let (length, next_position) = (self.length(), self.next_position as u32);
        Ok(cuda::plan::Positions { table, stride_head, count, length, next_position })
    }

    #[cfg(feature = "cuda")]
    fn device_rows(&self, what: &str, raw: &KvhRows) -> Result<cuda::Rows, PluginError> {
        if self.on_cpu {
            return Err(self.refuse(what, "the rows lie in ordinary memory; this accessor is for a device".into()));
        }
        let (layout, table) = self.describe(what, raw)?;
        // SAFETY: the contract makes `length` rows of each head, and the table behind them, readable for work enqueued
        // during the call, and nobody writes them before it.
        unsafe { cuda::Rows::new(raw.base as u64, layout, table) }.map_err(|error| self.refuse(what, error.to_string()))
    }

    /// Rows at the end that were appended since rows were dropped last: they stand for the last positions, without a gap.
    pub fn appended(&self) -> usize {
        self.raw.length.saturating_sub(self.raw.positions.count) as usize
    }

    /// Position that row `token` of `head` stands for; `None` outside the layer or where the positions lie on a
    /// device.
    pub fn position(&self, token: usize, head: usize) -> Option<u64> {
        if token >= self.length() || head >= self.kv_heads() {
            return None;
        }
        let positions = &self.raw.positions;
        if token as u64 >= positions.count {
            return self.next_position.checked_sub(self.raw.length - token as u64);
        }
        if !self.on_cpu || positions.data.is_null() {
            return None;
        }
        let offset = (head as i64).checked_mul(positions.stride_head)?.checked_add(token as i64)?;
        // SAFETY: the contract makes `count` positions of each head readable during the call.
        Some(u64::from(unsafe { positions.data.offset(offset as isize).read() }))
    }

    /// The last queries of the sequence in this layer, for a [`Scorer`](crate::scorer::Scorer) that asked for them.
    pub fn queries(&self) -> Option<Queries<'a>> {
        self.queries
    }
}

/// The last queries of a sequence in one layer: f32, `[tokens, q_heads, head_dim]`, oldest first, with RoPE applied.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    data: &'a [f32],
    q_heads: usize,
    head_dim: usize,
}

impl<'a> Queries<'a> {
    pub(crate) fn new(data: &'a [f32], q_heads: usize, head_dim: usize) -> Self {
        Self { data, q_heads, head_dim }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.data.len().checked_div(self.q_heads * self.head_dim).unwrap_or(0)
    }

    /// Query heads.
    pub fn q_heads(&self) -> usize {
        self.q_heads
    }

    /// Channels of a query.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// All values.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// The query of one token and head, if there is one.
    pub fn query(&self, token: usize, q_head: usize) -> Option<&'a [f32]> {
        if q_head >= self.q_heads {
            return None;
        }
        let start = (token * self.q_heads + q_head) * self.head_dim;
        self.data.get(start..start + self.head_dim)
    }
}

/// The kernels' name of an element type, if they know it.
pub fn dtype(raw: KvhDtype) -> Option<Dtype> {
    match (raw.code, raw.bits, raw.lanes) {
        (KVH_DTYPE_FLOAT, 32, 1) => Some(Dtype::F32),
        (KVH_DTYPE_FLOAT, 16, 1) => Some(Dtype::F16),
        (KVH_DTYPE_BFLOAT, 16, 1) => Some(Dtype::Bf16),
        _ => None,
    }
}

/// The kernels' name of a block table's type, if they know it.
pub fn index_kind(raw: KvhDtype) -> Option<IndexKind> {
    match (raw.code, raw.bits, raw.lanes) {
        (KVH_DTYPE_INT, 32, 1) => Some(IndexKind::I32),
        (KVH_DTYPE_INT, 64, 1) => Some(IndexKind::I64),
        (KVH_DTYPE_UINT, 32, 1) => Some(IndexKind::U32),
        _ => None,
    }
}

/// An element type in words, for messages.
pub fn dtype_name(raw: KvhDtype) -> String {
    let kind = match raw.code {
        KVH_DTYPE_INT => "i",
        KVH_DTYPE_UINT => "u",
        KVH_DTYPE_FLOAT => "f",
        KVH_DTYPE_BFLOAT => "bf",
        code => return format!("code {code} with {} bits and {} lanes", raw.bits, raw.lanes),
    };
    if raw.lanes == 1 { format!("{kind}{}", raw.bits) } else { format!("{kind}{}x{}", raw.bits, raw.lanes) }
}
