//! The plugin that keeps sinks, recent entries and a sample of the history.
//!
//! What is kept of each layer and KV head, from its config:
//!
//! * how many rows: [`budget`], from lengths, segments and config alone;
//! * which rows may be dropped at all: [`kinds`];
//! * which of them are worth most: [`importance`], for which [`window`] keeps the last queries;
//! * which are kept: [`choose`];
//! * the plans, in parallel over sequences, layers and heads: [`plan`];
//! * the same on a CUDA device: `on_device`, behind the feature `cuda`.

pub mod budget;
pub mod choose;
pub mod config;
pub mod error;
pub mod importance;
pub mod kinds;
#[cfg(feature = "cuda")]
pub mod on_device;
pub mod plan;
pub mod window;

use kvhook_abi::raw::KVH_DEVICE_CUDA;
use kvhook_abi::tasks::Kept as _;
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, ModelInfo, Needs, Phases, Plugin, PluginError,
    Requests, StepView, export_plugin,
};

use crate::budget::Amount;
use crate::config::{Config, Settings};
use crate::importance::Importance;
use crate::kinds::Kinds;
use crate::plan::Planner;
use crate::window::Windows;

/// One instance.
pub struct Truncate {
    settings: Settings,
    model: ModelInfo,
    windows: Option<Windows>,
    /// For a cache on a device.
    #[cfg(feature = "cuda")]
    on_device: Option<on_device::OnDevice>,
}

impl Plugin for Truncate {
    type Config = Config;
    const ID: &'static str = "truncate";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN).and(Hooks::BEFORE_ATTENTION).and(Hooks::ON_FREE);
    const MAY_NEED: Can = Can::QUERIES.and(Can::STATE).and(Can::GROWN).and(Can::LAYER_COUNTS);

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        let model = context.model.clone();
        let on_cuda = cfg!(feature = "cuda") && model.device_type == KVH_DEVICE_CUDA;
        if !model.on_cpu() && !on_cuda {
            let device = model.device_type;
            let cuda = if cfg!(feature = "cuda") { " and on CUDA devices (2)" } else { ", built without CUDA" };
            return Err(PluginError::Unsupported(format!(
                "the cache lies on a device of type {device}; truncate works on caches in ordinary memory (1){cuda}"
            )));
        }
        let settings = Settings::new(&config, context)?;
        if settings.history.importance().is_some_and(Importance::reads_keys) {
            model.dtype()?;
        }
        if settings.layers_differ && !context.offers.can.contains(Can::LAYER_COUNTS) {
            return Err(PluginError::Unsupported(
                "config key `layers` gives layers different lengths, which this engine's cache cannot hold \
                 (`layer_counts` is not offered): remove `layers` or give all layers one fraction"
                    .into(),
            ));
        }
        #[cfg(feature = "cuda")]
        let on_device = match model.on_cpu() {
            true => None,
            false => Some(on_device::OnDevice::new(context, &settings)?),
        };
        let windows = settings.history.window().filter(|_| model.on_cpu());
        let windows = windows.map(|window| Windows::new(window as usize, model.layers.len()));
        Ok(Self {
            settings,
            model,
            windows,
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    fn needs(&self) -> Needs {
        let settings = &self.settings;
        let mut needs = Needs { min_tokens: settings.min_tokens, grown_every: settings.every, ..Needs::default() };
        if settings.every > 0 {
            needs.must = needs.must.and(Can::GROWN);
        }
        if settings.layers_differ {
            needs.must = needs.must.and(Can::LAYER_COUNTS);
        }
        if let Some(window) = settings.history.window() {
            needs.must = needs.must.and(Can::QUERIES).and(Can::STATE);
            needs.window_queries = window;
            needs.before_attention = Phases::PREFILL;
            if settings.every > 0 {
                needs.before_attention = Phases::PREFILL.and(Phases::DECODE);
            }
            let ranked = |amount: &Option<Amount>| amount.is_some_and(|amount| amount != Amount::Fraction(1.0));
            needs.layers = Some(settings.layers.iter().map(ranked).collect());
        }
        needs
    }

    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let kinds = Kinds::new(self.settings.compressed, args.segments(), args.next_position);
        Ok(match self.settings.counts(args.next_position, &kinds, args.lengths()) {
            Ok(counts) => Bound::Rows(counts),
            Err(kept) => Bound::Keep(kept.reason()),
        })
    }

    fn on_prefill_done(&mut self, _call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let planner = Planner { settings: &self.settings, model: &self.model, windows: self.windows.as_ref() };
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &mut self.on_device {
            return on_device.fill(&planner, _call, requests);
        }
        planner.fill(requests)
    }

    fn before_attention(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &mut self.on_device {
            return on_device.see(call, step);
        }
        match &mut self.windows {
            Some(windows) => windows.see(call, step),
            None => Ok(()),
        }
    }

    fn on_free(&mut self, uid: u64, _reason: FreeReason) -> Result<(), PluginError> {
        if let Some(windows) = &mut self.windows {
            windows.forget(uid);
        }
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &mut self.on_device {
            on_device.forget(uid);
        }
        Ok(())
    }
}

export_plugin!(Truncate);
