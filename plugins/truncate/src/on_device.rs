//! Plans for a cache on a CUDA device: the same rows, chosen by the device, with all layers of all sequences together.

use std::ops::Range;
use std::sync::Arc;

use kvhook_abi::config::ConfigError;
use kvhook_abi::cuda::check::Indices;
use kvhook_abi::cuda::key_diff::{self, KeyDiff, key_diff};
use kvhook_abi::cuda::norms::{RowNorms, Sign, row_norms};
use kvhook_abi::cuda::plan::{Spaced, spaced};
use kvhook_abi::cuda::scores::Weight;
use kvhook_abi::cuda::whole::{MOST_STRETCHES, Merge, merge_whole};
use kvhook_abi::cuda::window_attention::{self, WindowAttention, window_attention};
use kvhook_abi::cuda::{Device, DeviceSlice, How, Job, Scratch, Window, Windows, choose};
use kvhook_abi::tasks::Kept as _;
use kvhook_abi::{
    Call, CreateContext, LayerView, Memory, Plan, PluginError, Request, Requests, SequenceView, StepView,
};
use kvhook_kernels::Protected;
use kvhook_kernels::sample::Draw;

use crate::budget::Division;
use crate::choose::{ByScore, divide_stretches};
use crate::config::{History, Settings};
use crate::error::Kept;
use crate::importance::Importance;
use crate::kinds::{Compressed, Kinds};
use crate::plan::{Planner, Wish, Wished};

/// What an instance has for its device.
pub struct OnDevice {
    device: Device,
    windows: Option<Windows>,
}

/// What one call enqueues.
#[derive(Default)]
struct Work<'a> {
    spaced: Vec<Spaced>,
    merges: Vec<MergeSpaced>,
    jobs: Vec<Job<'a>>,
}

/// Evenly spaced rows of those that may be dropped, put among the others.
struct MergeSpaced {
    open: Arc<[Range<usize>]>,
    length: usize,
    chosen: DeviceSlice<u32>,
    out: DeviceSlice<u32>,
}

impl OnDevice {
    /// Opens the device.
    ///
    /// # Errors
    /// A config that needs the rows' positions after a compression; those of [`CreateContext::cuda_device`].
    pub fn new(context: &CreateContext<'_>, settings: &Settings) -> Result<Self, PluginError> {
        if settings.compressed != Compressed::All && settings.every > 0 {
            let allowed = "0 with segments=text and segments=image on a device: which rows are of which kind is known \
                           there until the first compression";
            return Err(ConfigError::bad_value("every", settings.every, allowed).into());
        }
        let layers = context.model.layers.len();
        let windows = settings.history.window().map(|window| Windows::new(window as usize, layers));
        Ok(Self { device: context.cuda_device()?, windows })
    }

    /// Keeps what it wants of one layer of one step.
    ///
    /// # Errors
    /// The host refused memory or described the step badly; the device failed.
    pub fn see(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        self.windows.as_mut().map_or(Ok(()), |windows| windows.see(&self.device, call, step))
    }

    /// Forgets a sequence, whose memory the host takes back.
    pub fn forget(&mut self, uid: u64) {
        if let Some(windows) = &mut self.windows {
            windows.forget(uid);
        }
    }

    /// Fills every plan. A sequence that cannot be compressed is kept and says why; the others do not notice.
    ///
    /// # Errors
    /// The host described the call badly or refused memory; the device failed.
    pub fn fill(&mut self, planner: &Planner<'_>, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let mut work = Work::default();
        for request in requests {
            let Request { sequence, mut plan } = request?;
            let (spaced, merges, jobs) = (work.spaced.len(), work.merges.len(), work.jobs.len());
            if let Err(kept) = self.lay_out(planner, call, &sequence, &mut plan, &mut work) {
                work.spaced.truncate(spaced);
                work.merges.truncate(merges);
                work.jobs.truncate(jobs);
                plan.keep(kept.reason(), &kept.to_string())?;
            }
        }
        if !work.spaced.is_empty() {
            spaced(&self.device, call.cuda_stream()?, &work.spaced)?;
        }
        if !work.merges.is_empty() {
            let merges = work.merges.iter().map(|&MergeSpaced { ref open, length, chosen, out }| Merge {
                open,
                length,
                chosen: Indices::shared(chosen),
                lists: 1,
                out,
            });
            merge_whole(&self.device, call.cuda_stream()?, &merges.collect::<Vec<_>>())?;
        }
        let importance = planner.settings.history.importance().unwrap_or(Importance::Uniform);
        let how = match planner.settings.history {
            History::Sample { .. } => How::Sample(weight(importance)),
            _ => How::Top,
        };
        let working = work.jobs.first().map_or(0, |job| working_bytes(importance, job, planner));
        choose(&self.device, call, &work.jobs, how, working, |jobs, scores, scratch| {
            self.score(importance, call, jobs, scores, scratch)
        })
    }

