//! Keeping the entries with the best scores.

use kvhook_kernels::Protected;
use kvhook_kernels::cuda::sample::{Sample, sample};
use kvhook_kernels::cuda::scores::{Scores, Selection, Weight, refuse, weigh};
use kvhook_kernels::cuda::top_k::{TopK, top_k};
use kvhook_kernels::cuda::{Device, DeviceSlice, Stream, Verdict};
use kvhook_kernels::sample::Draw;

use super::window::Window;
use crate::call::{Call, Memory};
use crate::error::PluginError;
use crate::view::LayerView;

/// Working memory of the scores that are made at a time, in bytes. One layer may take more.
const WORKING_BYTES: usize = 64 << 20;

/// One layer of one sequence of which entries are kept by score.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The layer.
    pub layer: LayerView<'a>,
    /// The last queries, where they are scored by.
    pub window: Option<Window>,
    /// Entries that are kept whatever their score. Not more than are kept.
    pub protected: Protected,
    /// Names the draw of the first head, where entries are drawn.
    pub draw: Draw,
    /// Where the indices of the kept entries go, `[kv_heads, keep]`: [`Plan::select_on_device`](crate::Plan::select_on_device).
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
    let most = WORKING_BYTES / (size_of::<f32>() + working);
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
    let mut scratch = Scratch { call: *call, memory: DeviceSlice::empty() };
    for group in groups {
        let mut start = 0;
        let mut scores = Vec::with_capacity(group.len());
        for job in group {
            scores.push(memory.part(start..start + size(job))?);
            start += size(job);
        }
        score(group, &scores, &mut scratch)?;
        select(device, stream, group, &scores, how, &verdict)?;
    }
    Ok(())
}

fn select(
    device: &Device,
    stream: Stream,
    group: &[Job<'_>],
    scores: &[DeviceSlice<f32>],
    how: How,
    verdict: &Verdict,
) -> Result<(), PluginError> {
    let with_heads = |(job, &scores): (&Job<'_>, &DeviceSlice<f32>)| Scores { scores, heads: job.layer.kv_heads() };
    let scored: Vec<Scores> = group.iter().zip(scores).map(with_heads).collect();
    match how {
        How::Top => {
            let items = group.iter().zip(&scored).map(|(job, &Scores { scores, heads })| TopK {
                scores,
                heads,
                protected: job.protected,
                out: job.kept,
            });
            top_k(device, stream, &items.collect::<Vec<_>>(), verdict)?;
        }
        How::Sample(weight) => {
            if let Some(weight) = weight {
                weigh(device, stream, &scored, weight)?;
            }
            let items = group.iter().zip(&scored).map(|(job, &Scores { scores, heads })| Sample {
                weights: scores,
                heads,
                protected: job.protected,
                draw: job.draw,
                out: job.kept,
            });
            sample(device, stream, &items.collect::<Vec<_>>(), verdict)?;
        }
    }
    let selection =
        |(job, &scores): (&Job<'_>, &Scores)| Selection { scores, protected: job.protected, kept: job.kept };
    let selections: Vec<Selection> = group.iter().zip(&scored).map(selection).collect();
    Ok(refuse(device, stream, &selections, how != How::Top)?)
}
