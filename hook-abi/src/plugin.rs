//! The trait that a plugin implements.

use crate::boundary::Values;
use crate::call::{Call, Host};
use crate::config::Config;
use crate::error::PluginError;
use crate::model::ModelInfo;
use crate::offers::{Can, FreeReason, Hooks, Needs, Offers, Reason};
use crate::plan::Requests;
use crate::step::StepView;
use crate::view::Segments;

/// A plugin: one instance for one model and one rank. [`export_plugin!`](crate::export_plugin) makes a shared
/// library of it.
///
/// Calls on one instance are serial. A panic in any of them becomes a status, and the instance answers nothing any
/// more.
pub trait Plugin: Sized + Send + 'static {
    /// Its config, made by [`config!`](crate::config!).
    type Config: Config;
    /// Short name, as in an engine's config: `truncate`.
    const ID: &'static str;
    /// Version of the plugin.
    const VERSION: &'static str;
    /// The hook points that it implements. The functions of the others are never called.
    const HOOKS: Hooks;
    /// Whatever an instance may need with any config; [`Self::needs`] must stay within it.
    const MAY_NEED: Can = Can::NONE;
    /// Oldest minor version of a host that it works with.
    const REQUIRED_HOST_MINOR: u32 = 0;

    /// Makes an instance. Everything that can be checked is checked here. Thread: any.
    ///
    /// # Errors
    /// Config, model or offers are not ones that the plugin can work with.
    fn create(context: &CreateContext<'_>, config: Self::Config) -> Result<Self, PluginError>;

    /// What this instance needs. Called once, right after [`Self::create`].
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The most rows that a plan keeps for each layer. Every rank must give the same answer, so it depends on the
    /// arguments, the config and the model only. Thread: any.
    ///
    /// # Errors
    /// Counted by the host as a keep.
    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let _ = args;
        Ok(Bound::Keep(Reason::None))
    }

    /// Fills the plans of sequences whose prompt's KV is complete. Thread: the rank's.
    ///
    /// # Errors
    /// Every sequence of the call is kept.
    fn on_prefill_done(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        let _ = (call, requests);
        Ok(())
    }

    /// Fills the plans of sequences that have grown. By default as [`Self::on_prefill_done`]. Thread: the rank's.
    ///
    /// # Errors
    /// Every sequence of the call is kept.
    fn on_grown(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        self.on_prefill_done(call, requests)
    }

    /// Looks at one layer of one step. Thread: the rank's.
    ///
    /// # Errors
    /// The call's sequences are kept uncompressed.
    fn before_attention(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        let _ = (call, step);
        Ok(())
    }

    /// Drops what is kept for a sequence. Thread: any.
    ///
    /// # Errors
    /// Logged by the host.
    fn on_free(&mut self, uid: u64, reason: FreeReason) -> Result<(), PluginError> {
        let _ = (uid, reason);
        Ok(())
    }
}

/// What [`Plugin::create`] is told.
pub struct CreateContext<'a> {
    /// The host.
    pub host: &'a Host,
    /// The model, as this rank sees it.
    pub model: &'a ModelInfo,
    /// What the engine offers.
    pub offers: Offers,
}

/// All that a bound may depend on, besides config and model.
pub struct BoundArgs<'a> {
    /// Name of the sequence.
    pub uid: u64,
    /// Commits so far.
    pub epoch: u64,
    /// Position of the next token.
    pub next_position: u64,
    /// Tokens of the prompt.
    pub prompt_length: u64,
    pub(crate) lengths: Values<'a, u64>,
    pub(crate) segments: Segments<'a>,
}

impl<'a> BoundArgs<'a> {
    /// Rows stored in each layer.
    pub fn lengths(&self) -> impl Iterator<Item = u64> + use<'a> {
        self.lengths.iter()
    }

    /// Stretches of the prompt that have a kind.
    pub fn segments(&self) -> Segments<'a> {
        self.segments
    }
}

/// The most rows that a plan keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Everything is kept, for this reason.
    Keep(Reason),
    /// Rows for each layer of the model, in order.
    Rows(Vec<u64>),
}
