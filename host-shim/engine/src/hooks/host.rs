//! A safe wrapper of a host and its C functions.

use std::ffi::c_void;
use std::fmt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use kvhook_abi::raw::*;
use kvhook_host::c_api::*;
use kvhook_host::raw::*;

use super::callbacks::{Context, callbacks};
use super::figures::Figures;
use super::report::{FreeReason, Reason};
use super::views::{array, array_mut, describe_all, dtype};
use super::{ArmConfig, PluginConfig, Source};
use crate::cache::{CacheConfig, CacheKind, LayerCache, RankCache, SequenceId};
use crate::device::Backend;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::rank::{HeadShard, RankState};

/// Bytes of an error's message.
const MESSAGE_BYTES: usize = 2048;

/// A plugin host, for one model on all ranks of this process. May be used from any thread.
pub struct KvPlugins {
    host: NonNull<KvhookHost>,
    layers: usize,
    /// Behind the callbacks; outlives the host.
    context: Box<Context>,
}

// SAFETY: the host's functions may be called from any thread, concurrently; the context is only read.
unsafe impl Send for KvPlugins {}
// SAFETY: as above.
unsafe impl Sync for KvPlugins {}

impl fmt::Debug for KvPlugins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KvPlugins")
    }
}

/// What the host wants for a sequence.
pub(super) struct Began {
    pub(super) uid: u64,
    pub(super) max_prefix_hit: usize,
    pub(super) phases: u32,
    pub(super) on_prefill_done: bool,
    pub(super) grown_every: u64,
}

/// When a sequence may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    PrefillDone,
    Grown,
}

impl Occasion {
    fn number(self) -> i32 {
        match self {
            Self::PrefillDone => KVHOOK_EVENT_PREFILL_DONE,
            Self::Grown => KVHOOK_EVENT_GROWN,
        }
    }
}

/// A sequence as it is asked about and prepared.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) id: SequenceId,
    pub(super) uid: u64,
    pub(super) occasion: Occasion,
    pub(super) layers: Vec<LayerCache>,
    pub(super) next_position: u32,
    pub(super) shared_rows: usize,
    pub(super) published_rows: usize,
    /// Fresh blocks are reserved.
    pub(super) fresh: bool,
}

/// An answer to a question.
pub(super) enum Answer {
    Keep(Reason),
    /// The most rows that each layer keeps, and whether fresh ones are needed.
    Prepare {
        counts: Vec<usize>,
        fresh: bool,
    },
}

/// A ticket's number, or why there is none.
pub(super) type Prepared = std::result::Result<u64, Reason>;

/// State of a ticket.
pub(super) enum Verdict {
    Pending,
    Dropped(Reason),
    Ready {
        movement: i32,
        /// Layers that keep all their rows need fresh ones with the others.
        rewrites: bool,
        counts: Vec<usize>,
    },
}

/// A ticket to carry out.
#[derive(Debug, Clone)]
pub(super) struct Commit {
    pub(super) id: SequenceId,
    pub(super) ticket: u64,
    pub(super) layers: Vec<LayerCache>,
    /// Fresh blocks of each layer; `None`: rows are not copied to fresh ones.
    pub(super) fresh: Option<Vec<Vec<u32>>>,
    pub(super) next_position: u32,
}

/// What a commit left on a rank.
pub(super) struct Committed {
    pub(super) lengths: Vec<usize>,
    pub(super) next_position: u32,
    /// Bytes that a contiguous cache gave back.
    pub(super) freed: usize,
}

