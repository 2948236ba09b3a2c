//! plugin-name: makes one entry of each two neighbours, their mean, but for the first entries and the most recent ones.
//!
//! That is an example. Say in [`Method::groups`] which entries become one, and in [`Method::rewrite`] what it holds.

use std::ops::Range;

use kvhook_abi::kernels::{KernelError, Rows};
use kvhook_abi::{
    Bound, BoundArgs, Call, Can, CreateContext, Hooks, Needs, Plan, Plugin, PluginError, Reason, Request, Requests,
    SequenceView, export_plugin,
};

kvhook_abi::config! {
    /// The plugin's config.
    pub struct Config {
        /// Entries at the start that stay as they are (attention sinks).
        sinks: u64 = 4;
        /// Most recent entries that stay as they are.
        recent: u64 = 32;
    }
}

/// The method, for one model.
pub struct Method {
    config: Config,
    /// For each layer, whether it is rewritten: sliding-window and other layers are left alone.
    layers: Vec<bool>,
}

impl Plugin for Method {
    type Config = Config;
    const ID: &'static str = "plugin-name";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const HOOKS: Hooks = Hooks::ON_PREFILL_DONE;
    const MAY_NEED: Can = Can::REWRITE;

    fn create(context: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        // It reads values: a cache whose elements nobody reads, like fp8, is refused here.
        context.model.dtype()?;
        if !context.model.on_cpu() {
            return Err(PluginError::Unsupported("it reads ordinary memory, and the cache lies on a device".into()));
        }
        Ok(Self { config, layers: context.model.layers.iter().map(|layer| layer.is_planned()).collect() })
    }

    fn needs(&self) -> Needs {
        Needs { must: Can::REWRITE, ..Needs::default() }
    }

    /// How many rows each layer will have. Lengths, segments and config decide that, never values.
    fn bound(&self, args: &BoundArgs<'_>) -> Result<Bound, PluginError> {
        let lengths: Vec<u64> = args.lengths().collect();
        let counts: Vec<u64> = lengths
            .iter()
            .zip(&self.layers)
            .map(|(length, rewritten)| if *rewritten { self.groups(*length).len() as u64 } else { *length })
            .collect();
        Ok(if counts == lengths { Bound::Keep(Reason::TooShort) } else { Bound::Rows(counts) })
    }

    fn on_prefill_done(&mut self, _: &Call<'_>, requests: Requests<'_>) -> Result<(), PluginError> {
        for request in requests {
            let Request { sequence, mut plan } = request?;
            // What fails keeps its own sequence: a plan may not depend on what else is in the call.
            if let Err(error) = self.rewrite(&sequence, &mut plan) {
                plan.keep(Reason::Other, &error.to_string())?;
            }
        }
        Ok(())
    }
}

impl Method {
    /// The rows that become one, for each new row of a layer with `length` rows.
    fn groups(&self, length: u64) -> Vec<Range<usize>> {
        let front = self.config.sinks.min(length);
        let pairs = (length - front).saturating_sub(self.config.recent) / 2;
        let merged = front + 2 * pairs;
        let single = |row: u64| row as usize..row as usize + 1;
        let pair = |row: u64| row as usize..row as usize + 2;
        (0..front).map(single).chain((front..merged).step_by(2).map(pair)).chain((merged..length).map(single)).collect()
    }

    /// Writes the new rows into memory that the host lends. The cache itself is only read.
    fn rewrite(&self, sequence: &SequenceView<'_>, plan: &mut Plan<'_>) -> Result<(), PluginError> {
        for (layer, lent) in sequence.layers().zip(plan.lend_rows()?) {
            let layer = layer?;
            if !layer.is_planned() {
                continue;
            }
            let groups = self.groups(layer.length() as u64);
            // A new row stands for the position of the first row that it is made of; all heads agree.
            let positions = plan.rewrite(layer.index(), groups.len(), true)?;
            for (position, group) in positions.iter_mut().zip(&groups) {
                *position = layer.position(group.start, 0).unwrap_or(group.start as u64) as u32;
            }
            for (from, to) in [(layer.k()?, lent.k()?), (layer.v()?, lent.v()?)] {
                for head in 0..layer.kv_heads() {
                    write_means(&from, &to, head, &groups)?;
                }
            }
        }
        Ok(())
    }
}

/// Row `i` of `to` becomes the mean of the rows `groups[i]` of `from`.
fn write_means(from: &Rows, to: &Rows, head: usize, groups: &[Range<usize>]) -> Result<(), KernelError> {
    let (mut row, mut mean) = (vec![0.0; from.head_dim()], vec![0.0; from.head_dim()]);
    for (index, group) in groups.iter().enumerate() {
        mean.fill(0.0);
        for token in group.clone() {
            from.load(token, head, &mut row)?;
            mean.iter_mut().zip(&row).for_each(|(mean, value)| *mean += value / group.len() as f32);
        }
        to.store(index, head, &mean)?;
    }
    Ok(())
}

export_plugin!(Method);
