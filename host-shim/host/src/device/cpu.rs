//! Ordinary memory.

use kvhook_kernels::check::check_indices;
use kvhook_kernels::select::{gather, move_rows as move_adjacent};
use kvhook_kernels::{Indices, KernelError, parallel};

use crate::commit::Task;
use crate::error::HostError;
use crate::memory::U32s;
use crate::plan::{Draft, Kept, KeptRows, LayerPlan, List, Refusal, Terms, Wanted};
use crate::positions::Positions;
use crate::raw::*;

/// # Safety
/// As [`super::Queue::adopt`].
pub unsafe fn adopt(drafts: Vec<Draft>, limit: u64, terms: &Terms<'_>) -> Result<Vec<LayerPlan>, Refusal> {
    let adopted = drafts.into_iter().enumerate().map(|(layer, draft)| {
        // SAFETY: passed on from the caller.
        unsafe { adopt_layer(layer, draft, limit, terms) }.map_err(|refusal| refusal.in_layer(layer))
    });
    adopted.collect()
}

/// # Safety
/// As [`adopt`].
unsafe fn adopt_layer(layer: usize, draft: Draft, limit: u64, terms: &Terms<'_>) -> Result<LayerPlan, Refusal> {
    let Draft { planned, count, wanted } = draft;
    let old = &terms.positions[layer];
    let (kept, positions) = match wanted {
        Wanted::All => (Kept::All, old.clone()),
        Wanted::Ranges(_) if count == planned => (Kept::All, old.clone()),
        Wanted::Ranges(ranges) => {
            let rows: Vec<u32> =
                ranges.iter().flat_map(|range| range.start as u32..(range.start + range.length) as u32).collect();
            let positions = positions_of(layer, count as usize, true, terms, |_, place| rows[place])?;
            (Kept::Ranges(ranges, None), positions)
        }
        Wanted::Rows(list) => {
            // SAFETY: passed on from the caller.
            let rows = unsafe { copy_rows(layer, &list, terms)? };
            if count == planned {
                (Kept::All, old.clone())
            } else {
                let (data, stride) = (rows.data.as_slice(), rows.stride_head);
                let positions =
                    positions_of(layer, list.count, stride == 0, terms, |head, place| data[head * stride + place])?;
                (Kept::Rows(rows), positions)
            }
        }
        Wanted::Lent(lent, list) => {
            // SAFETY: passed on from the caller.
            let (table, stride_head) = unsafe { copy(&list, terms)? };
            check_positions(table.as_slice(), list.count, limit)?;
            (Kept::Lent(*lent), Positions::new(table, stride_head, list.count))
        }
    };
    Ok(LayerPlan { planned, count, kept, positions })
}

/// # Safety
/// As [`adopt`].
unsafe fn copy_rows(layer: usize, list: &List, terms: &Terms<'_>) -> Result<KeptRows, Refusal> {
    // SAFETY: passed on from the caller.
    let (data, stride_head) = unsafe { copy(list, terms)? };
    let indices = Indices { data: data.as_slice(), stride_head, count: list.count };
    check_indices(&indices, terms.model.layers()[layer].kv_heads as usize, terms.lengths[layer] as usize)
        .map_err(|bad| Refusal::new(KVHOOK_REASON_BAD_INDEX, bad.to_string()))?;
    let untouched = |list: &[u32]| list.iter().zip(0..).take_while(|&(&row, place)| row == place).count();
    let untouched = data.as_slice().chunks_exact(list.count).map(untouched).min().unwrap_or(0) as u64;
    Ok(KeptRows { data, stride_head, count: list.count, untouched })
}

/// Copies a list. Gives the copy with its stride: 0 when heads share it.
///
/// # Safety
/// As [`adopt`].
unsafe fn copy(list: &List, terms: &Terms<'_>) -> Result<(U32s, usize), Refusal> {
    let &List { data, stride_head, lists, count } = list;
    let copy = U32s::filled(terms.allocator, lists * count, terms.stream, "a copy of a plan", |copy| {
        for (head, list) in copy.chunks_exact_mut(count).enumerate() {
            // SAFETY: not null, aligned, and the caller vouches for `count` numbers of each head.
            list.copy_from_slice(unsafe { core::slice::from_raw_parts(data.add(head * stride_head), count) });
        }
    })?;
    Ok((copy, if stride_head == 0 { 0 } else { count }))
}

/// Positions of the rows that a select keeps: row `row(head, place)` of each head. `shared`: heads keep the same rows.
fn positions_of(
    layer: usize,
    count: usize,
    shared: bool,
    terms: &Terms<'_>,
    row: impl Fn(usize, usize) -> u32,
) -> Result<Positions, Refusal> {
    let old = &terms.positions[layer];
    let (length, next_position) = (terms.lengths[layer], terms.next_position);
    let heads = if shared && old.heads_agree() { 1 } else { terms.model.layers()[layer].kv_heads as usize };
    Ok(Positions::filled(heads, count, terms.allocator, terms.stream, |head, place| {
        old.of(head, row(head, place) as usize, length, next_position) as u32
    })?)
}

fn check_positions(table: &[u32], count: usize, limit: u64) -> Result<(), Refusal> {
    for (head, list) in table.chunks_exact(count).enumerate() {
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
    Ok(())
}

/// Moves rows on as many threads as pay.
pub fn move_rows(tasks: Vec<Task<'_>>) -> Result<(), HostError> {
    let bytes = tasks
        .iter()
        .map(|task| {
            (task.plan.count as usize + task.appended) * task.source.kv_heads() * task.source.layout().row_bytes()
        })
        .sum();
    parallel::for_each(tasks, bytes, move_task).map_err(|error: KernelError| HostError::Internal(error.to_string()))
}

/// Moves the kept rows, then the appended ones behind them.
fn move_task(task: Task<'_>) -> Result<(), KernelError> {
    let Task { plan, source, destination, lent, appended } = task;
    let heads = 0..source.kv_heads();
    let (planned, count) = (plan.planned as usize, plan.count as usize);
    match &plan.kept {
        Kept::All => move_adjacent(&source, 0, &destination, 0, planned, heads.clone())?,
        Kept::Rows(rows) => {
            let indices = Indices { data: rows.data.as_slice(), stride_head: rows.stride_head, count: rows.count };
            gather(&source, &destination, heads.clone(), &indices, 0)?;
        }
        Kept::Ranges(ranges, _) => {
            let mut to = 0;
            for range in ranges {
                let (from, length) = (range.start as usize, range.length as usize);
                move_adjacent(&source, from, &destination, to, length, heads.clone())?;
                to += length;
            }
        }
        Kept::Lent(_) => {
            let lent = lent.unwrap_or(source);
            move_adjacent(&lent, 0, &destination, 0, count, heads.clone())?;
        }
    }
    move_adjacent(&source, planned, &destination, count, appended, heads)
}
