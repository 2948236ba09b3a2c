//! The plugin that implements every hook point and keeps everything: the measure of the hooks' own cost.

use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, Needs, Phases, Plugin, PluginError, Reason,
    Requests, StepView, export_plugin,
};

kvhook_abi::words! {
    /// Phases in which `before_attention` is called.
    pub enum Observe {
        /// Prefill and decode.
        All = "all",
        /// Prefill only.
        Prefill = "prefill",
        /// Never.
        None = "none",
    }
}

kvhook_abi::config! {
    /// Config of `noop`.
    pub struct Config {
        /// Phases in which before_attention is called: all, prefill or none.
        observe: Observe = "all";
        /// Call on_grown each time so many tokens were added; 0: never.
        every: u64 = 0;
    }
}

/// Keeps everything.
pub struct Noop(Config);

impl Plugin for Noop {
    type Config = Config;
    const ID: &'static str = "noop";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN).and(Hooks::BEFORE_ATTENTION).and(Hooks::ON_FREE);
    const MAY_NEED: Can = Can::QUERIES.and(Can::GROWN);

    fn create(_: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        Ok(Self(config))
    }

    fn needs(&self) -> Needs {
        let (queries, phases) = match self.0.observe {
            Observe::All => (Can::QUERIES, Phases::PREFILL.and(Phases::DECODE)),
            Observe::Prefill => (Can::QUERIES, Phases::PREFILL),
            Observe::None => (Can::NONE, Phases::NONE),
        };
        let grown = if self.0.every > 0 { Can::GROWN } else { Can::NONE };
        Needs { must: queries.and(grown), before_attention: phases, grown_every: self.0.every, ..Needs::default() }
    }

    fn bound(&self, _: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        Ok(Bound::Keep(Reason::None))
    }

    fn on_prefill_done(&mut self, _: &Call<'_>, mut requests: Requests<'_>) -> Result<(), PluginError> {
        requests.try_for_each(|request| request?.plan.keep(Reason::None, ""))
    }

    fn before_attention(&mut self, _: &Call<'_>, _: &StepView<'_>) -> Result<(), PluginError> {
        Ok(())
    }

    fn on_free(&mut self, _: u64, _: FreeReason) -> Result<(), PluginError> {
        Ok(())
    }
}

export_plugin!(Noop);
