//! What `before_attention` shows: one layer of one step of a batch.

#[cfg(feature = "cuda")]
use kvhook_kernels::cuda;
use kvhook_kernels::{Dtype, Layout, Rows};

use crate::boundary::{self, Structs};
use crate::error::PluginError;
use crate::offers::Phases;
use crate::raw::*;
use crate::view::{LayerView, dtype, dtype_name};

/// One layer of one step: the batch's queries, new keys and new values.
#[derive(Clone, Copy)]
pub struct StepView<'a> {
    layer: u32,
    q: *const KvhTensor,
    k: *const KvhTensor,
    v: *const KvhTensor,
    sequences: Structs<'a, KvhStepSequence>,
    on_cpu: bool,
}

impl<'a> StepView<'a> {
    /// # Safety
    /// The arguments' pointers are what the contract says, during `'a`.
    #[inline]
    pub(crate) unsafe fn new(raw: &KvhBeforeAttentionArgs, on_cpu: bool) -> Result<Self, PluginError> {
        // SAFETY: passed on from the caller.
        let sequences = unsafe { Structs::new(raw.sequences, "args.sequences")? };
        Ok(Self { layer: raw.layer, q: raw.q, k: raw.k, v: raw.v, sequences, on_cpu })
    }

    /// Index of the layer.
    pub fn layer(&self) -> usize {
        self.layer as usize
    }

    /// Queries, `[tokens, q_heads, head_dim]`, with RoPE applied, as rows by token and head. Only for reading, and
    /// only during the call.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when the tensor lies on a device or has a dtype that the CPU kernels do not read;
    /// [`PluginError::InvalidArgument`] when it is null or has not three axes.
    pub fn q(&self) -> Result<Rows, PluginError> {
        self.tensor("args.q", self.q)
    }

    /// New keys, `[tokens, kv_heads, head_dim]`, with RoPE applied. As [`Self::q`].
    ///
    /// # Errors
    /// As [`Self::q`].
    pub fn k(&self) -> Result<Rows, PluginError> {
        self.tensor("args.k", self.k)
    }

    /// New values, `[tokens, kv_heads, head_dim]`. As [`Self::q`].
    ///
    /// # Errors
    /// As [`Self::q`].
    pub fn v(&self) -> Result<Rows, PluginError> {
        self.tensor("args.v", self.v)
    }

    /// Number of sequences of the batch that the instance asked for.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequence `index` of the step.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] when there is no such sequence or the host described it badly.
    pub fn sequence(&self, index: usize) -> Result<StepSequence<'a>, PluginError> {
        let raw = self.sequences.get(index)?;
        let cache = if raw.cache.is_null() {
            None
        } else {
            // SAFETY: not null, so the contract says that it points to a layer, during the call.
            let layer = unsafe { boundary::read(raw.cache, "sequence.cache")? };
            Some(LayerView::new(layer, raw.first_position, self.on_cpu).of_sequence(raw.uid))
        };
        Ok(StepSequence {
            uid: raw.uid,
            first_token: raw.first_token as usize,
            tokens: raw.tokens as usize,
            first_position: raw.first_position,
            prompt_length: raw.prompt_length,
            prompt_ends: raw.flags & KVH_STEP_PROMPT_ENDS != 0,
            phase: Phases(raw.phase),
            cache,
        })
    }

    /// All sequences, in order.
    pub fn sequences(&self) -> impl Iterator<Item = Result<StepSequence<'a>, PluginError>> + use<'a> {
        let this = *self;
        (0..this.len()).map(move |index| this.sequence(index))
    }

    /// Queries on a CUDA device, as [`Self::q`]: for work that is enqueued during the call.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when the tensor lies in ordinary memory or has a dtype that the CUDA kernels do not
    /// read; [`PluginError::InvalidArgument`] when it is null or has not three axes.
    #[cfg(feature = "cuda")]
    pub fn q_device(&self) -> Result<cuda::Rows, PluginError> {
        self.device_tensor("args.q", self.q)
    }

    /// New keys on a CUDA device. As [`Self::q_device`].
    ///
    /// # Errors
    /// As [`Self::q_device`].
    #[cfg(feature = "cuda")]
    pub fn k_device(&self) -> Result<cuda::Rows, PluginError> {
        self.device_tensor("args.k", self.k)
    }

    /// New values on a CUDA device. As [`Self::q_device`].
    ///
    /// # Errors
    /// As [`Self::q_device`].
    #[cfg(feature = "cuda")]
    pub fn v_device(&self) -> Result<cuda::Rows, PluginError> {
        self.device_tensor("args.v", self.v)
    }

    #[cfg(feature = "cuda")]
    fn device_tensor(&self, name: &str, tensor: *const KvhTensor) -> Result<cuda::Rows, PluginError> {
        let (base, layout) = describe(name, tensor, KVH_DEVICE_CUDA)?;
        // SAFETY: the contract makes every element of the tensor readable for work enqueued during the call.
        unsafe { cuda::Rows::new(base as u64, layout, None) }
            .map_err(|error| PluginError::InvalidArgument(format!("`{name}` is refused: {error}")))
    }

    fn tensor(&self, name: &str, tensor: *const KvhTensor) -> Result<Rows, PluginError> {
        let (base, layout) = describe(name, tensor, KVH_DEVICE_CPU)?;
        // SAFETY: the contract makes every element of the tensor readable during the call.
        unsafe { Rows::new(base, layout, None) }
            .map_err(|error| PluginError::InvalidArgument(format!("`{name}` is refused: {error}")))
    }
}

