//! The plugin that keeps sinks, recent entries and a sample of the history.
//!
//! What is kept of each layer and KV head, from its config:
//!
//! * how many rows: [`budget`], from lengths, segments and config alone;
//! * which rows may be dropped at all: [`kinds`];
//! * which of them are worth most: [`importance`], for which [`window`] keeps the last queries;
//! * which are kept: [`choose`];
//! * the plans, in parallel over sequences, layers and heads: [`plan`].

pub mod budget;
pub mod choose;
pub mod config;
pub mod error;
pub mod importance;
pub mod kinds;
pub mod plan;
pub mod window;

use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, ModelInfo, Needs, Phases, Plugin, PluginError,
    Requests, StepView, export_plugin,
};

use crate::budget::Amount;
use crate::config::{Config, Settings};
use crate::kinds::Kinds;
use crate::plan::Planner;
use crate::window::Windows;

/// One instance.
pub struct Truncate {
    settings: Settings,
    model: ModelInfo,
    windows: Option<Windows>,
}

impl Plugin for Truncate {
    type Config = Config;
    const ID: &'static str = "truncate";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN).and(Hooks::BEFORE_ATTENTION).and(Hooks::ON_FREE);
    const MAY_NEED: Can = Can::QUERIES.and(Can::STATE).and(Can::GROWN).and(Can::LAYER_COUNTS);

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        let model = context.model.clone();
        if !model.on_cpu() {
            let device = model.device_type;
            return Err(PluginError::Unsupported(format!(
                "the cache lies on a device of type {device}; truncate works on caches in ordinary memory (type 1)"
            )));
        }
        let settings = Settings::new(&config, context)?;
        if settings.layers_differ && !context.offers.can.contains(Can::LAYER_COUNTS) {
            return Err(PluginError::Unsupported(
                "config key `layers` gives layers different lengths, which this engine's cache cannot hold \
                 (`layer_counts` is not offered): remove `layers` or give all layers one fraction"
                    .into(),
            ));
        }
        let windows = settings.history.window().map(|window| Windows::new(window as usize, model.layers.len()));
        Ok(Self { settings, model, windows })
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
        Planner { settings: &self.settings, model: &self.model, windows: self.windows.as_ref() }.fill(requests)
    }

    fn before_attention(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        match &mut self.windows {
            Some(windows) => windows.see(call, step),
            None => Ok(()),
        }
    }

    fn on_free(&mut self, uid: u64, _reason: FreeReason) -> Result<(), PluginError> {
        if let Some(windows) = &mut self.windows {
            windows.forget(uid);
        }
        Ok(())
    }
}

export_plugin!(Truncate);
