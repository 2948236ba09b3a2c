//! A plan's lists, read and checked by the device.

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::plan::{self, Adoption, List as Listed, Positions as Old};

use super::*;
use crate::device::Check;
use crate::memory::U32s;
use crate::plan::{Draft, LayerPlan, List, Refusal, Terms, Wanted};
use crate::positions::Positions;

/// Alignment of the blocks, in elements of 32 bits.
const ALIGNMENT: usize = SCRATCH_ALIGNMENT as usize / size_of::<u32>();

/// Lists in a block that is not allocated yet.
#[derive(Default)]
struct Room {
    elements: usize,
}

impl Room {
    /// Room for one list of `count` elements for each of `lists` heads.
    fn take(&mut self, lists: usize, count: usize) -> Place {
        let start = self.elements;
        self.elements += lists * count;
        Place { start, lists, count }
    }
}

/// Lists in a block.
#[derive(Clone, Copy)]
struct Place {
    start: usize,
    lists: usize,
    count: usize,
}

impl Place {
    fn stride_head(&self) -> usize {
        if self.lists == 1 { 0 } else { self.count }
    }

    fn in_block(&self, block: &Arc<Block>) -> U32s {
        U32s::on_device(block.clone(), self.start, self.lists * self.count)
    }

    fn indices(&self, block: &Block) -> Result<Indices, CudaError> {
        let address = block.data() as u64 + (self.start * size_of::<u32>()) as u64;
        // SAFETY: the block has room for all lists, and goes back in the order of the stream that used it last.
        let data = unsafe { DeviceSlice::new(address, self.lists * self.count)? };
        Ok(Indices { data, stride_head: self.stride_head(), count: self.count })
    }
}

/// Where the copies of one layer's lists and its positions go.
struct Places {
    kept: Option<Place>,
    positions: Option<Place>,
}

impl Queue<'_> {
    /// Two blocks hold everything: one what goes with the ticket (working memory of the commit, the verdict, copies of the
    /// lists), one the tables of positions, which stay until the next commit.
    ///
    /// # Errors
    /// As [`crate::device::Queue::adopt`].
    ///
    /// # Safety
    /// As [`crate::device::Queue::adopt`].
    pub unsafe fn adopt(
        &self,
        drafts: Vec<Draft>,
        limit: u64,
        terms: &Terms<'_>,
    ) -> Result<(Vec<LayerPlan>, Check), Refusal> {
        // SAFETY: passed on from the caller.
        let scratch_bytes = unsafe { scratch_bytes(&drafts, terms) }?.next_multiple_of(SCRATCH_ALIGNMENT as usize);
        let mut of_ticket = Room { elements: scratch_bytes / size_of::<u32>() };
        let verdict = of_ticket.take(1, 2);
        let mut of_positions = Room::default();
        let places: Vec<Places> = drafts
            .iter()
            .enumerate()
            .map(|(layer, draft)| places_of(layer, draft, terms, &mut of_ticket, &mut of_positions))
            .collect();

        let block = |room: &Room, what| {
            let elements = room.elements.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
            let bytes = (elements * size_of::<u32>()) as u64;
            Block::new(terms.allocator, bytes, SCRATCH_ALIGNMENT, terms.stream, what).map(Arc::new)
        };
        let (of_ticket, of_positions) =
            (block(&of_ticket, "a copy of a plan")?, block(&of_positions, "position tables")?);

        let (mut layers, mut adoptions, mut items) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, (draft, places)) in drafts.into_iter().zip(places).enumerate() {
            let positions_only = matches!(draft.wanted, Wanted::Lent(..)).then_some(limit);
            // SAFETY: passed on from the caller.
            let of_layer = unsafe { adoptions_of(layer, &draft, &places, &of_ticket, &of_positions, limit, terms) };
            let of_layer = of_layer.map_err(|error| Refusal::from(refused(error)).in_layer(layer))?;
            items.resize(items.len() + of_layer.len(), (layer, positions_only));
            adoptions.extend(of_layer);
            layers.push(layer_plan(layer, draft, &places, &of_ticket, &of_positions, terms));
        }

        let word = Word::new(&self.device.words, items, of_ticket.clone(), scratch_bytes)?;
        let address = of_ticket.data() as u64 + (verdict.start * size_of::<u32>()) as u64;
        let enqueue = || {
            // SAFETY: the block has room for the verdict, behind whose work it goes back; the word is page-locked, and
            // used by nobody else until the device has written it.
            unsafe {
                let verdict = Verdict::new(DeviceSlice::new(address, 1)?)?;
                verdict.clear(&self.device.kernels, self.stream)?;
                plan::adopt(&self.device.kernels, self.stream, &adoptions, &verdict)?;
                verdict.fetch(&self.device.kernels, self.stream, word.address())
            }
        };
        enqueue().map_err(|error| {
            word.cancel();
            Refusal::from(refused(error))
        })?;
        Ok((layers, Check::Word(word)))
    }
}

