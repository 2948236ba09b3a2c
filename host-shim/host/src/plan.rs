//! A plugin's plan, checked completely and copied: what the plugin does with its own memory afterwards changes nothing.

use core::ffi::c_void;

use kvhook_abi::raw::*;

use crate::device::{Check, Queue};
use crate::error::HostError;
use crate::lent::LentLayer;
use crate::memory::{Allocator, U32s};
use crate::model::{Model, is_planned};
use crate::positions::Positions;
use crate::raw::*;
use crate::view::Layers;

/// Why a sequence stays as it is.
#[derive(Debug)]
pub struct Refusal {
    /// `KVH_REASON_*` or `KVHOOK_REASON_*`.
    pub reason: KvhookReason,
    /// What was found where, and what was expected.
    pub message: String,
}

impl Refusal {
    /// A reason in words.
    pub fn new(reason: KvhookReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The same, with the layer named that it is about.
    pub fn in_layer(self, layer: usize) -> Self {
        Self { message: format!("layer {layer}: {}", self.message), ..self }
    }
}

impl From<HostError> for Refusal {
    fn from(error: HostError) -> Self {
        let reason = match error {
            HostError::OutOfMemory { .. } => KVHOOK_REASON_OUT_OF_MEMORY,
            HostError::Device(_) => KVHOOK_REASON_DEVICE,
            HostError::Unsupported(_) => KVH_REASON_UNSUPPORTED,
            _ => KVHOOK_REASON_BAD_PLAN,
        };
        Self::new(reason, error.to_string())
    }
}

/// What a plan is checked against: one sequence, on one rank.
pub struct Terms<'a> {
    /// The rank's model.
    pub model: &'a Model,
    /// Which layers may change.
    pub planned: &'a [bool],
    /// Rows stored in each layer.
    pub lengths: &'a [u64],
    /// The most rows that each layer keeps.
    pub bound: &'a [u64],
    /// Position of the next token.
    pub next_position: u64,
    /// The rows.
    pub layers: &'a Layers,
    /// Positions of the rows, for each layer.
    pub positions: &'a [Positions],
    /// Fresh rows were promised.
    pub fresh: bool,
    /// What the engine offers: `KVH_CAN_*`.
    pub can: u64,
    /// What the instance said it needs: `KVH_CAN_*`.
    pub must: u64,
    /// Tokens of a block; 0: contiguous.
    pub block_size: u64,
    /// Leading rows that others use.
    pub shared_rows: u64,
    /// Where copies and position tables are allocated.
    pub allocator: Allocator,
    /// In whose order.
    pub stream: *mut c_void,
    /// That stream, for what is enqueued.
    pub queue: &'a Queue<'a>,
}

/// A list of numbers that a plan points to, for each of `lists` heads, or one that all heads share.
#[derive(Clone, Copy)]
pub struct List {
    /// Memory of the rank's device, aligned.
    pub data: *const u32,
    /// Elements from one head's list to the next; 0: heads share one.
    pub stride_head: usize,
    /// Lists: the heads, or 1.
    pub lists: usize,
    /// Elements of each.
    pub count: usize,
}

/// One layer of a plan, before its lists are read.
pub struct Draft {
    /// Rows that were planned.
    pub planned: u64,
    /// Rows that are kept.
    pub count: u64,
    /// Which.
    pub wanted: Wanted,
}

/// The rows that a layer is to keep.
pub enum Wanted {
    /// All of them.
    All,
    /// Checked ranges.
    Ranges(Vec<KvhRange>),
    /// Indices, not checked.
    Rows(List),
    /// New rows with their positions, which are not checked.
    Lent(Box<LentLayer>, List),
}

