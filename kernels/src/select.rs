//! Moving the rows that a plan keeps.

use std::ops::Range;

use crate::check::{BadIndex, IndexFault, Indices};
use crate::copy::Mover;
use crate::error::KernelError;
use crate::rows::Rows;

/// Places that are moved head by head before going on, where the heads of a token lie closer than the tokens of a head.
const TILE: usize = 128;

/// Moves the selected rows of K or V of one layer to the front: row `indices[h][j]` to row `destination_start + j`.
///
/// In place (both views describe the same rows), no row may move up: `indices[h][j] >= destination_start + j`, which
/// ascending indices from `destination_start` on always fulfil. Otherwise the two views must not overlap, and any order is
/// allowed. Runs of adjacent indices are moved at once where the layout makes their rows adjacent.
///
/// Floor: reads and writes each kept row once, `2 * heads * count * head_dim * dtype` bytes. For scattered rows the reading
/// decides: the processor's prefetch follows a stream without gaps, and lines that are left out stop it, so that reading
/// a random half of a cache took longer than reading all of it. So from a mebibyte on, rows are taken in the order in
/// which they lie in memory, rows between kept ones are fetched into the cache with them unless they are more than one and
/// a half times as many or lie in a gap of more than 4 KiB, and stores go around the caches (they then read no line that
/// they overwrite). Rows further apart are fetched 8 KiB ahead into the second-level cache. Benchmark `select` says what
/// this reaches. Tried on a Zen 4, and slower: prefetch of kept rows alone, into the first level and at any distance;
/// reading some lines only of a row between; copying by way of a buffer; several heads in turn; a memmove or `rep movsb` for
/// each row or run; plain stores.
///
/// # Errors
/// Everything is checked before the first row moves: dtypes, head dimensions, heads, each index against the source,
/// the last place against the destination, [`KernelError::Overtakes`].
pub fn gather(
    source: &Rows,
    destination: &Rows,
    heads: Range<usize>,
    indices: &Indices<'_>,
    destination_start: usize,
) -> Result<(), KernelError> {
    let shared = indices.stride_head == 0;
    let mover = Mover::new(source, destination, heads.clone(), indices.count, shared)?;
    destination.check(0..0, destination_start..destination_start.saturating_add(indices.count))?;
    let in_place = mover.in_place();
    for head in heads.clone().take(if shared { 1 } else { heads.len() }) {
        check_moves(indices.of(head)?, head, source.capacity(), in_place.then_some(destination_start))?;
    }

    let lists = mover.heads().map(|head| indices.of(head)).collect::<Result<Vec<_>, _>>()?;
    let first_head = mover.heads().start;
    let order = Order::of(source);
    // Where heads lie between each other, a stream goes through the rows of all of them.
    let apart = order == Order::HeadByHead;
    let left_out = |gap| if apart || lists.len() == 1 { gap } else { usize::MAX };
    match mover.widest_gap().filter(|&gap| lists.iter().all(|list| is_dense(list, left_out(gap)))) {
        Some(gap) => {
            let heads = if apart { 1 } else { lists.len().max(1) };
            let window = if order == Order::TokenByToken { 1 } else { source.layout().block_or_all() };
            let ahead = apart.then(|| mover.ahead());
            let sweep = Sweep { mover, window, gap, ahead, destination_start };
            for (first_head, lists) in (first_head..).step_by(heads).zip(lists.chunks(heads)) {
                // SAFETY: every index and the last destination were checked.
                unsafe { sweep.run(lists, first_head) };
            }
        }
        None => {
            let tile = if order == Order::HeadByHead { indices.count.max(1) } else { TILE };
            for start in (0..indices.count).step_by(tile) {
                for (head, list) in (first_head..).zip(&lists) {
                    let places = start..indices.count.min(start + tile);
                    // SAFETY: as above.
                    unsafe { pick(mover, list, places, destination_start, head) };
                }
            }
        }
    }
    mover.finish();
    Ok(())
}

/// Whether so many of a list's rows lie close together that reading all rows in between is faster than leaving them out:
/// up to one and a half of those for each that is kept. Wider gaps than `gap` rows are left out and do not count.
fn is_dense(list: &[u32], gap: usize) -> bool {
    let mut between = 0;
    for pair in list.windows(2) {
        let Some(skipped) = pair[1].checked_sub(pair[0] + 1) else { return false };
        if skipped as usize <= gap {
            between += skipped as usize;
        }
    }
    2 * between <= 3 * list.len()
}

/// The order in which rows lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// All tokens of a head, then the next head.
    HeadByHead,
    /// Head by head the tokens of one block, then the next block.
    BlockByBlock,
    /// All heads of a token, then the next token.
    TokenByToken,
}

impl Order {
    fn of(rows: &Rows) -> Self {
        let layout = rows.layout();
        let head = layout.stride_head.unsigned_abs();
        if head < layout.stride_token.unsigned_abs() {
            Self::TokenByToken
        } else if layout.block_size > 0 && head < layout.stride_block.unsigned_abs() {
            Self::BlockByBlock
        } else {
            Self::HeadByHead
        }
    }
}

/// Moves rows in the order in which they lie in memory. Rows that are skipped are read, too, into the cache: a stream without
/// gaps is what the processor's prefetch is good at.
struct Sweep {
    mover: Mover,
    /// Tokens of each head that are moved in turn. They must not reach over the end of a block.
    window: usize,
    /// Most rows between two kept ones that are fetched.
    gap: usize,
    /// Kept rows between the one that is moved and the one that is fetched where a wider gap lies between.
    ahead: Option<usize>,
    destination_start: usize,
}

