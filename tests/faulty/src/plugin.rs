//! The plugin itself, on the safe side: it fails and panics behind the real guard, and makes good plans.

use std::any::Any;
use std::panic::panic_any;

use kvhook_abi::raw::KvhRange;
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, FreeReason, Hooks, LayerView, Memory, Needs, Phases, Plan, Plugin,
    PluginError, Reason, Request, Requests, SequenceView, StepView,
};

use crate::breaks::Breaker;
use crate::config::{BoundAnswer, Config, Damage, Fault, PlanKind};
use crate::count::Counted;
use crate::damage;

/// A plugin that misbehaves as its config says.
pub struct Faulty {
    config: Config,
    /// Whether this rank is one that misbehaves.
    concerned: bool,
    /// Calls of hooks so far.
    calls: u64,
    breaker: Breaker,
    _counted: Counted,
}

impl Plugin for Faulty {
    type Config = Config;
    const ID: &'static str = "faulty";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE.and(Hooks::ON_GROWN).and(Hooks::BEFORE_ATTENTION).and(Hooks::ON_FREE);
    const MAY_NEED: Can = Can(u64::MAX);

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        let concerned = config.rank.is_none_or(|rank| rank as usize == context.model.rank as usize);
        if concerned {
            misbehave(config.create, "create")?;
        }
        let breaker = Breaker::new(config.breaks);
        Ok(Self { config, concerned, calls: 0, breaker, _counted: Counted::new() })
    }

    fn needs(&self) -> Needs {
        if self.concerned {
            // The trait lets no error out of here: one of the two is a panic.
            if let Err(error) = misbehave(self.config.needs, "needs") {
                panic_any(error.to_string());
            }
        }
        Needs {
            must: Can(self.config.must),
            before_attention: Phases(self.config.phases),
            layers: None,
            window_queries: self.config.window,
            grown_every: self.config.every,
            min_tokens: self.config.min_tokens,
        }
    }

    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        if self.acts_up() {
            misbehave(self.config.bound, "bound")?;
        }
        if self.config.answer == BoundAnswer::TooShort {
            return Ok(Bound::Keep(Reason::TooShort));
        }
        let more = self.breaker.more_rows();
        let count = |(layer, length): (u64, u64)| match self.config.answer {
            BoundAnswer::Above => length + 1,
            BoundAnswer::Zero => 0,
            BoundAnswer::All => length,
            BoundAnswer::Unequal => (self.kept(length) + layer).min(length),
            BoundAnswer::Good | BoundAnswer::TooShort => (self.kept(length) + more).min(length),
        };
        Ok(Bound::Rows((0..).zip(args.lengths()).map(count).collect()))
    }

    fn on_prefill_done(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        self.plan(self.config.prefill_done, "on_prefill_done", call, requests)
    }

    fn on_grown(&mut self, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        self.plan(self.config.grown, "on_grown", call, requests)
    }

    fn before_attention(&mut self, call: &Call<'_>, step: &StepView<'_>) -> Result<(), PluginError> {
        if self.acts_up() {
            misbehave(self.config.before_attention, "before_attention")?;
        }
        self.calls += 1;
        if self.config.allocate > 0 && !step.is_empty() {
            call.allocate::<u8>(Memory::Sequence(0), self.config.allocate as usize)?;
        }
        Ok(())
    }

    fn on_free(&mut self, uid: u64, _: FreeReason) -> Result<(), PluginError> {
        self.breaker.forget(uid);
        if self.acts_up() {
            misbehave(self.config.free, "on_free")?;
        }
        self.calls += 1;
        Ok(())
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        if let Err(error) = misbehave(self.config.destroy, "destroy") {
            panic_any(error.to_string());
        }
    }
}

impl Faulty {
    /// Whether the next call may go wrong.
    fn acts_up(&self) -> bool {
        self.concerned && self.calls >= self.config.after
    }

    fn kept(&self, length: u64) -> u64 {
        ((length as f64 * self.config.keep) as u64).clamp(1, length.max(1))
    }

    fn plan(&mut self, fault: Fault, hook: &str, call: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        if self.acts_up() {
            misbehave(fault, hook)?;
            damage::order(self.config.damage, self.config.layer);
        }
        self.calls += 1;
        for request in requests {
            let Request { sequence, mut plan } = request?;
            if self.config.allocate > 0 {
                let index = plan.index();
                for memory in [Memory::Call, Memory::Ticket(index), Memory::Sequence(index)] {
                    call.allocate::<u8>(memory, self.config.allocate as usize)?;
                }
            }
            let strays = self.breaker.strays(call, &sequence)?;
            self.fill(&sequence, &mut plan, strays)?;
        }
        Ok(())
    }

