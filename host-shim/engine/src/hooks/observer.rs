//! Shows the plugins what a rank is about to write and attend over.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use kvhook_abi::raw::*;
use kvhook_host::raw::KvhookStep;

use super::KvPlugins;
use super::views::{Buffers, array};
use crate::rank::{BatchSequence, LayerStep, Phase, StepObserver};

/// What a batch carries of a sequence for the plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTag {
    /// The host's name of the sequence; 0: none.
    pub uid: u64,
    /// Tokens that are prefill.
    pub prompt_length: u64,
    /// Phases in which a plugin wants to see it: `KVH_PHASE_*` bits.
    pub phases: u32,
}

/// The observer of one rank.
pub(super) struct Observer {
    pub(super) plugins: Arc<KvPlugins>,
    pub(super) rank: usize,
}

fn phase(phase: Phase) -> u32 {
    match phase {
        Phase::Prefill => KVH_PHASE_PREFILL,
        Phase::Decode => KVH_PHASE_DECODE,
    }
}

impl StepObserver for Observer {
    fn before_attention(&mut self, step: &LayerStep<'_>) {
        let wanted = self.plugins.wants(self.rank);
        let wants = |sequence: &&BatchSequence| wanted & sequence.tag.phases & phase(sequence.phase) != 0;
        if wanted == 0 || !step.batch.sequences.iter().any(|sequence| wants(&sequence)) {
            return;
        }
        let sequences: Vec<&BatchSequence> = step.batch.sequences.iter().filter(wants).collect();
        let caches: Vec<KvhLayer> = sequences.iter().map(|sequence| cache_of(step, sequence)).collect();
        let shown: Vec<KvhStepSequence> = sequences
            .iter()
            .zip(&caches)
            .map(|(sequence, cache)| KvhStepSequence {
                struct_size: size_of::<KvhStepSequence>(),
                uid: sequence.tag.uid,
                first_token: sequence.first_row as u64,
                tokens: sequence.rows as u64,
                first_position: sequence.first_position.into(),
                prompt_length: sequence.tag.prompt_length,
                flags: if sequence.prompt_ends { KVH_STEP_PROMPT_ENDS } else { 0 },
                phase: phase(sequence.phase),
                cache,
            })
            .collect();
        let (mut q, mut k, mut v) = (Shape::new(step, step.q), Shape::new(step, step.k), Shape::new(step, step.v));
        let (q, k, v) = (q.tensor(step.q), k.tensor(step.k), v.tensor(step.v));
        let raw = KvhookStep {
            struct_size: size_of::<KvhookStep>(),
            layer: step.layer as u32,
            reserved0: 0,
            q: &q,
            k: &k,
            v: &v,
            sequences: array(&shown),
            stream: ptr::null_mut(),
        };
        // SAFETY: tensors and rows are borrowed through `step` and described as they lie; nobody writes them meanwhile,
        // since this is the rank's own thread.
        if let Err(error) = unsafe { self.plugins.before_attention(self.rank, &raw) } {
            tracing::warn!(target: "kvhook", rank = self.rank, layer = step.layer, "{error}");
        }
    }
}

/// The rows of a sequence before the step.
fn cache_of(step: &LayerStep<'_>, sequence: &BatchSequence) -> KvhLayer {
    let layer = &sequence.layers[step.layer];
    let buffers = step.cache.peek(sequence.id, step.layer);
    let address = |buffer: &crate::cache::KvBuffer| buffer.as_ptr().cast_mut();
    let buffers = Buffers {
        k: address(buffers.k),
        v: address(buffers.v),
        layout: buffers.layout,
        dtype: buffers.k.dtype(),
        paged: step.cache.is_paged(),
    };
    buffers.describe(step.layer, step.shard.kv_heads.len(), layer.len, &layer.blocks)
}

/// Sizes and strides of `[rows, heads, head_dim]` without gaps.
struct Shape {
    sizes: [i64; 3],
    strides: [i64; 3],
}

impl Shape {
    fn new(step: &LayerStep<'_>, data: &[f32]) -> Self {
        let (rows, width) = (step.batch.rows.max(1), step.head_dim);
        let heads = data.len() / rows / width;
        Self {
            sizes: [step.batch.rows as i64, heads as i64, width as i64],
            strides: [(heads * width) as i64, width as i64, 1],
        }
    }

    fn tensor(&mut self, data: &[f32]) -> KvhTensor {
        KvhTensor {
            data: data.as_ptr().cast_mut().cast::<c_void>(),
            device: KvhDevice { device_type: KVH_DEVICE_CPU, device_id: 0 },
            ndim: 3,
            dtype: KvhDtype { code: KVH_DTYPE_FLOAT, bits: 32, lanes: 1 },
            shape: self.sizes.as_mut_ptr(),
            strides: self.strides.as_mut_ptr(),
            byte_offset: 0,
        }
    }
}