/// Working memory for moving the plan's rows in place, with as many appended ones as are dropped. Finds out whether the
/// kernels take the rows at all.
///
/// # Safety
/// As [`crate::device::Queue::adopt`].
unsafe fn scratch_bytes(drafts: &[Draft], terms: &Terms<'_>) -> Result<usize, Refusal> {
    let mut gathers = Vec::new();
    for (layer, draft) in drafts.iter().enumerate() {
        if matches!(draft.wanted, Wanted::All) || draft.count == draft.planned {
            continue;
        }
        // SAFETY: passed on from the caller.
        let of_layer = unsafe { terms.layers.rows(layer) }.map_err(|error| unsupported(&error))?;
        for of_tensor in core::iter::once(of_layer.k).chain(of_layer.v) {
            // SAFETY: as above.
            let source = unsafe { rows(&of_tensor) }.map_err(|error| unsupported(&error).in_layer(layer))?;
            let (indices, tail) = (Indices::none(), 0..draft.planned as usize);
            gathers.push(Gather { source, destination: source, indices, tail, destination_start: 0 });
        }
    }
    if terms.fresh {
        return Ok(0);
    }
    select::scratch_bytes(&gathers).map_err(|error| unsupported(&error))
}

fn unsupported(error: &dyn std::error::Error) -> Refusal {
    Refusal::new(kvhook_abi::raw::KVH_REASON_UNSUPPORTED, error.to_string())
}

/// Whether the rows of a layer stay as they are. A list of as many rows as there are can only name all of them.
fn keeps_all(draft: &Draft) -> bool {
    match draft.wanted {
        Wanted::All => true,
        Wanted::Ranges(_) | Wanted::Rows(_) => draft.count == draft.planned,
        Wanted::Lent(..) => false,
    }
}

fn places_of(layer: usize, draft: &Draft, terms: &Terms<'_>, of_ticket: &mut Room, of_positions: &mut Room) -> Places {
    let count = draft.count as usize;
    let heads = terms.model.layers()[layer].kv_heads as usize;
    let (lists, copied) = match &draft.wanted {
        _ if keeps_all(draft) => return Places { kept: None, positions: None },
        Wanted::Rows(list) => (list.lists, true),
        Wanted::Lent(_, list) => (list.lists, false),
        Wanted::All | Wanted::Ranges(_) => (1, true),
    };
    let agree = lists == 1 && (!copied || terms.positions[layer].heads_agree());
    Places {
        kept: copied.then(|| of_ticket.take(lists, count)),
        positions: Some(of_positions.take(if agree { 1 } else { heads }, count)),
    }
}

