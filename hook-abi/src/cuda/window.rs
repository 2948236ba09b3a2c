//! The last queries of each sequence, kept in the device's memory.

use std::collections::HashMap;
use std::ops::Range;

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::select::{Gather, gather};
use kvhook_kernels::cuda::window_attention::WindowQueries;
use kvhook_kernels::cuda::{Device, DeviceSlice, Rows};
use kvhook_kernels::{Dtype, Layout};

use crate::call::{Call, Memory};
use crate::error::PluginError;
use crate::offers::Phases;
use crate::step::{StepSequence, StepView};
use crate::view::{LayerView, SequenceView};

/// The last `window` queries of each layer of each sequence, in the queries' own dtype: memory of the sequence's kind,
/// `window * q_heads * head_dim * dtype` bytes a layer.
pub struct Windows {
    window: usize,
    layers: usize,
    sequences: HashMap<u64, OfSequence>,
}

/// What is known of one sequence.
struct OfSequence {
    rings: Vec<Option<Ring>>,
    /// What the last plan keeps at the end of each layer, and the number of commits when it has been carried out.
    planned: (u64, Vec<usize>),
    /// The same of the plan that was carried out last.
    done: (u64, Vec<usize>),
}

/// A ring of queries: that of position `p` stands in slot `(p - origin) % window`.
#[derive(Clone, Copy)]
struct Ring {
    rows: Rows,
    origin: u64,
    /// Position behind the newest query.
    end: u64,
    /// Queries without a gap before `end`.
    held: usize,
}

/// The last queries of one layer of a sequence, oldest first.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// `[tokens, q_heads, head_dim]`: query heads stand for KV heads. In ring order where it turns.
    pub queries: Rows,
    /// The slot of the oldest.
    start: usize,
    /// Queries.
    pub tokens: usize,
}

impl Windows {
    /// For sequences of a model with so many layers.
    pub fn new(window: usize, layers: usize) -> Self {
        Self { window, layers, sequences: HashMap::new() }
    }

    /// Enqueues the copy of what it keeps of one layer of one step: one launch.
    ///
    /// # Errors
    /// The host refused memory or described the step badly; the device failed.
    pub fn see(&mut self, device: &Device, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        let queries = step.q_device()?;
        let mut copies = Vec::new();
        for index in 0..step.len() {
            let sequence = step.sequence(index)?;
            let end = sequence.first_position + sequence.tokens as u64;
            // Older queries of a prompt can never be among its last ones.
            let ends_at = if sequence.phase == Phases::PREFILL { sequence.prompt_length.max(end) } else { end };
            let wanted = ends_at.saturating_sub(self.window as u64);
            let first = sequence.first_position.max(wanted);
            if first < end {
                let ring = self.ring(call, index, step.layer(), &sequence, wanted, &queries)?;
                ring.push(first..end, &sequence, &queries, &mut copies);
            }
        }
        if !copies.is_empty() {
            gather(device, call.cuda_stream()?, &copies, None, DeviceSlice::empty())?;
        }
        Ok(())
    }

    fn ring(
        &mut self,
        call: &Call<'_>,
        index: usize,
        layer: usize,
        sequence: &StepSequence<'_>,
        origin: u64,
        queries: &Rows,
    ) -> Result<&mut Ring, PluginError> {
        let layers = self.layers;
        let of_sequence = self.sequences.entry(sequence.uid).or_insert_with(|| OfSequence {
            rings: vec![None; layers],
            planned: (0, vec![0; layers]),
            done: (0, vec![0; layers]),
        });
        let ring = of_sequence
            .rings
            .get_mut(layer)
            .ok_or_else(|| PluginError::InvalidArgument(format!("layer {layer} of a model with {layers}")))?;
        let shape = |rows: &Rows| (rows.dtype(), rows.kv_heads(), rows.head_dim());
        match ring {
            Some(ring) if shape(&ring.rows) != shape(queries) => Err(PluginError::InvalidArgument(format!(
                "a query has {} heads of {}; the sequence's earlier ones had {} of {}",
                queries.kv_heads(),
                queries.head_dim(),
                ring.rows.kv_heads(),
                ring.rows.head_dim()
            ))),
            Some(ring) => Ok(ring),
            None => {
                let (dtype, heads, dim) = shape(queries);
                let rows = dense(call, Memory::Sequence(index), dtype, self.window, heads, dim)?;
                Ok(ring.insert(Ring { rows, origin, end: 0, held: 0 }))
            }
        }
    }

