//! Requests for plans, and the plans that a plugin fills.

use core::ffi::c_void;

use kvhook_kernels::Rows;
#[cfg(feature = "cuda")]
use kvhook_kernels::cuda::{self, DeviceSlice};

use crate::boundary::{self, Growing, Slots, Structs};
use crate::call::{Call, Element, Memory};
use crate::error::PluginError;
use crate::offers::Reason;
use crate::raw::*;
use crate::view::{LayerView, SequenceView};

/// The sequences of one call, each with the plan that is to be filled.
pub struct Requests<'a> {
    call: Call<'a>,
    sequences: Structs<'a, KvhSequence>,
    plans: Slots,
    next: usize,
}

impl<'a> Requests<'a> {
    /// # Safety
    /// Arguments and answer are what the contract says, during `'a`, and no other reference to the plans exists.
    pub(crate) unsafe fn new(call: Call<'a>, sequences: KvhArray, plans: KvhArrayMut) -> Result<Self, PluginError> {
        // SAFETY: passed on from the caller.
        let sequences: Structs<'a, KvhSequence> = unsafe { Structs::new(sequences, "args.sequences")? };
        let plans = Slots::new::<KvhPlan>(plans, KvhPlan::FIRST_SIZE, "out.plans")?;
        if plans.len() != sequences.len() {
            return Err(PluginError::InvalidArgument(format!(
                "`out.plans` has {} elements for {} sequences",
                plans.len(),
                sequences.len()
            )));
        }
        Ok(Self { call, sequences, plans, next: 0 })
    }

    /// Number of sequences that are still to come.
    pub fn len(&self) -> usize {
        self.sequences.len() - self.next
    }

    /// Whether none is to come.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> Iterator for Requests<'a> {
    type Item = Result<Request<'a>, PluginError>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next;
        (index < self.sequences.len()).then(|| {
            self.next += 1;
            let raw = self.sequences.get(index)?;
            // SAFETY: `new` was promised that the arguments are what the contract says.
            let sequence = unsafe { SequenceView::new(&raw, self.call.on_cpu())? };
            let plan = Plan::new(self.call, index, self.plans.pointer(index), sequence)?;
            Ok(Request { sequence, plan })
        })
    }
}

/// One sequence and its plan, which is a keep until it is filled.
pub struct Request<'a> {
    /// The sequence.
    pub sequence: SequenceView<'a>,
    /// Its plan.
    pub plan: Plan<'a>,
}

/// A plan for one sequence. What it points to stands in ticket memory, which its methods take from the host.
pub struct Plan<'a> {
    call: Call<'a>,
    index: usize,
    raw: *mut KvhPlan,
    layers: Slots,
    sequence: SequenceView<'a>,
    /// Memory on the device for the lists that come.
    #[cfg(feature = "cuda")]
    reserved: DeviceSlice<u32>,
}

impl<'a> Plan<'a> {
    fn new(call: Call<'a>, index: usize, raw: *mut KvhPlan, sequence: SequenceView<'a>) -> Result<Self, PluginError> {
        // SAFETY: a slot of the host's array, which `Requests::new` was promised to be valid.
        let plan = unsafe { boundary::read(raw.cast_const(), "out.plans")? };
        let layers = Slots::new::<KvhLayerPlan>(plan.layers, KvhLayerPlan::FIRST_SIZE, "plan.layers")?;
        if layers.len() != sequence.layer_count() {
            return Err(PluginError::InvalidArgument(format!(
                "`plan.layers` has {} elements for {} layers",
                layers.len(),
                sequence.layer_count()
            )));
        }
        Ok(Self {
            call,
            index,
            raw,
            layers,
            sequence,
            #[cfg(feature = "cuda")]
            reserved: DeviceSlice::empty(),
        })
    }

    /// Index of the sequence in the call.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Keeps everything, and says why. `message` may be empty.
    ///
    /// # Errors
    /// [`PluginError::InvalidArgument`] when the host's plan is broken.
    pub fn keep(&mut self, reason: Reason, message: &str) -> Result<(), PluginError> {
        self.change(|plan| {
            plan.kind = KVH_PLAN_KEEP;
            plan.reason = reason.raw();
            if !message.is_empty() {
                // SAFETY: null or the host's buffer, valid during the call.
                unsafe { boundary::write_text(plan.message, message) };
            }
        })
    }

    /// Keeps some rows of `layer`, the same for all heads, as ascending ranges.
    ///
    /// # Errors
    /// [`PluginError::Internal`] when the ranges are not ascending inside the layer.
    pub fn select_ranges(&mut self, layer: usize, ranges: &[KvhRange]) -> Result<(), PluginError> {
        let length = self.layer(layer)?.length() as u64;
        let mut end = 0;
        let mut count = 0;
        for range in ranges {
            let stop = range.start.checked_add(range.length).filter(|stop| *stop <= length);
            let (Some(stop), true) = (stop, range.start >= end) else {
                return Err(PluginError::Internal(format!(
                    "layer {layer}: range {} + {} is not behind {end} and inside {length} rows",
                    range.start, range.length
                )));
            };
            end = stop;
            count += range.length;
        }
        let kept = self.call.keep_ranges(ranges);
        self.change_layer(layer, |plan| {
            plan.count = count as u32;
            plan.range_count = ranges.len() as u32;
            plan.ranges = kept;
        })?;
        self.set_kind(KVH_PLAN_SELECT)
    }

