//! Plans for the sequences of one call.

use std::sync::Arc;

use kvhook_abi::raw::KvhRange;
use kvhook_abi::tasks::Tasks;
use kvhook_abi::{LayerView, ModelInfo, Plan, PluginError, Reason, Requests, SequenceView};
use kvhook_kernels::parallel;
use kvhook_kernels::sample::Draw;
use kvhook_kernels::window_attention::WindowQueries;

use crate::budget::{self, Division, Tokens};
use crate::choose::{self, ByScore};
use crate::config::{History, Settings};
use crate::error::Kept;
use crate::importance::{self, Importance};
use crate::kinds::Kinds;
use crate::window::Windows;

/// All that plans are made from.
pub struct Planner<'a> {
    /// The config.
    pub settings: &'a Settings,
    /// The model.
    pub model: &'a ModelInfo,
    /// The last queries, where they are kept.
    pub windows: Option<&'a Windows>,
}

/// One layer of a sequence, and what of it is kept.
pub struct Wished<'a> {
    /// The layer.
    pub layer: LayerView<'a>,
    /// Rows that may be dropped.
    pub open: Tokens,
    /// Rows that are kept of those.
    pub keep: usize,
    /// Which.
    pub wish: Wish,
}

impl Wished<'_> {
    /// Rows that are kept.
    pub fn count(&self) -> usize {
        self.keep + self.open.whole as usize
    }
}

/// Which rows of a layer are kept.
pub enum Wish {
    /// All.
    All,
    /// These, for all heads.
    Ranges(Vec<KvhRange>),
    /// By their places.
    ByPlace,
    /// By their scores; a draw has the number of the layer, and the whole model's of the rank's first head.
    ByScore(ByScore, Importance),
}

/// The choice of one head's rows, which may run on any thread.
struct Task<'a> {
    layer: LayerView<'a>,
    head: usize,
    how: ByScore,
    importance: Importance,
    kinds: Arc<Kinds>,
    /// Rows that may be dropped, and how many of them are kept.
    open: Tokens,
    keep: usize,
    queries: Option<Arc<Window>>,
    out: &'a mut [u32],
}

/// The last queries of one layer.
struct Window {
    /// `[tokens, q_heads, head_dim]`.
    data: Vec<f32>,
    tokens: usize,
    q_heads: usize,
    /// Rows up to and including the newest query's.
    visible: usize,
}

impl Settings {
    /// The rows that each layer keeps, exactly.
    ///
    /// # Errors
    /// [`Kept`] when nothing would be dropped or rows that are kept whole are missing.
    pub fn counts(&self, position: u64, kinds: &Kinds, lengths: impl Iterator<Item = u64>) -> Result<Vec<u64>, Kept> {
        if position < self.min_tokens {
            return Err(Kept::NothingToDrop(Reason::TooShort));
        }
        let lengths: Vec<u64> = lengths.collect();
        if lengths.len() != self.layers.len() {
            return Err(Kept::Layers { found: lengths.len(), expected: self.layers.len() });
        }
        let counts = lengths
            .iter()
            .enumerate()
            .map(|(layer, &length)| {
                let Some(amount) = self.layers[layer] else { return Ok(length) };
                let tokens = self.tokens(layer, length, position, kinds)?;
                let keep = amount.rows(tokens);
                Ok(match self.history {
                    History::None { block: Some(block) } => {
                        let ranges = budget::streaming_blocks(length, keep, self.sinks as u64, block);
                        ranges.iter().map(|range| range.length).sum()
                    }
                    _ => tokens.whole + keep,
                })
            })
            .collect::<Result<Vec<u64>, Kept>>()?;
        if counts == lengths {
            return Err(Kept::NothingToDrop(Reason::NoGain));
        }
        Ok(counts)
    }

    fn tokens(&self, layer: usize, length: u64, position: u64, kinds: &Kinds) -> Result<Tokens, Kept> {
        Tokens::new(length, position, kinds.seen(position)).ok_or(self.whole_rows_missing(layer))
    }

    /// The rows of one head that may be dropped and the others.
    fn split(
        &self,
        layer: &LayerView<'_>,
        head: usize,
        kinds: &Kinds,
        tokens: Tokens,
    ) -> Result<(Vec<u32>, Vec<u32>), Kept> {
        if kinds.is_all() {
            return Ok(((0..layer.length() as u32).collect(), Vec::new()));
        }
        kinds
            .split(layer, head)
            .filter(|(open, _)| open.len() as u64 == tokens.stored)
            .ok_or_else(|| self.whole_rows_missing(layer.index()))
    }

    fn divide(&self, open: &[u32], length: usize, keep: usize, recent: usize) -> Division {
        choose::divide(open, length, keep, self.sinks, recent)
    }

