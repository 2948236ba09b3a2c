//! The commonest kind of plugin: give each entry a score, keep the best.
//!
//! A [`Scorer`] says how good each entry of a head is. The base does the rest: how many are kept, sinks and recent
//! entries, selection for each head, order, short sequences, decode-time compression, and the last queries for those
//! who ask for them.

use std::collections::HashMap;

use kvhook_kernels::top_k::{Protected, top_k};
use kvhook_kernels::{Rows, parallel};

use crate::call::Call;
use crate::config::{Config, ConfigError, Key, Values};
#[cfg(feature = "cuda")]
use crate::cuda::{self, OnDevice};
use crate::error::PluginError;
use crate::model::LayerInfo;
use crate::offers::{Can, FreeReason, Hooks, Needs, Phases, Reason};
use crate::plan::{Plan, Request, Requests};
use crate::plugin::{Bound, BoundArgs, CreateContext, Plugin};
use crate::raw::KvhRange;
use crate::step::{StepSequence, StepView};
use crate::view::{LayerView, Queries, SegmentKind, Segments, SequenceView};

/// A method that scores entries. [`export_scorer!`](crate::export_scorer) makes a shared library of it.
pub trait Scorer: Sized + Send + Sync + 'static {
    /// Its own config, beside [`BaseConfig`]. [`NoConfig`](crate::NoConfig) when it has none.
    type Config: Config;
    /// Short name, as in an engine's config.
    const ID: &'static str;
    /// Version of the plugin.
    const VERSION: &'static str;
    /// Whether [`Self::window_queries`] may be above 0.
    const MAY_ASK_QUERIES: bool = false;
    /// Whether it is shown every query of the prompt: [`Self::see`] and [`Self::forget`] are implemented.
    const SEES_QUERIES: bool = false;

    /// Makes a scorer for one model and one rank.
    ///
    /// # Errors
    /// Config or model are not ones that it can work with.
    fn create(context: &CreateContext<'_>, config: Self::Config) -> Result<Self, PluginError>;

    /// How many of the last queries it wants in [`LayerView::queries`]. As many of the last entries are kept.
    fn window_queries(&self) -> u32 {
        0
    }

    /// Takes what it wants of the queries of one sequence in one layer of one step, in ordinary memory. Row
    /// `sequence.first_token + i` of `queries`, by token and query head, with RoPE applied, is that of position
    /// `sequence.first_position + i`.
    ///
    /// Layer by layer, each position from 0 on comes once and in order, in steps of any size. A sequence of which a
    /// position was not shown is never scored: it is kept.
    ///
    /// # Errors
    /// The step's sequences are kept.
    fn see(&mut self, layer: usize, sequence: &StepSequence<'_>, queries: &Rows) -> Result<(), PluginError> {
        let _ = (layer, sequence, queries);
        Ok(())
    }

    /// Drops what [`Self::see`] took of a sequence, of which it may have seen nothing. In [`Self::score`] its name is
    /// [`LayerView::uid`].
    fn forget(&mut self, uid: u64) {
        let _ = uid;
    }

    /// Scores the entries of one head of one layer: `scores[t]` for row `t`, higher is kept. NaN is an error. Heads
    /// run in parallel.
    ///
    /// # Errors
    /// The sequence is kept; others of the same call are not touched by it.
    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError>;

    /// Whether [`Self::score_on_device`] is implemented. Else a cache on a device is refused at `create`, and with
    /// [`Self::SEES_QUERIES`] always.
    #[cfg(feature = "cuda")]
    const ON_DEVICE: bool = false;

    /// Bytes of working memory that [`Self::score_on_device`] takes for each entry, about.
    #[cfg(feature = "cuda")]
    fn working_bytes(&self) -> usize {
        0
    }

    /// Enqueues the scores of all heads of some layers: `scores[i]`, `[kv_heads, length]`, of job `i`. As
    /// [`Self::score`] gives them, but for a NaN, which keeps that sequence when the host checks its plan.
    ///
    /// # Errors
    /// Every sequence of the call is kept.
    #[cfg(feature = "cuda")]
    fn score_on_device(
        &self,
        device: &cuda::Device,
        call: &Call<'_>,
        jobs: &[cuda::Job<'_>],
        scores: &[cuda::DeviceSlice<f32>],
        scratch: &mut cuda::Scratch<'_>,
    ) -> Result<(), PluginError> {
        let _ = (device, call, jobs, scores, scratch);
        Err(PluginError::Unsupported(format!("{} has no scores on a device", Self::ID)))
    }
}

/// Makes a shared library of a [`Scorer`](crate::Scorer). As [`export_plugin!`](crate::export_plugin).
#[macro_export]
macro_rules! export_scorer {
    ($scorer:ty) => {
        $crate::export_plugin!($crate::scorer::Scored<$scorer>);
    };
}

crate::words! {
    /// Which entries of a prompt may be dropped.
    pub enum Compressed {
        /// Text only: images stay whole.
        Text = "text",
        /// Images only: text stays whole.
        Image = "image",
        /// Both.
        Both = "both",
    }
}

crate::config! {
    /// The keys that every scorer has.
    pub struct BaseConfig {
        /// Fraction of the tokens seen that is kept; 0.5 when neither this nor `budget` is given.
        keep: Option<f64> = null, in 0.0..=1.0;
        /// Entries that are kept; instead of `keep`.
        budget: Option<u64> = null, from 1;
        /// Entries at the start that are always kept (attention sinks).
        sinks: u64 = 4;
        /// Most recent entries that are always kept.
        recent: u64 = 32;
        /// Sequences shorter than this are kept whole.
        min_tokens: u64 = 0;
        /// Compress again each time so many tokens were added; 0: only once, when the prompt is complete.
        every: u64 = 0;
        /// Which entries may be dropped: text, image or both.
        segments: Compressed = "both";
    }
}

/// The base's keys and the scorer's own.
pub struct Combined<C> {
    base: BaseConfig,
    own: C,
}

impl<C: Config> Config for Combined<C> {
    const KEYS: &'static [&'static [Key]] = {
        assert!(C::KEYS.len() == 1, "a scorer's config is one `config!`");
        &[BaseConfig::OWN_KEYS, C::KEYS[0]]
    };

    fn from_values(values: &mut Values) -> Result<Self, ConfigError> {
        let base = BaseConfig::from_values(values)?;
        if let (Some(keep), Some(_)) = (base.keep, base.budget) {
            return Err(ConfigError::bad_value("keep", keep, "either `keep` or `budget`, and both are given"));
        }
        Ok(Self { base, own: C::from_values(values)? })
    }
}

