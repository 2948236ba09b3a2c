//! Keeping the entries with the best scores.

use std::ops::Range;
use std::sync::Arc;

use kvhook_kernels::cuda::check::Indices;
use kvhook_kernels::cuda::sample::{Sample, sample};
use kvhook_kernels::cuda::scores::{Scores, Selection, Weight, refuse, weigh};
use kvhook_kernels::cuda::select::{Gather, gather};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::whole::{Merge, merge_whole};
use kvhook_kernels::cuda::{Device, DeviceSlice, Rows, Verdict};
use kvhook_kernels::sample::Draw;
use kvhook_kernels::{Dtype, Layout, Protected};

use super::window::Window;
use crate::call::{Call, Memory};
use crate::error::PluginError;
use crate::view::LayerView;

/// Working memory of the scores that are made at a time, in bytes. One layer may take more.
const WORKING_BYTES: usize = 64 << 20;

/// One layer of one sequence of which entries are kept by score.
#[derive(Clone)]
pub struct Job<'a> {
    /// The layer.
    pub layer: LayerView<'a>,
    /// The last queries, where they are scored by.
    pub window: Option<Window>,
    /// The entries that may be dropped, ascending stretches that do not touch: the others are kept. None: all may be.
    pub open: Option<Arc<[Range<usize>]>>,
    /// Entries that are kept whatever their score, of those that may be dropped. Not more than are kept of them.
    pub protected: Protected,
    /// Names the draw of the first head, where entries are drawn.
    pub draw: Draw,
    /// Where the indices of the kept entries go, `[kv_heads, keep]`, those that may not be dropped among them: [`Plan::select_on_device`](crate::Plan::select_on_device).
    pub kept: DeviceSlice<u32>,
}

/// How entries are chosen by their scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The highest scores; of equal ones the lower entry.
    Top,
    /// A draw without replacement, in proportion to weights: scores as they are, or made of them.
    Sample(Option<Weight>),
}

/// Working memory of the call, which work enqueued later uses again.
pub struct Scratch<'a> {
    call: Call<'a>,
    memory: DeviceSlice<u8>,
}

impl Job<'_> {
    /// Entries of a head that may be dropped.
    fn open(&self) -> usize {
        self.open.as_ref().map_or(self.layer.length(), |open| open.iter().map(Range::len).sum())
    }

    /// Entries of a head that are chosen of those.
    fn chosen(&self) -> usize {
        let kept = self.kept.len().checked_div(self.layer.kv_heads()).unwrap_or(0);
        (kept + self.open()).saturating_sub(self.layer.length())
    }
}

impl Scratch<'_> {
    /// Memory for the work that is enqueued until more is taken.
    ///
    /// # Errors
    /// What the host's memory answers.
    pub fn take(&mut self, bytes: usize) -> Result<DeviceSlice<u8>, PluginError> {
        if bytes > self.memory.len() {
            self.memory = self.call.device_memory(Memory::Call, bytes)?;
        }
        Ok(self.memory.part(0..bytes)?)
    }
}

/// Enqueues the choice of entries for all jobs: for each group of them `score(group, scores, scratch)`, which enqueues the
/// scores `[kv_heads, length]` of each, then the choice. `working` is what `score` takes of `scratch` for each entry, about,
/// in bytes: groups are so large that scores and working memory take 64 MiB at most, or one layer's.
///
/// A score that is NaN, or a weight that is none, spoils the list of its own head, so that the host refuses that plan.
///
/// # Errors
/// What `score` answers; what the kernels and the host's memory do.
pub fn choose(
    device: &Device,
    call: &Call<'_>,
    jobs: &[Job<'_>],
    how: How,
    working: usize,
    mut score: impl FnMut(&[Job<'_>], &[DeviceSlice<f32>], &mut Scratch<'_>) -> Result<(), PluginError>,
) -> Result<(), PluginError> {
    let size = |job: &Job<'_>| job.layer.kv_heads() * job.layer.length();
    // Scores and choice of the entries that may be dropped, where others may not be.
    let apart = if jobs.iter().any(|job| job.open.is_some()) { 2 * size_of::<f32>() } else { 0 };
    let most = WORKING_BYTES / (size_of::<f32>() + working + apart);
    let mut groups = Vec::new();
    let mut rest = jobs;
    while !rest.is_empty() {
        let mut total = 0;
        let fitting = rest.iter().take_while(|job| {
            total += size(job);
            total <= most
        });
        let (group, behind) = rest.split_at(fitting.count().max(1));
        groups.push(group);
        rest = behind;
    }
    let longest = groups.iter().map(|group| group.iter().map(size).sum::<usize>()).max().unwrap_or(0);
    if longest == 0 {
        return Ok(());
    }
    let stream = call.cuda_stream()?;
    let memory = call.device_memory::<f32>(Memory::Call, longest)?;
    // Faults are told by the lists themselves, each for its own sequence.
    let verdict = Verdict::new(call.device_memory(Memory::Call, 1)?)?;
    verdict.clear(device, stream)?;
    let chooser = Chooser { device, call, how, verdict };
    let mut scratch = Scratch { call: *call, memory: DeviceSlice::empty() };
    let mut apart = Apart::new(call, &groups)?;
    for group in groups {
        let mut start = 0;
        let mut scores = Vec::with_capacity(group.len());
        for job in group {
            scores.push(memory.part(start..start + size(job))?);
            start += size(job);
        }
        score(group, &scores, &mut scratch)?;
        chooser.select(group, &scores, &mut apart)?;
    }
    Ok(())
}

/// Memory for the scores of the entries that may be dropped, and for their choice, where others may not be: that of the
/// largest group.
struct Apart {
    scores: DeviceSlice<f32>,
    chosen: DeviceSlice<u32>,
}

impl Apart {
    fn new(call: &Call<'_>, groups: &[&[Job<'_>]]) -> Result<Self, PluginError> {
        let (mut open, mut chosen) = (0, 0);
        for group in groups {
            let apart = || group.iter().filter(|job| job.open.is_some());
            open = open.max(apart().map(|job| job.layer.kv_heads() * job.open()).sum());
            chosen = chosen.max(apart().map(|job| job.layer.kv_heads() * job.chosen()).sum());
        }
        if open == 0 {
            return Ok(Self { scores: DeviceSlice::empty(), chosen: DeviceSlice::empty() });
        }
        let scores = call.device_memory(Memory::Call, open)?;
        Ok(Self { scores, chosen: call.device_memory(Memory::Call, chosen)? })
    }
}