/// A plan that may be carried out. Everything that a commit needs is allocated.
pub struct Plan {
    /// One for each layer of the model.
    pub layers: Vec<LayerPlan>,
    /// Position of the next token when the plan was made.
    pub planned_position: u64,
    /// What it becomes, if the keys were rotated for new positions.
    pub moved_position: Option<u64>,
    /// Ordinals of the kept blocks of each layer, if an edit of the block tables is all that is needed.
    pub table: Option<Vec<Vec<u32>>>,
    /// Whether its lists are good, which a device says later.
    pub check: Check,
}

/// What becomes of the planned rows of one layer.
pub struct LayerPlan {
    /// Rows that were planned.
    pub planned: u64,
    /// Rows that are kept of them.
    pub count: u64,
    /// Which.
    pub kept: Kept,
    /// Their positions; the layer's old ones where all are kept.
    pub positions: Positions,
}

/// The rows that a layer keeps, in ascending order.
pub enum Kept {
    /// All of them, where they are.
    All,
    /// Ranges, for all heads. On a device also as indices.
    Ranges(Vec<KvhRange>, Option<KeptRows>),
    /// Single rows.
    Rows(KeptRows),
    /// New ones.
    Lent(LentLayer),
}

/// Indices of kept rows, in memory of the rank's device.
pub struct KeptRows {
    /// The host's own copy.
    pub data: U32s,
    /// Elements from one head's list to the next; 0: heads share one.
    pub stride_head: usize,
    /// Elements of each.
    pub count: usize,
    /// Rows at the front that all heads keep; 0 where that is not known.
    pub untouched: u64,
}

impl Plan {
    /// Rows that each layer keeps of those that were planned.
    pub fn counts(&self) -> Vec<u64> {
        self.layers.iter().map(|layer| layer.count).collect()
    }

    /// The first row that is written when the rows move in place.
    pub fn first_written(&self) -> u64 {
        self.layers.iter().map(LayerPlan::first_written).min().unwrap_or(u64::MAX)
    }
}

impl LayerPlan {
    fn first_written(&self) -> u64 {
        match &self.kept {
            Kept::All => u64::MAX,
            Kept::Lent(_) => 0,
            Kept::Ranges(ranges, _) => match ranges.first() {
                Some(first) if first.start == 0 => first.length,
                _ => 0,
            },
            Kept::Rows(rows) => rows.untouched,
        }
    }

    /// What it holds goes back in the order of this stream, in which it was used last.
    pub fn release_on(&self, stream: *mut c_void) {
        match &self.kept {
            Kept::Rows(rows) | Kept::Ranges(_, Some(rows)) => rows.data.release_on(stream),
            Kept::Lent(lent) => lent.release_on(stream),
            Kept::All | Kept::Ranges(_, None) => {}
        }
        self.positions.release_on(stream);
    }
}

/// Whether counts that differ between layers are needed only where the engine offers that.
pub fn counts_agree(model: &Model, can: u64, lengths: &[u64], counts: &[u64]) -> bool {
    let full = || (0..counts.len()).filter(|&layer| is_planned(&model.layers()[layer]));
    let equal = |values: &[u64]| full().map(|layer| values[layer]).is_sorted_by(|a, b| a == b);
    can & KVH_CAN_LAYER_COUNTS != 0 || !equal(lengths) || equal(counts)
}

