//! Serves requests: add, step, cancel. Greedy sampling.

use std::sync::Arc;

use crate::cache::CacheConfig;
use crate::error::{Error, Result};
use crate::hooks::{PluginConfig, SequenceReport};
use crate::model::Model;
use crate::quality::argmax;
use crate::runner::{Logits, Runner, Work};
use crate::scheduler::Scheduler;

/// How requests are served.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// How KV is kept.
    pub cache: CacheConfig,
    /// Most prompt tokens of one step.
    pub chunk: usize,
    /// Most sequences that hold cache at once.
    pub max_sequences: usize,
    /// Plugins that compress the caches; `None`: none, at no cost.
    pub plugins: Option<PluginConfig>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { cache: CacheConfig::default(), chunk: 512, max_sequences: 64, plugins: None }
    }
}

/// What someone asks the engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub tokens: Vec<u32>,
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// Whether the model's end token ends the answer. That token is not part of it.
    pub stop_at_eos: bool,
    /// Name of the arm that serves it; `none`: no plugin; `None`: chosen by `key` and the arms' weights.
    pub arm: Option<String>,
    /// What the arm is chosen by: the same key, the same arm; empty: the request itself.
    pub key: String,
    /// Most rows of another prompt's beginning that may be taken over; `None`: no limit.
    pub prefix_limit: Option<usize>,
}

/// A request's id, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's end token came.
    EndToken,
    /// The answer has as many tokens as allowed.
    Length,
    /// The model knows no further positions.
    ContextFull,
    /// The pool is too small for this request, even alone.
    OutOfBlocks,
    /// [`Engine::cancel`].
    Cancelled,
}

/// What happened in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A token of an answer.
    Token {
        /// The request.
        request: RequestId,
        /// The token.
        token: u32,
    },
    /// A request lost its cache to an older one; its tokens will be computed again.
    Preempted {
        /// The request.
        request: RequestId,
    },
    /// A request is done and its cache freed.
    Finished {
        /// The request.
        request: RequestId,
        /// Why.
        reason: FinishReason,
    },
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    last_id: u64,
    /// Events that happened between steps.
    pending: Vec<Event>,
}

impl Engine {
    /// An engine without requests.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting that cannot work, and as [`Runner::new`].
    pub fn new(model: Arc<Model>, config: EngineConfig) -> Result<Self> {
        for (setting, value) in [("chunk", config.chunk), ("max_sequences", config.max_sequences)] {
            if value == 0 {
                return Err(Error::Config { setting, found: "0".into(), expected: "at least 1".into() });
            }
        }
        let scheduler = Scheduler::new(config.chunk, config.max_sequences);
        let runner = match &config.plugins {
            Some(plugins) => Runner::with_plugins(model, config.cache, plugins)?,
            None => Runner::new(model, config.cache)?,
        };
        Ok(Self { runner, scheduler, last_id: 0, pending: Vec::new() })
    }

    /// The sequences below.
    pub fn runner(&self) -> &Runner {
        &self.runner
    }

    /// The sequences below, to be changed between steps.
    pub fn runner_mut(&mut self) -> &mut Runner {
        &mut self.runner
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::UnknownToken`] or [`Error::ContextFull`] for a prompt that cannot be run;
    /// [`Error::Plugin`] for an arm that there is not.
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        let config = &self.runner.model().config;
        if request.tokens.is_empty() {
            return Err(Error::Empty { what: "the prompt" });
        }
        if request.tokens.len() > config.context {
            return Err(Error::ContextFull { position: config.context, context: config.context });
        }
        if let Some(&token) = request.tokens.iter().find(|token| **token as usize >= config.vocab) {
            return Err(Error::UnknownToken { token, vocab: config.vocab });
        }
        if let (Some(plugins), Some(arm)) = (self.runner.plugins(), request.arm.as_deref().filter(|arm| *arm != "none"))
        {
            // Only an arm that there is has figures.
            plugins.figures(arm)?;
        }
        self.last_id += 1;
        let id = RequestId(self.last_id);
        self.scheduler.add(id, request);
        Ok(id)
    }

    /// Ends a request, if it is still there.
    ///
    /// # Errors
    /// [`Error::RankStopped`].
    pub fn cancel(&mut self, id: RequestId) -> Result<()> {
        self.scheduler.finish(id, FinishReason::Cancelled, &mut self.runner, &mut self.pending)
    }

    /// What compression did to a request's sequence; `None` while it holds no cache.
    pub fn report(&self, id: RequestId) -> Option<SequenceReport> {
        self.runner.report(self.scheduler.requests.get(&id)?.sequence?).ok()
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.scheduler.requests.is_empty()
    }

    /// Runs one step: a chunk of prompts if any is waiting and fits, else one token of every answer.
    ///
    /// # Errors
    /// As [`Runner::step`]; the requests stay as they were.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let mut events = std::mem::take(&mut self.pending);
        let planned = self.scheduler.plan(&mut self.runner, &mut events)?;
        if planned.is_empty() {
            return Ok(events);
        }
        let mut wanted = Vec::new();
        let work: Vec<Work<'_>> = planned
            .iter()
            .filter_map(|part| {
                let running = self.scheduler.requests.get(&part.request)?;
                Some(Work {
                    sequence: part.sequence,
                    tokens: &running.tokens[part.from..part.to],
                    phase: part.phase,
                    prompt_ends: part.samples && part.phase == crate::rank::Phase::Prefill,
                    logits: if part.samples { Logits::Last } else { Logits::None },
                })
            })
            .collect();
        for (part, work) in planned.iter().zip(&work).filter(|(_, work)| self.runner.will_ask(work)) {
            let rows = self.scheduler.wanted_rows(part.request, self.runner.shared_block_size());
            wanted.push((work.sequence, rows));
        }
        for (sequence, rows) in wanted {
            self.runner.set_wanted_rows(sequence, rows);
        }
        let logits = self.runner.step(&work)?;
        for (part, mut rows) in planned.iter().zip(logits) {
            self.scheduler.advance(part);
            if let Some(row) = rows.pop() {
                self.accept(part.request, argmax(&row), &mut events)?;
            }
        }
        Ok(events)
    }

    /// Appends a sampled token to a request's answer, or ends it.
    fn accept(&mut self, id: RequestId, token: u32, events: &mut Vec<Event>) -> Result<()> {
        let model = self.runner.model();
        let (eos, context) = (model.tokenizer.eos(), model.config.context);
        let Some(running) = self.scheduler.requests.get_mut(&id) else { return Ok(()) };
        let answered = running.tokens.len() - running.request.tokens.len();
        let reason = if running.request.stop_at_eos && Some(token) == eos {
            Some(FinishReason::EndToken)
        } else if answered >= running.request.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            running.tokens.push(token);
            events.push(Event::Token { request: id, token });
            if answered + 1 == running.request.max_new_tokens {
                Some(FinishReason::Length)
            } else if running.tokens.len() > context {
                Some(FinishReason::ContextFull)
            } else {
                None
            }
        };
        match reason {
            Some(reason) => self.scheduler.finish(id, reason, &mut self.runner, events),
            None => Ok(()),
        }
    }
}