/// What the choice of every group is made with.
struct Chooser<'a> {
    device: &'a Device,
    call: &'a Call<'a>,
    how: How,
    verdict: Verdict,
}

impl Chooser<'_> {
    fn select(&self, group: &[Job<'_>], scores: &[DeviceSlice<f32>], apart: &mut Apart) -> Result<(), PluginError> {
        let (device, stream) = (self.device, self.call.cuda_stream()?);
        // Of jobs whose entries may not all be dropped, those that may be are chosen from as if they were all.
        let (mut scored, mut chosen) = (Vec::with_capacity(group.len()), Vec::with_capacity(group.len()));
        let (mut copies, mut merges) = (Vec::new(), Vec::new());
        let (mut scores_used, mut chosen_used) = (0, 0);
        for (job, &all) in group.iter().zip(scores) {
            let heads = job.layer.kv_heads();
            let Some(open) = &job.open else {
                scored.push(Scores { scores: all, heads });
                chosen.push(job.kept);
                continue;
            };
            let (count, keep) = (job.open(), job.chosen());
            let of_open = apart.scores.part(scores_used..scores_used + heads * count)?;
            let kept = apart.chosen.part(chosen_used..chosen_used + heads * keep)?;
            (scores_used, chosen_used) = (scores_used + heads * count, chosen_used + heads * keep);
            let (source, destination) = (as_rows(all, heads)?, as_rows(of_open, heads)?);
            let mut destination_start = 0;
            for range in open.iter() {
                let (indices, tail) = (Indices::none(), range.clone());
                copies.push(Gather { source, destination, indices, tail, destination_start });
                destination_start += range.len();
            }
            let (length, lists) = (job.layer.length(), heads);
            merges.push(Merge { open, length, chosen: Indices::per_head(kept, keep), lists, out: job.kept });
            scored.push(Scores { scores: of_open, heads });
            chosen.push(kept);
        }
        if !copies.is_empty() {
            gather(device, stream, &copies, None, DeviceSlice::empty())?;
        }
        let each = || group.iter().zip(&scored).zip(&chosen);
        match self.how {
            How::Top => {
                let items = each().map(|((job, &Scores { scores, heads }), &out)| TopK {
                    scores,
                    heads,
                    protected: job.protected,
                    out,
                });
                top_k(device, stream, &items.collect::<Vec<_>>(), &self.verdict)?;
            }
            How::Sample(weight) => {
                if let Some(weight) = weight {
                    weigh(device, stream, &scored, weight)?;
                }
                let items = each().map(|((job, &Scores { scores, heads }), &out)| Sample {
                    weights: scores,
                    heads,
                    protected: job.protected,
                    draw: job.draw,
                    out,
                });
                sample(device, stream, &items.collect::<Vec<_>>(), &self.verdict)?;
            }
        }
        if !merges.is_empty() {
            merge_whole(device, stream, &merges)?;
        }
        let selection = |((job, &scores), _): ((&Job<'_>, &Scores), _)| Selection {
            scores,
            protected: job.protected,
            kept: job.kept,
        };
        let selections: Vec<Selection> = each().map(selection).collect();
        Ok(refuse(device, stream, &selections, self.how != How::Top)?)
    }
}

/// Scores `[heads, length]` as rows of one element.
fn as_rows(scores: DeviceSlice<f32>, heads: usize) -> Result<Rows, PluginError> {
    let length = scores.len().checked_div(heads).unwrap_or(0);
    let layout = Layout::head_major(Dtype::F32, heads, length, 1);
    // SAFETY: the memory is the call's, and as long as that.
    Ok(unsafe { Rows::new(scores.address(), layout, None)? })
}
