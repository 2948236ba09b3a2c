//! The last queries of each sequence, kept in memory of the host's.

use std::collections::HashMap;
use std::ptr::NonNull;

use kvhook_abi::PluginError;
use kvhook_abi::call::{Call, Memory};
use kvhook_abi::offers::Phases;
use kvhook_abi::step::StepView;
use kvhook_kernels::Rows;

/// The last `window` queries of each layer of each sequence.
pub struct Windows {
    window: usize,
    layers: usize,
    sequences: HashMap<u64, Vec<Option<Ring>>>,
}

impl Windows {
    /// For sequences of a model with so many layers.
    pub fn new(window: usize, layers: usize) -> Self {
        Self { window, layers, sequences: HashMap::new() }
    }

    /// Keeps what it wants of one layer of one step.
    ///
    /// # Errors
    /// The host refused memory or described the step badly.
    pub fn see(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        let queries = step.q()?;
        for index in 0..step.len() {
            let sequence = step.sequence(index)?;
            let end = sequence.first_position + sequence.tokens as u64;
            // Older queries of a prompt can never be among its last ones.
            let ends_at = if sequence.phase == Phases::PREFILL { sequence.prompt_length.max(end) } else { end };
            let first = sequence.first_position.max(ends_at.saturating_sub(self.window as u64));
            if first >= end {
                continue;
            }
            let rings = self.sequences.entry(sequence.uid).or_insert_with(|| vec![None; self.layers]);
            let ring = rings.get_mut(step.layer()).ok_or_else(|| {
                PluginError::InvalidArgument(format!("layer {} of a model with {}", step.layer(), self.layers))
            })?;
            let width = queries.kv_heads() * queries.head_dim();
            let ring = match ring {
                Some(ring) => ring,
                None => ring.insert(Ring::new(call, index, self.window, width)?),
            };
            for position in first..end {
                let token = sequence.first_token + (position - sequence.first_position) as usize;
                ring.push(position, &queries, token)?;
            }
        }
        Ok(())
    }

    /// The last queries of one layer of a sequence.
    pub fn get(&self, uid: u64, layer: usize) -> Option<&Ring> {
        self.sequences.get(&uid)?.get(layer)?.as_ref()
    }

    /// Forgets a sequence, whose memory the host takes back.
    pub fn forget(&mut self, uid: u64) {
        self.sequences.remove(&uid);
    }
}

/// A ring of queries: that of position `p` stands in slot `p % window`.
#[derive(Clone)]
pub struct Ring {
    /// `[window, q_heads, head_dim]`, f32, until the sequence is freed.
    data: NonNull<f32>,
    window: usize,
    /// Elements of one position.
    width: usize,
    /// Position behind the newest query.
    end: u64,
    /// Queries without a gap before `end`.
    held: usize,
}

// SAFETY: the memory belongs to this ring alone until the host takes it back, after `on_free`, which forgets the ring.
unsafe impl Send for Ring {}

impl Ring {
    fn new(call: &Call<'_>, sequence: usize, window: usize, width: usize) -> Result<Self, PluginError> {
        let bytes = window * width * size_of::<f32>();
        let data = call.allocate_raw(Memory::Sequence(sequence), bytes, align_of::<f32>())?.cast::<f32>();
        // SAFETY: the host lent so many bytes, aligned.
        unsafe { data.as_ptr().write_bytes(0, window * width) };
        Ok(Self { data, window, width, end: 0, held: 0 })
    }

    fn push(&mut self, position: u64, queries: &Rows, token: usize) -> Result<(), PluginError> {
        if queries.kv_heads() * queries.head_dim() != self.width {
            return Err(PluginError::InvalidArgument(format!(
                "a query has {} elements; the sequence's earlier ones had {}",
                queries.kv_heads() * queries.head_dim(),
                self.width
            )));
        }
        if position != self.end {
            self.held = 0;
        }
        let slot = (position % self.window as u64) as usize;
        // SAFETY: the slot lies inside the ring's memory, which nobody else uses.
        let slot = unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().add(slot * self.width), self.width) };
        for (head, query) in slot.chunks_exact_mut(queries.head_dim()).enumerate() {
            queries.load(token, head, query).map_err(|error| PluginError::InvalidArgument(error.to_string()))?;
        }
        self.end = position + 1;
        self.held = (self.held + 1).min(self.window);
        Ok(())
    }

    /// Position behind the newest query.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Queries without a gap before [`Self::end`].
    pub fn held(&self) -> usize {
        self.held
    }

    /// The last `count` queries (at most [`Self::held`]), oldest first, `[count, q_heads, head_dim]`.
    pub fn last(&self, count: usize) -> Vec<f32> {
        let count = count.min(self.held);
        let mut out = Vec::with_capacity(count * self.width);
        for position in self.end - count as u64..self.end {
            let slot = (position % self.window as u64) as usize;
            // SAFETY: as in `push`.
            out.extend_from_slice(unsafe {
                std::slice::from_raw_parts(self.data.as_ptr().add(slot * self.width), self.width)
            });
        }
        out
    }
}
