//! The base of scorers on a device.

use kvhook_kernels::sample::Draw;

use super::{Device, How, Job, Windows, choose};
use crate::call::Call;
use crate::error::PluginError;
use crate::offers::Reason;
use crate::plan::{Plan, Request, Requests};
use crate::plugin::CreateContext;
use crate::raw::KvhRange;
use crate::scorer::{Scored, Scorer};
use crate::view::{LayerView, SequenceView};

/// What a scorer has for a cache on a device.
pub(crate) struct OnDevice {
    pub(crate) device: Device,
    pub(crate) windows: Windows,
}

impl OnDevice {
    pub(crate) fn open(context: &CreateContext<'_>, window: usize) -> Result<Self, PluginError> {
        let windows = Windows::new(window.max(1), context.model.layers.len());
        Ok(Self { device: context.cuda_device()?, windows })
    }
}

impl<S: Scorer> Scored<S> {
    /// Fills the plans of a call: all layers of all sequences together.
    ///
    /// # Errors
    /// Every sequence of the call is kept.
    pub(crate) fn plan_on_device(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let mut jobs = Vec::new();
        for request in requests {
            let Request { sequence, mut plan } = request?;
            let before = jobs.len();
            if let Err(error) = self.add_jobs(&sequence, &mut plan, &mut jobs) {
                jobs.truncate(before);
                let reason = match error {
                    PluginError::Unsupported(_) => Reason::Unsupported,
                    _ => Reason::Other,
                };
                plan.keep(reason, &error.to_string())?;
            }
        }
        let Some(on_device) = &self.on_device else { return Ok(()) };
        let working = self.scorer.working_bytes();
        choose(&on_device.device, call, &jobs, How::Top, working, |jobs, scores, scratch| {
            self.scorer.score_on_device(&on_device.device, call, jobs, scores, scratch)
        })
    }

    fn add_jobs<'a>(
        &mut self,
        sequence: &SequenceView<'a>,
        plan: &mut Plan<'a>,
        jobs: &mut Vec<Job<'a>>,
    ) -> Result<(), PluginError> {
        let layers = match self.counts(sequence)? {
            Ok(layers) => layers,
            Err(reason) => return plan.keep(reason, ""),
        };
        let first = jobs.len();
        let chosen =
            |(layer, count): &(LayerView<'_>, usize)| layer.is_planned() && *count > 0 && *count < layer.length();
        plan.reserve_on_device(
            layers.iter().filter(|layer| chosen(layer)).map(|(layer, count)| layer.kv_heads() * count),
        )?;
        for (layer, count) in layers {
            if !layer.is_planned() {
                // A layer that reads another's cache follows that one's plan.
                if layer.shared_with().is_none() {
                    plan.select_all(layer.index())?;
                }
                continue;
            }
            if count == 0 || count == layer.length() {
                let all = [KvhRange { start: 0, length: count as u64 }];
                plan.select_ranges(layer.index(), &all[..usize::from(count > 0)])?;
                continue;
            }
            let windows = self.on_device.as_mut().map(|on_device| &mut on_device.windows).filter(|_| self.window > 0);
            let window = match windows {
                None => None,
                Some(windows) => {
                    windows.planned(sequence, layer.index(), self.protected.recent.min(count));
                    let wanted = self.window.min(layer.length());
                    let Some(window) = windows.get(sequence, &layer)?.filter(|window| window.tokens == wanted) else {
                        jobs.truncate(first);
                        return plan.keep(Reason::QueriesMissing, "");
                    };
                    Some(window)
                }
            };
            let kept = plan.select_on_device(layer.index(), count, false)?;
            let draw = Draw { seed: 0, round: 0, layer: 0, head: 0 };
            jobs.push(Job { layer, window, open: None, protected: self.protected, draw, kept });
        }
        Ok(())
    }
}
