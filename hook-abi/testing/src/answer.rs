//! What a plugin answered, copied out of its memory and checked.

use kvhook_abi::raw::*;

use crate::cache::{Layer, PerHead};
use crate::fault::Fault;

/// Rows that a layer keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// Rows that each head keeps.
    pub count: usize,
    /// `[heads][count]`, ascending.
    pub rows: Vec<Vec<u32>>,
    /// Whether they were given as ranges.
    pub as_ranges: bool,
    /// Whether one list was given for all heads.
    pub shared: bool,
}

/// Rows that a layer gets instead of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct NewRows {
    /// `[heads][count][k_head_dim]`
    pub keys: PerHead,
    /// `[heads][count][v_head_dim]`
    pub values: PerHead,
    /// `[heads][count]`: what each row stands for, ascending.
    pub positions: Vec<Vec<u32>>,
}

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Nothing is dropped.
    Keep {
        /// `KVH_REASON_*`.
        reason: i32,
        /// The plugin's words; may be empty.
        message: String,
    },
    /// Some rows are kept, unchanged; for each layer.
    Select(Vec<LayerPlan>),
    /// New rows.
    Rewrite {
        /// For each layer.
        layers: Vec<NewRows>,
        /// Position of the next token, where the keys were rotated for new positions.
        next_position: Option<u64>,
    },
}

impl Answer {
    /// The layers of a select.
    ///
    /// # Panics
    /// Where it is another plan: says which.
    #[track_caller]
    pub fn select(&self) -> &[LayerPlan] {
        match self {
            Self::Select(layers) => layers,
            Self::Keep { reason, message } => panic!("expected a select; kept, reason {reason}: {message}"),
            Self::Rewrite { .. } => panic!("expected a select; it is a rewrite"),
        }
    }

    /// The layers of a rewrite.
    ///
    /// # Panics
    /// Where it is another plan: says which.
    #[track_caller]
    pub fn rewrite(&self) -> &[NewRows] {
        match self {
            Self::Rewrite { layers, .. } => layers,
            Self::Keep { reason, message } => panic!("expected a rewrite; kept, reason {reason}: {message}"),
            Self::Select(_) => panic!("expected a rewrite; it is a select"),
        }
    }

    /// The reason of a keep: `KVH_REASON_*`.
    ///
    /// # Panics
    /// Where it is another plan.
    #[track_caller]
    pub fn reason(&self) -> i32 {
        match self {
            Self::Keep { reason, .. } => *reason,
            Self::Select(_) | Self::Rewrite { .. } => panic!("expected a keep: {self:?}"),
        }
    }
}

/// A list of `u32` for each head.
///
/// # Safety
/// `data` has `count` elements for each of `heads`, `stride` elements apart.
unsafe fn lists(data: *const u32, stride: i64, heads: usize, count: usize) -> Vec<Vec<u32>> {
    // SAFETY: the caller's promise.
    let element = |head: usize, place: usize| unsafe { *data.offset((head as i64 * stride) as isize + place as isize) };
    (0..heads).map(|head| (0..count).map(|place| element(head, place)).collect()).collect()
}

fn ascending(layer: usize, what: &str, lists: &[Vec<u32>]) -> Result<(), Fault> {
    let descends = |list: &Vec<u32>| list.windows(2).position(|pair| pair[0] >= pair[1]);
    match lists.iter().enumerate().find_map(|(head, list)| descends(list).map(|place| (head, place, list))) {
        None => Ok(()),
        Some((head, place, list)) => {
            let (now, next) = (list[place], list[place + 1]);
            let what = format!("{what} of KV head {head} do not ascend: {next} after {now} at place {}", place + 1);
            Err(Fault::Plan { layer, what })
        }
    }
}

/// Whether a select says nothing of a layer, which keeps it whole.
pub(crate) fn is_whole(plan: &KvhLayerPlan) -> bool {
    plan.count == 0 && plan.range_count == 0 && plan.indices.is_null() && plan.positions.is_null()
}