    /// Keeps all rows of `layer`.
    ///
    /// # Errors
    /// As [`Self::select_ranges`].
    pub fn select_all(&mut self, layer: usize) -> Result<(), PluginError> {
        let length = self.layer(layer)?.length() as u64;
        if length == 0 {
            return self.set_kind(KVH_PLAN_SELECT);
        }
        self.select_ranges(layer, &[KvhRange { start: 0, length }])
    }

    /// Keeps rows of `layer` by strictly ascending indices that all heads share.
    ///
    /// # Errors
    /// What the host's memory answers. The host checks the indices.
    pub fn select_shared(&mut self, layer: usize, indices: &[u32]) -> Result<(), PluginError> {
        self.layer(layer)?;
        let lent = self.lend_copy(indices)?;
        self.set_indices(layer, indices.len(), 0, lent.as_ptr())
    }

    /// Keeps `count` rows of each head of `layer`: gives a buffer `[kv_heads, count]` for their strictly ascending
    /// indices, which the plan points to.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn select(&mut self, layer: usize, count: usize) -> Result<&'a mut [u32], PluginError> {
        let values = self.layer(layer)?.kv_heads() * count;
        let lent = self.ticket(values)?;
        self.set_indices(layer, count, count, lent.as_ptr())?;
        Ok(lent)
    }

    fn set_indices(
        &mut self,
        layer: usize,
        count: usize,
        stride_head: usize,
        indices: *const u32,
    ) -> Result<(), PluginError> {
        self.change_layer(layer, |plan| {
            plan.count = count as u32;
            plan.indices = indices;
            plan.index_stride_head = stride_head as i64;
        })?;
        self.set_kind(KVH_PLAN_SELECT)
    }

    /// Borrows the rows that a rewrite fills, one element for each layer.
    ///
    /// # Errors
    /// What the host answers: no rows, not offered.
    pub fn lend_rows(&mut self) -> Result<Vec<LentLayer<'a>>, PluginError> {
        let lent = self.call.lend(self.index, self.sequence.layer_count())?;
        let (uid, next_position) = (self.sequence.uid(), self.sequence.next_position());
        let on_cpu = self.call.on_cpu();
        let view = |raw| LayerView::new(raw, next_position, on_cpu).of_sequence(uid);
        Ok(lent.into_iter().map(|raw| LentLayer(view(raw))).collect())
    }

    /// Replaces the rows of `layer` by the lent ones: gives a buffer for the position that each of `count` new rows
    /// stands for, `[kv_heads, count]` (`shared`: `[count]`), ascending for each head.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn rewrite(&mut self, layer: usize, count: usize, shared: bool) -> Result<&'a mut [u32], PluginError> {
        let heads = if shared { 1 } else { self.layer(layer)?.kv_heads() };
        let lent = self.ticket(heads * count)?;
        self.set_positions(layer, count, if shared { 0 } else { count }, lent.as_ptr())?;
        Ok(lent)
    }

    fn set_positions(
        &mut self,
        layer: usize,
        count: usize,
        stride_head: usize,
        positions: *const u32,
    ) -> Result<(), PluginError> {
        self.change_layer(layer, |plan| {
            plan.count = count as u32;
            plan.positions = positions;
            plan.position_stride_head = stride_head as i64;
        })?;
        self.set_kind(KVH_PLAN_REWRITE)
    }

    /// Says that the keys were rotated for new positions and which the next token gets.
    ///
    /// # Errors
    /// As [`Self::keep`].
    pub fn move_positions(&mut self, next_position: u64) -> Result<(), PluginError> {
        self.change(|plan| {
            plan.flags |= KVH_PLAN_FLAG_MOVED_POSITIONS;
            plan.next_position = next_position;
        })
    }

    /// Zeroed ticket memory of this sequence, valid until commit or drop.
    ///
    /// # Errors
    /// As [`Call::allocate`].
    pub fn ticket<T: Element>(&self, count: usize) -> Result<&'a mut [T], PluginError> {
        self.call.allocate(Memory::Ticket(self.index), count)
    }

    /// Points a layer's plan at `count` indices for each head in device memory.
    ///
    /// # Errors
    /// As [`Self::keep`].
    ///
    /// # Safety
    /// `indices` is device memory that holds the indices when the work enqueued so far is done, and stays valid until
    /// commit or drop: ticket memory.
    pub unsafe fn select_device(
        &mut self,
        layer: usize,
        count: usize,
        stride_head: usize,
        indices: *const c_void,
    ) -> Result<(), PluginError> {
        self.set_indices(layer, count, stride_head, indices.cast())
    }

    fn layer(&self, layer: usize) -> Result<LayerView<'a>, PluginError> {
        self.sequence.layer(layer)
    }

    fn lend_copy<T: Element>(&self, values: &[T]) -> Result<&'a [T], PluginError> {
        let lent = self.ticket(values.len())?;
        lent.copy_from_slice(values);
        Ok(lent)
    }

    fn set_kind(&mut self, kind: i32) -> Result<(), PluginError> {
        self.change(|plan| {
            plan.kind = kind;
            plan.reason = KVH_REASON_NONE;
        })
    }

    fn change(&mut self, change: impl FnOnce(&mut KvhPlan)) -> Result<(), PluginError> {
        change_at(self.raw, "out.plans", change)
    }

    fn change_layer(&mut self, layer: usize, change: impl FnOnce(&mut KvhLayerPlan)) -> Result<(), PluginError> {
        change_at(self.layers.pointer(layer), "plan.layers", |plan: &mut KvhLayerPlan| {
            // A second choice for a layer replaces the first.
            plan.range_count = 0;
            plan.ranges = core::ptr::null();
            plan.indices = core::ptr::null();
            plan.index_stride_head = 0;
            change(plan);
        })
    }
}

