//! plugin-name: keeps the entries whose values are long and, with `key_weight`, whose keys are short.
//!
//! That is an example. Put your own score into [`Method::score`], and what it depends on into [`Config`].

use kvhook_abi::kernels::norms::row_norms;
use kvhook_abi::{CreateContext, LayerView, PluginError, Scorer, export_scorer};

kvhook_abi::config! {
    /// The plugin's own config, beside `keep`, `budget`, `sinks`, `recent`, `min_tokens`, `every` of every scorer.
    pub struct Config {
        /// How much the norm of an entry's key counts against it.
        key_weight: f32 = 0.0, in 0.0..=100.0;
    }
}

/// The method, for one model.
pub struct Method(Config);

impl Scorer for Method {
    type Config = Config;
    const ID: &'static str = "plugin-name";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");

    fn create(_: &CreateContext<'_>, config: Config) -> Result<Self, PluginError> {
        Ok(Self(config))
    }

    /// One score for each entry of one head of one layer; the highest are kept.
    fn score(&self, layer: &LayerView<'_>, head: usize, scores: &mut [f32]) -> Result<(), PluginError> {
        let rows = 0..layer.length();
        row_norms(&layer.v()?, head..head + 1, rows.clone(), scores)?;
        if self.0.key_weight > 0.0 {
            let mut keys = vec![0.0; rows.len()];
            row_norms(&layer.k()?, head..head + 1, rows, &mut keys)?;
            scores.iter_mut().zip(keys).for_each(|(score, key)| *score -= self.0.key_weight * key);
        }
        Ok(())
    }
}

export_scorer!(Method);