/// Checks a plan and copies it.
///
/// # Errors
/// The plan's own reason for a keep; otherwise what is wrong with it.
///
/// # Safety
/// `layers` are the plan's, and point to memory as `raw.rs` says.
pub unsafe fn check(
    plan: &KvhPlan,
    layers: &[KvhLayerPlan],
    mut lent: Option<Vec<Option<LentLayer>>>,
    terms: &Terms<'_>,
) -> Result<Plan, Refusal> {
    let moved_position = match plan.kind {
        KVH_PLAN_KEEP => return Err(Refusal::new(keep_reason(plan.reason), "")),
        KVH_PLAN_SELECT | KVH_PLAN_REWRITE => check_flags(plan, terms)?,
        other => return bad_plan(format!("kind {other}; expected keep (0), select (1) or rewrite (2)")),
    };
    let limit = moved_position.unwrap_or(terms.next_position);
    let mut drafts = Vec::with_capacity(layers.len());
    for (layer, raw) in layers.iter().enumerate() {
        let lent = lent.as_mut().and_then(|lent| lent[layer].take());
        let draft = match plan.kind {
            _ if !terms.planned[layer] => Ok(whole(layer, terms)),
            // SAFETY: passed on from the caller.
            KVH_PLAN_SELECT => unsafe { select(layer, raw, terms) },
            _ => rewrite(layer, raw, lent, terms),
        };
        drafts.push(draft.map_err(|refusal| refusal.in_layer(layer))?);
    }
    // SAFETY: passed on from the caller: the lists are as the plan says.
    let (mut checked, check) = unsafe { terms.queue.adopt(drafts, limit, terms)? };
    for layer in 0..checked.len() {
        follow_owner(layer, &mut checked, terms.model);
    }
    let mut plan = Plan { layers: checked, planned_position: terms.next_position, moved_position, table: None, check };
    if plan.layers.iter().all(|layer| matches!(layer.kept, Kept::All)) {
        return Err(Refusal::new(KVH_REASON_NO_GAIN, "the plan keeps every row"));
    }
    if !counts_agree(terms.model, terms.can, terms.lengths, &plan.counts()) {
        return Err(Refusal::new(
            KVHOOK_REASON_BAD_COUNT,
            "counts differ between layers, but the engine does not offer that (KVH_CAN_LAYER_COUNTS)",
        ));
    }
    if moved_position.is_some() {
        check_all_moved(&plan)?;
    }
    plan.table = table_edit(&plan, terms);
    Ok(plan)
}

fn bad_plan<T>(message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(KVHOOK_REASON_BAD_PLAN, message))
}

fn keep_reason(reason: i32) -> KvhookReason {
    if (KVH_REASON_NONE..=KVH_REASON_OTHER).contains(&reason) { reason } else { KVH_REASON_OTHER }
}

/// The next position that a plan sets, if it sets one.
fn check_flags(plan: &KvhPlan, terms: &Terms<'_>) -> Result<Option<u64>, Refusal> {
    match plan.flags {
        0 => Ok(None),
        KVH_PLAN_FLAG_MOVED_POSITIONS if plan.kind != KVH_PLAN_REWRITE => {
            bad_plan("a select says that positions moved; only a rewrite can rotate keys")
        }
        KVH_PLAN_FLAG_MOVED_POSITIONS if terms.can & KVH_CAN_MOVE_POSITIONS == 0 => {
            bad_plan("positions moved, but the engine does not offer that (KVH_CAN_MOVE_POSITIONS)")
        }
        KVH_PLAN_FLAG_MOVED_POSITIONS if plan.next_position > terms.next_position => Err(Refusal::new(
            KVHOOK_REASON_BAD_POSITION,
            format!("`next_position` is {}; it may not pass {}", plan.next_position, terms.next_position),
        )),
        KVH_PLAN_FLAG_MOVED_POSITIONS => Ok(Some(plan.next_position)),
        other => bad_plan(format!("unknown flags {other:#x}")),
    }
}

/// Keys rotated for new positions and keys that were not cannot be attended to together.
fn check_all_moved(plan: &Plan) -> Result<(), Refusal> {
    let mut counts = Vec::new();
    for (index, layer) in plan.layers.iter().enumerate().filter(|(_, layer)| layer.planned > 0) {
        match layer.kept {
            Kept::Lent(_) => counts.push(layer.count),
            _ => return bad_plan(format!("layer {index}: positions moved, but this layer is not rewritten")),
        }
    }
    if counts.is_sorted_by(|a, b| a == b) {
        Ok(())
    } else {
        bad_plan("positions moved, but counts differ between layers")
    }
}

/// A layer that nothing is done to.
fn whole(layer: usize, terms: &Terms<'_>) -> Draft {
    let planned = terms.lengths[layer];
    Draft { planned, count: planned, wanted: Wanted::All }
}