impl KvPlugins {
    /// Makes a host for a model and its cache, with the arms of a config.
    ///
    /// # Errors
    /// [`Error::Plugin`] with the host's status: a form that is not valid, a plugin that cannot be loaded, refuses its
    /// config or needs what this engine does not offer. [`Error::Config`] for a path that is not UTF-8.
    pub fn new(model: &Config, cache: &CacheConfig, config: &PluginConfig, backend: &Backend) -> Result<Arc<Self>> {
        let context = Box::new(Context { allocations: config.allocations.clone(), backend: backend.clone() });
        let shards: Vec<HeadShard> = (0..cache.ranks).map(|rank| HeadShard::new(model, rank, cache.ranks)).collect();
        let layers: Vec<Vec<KvhLayerInfo>> = shards.iter().map(|shard| layer_infos(model, shard)).collect();
        let frequencies: Vec<f32> = model.rope_frequencies.iter().map(|frequency| *frequency as f32).collect();
        let models: Vec<KvhModel> = shards
            .iter()
            .zip(&layers)
            .enumerate()
            .map(|(rank, (shard, layers))| {
                rank_model(model, cache, backend.device(), rank, shard, layers, &frequencies)
            })
            .collect();
        let folders = config.folders.iter().map(|folder| text_of(folder)).collect::<Result<Vec<_>>>()?;
        let folders: Vec<KvhStr> = folders.into_iter().map(KvhStr::new).collect();
        let raw = KvhookHostConfig {
            struct_size: size_of::<KvhookHostConfig>(),
            engine: KvhStr::new(concat!("kvhook-engine ", env!("CARGO_PKG_VERSION"))),
            callbacks: &callbacks(&context),
            models: array(&models),
            offers: &offers(model, cache, config.commit_lag),
            plugin_folders: array(&folders),
            copy_folder: KvhStr::new(config.copy_folder.as_deref().map_or(Ok(""), text_of)?),
        };
        let mut host = ptr::null_mut();
        // SAFETY: everything that the config leads to lives until the call returns, the context as long as the host.
        call("kvhook_host_create", |error| unsafe { kvhook_host_create(&raw, &mut host, error) })?;
        let missing = || Error::Config { setting: "the host", found: "null".into(), expected: "a host".into() };
        let host = NonNull::new(host).ok_or_else(missing)?;
        let plugins = Self { host, layers: model.layers, context };
        if !config.kv_plugin.is_empty() {
            plugins.configure(&config.kv_plugin, config.source)?;
        }
        for arm in &config.arms {
            plugins.set_arm(arm, config.source)?;
        }
        Ok(Arc::new(plugins))
    }

    /// Replaces all arms by those of a `kv_plugin` form.
    ///
    /// # Errors
    /// [`Error::Plugin`]; then nothing changed.
    pub fn configure(&self, kv_plugin: &str, source: Source) -> Result<()> {
        // SAFETY: the host lives, the text is borrowed for the call.
        call("kvhook_configure", |error| unsafe {
            kvhook_configure(self.host.as_ptr(), KvhStr::new(kv_plugin), source_number(source), error)
        })
    }

    /// Adds an arm, or replaces the plugin of the arm of that name.
    ///
    /// # Errors
    /// [`Error::Plugin`]; then nothing changed.
    pub fn set_arm(&self, arm: &ArmConfig, source: Source) -> Result<()> {
        let raw = KvhookArm {
            struct_size: size_of::<KvhookArm>(),
            name: KvhStr::new(&arm.name),
            plugin: KvhStr::new(&arm.plugin),
            config: KvhStr::new(&arm.config),
            sha256: KvhStr::new(""),
            layers: KvhStr::new(&arm.layers),
            min_tokens: arm.min_tokens,
            weight: arm.weight,
            source: source_number(source),
            reserved0: 0,
        };
        // SAFETY: the host lives, the arm's texts are borrowed for the call.
        call("kvhook_arm_set", |error| unsafe { kvhook_arm_set(self.host.as_ptr(), &raw, error) })
    }

    /// Changes an arm's share of the sequences that name none.
    ///
    /// # Errors
    /// [`Error::Plugin`] for an unknown arm or a weight that is not finite or below 0.
    pub fn set_weight(&self, arm: &str, weight: f64) -> Result<()> {
        // SAFETY: the host lives, the text is borrowed for the call.
        call("kvhook_arm_weight", |error| unsafe {
            kvhook_arm_weight(self.host.as_ptr(), KvhStr::new(arm), weight, error)
        })
    }

