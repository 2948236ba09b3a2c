//! A plugin's plan, checked completely and copied: what the plugin does with its own memory afterwards changes nothing.

use core::ffi::c_void;

use kvhook_abi::raw::*;
use kvhook_kernels::Indices;
use kvhook_kernels::check::check_indices;

use crate::error::HostError;
use crate::lent::LentLayer;
use crate::memory::{Allocator, U32s};
use crate::model::{Model, is_planned};
use crate::positions::Positions;
use crate::raw::*;

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
}

impl From<HostError> for Refusal {
    fn from(error: HostError) -> Self {
        let reason = match error {
            HostError::OutOfMemory { .. } => KVHOOK_REASON_OUT_OF_MEMORY,
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
    /// Positions of the rows, for each layer.
    pub positions: &'a [Positions],
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
    /// Ranges, for all heads.
    Ranges(Vec<KvhRange>),
    /// Single rows.
    Rows(KeptRows),
    /// New ones.
    Lent(LentLayer),
}

/// Indices of kept rows.
pub struct KeptRows {
    data: U32s,
    stride_head: usize,
    count: usize,
}

impl KeptRows {
    /// As the kernels see them.
    pub fn indices(&self) -> Indices<'_> {
        Indices { data: self.data.as_slice(), stride_head: self.stride_head, count: self.count }
    }

    fn of(&self, head: usize) -> &[u32] {
        &self.data.as_slice()[head * self.stride_head..][..self.count]
    }
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
            Kept::Ranges(ranges) => match ranges.first() {
                Some(first) if first.start == 0 => first.length,
                _ => 0,
            },
            Kept::Rows(rows) => {
                let heads = rows.data.as_slice().len() / rows.count;
                let untouched = |head| rows.of(head).iter().zip(0..).take_while(|&(&row, place)| row == place).count();
                (0..heads).map(untouched).min().unwrap_or(0) as u64
            }
        }
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
    let mut checked = Vec::with_capacity(layers.len());
    for (layer, raw) in layers.iter().enumerate() {
        let lent = lent.as_mut().and_then(|lent| lent[layer].take());
        // SAFETY: passed on from the caller.
        let plan = unsafe {
            match plan.kind {
                _ if !terms.planned[layer] => whole(layer, terms),
                KVH_PLAN_SELECT => select(layer, raw, terms),
                _ => rewrite(layer, raw, lent, limit, terms),
            }
        };
        checked.push(
            plan.map_err(|refusal| Refusal { message: format!("layer {layer}: {}", refusal.message), ..refusal })?,
        );
    }
    for layer in 0..checked.len() {
        follow_owner(layer, &mut checked, terms.model);
    }
    let mut plan = Plan { layers: checked, planned_position: terms.next_position, moved_position, table: None };
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
fn whole(layer: usize, terms: &Terms<'_>) -> Result<LayerPlan, Refusal> {
    let planned = terms.lengths[layer];
    Ok(LayerPlan { planned, count: planned, kept: Kept::All, positions: terms.positions[layer].clone() })
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
unsafe fn select(layer: usize, raw: &KvhLayerPlan, terms: &Terms<'_>) -> Result<LayerPlan, Refusal> {
    let length = terms.lengths[layer];
    let untouched = raw.count == 0 && raw.ranges.is_null() && raw.indices.is_null();
    if untouched && terms.bound[layer] == length {
        return whole(layer, terms);
    }
    check_count(layer, raw, terms)?;
    // SAFETY: passed on from the caller.
    let kept = unsafe {
        match (raw.ranges.is_null(), raw.indices.is_null()) {
            (false, true) => Kept::Ranges(copy_ranges(raw, length)?),
            (true, false) => Kept::Rows(copy_rows(layer, raw, terms)?),
            _ => return bad_plan("a select gives `ranges` or `indices`, exactly one of them"),
        }
    };
    if u64::from(raw.count) == length {
        return whole(layer, terms);
    }
    let positions = positions_of(layer, &kept, raw.count as usize, terms)?;
    Ok(LayerPlan { planned: length, count: raw.count.into(), kept, positions })
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

/// # Safety
/// `raw.indices` points to `raw.count` indices for each head.
unsafe fn copy_rows(layer: usize, raw: &KvhLayerPlan, terms: &Terms<'_>) -> Result<KeptRows, Refusal> {
    let heads = terms.model.layers()[layer].kv_heads as usize;
    // SAFETY: passed on from the caller.
    let (data, stride_head) =
        unsafe { copy_u32s("indices", raw.indices, raw.index_stride_head, heads, raw.count as usize, terms)? };
    let rows = KeptRows { data, stride_head, count: raw.count as usize };
    check_indices(&rows.indices(), heads, terms.lengths[layer] as usize)
        .map_err(|bad| Refusal::new(KVHOOK_REASON_BAD_INDEX, bad.to_string()))?;
    Ok(rows)
}

/// Copies `count` numbers of each head. Gives them with their stride: 0 when heads share them.
///
/// # Safety
/// `data` is null or points to `count` numbers for each head.
unsafe fn copy_u32s(
    name: &str,
    data: *const u32,
    stride_head: i64,
    heads: usize,
    count: usize,
    terms: &Terms<'_>,
) -> Result<(U32s, usize), Refusal> {
    let stride = usize::try_from(stride_head).ok();
    let reach = stride.and_then(|stride| stride.checked_mul(heads)).and_then(|reach| reach.checked_add(count));
    let Some(stride) = stride.filter(|_| reach.is_some_and(|reach| reach <= isize::MAX as usize / size_of::<u32>()))
    else {
        return bad_plan(format!("the stride over heads of `{name}` is {stride_head}; expected 0 or more, in range"));
    };
    if data.is_null() || !data.is_aligned() {
        return bad_plan(format!("`{name}` is null or misaligned"));
    }
    let lists = if stride == 0 { 1 } else { heads };
    let copy = U32s::filled(terms.allocator, lists * count, terms.stream, "a copy of a plan", |copy| {
        for (head, list) in copy.chunks_exact_mut(count).enumerate() {
            // SAFETY: not null, aligned, and the caller vouches for `count` numbers of each head.
            list.copy_from_slice(unsafe { core::slice::from_raw_parts(data.add(head * stride), count) });
        }
    })?;
    Ok((copy, if stride == 0 { 0 } else { count }))
}

/// Positions of the rows that a select keeps.
fn positions_of(layer: usize, kept: &Kept, count: usize, terms: &Terms<'_>) -> Result<Positions, Refusal> {
    let old = &terms.positions[layer];
    let (length, next_position) = (terms.lengths[layer], terms.next_position);
    let heads = terms.model.layers()[layer].kv_heads as usize;
    let position = |head, row: u32| old.of(head, row as usize, length, next_position) as u32;
    let filled = |shared: bool, row: &dyn Fn(usize, usize) -> u32| {
        let heads = if shared && old.heads_agree() { 1 } else { heads };
        Positions::filled(heads, count, terms.allocator, terms.stream, |head, place| position(head, row(head, place)))
    };
    let positions = match kept {
        Kept::Rows(rows) => filled(rows.stride_head == 0, &|head, place| rows.of(head)[place]),
        Kept::Ranges(ranges) => {
            let rows: Vec<u32> =
                ranges.iter().flat_map(|range| range.start as u32..(range.start + range.length) as u32).collect();
            filled(true, &|_, place| rows[place])
        }
        Kept::All | Kept::Lent(_) => return Ok(old.clone()),
    };
    Ok(positions?)
}

/// # Safety
/// As [`check`].
unsafe fn rewrite(
    layer: usize,
    raw: &KvhLayerPlan,
    lent: Option<LentLayer>,
    limit: u64,
    terms: &Terms<'_>,
) -> Result<LayerPlan, Refusal> {
    check_count(layer, raw, terms)?;
    let Some(lent) = lent else {
        return bad_plan("a rewrite, but no rows were lent (kvh.rows/1)");
    };
    let heads = terms.model.layers()[layer].kv_heads as usize;
    let count = raw.count as usize;
    // SAFETY: passed on from the caller.
    let (table, stride_head) =
        unsafe { copy_u32s("positions", raw.positions, raw.position_stride_head, heads, count, terms)? };
    for (head, list) in table.as_slice().chunks_exact(count).enumerate() {
        let mut before = 0;
        for (place, &position) in list.iter().enumerate() {
            if position < before || u64::from(position) >= limit {
                return Err(Refusal::new(
                    KVHOOK_REASON_BAD_POSITION,
                    format!(
                        "head {head}, place {place}: position {position} follows {before}; expected ascending order, \
                         below {limit}"
                    ),
                ));
            }
            before = position;
        }
    }
    let positions = Positions::new(table, stride_head, count);
    Ok(LayerPlan { planned: terms.lengths[layer], count: raw.count.into(), kept: Kept::Lent(lent), positions })
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
        Kept::Ranges(ranges) => {
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
