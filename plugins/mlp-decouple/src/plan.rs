//! Plans for the sequences of one call.

use std::sync::{Arc, Mutex, PoisonError};

use kvhook_abi::{Call, Memory, Plan, PluginError, Request, Requests, SequenceView};
use kvhook_kernels::grouped_mlp::{Groups, grouped_mlp};
use kvhook_kernels::{Indices, KernelError, Rows, parallel, select};

use crate::config::Settings;
use crate::error::Kept;
use crate::mlps::{LayerMlps, Mlps, Part};
use crate::stretches::{self, PositionRule, Run};

/// Operations that take about as long as moving a byte, for the choice of the number of threads.
const OPERATIONS_PER_BYTE: usize = 8;

/// All that plans are made from.
pub struct Planner<'a> {
    /// The config.
    pub settings: &'a Settings,
    /// The weights.
    pub mlps: &'a Mlps,
}

/// The new rows of K or V of one layer, which may be made on any thread.
struct Task<'a> {
    /// Its sequence in the call.
    sequence: usize,
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
        let mut plans = Vec::with_capacity(requests.len());
        let mut tasks = Vec::new();
        for request in requests {
            let Request { sequence, mut plan } = request?;
            let before = tasks.len();
            if let Err(kept) = self.lay_out(&sequence, &mut plan, plans.len(), &mut tasks) {
                tasks.truncate(before);
                plan.keep(kept.reason(), &kept.to_string())?;
            }
            plans.push(plan);
        }
        if tasks.is_empty() {
            return Ok(());
        }
        let failures = self.run(call, plans.len(), tasks)?;
        for (plan, failure) in plans.iter_mut().zip(failures) {
            if let Some((_, kept)) = failure {
                plan.keep(kept.reason(), &kept.to_string())?;
            }
        }
        Ok(())
    }

    /// Runs the tasks; gives the first failure of each sequence, by the order of its tasks, whichever thread was faster.
    fn run(
        &self,
        call: &Call<'_>,
        sequences: usize,
        tasks: Vec<Task<'_>>,
    ) -> Result<Vec<Option<(usize, Kept)>>, PluginError> {
        let work = tasks.iter().map(Task::work).fold(0, usize::saturating_add);
        let threads = parallel::threads_for(tasks.len(), work);
        let length = self.mlps.scratch_len();
        let scratch: &mut [f32] = call.allocate(Memory::Call, threads * length)?;
        // A thread takes a part for each task and puts it back.
        let scratch: Mutex<Vec<&mut [f32]>> = Mutex::new(scratch.chunks_exact_mut(length).collect());
        let rows = tasks.iter().map(|task| task.source.capacity()).max().unwrap_or(0);
        let rows: Vec<u32> = (0..rows as u32).collect();
        let failures: Mutex<Vec<Option<(usize, Kept)>>> = Mutex::new((0..sequences).map(|_| None).collect());
        parallel::for_each_on(threads, tasks.into_iter().enumerate().collect(), |(order, task): (usize, Task<'_>)| {
            let free = scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(part) = free else {
                return Err(PluginError::Internal("more threads than parts of working memory".into()));
            };
            let (layer, letter, sequence) = (task.layer, task.part.name(), task.sequence);
            let result = task.run(&rows, part);
            scratch.lock().unwrap_or_else(PoisonError::into_inner).push(part);
            if let Err(source) = result {
                let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                let first = &mut failures[sequence];
                if first.as_ref().is_none_or(|(earlier, _)| order < *earlier) {
                    *first = Some((order, Kept::Compute { layer, part: letter, source }));
                }
            }
            Ok(())
        })?;
        Ok(failures.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Borrows the new rows, says what they stand for, and adds the tasks that fill them.
    fn lay_out<'a>(
        &'a self,
        sequence: &SequenceView<'_>,
        plan: &mut Plan<'_>,
        index: usize,
        tasks: &mut Vec<Task<'a>>,
    ) -> Result<(), Kept> {
        let layers = sequence.layers().collect::<Result<Vec<_>, _>>()?;
        let lengths: Vec<u64> = layers.iter().map(|layer| layer.length() as u64).collect();
        let settings = self.settings;
        let position = sequence.next_position();
        let layout = settings.layout(sequence.epoch(), position, sequence.segments(), &lengths)?;
        let lent = plan.lend_rows()?;
        let mut moved = 0;
        for ((layer, runs), lent) in layers.iter().zip(layout).zip(&lent) {
            let number = layer.index();
            if !layer.is_planned() {
                continue;
            }
            let (length, count) = (layer.length() as u64, stretches::rows(&runs) as usize);
            if !settings.layers[number] && length != position {
                return Err(Kept::Foreign { layer: number, length, position, factor: settings.factor });
            }
            if lent.length() != count {
                return Err(Kept::Lent { layer: number, found: lent.length(), expected: count });
            }
            let positions = plan.rewrite(number, count, true)?;
            match settings.positions {
                PositionRule::Logical => {
                    let new = runs.iter().flat_map(Run::positions);
                    positions.iter_mut().zip(new).for_each(|(out, position)| *out = position as u32);
                }
                PositionRule::Compacted => positions.iter_mut().zip(0..).for_each(|(out, place)| *out = place),
            }
            moved = moved.max(count as u64);
            let Some(mlps) = self.mlps.layer(number) else {
                return Err(Kept::Layers { found: number + 1, expected: settings.layers.len() });
            };
            let runs: Arc<[Run]> = runs.into();
            for (part, source, destination) in [(Part::K, layer.k()?, lent.k()?), (Part::V, layer.v()?, lent.v()?)] {
                let runs = runs.clone();
                tasks.push(Task { sequence: index, layer: number, part, mlps, runs, source, destination });
            }
        }
        if settings.positions == PositionRule::Compacted {
            plan.move_positions(moved)?;
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