    fn fill(&self, sequence: &SequenceView<'_>, plan: &mut Plan<'_>, strays: bool) -> Result<(), PluginError> {
        if self.config.plan == PlanKind::Keep {
            return plan.keep(Reason::Other, "the config says keep");
        }
        let lent = match self.config.plan {
            PlanKind::Rewrite if self.config.damage != Damage::NotLent => plan.lend_rows()?,
            _ => Vec::new(),
        };
        for index in 0..sequence.layer_count() {
            let layer = sequence.layer(index)?;
            let count = self.planned(&layer, index);
            if self.config.damage == Damage::WriteCache {
                let key = layer.k()?.row_ptr(0, 0).map_err(|error| PluginError::Internal(error.to_string()))?;
                // SAFETY: the row exists. A plugin must not write it: that is the damage.
                unsafe { key.write(!key.read()) };
            }
            match self.config.plan {
                PlanKind::Ranges => {
                    let (first, length) = (count.div_ceil(2) as u64, layer.length() as u64);
                    let last = count as u64 - first;
                    let ranges =
                        [KvhRange { start: 0, length: first }, KvhRange { start: length - last, length: last }];
                    plan.select_ranges(index, &ranges[..if last == 0 { 1 } else { 2 }])?;
                }
                PlanKind::SelectHeads => {
                    let indices = plan.select(index, count)?;
                    for (head, indices) in indices.chunks_mut(count.max(1)).enumerate() {
                        indices.copy_from_slice(&spread(layer.length(), count, head));
                    }
                }
                PlanKind::Rewrite => {
                    let rows = spread(layer.length(), count, 0);
                    if let Some(lent) = lent.get(index) {
                        copy_rows(&layer, &rows, (lent.k()?, lent.v()?))?;
                    }
                    let positions = plan.rewrite(index, count, true)?;
                    for (position, row) in positions.iter_mut().zip(&rows) {
                        *position = layer.position(*row as usize, 0).unwrap_or_default() as u32;
                    }
                }
                PlanKind::Select | PlanKind::Keep => {
                    let spread = spread(layer.length(), count, if strays { 1 } else { 0 });
                    plan.select_shared(index, &spread)?;
                }
            }
        }
        Ok(())
    }

    /// Rows that are kept of a layer: what `bound` answered, where that was possible.
    fn planned(&self, layer: &LayerView<'_>, index: usize) -> usize {
        let length = layer.length() as u64;
        let count = match self.config.answer {
            BoundAnswer::Unequal => (self.kept(length) + index as u64).min(length),
            BoundAnswer::All => length,
            _ => self.kept(length),
        };
        count as usize
    }
}

/// `count` ascending rows of `length`: evenly spread for even heads, the last ones for odd heads.
fn spread(length: usize, count: usize, head: usize) -> Vec<u32> {
    let row = |i: usize| if head.is_multiple_of(2) { i * length / count } else { length.saturating_sub(count) + i };
    (0..count).map(|i| row(i) as u32).collect()
}

type KAndV = (kvhook_abi::kernels::Rows, kvhook_abi::kernels::Rows);

fn copy_rows(layer: &LayerView<'_>, rows: &[u32], to: KAndV) -> Result<(), PluginError> {
    let internal = |error: kvhook_abi::kernels::KernelError| PluginError::Internal(error.to_string());
    for (from, to) in [(layer.k()?, to.0), (layer.v()?, to.1)] {
        let mut row = vec![0.0; from.head_dim()];
        for head in 0..layer.kv_heads() {
            for (index, source) in rows.iter().enumerate() {
                from.load(*source as usize, head, &mut row).map_err(internal)?;
                to.store(index, head, &row).map_err(internal)?;
            }
        }
    }
    Ok(())
}

/// A panic's payload that panics again when it is dropped.
struct Payload;

impl Drop for Payload {
    fn drop(&mut self) {
        panic_any("the payload of faulty's panic panics when it is dropped");
    }
}

fn misbehave(fault: Fault, place: &str) -> Result<(), PluginError> {
    let text = format!("faulty: {place} goes wrong as its config says");
    match fault {
        Fault::None => Ok(()),
        Fault::Fail => Err(PluginError::Internal(text)),
        Fault::Unsupported => Err(PluginError::Unsupported(text)),
        Fault::OutOfMemory => Err(PluginError::OutOfMemory(text)),
        Fault::Panic => panic_any(text),
        Fault::PanicTwice => panic_any::<Box<dyn Any + Send>>(Box::new(Payload)),
    }
}