impl Sweep {
    /// Moves the rows of adjacent heads.
    ///
    /// # Safety
    /// The rows must be inside both views, and the heads among the mover's. The lists must ascend.
    unsafe fn run(&self, lists: &[&[u32]], first_head: usize) {
        let mut places = vec![0; lists.len()];
        let first_left = |places: &[usize]| {
            let left = lists.iter().zip(places).filter_map(|(list, &place)| list.get(place));
            left.min().map(|&token| token as usize)
        };
        let mut token = 0;
        while let Some(next) = first_left(&places) {
            if next - token > self.gap {
                token = next;
            }
            let end = (token / self.window + 1).saturating_mul(self.window);
            for ((head, list), place) in (first_head..).zip(lists).zip(&mut places) {
                // SAFETY: passed on from the caller.
                unsafe { self.run_head(list, place, token..end, head) };
            }
            token = end;
        }
    }

    /// Moves the rows of one head that are among `tokens`, which begin at or before the next of each list. `place` is that
    /// of the first of them, and then of the first behind.
    ///
    /// # Safety
    /// As [`Sweep::run`].
    #[inline(always)]
    unsafe fn run_head(&self, list: &[u32], place: &mut usize, tokens: Range<usize>, head: usize) {
        let Self { mover, gap, ahead, destination_start, .. } = *self;
        if *place == list.len() {
            return;
        }
        // SAFETY: the caller's promise. The window begins at or before a token of a list, so inside the source, and ends
        // with its block at the latest, so its rows are at one distance.
        unsafe {
            let window = mover.window(tokens.start, head);
            let mut token = tokens.start;
            while let Some(&kept) = list.get(*place) {
                let kept = kept as usize;
                let end = kept.min(tokens.end);
                if end - token <= gap {
                    (token..end).for_each(|token| mover.fetch_between(window.row(token)));
                }
                if kept >= tokens.end {
                    break;
                }
                if let Some(ahead) = ahead {
                    let next = list.get(*place + ahead).map(|&next| next as usize);
                    if let Some(next) = next.filter(|next| next - kept > ahead + gap) {
                        mover.fetch_ahead(next, head);
                    }
                }
                mover.move_from(window.row(kept), destination_start + *place, head);
                token = kept + 1;
                *place += 1;
            }
        }
    }
}

/// Moves rows one after the other, adjacent ones at once where that is faster.
///
/// # Safety
/// The rows must be inside both views, and the head among the mover's.
unsafe fn pick(mover: Mover, list: &[u32], places: Range<usize>, destination_start: usize, head: usize) {
    let (worthwhile, ahead) = (mover.worthwhile_run(), mover.ahead());
    let mut place = places.start;
    while place < places.end {
        // The run's last index is looked at first: for scattered rows one comparison says that there is no run.
        let first = list[place];
        let run = match worthwhile {
            Some(least) if list.get(place + least - 1) == Some(&first.wrapping_add(least as u32 - 1)) => {
                1 + list[place + 1..places.end]
                    .iter()
                    .zip(first + 1..)
                    .take_while(|&(&index, next)| index == next)
                    .count()
            }
            _ => 1,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if run == 1 {
                if let Some(&next) = list.get(place + ahead) {
                    mover.fetch_ahead(next as usize, head);
                }
                mover.move_one(first as usize, destination_start + place, head);
            } else {
                mover.move_run(first as usize, destination_start + place, run, head);
            }
        }
        place += run;
    }
}

fn check_moves(list: &[u32], head: usize, capacity: usize, in_place_from: Option<usize>) -> Result<(), KernelError> {
    if list.iter().fold(0, |most, &index| most.max(index)) as usize >= capacity {
        for (place, &value) in list.iter().enumerate() {
            if value as usize >= capacity {
                let fault = IndexFault::OutOfRange { length: capacity };
                return Err(BadIndex { head, place, value, fault }.into());
            }
        }
    }
    let Some(start) = in_place_from else {
        return Ok(());
    };
    match list.iter().enumerate().find(|&(place, &index)| (index as usize) < start + place) {
        Some((place, &index)) => {
            Err(KernelError::Overtakes { head, place, source_row: index as usize, destination_row: start + place })
        }
        None => Ok(()),
    }
}

/// Moves `count` adjacent rows: the unchanged tail behind a selection, or a plain copy into other rows.
///
/// In place, source and destination may overlap in either direction. Otherwise the two views must not overlap.
///
/// Floor: reads and writes each row once, `2 * heads * count * head_dim * dtype` bytes.
///
/// # Errors
/// Dtypes, head dimensions, heads, rows outside a view; nothing has moved then.
pub fn move_rows(
    source: &Rows,
    from: usize,
    destination: &Rows,
    to: usize,
    count: usize,
    heads: Range<usize>,
) -> Result<(), KernelError> {
    let mover = Mover::new(source, destination, heads, count, true)?;
    source.check(0..0, from..from.saturating_add(count))?;
    destination.check(0..0, to..to.saturating_add(count))?;
    let window = match Order::of(source) {
        Order::BlockByBlock => source.layout().block_or_all(),
        _ => usize::MAX,
    };
    let windows = from / window..(from + count).div_ceil(window);
    // Upwards the last rows move first, so that none is overwritten before it was read.
    let upwards = to > from && mover.in_place();
    for number in 0..windows.len() {
        let number = if upwards { windows.end - 1 - number } else { windows.start + number };
        let start = from.max(number * window);
        let end = (from + count).min((number + 1).saturating_mul(window));
        for head in mover.heads() {
            // SAFETY: both ranges were checked.
            unsafe { mover.move_run(start, start - from + to, end - start, head) };
        }
    }
    mover.finish();
    Ok(())
}