    fn whole_rows_missing(&self, layer: usize) -> Kept {
        Kept::WholeRowsMissing { layer, compressed: self.compressed.word() }
    }
}

impl Planner<'_> {
    /// Fills every plan. A sequence that cannot be compressed is kept and says why; the others do not notice.
    ///
    /// # Errors
    /// The host described the call badly.
    pub fn fill(&self, requests: Requests<'_>) -> Result<(), PluginError> {
        let tasks =
            Tasks::lay_out(requests, |sequence, plan, tasks: &mut Vec<Task<'_>>| self.lay_out(sequence, plan, tasks))?;
        let work = tasks.iter().map(Task::work).sum();
        let threads = parallel::threads_for(tasks.iter().len(), work);
        tasks.run(threads, |task| task.run(self.settings))
    }

    /// What is to be kept of each layer of a sequence.
    ///
    /// # Errors
    /// [`Kept`] when nothing would be dropped or rows that are kept whole are missing.
    pub fn wishes<'a>(&self, sequence: &SequenceView<'a>, kinds: &Kinds) -> Result<Vec<Wished<'a>>, Kept> {
        let settings = self.settings;
        let position = sequence.next_position();
        // With room reserved, which collecting results does not do: this is on the way of every call.
        let mut layers = Vec::with_capacity(sequence.layer_count());
        for layer in sequence.layers() {
            layers.push(layer?);
        }
        let counts = settings.counts(position, kinds, layers.iter().map(|layer| layer.length() as u64))?;
        let mut wished = Vec::with_capacity(layers.len());
        for (layer, count) in layers.into_iter().zip(counts) {
            let (number, length) = (layer.index(), layer.length() as u64);
            if count == length {
                let open = Tokens { seen: length, stored: length, whole: 0 };
                wished.push(Wished { layer, open, keep: length as usize, wish: Wish::All });
                continue;
            }
            let open = settings.tokens(number, length, position, kinds)?;
            let keep = (count - open.whole) as usize;
            let wish = match settings.history {
                History::None { block } if kinds.is_all() => {
                    let sinks = settings.sinks as u64;
                    Wish::Ranges(match block {
                        None => budget::streaming(length, keep as u64, sinks),
                        Some(block) => {
                            // `count` is what the rounding gives; the ranges come from what was asked for.
                            let asked = settings.layers[number].map_or(open.stored, |amount| amount.rows(open));
                            budget::streaming_blocks(length, asked, sinks, block)
                        }
                    })
                }
                History::None { .. } | History::Stride => Wish::ByPlace,
                History::Top(importance) => Wish::ByScore(ByScore::Top, importance),
                History::Sample { importance, seed } => {
                    // The whole model's index of the head, so that ranks agree.
                    let head = self.model.first_kv_head;
                    let draw = Draw { seed, round: sequence.epoch(), layer: number as u32, head };
                    Wish::ByScore(ByScore::Sample(draw), importance)
                }
            };
            wished.push(Wished { layer, open, keep, wish });
        }
        Ok(wished)
    }

    /// Fills what needs no scores, and adds tasks for the rest.
    fn lay_out<'a>(
        &self,
        sequence: &SequenceView<'a>,
        plan: &mut Plan<'a>,
        tasks: &mut Vec<Task<'a>>,
    ) -> Result<(), Kept> {
        let kinds = Arc::new(Kinds::new(self.settings.compressed, sequence.segments(), sequence.next_position()));
        for Wished { layer, open, keep, wish } in self.wishes(sequence, &kinds)? {
            let layer = &layer;
            let (how, importance) = match wish {
                Wish::All => {
                    plan.select_all(layer.index())?;
                    continue;
                }
                Wish::Ranges(ranges) => {
                    plan.select_ranges(layer.index(), &ranges)?;
                    continue;
                }
                Wish::ByPlace => {
                    self.by_place(layer, plan, &kinds, open, keep)?;
                    continue;
                }
                Wish::ByScore(how, importance) => (how, importance),
            };
            let queries = self.window(sequence, layer, importance)?.map(Arc::new);
            let count = keep + open.whole as usize;
            let out = plan.select(layer.index(), count)?;
            for (head, out) in out.chunks_exact_mut(count).enumerate() {
                let how = match how {
                    ByScore::Top => ByScore::Top,
                    ByScore::Sample(draw) => ByScore::Sample(Draw { head: draw.head + head as u32, ..draw }),
                };
                tasks.push(Task {
                    layer: *layer,
                    head,
                    how,
                    importance,
                    kinds: kinds.clone(),
                    open,
                    keep,
                    queries: queries.clone(),
                    out,
                });
            }
        }
        Ok(())
    }

    /// Rows that depend on their places only: the same for all heads, unless heads hold different positions.
    fn by_place<'a>(
        &self,
        layer: &LayerView<'a>,
        plan: &mut Plan<'a>,
        kinds: &Kinds,
        tokens: Tokens,
        keep: usize,
    ) -> Result<(), Kept> {
        let count = keep + tokens.whole as usize;
        let heads = if kinds.is_all() { 1 } else { layer.kv_heads() };
        let mut kept = vec![0; heads * count];
        for (head, kept) in kept.chunks_exact_mut(count).enumerate() {
            let (open, whole) = self.settings.split(layer, head, kinds, tokens)?;
            let division = self.settings.divide(&open, layer.length(), keep, self.settings.recent);
            let division = match self.settings.history {
                // All that is not a sink is recent.
                History::None { .. } => Division { recent: keep - division.sinks, chosen: 0, ..division },
                _ => division,
            };
            choose::stride(&open, division, &mut kept[..keep]);
            merge(kept, keep, &whole);
        }
        if kept.chunks_exact(count).all(|head| head == &kept[..count]) {
            plan.select_shared(layer.index(), &kept[..count])?;
        } else {
            plan.select(layer.index(), count)?.copy_from_slice(&kept);
        }
        Ok(())
    }

    /// The queries that the score of one layer needs, if any.
    fn window(
        &self,
        sequence: &SequenceView<'_>,
        layer: &LayerView<'_>,
        importance: Importance,
    ) -> Result<Option<Window>, Kept> {
        let Importance::Attention { window, .. } = importance else { return Ok(None) };
        let (number, length) = (layer.index(), layer.length());
        let missing = |held, wanted| Kept::QueriesMissing { layer: number, held, wanted };
        let ring = self.windows.and_then(|windows| windows.get(sequence.uid(), number));
        let ring = ring.ok_or_else(|| missing(0, window as usize))?;
        // Rows behind the newest query's, which were appended since.
        let newer = sequence.next_position().checked_sub(ring.end()).and_then(|newer| usize::try_from(newer).ok());
        let visible = newer.and_then(|newer| length.checked_sub(newer)).ok_or_else(|| missing(0, window as usize))?;
        // A query sees the rows up to its own. Where an earlier compression dropped rows that near, there are fewer.
        let in_place = |age: &usize| {
            let position = ring.end().checked_sub(*age as u64);
            (0..layer.kv_heads()).all(|head| layer.position(visible - age, head) == position)
        };
        let tokens = (1..=visible.min(window as usize)).take_while(in_place).count();
        if tokens == 0 || ring.held() < tokens {
            return Err(missing(ring.held(), tokens.max(1)));
        }
        let q_heads = self.model.layers.get(number).map_or(0, |info| info.q_heads);
        Ok(Some(Window { data: ring.last(tokens), tokens, q_heads, visible }))
    }
}

