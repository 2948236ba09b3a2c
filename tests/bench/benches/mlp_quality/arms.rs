//! The arms: which plugin with which config, at equal counts.

use std::path::{Path, PathBuf};

use kvhook_bench::linear_map::{self, LinearMap};
use kvhook_bench::{Error, Result};
use kvhook_mlp_weights::{OpenOptions, Weights};
use serde_json::json;

/// Rows at the front and at the end that every arm keeps as they are.
pub const SINKS: usize = 4;
pub const RECENT: usize = 32;
/// Rows that become one.
pub const FACTORS: [usize; 2] = [2, 4];

/// What all others are compared with.
pub const STRIDE: &str = "stride";
/// What the gate is about.
pub const TRAINED: &str = "trained MLP";
/// The stride of `truncate`.
pub const TRUNCATE_STRIDE: &str = "truncate, stride";

/// One arm of a factor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arm {
    /// For tables.
    pub title: &'static str,
    /// As the host knows it.
    pub name: String,
    pub factor: usize,
    pub plugin: &'static str,
    pub config: String,
    /// Rows of each layer after compression.
    pub rows: usize,
}

/// Rows that `rows` become: sinks, recent rows, groups and the tail that fills no group.
pub fn compressed(rows: usize, factor: usize) -> usize {
    let between = rows.saturating_sub(SINKS + RECENT);
    rows - between + between / factor + between % factor
}

/// Weight files for `mlp-decouple`: those that were trained, and those made here, which vanish with this.
pub struct WeightFiles {
    _folder: tempfile::TempDir,
    files: Vec<(usize, &'static str, PathBuf)>,
}

impl WeightFiles {
    /// Makes the files of linear maps beside the trained ones of `trained`.
    ///
    /// # Errors
    /// Files that cannot be read or written.
    pub fn prepare(trained: &Path, linear: &[PathBuf], layers: usize) -> Result<Self> {
        let folder = tempfile::tempdir().map_err(|source| Error::File { path: std::env::temp_dir(), source })?;
        let linear = linear.iter().map(|path| linear_map::trained(path)).collect::<Result<Vec<_>>>()?;
        let mut files = Vec::new();
        for factor in FACTORS {
            let path = trained.join(format!("smollm2-135m-f{factor}.safetensors"));
            let weights = Weights::open(&path, &OpenOptions::default())?;
            files.push((factor, TRAINED, path));
            let mut last = vec![0.0; factor];
            last[factor - 1] = 1.0;
            let last = LinearMap::weighted(&last, weights.head_dim);
            let mean = LinearMap::weighted(&vec![1.0 / factor as f32; factor], weights.head_dim);
            let mut made = vec![
                (STRIDE, vec![[last.clone(), last.clone()]; layers]),
                ("stride K, mean V", vec![[last, mean.clone()]; layers]),
                ("mean", vec![[mean.clone(), mean]; layers]),
            ];
            let trained = linear.iter().filter(|(of, _)| *of == factor);
            made.extend(trained.map(|(_, maps)| ("trained linear map", maps.clone())));
            for (number, (title, maps)) in made.into_iter().enumerate() {
                let path = folder.path().join(format!("{factor}-{number}.safetensors"));
                linear_map::write(&path, factor, &maps, &weights.terms)?;
                files.push((factor, title, path));
            }
        }
        Ok(Self { _folder: folder, files })
    }

    /// All arms for a cache of `rows` rows.
    pub fn arms(&self, rows: usize) -> Vec<Arm> {
        FACTORS.iter().flat_map(|&factor| self.of_factor(factor, rows)).collect()
    }

    fn of_factor(&self, factor: usize, rows: usize) -> Vec<Arm> {
        let budget = compressed(rows, factor);
        let files = self.files.iter().filter(|(of, ..)| *of == factor);
        let mlp = files.map(|(_, title, path)| {
            let config = json!({"weights": path, "factor": factor, "sinks": SINKS, "recent": RECENT});
            (*title, "mlp-decouple", config)
        });
        let truncate = |title, rest: &[(&str, serde_json::Value)]| {
            let mut config = json!({"budget": budget, "sinks": SINKS, "recent": RECENT});
            for (key, value) in rest {
                config[*key] = value.clone();
            }
            (title, "truncate", config)
        };
        let (history, importance, window) = ("history", "importance", "window");
        let truncates = [
            truncate(TRUNCATE_STRIDE, &[(history, json!("stride"))]),
            truncate("truncate, key_diff", &[(history, json!("top")), (importance, json!("key_diff"))]),
            // Its window's rows are kept, so a window as long as the recent rows keeps the same ones.
            truncate(
                "truncate, attention",
                &[(history, json!("top")), (importance, json!("attention")), (window, json!(RECENT))],
            ),
        ];
        let arm = |(number, (title, plugin, config)): (usize, (_, _, serde_json::Value))| Arm {
            title,
            name: format!("f{factor}-{number}"),
            factor,
            plugin,
            config: config.to_string(),
            rows: budget,
        };
        mlp.chain(truncates).enumerate().map(arm).collect()
    }
}
