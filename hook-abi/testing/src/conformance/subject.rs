//! What is checked: a plugin with a config, in an engine that suits it.

use kvhook_abi::kernels::Dtype;
use kvhook_abi::raw::*;

use super::file::File;
use crate::answer::Answer;
use crate::cache::{Form, dtype_of};
use crate::engine::{Engine, ROPE_BASE, Shape};
use crate::fault::Fault;
use crate::instance::{Instance, Seen};
use crate::random::Random;
use crate::sequence::Sequence;

/// A plugin, its config, and the model that it is checked with.
#[derive(Clone)]
pub struct Subject {
    /// The plugin.
    pub entry: &'static KvhPluginEntry,
    /// A config that it takes.
    pub config: String,
    /// The model's shape.
    pub shape: Shape,
    /// Base of the model's rotary positions.
    pub rope_base: f64,
    /// Where all random data comes from: a check is repeated by giving the same one.
    pub seed: u64,
    /// Its file; none: it is linked into the test, and rules about the file are not checked.
    pub file: Option<File>,
}

// SAFETY: an entry is a static that nobody writes.
unsafe impl Send for Subject {}
// SAFETY: as above.
unsafe impl Sync for Subject {}

impl Subject {
    /// Two layers with two KV heads of 16 channels, two query heads each; seed 1.
    pub fn new(entry: &'static KvhPluginEntry, config: impl Into<String>) -> Self {
        Self { entry, config: config.into(), shape: Shape::new(2, 2, 4, 16), rope_base: ROPE_BASE, seed: 1, file: None }
    }

    /// An engine for a dtype and a layout.
    pub(super) fn engine(&self, dtype: Dtype, form: Form) -> Engine {
        Engine {
            cache_dtype: dtype_of(dtype),
            block_size: form.block() as u32,
            rope_base: self.rope_base,
            ..Engine::new(self.shape)
        }
    }

    /// An engine for f32 in blocks of 16.
    pub(super) fn default_engine(&self) -> Engine {
        self.engine(Dtype::F32, FORM)
    }

    /// An instance for f32 in blocks of 16.
    ///
    /// # Errors
    /// As [`Engine::create`].
    pub fn instance(&self) -> Result<Instance, Fault> {
        self.default_engine().create(self.entry, &self.config)
    }

    /// A prompt whose bytes depend on the seed and `data` only.
    pub(super) fn prompt(&self, uid: u64, data: u64, tokens: usize) -> Sequence {
        self.prompt_in(uid, data, tokens, Dtype::F32, FORM)
    }

    /// The same, in a dtype and a layout.
    pub(super) fn prompt_in(&self, uid: u64, data: u64, tokens: usize, dtype: Dtype, form: Form) -> Sequence {
        let mut random = Random::new(self.seed.wrapping_mul(1_000_003) + data);
        let mut sequence = Sequence::random(uid, tokens, self.shape, dtype, form, &mut random);
        sequence.queries_seen = tokens as u64;
        sequence
    }

    /// Runs prompts as an engine does: what is wanted is shown, then plans are asked for. `data` is that of each prompt.
    pub(super) fn run(
        &self,
        instance: &mut Instance,
        prompts: &[Sequence],
        data: &[u64],
    ) -> Result<Vec<Answer>, Fault> {
        self.show(instance, prompts, data)?;
        instance.plan(prompts)
    }

    /// The same for one prompt, which ends after.
    pub(super) fn run_one(&self, instance: &mut Instance, prompt: &Sequence, data: u64) -> Result<Answer, Fault> {
        let mut answers = self.run(instance, std::slice::from_ref(prompt), &[data])?;
        end(instance, prompt.uid)?;
        answers.pop().map_or_else(|| super::broken("no answer"), Ok)
    }

    /// Shows what is wanted of prompts.
    pub(super) fn show(&self, instance: &mut Instance, prompts: &[Sequence], data: &[u64]) -> Result<(), Fault> {
        let needs = instance.needs()?;
        if needs.phases & KVH_PHASE_PREFILL == 0 {
            return Ok(());
        }
        let wanted = |layer: &usize| needs.layer_mask[layer / 64] >> (layer % 64) & 1 == 1;
        for layer in (0..self.shape.layers).filter(wanted) {
            let part = |(prompt, data): (&Sequence, &u64)| {
                let mut random = Random::new(self.seed + 7919 * data + layer as u64);
                // Positions, then heads, then channels.
                let queries = random.rows(prompt.prompt_length as usize, self.shape.q_heads, self.shape.head_dim);
                Seen { uid: prompt.uid, prompt_length: prompt.prompt_length, first_position: 0, queries }
            };
            let parts: Vec<Seen> = prompts.iter().zip(data).map(part).collect();
            let dtype = prompts[0].layers[layer].dtype();
            instance.see(layer, KVH_PHASE_PREFILL, &parts, dtype)?;
        }
        Ok(())
    }
}

/// The layout of checks that are not about layouts.
pub(super) const FORM: Form = Form::Paged { block: 16 };

/// Ends a sequence, where the plugin wants to know.
pub(super) fn end(instance: &mut Instance, uid: u64) -> Result<(), Fault> {
    match instance.free(uid) {
        Err(Fault::NotImplemented { .. }) => Ok(()),
        outcome => outcome,
    }
}
