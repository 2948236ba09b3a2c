//! The MLP that makes one row of each group of adjacent rows: FastCache's compressor.

use half::{bf16, f16};

use super::batch::{Batch, Layouts, Place};
use super::device::{Device, Family, Grid, Image, Kernel, Stream};
use super::error::CudaError;
use super::memory::DeviceSlice;
use super::rows::{RawView, Rows};
use super::verdict::{Verdict, check_items};
use crate::check::check_len;
use crate::dtype::Dtype;
use crate::error::KernelError;
pub use crate::grouped_mlp::{Groups, Linear};
use crate::scratch;

/// The most shared memory that a block of any device has.
const MOST_SHARED: u32 = 232_448;

const fn kernel(name: &'static str) -> Kernel {
    Kernel { name, shared: MOST_SHARED }
}

pub(crate) const FAMILY: Family = Family {
    image: &Image(*include_bytes!("../../prebuilt/grouped_mlp.fatbin")),
    kernels: &[
        kernel("grouped_mlp_f16_64"),
        kernel("grouped_mlp_f16_96"),
        kernel("grouped_mlp_f16_128"),
        kernel("grouped_mlp_bf16_64"),
        kernel("grouped_mlp_bf16_96"),
        kernel("grouped_mlp_bf16_128"),
        kernel("grouped_mlp_ring_f16_64"),
        kernel("grouped_mlp_ring_f16_96"),
        kernel("grouped_mlp_ring_f16_128"),
        kernel("grouped_mlp_ring_bf16_64"),
        kernel("grouped_mlp_ring_bf16_96"),
        kernel("grouped_mlp_ring_bf16_128"),
        kernel("grouped_mlp_wide_f16_128"),
        kernel("grouped_mlp_wide_bf16_128"),
        kernel("grouped_mlp_f32"),
        kernel("grouped_mlp_f16"),
        kernel("grouped_mlp_bf16"),
    ],
};

/// How the products are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Weights and hidden values in f32, and the CPU's bits: for any dtype, head_dim up to some 500, and layout.
    Exact,
    /// Tensor cores, for f16 and bf16 at head_dim 64, 96 and 128 in 16-byte words. Weights, and the hidden values after
    /// each `relu`, are rounded to the dtype; products are exact, and sums and biases f32. That is what PyTorch does with
    /// such a model, but for its rounding of the sums before each bias. With e half a step of the dtype at 1 (2^-8 for
    /// bf16, 2^-11 for f16), results differ from the exact ones by at most 4 e of a row's largest in the tests: six
    /// roundings, whose errors do not add up in phase. A hidden f16 above 65,504 makes the row a fault.
    TensorCores,
}

impl Arithmetic {
    /// The fastest for rows of a dtype and head_dim.
    pub fn fastest(dtype: Dtype, head_dim: usize) -> Self {
        let tensor_cores = dtype != Dtype::F32 && matches!(head_dim, 64 | 96 | 128);
        if tensor_cores { Self::TensorCores } else { Self::Exact }
    }
}

/// `y = W3 relu(W2 relu(W1 x + b1) + b2) + b3`, in device memory. `x` is `factor` adjacent rows of one KV head, oldest
/// first, and `y` is one row of the same `head_dim`.
#[derive(Debug, Clone, Copy)]
pub struct GroupedMlp {
    shape: Shape,
    weights: DeviceSlice<u8>,
}

/// What a packed MLP is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of a group.
    pub factor: usize,
    /// Elements of a row.
    pub head_dim: usize,
    /// Of the rows.
    pub dtype: Dtype,
    /// How the products are done.
    pub arithmetic: Arithmetic,
}

