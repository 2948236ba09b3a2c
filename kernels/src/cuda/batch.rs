//! The parameters of a launch over views of several layers and sequences.

use std::mem::MaybeUninit;

use super::error::CudaError;
use super::rows::RawLayout;

/// Layouts that the views of one launch may have; `LAYOUTS` of common.cuh.
const LAYOUTS: usize = 16;

/// Bytes that a launch's parameters may take; `PARAMETER_BYTES` of common.cuh.
pub(crate) const PARAMETER_BYTES: usize = 32_764;

/// `Batch` of common.cuh: `N` items at most, with what they share.
#[repr(C)]
pub(crate) struct Batch<H, I, const N: usize> {
    /// What the items share.
    pub(crate) head: H,
    count: u32,
    tiles: u32,
    layouts: [RawLayout; LAYOUTS],
    /// Those behind `count` are never written, nor read by a kernel: to clear them is most of what a launch costs the host
    /// beside the driver.
    items: [MaybeUninit<I>; N],
}

impl<H: Copy, I: Copy, const N: usize> Batch<H, I, N> {
    /// Refused by the compiler where a launch could not take it.
    const FITS: () = assert!(size_of::<Self>() <= PARAMETER_BYTES);

    /// Calls `launch` for each batch that `things` fill; it may change the head.
    ///
    /// `encode` gives a thing's item, whose first tile is the number given, and its tiles; `None` where the layouts are
    /// full, which begins the next batch. A thing of no tiles is left out.
    pub(crate) fn for_each<T>(
        head: H,
        things: &[T],
        encode: impl Fn(&T, &mut Layouts, Place) -> Option<(I, u32)>,
        mut launch: impl FnMut(&mut Self) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        const { Self::FITS };
        if things.is_empty() {
            return Ok(());
        }
        let (layouts, items) = ([RawLayout::default(); LAYOUTS], [const { MaybeUninit::uninit() }; N]);
        // Made where it stays: it is as large as a launch's parameters may be.
        let mut batch = Self { head, count: 0, tiles: 0, layouts, items };
        let mut layouts = Layouts::default();
        for (index, thing) in things.iter().enumerate() {
            // A thing takes fewer layouts than a launch has, so the second try finds room.
            for again in [false, true] {
                let place = Place { first_tile: batch.tiles, item: index as u32 };
                let encoded = encode(thing, &mut layouts, place);
                let room = (batch.count as usize) < N;
                match encoded
                    .filter(|(_, tiles)| room && batch.tiles.checked_add(*tiles).is_some_and(|all| all < MOST_TILES))
                {
                    Some((_, 0)) => break,
                    Some((item, tiles)) => {
                        batch.items[batch.count as usize].write(item);
                        batch.count += 1;
                        batch.tiles += tiles;
                        break;
                    }
                    None if batch.tiles > 0 => {
                        batch.layouts = layouts.raw;
                        launch(&mut batch)?;
                        // Items behind `count` are nobody's.
                        (batch.head, batch.count, batch.tiles) = (head, 0, 0);
                        layouts = Layouts::default();
                    }
                    // Things of no tiles have taken all layouts.
                    None if encoded.is_none() && !again => layouts = Layouts::default(),
                    None => {
                        return Err(CudaError::TooLarge {
                            what: "the tiles of one item",
                            found: encoded.map_or(0, |(_, tiles)| tiles as usize),
                            most: MOST_TILES as usize,
                        });
                    }
                }
            }
        }
        if batch.tiles > 0 {
            batch.layouts = layouts.raw;
            launch(&mut batch)?;
        }
        Ok(())
    }

    /// The items.
    pub(crate) fn items(&self) -> &[I] {
        let written = &self.items[..self.count as usize];
        // SAFETY: `for_each` wrote the first `count` items.
        unsafe { written.assume_init_ref() }
    }

    /// Tiles of all items.
    pub(crate) fn tiles(&self) -> u32 {
        self.tiles
    }
}

/// Tiles of one launch are fewer, the most blocks of a grid.
const MOST_TILES: u32 = i32::MAX as u32;

/// Where an item goes.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Tiles of the items before it in its launch.
    pub(crate) first_tile: u32,
    /// Things before it in the whole operation: the number that a verdict gives.
    pub(crate) item: u32,
}

/// The layouts of one launch.
#[derive(Default)]
pub(crate) struct Layouts {
    raw: [RawLayout; LAYOUTS],
    count: usize,
}

impl Layouts {
    /// The number of a layout, which is added where it is new; `None` when there is no room.
    pub(crate) fn number(&mut self, layout: &RawLayout) -> Option<u8> {
        let known = self.raw[..self.count].iter().position(|known| known == layout);
        let number = known.unwrap_or(self.count);
        *self.raw.get_mut(number)? = *layout;
        self.count = self.count.max(number + 1);
        Some(number as u8)
    }
}

/// Collects results with room reserved, which collecting them into a `Result` does not do: descriptions are large.
pub(crate) fn try_map<'a, T, U, E>(things: &'a [T], make: impl Fn(&'a T) -> Result<U, E>) -> Result<Vec<U>, E> {
    let mut made = Vec::with_capacity(things.len());
    for thing in things {
        made.push(make(thing)?);
    }
    Ok(made)
}