/// The plugin that a [`Scorer`] becomes.
pub struct Scored<S> {
    pub(crate) scorer: S,
    config: BaseConfig,
    pub(crate) protected: Protected,
    layers: Vec<LayerInfo>,
    pub(crate) window: usize,
    /// The last queries of each sequence, by uid, then by layer.
    queries: HashMap<u64, Vec<Window>>,
    /// Positions of each sequence that the scorer was shown, from 0 on without a gap, by uid, then by layer.
    shown: HashMap<u64, Vec<u64>>,
    /// For a cache on a device.
    #[cfg(feature = "cuda")]
    pub(crate) on_device: Option<OnDevice>,
}

impl<S: Scorer> Plugin for Scored<S> {
    type Config = Combined<S::Config>;
    const ID: &'static str = S::ID;
    const VERSION: &'static str = S::VERSION;
    const HOOKS: Hooks = {
        let plans = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN);
        let queries = S::MAY_ASK_QUERIES || S::SEES_QUERIES;
        if queries { plans.and(Hooks::BEFORE_ATTENTION).and(Hooks::ON_FREE) } else { plans }
    };
    const MAY_NEED: Can = {
        let queries = if S::SEES_QUERIES { Can::QUERIES.and(Can::ALL_QUERIES) } else { Can::QUERIES };
        let some = S::MAY_ASK_QUERIES || S::SEES_QUERIES;
        if some { Can::GROWN.and(queries).and(Can::STATE) } else { Can::GROWN }
    };

    fn create(context: &CreateContext<'_>, config: Self::Config) -> Result<Self, PluginError> {
        #[cfg(feature = "cuda")]
        let can = S::ON_DEVICE && !S::SEES_QUERIES;
        #[cfg(not(feature = "cuda"))]
        let can = false;
        if !context.model.on_cpu() && !can {
            return Err(PluginError::Unsupported(format!(
                "this scorer reads ordinary memory; the cache lies on a device of type {}",
                context.model.device_type
            )));
        }
        context.model.dtype()?;
        let scorer = S::create(context, config.own)?;
        let window = scorer.window_queries() as usize;
        #[cfg(feature = "cuda")]
        let on_device = match context.model.on_cpu() {
            true => None,
            false if config.base.segments != Compressed::Both => {
                let allowed = "both on a device: positions of rows are not read there";
                let word = if config.base.segments == Compressed::Text { "text" } else { "image" };
                return Err(ConfigError::bad_value("segments", word, allowed).into());
            }
            false => Some(OnDevice::open(context, window)?),
        };
        let protected = Protected {
            sinks: config.base.sinks.try_into().unwrap_or(usize::MAX),
            recent: usize::try_from(config.base.recent).unwrap_or(usize::MAX).max(window),
        };
        let layers = context.model.layers.clone();
        Ok(Self {
            scorer,
            config: config.base,
            protected,
            layers,
            window,
            queries: HashMap::new(),
            shown: HashMap::new(),
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    fn needs(&self) -> Needs {
        let mut needs = Needs {
            grown_every: self.config.every,
            min_tokens: self.config.min_tokens,
            window_queries: self.window as u32,
            ..Needs::default()
        };
        if self.config.every > 0 {
            needs.must = needs.must.and(Can::GROWN);
        }
        if S::SEES_QUERIES {
            needs.must = needs.must.and(Can::ALL_QUERIES);
            needs.window_queries = u32::MAX;
        }
        if needs.window_queries > 0 {
            needs.must = needs.must.and(Can::QUERIES).and(Can::STATE);
            needs.before_attention =
                if self.config.every > 0 { Phases::PREFILL.and(Phases::DECODE) } else { Phases::PREFILL };
            needs.layers = Some(self.layers.iter().map(LayerInfo::is_planned).collect());
        }
        needs
    }

    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let lengths: Vec<u64> = args.lengths().collect();
        if lengths.len() != self.layers.len() {
            return Err(PluginError::InvalidArgument(format!(
                "`args.lengths` has {} layers, the model {}",
                lengths.len(),
                self.layers.len()
            )));
        }
        if args.next_position < self.config.min_tokens {
            return Ok(Bound::Keep(Reason::TooShort));
        }
        let spared = self.spared(args.segments(), args.next_position);
        let own: Vec<u64> = self
            .layers
            .iter()
            .zip(&lengths)
            .map(
                |(layer, length)| {
                    if layer.is_planned() { self.count(*length, args.next_position, spared) } else { *length }
                },
            )
            .collect();
        if own == lengths {
            return Ok(Bound::Keep(Reason::NoGain));
        }
        // A layer that reads another's cache has that one's count.
        let shared = |(index, layer): (usize, &LayerInfo)| {
            layer.shared_with.and_then(|owner| own.get(owner)).copied().unwrap_or(own[index])
        };
        Ok(Bound::Rows(self.layers.iter().enumerate().map(shared).collect()))
    }

    fn on_prefill_done(&mut self, _call: &Call<'_>, mut requests: Requests<'_>) -> Result<(), PluginError> {
        #[cfg(feature = "cuda")]
        if self.on_device.is_some() {
            return self.plan_on_device(_call, requests);
        }
        requests.try_for_each(|request| {
            let Request { sequence, mut plan } = request?;
            // A failure keeps its own sequence only: a plan may not depend on what else is in the call.
            self.plan(&sequence, &mut plan).or_else(|error| {
                let reason = match error {
                    PluginError::Unsupported(_) => Reason::Unsupported,
                    _ => Reason::Other,
                };
                plan.keep(reason, &error.to_string())
            })
        })
    }

    fn before_attention(&mut self, _call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        if self.window == 0 && !S::SEES_QUERIES {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &mut self.on_device {
            return on_device.windows.see(&on_device.device, _call, step);
        }
        let q = step.q()?;
        for sequence in step.sequences() {
            let sequence = sequence?;
            if S::SEES_QUERIES {
                self.show(step.layer(), &sequence, &q)?;
            }
            if self.window == 0 {
                continue;
            }
            let layers = self.queries.entry(sequence.uid).or_default();
            if layers.len() < self.layers.len() {
                layers.resize_with(self.layers.len(), Window::default);
            }
            if let Some(window) = layers.get_mut(step.layer()) {
                window.append(&q, &sequence, self.window)?;
            }
        }
        Ok(())
    }

    fn on_free(&mut self, uid: u64, _reason: FreeReason) -> Result<(), PluginError> {
        self.queries.remove(&uid);
        if S::SEES_QUERIES && self.shown.remove(&uid).is_some() {
            self.scorer.forget(uid);
        }
        #[cfg(feature = "cuda")]
        if let Some(on_device) = &mut self.on_device {
            on_device.windows.forget(uid);
        }
        Ok(())
    }
}

impl<S: Scorer> Scored<S> {
    /// How many of `length` entries are kept. Depends on config, length and segments only.
    fn count(&self, length: u64, next_position: u64, spared: u64) -> u64 {
        let wanted = match self.config.budget {
            Some(budget) => budget,
            // Of all tokens seen, so that compressing again does not take the fraction of a fraction.
            None => (self.config.keep.unwrap_or(0.5) * next_position as f64) as u64,
        };
        let protected = self.protected.count(length as usize) as u64;
        wanted.max(protected.saturating_add(spared)).min(length)
    }

    /// Tokens that `segments` of the config spares.
    fn spared(&self, segments: Segments<'_>, next_position: u64) -> u64 {
        let images: u64 = segments
            .iter()
            .filter(|segment| segment.kind == SegmentKind::Image)
            .map(|segment| segment.length.min(next_position.saturating_sub(segment.start)))
            .sum();
        match self.config.segments {
            Compressed::Both => 0,
            Compressed::Text => images,
            Compressed::Image => next_position - images.min(next_position),
        }
    }

    /// The layers with the entries that each keeps; the reason where nothing is to be done.
    pub(crate) fn counts<'a>(
        &self,
        sequence: &SequenceView<'a>,
    ) -> Result<Result<Vec<(LayerView<'a>, usize)>, Reason>, PluginError> {
        if sequence.next_position() < self.config.min_tokens {
            return Ok(Err(Reason::TooShort));
        }
        let spared = self.spared(sequence.segments(), sequence.next_position());
        let mut layers = Vec::new();
        for layer in sequence.layers() {
            let layer = layer?;
            let length = layer.length() as u64;
            let count = if layer.is_planned() { self.count(length, sequence.next_position(), spared) } else { length };
            layers.push((layer, count as usize));
        }
        let all = layers.iter().all(|(layer, count)| *count == layer.length());
        Ok(if all { Err(Reason::NoGain) } else { Ok(layers) })
    }

    fn plan(&self, sequence: &SequenceView<'_>, plan: &mut Plan<'_>) -> Result<(), PluginError> {
        let layers = match self.counts(sequence)? {
            Ok(layers) => layers,
            Err(reason) => return plan.keep(reason, ""),
        };
        let mut heads = Vec::new();
        let mut bytes = 0;
        for (layer, count) in &layers {
            if !layer.is_planned() {
                // A layer that reads another's cache follows that one's plan.
                if layer.shared_with().is_none() {
                    plan.select_all(layer.index())?;
                }
                continue;
            }
            let Some(layer) = self.add_queries(*layer, sequence) else {
                return plan.keep(Reason::QueriesMissing, "");
            };
            if *count == 0 || *count == layer.length() {
                let all = [KvhRange { start: 0, length: *count as u64 }];
                plan.select_ranges(layer.index(), &all[..usize::from(*count > 0)])?;
                continue;
            }
            let k = layer.k()?;
            bytes += layer.kv_heads() * layer.length() * k.layout().row_bytes();
            let indices = plan.select(layer.index(), *count)?;
            heads.extend(indices.chunks_mut(*count).enumerate().map(|(head, indices)| (layer, head, indices)));
        }
        let segments = sequence.segments();
        parallel::for_each(heads, bytes, |(layer, head, indices)| self.choose(&layer, head, &segments, indices))
    }

    /// Shows the scorer one sequence's part of a step, unless one before it is missing.
    fn show(&mut self, layer: usize, sequence: &StepSequence<'_>, queries: &Rows) -> Result<(), PluginError> {
        let layers = self.shown.entry(sequence.uid).or_insert_with(|| vec![0; self.layers.len()]);
        let Some(end) = layers.get_mut(layer) else {
            let count = self.layers.len();
            return Err(PluginError::InvalidArgument(format!("layer {layer} of a model with {count}")));
        };
        if sequence.first_position == *end {
            self.scorer.see(layer, sequence, queries)?;
            *end += sequence.tokens as u64;
        }
        Ok(())
    }

    /// The layer with the sequence's last queries, or nothing when too few were seen.
    fn add_queries<'a>(&'a self, layer: LayerView<'a>, sequence: &SequenceView<'_>) -> Option<LayerView<'a>> {
        if S::SEES_QUERIES && *self.shown.get(&sequence.uid())?.get(layer.index())? != sequence.next_position() {
            return None;
        }
        if self.window == 0 {
            return Some(layer);
        }
        let window = self.queries.get(&sequence.uid())?.get(layer.index())?;
        let queries = Queries::new(&window.data, window.q_heads, window.head_dim);
        let expected = (self.window as u64).min(sequence.next_position());
        (queries.tokens() as u64 == expected).then(|| layer.with_queries(queries))
    }

    /// Fills `indices` with the best entries of one head.
    fn choose(
        &self,
        layer: &LayerView<'_>,
        head: usize,
        segments: &Segments<'_>,
        indices: &mut [u32],
    ) -> Result<(), PluginError> {
        let mut scores = vec![0.0; layer.length()];
        self.scorer.score(layer, head, &mut scores)?;
        let spares = match self.config.segments {
            Compressed::Both => None,
            Compressed::Text => Some(SegmentKind::Text),
            Compressed::Image => Some(SegmentKind::Image),
        };
        if let Some(droppable) = spares {
            for (token, score) in scores.iter_mut().enumerate() {
                let position = layer.position(token, head).unwrap_or(token as u64);
                // Nothing that a scorer says is better than what must stay.
                *score = if segments.kind_at(position) == droppable { score.min(f32::MAX) } else { f32::INFINITY };
            }
        }
        top_k(&scores, self.protected, indices)
            .map_err(|error| PluginError::Internal(format!("{}: layer {}, head {head}: {error}", S::ID, layer.index())))
    }
}