    /// Changes arms by a command (JSON text, as `docs/live.md` describes it), as a whole or not at all. Any thread, while
    /// the engine runs.
    ///
    /// # Errors
    /// [`Error::Plugin`]; then nothing changed.
    pub fn control(&self, command: &str, source: Source) -> Result<()> {
        // SAFETY: the host lives, the text is borrowed for the call.
        call("kvhook_control", |error| unsafe {
            kvhook_control(self.host.as_ptr(), KvhStr::new(command), source_number(source), error)
        })
    }

    /// The arms, as JSON text.
    ///
    /// # Errors
    /// [`Error::Plugin`] for a defect of the host.
    pub fn arms_json(&self) -> Result<String> {
        // SAFETY: the host lives, the buffer is lent.
        whole_text("kvhook_arms_json", |out, error| unsafe { kvhook_arms_json(self.host.as_ptr(), out, error) })
    }

    /// Removes an arm; its sequences stay as they are from now on.
    ///
    /// # Errors
    /// [`Error::Plugin`] for an unknown arm.
    pub fn remove_arm(&self, arm: &str) -> Result<()> {
        // SAFETY: the host lives, the text is borrowed for the call.
        call("kvhook_arm_remove", |error| unsafe { kvhook_arm_remove(self.host.as_ptr(), KvhStr::new(arm), error) })
    }

    /// What an arm did so far.
    ///
    /// # Errors
    /// [`Error::Plugin`] for an unknown arm.
    pub fn figures(&self, arm: &str) -> Result<Figures> {
        Figures::read(|figures| {
            // SAFETY: the host lives; the figures lend room for as many reasons as they say.
            call("kvhook_figures", |error| unsafe {
                kvhook_figures(self.host.as_ptr(), KvhStr::new(arm), figures, error)
            })
        })
    }

    /// Figures of all arms as JSON text.
    ///
    /// # Errors
    /// [`Error::Plugin`] for a defect of the host.
    pub fn figures_json(&self) -> Result<String> {
        // SAFETY: the host lives, the buffer is lent.
        whole_text("kvhook_figures_json", |out, error| unsafe { kvhook_figures_json(self.host.as_ptr(), out, error) })
    }

    /// Figures of all arms in Prometheus' text format.
    ///
    /// # Errors
    /// [`Error::Plugin`] for a defect of the host.
    pub fn figures_prometheus(&self) -> Result<String> {
        // SAFETY: the host lives, the buffer is lent.
        whole_text("kvhook_figures_prometheus", |out, error| unsafe {
            kvhook_figures_prometheus(self.host.as_ptr(), out, error)
        })
    }

    pub(super) fn begin(&self, arm: &str, key: &str, prompt_length: usize) -> Result<Began> {
        let begin = KvhookBegin {
            struct_size: size_of::<KvhookBegin>(),
            key: KvhStr::new(key),
            arm: KvhStr::new(arm),
            prompt_length: prompt_length as u64,
            segments: array::<KvhSegment>(&[]),
        };
        // SAFETY: the host lives, the texts are borrowed for the call.
        began("kvhook_begin", |out, error| unsafe { kvhook_begin(self.host.as_ptr(), &begin, out, error) })
    }

    pub(super) fn fork(&self, uid: u64) -> Result<Began> {
        // SAFETY: the host lives.
        began("kvhook_fork", |out, error| unsafe { kvhook_fork(self.host.as_ptr(), uid, out, error) })
    }

    pub(super) fn cut(&self, uid: u64, lengths: &[u64], next_position: u32) -> Result<()> {
        let lengths = array(lengths);
        // SAFETY: the host lives, the lengths are borrowed for the call.
        call("kvhook_cut", |error| unsafe {
            kvhook_cut(self.host.as_ptr(), uid, &lengths, next_position.into(), error)
        })
    }

    pub(super) fn free(&self, uid: u64, reason: FreeReason) -> Result<()> {
        // SAFETY: the host lives; the stream lives as long as the context.
        call("kvhook_free", |error| unsafe {
            kvhook_free(self.host.as_ptr(), uid, reason.number(), self.stream(), error)
        })
    }