    /// The last queries of one layer, of tokens whose rows are still all there, and no more than the window. None when no
    /// such query is held, or tokens came since whose queries were not seen.
    ///
    /// # Errors
    /// [`PluginError::Unsupported`] when the queries have another dtype than the layer's keys; those of
    /// [`LayerView::k_device`].
    pub fn get(&self, sequence: &SequenceView<'_>, layer: &LayerView<'_>) -> Result<Option<Window>, PluginError> {
        let of_sequence = self.sequences.get(&sequence.uid());
        let ring =
            of_sequence.and_then(|of_sequence| Some((of_sequence, of_sequence.rings.get(layer.index())?.as_ref()?)));
        let Some((of_sequence, ring)) = ring.filter(|(_, ring)| ring.end == sequence.next_position()) else {
            return Ok(None);
        };
        let (queries, keys) = (ring.rows.dtype(), layer.k_device()?.dtype());
        if queries != keys {
            return Err(PluginError::Unsupported(format!(
                "layer {}: queries are {queries} and keys {keys}; on a device both must have one dtype",
                layer.index()
            )));
        }
        // Behind the rows that were appended lie those that the plan kept at the end.
        let kept = [&of_sequence.planned, &of_sequence.done].into_iter().find(|(epoch, _)| *epoch == sequence.epoch());
        let kept = kept.and_then(|(_, kept)| kept.get(layer.index()).copied()).unwrap_or(0);
        let in_place = layer.appended().saturating_add(kept).min(layer.length());
        let tokens = in_place.min(self.window);
        if tokens == 0 || ring.held < tokens {
            return Ok(None);
        }
        let start = ((ring.end - tokens as u64).wrapping_sub(ring.origin) % self.window as u64) as usize;
        Ok(Some(Window { queries: ring.rows, start, tokens }))
    }

    /// Says how many rows at a layer's end a plan keeps, so that they are known to be in place when it has been carried out.
    pub fn planned(&mut self, sequence: &SequenceView<'_>, layer: usize, kept_at_the_end: usize) {
        let Some(of_sequence) = self.sequences.get_mut(&sequence.uid()) else { return };
        let epoch = sequence.epoch() + 1;
        if of_sequence.planned.0 != epoch {
            of_sequence.done = core::mem::replace(&mut of_sequence.planned, (epoch, vec![0; self.layers]));
        }
        if let Some(kept) = of_sequence.planned.1.get_mut(layer) {
            *kept = kept_at_the_end;
        }
    }

    /// Forgets a sequence, whose memory the host takes back.
    pub fn forget(&mut self, uid: u64) {
        self.sequences.remove(&uid);
    }
}

impl Ring {
    fn push(&mut self, positions: Range<u64>, sequence: &StepSequence<'_>, queries: &Rows, copies: &mut Vec<Gather>) {
        let window = self.rows.capacity();
        if positions.start != self.end {
            self.held = 0;
            self.origin = self.origin.min(positions.start);
        }
        let mut position = positions.start;
        while position < positions.end {
            let slot = ((position - self.origin) % window as u64) as usize;
            let count = (window - slot).min((positions.end - position) as usize);
            let token = sequence.first_token + (position - sequence.first_position) as usize;
            copies.push(Gather {
                source: *queries,
                destination: self.rows,
                indices: Indices::none(),
                tail: token..token + count,
                destination_start: slot,
            });
            position += count as u64;
        }
        self.held = (self.held + (positions.end - positions.start) as usize).min(window);
        self.end = positions.end;
    }
}

impl Window {
    /// The queries in their order, with the usual scale, for [`window_attention`](super::window_attention): those of a ring
    /// that turns are copied into memory of the call, in one launch for all.
    ///
    /// # Errors
    /// The host refused memory; the device failed.
    pub fn in_order(windows: &[Self], device: &Device, call: &Call<'_>) -> Result<Vec<WindowQueries>, PluginError> {
        let mut copies = Vec::new();
        let mut ordered = Vec::with_capacity(windows.len());
        for &Self { queries, start, tokens } in windows {
            let (dtype, heads, dim) = (queries.dtype(), queries.kv_heads(), queries.head_dim());
            let position_bytes = heads * dim * dtype.size();
            let before_turn = queries.capacity() - start;
            let first = if tokens <= before_turn {
                queries.base() + (start * position_bytes) as u64
            } else {
                let copy = dense(call, Memory::Call, dtype, tokens, heads, dim)?;
                for (tail, destination_start) in
                    [(start..start + before_turn, 0), (0..tokens - before_turn, before_turn)]
                {
                    let indices = Indices::none();
                    copies.push(Gather { source: queries, destination: copy, indices, tail, destination_start });
                }
                copy.base()
            };
            ordered.push(WindowQueries {
                // SAFETY: so many positions, which the host lends until the call's work is done at least.
                data: unsafe { DeviceSlice::new(first, tokens * position_bytes)? },
                dtype,
                window: tokens,
                query_heads: heads,
                stride_position: heads * dim,
                stride_head: dim,
                scale: 1.0 / (dim as f32).sqrt(),
            });
        }
        if !copies.is_empty() {
            gather(device, call.cuda_stream()?, &copies, None, DeviceSlice::empty())?;
        }
        Ok(ordered)
    }
}

/// Rows `[tokens, heads, head_dim]` in memory of the host's.
fn dense(
    call: &Call<'_>,
    memory: Memory,
    dtype: Dtype,
    tokens: usize,
    heads: usize,
    head_dim: usize,
) -> Result<Rows, PluginError> {
    let bytes = tokens * heads * head_dim * dtype.size();
    let memory = call.device_memory::<u8>(memory, bytes)?;
    // SAFETY: so many bytes, lent by the host to this plugin alone.
    Ok(unsafe { Rows::new(memory.address(), Layout::token_major(dtype, heads, tokens, head_dim), None)? })
}