    fn lay_out<'a>(
        &mut self,
        planner: &Planner<'_>,
        call: &Call<'_>,
        sequence: &SequenceView<'a>,
        plan: &mut Plan<'a>,
        work: &mut Work<'a>,
    ) -> Result<(), Kept> {
        let settings = planner.settings;
        let kinds = Kinds::new(settings.compressed, sequence.segments(), sequence.next_position());
        let wished = planner.wishes(sequence, &kinds)?;
        plan.reserve_on_device(wished.iter().map(|of_layer| match of_layer.wish {
            Wish::All | Wish::Ranges(_) => 0,
            Wish::ByPlace => of_layer.count(),
            Wish::ByScore(..) => of_layer.layer.kv_heads() * of_layer.count(),
        }))?;
        for of_layer in wished {
            let count = of_layer.count();
            let Wished { layer, open: tokens, keep, wish } = of_layer;
            let (number, length) = (layer.index(), layer.length());
            let stretches = match wish {
                Wish::All | Wish::Ranges(_) => Arc::default(),
                _ => open_stretches(settings, &kinds, sequence, &layer)?,
            };
            let apart = !kinds.is_all();
            let divide = |recent| divide_stretches(&stretches, length, keep, settings.sinks, recent);
            match wish {
                Wish::All => plan.select_all(number)?,
                Wish::Ranges(ranges) => plan.select_ranges(number, &ranges)?,
                Wish::ByPlace => {
                    let division = match settings.history {
                        // All that is not a sink is recent.
                        History::None { .. } => {
                            let sinks = divide(settings.recent).sinks;
                            Division { sinks, chosen: 0, recent: keep - sinks }
                        }
                        _ => divide(settings.recent),
                    };
                    let Division { sinks, chosen, recent } = division;
                    let out = plan.select_on_device(number, count, true)?;
                    let of_open = if apart { call.device_memory(Memory::Call, keep)? } else { out };
                    work.spaced.push(Spaced { sinks, chosen, recent, length: tokens.stored as usize, out: of_open });
                    if apart {
                        work.merges.push(MergeSpaced { open: stretches, length, chosen: of_open, out });
                    }
                }
                Wish::ByScore(how, importance) => {
                    let window = match importance {
                        Importance::Attention { window, .. } => {
                            let missing = Kept::QueriesMissing { layer: number, held: 0, wanted: window as usize };
                            let windows = self.windows.as_ref().map(|windows| windows.get(sequence, &layer));
                            let windows = windows.transpose()?.flatten();
                            Some(windows.ok_or(missing)?)
                        }
                        _ => None,
                    };
                    // The window's own rows are kept: its queries say little about them.
                    let recent = settings.recent.max(window.map_or(0, |window| window.tokens));
                    let division = divide(recent);
                    if let Some(windows) = &mut self.windows {
                        windows.planned(sequence, number, division.recent);
                    }
                    let protected = Protected { sinks: division.sinks, recent: division.recent };
                    let draw = match how {
                        ByScore::Top => Draw { seed: 0, round: 0, layer: 0, head: 0 },
                        ByScore::Sample(draw) => draw,
                    };
                    let kept = plan.select_on_device(number, count, false)?;
                    let open = apart.then_some(stretches);
                    work.jobs.push(Job { layer, window, open, protected, draw, kept });
                }
            }
        }
        Ok(())
    }

    /// Enqueues the scores of a group of layers.
    fn score(
        &self,
        importance: Importance,
        call: &Call<'_>,
        jobs: &[Job<'_>],
        scores: &[DeviceSlice<f32>],
        scratch: &mut Scratch<'_>,
    ) -> Result<(), PluginError> {
        // Weights are all the same, whatever the scores.
        if !importance.reads_keys() {
            return Ok(());
        }
        let (device, stream) = (&self.device, call.cuda_stream()?);
        let mut keys = Vec::with_capacity(jobs.len());
        for job in jobs {
            keys.push(job.layer.k_device()?);
        }
        let each = || keys.iter().zip(jobs).zip(scores);
        match importance {
            Importance::KeyNorm => {
                let items = each().map(|((&rows, job), &out)| RowNorms { rows, tokens: 0..job.layer.length(), out });
                row_norms(device, stream, &items.collect::<Vec<_>>(), Sign::Negative)?;
            }
            Importance::KeyDiff => {
                let items = each().map(|((&keys, job), &out)| KeyDiff { keys, length: job.layer.length(), out });
                let items: Vec<_> = items.collect();
                let scratch = scratch.take(key_diff::scratch_bytes(&items)?)?;
                key_diff(device, stream, &items, scratch)?;
            }
            Importance::Attention { pool, .. } => {
                let windows: Vec<Window> = jobs.iter().filter_map(|job| job.window).collect();
                let queries = Window::in_order(&windows, device, call)?;
                let items = each().zip(queries).map(|(((&keys, job), &scores), queries)| WindowAttention {
                    keys,
                    queries,
                    log_sum_exp: None,
                    length: job.layer.length(),
                    scores,
                });
                let items: Vec<_> = items.collect();
                let scratch = scratch.take(window_attention::scratch_bytes(&items)?)?;
                window_attention(device, stream, &items, pool as usize, scratch)?;
            }
            Importance::Uniform => {}
        }
        Ok(())
    }
}