/// Reads, changes and writes back an element that the host lent.
fn change_at<T: Growing>(at: *mut T, name: &str, change: impl FnOnce(&mut T)) -> Result<(), PluginError> {
    // SAFETY: null, or an element of an array whose head was checked and which the contract makes valid.
    let mut value = unsafe { boundary::read(at.cast_const(), name)? };
    change(&mut value);
    // SAFETY: as above.
    unsafe { boundary::write(at, &value, name) }
}

/// Rows that the host lent for one layer of a rewrite. They are the plugin's alone until the plan is committed.
pub struct LentLayer<'a>(LayerView<'a>);

#[cfg(feature = "cuda")]
impl Plan<'_> {
    /// Takes the memory of all lists that come, of so many indices or positions each (of all heads), at once: the engine is
    /// asked for it once, not for each layer.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn reserve_on_device(&mut self, lists: impl Iterator<Item = usize>) -> Result<(), PluginError> {
        let total = lists.map(aligned).fold(0, usize::saturating_add);
        if total > 0 {
            self.reserved = self.call.device_memory(Memory::Ticket(self.index), total)?;
        }
        Ok(())
    }

    /// As [`Self::select`], on a CUDA device: gives the memory `[kv_heads, count]` (`shared`: `[count]`) for the indices,
    /// which work enqueued during the call fills.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn select_on_device(
        &mut self,
        layer: usize,
        count: usize,
        shared: bool,
    ) -> Result<DeviceSlice<u32>, PluginError> {
        let heads = if shared { 1 } else { self.layer(layer)?.kv_heads() };
        let lent = self.list_on_device(heads * count)?;
        self.set_indices(layer, count, if shared { 0 } else { count }, lent.address() as *const u32)?;
        Ok(lent)
    }

    /// As [`Self::rewrite`], on a CUDA device: work enqueued during the call fills the positions.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn rewrite_on_device(
        &mut self,
        layer: usize,
        count: usize,
        shared: bool,
    ) -> Result<DeviceSlice<u32>, PluginError> {
        let heads = if shared { 1 } else { self.layer(layer)?.kv_heads() };
        let lent = self.list_on_device(heads * count)?;
        self.set_positions(layer, count, if shared { 0 } else { count }, lent.address() as *const u32)?;
        Ok(lent)
    }

    fn list_on_device(&mut self, count: usize) -> Result<DeviceSlice<u32>, PluginError> {
        let reserved = self.reserved;
        if count > reserved.len() {
            return self.call.device_memory(Memory::Ticket(self.index), count);
        }
        self.reserved = reserved.part(aligned(count).min(reserved.len())..reserved.len())?;
        Ok(reserved.part(0..count)?)
    }
}

/// Numbers that a list of `count` takes of reserved memory: each begins at a multiple of 256 bytes.
#[cfg(feature = "cuda")]
fn aligned(count: usize) -> usize {
    count.next_multiple_of(cuda::memory::SCRATCH_ALIGNMENT as usize / size_of::<u32>())
}

#[cfg(feature = "cuda")]
impl LentLayer<'_> {
    /// K rows on a CUDA device, to be written by work enqueued during the call.
    ///
    /// # Errors
    /// As [`LayerView::k_device`].
    pub fn k_device(&self) -> Result<cuda::Rows, PluginError> {
        self.0.k_device()
    }

    /// V rows on a CUDA device, as [`Self::k_device`].
    ///
    /// # Errors
    /// As [`LayerView::k_device`].
    pub fn v_device(&self) -> Result<cuda::Rows, PluginError> {
        self.0.v_device()
    }
}

impl LentLayer<'_> {
    /// Rows that were lent.
    pub fn length(&self) -> usize {
        self.0.length()
    }

    /// K rows, to be written.
    ///
    /// # Errors
    /// As [`LayerView::k`].
    pub fn k(&self) -> Result<Rows, PluginError> {
        self.0.k()
    }

    /// V rows, to be written.
    ///
    /// # Errors
    /// As [`LayerView::v`].
    pub fn v(&self) -> Result<Rows, PluginError> {
        self.0.v()
    }
}
