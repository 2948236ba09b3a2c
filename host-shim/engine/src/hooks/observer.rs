//! Shows the plugins what a rank is about to write and attend over.

use std::sync::Arc;

use kvhook_abi::raw::*;
use kvhook_host::raw::KvhookStep;

use super::KvPlugins;
use super::views::{Buffers, array, dtype};
use crate::rank::{Batch, BatchSequence, HeadRows, LayerStep, Phase, StepObserver};

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

/// Whether a plugin that wants `phases` on this rank wants to see a sequence's part of a step.
fn is_wanted(phases: u32, sequence: &BatchSequence) -> bool {
    phases & sequence.tag.phases & phase(sequence.phase) != 0
}

impl StepObserver for Observer {
    fn wants(&self, batch: &Batch) -> bool {
        let phases = self.plugins.wants(self.rank);
        phases != 0 && batch.sequences.iter().any(|sequence| is_wanted(phases, sequence))
    }

    fn before_attention(&mut self, step: &LayerStep<'_>) {
        let phases = self.plugins.wants(self.rank);
        let places = step.batch.sequences.iter().enumerate();
        let sequences: Vec<_> = places.filter(|(_, sequence)| is_wanted(phases, sequence)).collect();
        if sequences.is_empty() {
            return;
        }
        let caches: Vec<KvhLayer> =
            sequences.iter().map(|&(place, sequence)| cache_of(step, place, sequence)).collect();
        let shown: Vec<KvhStepSequence> = sequences
            .iter()
            .zip(&caches)
            .map(|((_, sequence), cache)| KvhStepSequence {
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
        let [mut q, mut k, mut v] = [step.q, step.k, step.v].map(Shape::new);
        let (q, k, v) = (q.tensor(step), k.tensor(step), v.tensor(step));
        let raw = KvhookStep {
            struct_size: size_of::<KvhookStep>(),
            layer: step.layer as u32,
            reserved0: 0,
            q: &q,
            k: &k,
            v: &v,
            sequences: array(&shown),
            stream: step.backend.stream(),
        };
        // SAFETY: tensors and rows are borrowed through `step` and described as they lie; nobody writes them meanwhile,
        // since this is the rank's own thread, and on a CUDA device the work that writes them is enqueued behind this.
        if let Err(error) = unsafe { self.plugins.before_attention(self.rank, &raw) } {
            tracing::warn!(target: "kvhook", rank = self.rank, layer = step.layer, "{error}");
        }
    }
}

/// The rows of a sequence before the step.
fn cache_of(step: &LayerStep<'_>, place: usize, sequence: &BatchSequence) -> KvhLayer {
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
    let mut described = buffers.describe(step.layer, step.shard.kv_heads.len(), layer.len, &layer.blocks);
    if let Some(&table) = step.tables.get(place)
        && !described.table.data.is_null()
    {
        described.table.data = table as *const _;
    }
    described
}

/// Sizes and strides of some heads' rows.
struct Shape<'a> {
    rows: HeadRows<'a>,
    sizes: [i64; 3],
    strides: [i64; 3],
}

impl<'a> Shape<'a> {
    fn new(rows: HeadRows<'a>) -> Self {
        let sizes = [rows.rows as i64, rows.heads as i64, rows.head_dim as i64];
        Self { rows, sizes, strides: [rows.stride as i64, rows.head_dim as i64, 1] }
    }

    fn tensor(&mut self, step: &LayerStep<'_>) -> KvhTensor {
        KvhTensor {
            data: self.rows.address.cast_mut(),
            device: step.backend.device(),
            ndim: 3,
            dtype: dtype(self.rows.dtype),
            shape: self.sizes.as_mut_ptr(),
            strides: self.strides.as_mut_ptr(),
            byte_offset: 0,
        }
    }
}