    pub(super) fn reset(&self) -> Result<()> {
        // SAFETY: the host lives; the stream lives as long as the context.
        call("kvhook_reset", |error| unsafe { kvhook_reset(self.host.as_ptr(), self.stream(), error) })
    }

    /// The stream of all work; null on the CPU.
    fn stream(&self) -> *mut c_void {
        self.context.backend.stream()
    }

    pub(super) fn ask(&self, candidate: &Candidate) -> Result<Answer> {
        let lengths: Vec<u64> = candidate.layers.iter().map(|layer| layer.len as u64).collect();
        let mut counts = vec![0u64; self.layers];
        let ask = KvhookAsk {
            struct_size: size_of::<KvhookAsk>(),
            uid: candidate.uid,
            event: candidate.occasion.number(),
            reserved0: 0,
            lengths: array(&lengths),
            next_position: candidate.next_position.into(),
            shared_rows: candidate.shared_rows as u64,
            published_rows: candidate.published_rows as u64,
        };
        let mut answer = KvhookAnswer {
            struct_size: size_of::<KvhookAnswer>(),
            decision: KVHOOK_DECISION_KEEP,
            reason: KVH_REASON_NONE,
            counts: array_mut(&mut counts),
        };
        // SAFETY: the host lives; lengths and counts are lent for the call.
        call("kvhook_ask", |error| unsafe { kvhook_ask(self.host.as_ptr(), &ask, &mut answer, error) })?;
        Ok(match answer.decision {
            KVHOOK_DECISION_KEEP => Answer::Keep(Reason(answer.reason)),
            decision => Answer::Prepare { counts: lengths_of(&counts), fresh: decision == KVHOOK_DECISION_FRESH },
        })
    }

    /// Prepares sequences on the rank's thread; for each the ticket, or why it is kept.
    pub(super) fn prepare(&self, rank: &mut RankState, candidates: &[Candidate]) -> Result<Vec<Prepared>> {
        let backend = &self.context.backend;
        let views = candidates
            .iter()
            .map(|candidate| describe_all(backend, rank, candidate.id, &candidate.layers))
            .collect::<Result<Vec<_>>>()?;
        let mut sequences: Vec<KvhookPrepareSequence> = candidates
            .iter()
            .zip(&views)
            .map(|(candidate, layers)| KvhookPrepareSequence {
                struct_size: size_of::<KvhookPrepareSequence>(),
                uid: candidate.uid,
                event: candidate.occasion.number(),
                fresh: candidate.fresh.into(),
                layers: layers.array(),
                next_position: candidate.next_position.into(),
                shared_rows: candidate.shared_rows as u64,
                published_rows: candidate.published_rows as u64,
                ticket: 0,
                reason: KVH_REASON_NONE,
                reserved1: 0,
            })
            .collect();
        let lent = array_mut(&mut sequences);
        // SAFETY: the host lives. The rows belong to this rank, on whose thread we are, and are described as they lie:
        // tables come from the block pool, whose numbers lie in every rank's buffers. Nobody writes them meanwhile; on a
        // CUDA device all work, the going back of the tables too, is behind this on the same stream.
        call("kvhook_prepare", |error| unsafe {
            kvhook_prepare(self.host.as_ptr(), rank.rank as u32, lent, self.stream(), error)
        })?;
        let answer = |sequence: &KvhookPrepareSequence| match sequence.ticket {
            0 => Err(Reason(sequence.reason)),
            ticket => Ok(ticket),
        };
        Ok(sequences.iter().map(answer).collect())
    }

    pub(super) fn verdict(&self, ticket: u64) -> Result<Verdict> {
        let mut counts = vec![0u64; self.layers];
        let mut verdict = KvhookVerdict {
            struct_size: size_of::<KvhookVerdict>(),
            verdict: KVHOOK_VERDICT_PENDING,
            reason: KVH_REASON_NONE,
            movement: 0,
            rewrites: 0,
            planned_position: 0,
            counts: array_mut(&mut counts),
        };
        // SAFETY: the host lives; the counts are lent for the call.
        call("kvhook_verdict", |error| unsafe { kvhook_verdict(self.host.as_ptr(), ticket, &mut verdict, error) })?;
        Ok(match verdict.verdict {
            KVHOOK_VERDICT_READY => Verdict::Ready {
                movement: verdict.movement,
                rewrites: verdict.rewrites != 0,
                counts: lengths_of(&counts),
            },
            KVHOOK_VERDICT_DROPPED => Verdict::Dropped(Reason(verdict.reason)),
            _ => Verdict::Pending,
        })
    }