/// A layer that reads another one's cache has the other one's rows.
fn follow_owner(layer: usize, checked: &mut [LayerPlan], model: &Model) {
    let owner = usize::try_from(model.layers()[layer].shared_with).ok().and_then(|owner| checked.get(owner));
    if let Some(owner) = owner {
        let (planned, count, positions) = (owner.planned, owner.count, owner.positions.clone());
        checked[layer] = LayerPlan { planned, count, kept: Kept::All, positions };
    }
}

fn check_count(layer: usize, raw: &KvhLayerPlan, terms: &Terms<'_>) -> Result<(), Refusal> {
    let (count, bound) = (u64::from(raw.count), terms.bound[layer]);
    let may_be_less = terms.can & terms.must & KVH_CAN_DATA_COUNTS != 0;
    let problem = match count {
        0 => "at least 1 must be kept".to_owned(),
        _ if count > bound => format!("the bound is {bound}"),
        _ if count < bound && !may_be_less => {
            format!("the bound is {bound}, and plugin and engine did not both declare counts that depend on data")
        }
        _ => return Ok(()),
    };
    Err(Refusal::new(KVHOOK_REASON_BAD_COUNT, format!("count {count}: {problem}")))
}

/// # Safety
/// As [`check`].
unsafe fn select(layer: usize, raw: &KvhLayerPlan, terms: &Terms<'_>) -> Result<Draft, Refusal> {
    let planned = terms.lengths[layer];
    let untouched = raw.count == 0 && raw.ranges.is_null() && raw.indices.is_null();
    if untouched && terms.bound[layer] == planned {
        return Ok(whole(layer, terms));
    }
    check_count(layer, raw, terms)?;
    let wanted = match (raw.ranges.is_null(), raw.indices.is_null()) {
        // SAFETY: passed on from the caller; ranges stand in ordinary memory, whatever the device.
        (false, true) => Wanted::Ranges(unsafe { copy_ranges(raw, planned)? }),
        (true, false) => Wanted::Rows(list("indices", raw.indices, raw.index_stride_head, layer, raw.count, terms)?),
        _ => return bad_plan("a select gives `ranges` or `indices`, exactly one of them"),
    };
    Ok(Draft { planned, count: raw.count.into(), wanted })
}

/// # Safety
/// `raw.ranges` points to `raw.range_count` ranges.
unsafe fn copy_ranges(raw: &KvhLayerPlan, length: u64) -> Result<Vec<KvhRange>, Refusal> {
    if !raw.ranges.is_aligned() || raw.range_count == 0 || raw.range_count > raw.count {
        return bad_plan(format!("{} ranges for {} rows, or `ranges` is misaligned", raw.range_count, raw.count));
    }
    // SAFETY: not null, aligned; the caller vouches for the rest.
    let ranges = unsafe { core::slice::from_raw_parts(raw.ranges, raw.range_count as usize) }.to_vec();
    let mut end = 0;
    let mut rows = 0;
    for (place, range) in ranges.iter().enumerate() {
        let after = range.start.checked_add(range.length).filter(|&after| after <= length);
        let Some(after) = after.filter(|_| range.length > 0 && (place == 0 || range.start >= end)) else {
            return Err(Refusal::new(
                KVHOOK_REASON_BAD_INDEX,
                format!(
                    "range {place} has start {} and length {}; ranges are ascending, not empty, within {length} rows, \
                     and the one before ends at {end}",
                    range.start, range.length
                ),
            ));
        };
        end = after;
        rows += range.length;
    }
    if rows != u64::from(raw.count) {
        return Err(Refusal::new(
            KVHOOK_REASON_BAD_COUNT,
            format!("the ranges hold {rows} rows, but `count` is {}", raw.count),
        ));
    }
    Ok(ranges)
}

