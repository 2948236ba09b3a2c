//! Plans for a cache on a CUDA device: the same rows, made by the device from weights that stay there.

use std::sync::Arc;

use kvhook_abi::cuda::check::Indices;
use kvhook_abi::cuda::grouped_mlp::{self, Arithmetic, Compress, GroupedMlp, Groups, Shape, grouped_mlp};
use kvhook_abi::cuda::plan::{Progression, progressions};
use kvhook_abi::cuda::select::{self, Gather, gather};
use kvhook_abi::cuda::{CudaError, Device, DeviceSlice};
use kvhook_abi::tasks::Kept as _;
use kvhook_abi::{Call, CreateContext, Plan, PluginError, Request, Requests, SequenceView};
use kvhook_mlp_weights::{Mlp, Weights};

use crate::config::Settings;
use crate::error::Kept;
use crate::mlps::{Hash, LayerMlps, Part, Shared, hash, linear};
use crate::plan::{Rewrite, rewrites};
use crate::stretches::{PositionRule, Run};

/// A device with the MLPs of a model.
pub struct OnDevice {
    device: Device,
    /// None where a layer is not compressed.
    layers: Vec<Option<LayerMlps<GroupedMlp>>>,
}

/// What one call enqueues.
#[derive(Default)]
struct Work {
    positions: Vec<Progression>,
    rows: Vec<Gather>,
    groups: Vec<Compress>,
}

impl OnDevice {
    /// Packs the weights of the layers that are compressed for the model's device and dtype and copies them there, or gives
    /// those that an instance on that device has. They go when the last instance goes.
    ///
    /// # Errors
    /// Those of [`CreateContext::cuda_device`]; a shape that the kernels do not take; no memory.
    pub fn shared(
        context: &CreateContext<'_>,
        settings: &Settings,
        weights: &Weights,
    ) -> Result<Arc<Self>, PluginError> {
        /// By content, layers, device and dtype.
        static SHARED: Shared<(Hash, Vec<bool>, i32, usize), OnDevice> = Shared::new();
        let model = context.model;
        let dtype = model.dtype()?;
        let compressed = &settings.layers;
        SHARED.get_or_make((hash(weights), compressed.clone(), model.device_id, dtype as usize), || {
            let (factor, head_dim) = (weights.factor, weights.head_dim);
            let shape = Shape { factor, head_dim, dtype, arithmetic: Arithmetic::fastest(dtype, head_dim) };
            let mut device = context.cuda_device()?;
            let mut pack = |mlp: &Mlp| GroupedMlp::new(shape, device.keep(&grouped_mlp::pack(shape, linear(mlp))?)?);
            let layers = weights.layers.iter().zip(compressed);
            let layers = layers.map(|(layer, wanted)| wanted.then(|| LayerMlps::pack(layer, &mut pack)).transpose());
            let layers = layers.collect::<Result<_, CudaError>>()?;
            Ok(Self { device, layers })
        })
    }

    /// Fills every plan. A sequence that cannot be compressed is kept and says why; the others do not notice. A result that
    /// is not a number, or too large for the dtype, spoils a position of its own plan, which the host then refuses.
    ///
    /// # Errors
    /// The host described the call badly; the device failed.
    pub fn fill(&self, settings: &Settings, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let mut work = Work::default();
        for request in requests {
            let Request { sequence, mut plan } = request?;
            match self.lay_out(settings, &sequence, &mut plan) {
                Ok(of_sequence) => work.append(of_sequence),
                Err(kept) => plan.keep(kept.reason(), &kept.to_string())?,
            }
        }
        work.enqueue(&self.device, call)
    }

    fn lay_out<'a>(&self, settings: &Settings, sequence: &SequenceView<'a>, plan: &mut Plan<'a>) -> Result<Work, Kept> {
        let mut work = Work::default();
        let rewrites = rewrites(settings, sequence, plan)?;
        plan.reserve_on_device(rewrites.iter().map(|of_layer| of_layer.lent.length()))?;
        for Rewrite { layer, lent, runs } in rewrites {
            let number = layer.index();
            let Some(mlps) = self.layers.get(number) else {
                return Err(Kept::Layers { found: number + 1, expected: settings.layers.len() });
            };
            let positions = plan.rewrite_on_device(number, lent.length(), true)?;
            work.add_positions(settings.positions, &runs, positions)?;
            for (part, source, destination) in
                [(Part::K, layer.k_device()?, lent.k_device()?), (Part::V, layer.v_device()?, lent.v_device()?)]
            {
                let mut to = 0;
                for run in &runs {
                    match *run {
                        Run::Rows { row, count, .. } => work.rows.push(Gather {
                            source,
                            destination,
                            indices: Indices::none(),
                            tail: row as usize..(row + count) as usize,
                            destination_start: to,
                        }),
                        Run::Groups { kind, row, count, .. } => {
                            // A stretch without MLPs is not laid out.
                            let Some(&mlp) = mlps.as_ref().and_then(|mlps| mlps.get(kind, part)) else { continue };
                            let (source_start, count) = (row as usize, count as usize);
                            let groups = Groups { source_start, count, destination_start: to };
                            let positions = Some(positions);
                            work.groups.push(Compress { mlp, source, destination, groups, positions });
                        }
                    }
                    to += run.count() as usize;
                }
            }
        }
        work.check(&self.device).map_err(PluginError::from)?;
        Ok(work)
    }
}

impl Work {
    /// What the new rows of a layer stand for.
    fn add_positions(&mut self, rule: PositionRule, runs: &[Run], out: DeviceSlice<u32>) -> Result<(), PluginError> {
        if rule == PositionRule::Compacted {
            self.positions.push(Progression { first: 0, step: 1, out });
            return Ok(());
        }
        let mut to = 0;
        for run in runs {
            let (first, step) = match *run {
                Run::Rows { position, step, .. } => (position, step),
                Run::Groups { position, factor, .. } => (position, factor),
            };
            let end = to + run.count() as usize;
            self.positions.push(Progression { first: first as u32, step: step as u32, out: out.part(to..end)? });
            to = end;
        }
        Ok(())
    }

    /// Refuses what the kernels do not take, before others' work is with it.
    fn check(&self, device: &Device) -> Result<(), CudaError> {
        select::scratch_bytes(&self.rows)?;
        grouped_mlp::check(device, &self.groups)
    }

    fn append(&mut self, mut other: Self) {
        self.positions.append(&mut other.positions);
        self.rows.append(&mut other.rows);
        self.groups.append(&mut other.groups);
    }

    /// Positions come first: a group's fault spoils one.
    fn enqueue(mut self, device: &Device, call: &Call<'_>) -> Result<(), PluginError> {
        let stream = call.cuda_stream()?;
        progressions(device, stream, &self.positions)?;
        // Lent rows are not those that are read, so nothing moves in place.
        gather(device, stream, &self.rows, None, DeviceSlice::empty())?;
        // Sequences that share weights, one behind the other.
        self.groups.sort_by_key(|group| group.mlp.weights().address());
        Ok(grouped_mlp(device, stream, &self.groups, None)?)
    }
}
