//! Plans for a cache on a CUDA device: the same rows, chosen by the device, with all layers of all sequences together.

use kvhook_abi::config::ConfigError;
use kvhook_abi::cuda::key_diff::{self, KeyDiff, key_diff};
use kvhook_abi::cuda::norms::{RowNorms, Sign, row_norms};
use kvhook_abi::cuda::plan::{Spaced, spaced};
use kvhook_abi::cuda::scores::Weight;
use kvhook_abi::cuda::window_attention::{self, WindowAttention, window_attention};
use kvhook_abi::cuda::{Device, DeviceSlice, How, Job, Scratch, Window, Windows, choose};
use kvhook_abi::{Call, CreateContext, Plan, PluginError, Request, Requests, SequenceView, StepView};
use kvhook_kernels::Protected;
use kvhook_kernels::sample::Draw;

use crate::choose::{ByScore, divide_all};
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
    jobs: Vec<Job<'a>>,
}

impl OnDevice {
    /// Opens the device.
    ///
    /// # Errors
    /// A config that needs the rows' positions; those of [`CreateContext::cuda_device`].
    pub fn new(context: &CreateContext<'_>, settings: &Settings) -> Result<Self, PluginError> {
        if settings.compressed != Compressed::All {
            let word = if settings.compressed == Compressed::Text { "text" } else { "image" };
            let allowed = "both on a device: positions of rows are not read there";
            return Err(ConfigError::bad_value("segments", word, allowed).into());
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
            let (spaced, jobs) = (work.spaced.len(), work.jobs.len());
            if let Err(kept) = self.lay_out(planner, &sequence, &mut plan, &mut work) {
                work.spaced.truncate(spaced);
                work.jobs.truncate(jobs);
                plan.keep(kept.reason(), &kept.to_string())?;
            }
        }
        if !work.spaced.is_empty() {
            spaced(&self.device, call.cuda_stream()?, &work.spaced)?;
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
        sequence: &SequenceView<'a>,
        plan: &mut Plan<'a>,
        work: &mut Work<'a>,
    ) -> Result<(), Kept> {
        let settings = planner.settings;
        let kinds = Kinds::new(settings.compressed, sequence.segments(), sequence.next_position());
        for Wished { layer, keep, wish, .. } in planner.wishes(sequence, &kinds)? {
            let (number, length) = (layer.index(), layer.length());
            match wish {
                Wish::All => plan.select_all(number)?,
                Wish::Ranges(ranges) => plan.select_ranges(number, &ranges)?,
                Wish::ByPlace => {
                    let division = divide_all(length, keep, settings.sinks, settings.recent);
                    let out = plan.select_on_device(number, keep, true)?;
                    let (sinks, chosen, recent) = (division.sinks, division.chosen, division.recent);
                    work.spaced.push(Spaced { sinks, chosen, recent, length, out });
                }
                Wish::ByScore(how, importance) => {
                    let window = match importance {
                        Importance::Attention { window, .. } => {
                            let missing = Kept::QueriesMissing { layer: number, held: 0, wanted: window as usize };
                            let windows = self.windows.as_ref().and_then(|windows| windows.get(sequence, &layer));
                            Some(windows.ok_or(missing)?)
                        }
                        _ => None,
                    };
                    // The window's own rows are kept: its queries say little about them.
                    let recent = settings.recent.max(window.map_or(0, |window| window.tokens));
                    let division = divide_all(length, keep, settings.sinks, recent);
                    if let Some(windows) = &mut self.windows {
                        windows.planned(sequence, number, division.recent);
                    }
                    let protected = Protected { sinks: division.sinks, recent: division.recent };
                    let draw = match how {
                        ByScore::Top => Draw { seed: 0, round: 0, layer: 0, head: 0 },
                        ByScore::Sample(draw) => draw,
                    };
                    let kept = plan.select_on_device(number, keep, false)?;
                    work.jobs.push(Job { layer, window, protected, draw, kept });
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
        let keys = jobs.iter().map(|job| job.layer.k_device()).collect::<Result<Vec<_>, _>>()?;
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