/// The last queries of one layer: f32, `[tokens, q_heads, head_dim]`.
#[derive(Default)]
struct Window {
    data: Vec<f32>,
    q_heads: usize,
    head_dim: usize,
    /// Position behind the last query.
    end: u64,
}

impl Window {
    /// Appends the queries of a step that are among the prompt's last `window`, or come after the prompt, and drops
    /// older ones.
    fn append(&mut self, q: &Rows, sequence: &StepSequence<'_>, window: usize) -> Result<(), PluginError> {
        (self.q_heads, self.head_dim) = (q.kv_heads(), q.head_dim());
        let row = self.q_heads * self.head_dim;
        let end = sequence.first_position + sequence.tokens as u64;
        let wanted_from = sequence.prompt_length.saturating_sub(window as u64).max(end.saturating_sub(window as u64));
        if sequence.first_position != self.end {
            // Queries that do not follow on each other are no window.
            self.data.clear();
        }
        self.end = end;
        // In prefill the window ends with the prompt, so what lies before it is never wanted.
        let from = wanted_from.max(sequence.first_position).min(end);
        for token in (from - sequence.first_position) as usize..sequence.tokens {
            let start = self.data.len();
            self.data.resize(start + row, 0.0);
            for (head, out) in self.data[start..].chunks_exact_mut(self.head_dim).enumerate() {
                q.load(sequence.first_token + token, head, out)?;
            }
        }
        let extra = self.data.len().saturating_sub(window * row);
        self.data.drain(..extra);
        Ok(())
    }
}