/// Copies a layer's select.
///
/// # Safety
/// What the plan points to is valid.
pub(crate) unsafe fn read_select(plan: &KvhLayerPlan, index: usize, layer: &Layer) -> Result<LayerPlan, Fault> {
    let broken = |what: &str| Err(Fault::Plan { layer: index, what: what.into() });
    let (count, heads, length) = (plan.count as usize, layer.heads(), layer.tokens());
    let (has_ranges, has_indices) = (plan.range_count > 0, !plan.indices.is_null());
    let rows = match (has_ranges, has_indices) {
        (true, true) => return broken("both `ranges` and `indices`; one of them is to be filled"),
        (false, false) if count == 0 => vec![(0..length as u32).collect(); heads],
        (false, false) => return broken("a count, and neither `ranges` nor `indices`"),
        (true, false) if plan.ranges.is_null() => return broken("`ranges` is null"),
        (true, false) => {
            // SAFETY: the caller's promise.
            let ranges = unsafe { std::slice::from_raw_parts(plan.ranges, plan.range_count as usize) };
            let outside =
                |range: &KvhRange| range.start.checked_add(range.length).is_none_or(|end| end > length as u64);
            if ranges.iter().any(outside) {
                return broken("a range leaves the layer's rows");
            }
            let rows: Vec<u32> =
                ranges.iter().flat_map(|range| range.start as u32..(range.start + range.length) as u32).collect();
            vec![rows; heads]
        }
        // SAFETY: the caller's promise.
        (false, true) => unsafe { lists(plan.indices, plan.index_stride_head, heads, count) },
    };
    let kept = rows.first().map_or(0, Vec::len);
    if (has_ranges || has_indices) && kept != count {
        let what = format!("its ranges hold {kept} rows, its count is {count}");
        return Err(Fault::Plan { layer: index, what });
    }
    ascending(index, "rows", &rows)?;
    if let Some(row) = rows.iter().flatten().find(|row| **row as usize >= length) {
        return Err(Fault::Plan { layer: index, what: format!("row {row} of {length}") });
    }
    Ok(LayerPlan { count: kept, rows, as_ranges: has_ranges, shared: plan.index_stride_head == 0 })
}

/// What is computed from rows with such values may be infinite.
const LARGE: f32 = 1e30;

/// Copies a layer's new rows.
///
/// # Safety
/// What the plan points to is valid.
pub(crate) unsafe fn read_rewrite(
    plan: &KvhLayerPlan,
    index: usize,
    layer: &Layer,
    lent: &Layer,
    next_position: u64,
) -> Result<NewRows, Fault> {
    let count = plan.count as usize;
    if plan.positions.is_null() || count > lent.tokens() {
        let what = format!("a rewrite of {count} rows in {} lent ones, or without positions", lent.tokens());
        return Err(Fault::Plan { layer: index, what });
    }
    // SAFETY: the caller's promise.
    let positions = unsafe { lists(plan.positions, plan.position_stride_head, lent.heads(), count) };
    ascending(index, "positions", &positions)?;
    if let Some(position) = positions.iter().flatten().find(|position| u64::from(**position) >= next_position) {
        return Err(Fault::Plan {
            layer: index,
            what: format!("position {position}, and the next is {next_position}"),
        });
    }
    let [keys, values] = lent.read().map(|mut rows| {
        rows.iter_mut().for_each(|head| head.truncate(count));
        rows
    });
    let sane = |rows: &PerHead| rows.iter().flatten().flatten().all(|value| value.abs() < LARGE);
    let finite = |rows: &PerHead| rows.iter().flatten().flatten().all(|value| value.is_finite());
    // Of a cache that holds no numbers, or too large ones, new rows hold none either.
    let was_sane = sane(&layer.keys) && sane(&layer.values);
    if was_sane && !(finite(&keys) && finite(&values)) {
        let what = "a lent row holds NaN or infinity: not filled, or computed from garbage".into();
        return Err(Fault::Plan { layer: index, what });
    }
    Ok(NewRows { keys, values, positions })
}