    /// Drops a ticket because there is no room for its rows.
    pub(super) fn drop_for_room(&self, ticket: u64) -> Result<()> {
        self.drop_because(ticket, KVH_REASON_NO_ROOM)
    }

    /// Drops a ticket that a rank of this engine could not work with; nothing where the host has dropped it already.
    pub(super) fn give_up(&self, ticket: u64) {
        let _ = self.drop_because(ticket, KVHOOK_REASON_DROPPED);
    }

    fn drop_because(&self, ticket: u64, reason: KvhookReason) -> Result<()> {
        // SAFETY: the host lives.
        call("kvhook_drop", |error| unsafe { kvhook_drop(self.host.as_ptr(), ticket, reason, error) })
    }

    /// Ordinals of the blocks that each layer's table keeps.
    pub(super) fn table_edit(&self, ticket: u64) -> Result<Vec<Vec<usize>>> {
        let empty = || KvhookTableEdit { struct_size: size_of::<KvhookTableEdit>(), blocks: ptr::null(), count: 0 };
        let mut edits: Vec<KvhookTableEdit> = (0..self.layers).map(|_| empty()).collect();
        let lent = array_mut(&mut edits);
        // SAFETY: the host lives; the edits are lent for the call.
        call("kvhook_table_edit", |error| unsafe { kvhook_table_edit(self.host.as_ptr(), ticket, lent, error) })?;
        let ordinals = |edit: &KvhookTableEdit| {
            if edit.blocks.is_null() || edit.count == 0 {
                return Vec::new();
            }
            // SAFETY: the host's memory, valid until the ticket is committed, which is after this copy.
            let blocks = unsafe { std::slice::from_raw_parts(edit.blocks, edit.count as usize) };
            blocks.iter().map(|block| *block as usize).collect()
        };
        Ok(edits.iter().map(ordinals).collect())
    }

    /// Carries a ticket out on the rank's thread. A contiguous cache then gives back the room that became free.
    pub(super) fn commit(&self, rank: &mut RankState, commit: &Commit) -> Result<Committed> {
        let backend = &self.context.backend;
        let views = describe_all(backend, rank, commit.id, &commit.layers)?;
        let fresh_layers = commit.fresh.as_ref().map_or_else(Vec::new, |blocks| fresh_layers(rank, blocks));
        let fresh = describe_all(backend, rank, commit.id, &fresh_layers)?;
        let mut lengths = vec![0u64; self.layers];
        let mut raw = KvhookCommit {
            struct_size: size_of::<KvhookCommit>(),
            ticket: commit.ticket,
            layers: views.array(),
            fresh: fresh.array(),
            next_position: commit.next_position.into(),
            stream: self.stream(),
            lengths: array_mut(&mut lengths),
            new_next_position: 0,
        };
        // SAFETY: the host lives. The rows belong to this rank, on whose thread we are, and are described as they lie;
        // those to be written are the sequence's alone, or fresh.
        call("kvhook_commit", |error| unsafe { kvhook_commit(self.host.as_ptr(), rank.rank as u32, &mut raw, error) })?;
        let lengths = lengths_of(&lengths);
        let mut freed = 0;
        if let RankCache::Contiguous(cache) = &mut rank.cache {
            let layers = commit.layers.iter().zip(&lengths).enumerate();
            for (layer, (_, &length)) in layers.filter(|(_, (before, after))| before.len != **after) {
                freed += cache.shrink(commit.id, layer, length);
            }
        }
        Ok(Committed { lengths, next_position: raw.new_next_position as u32, freed })
    }