/// Puts the rows that are kept whole among the `keep` chosen ones, ascending.
fn merge(out: &mut [u32], keep: usize, whole: &[u32]) {
    if !whole.is_empty() {
        out[keep..].copy_from_slice(whole);
        out.sort_unstable();
    }
}

impl Task<'_> {
    /// Fills `out` with the rows that are kept, ascending.
    fn run(self, settings: &Settings) -> Result<(), Kept> {
        let Task { layer, head, importance, keep, out, .. } = self;
        let score = |source| Kept::Score { layer: layer.index(), head, source };
        let (open, whole) = settings.split(&layer, head, &self.kinds, self.open)?;
        let length = layer.length();
        let (visible, window) = match &self.queries {
            Some(window) => (window.visible, window.tokens),
            None => (length, 0),
        };
        let mut scores = vec![0.0; length];
        if importance.reads_keys() {
            let keys = layer.k()?;
            let queries = self
                .queries
                .as_ref()
                .map(|window| WindowQueries::dense(&window.data, window.tokens, window.q_heads, keys.head_dim()));
            importance::scores(importance, &keys, head, queries.as_ref(), &mut scores[..visible]).map_err(score)?;
        }
        if let ByScore::Sample(_) = self.how {
            importance::weights(importance, &mut scores);
        }
        // The window's own rows are kept: its queries say little about them.
        let recent = settings.recent.max(length - visible + window);
        let division = settings.divide(&open, length, keep, recent);
        let scores: Vec<f32> = open.iter().map(|row| scores[*row as usize]).collect();
        choose::by_score(self.how, &open, &scores, division, &mut out[..keep]).map_err(score)?;
        merge(out, keep, &whole);
        Ok(())
    }

    /// Bytes that take about as long to read as this task.
    fn work(&self) -> usize {
        let row = self.layer.k().map_or(0, |keys| keys.layout().row_bytes());
        let passes = match &self.queries {
            // A multiplication of a row by a query costs about an eighth of reading it.
            Some(window) => 1 + window.tokens * window.q_heads / self.layer.kv_heads().max(1) / 8,
            None => 2,
        };
        self.layer.length() * row * passes
    }
}