/// Address and layout of a tensor on a device of the wanted type.
fn describe(name: &str, tensor: *const KvhTensor, device_type: i32) -> Result<(*mut u8, Layout), PluginError> {
    let invalid = |why: String| PluginError::InvalidArgument(format!("`{name}` {why}"));
    if tensor.is_null() {
        return Err(invalid("is null".into()));
    }
    // SAFETY: not null, so the contract says that it points to a tensor, during the call.
    let tensor = unsafe { &*tensor };
    if tensor.ndim != 3 || tensor.shape.is_null() || tensor.strides.is_null() {
        return Err(invalid(format!("has {} axes; expected [tokens, heads, head_dim] with strides", tensor.ndim)));
    }
    if tensor.device.device_type != device_type {
        return Err(PluginError::Unsupported(format!(
            "`{name}` lies on a device of type {}; this accessor reads one of type {device_type} (1: ordinary memory)",
            tensor.device.device_type
        )));
    }
    // SAFETY: three axes, so three sizes and three strides.
    let (shape, strides) = unsafe { (*tensor.shape.cast::<[i64; 3]>(), *tensor.strides.cast::<[i64; 3]>()) };
    let dtype: Dtype = dtype(tensor.dtype)
        .ok_or_else(|| PluginError::Unsupported(format!("`{name}` has dtype {}", dtype_name(tensor.dtype))))?;
    let size = |axis: usize| {
        usize::try_from(shape[axis]).map_err(|_| invalid(format!("has size {} on axis {axis}", shape[axis])))
    };
    let bytes = |axis: usize| strides[axis] as isize * dtype.size() as isize;
    let layout = Layout {
        dtype,
        head_dim: size(2)?,
        kv_heads: size(1)?,
        capacity: size(0)?,
        stride_element: bytes(2),
        stride_block: 0,
        stride_token: bytes(0),
        stride_head: bytes(1),
        block_size: 0,
    };
    Ok((tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize), layout))
}

/// One sequence's part of a step.
#[derive(Clone, Copy)]
pub struct StepSequence<'a> {
    /// Name of the sequence.
    pub uid: u64,
    /// Its first token in the batch: index on the tensors' first axis.
    pub first_token: usize,
    /// Its tokens in this step.
    pub tokens: usize,
    /// Position of its first token.
    pub first_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    /// The prompt's last token is in this step.
    pub prompt_ends: bool,
    /// Prefill or decode.
    pub phase: Phases,
    /// The layer's rows before the step's K and V are written.
    pub cache: Option<LayerView<'a>>,
}