    pub(super) fn wants(&self, rank: usize) -> u32 {
        // SAFETY: the host lives.
        unsafe { kvhook_wants(self.host.as_ptr(), rank as u32) }
    }

    /// # Safety
    /// The step's tensors and rows are as described, and not written during the call.
    pub(super) unsafe fn before_attention(&self, rank: usize, step: &KvhookStep) -> Result<()> {
        // SAFETY: the host lives; the rest is passed on from the caller.
        call("kvhook_before_attention", |error| unsafe {
            kvhook_before_attention(self.host.as_ptr(), rank as u32, step, error)
        })
    }

    /// Positions of a layer's `length` rows on a rank, for each of `heads` KV heads. On the rank's thread.
    pub(crate) fn positions(
        &self,
        rank: &RankState,
        uid: u64,
        layer: usize,
        length: usize,
        next_position: u32,
    ) -> Result<Vec<Vec<u32>>> {
        let mut table = KvhPositions { data: ptr::null(), stride_head: 0, count: 0 };
        // SAFETY: the host lives.
        call("kvhook_positions", |error| unsafe {
            kvhook_positions(self.host.as_ptr(), rank.rank as u32, uid, layer as u32, &mut table, error)
        })?;
        let count = (table.count as usize).min(length);
        let of_head = |head: usize| {
            let mut positions = Vec::new();
            if count > 0 && !table.data.is_null() {
                let of_head = table.data.wrapping_offset(head as isize * table.stride_head as isize);
                // SAFETY: the host's table for this layer on the rank's device, valid until the sequence's next commit, cut
                // or end, none of which runs meanwhile: the caller holds the runner.
                positions = unsafe { self.context.backend.read(of_head, count) }?;
            }
            positions.extend((count..length).map(|row| next_position - (length - row) as u32));
            Ok(positions)
        };
        (0..rank.shard.kv_heads.len()).map(of_head).collect()
    }

    pub(super) fn freed(&self, uid: u64, bytes: usize) -> Result<()> {
        // SAFETY: the host lives.
        call("kvhook_freed", |error| unsafe { kvhook_freed(self.host.as_ptr(), uid, bytes as u64, error) })
    }
}

impl Drop for KvPlugins {
    fn drop(&mut self) {
        // SAFETY: it came from `kvhook_host_create`, and whoever used it held a reference to `self`.
        unsafe { kvhook_host_destroy(self.host.as_ptr()) }
    }
}

/// Fresh blocks as layers whose length is the room in them.
fn fresh_layers(rank: &RankState, blocks: &[Vec<u32>]) -> Vec<LayerCache> {
    let size = rank.cache.block_size().unwrap_or(0);
    blocks.iter().map(|blocks| LayerCache { len: blocks.len() * size, blocks: blocks.clone() }).collect()
}

/// Calls a function of the host; a status that is not OK becomes an error with the host's words.
fn call(function: &'static str, run: impl FnOnce(*mut KvhText) -> KvhookStatus) -> Result<()> {
    let mut buffer = [0; MESSAGE_BYTES];
    let mut text = KvhText::over(&mut buffer);
    let status = run(&mut text);
    if status == KVHOOK_OK {
        return Ok(());
    }
    let length = text.length.min(MESSAGE_BYTES);
    let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Err(Error::Plugin { function, status, name: static_text(kvhook_status_name(status)), message })
}

fn began(function: &'static str, run: impl FnOnce(*mut KvhookSequence, *mut KvhText) -> KvhookStatus) -> Result<Began> {
    let mut out = KvhookSequence {
        struct_size: size_of::<KvhookSequence>(),
        uid: 0,
        max_prefix_hit: 0,
        before_attention_phases: 0,
        on_prefill_done: 0,
        grown_every: 0,
    };
    call(function, |error| run(&mut out, error))?;
    Ok(Began {
        uid: out.uid,
        max_prefix_hit: out.max_prefix_hit as usize,
        phases: out.before_attention_phases,
        on_prefill_done: out.on_prefill_done != 0,
        grown_every: out.grown_every,
    })
}