/// The rows that may be dropped, the same for all heads.
///
/// # Errors
/// [`Kept`] where only the device knows them, or they are more stretches than the kernels take.
fn open_stretches(
    settings: &Settings,
    kinds: &Kinds,
    sequence: &SequenceView<'_>,
    layer: &LayerView<'_>,
) -> Result<Arc<[Range<usize>]>, Kept> {
    let (number, length) = (layer.index(), layer.length());
    if !kinds.is_all() && layer.appended() < length {
        return Err(Kept::KindsOnDevice { layer: number, compressed: settings.compressed.word() });
    }
    let stretches = kinds.of_adjacent(length, sequence.next_position());
    if stretches.len() > MOST_STRETCHES {
        let text = format!("layer {number}: {} stretches of one kind; at most {MOST_STRETCHES}", stretches.len());
        return Err(PluginError::Unsupported(text).into());
    }
    Ok(stretches.into())
}

/// Bytes of working memory that a score takes for each entry, about.
fn working_bytes(importance: Importance, job: &Job<'_>, planner: &Planner<'_>) -> usize {
    match importance {
        Importance::Attention { .. } => {
            let q_heads = planner.model.layers.get(job.layer.index()).map_or(0, |info| info.q_heads);
            let group = q_heads.checked_div(job.layer.kv_heads()).unwrap_or(0);
            let rows = group * job.window.map_or(0, |window| window.tokens);
            // With few query rows, all logits are kept from the first pass to the second.
            size_of::<f32>() * if rows <= 8 { 1 + rows } else { 1 }
        }
        Importance::KeyDiff => 1,
        Importance::KeyNorm | Importance::Uniform => 0,
    }
}

/// What makes weights of scores, as [`crate::importance::weights`] does.
fn weight(importance: Importance) -> Option<Weight> {
    match importance {
        Importance::KeyNorm => Some(Weight::OfNorm),
        Importance::KeyDiff => Some(Weight::OfDirection),
        Importance::Attention { .. } => None,
        Importance::Uniform => Some(Weight::One),
    }
}