/// A list of a plan, whose address and stride are possible.
fn list(
    name: &str,
    data: *const u32,
    stride_head: i64,
    layer: usize,
    count: u32,
    terms: &Terms<'_>,
) -> Result<List, Refusal> {
    let heads = terms.model.layers()[layer].kv_heads as usize;
    let count = count as usize;
    let stride = usize::try_from(stride_head).ok();
    let reach = stride.and_then(|stride| stride.checked_mul(heads)).and_then(|reach| reach.checked_add(count));
    let Some(stride_head) =
        stride.filter(|_| reach.is_some_and(|reach| reach <= isize::MAX as usize / size_of::<u32>()))
    else {
        return bad_plan(format!("the stride over heads of `{name}` is {stride_head}; expected 0 or more, in range"));
    };
    if data.is_null() || !data.is_aligned() {
        return bad_plan(format!("`{name}` is null or misaligned"));
    }
    Ok(List { data, stride_head, lists: if stride_head == 0 { 1 } else { heads }, count })
}

fn rewrite(layer: usize, raw: &KvhLayerPlan, lent: Option<LentLayer>, terms: &Terms<'_>) -> Result<Draft, Refusal> {
    check_count(layer, raw, terms)?;
    let Some(lent) = lent else {
        return bad_plan("a rewrite, but no rows were lent (kvh.rows/1)");
    };
    let positions = list("positions", raw.positions, raw.position_stride_head, layer, raw.count, terms)?;
    Ok(Draft {
        planned: terms.lengths[layer],
        count: raw.count.into(),
        wanted: Wanted::Lent(Box::new(lent), positions),
    })
}

/// The kept blocks of each layer, if the plan keeps whole blocks that are the same for all heads, and leaving out the
/// others frees at least one.
fn table_edit(plan: &Plan, terms: &Terms<'_>) -> Option<Vec<Vec<u32>>> {
    let size = terms.block_size;
    if size == 0 {
        return None;
    }
    let owner = |layer: usize| usize::try_from(terms.model.layers()[layer].shared_with).unwrap_or(layer);
    let owners = (0..plan.layers.len()).map(|layer| plan.layers.get(owner(layer)));
    let blocks = owners.map(|owner| kept_blocks(owner?, size)).collect::<Option<Vec<_>>>()?;
    let with_rows = || plan.layers.iter().zip(&blocks).filter(|(layer, _)| layer.planned > 0);
    let one_table = terms.can & KVH_CAN_LAYER_COUNTS == 0;
    if one_table && !with_rows().is_sorted_by(|(_, a), (_, b)| a == b) {
        return None;
    }
    let shared = terms.shared_rows.div_ceil(size);
    let frees = with_rows().any(|(layer, kept)| {
        let own = kept.iter().filter(|&&block| u64::from(block) >= shared).count() as u64;
        layer.planned.div_ceil(size).saturating_sub(shared) > own
    });
    frees.then_some(blocks)
}

fn kept_blocks(layer: &LayerPlan, size: u64) -> Option<Vec<u32>> {
    let last = layer.planned.div_ceil(size) as u32;
    match &layer.kept {
        Kept::All => Some((0..last).collect()),
        Kept::Rows(_) | Kept::Lent(_) => None,
        Kept::Ranges(ranges, _) => {
            // Appended rows stand behind the planned ones, in a last block that is only partly planned.
            let end = ranges.last().map_or(0, |range| range.start + range.length);
            if !layer.planned.is_multiple_of(size) && end != layer.planned {
                return None;
            }
            let whole = |range: &KvhRange| {
                let end = range.start + range.length;
                range.start.is_multiple_of(size) && (end.is_multiple_of(size) || end == layer.planned)
            };
            ranges.iter().all(whole).then(|| {
                let blocks =
                    |range: &KvhRange| (range.start / size) as u32..(range.start + range.length).div_ceil(size) as u32;
                ranges.iter().flat_map(blocks).collect()
            })
        }
    }
}