/// # Safety
/// As [`crate::device::Queue::adopt`].
unsafe fn adoptions_of(
    layer: usize,
    draft: &Draft,
    places: &Places,
    of_ticket: &Block,
    of_positions: &Block,
    limit: u64,
    terms: &Terms<'_>,
) -> Result<Vec<Adoption>, CudaError> {
    let kept = places.kept.map(|place| place.indices(of_ticket)).transpose()?;
    let positions = places.positions.map(|place| place.indices(of_positions)).transpose()?;
    // Heads for which anything is written.
    let heads = places.kept.iter().chain(&places.positions).map(|place| place.lists).max().unwrap_or(0);
    let adoption = |list| Adoption { list, heads, kept, positions };
    Ok(match &draft.wanted {
        _ if keeps_all(draft) => Vec::new(),
        Wanted::All => Vec::new(),
        Wanted::Ranges(ranges) => {
            let mut place = 0;
            let mut pieces = Vec::with_capacity(ranges.len());
            for range in ranges {
                let (start, count) = (range.start as usize, range.length as usize);
                // SAFETY: passed on from the caller.
                let old = unsafe { old_positions(layer, terms)? };
                pieces.push(adoption(Listed::Range { start, count, place, old }));
                place += count;
            }
            pieces
        }
        // SAFETY: as above.
        Wanted::Rows(list) => unsafe { vec![adoption(Listed::Rows(lent_list(list)?, old_positions(layer, terms)?))] },
        Wanted::Lent(_, list) => {
            let limit = u32::try_from(limit).unwrap_or(u32::MAX);
            // SAFETY: as above.
            vec![adoption(Listed::NewRows { positions: unsafe { lent_list(list)? }, limit })]
        }
    })
}

/// # Safety
/// The list lies in the device's memory, until the work enqueued now is done.
unsafe fn lent_list(list: &List) -> Result<Indices, CudaError> {
    let length = (list.lists - 1) * list.stride_head + list.count;
    // SAFETY: passed on from the caller.
    let data = unsafe { DeviceSlice::new(list.data as u64, length)? };
    Ok(Indices { data, stride_head: list.stride_head, count: list.count })
}

/// # Safety
/// As [`crate::device::Queue::adopt`].
unsafe fn old_positions(layer: usize, terms: &Terms<'_>) -> Result<Old, CudaError> {
    let raw = terms.positions[layer].raw();
    let (stride_head, count) = (raw.stride_head as usize, raw.count as usize);
    let heads = terms.model.layers()[layer].kv_heads as usize;
    let length = if count == 0 { 0 } else { heads.saturating_sub(1) * stride_head + count };
    Ok(Old {
        // SAFETY: the table is the host's own, and lives until the next commit, behind this work.
        table: unsafe { DeviceSlice::new(raw.data as u64, length)? },
        stride_head,
        count,
        length: terms.lengths[layer] as usize,
        next_position: terms.next_position as u32,
    })
}

fn layer_plan(
    layer: usize,
    draft: Draft,
    places: &Places,
    of_ticket: &Arc<Block>,
    of_positions: &Arc<Block>,
    terms: &Terms<'_>,
) -> LayerPlan {
    let all = keeps_all(&draft);
    let Draft { planned, count, wanted } = draft;
    let kept_rows = places.kept.map(|place| KeptRows {
        data: place.in_block(of_ticket),
        stride_head: place.stride_head(),
        count: place.count,
        untouched: 0,
    });
    let positions = match places.positions {
        None => terms.positions[layer].clone(),
        Some(place) => Positions::new(place.in_block(of_positions), place.stride_head(), place.count),
    };
    let kept = match (wanted, kept_rows) {
        _ if all => Kept::All,
        (Wanted::Ranges(ranges), rows) => Kept::Ranges(ranges, rows),
        (Wanted::Rows(_), Some(rows)) => Kept::Rows(rows),
        (Wanted::Lent(lent, _), _) => Kept::Lent(*lent),
        (Wanted::All | Wanted::Rows(_), _) => Kept::All,
    };
    LayerPlan { planned, count, kept, positions }
}
