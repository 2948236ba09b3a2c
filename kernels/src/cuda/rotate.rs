//! Re-rotation: keys that get other positions.

use std::f64::consts::TAU;
use std::ops::Range;

use super::batch::{Batch, Layouts, Place, try_map};
use super::check::Indices;
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::rows::{RawView, Rows};
use crate::check::check_len;
use crate::dtype::Dtype;
use crate::rotate::{Pairing, Rotary, check_pairs};

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/rotate.fatbin")),
    kernels: &[
        Kernel { name: "rotate_f32", shared: 0 },
        Kernel { name: "rotate_f16", shared: 0 },
        Kernel { name: "rotate_bf16", shared: 0 },
        Kernel { name: "rotate_pairs_f32", shared: 0 },
        Kernel { name: "rotate_pairs_f16", shared: 0 },
        Kernel { name: "rotate_pairs_bf16", shared: 0 },
    ],
};

/// By how many positions each row moves.
#[derive(Debug, Clone, Copy)]
pub enum Shift {
    /// All rows by this many; below 0: towards the front.
    All(i64),
    /// The row at place `i` of a head's list was made at position `list[i]`, and its position is now its row number.
    From(Indices),
}

/// Keys of one layer of one sequence, of all KV heads.
#[derive(Debug, Clone)]
pub struct Rotate {
    /// Rows turned in place.
    pub rows: Rows,
    /// Which of them.
    pub tokens: Range<usize>,
    /// How far.
    pub shift: Shift,
}

/// Turns rows in place, as [`crate::rotate::rotate`] defines it. All items share the model's embedding; one launch for each
/// 512 items of one dtype and path.
///
/// Angles are fixed-point fractions of a turn, exact to 1e-10 after a million positions. Rows differ from the CPU's by
/// 1e-6 of their largest channel before rounding to the dtype.
///
/// Floor: reads and writes each row once, `2 * heads * tokens * head_dim * dtype` bytes; channels that do not turn are not
/// touched.
///
/// # Errors
/// Tokens outside the view; pairs that do not fit a row, or more than 256 of them; lists of another length than `tokens`,
/// or that end behind their buffer; [`CudaError::Driver`].
pub fn rotate(device: &Device, stream: Stream, items: &[Rotate], rotary: &Rotary<'_>) -> Result<(), CudaError> {
    let pairs = rotary.frequencies.len();
    if pairs > MOST_PAIRS {
        return Err(CudaError::TooLarge { what: "the pairs of channels to rotate", found: pairs, most: MOST_PAIRS });
    }
    let mut head = Head {
        turns: [0; MOST_PAIRS],
        pairs: pairs as u32,
        interleaved: u32::from(rotary.pairing == Pairing::Interleaved),
    };
    for (turns, frequency) in head.turns.iter_mut().zip(rotary.frequencies) {
        // 2^64 steps are a turn.
        *turns = ((frequency / TAU).rem_euclid(1.0) * 2.0f64.powi(64)) as u64;
    }
    let tasks = try_map(items, |item| Task::new(item, rotary))?;
    let _entered = device.enter()?;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for in_words in [false, true] {
            let chosen: Vec<_> =
                tasks.iter().filter(|task| (task.rows.dtype(), task.in_words) == (dtype, in_words)).copied().collect();
            let name = match (dtype, in_words) {
                (Dtype::F32, true) => "rotate_f32",
                (Dtype::F16, true) => "rotate_f16",
                (Dtype::Bf16, true) => "rotate_bf16",
                (Dtype::F32, false) => "rotate_pairs_f32",
                (Dtype::F16, false) => "rotate_pairs_f16",
                (Dtype::Bf16, false) => "rotate_pairs_bf16",
            };
            Batch::<Head, Item, 512>::for_each(head, &chosen, Task::encode, |batch| {
                // SAFETY: the kernel takes this batch; rows and lists are lent until the stream has run it.
                unsafe { device.launch(stream, name, Grid::new(batch.tiles(), THREADS), batch) }
            })?;
        }
    }
    Ok(())
}

/// Pairs of channels that the parameters have room for.
const MOST_PAIRS: usize = 256;

const THREADS: u32 = 256;

/// Units of a thread, as in rotate.cu.
const UNITS: u32 = 4;

/// Units of an item.
const MOST_UNITS: usize = 1 << 31;

/// An item that was checked.
#[derive(Clone, Copy)]
struct Task {
    rows: Rows,
    in_words: bool,
    units: usize,
    item: Item,
}

impl Task {
    fn new(rotate: &Rotate, rotary: &Rotary<'_>) -> Result<Self, CudaError> {
        let Rotate { rows, tokens, shift } = rotate;
        let (heads, pairs) = (rows.kv_heads(), rotary.frequencies.len());
        rows.check(0..heads, tokens.clone())?;
        check_pairs(pairs, rows.head_dim())?;
        let (positions, positions_stride_head, shift) = match shift {
            Shift::All(shift) => (0, 0, *shift),
            Shift::From(positions) => {
                check_len("positions of rows", positions.count, tokens.len())?;
                let (address, stride) = positions.address(heads)?;
                (address, i64::from(stride), 0)
            }
        };
        let elements = 16 / rows.dtype().size();
        let pairs_of_word = if rotary.pairing == Pairing::Interleaved { elements / 2 } else { elements };
        let in_words = rows.in_words() && pairs.is_multiple_of(pairs_of_word);
        let units = heads * tokens.len() * if in_words { pairs / pairs_of_word } else { pairs };
        if units > MOST_UNITS {
            return Err(CudaError::TooLarge { what: "the pairs of one item", found: units, most: MOST_UNITS });
        }
        let item = Item {
            rows: rows.raw_view(),
            positions,
            positions_stride_head,
            shift,
            first_tile: 0,
            first_token: tokens.start as u32,
            tokens: tokens.len() as u32,
            heads: heads as u16,
            layout: 0,
            heads_inside: u8::from(rows.token_major()),
        };
        Ok(Self { rows: *rows, in_words, units, item })
    }

    fn encode(&self, layouts: &mut Layouts, place: Place) -> Option<(Item, u32)> {
        let layout = layouts.number(self.rows.raw())?;
        let tiles = (self.units as u64).div_ceil(u64::from(THREADS * UNITS)) as u32;
        Some((Item { layout, first_tile: place.first_tile, ..self.item }, tiles))
    }
}

/// `Head` of rotate.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    turns: [u64; MOST_PAIRS],
    pairs: u32,
    interleaved: u32,
}

/// `Item` of rotate.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    rows: RawView,
    positions: u64,
    positions_stride_head: i64,
    shift: i64,
    first_tile: u32,
    first_token: u32,
    tokens: u32,
    heads: u16,
    layout: u8,
    heads_inside: u8,
}

const _: () = assert!(size_of::<Item>() == 56);