/// A text of any length: the host says how much room it takes.
fn whole_text(function: &'static str, run: impl Fn(*mut KvhText, *mut KvhText) -> KvhookStatus) -> Result<String> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let mut out = KvhText::over(&mut buffer);
        let mut status = KVHOOK_OK;
        let result = call(function, |error| {
            status = run(&mut out, error);
            status
        });
        let length = out.length;
        if status != KVHOOK_ERR_BUFFER_TOO_SMALL {
            result?;
            buffer.truncate(length);
            return Ok(String::from_utf8_lossy(&buffer).into_owned());
        }
        // The figures may have grown by the next call.
        buffer.resize(length + 1024, 0);
    }
}

/// One of the host's static texts.
pub(super) fn static_text(text: KvhStr) -> &'static str {
    if text.data.is_null() {
        return "";
    }
    // SAFETY: the host documents names as static texts.
    let bytes = unsafe { std::slice::from_raw_parts(text.data.cast::<u8>(), text.length) };
    std::str::from_utf8(bytes).unwrap_or("")
}

fn lengths_of(counts: &[u64]) -> Vec<usize> {
    counts.iter().map(|count| *count as usize).collect()
}

fn text_of(path: &Path) -> Result<&str> {
    let not_utf8 = || Error::Config {
        setting: "plugin folder",
        found: path.display().to_string(),
        expected: "a path in UTF-8".into(),
    };
    path.to_str().ok_or_else(not_utf8)
}

fn source_number(source: Source) -> i32 {
    match source {
        Source::Operator => KVHOOK_SOURCE_OPERATOR,
        Source::Model => KVHOOK_SOURCE_MODEL,
    }
}

/// What this engine serves. With a lag, rows are appended to a plan before it is committed, at positions that a plan
/// which moves positions does not know.
fn offers(model: &Config, cache: &CacheConfig, commit_lag: usize) -> KvhOffers {
    let moves = if commit_lag == 0 { KVH_CAN_MOVE_POSITIONS } else { 0 };
    KvhOffers {
        struct_size: size_of::<KvhOffers>(),
        can: KVH_CAN_QUERIES
            | KVH_CAN_ALL_QUERIES
            | KVH_CAN_LAYER_COUNTS
            | KVH_CAN_STATE
            | KVH_CAN_REWRITE
            | KVH_CAN_GROWN
            | moves,
        max_window_queries: model.context as u32,
        block_size: match cache.kind {
            CacheKind::Contiguous => 0,
            CacheKind::Paged { block_size, .. } => block_size as u32,
        },
    }
}

fn layer_infos(model: &Config, shard: &HeadShard) -> Vec<KvhLayerInfo> {
    let info = |_| KvhLayerInfo {
        struct_size: size_of::<KvhLayerInfo>(),
        kind: KVH_LAYER_FULL,
        flags: 0,
        window: 0,
        shared_with: -1,
        kv_heads: shard.kv_heads.len() as u32,
        q_heads: shard.query_heads.len() as u32,
        k_head_dim: model.head_dim as u32,
        v_head_dim: model.head_dim as u32,
    };
    (0..model.layers).map(info).collect()
}

fn rank_model(
    model: &Config,
    cache: &CacheConfig,
    device: KvhDevice,
    rank: usize,
    shard: &HeadShard,
    layers: &[KvhLayerInfo],
    frequencies: &[f32],
) -> KvhModel {
    let scaled = model.rope_is_scaled();
    KvhModel {
        struct_size: size_of::<KvhModel>(),
        name: KvhStr::new("llama"),
        rank: rank as u32,
        ranks: cache.ranks as u32,
        total_kv_heads: model.kv_heads as u32,
        first_kv_head: shard.kv_heads.start as u32,
        device,
        cache_dtype: dtype(cache.dtype),
        position_axes: 1,
        max_positions: model.context as u64,
        rope_base: if scaled { 0.0 } else { model.rope_base },
        rope_frequencies: if scaled { frequencies.as_ptr() } else { ptr::null() },
        rotary_dim: model.head_dim as u32,
        rope_pairing: KVH_ROPE_INTERLEAVED,
        layers: array(layers),
    }
}
