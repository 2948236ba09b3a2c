//! Plans for the sequences of one call.

use std::sync::{Arc, Mutex, PoisonError};

use kvhook_abi::plan::LentLayer;
use kvhook_abi::tasks::Tasks;
use kvhook_abi::{Call, LayerView, Memory, Plan, PluginError, Requests, SequenceView};
use kvhook_kernels::grouped_mlp::{Groups, grouped_mlp};
use kvhook_kernels::{Indices, KernelError, Rows, parallel, select};

use crate::config::Settings;
use crate::error::Kept;
use crate::mlps::{LayerMlps, Mlps, Part};
use crate::stretches::{self, PositionRule, Run};

/// Operations that take about as long as moving a byte, for the choice of the number of threads.
const OPERATIONS_PER_BYTE: usize = 8;

/// What becomes of one layer of a sequence.
pub struct Rewrite<'a> {
    /// The layer.
    pub layer: LayerView<'a>,
    /// The rows that it becomes.
    pub lent: LentLayer<'a>,
    /// Where they come from.
    pub runs: Vec<Run>,
}

/// Borrows the new rows of a sequence, and says for each layer that has a plan what they are made from.
///
/// # Errors
/// [`Kept`] when it is not compressed.
pub fn rewrites<'a>(
    settings: &Settings,
    sequence: &SequenceView<'a>,
    plan: &mut Plan<'a>,
) -> Result<Vec<Rewrite<'a>>, Kept> {
    let layers = sequence.layers().collect::<Result<Vec<_>, _>>()?;
    let lengths: Vec<u64> = layers.iter().map(|layer| layer.length() as u64).collect();
    let position = sequence.next_position();
    let layout = settings.layout(sequence.epoch(), position, sequence.segments(), &lengths)?;
    let lent = plan.lend_rows()?;
    let mut rewrites = Vec::with_capacity(layers.len());
    let mut moved = 0;
    for ((layer, runs), lent) in layers.into_iter().zip(layout).zip(lent) {
        let number = layer.index();
        if !layer.is_planned() {
            continue;
        }
        let (length, count) = (layer.length() as u64, stretches::rows(&runs));
        if !settings.layers[number] && length != position {
            return Err(Kept::Foreign { layer: number, length, position, factor: settings.factor });
        }
        if lent.length() as u64 != count {
            return Err(Kept::Lent { layer: number, found: lent.length(), expected: count as usize });
        }
        moved = moved.max(count);
        rewrites.push(Rewrite { layer, lent, runs });
    }
    if settings.positions == PositionRule::Compacted {
        plan.move_positions(moved)?;
    }
    Ok(rewrites)
}

/// All that plans are made from.
pub struct Planner<'a> {
    /// The config.
    pub settings: &'a Settings,
    /// The weights.
    pub mlps: &'a Mlps,
}

/// The new rows of K or V of one layer, which may be made on any thread.
struct Task<'a> {
    layer: usize,
    part: Part,
    mlps: &'a LayerMlps,
    runs: Arc<[Run]>,
    source: Rows,
    destination: Rows,
}

impl Planner<'_> {
    /// Fills every plan. A sequence that cannot be compressed is kept and says why; the others do not notice.
    ///
    /// # Errors
    /// The host described the call badly, or refused working memory.
    pub fn fill(&self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let tasks =
            Tasks::lay_out(requests, |sequence, plan, tasks: &mut Vec<Task<'_>>| self.lay_out(sequence, plan, tasks))?;
        if tasks.iter().len() == 0 {
            return Ok(());
        }
        let work = tasks.iter().map(Task::work).fold(0, usize::saturating_add);
        let threads = parallel::threads_for(tasks.iter().len(), work);
        let length = self.mlps.scratch_len();
        let scratch: &mut [f32] = call.allocate(Memory::Call, threads * length)?;
        // A thread takes a part for each task and puts it back.
        let scratch: Mutex<Vec<&mut [f32]>> = Mutex::new(scratch.chunks_exact_mut(length).collect());
        let rows = tasks.iter().map(|task| task.source.capacity()).max().unwrap_or(0);
        let rows: Vec<u32> = (0..rows as u32).collect();
        tasks.run(threads, |task| {
            let free = scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let part = free.ok_or_else(|| PluginError::Internal("more threads than parts of working memory".into()))?;
            let (layer, letter) = (task.layer, task.part.name());
            let result = task.run(&rows, part);
            scratch.lock().unwrap_or_else(PoisonError::into_inner).push(part);
            result.map_err(|source| Kept::Compute { layer, part: letter, source })
        })
    }

    /// Says what the new rows stand for, and adds the tasks that fill them.
    fn lay_out<'a>(
        &'a self,
        sequence: &SequenceView<'a>,
        plan: &mut Plan<'a>,
        tasks: &mut Vec<Task<'a>>,
    ) -> Result<(), Kept> {
        let settings = self.settings;
        for Rewrite { layer, lent, runs } in rewrites(settings, sequence, plan)? {
            let number = layer.index();
            let positions = plan.rewrite(number, lent.length(), true)?;
            match settings.positions {
                PositionRule::Logical => {
                    let new = runs.iter().flat_map(Run::positions);
                    positions.iter_mut().zip(new).for_each(|(out, position)| *out = position as u32);
                }
                PositionRule::Compacted => positions.iter_mut().zip(0..).for_each(|(out, place)| *out = place),
            }
            let Some(mlps) = self.mlps.layer(number) else {
                return Err(Kept::Layers { found: number + 1, expected: settings.layers.len() });
            };
            let runs: Arc<[Run]> = runs.into();
            for (part, source, destination) in [(Part::K, layer.k()?, lent.k()?), (Part::V, layer.v()?, lent.v()?)] {
                let runs = runs.clone();
                tasks.push(Task { layer: number, part, mlps, runs, source, destination });
            }
        }
        Ok(())
    }
}

impl Task<'_> {
    /// Fills the new rows. `rows` are the numbers from 0 on.
    fn run(self, rows: &[u32], scratch: &mut [f32]) -> Result<(), KernelError> {
        let Self { part, mlps, source, destination, .. } = self;
        let heads = 0..source.kv_heads();
        let mut to = 0;
        for run in &*self.runs {
            match *run {
                Run::Rows { row, count, .. } => {
                    let same = rows.get(row as usize..(row + count) as usize).unwrap_or_default();
                    select::gather(&source, &destination, heads.clone(), &Indices::shared(same), to)?;
                }
                Run::Groups { kind, row, count, .. } => {
                    // A stretch without MLPs is not laid out.
                    let Some(mlp) = mlps.get(kind, part) else { continue };
                    let groups = Groups { source_start: row as usize, count: count as usize, destination_start: to };
                    grouped_mlp(mlp, &source, &destination, heads.clone(), groups, scratch)?;
                }
            }
            to += run.count() as usize;
        }
        Ok(())
    }

    /// Bytes that take about as long to move as this task.
    fn work(&self) -> usize {
        let heads = self.source.kv_heads();
        let of_run = |run: &Run| match *run {
            Run::Rows { count, .. } => count as usize * self.source.layout().row_bytes(),
            Run::Groups { kind, count, .. } => {
                let operations = self.mlps.get(kind, self.part).map_or(0, |mlp| mlp.operations());
                count as usize * operations / OPERATIONS_PER_BYTE
            }
        };
        heads * self.runs.iter().map(of_run).sum::<usize>()
    }
}
