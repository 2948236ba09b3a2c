//! Tiles of rows, for kernels that read whole rows of a cache.

use std::ops::Range;

use super::batch::Layouts;
use super::error::CudaError;
use super::rows::{RawView, Rows};
use crate::dtype::Dtype;
use crate::error::KernelError;

/// Rows of a step; `TILE_ROWS` of tile.cuh, and the threads of a block.
pub(crate) const TILE_ROWS: u32 = 256;

/// Words that a lane takes of a row of 16-byte words, and elements of any other row.
const WORDS_OF_LANE: usize = 2;
const ELEMENTS_OF_LANE: usize = 32;

/// How a view's rows are cut into tiles: by the view alone, so that its results do not depend on the batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    /// The kernel for rows of 16-byte words, else the one for any rows.
    pub(crate) in_words: bool,
    /// Parts of the heads.
    pub(crate) chains: u32,
    /// Heads of a tile.
    pub(crate) heads: u32,
    /// Tiles of all chains.
    pub(crate) tiles: u32,
    raw: RawTiles,
}

impl Tiling {
    /// Cuts rows into tiles of `steps` steps of [`TILE_ROWS`] rows, and of up to `heads` heads (a power of two) where those
    /// of a token lie close together.
    pub(crate) fn new(rows: &Rows, tokens: Range<usize>, heads: u32, steps: u32) -> Result<Self, CudaError> {
        rows.check(0..0, tokens.clone())?;
        let per_word = 16 / rows.dtype().size();
        let words = rows.head_dim().div_ceil(per_word);
        let in_words = rows.in_words() && words <= 32 * WORDS_OF_LANE;
        let most = 32 * ELEMENTS_OF_LANE;
        if !in_words && rows.head_dim() > most {
            return Err(CudaError::TooLarge { what: "head_dim", found: rows.head_dim(), most });
        }
        let lanes = if in_words { words.next_power_of_two().min(32) as u32 } else { 32 };
        let kv_heads = rows.kv_heads() as u32;
        let most = heads.min(TILE_ROWS / lanes).min(kv_heads.max(1));
        let heads_shift = if rows.token_major() { most.ilog2() } else { 0 };
        let heads = 1 << heads_shift;
        let chains = kv_heads.div_ceil(heads);
        let tiles_of_chain = tokens.len().div_ceil((TILE_ROWS * steps / heads) as usize) as u32;
        let tiles = chains.checked_mul(tiles_of_chain).filter(|&tiles| tiles < MOST_TILES);
        Ok(Self {
            in_words,
            chains,
            heads,
            tiles: tiles.ok_or(CudaError::TooLarge {
                what: "the tiles of one view",
                found: chains as usize * tiles_of_chain as usize,
                most: MOST_TILES as usize - 1,
            })?,
            raw: RawTiles {
                view: rows.raw_view(),
                start: tokens.start as u32,
                length: tokens.len() as u32,
                tiles_of_chain,
                heads_shift: heads_shift as u8,
                steps: steps as u8,
                lanes_shift: lanes.ilog2() as u8,
                layout: 0,
            },
        })
    }

    /// Tiles of a chain.
    pub(crate) fn tiles_of_chain(&self) -> u32 {
        self.raw.tiles_of_chain
    }

    /// For the kernel; `None` where the layouts are full.
    pub(crate) fn encode(&self, rows: &Rows, layouts: &mut Layouts) -> Option<RawTiles> {
        Some(RawTiles { layout: layouts.number(rows.raw())?, ..self.raw })
    }
}

/// Tiles of a view are fewer: key_diff.cu counts them in 30 bits.
const MOST_TILES: u32 = 1 << 30;

/// `Tiles` of tile.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RawTiles {
    view: RawView,
    start: u32,
    length: u32,
    tiles_of_chain: u32,
    heads_shift: u8,
    steps: u8,
    lanes_shift: u8,
    layout: u8,
}

/// The kernels of one operation, by dtype.
pub(crate) struct Names {
    /// For rows of 16-byte words: f32, f16, bf16.
    pub(crate) in_words: [&'static str; 3],
    /// For any rows.
    pub(crate) any: [&'static str; 3],
}

/// Which of an operation's kernels a view takes.
pub(crate) type Variant = (Dtype, bool);

/// All of them.
pub(crate) const VARIANTS: [Variant; 6] = [
    (Dtype::F32, true),
    (Dtype::F16, true),
    (Dtype::Bf16, true),
    (Dtype::F32, false),
    (Dtype::F16, false),
    (Dtype::Bf16, false),
];

impl Names {
    pub(crate) fn of(&self, (dtype, in_words): Variant) -> &'static str {
        let names = if in_words { &self.in_words } else { &self.any };
        match dtype {
            Dtype::F32 => names[0],
            Dtype::F16 => names[1],
            Dtype::Bf16 => names[2],
        }
    }
}

/// Scores of all heads of a view fit their memory.
pub(crate) fn check_scores(rows: &Rows, tokens: usize, found: usize) -> Result<(), KernelError> {
    crate::check::check_len("scores", found, rows.kv_heads() * tokens)
}
