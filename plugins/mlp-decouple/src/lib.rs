//! The plugin that makes one entry of each group of adjacent ones, by MLPs: FastCache's compressor.
//!
//! * its config, checked against model and weight file: [`config`];
//! * the packed weights, once for all instances of a process: [`mlps`];
//! * which rows are compressed, and what stands at each place afterwards: [`stretches`];
//! * the plans, in parallel over sequences, layers, K and V: [`plan`];
//! * the same on a CUDA device: `on_device`, behind the feature `cuda`.

pub mod config;
pub mod error;
pub mod mlps;
#[cfg(feature = "cuda")]
pub mod on_device;
pub mod plan;
pub mod stretches;

use std::sync::Arc;

use kvhook_abi::tasks::Kept as _;
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, Hooks, Needs, Plugin, PluginError, Requests, export_plugin,
};

use crate::config::{Config, Settings};
use crate::mlps::Mlps;
use crate::plan::Planner;
use crate::stretches::PositionRule;

/// One instance.
pub struct MlpDecouple {
    settings: Settings,
    place: Place,
}

/// Where the cache lies, and with it the weights.
enum Place {
    Memory(Arc<Mlps>),
    #[cfg(feature = "cuda")]
    Device(Arc<on_device::OnDevice>),
}

impl Plugin for MlpDecouple {
    type Config = Config;
    const ID: &'static str = "mlp-decouple";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN);
    const MAY_NEED: Can = Can::REWRITE.and(Can::MOVE_POSITIONS).and(Can::GROWN).and(Can::LAYER_COUNTS);

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        let (settings, weights) = config::open(&config, context)?;
        let place = match context.model.on_cpu() {
            #[cfg(feature = "cuda")]
            false => Place::Device(on_device::OnDevice::shared(context, &settings, &weights)?),
            _ => Place::Memory(Mlps::shared(&weights)?),
        };
        Ok(Self { settings, place })
    }

    fn needs(&self) -> Needs {
        let settings = &self.settings;
        let mut must = Can::REWRITE;
        if settings.positions == PositionRule::Compacted {
            must = must.and(Can::MOVE_POSITIONS);
        }
        if settings.every > 0 {
            must = must.and(Can::GROWN);
        }
        if settings.layers_differ {
            must = must.and(Can::LAYER_COUNTS);
        }
        Needs { must, min_tokens: settings.min_tokens, grown_every: settings.every, ..Needs::default() }
    }

    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let lengths: Vec<u64> = args.lengths().collect();
        let layout = self.settings.layout(args.epoch, args.next_position, args.segments(), &lengths);
        Ok(match layout {
            Ok(layers) => Bound::Rows(layers.iter().map(|runs| stretches::rows(runs)).collect()),
            Err(kept) => Bound::Keep(kept.reason()),
        })
    }

    fn on_prefill_done(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        match &self.place {
            Place::Memory(mlps) => Planner { settings: &self.settings, mlps }.fill(call, requests),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.fill(&self.settings, call, requests),
        }
    }
}

export_plugin!(MlpDecouple);