impl Shape {
    fn check(self) -> Result<(), CudaError> {
        let Self { factor, head_dim, dtype, arithmetic } = self;
        if factor == 0 || head_dim == 0 || factor.checked_mul(head_dim).is_none_or(|inputs| inputs > MOST_INPUTS) {
            return Err(KernelError::Group { factor, head_dim }.into());
        }
        if arithmetic == Arithmetic::TensorCores && arithmetic != Arithmetic::fastest(dtype, head_dim) {
            let reason =
                format!("tensor cores take f16 and bf16 at head_dim 64, 96 and 128, not {dtype} at {head_dim}");
            return Err(KernelError::Layout { reason }.into());
        }
        Ok(())
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        let Self { factor, head_dim, arithmetic, .. } = *self;
        match arithmetic {
            Arithmetic::Exact => {
                let rows = [factor * head_dim, head_dim, head_dim].map(|inputs| inputs + 1);
                rows.iter().sum::<usize>() * head_dim.next_multiple_of(4) * 4
            }
            Arithmetic::TensorCores => 3 * head_dim * 4 + (factor + 2) * head_dim * head_dim * 2,
        }
    }
}

/// Packs three layers on the host, once, for a copy to the device: `W1` is `[head_dim, factor * head_dim]`, `W2` and `W3`
/// are `[head_dim, head_dim]`.
///
/// # Errors
/// [`KernelError::Group`] for a factor or head_dim of 0; [`KernelError::Layout`] for a shape without tensor cores;
/// [`KernelError::SliceLength`] for a matrix or bias of another shape; no memory.
pub fn pack(shape: Shape, layers: [Linear<'_>; 3]) -> Result<Vec<u8>, CudaError> {
    shape.check()?;
    let Shape { factor, head_dim, dtype, arithmetic } = shape;
    let mut packed = Packed(scratch::filled(shape.bytes(), 0u8)?);
    let mut place = match arithmetic {
        Arithmetic::Exact => 0,
        Arithmetic::TensorCores => 3 * head_dim * 4,
    };
    for (number, layer) in layers.iter().enumerate() {
        let inputs = if number == 0 { factor * head_dim } else { head_dim };
        check_len("weight of a layer", layer.weight.len(), inputs * head_dim)?;
        check_len("bias of a layer", layer.bias.len(), head_dim)?;
        match arithmetic {
            Arithmetic::Exact => place = packed.exact(place, layer, inputs, head_dim),
            Arithmetic::TensorCores => place = packed.chunks(place, layer, number, head_dim, dtype),
        }
    }
    Ok(packed.0)
}

/// Weights as the kernels read them.
struct Packed(Vec<u8>);

impl Packed {
    fn f32(&mut self, place: usize, value: f32) {
        self.0[place..place + 4].copy_from_slice(&value.to_ne_bytes());
    }

    /// The bias, then `[input][output]`, outputs padded to a multiple of 4.
    fn exact(&mut self, place: usize, layer: &Linear<'_>, inputs: usize, outputs: usize) -> usize {
        let padded = outputs.next_multiple_of(4);
        for output in 0..outputs {
            self.f32(place + output * 4, layer.bias[output]);
            for input in 0..inputs {
                self.f32(place + ((input + 1) * padded + output) * 4, layer.weight[output * inputs + input]);
            }
        }
        place + (inputs + 1) * padded * 4
    }

    /// The bias to its place at the front, and chunks of 32 inputs: for each 8 outputs and each lane, its 8 inputs of
    /// output `lane / 4`. The orders of inputs and outputs are those in which lanes hold values.
    fn chunks(&mut self, place: usize, layer: &Linear<'_>, number: usize, dim: usize, dtype: Dtype) -> usize {
        let inputs = layer.weight.len() / dim;
        // The last layer's sums become 16 adjacent bytes of a row.
        let output = |eight: usize, column: usize| match number {
            2 => eight / 4 * 32 + column / 2 * 8 + eight % 4 * 2 + column % 2,
            _ => eight * 8 + column,
        };
        for eight in 0..dim / 8 {
            for column in 0..8 {
                self.f32((number * dim + eight * 8 + column) * 4, layer.bias[output(eight, column)]);
            }
        }
        for chunk in 0..inputs / 32 {
            for eight in 0..dim / 8 {
                for lane in 0..32 {
                    for element in 0..8 {
                        // Rows of the cache are read 8 elements a lane; hidden values lie where sums lie.
                        let input = match number {
                            0 => lane % 4 * 8 + element,
                            _ => element / 2 * 8 + lane % 4 * 2 + element % 2,
                        };
                        let weight = layer.weight[output(eight, lane / 4) * inputs + chunk * 32 + input];
                        let bits = match dtype {
                            Dtype::Bf16 => bf16::from_f32(weight).to_bits(),
                            _ => f16::from_f32(weight).to_bits(),
                        };
                        let at = place + (((chunk * (dim / 8) + eight) * 32 + lane) * 8 + element) * 2;
                        self.0[at..at + 2].copy_from_slice(&bits.to_ne_bytes());
                    }
                }
            }
        }
        place + inputs * dim * 2
    }
}

impl GroupedMlp {
    /// Describes what [`pack`] made, copied to the device.
    ///
    /// # Errors
    /// As [`pack`]; [`CudaError::TooShort`] for less than [`Shape::bytes`]; [`CudaError::Address`] unless at a multiple
    /// of 16 bytes.
    pub fn new(shape: Shape, weights: DeviceSlice<u8>) -> Result<Self, CudaError> {
        shape.check()?;
        let address = weights.at_least("packed weights", shape.bytes())?;
        if !address.is_multiple_of(16) {
            return Err(CudaError::Address { what: "packed weights", address, alignment: 16 });
        }
        Ok(Self { shape, weights })
    }

    /// What it is for.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The packed weights.
    pub fn weights(&self) -> DeviceSlice<u8> {
        self.weights
    }
}

/// Groups of one K or V of one layer of one sequence, in all its KV heads.
#[derive(Debug, Clone, Copy)]
pub struct Compress {
    /// The MLP; items that share one are best next to each other.
    pub mlp: GroupedMlp,
    /// Rows of the groups.
    pub source: Rows,
    /// Rows written.
    pub destination: Rows,
    /// Which rows.
    pub groups: Groups,
    /// Positions of the destination's rows, the same for all heads: that of a result that is a fault becomes `u32::MAX`,
    /// which [`adopt`](super::plan::adopt), and so a host, refuses for what it is.
    pub positions: Option<DeviceSlice<u32>>,
}

/// Makes one row of each group, as [`crate::grouped_mlp::grouped_mlp`] defines it. Views must not overlap. One launch for
/// each 399 items of one [`Shape`].
///
/// A result that is not a number or does not fit the dtype is written nevertheless (as infinity or NaN). It spoils its
/// position, and the first one goes into `verdict`, with its row of the destination as place.
///
/// Floor: reads each row and writes each result once, `heads * (factor + 1) * count * head_dim * dtype` bytes, and
/// multiplies, `2 * (factor + 2) * head_dim^2` operations for each group and head. The weights stay in shared memory where
/// they fit: up to factor 5 at head_dim 128 on an H100.
///
/// # Errors
/// Another dtype or head_dim than the MLP's; heads that differ; rows outside a view; for tensor cores, rows that are not
/// 16-byte words; positions that end before the rows do; [`CudaError::TooLarge`] for a head_dim beyond shared memory, or
/// more items than a verdict can name; [`CudaError::Driver`].
pub fn grouped_mlp(
    device: &Device,
    stream: Stream,
    items: &[Compress],
    verdict: Option<&Verdict>,
) -> Result<(), CudaError> {
    if verdict.is_some() {
        check_items(items.len())?;
    }
    let mut tasks = tasks(device, items)?;
    let _entered = device.enter()?;
    while let Some(&Task { shape, plan, .. }) = tasks.first() {
        let (chosen, others): (Vec<_>, Vec<_>) = tasks.into_iter().partition(|task| task.shape == shape);
        let head = Head {
            verdict: Verdict::address_of(verdict),
            head_dim: shape.head_dim as u32,
            factor: shape.factor as u32,
            plain_tile: plan.tile,
            reserved: 0,
        };
        Batch::<Head, Item, 399>::for_each(head, &chosen, Task::encode, |batch| {
            let blocks = if plan.persistent { batch.tiles().min(device.multiprocessors()) } else { batch.tiles() };
            let grid = Grid { shared: plan.shared, ..Grid::new(blocks, plan.threads) };
            // SAFETY: the kernel takes this batch; rows and weights are lent until the stream has run it.
            unsafe { device.launch(stream, plan.kernel, grid, batch) }
        })?;
        tasks = others;
    }
    Ok(())
}

/// Finds out whether [`grouped_mlp`] takes items, and enqueues nothing.
///
/// # Errors
/// As [`grouped_mlp`].
pub fn check(device: &Device, items: &[Compress]) -> Result<(), CudaError> {
    tasks(device, items).map(drop)
}

fn tasks(device: &Device, items: &[Compress]) -> Result<Vec<Task>, CudaError> {
    (0u32..).zip(items).map(|(number, item)| Task::new(device, item, number)).collect()
}

const THREADS: u32 = 256;

/// Threads of a block of the kernels for Hopper, and groups of a tile.
const WIDE_THREADS: u32 = 384;
const WIDE_TILE: u32 = 64;

/// Where their weights begin is a multiple of this.
const WIDE_ALIGNMENT: usize = 1024;

/// Groups of a tile, as in grouped_mlp.cu.
const TILE: u32 = 256;

/// Chunks of weights in shared memory where not all fit, as in grouped_mlp.cu.
const RING: usize = 4;

/// Inputs of the first layer: their weights' places fit 32 bits.
const MOST_INPUTS: usize = 1 << 16;

/// How a shape is launched.
#[derive(Debug, Clone, Copy)]
struct Plan {
    kernel: &'static str,
    /// Groups of a tile.
    tile: u32,
    threads: u32,
    shared: u32,
    /// Whether blocks take several tiles.
    persistent: bool,
}

impl Plan {
    fn new(device: &Device, shape: &Shape) -> Result<Self, CudaError> {
        let (dim, room) = (shape.head_dim, device.shared_per_block() as usize);
        if shape.arithmetic == Arithmetic::TensorCores {
            let wide = shape.bytes() + WIDE_ALIGNMENT;
            if device.has_wide_products() && dim == 128 && wide <= room {
                let kernel = match shape.dtype {
                    Dtype::Bf16 => "grouped_mlp_wide_bf16_128",
                    _ => "grouped_mlp_wide_f16_128",
                };
                let (tile, threads) = (WIDE_TILE, WIDE_THREADS);
                return Ok(Self { kernel, tile, threads, shared: wide as u32, persistent: true });
            }
            let resident = shape.bytes() <= room;
            let shared = if resident { shape.bytes() } else { 3 * dim * 4 + RING * dim * 64 };
            let kernel = match (shape.dtype, dim, resident) {
                (Dtype::Bf16, 64, true) => "grouped_mlp_bf16_64",
                (Dtype::Bf16, 96, true) => "grouped_mlp_bf16_96",
                (Dtype::Bf16, _, true) => "grouped_mlp_bf16_128",
                (Dtype::Bf16, 64, false) => "grouped_mlp_ring_bf16_64",
                (Dtype::Bf16, 96, false) => "grouped_mlp_ring_bf16_96",
                (Dtype::Bf16, _, false) => "grouped_mlp_ring_bf16_128",
                (_, 64, true) => "grouped_mlp_f16_64",
                (_, 96, true) => "grouped_mlp_f16_96",
                (_, _, true) => "grouped_mlp_f16_128",
                (_, 64, false) => "grouped_mlp_ring_f16_64",
                (_, 96, false) => "grouped_mlp_ring_f16_96",
                (_, _, false) => "grouped_mlp_ring_f16_128",
            };
            return Ok(Self { kernel, tile: TILE, threads: THREADS, shared: shared as u32, persistent: true });
        }
        let kernel = match shape.dtype {
            Dtype::F32 => "grouped_mlp_f32",
            Dtype::F16 => "grouped_mlp_f16",
            Dtype::Bf16 => "grouped_mlp_bf16",
        };
        // 32 inputs and two layers' hidden values of each group. Threads take 8 groups by 4 outputs.
        let shared = |tile: usize| (32 + 2 * dim) * tile * 4;
        let tile = [128, 64, 32, 16, 8].into_iter().find(|&tile| shared(tile) <= room && tile * dim <= 64 * 256);
        let Some(tile) = tile.or_else(|| (shared(8) <= room).then_some(8)) else {
            let most = (room / 32).saturating_sub(32) / 2;
            return Err(CudaError::TooLarge { what: "the head_dim of an MLP", found: dim, most });
        };
        Ok(Self { kernel, tile: tile as u32, threads: THREADS, shared: shared(tile) as u32, persistent: false })
    }
}

/// An item that was checked.
#[derive(Clone, Copy)]
struct Task {
    shape: Shape,
    plan: Plan,
    source: Rows,
    destination: Rows,
    tiles: u32,
    item: Item,
}

impl Task {
    fn new(device: &Device, compress: &Compress, number: u32) -> Result<Self, CudaError> {
        let &Compress { mlp, source, destination, groups, positions } = compress;
        let shape = mlp.shape;
        let heads = source.kv_heads();
        for (what, rows) in [("rows of the groups", source), ("destination", destination)] {
            if rows.head_dim() != shape.head_dim {
                let (found, expected) = (rows.head_dim(), shape.head_dim);
                return Err(KernelError::HeadDimMismatch { what, found, expected }.into());
            }
            if rows.dtype() != shape.dtype {
                let (source_dtype, destination_dtype) = (rows.dtype(), shape.dtype);
                return Err(KernelError::DtypeMismatch { source_dtype, destination_dtype }.into());
            }
            if shape.arithmetic == Arithmetic::TensorCores && !rows.in_words() {
                let reason = format!("{what} for tensor cores: expected whole 16-byte words at multiples of 16 bytes");
                return Err(KernelError::Layout { reason }.into());
            }
        }
        let source_end = groups.source_start.saturating_add(groups.count.saturating_mul(shape.factor));
        source.check(0..heads, groups.source_start..source_end)?;
        let destination_end = groups.destination_start.saturating_add(groups.count);
        destination.check(0..heads, groups.destination_start..destination_end)?;
        let positions = positions.map_or(Ok(0), |positions| positions.at_least("positions", destination_end))?;
        let plan = Plan::new(device, &shape)?;
        let all = heads.saturating_mul(groups.count);
        if all > MOST_GROUPS {
            return Err(CudaError::TooLarge { what: "the groups of one item", found: all, most: MOST_GROUPS });
        }
        let item = Item {
            source: source.raw_view(),
            destination: destination.raw_view(),
            weights: mlp.weights.address(),
            positions,
            first_tile: 0,
            number,
            source_start: groups.source_start as u32,
            count: groups.count as u32,
            destination_start: groups.destination_start as u32,
            heads: heads as u16,
            source_layout: 0,
            destination_layout: 0,
            heads_inside: u8::from(source.token_major()),
            reserved: [0; 7],
        };
        Ok(Self { shape, plan, source, destination, tiles: (all as u32).div_ceil(plan.tile), item })
    }

    fn encode(&self, layouts: &mut Layouts, place: Place) -> Option<(Item, u32)> {
        let source_layout = layouts.number(self.source.raw())?;
        let destination_layout = layouts.number(self.destination.raw())?;
        Some((Item { source_layout, destination_layout, first_tile: place.first_tile, ..self.item }, self.tiles))
    }
}

/// The kernels count groups in 32 bits.
const MOST_GROUPS: usize = i32::MAX as usize;

/// `Head` of grouped_mlp.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    verdict: u64,
    head_dim: u32,
    factor: u32,
    plain_tile: u32,
    reserved: u32,
}

/// `Item` of grouped_mlp.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Item {
    source: RawView,
    destination: RawView,
    weights: u64,
    positions: u64,
    first_tile: u32,
    number: u32,
    source_start: u32,
    count: u32,
    destination_start: u32,
    heads: u16,
    source_layout: u8,
    destination_layout: u8,
    heads_inside: u8,
    reserved: [u8; 7],
}

const _: () = assert!(size_of::<Item>() == 80);
